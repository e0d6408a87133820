"""Every setting with its type, its default and, where it is not in conf/, the reason; and what it may be.

The groups of conf/ (method, rule, dataset, ...) are checked against the signatures of what they name instead, where
their bounds stand too (fedmm/bounds.py). `optimizer.lr` is here, since torch's signatures have none.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, get_args

from fedmm.codecs import Codec


class ConfigError(ValueError):
    """The overrides ask for something that is not there or cannot be; the message lists every mistake."""


@dataclass
class MethodConfig:
    sets: list[str] = field(default_factory=lambda: ["shared"])
    use: list[str] = field(default_factory=lambda: ["shared"])
    step: Any = None
    fisher: Any = None
    begin: Any = None  # before the first step: what the method wants to know of all of the client's examples
    retrained: bool = False  # head=classes: a second head, which the server trains and which answers


@dataclass
class PretrainConfig:
    """MLLM-FL's first stage, before the first round; off without a step."""

    threads: int = 2  # of torch, while the server works alone; sums depend on it, so it is no matter of the machine
    step: Any = None


@dataclass
class AlignConfig:
    """MLLM-FL's third stage, after an aggregation; off without a step."""

    every: int = 1  # rounds
    per_class: int = 40  # open images of each class to tune on
    held_out: int = 20  # and to stop by
    labels: str = "data"  # whose: of the open data, or of the MLLM (mllm), where they have none
    threads: int = 1  # of torch
    step: Any = None


@dataclass
class LoraConfig:
    rank: int = 0  # 0: off. The embedded tower gains little from it
    alpha: int = 16
    targets: list[str] = field(default_factory=lambda: ["q_proj", "v_proj", "linear_1", "linear_2"])


@dataclass
class EdgeConfig:
    rank: int = 16  # FedNano uses 64 at width 4096; 16 is plenty at 128
    alpha: float = 32.0  # twice the rank, the usual choice
    ranks: list[int] | None = None  # client k has ranks[k % their number], up to edge.rank, the server's; null: that
    cache_memory_mb: int = 0  # of features, in front of the disk: ends with the process, and a disk's cache is as fast
    cache_disk_mb: int = 16384  # under FEDMM_HOME: 6,400 images of LLaVA-1.5 take 15 GB. Both 0: encoded in every step
    lora: LoraConfig = field(default_factory=LoraConfig)


@dataclass
class CodecConfig:
    """How each kind of tensor is written on the link: none, fp16, bf16 or int8. None keeps every bit."""

    features: str = "none"  # rounded once, at the client, so that both ends compute with the same ones
    h: str = "none"  # h and B of the low-rank terms
    gradients: str = "none"
    logits: str = "none"


@dataclass
class LinkConfig:
    bind: str = "127.0.0.1:0"  # where the host listens; 0: any free port
    address: str | None = None  # what clients dial, host:port; null: what is bound
    tls: str = "auto"  # always, never; auto: unless bind and address are this machine's own loopback
    encoding: str = "factored"  # dense: embeddings and their gradients, whole, at every step
    local: str = "factored"  # dense: where what a client keeps acts, sums alone travel: not even its B leaves
    cache: str = "run"  # features stay at the host for the run; none: they go up with every step, and nothing stays
    cache_memory_mb: int = 4096
    cache_disk_mb: int = 16384  # 6,400 images of LLaVA-1.5 take 15 GB, in fp16 half of it
    codec: CodecConfig = field(default_factory=CodecConfig)
    loss: str = "auto"  # client: logits come down and the client computes the loss itself
    deadline_seconds: float = 60.0  # the longest wait for one reply
    frame_limit_mb: int = 1024
    sessions: int = 64  # clients connected at once; others wait for their turn, run.round_seconds at most.
    # While they wait, a client that is silent for ten deadlines loses its session
    pending: int = 4  # forward passes of a session that may wait for their backward
    workers: int = 2  # LLM passes at once, and a small one where large ones hold all; each on `threads` threads
    merge_rows: int = 0  # rows of clients' steps run as one batch: for a GPU. 0: each alone, no bit depends on company
    merge_wait_ms: float = 10.0  # for company, at most; a pass of a 7B model takes many times that
    step_memory_mb: int | None = None  # of one step at the host; null: its share of what is free (serving/footprint.py)
    frames_mb: int | None = None  # of frames in work and steps that wait for their backward, over all sessions, at
    # least frame_limit_mb; beyond it the session with the most is cut. null: a tenth of the free memory
    graphs_mb: int = 1024  # of forwards that wait for their backward (link.loss=client); beyond it they run again


@dataclass
class EvaluateConfig:
    every: int = 1  # rounds; 0: only before the first and after the last
    split: str = "test"  # validation, for tuning
    batch_size: int = 64
    max_tokens: int = 8
    everywhere: bool = False  # score a client on every client's part, not only on its own
    groups: Any = None  # accuracy for many, medium, few classes: thirds by rank, or [100, 20] as Liu et al. 2019
    predictions: bool = True  # answers go to the server at the end; false where they may not leave the site


@dataclass
class RunConfig:
    dir: str | None = None  # null: runs/<now>. Absolute for flwr run, whose server has a working directory of its own
    round_seconds: float = 3600.0  # a client that is not back by then is left out of the round
    wait_seconds: float = 120.0  # for all clients to be there at the start
    nodes: list[str] | None = None  # the nodes of clients 0, 1, ... by the names that `flwr supernode register --name`
    # gave them; null: a node says which client it is, and the first to say a number keeps it
    max_examples: int = 1_000_000  # that one client may claim; all of VQAv2's are 443,757
    report_limit_mb: int = 64  # of a client's report, which holds its answers
    at_once: int | None = None  # clients at once in one process; null: one a core. Changes no bit
    has_data: bool = True  # the server can build the dataset too, as with a benchmark; false where only sites hold it
    examples: int = 12  # test images in the report, where the server has the data; 0: none


@dataclass
class Config:
    """Types of everything in conf/config.yaml; the values with their reasons are there or beside the field."""

    label: str = "run"  # of the arm
    data: str = ""  # the name of the data and who holds what of them: the scenario's, or dataset and partition
    seed: int = 0
    clients: int = 5
    clients_per_round: int | None = None
    rounds: int = 8
    epochs: int = 1
    batch_size: int = 32
    schedule: str = "cosine"
    clip_norm: float | None = 1.0
    pooled: bool = False  # all clients' data at client 0
    compare: list[str] = field(default_factory=list)
    threads: int = 1  # of torch, in clients and host: sums depend on it, and Ray gives its actors one
    llm: Any = None
    dataset: Any = None
    partition: Any = None
    method: MethodConfig = field(default_factory=MethodConfig)
    rule: Any = None
    schema: Any = None
    optimizer: Any = None
    fault: Any = None
    faulty: list[int] = field(default_factory=lambda: [0])  # the clients who send garbage, where `fault` says which
    inner: Any = None
    head: str = "llm"  # classes: no LLM answers, clients train `compact` whole, with a linear head over class names
    classes: list[str] | None = None  # their names; null: those of the training data, where the server has it
    compact: Any = None
    pretrain: PretrainConfig = field(default_factory=PretrainConfig)
    captions: Any = None  # what an MLLM writes about open images for `pretrain`
    align: AlignConfig = field(default_factory=AlignConfig)
    sampling: Any = None  # the order in which a client sees its examples in an epoch; null: each once, shuffled
    edge: EdgeConfig = field(default_factory=EdgeConfig)
    link: LinkConfig = field(default_factory=LinkConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    run: RunConfig = field(default_factory=RunConfig)


PLACES = (
    "run", "link.bind", "link.address", "link.tls", "link.deadline_seconds", "link.frame_limit_mb", "link.sessions",
    "link.pending", "link.workers", "link.merge_wait_ms", "link.graphs_mb", "link.step_memory_mb", "link.frames_mb",
    "link.cache_memory_mb", "link.cache_disk_mb",
)  # fmt: skip
"""Settings of where and how long: no bit of what is trained depends on them."""
SETS = {"shared", "local", "frozen"}
ONE_OF = {
    "schedule": ("constant", "cosine"),
    "head": ("llm", "classes"),
    "align.labels": ("data", "mllm"),
    "evaluate.split": ("validation", "test"),
    "link.loss": ("auto", "client"),
    "link.tls": ("auto", "always", "never"),
    "link.encoding": ("dense", "factored"),
    "link.local": ("factored", "dense"),
    "link.cache": ("run", "none"),
    **{f"link.codec.{kind.name}": get_args(Codec) for kind in fields(CodecConfig)},
}
AT_LEAST = {
    "optimizer.lr": 0, "run.at_once": 1,
    "clients": 1, "rounds": 0, "epochs": 1, "batch_size": 1, "threads": 1, "edge.rank": 0, "edge.lora.rank": 0,
    "pretrain.threads": 1, "align.threads": 1, "align.every": 1, "align.per_class": 1, "align.held_out": 1,
    "edge.cache_memory_mb": 0, "edge.cache_disk_mb": 0,
    "evaluate.every": 0, "evaluate.batch_size": 1, "evaluate.max_tokens": 1, "link.deadline_seconds": 1,
    "link.frame_limit_mb": 1, "link.sessions": 1, "link.pending": 1, "link.workers": 1, "link.merge_rows": 0,
    "link.merge_wait_ms": 0, "link.graphs_mb": 0, "link.step_memory_mb": 1, "link.frames_mb": 1,
    "link.cache_memory_mb": 0, "link.cache_disk_mb": 0,
    "run.round_seconds": 1, "run.wait_seconds": 1, "run.examples": 0, "run.max_examples": 1,
    "run.report_limit_mb": 1,
}  # fmt: skip
AT_MOST = {
    "clients": 100_000, "rounds": 100_000, "epochs": 100_000, "batch_size": 1 << 16, "threads": 1024,
    "edge.rank": 1 << 14, "edge.lora.rank": 1 << 14, "inner.rank": 1 << 14, "evaluate.batch_size": 1 << 16,
    "evaluate.max_tokens": 1 << 16, "link.frame_limit_mb": 1 << 16, "link.deadline_seconds": 86_400,
    "link.sessions": 100_000, "run.round_seconds": 30 * 86_400,
}  # fmt: skip
"""Far above any use: an order over these would take a site's memory or days before it fails."""
