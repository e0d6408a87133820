"""Messages: one place for every name on the link, a table that is current, and two versions that say so."""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated

import grpc
import pytest
import torch
from helpers import served, visiting
from torch import Tensor

import fedmm
from fedmm.codecs import Codecs
from fedmm.link import messages, wire
from fedmm.link.fields import Value, integer, places
from fedmm.link.session import HostRefused, Session
from fedmm.link.steps import DenseStep, FactoredStep, Term
from fedmm.types import TokenTerm, Update

ROOT = Path(fedmm.__file__).parents[1]


def generator():
    spec = importlib.util.spec_from_file_location("messages_page", ROOT / "scripts" / "messages.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_table_of_messages_is_current():
    """A name that changes on the wire changes here: two ends of different versions would no longer understand it."""
    page = generator().page()
    assert (ROOT / "docs" / "MESSAGES.md").read_text() == page, "run: python scripts/messages.py"


def test_no_other_file_of_the_link_spells_a_verb_or_a_tensor():
    kinds = [*messages.REQUESTS, *(request.reply for request in messages.REQUESTS), DenseStep, FactoredStep]
    tensors = [
        one.name.removesuffix(".i") for kind in kinds for place in places(kind).values() for one in place.tensors
    ]
    spelled = {*tensors, *(request.verb for request in messages.REQUESTS), messages.Failure.FAILS, messages.Done.OPENS}
    spelled -= {"image", "logits", "..."}  # a kind of positions; a word of an error; any name
    package = Path(fedmm.__file__).parent
    for path in (*package.glob("link/*.py"), *package.glob("serving/*.py")):
        nodes = ast.walk(ast.parse(path.read_text()))
        strings = {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}
        if path.name not in ("messages.py", "steps.py"):
            assert not strings & spelled, f"{path.name} spells {strings & spelled}; name it by its message"


MASK_BT = torch.tensor([[True, True, True], [True, True, False]])
IMAGE_BT = torch.tensor([[True, False, False], [True, False, False]])
ANSWERS = torch.tensor([[1], [1]])
TERMS = (
    (Term("image", 2.0, "shared.image", torch.randn(2, 4), torch.randn(8, 4)),),
    (Term("text", 0.5, "local.text", torch.randn(3, 2), torch.randn(8, 2)),),
)
TOKENS_BT = torch.ones(2, 3, dtype=torch.int32)
DENSE = DenseStep(MASK_BT, (torch.randn(2, 3, 8), torch.randn(2, 3, 8)))
WARM = FactoredStep(MASK_BT, TOKENS_BT, IMAGE_BT, torch.ones(2, 16, dtype=torch.uint8), branches=TERMS)
COLD = FactoredStep(MASK_BT, TOKENS_BT, IMAGE_BT, features=(torch.randn(1, 4, 6), torch.randn(2, 4, 6)), branches=TERMS)
TRAINED = FactoredStep(MASK_BT, TOKENS_BT, IMAGE_BT, image_ND=torch.randn(2, 8), branches=TERMS)
REQUESTS = [
    messages.CardRequest(),
    messages.UpdateRequest({"text.up": torch.ones(2)}, 3, {}, {"loss": 0.5}),
    messages.UpdateRequest({"text.up": torch.ones(2)}, 3, None, {}),
    messages.KnownRequest(torch.ones(2, 16, dtype=torch.uint8)),
    messages.FeaturesRequest((torch.randn(1, 4, 6), torch.randn(2, 4, 6)), torch.ones(2, 16, dtype=torch.uint8)),
    messages.ForwardRequest(DENSE, ANSWERS, 7, ("whole.0",)),
    messages.BackwardRequest(7, torch.randn(2, 1, 9)),
    messages.LossRequest(WARM, ANSWERS, ANSWERS, ("h.0",), (0.5, 0.5), 2.0),
    messages.LossRequest(COLD, ANSWERS, ANSWERS, (), reduction="sum"),
    messages.SquaresRequest(TRAINED, ANSWERS, ANSWERS),
    messages.GenerateRequest(COLD, (TokenTerm(torch.randn(2, 8), torch.randn(8, 2), 0.5),), 5),
]


def over_the_wire(frame: wire.Frame) -> wire.Frame:
    came = wire.decode(iter(wire.encode(frame)), 1 << 30)
    assert came is not None
    return came


def same(left: object, right: object) -> bool:
    if isinstance(left, Tensor):
        return isinstance(right, Tensor) and left.dtype == right.dtype and torch.equal(left, right)
    if isinstance(left, tuple | list):
        return len(left) == len(right) and all(map(same, left, right))
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if hasattr(left, "__dataclass_fields__"):
        return all(same(getattr(left, field.name), getattr(right, field.name)) for field in fields(left))
    return left == right


@pytest.mark.parametrize("request_", REQUESTS, ids=lambda request: request.verb)
def test_a_request_is_read_as_it_was_written(request_):
    came = type(request_).from_frame(over_the_wire(request_.to_frame()), D=8, V=9)
    assert same(request_, came)


@pytest.mark.parametrize("step", [DENSE, WARM, COLD, TRAINED])
def test_inputs_take_the_place_of_inputs(step):
    inputs = step.inputs()
    assert {name for names in step.by_branch() for name in names} == {*inputs}
    doubled = step.with_inputs({name: 2 * tensor for name, tensor in inputs.items()})
    assert all(torch.equal(doubled.inputs()[name], 2 * tensor) for name, tensor in inputs.items())


def test_an_update_is_the_same_over_the_link_and_in_the_journal():
    update = Update(4, {"text.up": torch.randn(3)}, 9, {"text.up": torch.rand(3)}, {"loss": 1.0})
    frame = over_the_wire(messages.UpdateRequest.of(update).to_frame())
    assert same(messages.UpdateRequest.from_frame(frame).update(4), update)
    stray = wire.Frame(frame.verb, frame.meta, {**frame.tensors, "llm.weight": torch.ones(1)})
    with pytest.raises(ValueError, match="unknown tensor 'llm.weight'"):
        messages.UpdateRequest.from_frame(stray)


def test_codecs_write_each_tensor_by_its_kind():
    """Features and h are written as they were told to, gradients in the reply too; what is counted is left alone."""
    codecs = Codecs(features="bf16", h="fp16", gradients="int8")
    sent = messages.LossRequest(COLD, ANSWERS, ANSWERS, (), codecs=codecs).to_frame().tensors
    dtypes = {name: tensor.dtype for name, tensor in sent.items()}
    assert dtypes["features.0"] == torch.bfloat16 and dtypes["h.0"] == dtypes["up.1"] == torch.float16
    assert dtypes["keep"] == torch.int64 and dtypes["tokens"] == torch.int32
    reply = messages.Losses(torch.ones(1), {"h.0": torch.ones(3)}).to_frame("loss", codecs)
    assert reply.tensors["losses"].dtype == torch.float32 and reply.tensors["grad/h.0"].dtype == torch.int8
    torch.testing.assert_close(messages.Losses.from_frame(reply, codecs).grads["h.0"], torch.ones(3), rtol=0.01, atol=0)


@dataclass(frozen=True)
class Later(messages.KnownRequest):
    """The same request with a field that came later."""

    stop: Annotated[int, Value("stop", integer)] = 0


def test_a_field_that_came_later_keeps_the_others_working():
    keys_SK = torch.ones(2, 16, dtype=torch.uint8)
    assert messages.KnownRequest.from_frame(Later(keys_SK, stop=3).to_frame()) is not None, "an older end ignores it"
    assert Later.from_frame(messages.KnownRequest(keys_SK).to_frame()).stop == 0, "an older end does not send it"
    assert "stop" not in Later(keys_SK).to_frame().meta, "and what is the default costs no byte"


@pytest.mark.parametrize(
    ("version", "says"),
    [
        (None, "client 0 speaks version 0 of the link's protocol and the host version 1; upgrade fedmm at client 0"),
        ("0", "upgrade fedmm at client 0"),
        ("2", "client 0 speaks version 2 of the link's protocol and the host version 1; upgrade fedmm at the host"),
        ("one", "client 0 speaks version 0"),
    ],
)
def test_a_host_names_the_end_to_upgrade(llava, edge, local_llm, caplog, version, says):
    with served(llava, edge, local_llm) as (host, _):
        shown = [pair for pair in wire.credentials(0, 1, host.token(1, 0)) if pair[0] != "fedmm-protocol"]
        shown += [("fedmm-protocol", version)] if version is not None else []
        with grpc.insecure_channel(f"127.0.0.1:{host.port}") as channel, pytest.raises(grpc.RpcError) as caught:
            list(channel.stream_stream(wire.METHOD)(iter([]), metadata=tuple(shown)))
        assert says in caught.value.details()
        assert says in caplog.text, "the server's own log says so too"
        assert says in host.close_round()[0][0], "and why the round lost the client"
    with served(llava, edge, local_llm) as (host, _), visiting(host) as session:
        assert session.ask(messages.CardRequest()).card


@contextmanager
def old_host(metadata: tuple[tuple[str, str], ...]) -> Iterator[int]:
    """A host that lets everybody in, as one of another version would."""

    def session(chunks, context):
        context.send_initial_metadata(metadata)
        yield from wire.encode(messages.Done().to_frame(messages.Done.OPENS))
        yield from chunks

    server = grpc.server(ThreadPoolExecutor(2))
    service, method = wire.METHOD.strip("/").split("/")
    handler = {method: grpc.stream_stream_rpc_method_handler(session)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, handler),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield port
    finally:
        server.stop(grace=0).wait()


@pytest.mark.parametrize(
    ("metadata", "says"),
    [
        ((), "speaks version 0 of the link's protocol and client 3 version 1; upgrade fedmm at the host at 127.0.0.1"),
        ((("fedmm-protocol", "2"),), "speaks version 2.*upgrade fedmm at client 3"),
    ],
)
def test_a_client_names_the_end_to_upgrade(metadata, says):
    with old_host(metadata) as port:
        with Session(f"127.0.0.1:{port}", client=3, round=1, token="x", deadline_seconds=10.0) as session:
            with pytest.raises(HostRefused, match=says):
                session.ask(messages.CardRequest())
