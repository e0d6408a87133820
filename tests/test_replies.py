"""Whatever one client says to the server costs that client only: attacks on a run through Flower's messages."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import rounds, run
from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict

from fedmm.flower import client_app
from fedmm.runs.folder import read_rows

DEEP = "[" * 100_000 + "]" * 100_000
HALF = "\ud800"


@pytest.fixture(scope="module")
def honest(backbone, tmp_path_factory) -> Path:
    """What clients 1 and 2 make of a round without client 0's update is not compared: client 0 sends an honest one."""
    return run(backbone, tmp_path_factory.mktemp("honest") / "run", "arm=fedavg", "rounds=1")


def failed(path: Path, round: int = 1) -> dict[str, str]:
    return next(e for e in read_rows(path / "events.jsonl") if e["event"] == "round" and e["round"] == round)["failed"]


def spoil_replies(monkeypatch, spoil, kinds=("train",)):
    """Let client 0's replies of these kinds pass through `spoil` on their way."""
    deliver = client_app.app.__class__.__call__

    def delivered(app, message, context):
        reply = deliver(app, message, context)
        hostile = context.node_config["partition-id"] == 0 and message.metadata.message_type in kinds
        return spoil(reply, message) if hostile else reply

    monkeypatch.setattr(client_app.app.__class__, "__call__", delivered)


def put(record: str, **values):
    """A spoiler that overwrites fields of one of the reply's records."""

    def spoil(reply: Message, message: Message) -> Message:
        content = reply.content
        content[record] = ConfigRecord({**content.config_records[record], **values})
        return reply

    return spoil


def texts(text: str):
    """Each answer of the report says `text`, in the columns of today and in the JSON that a report once was."""

    def spoil(reply: Message, message: Message) -> Message:
        record = reply.content.config_records["answers"]
        if "json" in record:
            rows = json.loads(str(record["json"]))
            return put("answers", json=json.dumps([[part, id, text, truth] for part, id, _, truth in rows]))(
                reply, message
            )
        return put("answers", said=[text] * len(record["said"]))(reply, message)

    return spoil


def without_content(reply: Message, message: Message) -> Message:
    return Message(RecordDict(), reply_to=message)


def renamed_metric(reply: Message, message: Message) -> Message:
    reply.content["metrics"]["\x1b[2J" + "x" * 10_000] = 1.0
    return reply


def without_metric(reply: Message, message: Message) -> Message:
    del reply.content["metrics"]["edge_parameters"]  # the report page reads it
    return reply


def list_of_metrics(reply: Message, message: Message) -> Message:
    reply.content["metrics"] = MetricRecord({"seconds": [1.0, 2.0]})
    return reply


def many_answers(reply: Message, message: Message) -> Message:
    record = dict(reply.content.config_records["answers"])
    if "json" in record:
        rows = [[0, f"x/{i}", "y" * 4000, "z"] for i in range(50_000)]
        return put("answers", json=json.dumps(rows))(reply, message)
    count = 50_000
    return put(
        "answers",
        parts=[0] * count, ids=[f"x/{i}" for i in range(count)], said=["y" * 4000] * count, truths=["z"] * count,
    )(reply, message)  # fmt: skip


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (put("scores", json=DEEP, parts=DEEP), "parts must be a list of int"),
        (put("answers", json=DEEP, said=DEEP), "said must be a list of str"),
        (texts(HALF), "half a surrogate pair"),
        (texts("long " * 1000), "said is longer than"),
        (many_answers, "bytes, and at most"),
        (without_content, "no record 'fedmm'"),
        (renamed_metric, r"has a metric '\\x1b[2Jxxx"),
        (without_metric, "lacks the metric edge_parameters"),
        (list_of_metrics, "metrics must be numbers"),
        (put("fedmm", client=True), "client must be an integer"),
        (put("fedmm", client=10**30), "more than 64 bits"),
        (put("scores", parts=[0, 0], right=[1, 1], count=[4, 4], json='{"0": [1]}'), "scores a part twice"),
        (put("scores", parts=[0], right=[1, 1], count=[4], json="{}["), "must be of one length"),
        (put("scores", parts=[0], right=[5], count=[4], json='{"0": [5, 4]}'), "scores part 0 with 5 of 4"),
        (put("scores", parts=[0], right=[400], count=[400], json='{"0": [400, 400]}'), "400 questions of 4"),
        (put("scores", parts=[0], right=[True], count=[4], json='{"0": [true, 4]}'), "right must be a list of int"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_reply_that_is_no_report_costs_its_client_only(backbone, honest, tmp_path, monkeypatch, spoil, says):
    spoil_replies(monkeypatch, spoil)
    path = run(backbone, tmp_path / "run", "arm=fedavg", "rounds=1")
    assert failed(path).keys() == {"0"} and says in failed(path)["0"]
    assert rounds(path) == rounds(honest), "its update came over the link, and everybody's bits are the same"
    (path / "report.html").read_text().encode()
