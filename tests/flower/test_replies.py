"""Whatever one client says to the server costs that client only: attacks through Flower's messages and its updates."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.proto.node_pb2 import NodeInfo
from helpers import DATA, SMALL, rounds, run, served, visiting
from omegaconf import OmegaConf
from rich.console import Console

from fedmm import tree
from fedmm.cli import main
from fedmm.config.composition import load
from fedmm.evaluate.answers import Answer
from fedmm.federation import client as client_side
from fedmm.federation.claims import Claims
from fedmm.federation.client import MEASURED, MEASURED_IN_TRAINING, Order, Report
from fedmm.flower import client_app, messages
from fedmm.flower.inprocess import InProcessGrid
from fedmm.flower.nodes import find_clients
from fedmm.results.progress import watch
from fedmm.runs.events import RunBegan, RunFailed
from fedmm.runs.folder import RunFolder, read_rows
from fedmm.shown import one_line, visible
from fedmm.types import FedmmError

DEEP = "[" * 100_000 + "]" * 100_000
HALF = "\ud800"
ACTS = "<script>alert(1)</script>[bold]b[/bold]\x1b]0;title\x07\x9b2J\nround 9/9\u202egnp"


def failed(path: Path, round: int = 1) -> dict[str, str]:
    return next(e for e in read_rows(path / "events.jsonl") if e["event"] == "round" and e["round"] == round)["failed"]


def spoil_replies(monkeypatch, spoilers, kind="train"):
    """Let a client's replies of this kind pass through its spoiler on their way to the server."""
    deliver = type(client_app.app).__call__

    def delivered(app, message, context):
        reply, client = deliver(app, message, context), context.node_config["partition-id"]
        return spoilers[client](reply) if client in spoilers and message.metadata.message_type == kind else reply

    monkeypatch.setattr(type(client_app.app), "__call__", delivered)


def put(record: str, **values):
    """A spoiler that overwrites fields of one of the reply's records."""

    def spoil(reply: Message) -> Message:
        reply.content[record] = ConfigRecord({**reply.content.config_records[record], **values})
        return reply

    return spoil


def texts(text: str):
    """A spoiler that has the model say `text` to every question."""
    return lambda reply: put("answers", said=[text] * len(reply.content["answers"]["said"]))(reply)


def lacks(*records: str):
    def spoil(reply: Message) -> Message:
        kept = {name: record for name, record in reply.content.items() if name not in records}
        return Message(RecordDict(kept), reply_to=reply)

    return spoil


def metrics(**changes):
    """A spoiler that changes metrics, and takes out those that become None."""

    def spoil(reply: Message) -> Message:
        both = {**reply.content["metrics"], **changes}
        reply.content["metrics"] = MetricRecord({name: value for name, value in both.items() if value is not None})
        return reply

    return spoil


def with_array(reply: Message) -> Message:
    reply.content["more"] = ArrayRecord({"x": torch.zeros(1 << 19)})
    return reply


def answers(count: int, text: str = "y"):
    ids = [f"x/{i}" for i in range(count)]
    return put("answers", parts=[0] * count, ids=ids, said=[text] * count, truths=["z"] * count)


def scores(parts, right, count):
    return put("scores", parts=parts, right=right, count=count)


@pytest.fixture(scope="module")
def cfg():
    return load([*SMALL, *DATA, "arm=fedavg", "run.report_limit_mb=1"])


@pytest.fixture
def claims(cfg, tmp_path) -> Claims:
    return Claims(cfg, RunFolder(tmp_path / "claims", OmegaConf.to_yaml(cfg), []), 1)


def order_of(**changes) -> Order:
    return Order((), "run", 1, 0, "127.0.0.1:1", "token", **{"answers": True, **changes})


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (put("scores", parts=DEEP), "parts must be a list of int"),
        (put("answers", said=DEEP), "said must be a list of str"),
        (put("answers", said=[b"a"] * 4), "said must be a list of str"),
        (texts(HALF), "half a surrogate pair"),
        (texts("long " * 1000), "said is longer than"),
        (answers(5), "answers of part 0: 5 to 4 questions"),
        (answers(50_000, "y" * 100), "bytes, and at most"),
        (with_array, "bytes, and at most"),
        (lacks("fedmm", "scores", "answers", "metrics"), "no record 'fedmm'"),
        (lacks("answers"), "no record 'answers'"),
        (lacks("metrics"), "metrics must be numbers"),
        (metrics(**{"\x1b[2J" + "x" * 10_000: 1.0}), r"has a metric '\\x1b[2Jxxx"),
        (metrics(edge_parameters=None), "lacks the metric edge_parameters"),
        (metrics(loss=None), "lacks the metric loss"),
        (metrics(seconds=[1.0]), "metrics must be numbers"),
        (metrics(loss=float("inf")), "not finite"),
        (metrics(peak_rss_bytes=-1), "peak_rss_bytes=-1, which cannot be"),
        (metrics(llm_samples=1e300), "llm_samples=1e+300, which cannot be"),
        (put("fedmm", client=True), "client must be an integer"),
        (put("fedmm", client="0"), "client must be an integer, got '0'"),
        (put("fedmm", client=10**30), "more than 64 bits"),
        (put("fedmm", client=1), "is of client 1"),
        (scores([0, 0], [1, 1], [4, 4]), "scores a part twice"),
        (scores([0], [1, 1], [4]), "must be of one length"),
        (scores([0], [5], [4]), "scores part 0 with 5 of 4"),
        (scores([0], [-1], [4]), "scores part 0 with -1 of 4"),
        (scores([0], [400], [400]), "part 0 on 400 questions of 4"),
        (scores([0], [10**30], [10**30]), "more than 64 bits"),
        (scores([0], [True], [4]), "right must be a list of int"),
        (scores([2], [1], [4]), "scores part 2"),
        (scores([], [], []), "does not score part 0"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_reply_that_is_no_report_is_refused_with_the_reason(cfg, claims, spoil, says):
    order = order_of()
    measured = dict.fromkeys(MEASURED | MEASURED_IN_TRAINING, 1.0)
    honest = Report(0, 1, {0: (1, 4)}, [(0, Answer(f"test/{i}", "", "two")) for i in range(4)], measured)

    def fault_of(reply: Message) -> str | None:
        try:
            return messages.read_report(reply, cfg.run.report_limit_mb << 20).fault(order, cfg, claims)
        except ValueError as error:
            return str(error)

    with InProcessGrid(1):
        ordered = messages.send_order(order, 1)
        assert fault_of(messages.send_report(honest, ordered)) is None
        assert says in fault_of(spoil(messages.send_report(honest, ordered)))


def test_what_was_not_asked_for_is_refused(cfg, claims):
    order, measured = order_of(score=False, answers=False, train=False), dict.fromkeys(MEASURED, 1.0)
    assert Report(0, 1, metrics=measured).fault(order, cfg, claims) is None
    assert "scores part 0" in Report(0, 1, {0: (1, 4)}, metrics=measured).fault(order, cfg, claims)
    assert "answers of part 0" in Report(0, 1, {}, [(0, Answer("a", "b", "c"))], measured).fault(order, cfg, claims)
    assert "metric 'loss'" in Report(0, 1, metrics={**measured, "loss": 1.0}).fault(order, cfg, claims)


@pytest.mark.run
def test_replies_that_are_no_reports_cost_their_clients_only(backbone, finished, tmp_path, monkeypatch):
    """Their updates came over the link, so every bit of the round is the same."""
    honest = finished("arm=fedavg", "rounds=1")
    spoil_replies(
        monkeypatch, {0: put("scores", json=DEEP, parts=DEEP), 1: texts(HALF), 2: answers(50_000, "y" * 4000)}
    )
    path = run(backbone, tmp_path / "run", "arm=fedavg", "rounds=1")
    assert rounds(path) == rounds(honest)
    says = ["parts must be a list of int", "said has half a surrogate pair", "bytes, and at most"]
    for client, text in enumerate(says):
        assert failed(path)[str(client)].startswith("its report cannot be read: ") and text in failed(path)[str(client)]


@pytest.mark.run
def test_a_reply_that_flower_cannot_put_together_costs_its_client_only(backbone, tmp_path, monkeypatch):
    """Flower makes a reply from a client's bytes in the call that fetches it, and tells which message it answers by
    them too."""
    pull = InProcessGrid.pull_messages

    def pulled(grid, ids):
        came = pull(grid, ids)
        for reply in came:
            if reply.metadata.message_type == "train" and reply.metadata.src_node_id == 1:
                raise ValueError("Mismatch in children object IDs")
            if reply.metadata.message_type == "train" and reply.metadata.src_node_id == 2:
                reply.metadata.__dict__["_reply_to_message_id"] = "another client's"
        return came

    monkeypatch.setattr(InProcessGrid, "pull_messages", pulled)
    path = run(backbone, tmp_path / "run", "arm=fedavg", "rounds=1")
    assert failed(path).keys() == {"0"} and "Mismatch in children" in failed(path)["0"]
    assert rounds(path)[0]["clients"] == [0, 1, 2]


# ---- which client a node is


class Nodes(InProcessGrid):
    """Nodes that say what they like of themselves, in order, under names that an operator gave them."""

    def __init__(self, *said, names=()) -> None:
        super().__init__(len(said))
        self.said, self.names = said, names

    def get_nodes(self):
        return [NodeInfo(node_id=node, name=name) for node, name in enumerate(self.names, 1)]

    def pull_messages(self, message_ids):
        return [self._changed(reply) for reply in super().pull_messages(message_ids)]

    def _changed(self, reply: Message) -> Message:
        said = self.said[reply.metadata.src_node_id - 1]
        if isinstance(said, Error):
            return Message(said, reply_to=reply)
        if said is not None:
            put("fedmm", client=said)(reply)
        else:
            reply.content.pop("fedmm")
        return reply


def found_by(cfg, grid, clients=2) -> tuple[dict[int, int], dict[str, str]]:
    reasons = {}
    with grid:
        nodes = find_clients(grid, cfg.run, clients, lambda event: reasons.setdefault(event.node, event.reason))
    return nodes, reasons


def test_what_a_node_says_of_itself_costs_no_other_its_place(cfg):
    odd = [True, 1.0, "0", -1, 2, 10**30, [0], None, Error(2, ACTS)]
    found, events = found_by(cfg, Nodes(*odd, 0, 0, 1))
    assert found == {0: len(odd) + 1, 1: len(odd) + 3}, "the first that says 0 keeps it"
    says = [
        "client must be an integer, got True", "got 1.0", "got '0'", "says it is client -1", "says it is client 2",
        "more than 64 bits", "got [0]", "no record 'fedmm'", r"does not know which client it is: <script>",
    ]  # fmt: skip
    for node, text in enumerate(says, 1):
        assert text in events[str(node)]
    assert "\x1b" not in events["9"] and "\n" not in events["9"]
    assert "client 0, and so did node 10 before" in events["11"] and "run.nodes" in events["11"]


def test_missing_clients_are_named_whatever_others_say(cfg):
    hasty = OmegaConf.merge(cfg, {"run": {"wait_seconds": 1}})
    with pytest.raises(FedmmError, match=r"clients \[1\] of 2 did not come within 1 s"):
        found_by(hasty, Nodes(0, 0, None, 7))


def test_a_name_that_an_operator_gave_is_believed_before_any_word(cfg):
    named = OmegaConf.merge(cfg, {"run": {"nodes": ["site-a", "site-b"]}})
    found, _ = found_by(named, Nodes(0, 1, 0, names=["intruder", "site-b", "site-a"]))
    assert found == {0: 3, 1: 2}


def test_names_of_nodes_are_one_for_each_client():
    with pytest.raises(ValueError, match=r"run\.nodes must name one node for each of clients=3"):
        load([*SMALL, *DATA, "run.nodes=[a,b]"])


# ---- how much it may claim


def lies(monkeypatch, lie):
    """Updates claim `lie(round, client)` examples where that is not None."""
    train, send, now = client_side._train, client_side._send, {}

    def trained(cfg, order, *args):
        now[order.client] = order.round
        return train(cfg, order, *args)

    def sent(session, update):
        count = lie(now[update.client], update.client)
        send(session, update if count is None else replace(update, num_examples=count))

    monkeypatch.setattr(client_side, "_train", trained)
    monkeypatch.setattr(client_side, "_send", sent)


@pytest.mark.run
@pytest.mark.parametrize("has_data", [True, False])
def test_a_client_weighs_no_more_than_it_has(backbone, tmp_path, monkeypatch, has_data):
    lie = {(1, 0): 2**31 - 1, (2, 1): 13, (3, 1): 11}
    lies(monkeypatch, lambda round, client: lie.get((round, client)))
    path = run(backbone, tmp_path / "run", "arm=fedavg", "rounds=3", f"run.has_data={has_data}")
    lost = [row["lost"] for row in rounds(path)]
    assert "claims 2147483647 examples, above run.max_examples=1000000" in lost[0]["0"]
    assert ("has 12 by the server's own copy" if has_data else "claims 13 examples, and 12 before") in lost[1]["1"]
    assert [row["examples"] for row in rounds(path)] == [
        {"1": 12, "2": 12}, {"0": 12, "2": 12}, {"0": 12, "1": 11, "2": 12},
    ]  # fmt: skip


def test_what_was_accepted_binds_after_a_resume_too(cfg, tmp_path):
    blind = OmegaConf.merge(cfg, {"run": {"has_data": False, "max_examples": 100}})
    folder = RunFolder(tmp_path / "run", OmegaConf.to_yaml(blind), [])
    assert Claims(blind, folder, 1).examples_fault(0, 90) is None
    assert "above run.max_examples=100" in Claims(blind, folder, 1).examples_fault(0, 101)
    assert "above run.max_examples=100" in Claims(blind, folder, 1).questions_fault(0, 0, 101)
    folder.append("rounds.jsonl", round=1, clients=[0], examples={"0": 12})
    folder.append("rounds.jsonl", round=2, clients=[0], examples={"0": 10})
    folder.append("scores.jsonl", round=0, client=0, part=0, right=1, count=4)
    folder.save_update(3, client_side.Update(1, {"w": torch.zeros(1)}, 7))
    again = Claims(blind, folder, 3)
    assert again.examples_fault(0, 12) is None and "13 examples, and 12 before" in again.examples_fault(0, 13)
    assert again.examples_fault(1, 7) is None and "8 examples, and 7 before" in again.examples_fault(1, 8)
    assert again.questions_fault(0, 0, 4) is None and "on 5 questions, and on 4 before" in again.questions_fault(
        0, 0, 5
    )
    assert again.questions_fault(1, 0, 5) is None, "what one client says of a part binds no other"


@pytest.mark.parametrize("name", ["", "x" * 41, "Loss", "\x1b[2J", "<b>", HALF, "a b", "file/../x"])
def test_a_metric_of_an_update_has_a_plain_name(llava, edge, local_llm, name):
    with served(llava, edge, local_llm) as (host, taken), visiting(host) as session:
        delta = tree.joined(delta=tree.zeros_like(edge.state()))
        with pytest.raises(FedmmError, match="a metric's name must be"):
            session.call("update", delta, num_examples=1, fisher=False, metrics={name: 1.0})
        session.call("update", delta, num_examples=1, fisher=False, metrics={"loss": 1.0})
        assert len(taken) == 1 and not host.close_round()[0]


# ---- what is shown of it


@pytest.mark.run
def test_nothing_that_a_client_sent_acts_on_who_looks(backbone, tmp_path, monkeypatch, capsys):
    spoilers = {0: texts(ACTS), 1: lambda reply: Message(Error(2, ACTS), reply_to=reply)}
    spoil_replies(monkeypatch, spoilers, "train")
    spoil_replies(monkeypatch, spoilers, "evaluate")
    path = run(backbone, tmp_path / "run", "arm=fedavg", "rounds=1", page=True)
    assert {row["said"] for row in read_rows(path / "predictions.jsonl") if row["client"] == 0} == {ACTS}
    html = (path / "report.html").read_text()
    assert html.count("&lt;script&gt;alert(1)&lt;/script&gt;[bold]b[/bold]\\x1b]0;title") > 1, "in gallery and reasons"
    assert "<script" not in html
    shown = {"report.html": html}
    for terminal in (False, True):
        out = io.StringIO()
        watch(path, console=Console(file=out, width=200, force_terminal=terminal, color_system=None), stall_seconds=5)
        shown[f"watch, terminal={terminal}"] = out.getvalue()
    assert main(["compare", str(path), "--into", str(tmp_path / "table.md")]) == 0
    shown |= {"compare": capsys.readouterr().out, "table.md": (tmp_path / "table.md").read_text()}
    for where, text in shown.items():
        assert not {"\x07", "\x9b", "\u202e"} & set(text) and "\x1b]" not in text, where
        assert where == "report.html" or not any(line.startswith("round 9/9") for line in text.splitlines()), where


def test_a_run_that_fails_by_a_clients_words_shows_them_in_one_line(tmp_path):
    folder = RunFolder(tmp_path / "run", "seed: 0\n", [])
    folder.log(RunBegan(["FedAvg"]))
    folder.log(RunFailed(ACTS))
    out = io.StringIO()
    assert watch(tmp_path / "run", console=Console(file=out, width=300, color_system=None), stall_seconds=5) == 1
    (line,) = (line for line in out.getvalue().splitlines() if "script" in line)
    assert r"[bold]b[/bold]\x1b]0;title\x07\x9b2J\nround 9/9\u202egnp" in line


def test_text_is_made_visible_and_what_is_plain_stays():
    plain = "Größe: 三 \N{ZERO WIDTH NON-JOINER}x\tand\nmore"
    assert visible(plain) == plain and one_line(plain) == plain.replace("\t", r"\t").replace("\n", r"\n")
    assert visible(HALF + "\x00\r") == r"\ud800\x00\r"
    assert one_line("a" * 2000) == "a" * 1000 + "..."
