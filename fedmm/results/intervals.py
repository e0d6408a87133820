"""What several runs show together: arms beside each other on the same data, with intervals over seeds, paired by seed.

    mean and 95% interval by Student's t over seeds;   a difference is taken seed by seed, then averaged
    own      each client's accuracy on its own test part: mean over clients, the worst, spread (standard deviation)
    global   on everybody's test examples: of the one shared model, or the mean over clients' personal models

From the records of the runs alone. Runs that differ in more than their seed are not averaged, but refused.
"""

from __future__ import annotations

import math
import re
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fedmm.runs.records import Run, apart, differing

LOCAL = "local"  # the label of the arm that tells whether joining pays
FEDAVG = "FedAvg"
STARTS = ("zero-shot", "untrained")  # what the state before the first round is called: of an LLM, of a classifier
_KEY = r"[\w.@/]+"  # of a setting
_DATA = ("dataset.", "partition.", "clients.", "evaluate.split.")


@dataclass(frozen=True)
class Row:
    """An arm on some data: the summaries of its runs (`summary.json`) by seed, and what they were asked, by path."""

    data: str
    label: str
    by_seed: Mapping[int, Mapping[str, Any]]
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def scored_on(self) -> dict[str, Any]:
        """The settings that say whose data these are and what is asked of them."""
        return {key: value for key, value in self.settings.items() if of_data(key)}

    @property
    def budget(self) -> str:
        """Rounds, epochs in each and examples a step, where the configuration has them."""
        return " x ".join(str(self.settings.get(key, "–")) for key in ("rounds", "epochs", "batch_size"))

    @property
    def same_clients(self) -> bool:
        """Whether a client has the same questions with every seed: the start, scored, answers as many of them."""
        starts = [found.get("zero_shot", found["final"])["own"] for found in self.by_seed.values()]
        return bool(starts[0]) and all(start == starts[0] for start in starts)

    def overall(self) -> dict[int, float]:
        """Global accuracy by seed, where it was measured."""
        return {
            s: found["final"]["global"] for s, found in self.by_seed.items() if found["final"]["global"] is not None
        }

    def accuracy_by_client(self) -> dict[int, dict[str, float]]:
        """Accuracy of each client on its own part, by seed; a run that scored nobody is not there."""
        return {seed: found["final"]["own"] for seed, found in self.by_seed.items() if found["final"]["own"]}

    def group(self, name: str) -> dict[int, float]:
        """Accuracy on a group of classes by seed, where there is one."""
        found = {seed: told["final"].get("groups", {}).get(name) for seed, told in self.by_seed.items()}
        return {seed: both[0] / both[1] for seed, both in found.items() if both}

    def product_error(self) -> dict[int, float]:
        """How far the rule's products are from the mean of the clients', by seed, where there are any."""
        found = {seed: told.get("product_error") for seed, told in self.by_seed.items()}  # older runs do not tell
        return {seed: error for seed, error in found.items() if error is not None}

    def over_clients(self, figure: Callable[[Iterable[float]], float]) -> dict[int, float]:
        """One figure of the clients' own accuracies, by seed."""
        return {seed: figure(own.values()) for seed, own in self.accuracy_by_client().items()}

    def mean_accuracy(self) -> dict[int, float]:
        """Own accuracy, mean over clients, by seed."""
        return self.over_clients(statistics.fmean)

    def moved_bytes(self, wanted: Callable[[str], bool], ways: Sequence[int] = (0, 1)) -> float:
        """Mean over runs of the bytes of the wanted channels, up (0) and down (1)."""
        return statistics.fmean(
            sum(both[way] for name, both in found["bytes"].items() if wanted(name) for way in ways)
            for found in self.by_seed.values()
        )


def of_data(key: str) -> bool:
    """Whether a setting says whose data there are or what is asked of them."""
    return f"{key}.".startswith(_DATA)


def rows(runs: Iterable[Run]) -> list[Row]:
    """A row an arm and data, by data, zero-shot first, then by rising own accuracy. Raises ValueError where two runs
    are of one seed, or of different settings under one name."""
    found: dict[tuple[str, str], dict[int, Run]] = defaultdict(dict)
    for run in runs:
        data, label = run.summary["data"], run.summary["label"]
        if other := found[data, label].get(run.seed):
            raise ValueError(
                f"{run.where} and {other.where} both have {label} with seed {run.seed}; "
                "give each seed once, and set label=... if arms differ in more than their method and rule"
            )
        found[data, label][run.seed] = run
    arms = [
        Row(data, label, {seed: run.summary for seed, run in sorted(seeds.items())}, _agreed(list(seeds.values())))
        for (data, label), seeds in found.items()
    ]
    _on_one_footing(arms)
    starts = [row for data in sorted({row.data for row in arms}) if (row := _start(data, arms))]
    return sorted(
        [*starts, *arms], key=lambda row: (row.data, row.label not in STARTS, mean(row.mean_accuracy().values()) or 0.0)
    )


def _start(data: str, arms: Sequence[Row]) -> Row | None:
    """The state before the first round, which all arms share: by seed, from the first arm that was scored on it."""
    by_seed: dict[int, Mapping[str, Any]] = {}
    label = STARTS[0]
    for row in arms:
        for seed, found in row.by_seed.items() if row.data == data else ():
            if found.get("stages"):  # the server had begun before the first round
                continue
            known = by_seed.get(seed)
            better = known is None or (known["final"]["global"] is None and found["zero_shot"]["global"] is not None)
            if found["zero_shot"]["own"] and better:
                label = STARTS[found.get("head") == "classes"]
                by_seed[seed] = {"final": found["zero_shot"], "bytes": {}, "seconds": 0.0, "llm_samples": 0}
    return Row(data, label, by_seed) if by_seed else None


def _on_one_footing(arms: Sequence[Row]) -> None:
    """Raises ValueError where arms stand under one kind of data, and their labels do not tell that the data differ."""
    first: dict[tuple[str, ...], Row] = {}
    for row in arms:
        other = first.setdefault((row.data, *named(row.label)[1:]), row)
        mine, theirs = row.scored_on, other.scored_on
        if differ := differing(theirs, mine):
            key = differ[0]
            raise ValueError(
                f"{other.label} and {row.label} have the same data={row.data} but differ in {key}: {theirs.get(key)!r} "
                f"and {mine.get(key)!r}; compare them separately, or give one another data=... name"
            )


def _agreed(runs: Sequence[Run]) -> Mapping[str, Any]:
    """What the runs of a row were asked. Raises ValueError where they differ in more than their seed."""
    first = runs[0]
    for run in runs[1:]:
        if differ := apart(first.settings, run.settings):
            key = differ[0]
            raise ValueError(
                f"{first.where} and {run.where} have the same label but differ in {key}: {first.settings.get(key)!r} "
                f"and {run.settings.get(key)!r}; give one of them another label=..."
            )
    return {key: value for key, value in first.settings.items() if key != "seed"}


def mean(values: Iterable[float]) -> float | None:
    values = list(values)
    return statistics.fmean(values) if values else None


def interval(values: Iterable[float]) -> float | None:
    """Half the width of the 95% interval of the mean by Student's t, or None of fewer than two values."""
    values = list(values)
    if len(values) < 2:
        return None
    from scipy import stats  # half a second to import

    return float(stats.t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))


def differences(row: Row, other: Row) -> dict[int, dict[str, float]]:
    """Own accuracy less that of `other`, by seed and client, of the clients that both have scored; no seed without."""
    mine, theirs = row.accuracy_by_client(), other.accuracy_by_client()
    return {
        seed: {client: own[client] - theirs[seed][client] for client in own if client in both}
        for seed, own in mine.items()
        if (both := own.keys() & theirs.get(seed, {}).keys())
    }


def partner(row: Row, others: Mapping[str, Row], label: str) -> Row | None:
    """The row of that label on the same data; of a sweep over settings the one with the same values of them. Where a
    setting is named, as `fault=none`, the row that differs in it alone."""
    name, *settings = named(row.label)
    key, is_setting, _ = label.partition("=")
    if is_setting and re.fullmatch(_KEY, key):
        wanted = [[name, *(label if part.startswith(f"{key}=") else part for part in settings)]]
    else:
        wanted = [[label, *settings[i:]] for i in range(len(settings) + 1)]
    found = next((others[other] for parts in wanted if (other := ", ".join(parts)) in others), None)
    elsewhere = found is not None and row.settings and found.scored_on != row.scored_on
    return None if found is row or elsewhere else found


def against(labels: Sequence[str], requested: str | None) -> str:
    """The label to set others against, or the value of a setting that a sweep gave several: what was asked, or FedAvg,
    or the first. Raises ValueError where it is none, or there are no arms."""
    labels = [label for label in dict.fromkeys(labels) if label not in STARTS]
    if not labels:
        raise ValueError("there is no finished run to compare; name the folder of a run that has a summary.json")
    wanted = requested or FEDAVG
    if any(wanted in (label, *named(label)) for label in labels):
        return wanted
    if requested:
        raise ValueError(
            f"--against {requested!r} is none of these arms: {', '.join(map(repr, labels))}; choose one of them"
        )
    return labels[0]


def named(label: str) -> list[str]:
    """A label's name, and the settings that a sweep put after it: `FedAvg, pretrained`, `fault=none`, `edge.rank=4`."""
    return re.split(rf", (?={_KEY}=)", label)
