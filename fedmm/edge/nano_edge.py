"""The NanoEdge: image and question in, `Embeds` for the LLM out. Its frozen modules come from the host.

    base = connector(encoder(image)) at image positions, token table at text positions
    out  = base + sum over the adapters in use of (1 / how many) * their low-rank term

Adapters come in named sets: `shared` travels, `local` stays on the client, `frozen` is a copy of shared made on
arrival. Every set holds the same names, so that one set's state loads into another. What a set has inside the layers of
encoder, connector or LLM (`fedmm.adapters.inner`) belongs to it too. A client's rank may be below the server's: its
NanoAdapters are then the server's cut to their first rows and columns, and the scale is the server's too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from fedmm.adapters import inner
from fedmm.adapters.nano import NanoAdapter
from fedmm.edge import base
from fedmm.edge.encoder import Encoder
from fedmm.edge.folding import base_of, embed_of
from fedmm.edge.sets import Edge
from fedmm.types import Batch, Embeds, LowRank, Segment, Source, State, TokenTerm


@dataclass(frozen=True)
class Lora:
    """peft LoRA inside the encoder and connector, off at rank 0. Names of modules as peft's `target_modules`."""

    rank: int = 0
    alpha: int = 16
    targets: Sequence[str] = ("q_proj", "v_proj", "linear_1", "linear_2")


class NanoEdge(Edge):
    """Encoder, connector, token table, and named sets of adapters; only adapters have gradients.

    Without an encoder it takes features only; with rank 0 it has no NanoAdapters. `decoder` are the LLM's layers where
    adapters of the same sets lie inside them: `forward` lets the named ones act there too, for the pass that follows.
    """

    # parameters: what an edge is made of, each named at its one place of use
    def __init__(
        self,
        encoder: nn.Module | None,
        connector: nn.Module,
        table_VD: base.Table,
        *,
        sets: Sequence[str] = ("shared",),
        rank: int = 16,
        alpha: float = 32.0,
        client_rank: int | None = None,
        lora: Lora | None = None,
        decoder: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.connector = connector.eval().requires_grad_(False)
        self.table_VD = table_VD
        self.decoder, self.rank = decoder, rank
        self._kinds = base.KINDS if rank else ()
        about = table_VD.shape[1], client_rank or rank, alpha / max(1, rank)
        self.adapters = nn.ModuleDict(
            {name: nn.ModuleDict({kind: NanoAdapter(*about) for kind in self._kinds}) for name in sets}
        )
        self.lora = bool(lora and lora.rank)
        modules: dict[str, nn.Module] = {}
        if lora and lora.rank:
            modules = {"encoder": cast(Encoder, encoder).tower, "connector": connector}
            _inject(modules, sets, lora)
        self.inner = inner.Inner(modules if decoder is None else modules | {"llm": decoder})

    def fold(self, state: State, scale: float) -> None:
        """Put what `rule=stack` folded under the adapters; once, for it is not taken out again."""
        self.connector, self.table_VD = base_of(self.connector, self.table_VD, state, scale)

    def forward(self, batch: Batch, use: Sequence[str] = ("shared",)) -> tuple[Embeds, Bool[Tensor, "B T"]]:
        """What enters the LLM with the named sets acting together, each with weight 1 / len(use)."""
        return self.branches(batch, [use])[0], batch.mask_BT

    def branches(self, batch: Batch, uses: Sequence[Sequence[str]]) -> list[Embeds]:
        """Embeddings of one batch with one choice of sets after another; they share their base where it is frozen."""
        bases = [self._base(batch, use) for use in uses] if self.lora else [self._base(batch, uses[0])] * len(uses)
        shape = tuple(batch.tokens_BT.shape)
        return [
            Embeds(shape, segments, self._terms(segments, use), source, embed_of(self.table_VD))
            for (segments, source), use in zip(bases, uses, strict=True)
        ]

    def _base(self, batch: Batch, use: Sequence[str]) -> tuple[tuple[Segment, ...], Source]:
        self.inner.act(use)
        features_MPE = self._features(batch)
        image_N, text_N = base.positions(batch.image_BT, batch.mask_BT)
        segments = (
            base.image_segment(self.connector, features_MPE, image_N),
            base.text_segment(self.table_VD, batch.tokens_BT, text_N),
        )
        features = None if self.lora else features_MPE
        return segments, Source(batch.tokens_BT, batch.image_BT, self.lora, features, batch.keys)

    def _terms(self, segments: tuple[Segment, ...], use: Sequence[str]) -> tuple[LowRank, ...]:
        pairs = [(name, segment) for name in use for segment in segments if segment.kind in self._kinds]
        return tuple(
            self._adapter(n, segment.kind).term(segment, 1 / len(use), f"{n}.{segment.kind}") for n, segment in pairs
        )

    def _features(self, batch: Batch) -> Float[Tensor, "M P E"]:
        if batch.features_MPE is not None:
            return batch.features_MPE
        if batch.pixels is None and not batch.image_BT.any():  # questions alone
            return torch.zeros(0, 1, base.feature_width(self.connector))
        assert batch.pixels is not None and self.encoder is not None, "without features it takes pixels and an encoder"
        return self.encoder(batch.pixels)

    def token_terms(self, use: Sequence[str] = ("shared",)) -> list[TokenTerm]:
        """The text adapters in use, as `generate` takes them along."""
        return [self._adapter(name, "text").token_term(1 / len(use)) for name in use if self._kinds]

    @property
    def sets(self) -> Sequence[str]:
        return tuple(self.adapters)

    @property
    def terms_only(self) -> bool:
        """Whether what trains is low-rank terms at the LLM's input, and what lies before them: it can form a Fisher."""
        return self.decoder is None

    def trainable(self, name: str) -> dict[str, nn.Parameter]:
        """The parameters of one set, under names that are the same in every set: `text.up`, `encoder....lora_A`."""
        return dict(self.adapters[name].named_parameters()) | self.inner.trainable(name)

    def reset(self, generator: torch.Generator, name: str = "shared") -> None:
        """Start one set: every A drawn from `generator` in the order of names, every B zero."""
        for kind in self._kinds:
            self._adapter(name, kind).reset(generator, self.rank)
        with torch.no_grad():
            for key, parameter in self.inner.trainable(name).items():
                if key.endswith(inner.DOWN):
                    bound = parameter.shape[1] ** -0.5
                    parameter.copy_(torch.empty(parameter.shape).uniform_(-bound, bound, generator=generator))
                else:
                    parameter.zero_()

    def _adapter(self, name: str, kind: str) -> NanoAdapter:
        adapter = cast(nn.ModuleDict, self.adapters[name])[kind]
        assert isinstance(adapter, NanoAdapter)
        return adapter


def _inject(modules: Mapping[str, nn.Module], sets: Sequence[str], lora: Lora) -> None:
    if not inner.inject(list(modules.values()), sets, rank=lora.rank, alpha=float(lora.alpha), targets=lora.targets):
        raise ValueError(f"edge.lora.targets={list(lora.targets)} names no module of the encoder or connector")
