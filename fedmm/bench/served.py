"""A LLaVA of real widths with one thin layer, an edge in front of it, and a host of it in a process of its own.

The layer is thin (narrow heads and MLP) because it is the link that is measured: bytes do not depend on it, and from a
step's time its own is taken off. Random weights come from one seed, so both processes hold the same.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING

import torch
from torch import nn

from fedmm import codecs, seeds
from fedmm.bench.bare import Bare, serve
from fedmm.edge import base
from fedmm.edge.nano_edge import NanoEdge
from fedmm.link import tls
from fedmm.link.session import Session
from fedmm.llm.local import LocalLLM
from fedmm.serving.features import Features
from fedmm.serving.host import Host
from fedmm.serving.limits import Limits
from fedmm.storage.tensor_store import Store
from fedmm.types import Batch

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration

DEADLINE_SECONDS = 300.0  # of a step at real size on a busy core


@dataclass(frozen=True)
class Shapes:
    """Sizes by the dimension key; P are the image positions among T, A the answer positions at the end."""

    T: int
    P: int
    D: int
    E: int
    R: int
    V: int
    A: int


SHAPES = {
    "real": Shapes(T=676, P=576, D=4096, E=1024, R=64, V=32064, A=5),  # LLaVA-1.5-7B, FedNano's rank
    "toy": Shapes(T=52, P=36, D=64, E=32, R=4, V=128, A=5),
}


@dataclass(frozen=True)
class Endpoint:
    """One way into the host's process, plain or mutual TLS: the link itself, and the bare floor beside it."""

    name: str
    address: str
    bare_address: str
    token: str
    identity: tls.Identity | None

    def session(self) -> Session:
        return Session(
            self.address, client=0, round=1, token=self.token, identity=self.identity, deadline_seconds=DEADLINE_SECONDS
        )

    def bare(self) -> Bare:
        return Bare(self.bare_address, self.identity)


@contextmanager
def served(shapes: Shapes) -> Iterator[dict[str, Endpoint]]:
    """The endpoints "plain" and "tls" of a host that runs until the block ends, or until this process does."""
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    process = spawn.Process(target=_serve, args=(shapes, theirs), daemon=True)
    process.start()
    theirs.close()
    try:
        yield {endpoint.name: endpoint for endpoint in ours.recv()}
    finally:
        ours.close()  # which it waits for
        process.join(10)
        process.kill()


def llava(
    shapes: Shapes, *, layers: int = 1, heads: int = 4, head: int = 16, mlp: int = 64
) -> LlavaForConditionalGeneration:
    """A random LLaVA of the real class; its tower is none that anybody looks through."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    vision = CLIPVisionConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, image_size=8, patch_size=8
    )
    text = LlamaConfig(
        vocab_size=shapes.V, hidden_size=shapes.D, intermediate_size=mlp, num_hidden_layers=layers,
        num_attention_heads=heads, head_dim=head, max_position_embeddings=shapes.T, tie_word_embeddings=False,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=0, tie_word_embeddings=False)
        return LlavaForConditionalGeneration(config).eval().requires_grad_(False)


def connector(shapes: Shapes) -> nn.Linear:
    """One layer in the place of LLaVA's two: the same widths, and a fifth of the work, which costs no byte."""
    module = nn.Linear(shapes.E, shapes.D)
    generator = seeds.generator(0, "connector")
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=shapes.E**-0.5, generator=generator)
    return module


def edge(shapes: Shapes, model: LlavaForConditionalGeneration, sets: tuple[str, ...] = ("shared",)) -> NanoEdge:
    """An edge whose adapters have left their start, so that every gradient is something."""
    table_VD = model.get_input_embeddings().weight.detach()
    built = NanoEdge(nn.Identity(), connector(shapes), table_VD, sets=sets, rank=shapes.R, alpha=2.0 * shapes.R)
    generator = seeds.generator(0, "adapters")
    with torch.no_grad():
        for parameter in built.adapters.parameters():
            parameter.normal_(std=shapes.D**-0.5, generator=generator)
    built.freeze_all_but(["shared.*", "local.*"])
    return built


def batch(shapes: Shapes, samples: range, codec: codecs.Codec = "none") -> Batch:
    """Random samples by number, as the encoder would have left them: features, rounded to what travels."""
    B, T, A = len(samples), shapes.T, shapes.A
    drawn = [seeds.generator(0, "sample", client=i) for i in samples]
    tokens_BT = torch.stack([torch.randint(shapes.V, (T,), generator=generator) for generator in drawn])
    features = [codecs.rounded(torch.randn(1, shapes.P, shapes.E, generator=generator), codec) for generator in drawn]
    return Batch(
        ids=tuple(map(str, samples)),
        tokens_BT=tokens_BT,
        mask_BT=torch.ones(B, T, dtype=torch.bool),
        image_BT=(torch.arange(T) < shapes.P).expand(B, T),
        keep_BA=torch.arange(T - A, T).expand(B, A),
        labels_BA=tokens_BT[:, :A],
        features_MPE=torch.cat(features),
        keys=tuple(map(base.key_of, features)),
    )


def _serve(shapes: Shapes, connection: Connection) -> None:
    torch.set_num_threads(1)
    model = llava(shapes)
    with ExitStack() as stack:
        connection.send([_open(shapes, model, name, stack) for name in ("plain", "tls")])
        with suppress(EOFError):
            connection.recv()


def _open(shapes: Shapes, model: LlavaForConditionalGeneration, name: str, stack: ExitStack) -> Endpoint:
    authority = tls.Authority() if name == "tls" else None
    features = Features(
        connector(shapes).requires_grad_(False), model.get_input_embeddings().weight, Store(memory_bytes=4 << 30)
    )
    host = stack.enter_context(
        Host(
            LocalLLM(model), card={}, edge={}, features=features, on_update=lambda round, update, moved: None,
            authority=authority, limits=Limits(deadline_seconds=DEADLINE_SECONDS),
        )
    )  # fmt: skip
    host.open_round(1, {}, [])
    bare, port = serve(authority)
    stack.callback(bare.stop, None)
    return Endpoint(name, f"127.0.0.1:{host.port}", f"127.0.0.1:{port}", host.token(1, 0), host.identity(0))
