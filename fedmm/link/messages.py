"""What client and host say to each other: a request and a reply for each verb, as frozen dataclasses.

Both ends make and read frames by these classes; tensors and verbs are named here and in `steps`, and nowhere else.
`docs/MESSAGES.md` is their table, written by `python scripts/messages.py`.

A new field is compatible if it has a default: the default is not sent, and an end that does not know a field does not
look for it. For any other change, raise `wire.PROTOCOL` by one.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, ClassVar, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor

from fedmm import codecs as coding
from fedmm import tree
from fedmm.codecs import PLAIN, Codecs, Feedback
from fedmm.link.fields import (
    ANY,
    Header,
    Many,
    Named,
    One,
    Value,
    integer,
    names,
    number,
    numbers,
    places,
    taken,
    written,
)
from fedmm.link.steps import FEATURES, DenseStep, FactoredStep, Step, StepPlace, TokenTerms, grid
from fedmm.link.wire import Frame
from fedmm.types import IGNORE, State, TokenTerm, Update

METRIC_NAME = re.compile("[a-z][a-z0-9_]{0,39}")  # they become keys of the run's files
REFUSED = "refused"  # where the ledger counts what no run sends
_CODECS = "codecs"
_Q = TypeVar("_Q", bound="Request")
_P = TypeVar("_P", bound="Reply")


@dataclass(frozen=True)
class Request:
    """What a client asks for: `verb`, where the ledger counts it, and the codecs of its tensors and its reply's."""

    verb: ClassVar[str]
    channel: ClassVar[str]
    codecs: Codecs = field(default=PLAIN, kw_only=True)

    def to_frame(self) -> Frame:
        meta, tensors = written(self)
        words = {_CODECS: list(dataclasses.astuple(self.codecs))} if self.codecs != PLAIN else {}
        return Frame(self.verb, meta | words, coding.write(tensors, self.codecs, CODED))

    @classmethod
    def from_frame(cls: type[_Q], frame: Frame, **sizes: int) -> _Q:
        """Raises ValueError, with what came and what is wanted. `sizes` are those that the reader knows."""
        codecs = coding.named(frame.meta.get(_CODECS))
        plain = replace(frame, tensors=coding.read(frame.tensors, codecs, CODED))
        return cls(**taken(cls, plain, sizes), codecs=codecs)


@dataclass(frozen=True)
class Reply:
    """What the host answers, under the verb it was asked by."""

    def to_frame(
        self,
        verb: str,
        codecs: Codecs = PLAIN,
        feedback: Feedback | None = None,
        summed: Mapping[str, str] = {},
    ) -> Frame:
        """`feedback` corrects the gradients by inputs that are `summed` over steps, under the name that each has."""
        meta, tensors = written(self)
        by_name = {f"{_GRADIENTS.prefix}{name}": own for name, own in summed.items()}
        return Frame(verb, meta, coding.write(tensors, codecs, CODED, feedback, by_name))

    @classmethod
    def from_frame(cls: type[_P], frame: Frame, codecs: Codecs = PLAIN) -> _P:
        return cls(**taken(cls, replace(frame, tensors=coding.read(frame.tensors, codecs, CODED)), {}))


R = TypeVar("R", bound="Reply", covariant=True)


@runtime_checkable
class Asks(Protocol[R]):
    """A request, by the kind of its reply."""

    @property
    def reply(self) -> type[R]: ...

    @property
    def codecs(self) -> Codecs: ...

    def to_frame(self) -> Frame: ...


@dataclass(frozen=True)
class Done(Reply):
    """Nothing but that it was done; also what opens a session."""

    OPENS: ClassVar[str] = "open"


@dataclass(frozen=True)
class Failure(Reply):
    """The host refuses. `missing` are samples whose features it lacks; where it is `busy` it may be asked again."""

    FAILS: ClassVar[str] = "error"
    message: Annotated[str, Value("message")]
    missing: Annotated[Sequence[int], Value("missing")] = ()
    busy: Annotated[bool, Value("busy")] = False


@dataclass(frozen=True)
class Tensors(Reply):
    tensors: Annotated[State, Named()]


# ---- once a run, once a round ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Card(Reply):
    card: Annotated[Mapping[str, Any], Header()]


@dataclass(frozen=True)
class CardRequest(Request):
    """What does the host serve?"""

    verb, channel, reply = "card", "edge", Card


@dataclass(frozen=True)
class EdgeRequest(Request):
    """The frozen modules that a client runs."""

    verb, channel, reply = "edge", "edge", Tensors


@dataclass(frozen=True)
class StateRequest(Request):
    """The round's adapters, as far as this client gets them."""

    verb, channel, reply = "state", "adapters", Tensors


def _count(meta: Mapping[str, Any], key: str) -> int:
    count = integer(meta, key)
    if not 1 <= count < 1 << 31:
        raise ValueError(f"{key} must be at least 1 and below 2^31, got {str(count)[:12]}")
    return count


def _metrics(meta: Mapping[str, Any], key: str) -> dict[str, float]:
    metrics = meta.get(key)
    if not isinstance(metrics, dict) or len(metrics) > 64 or not all(map(number, metrics.values())):
        raise ValueError(f"{key} must be finite numbers by name, got {ascii(metrics)[:200]}")
    if odd := [name for name in metrics if not METRIC_NAME.fullmatch(name)]:
        raise ValueError(f"a metric's name must be 1 to 40 of a-z 0-9 _, got {odd[0][:40]!a}")
    return metrics


@dataclass(frozen=True)
class UpdateRequest(Request):
    """A client's update. The journal of a run keeps it in the same form."""

    verb, channel, reply = "update", "adapters", Done
    delta: Annotated[State, Named("delta/")]
    num_examples: Annotated[int, Value("num_examples", _count)]
    fisher: Annotated[State | None, Named("fisher/", flag="fisher")]
    metrics: Annotated[Mapping[str, float], Value("metrics", _metrics)]

    @staticmethod
    def of(update: Update) -> UpdateRequest:
        return UpdateRequest(update.delta, update.num_examples, update.fisher, dict(update.metrics))

    @classmethod
    def from_frame(cls, frame: Frame, **sizes: int) -> UpdateRequest:  # type: ignore[override]
        tree.parted(frame.tensors, "delta", "fisher")  # an update has nothing else
        return super().from_frame(frame, **sizes)

    def update(self, client: int) -> Update:
        return Update(client, self.delta, self.num_examples, self.fisher, self.metrics)


# ---- once a sample -----------------------------------------------------------------------------------------------

_KEYS = One("keys", "S K", ANY)  # of the samples with images


@dataclass(frozen=True)
class Missing(Reply):
    missing_S: Annotated[Tensor, One("missing", "S", torch.bool)]


@dataclass(frozen=True)
class KnownRequest(Request):
    """Which of these samples' features does the host lack?"""

    verb, channel, reply = "known", "features", Missing
    keys_SK: Annotated[Tensor, _KEYS]


@dataclass(frozen=True)
class FeaturesRequest(Request):
    """Features of samples, which the host holds for later steps."""

    verb, channel, reply = "features", "features", Done
    features: Annotated[tuple[Tensor, ...], Many(FEATURES, per="S")]
    keys_SK: Annotated[Tensor, _KEYS]


# ---- every step --------------------------------------------------------------------------------------------------

_GRADIENTS = Named("grad/", codec="gradients")
KEEP = One("keep", "B A", torch.int64, below="T")
_LABELS = One("labels", "B A", torch.int64, below="V", but=IGNORE)
_WANTED = Value("grads", names)
NUMBER = Value("step", integer)
_WEIGHTS = Value("weights", numbers)
_MAX_TOKENS = Value("max_tokens", integer)


@dataclass(frozen=True)
class StepRequest(Request):
    """A request with a step."""

    step: Annotated[Step, StepPlace()]


@dataclass(frozen=True)
class Logits(Reply):
    logits_BAV: Annotated[Tensor, One("logits", "B A V", ANY, "logits")]


@dataclass(frozen=True)
class ForwardRequest(StepRequest):
    """Logits at `keep_BA`; where gradients are wanted, a backward of the same number follows."""

    verb, channel, reply = "forward", "steps", Logits
    keep_BA: Annotated[Tensor, KEEP]
    number: Annotated[int, NUMBER]
    grads: Annotated[Sequence[str], _WANTED]


@dataclass(frozen=True)
class Gradients(Reply):
    grads: Annotated[State, _GRADIENTS]


@dataclass(frozen=True)
class BackwardRequest(Request):
    """The gradient by a forward's logits."""

    verb, channel, reply = "backward", "steps", Gradients
    number: Annotated[int, NUMBER]
    grad_BAV: Annotated[Tensor, One("grad", "B A V", codec="gradients")]


@dataclass(frozen=True)
class Losses(Reply):
    losses: Annotated[Tensor, One("losses", "L", ANY)]
    grads: Annotated[State, _GRADIENTS]


def _reduction(meta: Mapping[str, Any], key: str) -> str:
    if meta[key] not in ("mean", "sum"):
        raise ValueError(f"{key} must be mean or sum, got {str(meta[key])[:32]!r}")
    return str(meta[key])


@dataclass(frozen=True)
class LossRequest(StepRequest):
    """The loss of each branch, and gradients; with weights and a temperature branches learn from each other."""

    verb, channel, reply = "loss", "steps", Losses
    keep_BA: Annotated[Tensor, KEEP]
    labels_BA: Annotated[Tensor, _LABELS]
    grads: Annotated[Sequence[str], _WANTED]
    weights: Annotated[Sequence[float] | None, _WEIGHTS] = None
    temperature: Annotated[Any, Value("temperature")] = None
    reduction: Annotated[str, Value("reduction", _reduction)] = "mean"


@dataclass(frozen=True)
class StepSquares(Reply):
    h_grads: Annotated[tuple[Tensor, ...], Many(One("grad/h", "N R", ANY, "gradients"))]
    squares: Annotated[tuple[Tensor, ...], Many(One("squares", "D R", ANY))]
    image_ND: Annotated[Tensor | None, One("grad/image_part", "M D", ANY, "gradients")] = None


@dataclass(frozen=True)
class SquaresRequest(StepRequest):
    """What a diagonal Fisher needs: gradients by each h, and squared gradients by each up, summed over samples."""

    verb, channel, reply = "squares", "steps", StepSquares
    keep_BA: Annotated[Tensor, KEEP]
    labels_BA: Annotated[Tensor, _LABELS]


@dataclass(frozen=True)
class Tokens(Reply):
    tokens_BN: Annotated[Tensor, One("tokens", "B N", torch.int64)]


@dataclass(frozen=True)
class GenerateRequest(StepRequest):
    """Greedy answers; the text adapters go along, for the tokens that are made."""

    verb, channel, reply = "generate", "answers", Tokens
    terms: Annotated[Sequence[TokenTerm], TokenTerms()]
    max_tokens: Annotated[int, _MAX_TOKENS]


@dataclass(frozen=True)
class EchoRequest(Request):
    """The same tensors back, so that a benchmark can measure the link alone."""

    verb, channel, reply = "echo", REFUSED, Tensors
    tensors: Annotated[State, Named()]


REQUESTS: tuple[type[Request], ...] = (
    CardRequest, EdgeRequest, StateRequest, UpdateRequest, KnownRequest, FeaturesRequest,
    ForwardRequest, BackwardRequest, LossRequest, SquaresRequest, GenerateRequest, EchoRequest,
)  # fmt: skip


def channel_of(verb: str) -> str:
    """Where the ledger counts a verb."""
    return next((request.channel for request in REQUESTS if request.verb == verb), REFUSED)


@dataclass(frozen=True)
class StepSize:
    """The size of a frame's step, read before its tensors are unpacked.

    `pairs` counts the rows of branches that learn from another one, `sent` the entries of all tensors.
    """

    mask_BT: Tensor
    branches: int
    answers: int
    pairs: int
    grad: bool
    tokens: int
    sent: int

    @staticmethod
    def of(frame: Frame) -> StepSize:
        (mask_BT, branches), keep = grid(frame), frame.tensors.get(KEEP.name)
        wanted = _WANTED.read(frame, {}) if _WANTED.stands_in(frame) else ()
        return StepSize(
            mask_BT,
            branches,
            answers=keep.shape[1] if keep is not None and keep.dim() == 2 else 1,
            pairs=pairs_of(len(mask_BT), branches) if _WEIGHTS.stands_in(frame) else 0,
            grad=bool(wanted) or frame.verb == SquaresRequest.verb,
            tokens=_MAX_TOKENS.read(frame, {}) if _MAX_TOKENS.stands_in(frame) else 0,
            sent=sum(tensor.numel() for tensor in frame.tensors.values()),
        )


def pairs_of(rows: int, branches: int) -> int:
    """How often a row of one branch learns from another branch."""
    return rows * branches * (branches - 1)


def _coded() -> Iterator[tuple[str, str]]:
    kinds = {kind for request in REQUESTS for kind in (request, request.reply)}  # type: ignore[attr-defined]
    for kind in (*kinds, DenseStep, FactoredStep):
        for place in places(kind).values():  # type: ignore[arg-type]
            yield from ((coding.stem(one.name), one.codec) for one in place.tensors if one.codec)


CODED = dict(_coded())
"""Which kind of codec writes a tensor, by what stands before the first dot or slash of its name."""
