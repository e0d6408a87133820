"""What server and clients both make from a configuration: data, backbone, edge, and where its adapters start."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from omegaconf import OmegaConf
from torch import Tensor, nn

from fedmm import seeds
from fedmm.adapters import schema as schemas
from fedmm.adapters.nano import cut
from fedmm.codecs import Codecs
from fedmm.config.derived import at_client, client_rank, privacy
from fedmm.config.settings import Config
from fedmm.config.targets import make
from fedmm.data.views import rank
from fedmm.edge import frozen_modules
from fedmm.edge.classifier import Classes, Classifier
from fedmm.edge.encoder import CachedEncoder
from fedmm.edge.folding import unfolded
from fedmm.edge.nano_edge import Lora, NanoEdge
from fedmm.edge.prepare import Processor, prepare
from fedmm.edge.prepared import Prepared
from fedmm.edge.sets import Edge
from fedmm.link import messages
from fedmm.link.remote import RemoteLLM
from fedmm.link.session import Session
from fedmm.llm.loading import Backbone, twin
from fedmm.llm.local import LocalLLM
from fedmm.model import ClassifierModel, Model, SplitModel
from fedmm.storage import machine_cache
from fedmm.storage.tensor_store import Store
from fedmm.types import Example, State

Dataset = Callable[[], dict[str, Sequence[Example]]]


@dataclass(frozen=True)
class Whole:
    """A backbone in this process, the frozen modules taken out of it, and its card."""

    backbone: Backbone
    modules: State
    card: dict[str, Any]


def whole(cfg: Config) -> Whole:
    """The backbone of `cfg`, loaded once in a process: a server and clients that share one share its memory too."""
    return _whole(OmegaConf.to_yaml({key: value for key, value in cfg.llm.items() if key != "where"}))


def for_arm(cfg: Config, loaded: Whole, compact: State | None) -> Whole:
    """What an arm makes of the backbone that all arms share: its card names the classes of a classifier, or the values
    of a compact encoder stand in the place of its own."""
    return head_of(cfg).of_arm(loaded, compact)


def client_shards(cfg: Config, client: int) -> list[int]:
    """The parts of the data that a client trains on."""
    return list(range(cfg.clients)) if cfg.pooled else [client]


def splits(cfg: Config) -> dict[str, Sequence[Example]]:
    """The examples this machine can see, by split."""
    return _splits(make(cfg.dataset))


def partition(cfg: Config, split: str) -> list[list[int]]:
    """Which examples of a split belong to which client; every split follows the law of the training split, where there
    is one.

    Raises ValueError where the split cannot be divided so.
    """
    return _partition(make(cfg.dataset), make(cfg.partition), cfg.clients, cfg.seed, split)


def class_counts(cfg: Config) -> dict[str, int]:
    """How many training examples all clients have of each class, which is what is answered; scored ones have none."""
    made = splits(cfg)
    counts = Counter(made["train"][i].answer for part in partition(cfg, "train") for i in part)
    named = {example.answer for example in made[cfg.evaluate.split]} | counts.keys()
    return {name: counts[name] for name in sorted(named, key=rank)}


def initial_state(cfg: Config, edge: Edge, name: str) -> State:
    """Where a set starts, the same at every client and at the server: of adapters a random A, and B zero."""
    edge.reset(seeds.generator(cfg.seed, "adapters"), name)
    return edge.state(name)


def server_start(cfg: Config, loaded: Whole, compact: State | None = None) -> tuple[State, State]:
    """What the server starts from: of the shared set, what some round sends; a classifier's trunk is the compact
    encoder's, pretrained or not. And beside it what nobody trains or sends, such as the A of FFA-LoRA: it stays at the
    common start with everybody."""
    if "shared" not in cfg.method.sets:
        return {}, {}
    state, schema = initial_state(cfg, server_edge(cfg, loaded), "shared"), make(cfg.schema)
    state |= {name: tensor for name, tensor in (compact or {}).items() if name in state}
    sent = schemas.sent(schema, cfg.rounds, state)
    stay = schemas.private(schema, cfg.rounds, [f"shared.{name}" for name in state])
    moved = {*sent, *(name.removeprefix("shared.") for name in stay)}
    return {name: state[name] for name in sent}, {name: state[name] for name in state if name not in moved}


def state_for(cfg: Config, client: int, current: State) -> State:
    """What of the server's state a client gets: at the client's rank."""
    return cut(current, client_rank(cfg, client))


def update_of(cfg: Config, round: int, client: int, current: State) -> State:
    """What of the server's state a client's update of this round is about."""
    own = unfolded(state_for(cfg, client, current))
    return {name: own[name] for name in schemas.sent(make(cfg.schema), cfg.rounds, own, round)}


def build_edge(
    cfg: Config,
    modules: Mapping[str, Tensor],
    *,
    client: int | None = None,
    encoder: bool = True,
    shared: frozen_modules.Base | None = None,
    decoder: nn.Module | None = None,
) -> tuple[NanoEdge, Processor]:
    """The NanoEdge that `cfg` asks for from the frozen modules of the host: the server's own, or a client's.

    Without its encoder it takes features only. Where `inner` asks for adapters inside the LLM they are put into
    `decoder`, its layers.
    """
    place = make(cfg.inner or None)
    if place:
        place(decoder, tuple(cfg.method.sets))
    lora = Lora(cfg.edge.lora.rank, cfg.edge.lora.alpha, tuple(cfg.edge.lora.targets))
    return frozen_modules.build(
        modules,
        encoder=encoder,
        shared=shared,
        sets=tuple(cfg.method.sets),
        rank=cfg.edge.rank,
        alpha=cfg.edge.alpha,
        client_rank=None if client is None else client_rank(cfg, client),
        lora=lora if lora.rank else None,
        decoder=decoder if place else None,
    )


def local_model(
    cfg: Config, loaded: Whole, *, client: int | None = None, encoder: bool = True
) -> tuple[SplitModel, Processor]:
    """The model that `cfg` asks for with its LLM in this process, in modules of its own on the backbone's tensors."""
    llava = twin(loaded.backbone.model)
    edge, processor = build_edge(
        cfg, loaded.modules, client=client, encoder=encoder, decoder=llava.model.language_model
    )
    llm = LocalLLM(llava, checkpointing=loaded.backbone.checkpointing, inner=edge.inner)
    return SplitModel(edge, llm, cfg.link.loss), processor


@dataclass(frozen=True)
class Built:
    """A model, and how examples are made ready for it and its answers read; `encoder` is what makes their features."""

    model: Model
    ready: Callable[[Sequence[Example]], list[Prepared]]
    tokenizer: Any
    encoder: CachedEncoder | None = None


def class_names(cfg: Config) -> list[str]:
    """The classes a classifier tells apart, in one order for everybody: numbers as numbers, before words."""
    return list(cfg.classes) if cfg.classes is not None else answers_of(splits(cfg)["train"])


def answers_of(examples: Sequence[Example]) -> list[str]:
    """The answers there are, numbers as numbers, before words."""
    return sorted({example.answer for example in examples}, key=rank)


def local_llm(model: Model) -> LocalLLM | None:
    """The LLM of a model, where it is in this process."""
    return model.llm if isinstance(model, SplitModel) and isinstance(model.llm, LocalLLM) else None


def server_model(cfg: Config, loaded: Whole) -> Built:
    """The model that an arm's clients train, whole, in this process."""
    return head_of(cfg).at_server(loaded)


def server_edge(cfg: Config, loaded: Whole) -> Edge:
    """What holds the server's own copy of what clients train, without what it is not needed for."""
    return head_of(cfg).server_edge(loaded)


@runtime_checkable
class Head(Protocol):
    """Who answers in a run: an LLM, or a classifier over class names. All that differs by it is here."""

    def of_arm(self, loaded: Whole, compact: State | None) -> Whole:
        """The backbone as the arm's clients see it."""

    def at_server(self, loaded: Whole) -> Built:
        """The clients' model, whole, in the server's process."""

    def server_edge(self, loaded: Whole) -> Edge:
        """Of that model what trains."""

    def at_client(self, card: dict[str, Any], client: int, session: Session) -> Built:
        """The model that a client runs, as far as it does. Raises ValueError where it is not the server's."""

    def frozen_parameters(self, card: dict[str, Any]) -> int:
        """What a client holds and does not train."""


def head_of(cfg: Config) -> Head:
    return _Classes(cfg) if cfg.head == "classes" else _LLM(cfg)


@dataclass(frozen=True)
class _Classes:
    """The compact network is the whole model."""

    cfg: Config

    def of_arm(self, loaded: Whole, compact: State | None) -> Whole:
        return replace(loaded, card=loaded.card | {"classes": class_names(self.cfg)})

    def at_server(self, loaded: Whole) -> Built:
        return self._built(loaded.card["classes"])

    def server_edge(self, loaded: Whole) -> Edge:
        return self._built(loaded.card["classes"]).model.edge

    def at_client(self, card: dict[str, Any], client: int, session: Session) -> Built:
        return self._built(card["classes"])

    def frozen_parameters(self, card: dict[str, Any]) -> int:
        return 0

    def _built(self, names: Sequence[str]) -> Built:
        method, plan = self.cfg.method, make(self.cfg.compact)
        edge = Classifier(plan, len(names), sets=tuple(method.sets), retrained=method.retrained)
        classes = Classes(tuple(names), plan.side)
        return Built(ClassifierModel(edge), classes.prepare, classes)


@dataclass(frozen=True)
class _LLM:
    """The LLM is at the host, and a client runs an edge before it; or, with `llm.where=client`, it is at both."""

    cfg: Config

    def of_arm(self, loaded: Whole, compact: State | None) -> Whole:
        if compact is None:
            return loaded
        modules = frozen_modules.with_compact(loaded.modules, make(self.cfg.compact), compact)
        card = frozen_modules.describe(loaded.backbone.model, modules, loaded.backbone.prompt)
        return replace(loaded, modules=modules, card=card)

    def at_server(self, loaded: Whole) -> Built:
        encoder = cached_encoder(self.cfg, loaded.modules, loaded.card["edge"])
        model, processor = local_model(self.cfg, loaded, encoder=encoder is None)
        return _of_llm(model, processor, loaded.card["prompt"], encoder)

    def server_edge(self, loaded: Whole) -> Edge:
        decoder = twin(loaded.backbone.model).model.language_model if self.cfg.inner else None
        return build_edge(self.cfg, loaded.modules, encoder=bool(self.cfg.edge.lora.rank), decoder=decoder)[0]

    def at_client(self, card: dict[str, Any], client: int, session: Session) -> Built:
        if at_client(self.cfg):
            return self._whole(card, client)
        modules = _modules(session, card["edge"])
        encoder = cached_encoder(self.cfg, modules, card["edge"])
        shared = _base(card["edge"], machine_cache.home())
        edge, processor = build_edge(self.cfg, modules, client=client, encoder=encoder is None, shared=shared)
        link, leaves = self.cfg.link, privacy(self.cfg)
        codecs = Codecs(link.codec.features, link.codec.h, link.codec.gradients, link.codec.logits)
        llm = RemoteLLM(session, encoding=link.encoding, cache=link.cache, privacy=leaves, codecs=codecs)
        model = SplitModel(edge, llm, link.loss, leaves, card["stop_tokens"])
        return _of_llm(model, processor, card["prompt"], encoder)

    def frozen_parameters(self, card: dict[str, Any]) -> int:
        return int(card["model_parameters" if at_client(self.cfg) else "edge_parameters"])

    def _whole(self, card: dict[str, Any], client: int) -> Built:
        """The model with its LLM in this process."""
        loaded = whole(self.cfg)
        if loaded.card != card:
            odd = sorted(key for key in loaded.card | card if loaded.card.get(key) != card.get(key))
            raise ValueError(
                f"this client's backbone is not the server's: {odd} differ; use the same llm.* files at both"
            )
        encoder = cached_encoder(self.cfg, loaded.modules, card["edge"])
        model, processor = local_model(self.cfg, loaded, client=client, encoder=encoder is None)
        return _of_llm(model, processor, card["prompt"], encoder)


def _of_llm(model: Model, processor: Processor, prompt: str, encoder: CachedEncoder | None) -> Built:
    """A model that an LLM answers for, and its prompt."""
    ready = functools.partial(prepare, processor=processor, prompt=prompt, encoder=encoder)
    return Built(model, ready, processor.tokenizer, encoder)


def _modules(session: Session, digest: str) -> machine_cache.Mapped:
    """The frozen modules, mapped: fetched once, where this machine has no whole file of them under their hash."""
    if machine_cache.load_modules(digest) is None:
        machine_cache.save_modules(digest, session.ask(messages.EdgeRequest()).tensors)
    modules = machine_cache.load_modules(digest)
    assert modules is not None
    return modules


@functools.lru_cache(maxsize=2)  # for all clients of a process and a backbone; it holds nothing of theirs
def _base(digest: str, home: Path) -> frozen_modules.Base:
    """What clients of the backbone with this hash have alike; its frozen modules are in this FEDMM_HOME."""
    modules = machine_cache.load_modules(digest)
    assert modules is not None
    return frozen_modules.base(modules, modules.rows("table"))


def cached_encoder(
    cfg: Config, modules: Mapping[str, Tensor], digest: str, rounds_by: str | None = None
) -> CachedEncoder | None:
    """Where batches take features from. None: nothing is kept, they hold pixels, and the edge encodes in every step.

    Features are rounded as the link's are, or by the codec `rounds_by`.
    """
    bounds = cfg.edge.cache_memory_mb << 20, cfg.edge.cache_disk_mb << 20
    if cfg.edge.lora.rank or not any(bounds):
        return None
    build = functools.partial(frozen_modules.build_encoder, modules)
    codec = Codecs(features=rounds_by or cfg.link.codec.features).of("features")
    return CachedEncoder(build, _store(machine_cache.home() / "features", *bounds), digest[:32], codec)


@functools.cache  # clients of one process share it
def _store(folder: Path, memory_bytes: int, disk_bytes: int) -> Store:
    knobs = "edge.cache_memory_mb or edge.cache_disk_mb"
    return Store(memory_bytes=memory_bytes, folder=folder, disk_bytes=disk_bytes, knobs=knobs)


@functools.lru_cache(maxsize=1)
def _whole(llm_yaml: str) -> Whole:
    backbone = make(OmegaConf.create(llm_yaml))
    modules = frozen_modules.take(backbone.model, backbone.processor)
    return Whole(backbone, modules, frozen_modules.describe(backbone.model, modules, backbone.prompt))


@functools.lru_cache(maxsize=4)
def _splits(dataset: Dataset) -> dict[str, Sequence[Example]]:
    return dataset()


@functools.lru_cache(maxsize=8)  # of VQAv2 a deal takes seconds
def _partition(
    dataset: Dataset, deal: Callable[..., list[list[int]]], clients: int, seed: int, split: str
) -> list[list[int]]:
    made, generator = _splits(dataset), seeds.generator(seed, "partition")
    return deal(made[split], clients, generator, trained=made.get("train") or None)
