"""What travels in Flower's messages, and under which keys. Small things only: every tensor goes over the link."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, get_type_hints

from beartype.door import is_bearable
from flwr.app import Array, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from google.protobuf.message import DecodeError

from fedmm.evaluate.answers import Answer
from fedmm.federation.client import Order, Report
from fedmm.federation.reasons import Lost, describe
from fedmm.link.tls import Identity

_RECORD, _LOST = "fedmm", "lost"
_SCORES = {"parts": int, "right": int, "count": int}
_ANSWERS = {"parts": int, "ids": str, "said": str, "truths": str}
_SURROGATE = re.compile("[\ud800-\udfff]")
_LARGEST = 2**63 - 1
POLL_SECONDS = 0.05  # between two looks for replies
UNREADABLE = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError, DecodeError)
"""What reading a client's words may raise; not what a SuperLink that is gone does (httpx)."""


def ask_who(node: int) -> Message:
    """The first message to a node: which client are you?"""
    return Message(RecordDict(), dst_node_id=node, message_type=MessageType.QUERY)


def say_who(message: Message, client: int) -> Message:
    return Message(RecordDict({_RECORD: ConfigRecord({"client": client})}), reply_to=message)


def read_who(reply: Message) -> int:
    """The number that a node says it has. Raises ValueError for a reply that says none."""
    return _integer(_record(reply, _RECORD), "client")


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
    reason, count = record.get("reason"), _integer(record, "count")
    if not isinstance(reason, str) or count < 1:
        raise ValueError("a client's reason is a text and a count from 1")
    return describe(reason, count)


def send_report(report: Report, message: Message) -> Message:
    scores = [(part, right, count) for part, (right, count) in report.scores.items()]
    answers = [(part, answer.id, answer.said, answer.truth) for part, answer in report.answers]
    content = RecordDict({_RECORD: ConfigRecord({"client": report.client, "round": report.round})})
    content["metrics"] = MetricRecord(dict(report.metrics))
    content["scores"] = _columns(_SCORES, scores)
    content["answers"] = _columns(_ANSWERS, answers)
    return Message(content, reply_to=message)


def read_report(reply: Message, limit_bytes: int) -> Report:
    """The report that a reply holds. Raises ValueError with the reason where it is none.

    Every column has a type of its own and no text is parsed, so that nothing in it can be nested.
    """
    if (came := size_bytes(reply)) > limit_bytes:
        raise ValueError(f"it has {came} bytes, and at most {limit_bytes} are taken")
    own = _record(reply, _RECORD)
    scores = _rows(_record(reply, "scores"), _SCORES)
    if len({part for part, _, _ in scores}) < len(scores):
        raise ValueError("it scores a part twice")
    return Report(
        _integer(own, "client"),
        _integer(own, "round"),
        {part: (right, count) for part, right, count in scores},
        [(part, Answer(id, said, truth)) for part, id, said, truth in _rows(_record(reply, "answers"), _ANSWERS)],
        _metrics(reply),
    )


def replies(grid: Grid, ids: Iterable[str]) -> Iterator[tuple[str, Message | str]]:
    """The replies to these messages so far, each with the id of its message. For a reply that Flower cannot put
    together there is a text with the reason.

    Replies are pulled one by one, because one unreadable reply makes a whole call fail. The id is the one that was
    asked for: the id inside a reply comes from the client.
    """
    for id in ids:
        try:
            came = list(grid.pull_messages([id]))[:1]
            usable = all(isinstance(reply, Message) for reply in came)
        except UNREADABLE as error:
            yield id, f"its reply cannot be read: {type(error).__name__}: {error}"
            continue
        if came:
            yield id, came[0] if usable else "its reply is no message"


def size_bytes(message: Message) -> int:
    """The bytes of a message's records, numbers as 8; its envelope is not in it.

    Flower's own `count_bytes` raises for an empty text or list, and a client may send either.
    """
    records = message.content.values() if message.has_content() else ()
    return sum(_size(name) + _size(value) for record in records for name, value in record.items())


def _size(value: Any) -> int:
    if isinstance(value, list):
        return sum(map(_size, value))
    if isinstance(value, str):
        return len(value.encode(errors="surrogatepass"))
    return len(value) if isinstance(value, bytes) else len(value.data) if isinstance(value, Array) else 8


def _columns(types: Mapping[str, type], rows: Sequence[tuple[Any, ...]]) -> ConfigRecord:
    return ConfigRecord({name: [row[i] for row in rows] for i, name in enumerate(types)})


def _rows(record: ConfigRecord, types: Mapping[str, type]) -> list[tuple[Any, ...]]:
    """The rows of a record of columns. Raises ValueError for a column that is missing, too short or of another type."""
    columns = [_column(name, record.get(name), wanted) for name, wanted in types.items()]
    if len(set(map(len, columns))) > 1:
        raise ValueError(f"{', '.join(types)} must be of one length, got {list(map(len, columns))}")
    return list(zip(*columns, strict=True))


def _column(name: str, column: Any, wanted: type) -> list[Any]:
    if not isinstance(column, list) or any(type(value) is not wanted for value in column):
        raise ValueError(f"{name} must be a list of {wanted.__name__}")
    if wanted is str and any(_SURROGATE.search(text) for text in column):
        raise ValueError(f"{name} has half a surrogate pair, which is no text")
    if wanted is int and any(abs(value) > _LARGEST for value in column):
        raise ValueError(f"{name} has a number of more than 64 bits")
    return column


def _metrics(reply: Message) -> dict[str, float]:
    found = reply.content.metric_records.get("metrics")
    if found is None or any(type(value) not in (int, float) for value in found.values()):
        raise ValueError("metrics must be numbers by name")
    return {name: float(value) for name, value in found.items()}  # type: ignore[arg-type]


def _record(reply: Message, name: str) -> ConfigRecord:
    record = reply.content.config_records.get(name) if reply.has_content() else None
    if record is None:
        raise ValueError(f"it has no record {name!r}")
    return record


def _integer(record: ConfigRecord, name: str) -> int:
    value = record.get(name)
    if type(value) is not int:
        raise ValueError(f"{name} must be an integer, got {value!r:.40}")
    if abs(value) > _LARGEST:
        raise ValueError(f"{name} is a number of more than 64 bits")
    return value
