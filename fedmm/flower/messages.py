"""What travels in Flower's messages, and under which keys. Small things only: every tensor goes over the link."""

from __future__ import annotations

import json
from typing import Any, get_type_hints

from beartype.door import is_bearable
from flwr.app import ConfigRecord, Message, MessageType, MetricRecord, RecordDict

from fedmm.evaluate.answers import Answer
from fedmm.llm.tls import Identity
from fedmm.runs.client import Order, Report
from fedmm.runs.reasons import Lost, told

_RECORD, _LOST = "fedmm", "lost"


def ask_who(node: int) -> Message:
    """The first message to a node: which client are you?"""
    return Message(RecordDict(), dst_node_id=node, message_type=MessageType.QUERY)


def say_who(message: Message, client: int) -> Message:
    return Message(RecordDict({_RECORD: ConfigRecord({"client": client})}), reply_to=message)


def read_who(reply: Message) -> int:
    return int(reply.content.config_records[_RECORD]["client"])  # type: ignore[arg-type]


def send_order(order: Order, node: int) -> Message:
    """A round's work for one client: `train`, or `evaluate` where it is only scored."""
    values = {**vars(order), "overrides": list(order.overrides)}
    values |= {"identity": json.dumps(vars(order.identity) if order.identity else None)}
    record = ConfigRecord(values)
    kind = MessageType.TRAIN if order.train else MessageType.EVALUATE
    return Message(RecordDict({_RECORD: record}), dst_node_id=node, message_type=kind)


def read_order(message: Message) -> Order:
    """Raises ValueError, KeyError or TypeError where it is no order: it comes over the network."""
    record: dict[str, Any] = dict(message.content.config_records[_RECORD])
    shown = json.loads(record["identity"])
    identity = Identity(**shown) if shown else None
    order = Order(**{**record, "overrides": tuple(record["overrides"]), "identity": identity})
    hints = get_type_hints(Order) | get_type_hints(Identity)
    for values in (vars(order), vars(identity) if identity else {}):
        if wrong := [name for name, value in values.items() if not is_bearable(value, hints[name])]:
            raise ValueError(f"{wrong[0]} of the order must be {hints[wrong[0]]}, got {str(values[wrong[0]])[:100]!r}")
    return order


def send_lost(lost: Lost, message: Message) -> Message:
    """Why a client cannot do its part: a reason of the closed list and a count."""
    return Message(
        RecordDict({_LOST: ConfigRecord({"reason": lost.reason.value, "count": lost.count})}), reply_to=message
    )


def read_lost(reply: Message) -> str | None:
    """The reason in the server's words; None where the reply is none of these. Raises ValueError where it is odd."""
    record = reply.content.config_records.get(_LOST)
    if record is None:
        return None
    reason, count = record.get("reason"), record.get("count")
    if not isinstance(reason, str) or not isinstance(count, int):
        raise ValueError("a client's reason is a text and a count")
    return told(reason, count)


def send_report(report: Report, message: Message) -> Message:
    content = RecordDict({_RECORD: ConfigRecord({"client": report.client, "round": report.round})})
    content["metrics"] = MetricRecord(dict(report.metrics))
    content["scores"] = ConfigRecord({"json": json.dumps(report.scores)})
    content["answers"] = ConfigRecord({"json": json.dumps([(p, a.id, a.said, a.truth) for p, a in report.answers])})
    return Message(content, reply_to=message)


def read_report(reply: Message) -> Report:
    records = reply.content.config_records
    scores = json.loads(str(records["scores"]["json"]))
    answers = json.loads(str(records["answers"]["json"]))
    metrics = {name: float(value) for name, value in reply.content.metric_records["metrics"].items()}  # type: ignore[arg-type]
    return Report(
        int(records[_RECORD]["client"]),  # type: ignore[arg-type]
        int(records[_RECORD]["round"]),  # type: ignore[arg-type]
        {int(part): (int(right), int(count)) for part, (right, count) in scores.items()},
        [(int(part), Answer(str(id), str(said), str(truth))) for part, id, said, truth in answers],
        metrics,
    )


def size_bytes(message: Message) -> int:
    """The bytes of a message's records as Flower counts them; its envelope is not in it."""
    return sum(record.count_bytes() for record in message.content.values()) if message.has_content() else 0
