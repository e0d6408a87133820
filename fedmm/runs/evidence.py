"""What several runs show together: arms beside each other on the same data, with intervals over seeds, paired by seed.

    mean and 95% interval by Student's t over seeds;   a difference is taken seed by seed, then averaged
    own      each client's accuracy on its own test part: mean over clients, the worst, spread (standard deviation)
    global   on everybody's test examples: of the one shared model, or the mean over clients' personal models

From the files of the runs alone. Runs that differ in more than their seed are not averaged, but refused.
"""

from __future__ import annotations

import json
import math
import re
import statistics
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from fedmm.evaluate.groups import GROUPS
from fedmm.runs import summary
from fedmm.runs.config import what

LOCAL = "local"  # the label of the arm that tells whether joining pays
FEDAVG = "FedAvg"
STARTS = ("zero-shot", "untrained")  # what the state before the first round is called: of an LLM, of a classifier
MOST_CLIENTS = 12  # that a table by client shows
ONE_SEED = "¹"
ONCE = ("edge", "features")  # channels: once a machine, once a sample and run; of a run's arms the first pays for all
_ONCE_APART = "of all rounds; features and frozen parts, which go once, apart"
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

    def overall(self) -> dict[int, float]:
        """Global accuracy by seed, where it was measured."""
        return {
            s: found["final"]["global"] for s, found in self.by_seed.items() if found["final"]["global"] is not None
        }

    def own(self) -> dict[int, dict[str, float]]:
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
        return {seed: figure(own.values()) for seed, own in self.own().items()}

    def moved_bytes(self, wanted: Callable[[str], bool], ways: Sequence[int] = (0, 1)) -> float:
        """Mean over runs of the bytes of the wanted channels, up (0) and down (1)."""
        return statistics.fmean(
            sum(both[way] for name, both in found["bytes"].items() if wanted(name) for way in ways)
            for found in self.by_seed.values()
        )


@dataclass(frozen=True)
class Column:
    """A heading and what stands under it; `cell` is given the row and the rows of the same data by label. `meaning`,
    where the heading does not say it."""

    heading: str
    cell: Callable[[Row, Mapping[str, Row]], str]
    meaning: str = ""


def of_data(key: str) -> bool:
    """Whether a setting says whose data there are or what is asked of them."""
    return f"{key}.".startswith(_DATA)


def rows(runs: Sequence[Path]) -> list[Row]:
    """A row an arm and data, by data, zero-shot first, then by rising own accuracy. Raises ValueError where two runs
    are of one seed, or of different settings under one name."""
    found: dict[tuple[str, str], dict[int, tuple[Path, Mapping[str, Any]]]] = defaultdict(dict)
    for folder in (folder for run in runs for folder in summary.arm_folders(run)):
        told = json.loads((folder / "summary.json").read_text())
        seeds = found[told["data"], told["label"]]
        if told["seed"] in seeds:
            raise ValueError(
                f"{folder} has {told['label']} with seed {told['seed']} again, after {seeds[told['seed']][0]}; "
                "give each seed once, and set label=... where arms differ in more than their method and rule"
            )
        seeds[told["seed"]] = folder, told
    arms = [
        Row(
            data,
            label,
            {seed: told for seed, (_, told) in sorted(seeds.items())},
            _agreed([folder for folder, _ in seeds.values()]),
        )
        for (data, label), seeds in found.items()
    ]
    _on_one_footing(arms)
    starts = [row for data in sorted({row.data for row in arms}) if (row := _start(data, arms))]
    return sorted(
        [*starts, *arms], key=lambda row: (row.data, row.label not in STARTS, mean(_own(row).values()) or 0.0)
    )


def short_columns(table_of: Sequence[Row]) -> tuple[Column, ...]:
    """What a run's own report and the watcher show of these rows."""
    return (
        Column("arm", lambda row, others: row.label),
        Column(
            "global accuracy %", lambda row, others: percent(row.overall().values()), "on everybody's test questions"
        ),
        Column(
            "own test %", lambda row, others: percent(_own(row).values()), "each client on its own part, their mean"
        ),
        Column("worst client %", lambda row, others: percent(row.over_clients(min).values())),
        *_group_columns(table_of),
        Column("link MB up", lambda row, others: _megabytes(row.moved_bytes(_on_link, [0])), _ONCE_APART),
        Column("link MB down", lambda row, others: _megabytes(row.moved_bytes(_on_link, [1]))),
        *_stage_columns(table_of)[:1],
        Column("seconds", lambda row, others: f"{_mean_of(row, 'seconds'):.0f}"),
    )


def columns(asked: str | None, table_of: Sequence[Row]) -> tuple[Column, ...]:
    """What a comparison of these rows shows; `asked` as in `against`. Raises ValueError where it is no arm."""
    chosen = against([row.label for row in table_of], asked)
    return (
        *short_columns([])[:4],
        *_group_columns(table_of),
        *_budget_columns(table_of),
        Column(
            "spread",
            lambda row, others: percent(row.over_clients(statistics.pstdev).values()),
            "standard deviation of own accuracy over clients",
        ),
        _gap_column(chosen),
        *_local_columns(table_of, chosen),
        *_product_columns(table_of),
        *_lost_columns(table_of),
        Column("link MB", lambda row, others: _megabytes(row.moved_bytes(_on_link)), _ONCE_APART),
        Column("features MB", lambda row, others: _megabytes(row.moved_bytes(lambda name: name == "features"))),
        Column("Flower kB", lambda row, others: f"{row.moved_bytes(lambda name: name == 'control') / 1e3:,.0f}"),
        Column("M parameters a client holds", lambda row, others: _held(row)),
        *_stage_columns(table_of),
        Column(
            "LLM samples",
            lambda row, others: f"{_mean_of(row, 'llm_samples'):,.0f}",
            "through the frozen LLM, once for each branch of a step, a backward not counted apart",
        ),
        Column(
            "seconds",
            lambda row, others: f"{_mean_of(row, 'seconds'):.0f}",
            "beside as many other runs as there are cores, so no cost of an arm to compare closely",
        ),
        Column("seeds", lambda row, others: str(len(row.by_seed)) if len(row.by_seed) > 1 else f"1 {ONE_SEED}"),
    )


def _group_columns(table_of: Sequence[Row]) -> tuple[Column, ...]:
    """Many, medium and few classes, where some row has them."""
    return tuple(
        Column(f"{name} %", lambda row, others, name=name: percent(row.group(name).values()))  # type: ignore[misc]
        for name in GROUPS
        if any(row.group(name) for row in table_of)
    )


def _budget_columns(table_of: Sequence[Row]) -> tuple[Column, ...]:
    """What the arms were given, where it is not the same for all."""
    if len({row.budget for row in table_of if row.label not in STARTS}) < 2:
        return ()
    return (Column("rounds x epochs x batch", lambda row, others: row.budget if row.settings else "–"),)


def _gap_column(label: str) -> Column:
    return Column(f"own - {label}", lambda row, others: _gap(row, partner(row, others, label)))


def _local_columns(table_of: Sequence[Row], chosen: str) -> tuple[Column, ...]:
    """Whether it pays to join, where some row is alone."""
    if not any(_named(row.label)[0] == LOCAL for row in table_of):
        return ()
    return (
        *([_gap_column(LOCAL)] if chosen != LOCAL else []),
        Column(
            "clients better off",
            lambda row, others: _better_off(row, partner(row, others, LOCAL)),
            "clients times seeds that are served better than alone",
        ),
    )


def _product_columns(table_of: Sequence[Row]) -> tuple[Column, ...]:
    """The rule's error in product space, where some row trained pairs."""
    if not any(row.product_error() for row in table_of):
        return ()
    return (
        Column(
            "product error %",
            lambda row, others: percent(row.product_error().values()),
            "of the adapters' merged products B A against the mean of the clients', relative to that, over rounds; "
            "none where clients keep one of the two to themselves, or are too many for it",
        ),
    )


def _lost_columns(table_of: Sequence[Row]) -> tuple[Column, ...]:
    """What is missing from an arm, where something is."""
    told = (
        ("updates lost", _count_lost, "of clients that did not come back in a round, all seeds"),
        ("clients unscored", _count_unscored, "on the final state, all seeds; they are in no figure"),
    )
    return tuple(
        Column(heading, lambda row, others, count=count: str(count(row)), meaning)  # type: ignore[misc]
        for heading, count, meaning in told
        if any(map(count, table_of))
    )


def _count_lost(row: Row) -> int:
    return sum(found.get("lost", 0) for found in row.by_seed.values())


def _count_unscored(row: Row) -> int:
    return sum(len(found.get("unscored", ())) for found in row.by_seed.values())


def _stage_columns(table_of: Sequence[Row]) -> tuple[Column, ...]:
    """What the server's own stages took, where some row has them."""
    if not any(_stages(row, "seconds") for row in table_of):
        return ()
    return (
        Column(
            "server's stages s",
            lambda row, others: f"{_stages(row, 'seconds'):.0f}",
            "texts and scores that another run has left cost nothing again, a pretrained encoder what it cost that one",
        ),
        Column("LLM samples in them", lambda row, others: f"{_stages(row, 'llm_samples'):,.0f}"),
    )


def cells(table_of: Sequence[Row], shown: Sequence[Column]) -> list[tuple[str, ...]]:
    """The table, row by row."""
    return [tuple(column.cell(row, _beside(row, table_of)) for column in shown) for row in table_of]


def reading(shown: Sequence[Column]) -> str:
    """How the table is to be read."""
    meant = "; ".join(f"*{column.heading}* {column.meaning}" for column in shown if column.meaning)
    return f"Mean over seeds and 95% interval (Student's t), differences paired by seed. {meant}."


def markdown(table_of: Sequence[Row], shown: Sequence[Column]) -> str:
    """A table for each kind of data, under its name where there are several."""
    names = list(dict.fromkeys(row.data for row in table_of))
    parts = []
    for name in names:
        chosen = [row for row in table_of if row.data == name]
        lines = [
            tuple(column.heading for column in shown),
            ("---",) + ("---:",) * (len(shown) - 1),
            *cells(chosen, shown),
        ]
        text = "\n".join("| " + " | ".join(line) + " |" for line in lines)
        parts.append(f"### {name}\n\n{text}" if len(names) > 1 else text)
    note = f"\n\n{ONE_SEED} one seed: no interval, and no evidence." if any(ONE_SEED in part for part in parts) else ""
    return "\n\n".join(parts) + note


# ---- statistics ---------------------------------------------------------------------------------------------------


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


def percent(values: Iterable[float], sign: str = "") -> str:
    """Mean and 95% interval in per cent, of one seed its figure alone; a dash where it was not measured."""
    values = list(values)
    centre, half = mean(values), interval(values)
    if centre is None:
        return "–"
    return f"{100 * centre:{sign}.1f}" + (f" ± {100 * half:.1f}" if half is not None else "")


def gaps(row: Row, other: Row) -> dict[int, float]:
    """By how much own accuracy, mean over the clients that both have scored, is above that of `other`, by seed."""
    mine, theirs = row.own(), other.own()
    return {
        seed: statistics.fmean(own[client] - theirs[seed][client] for client in both)
        for seed, own in mine.items()
        if (both := own.keys() & theirs.get(seed, {}).keys())
    }


def partner(row: Row, others: Mapping[str, Row], label: str) -> Row | None:
    """The row of that label on the same data; of a sweep over settings the one with the same values of them."""
    _, settings = _named(row.label)
    ends = [settings[i:] for i in range(len(settings)) if settings.startswith(", ", i)]
    found = next((others[label + end] for end in ends if label + end in others), others.get(label))
    elsewhere = found is not None and row.settings and found.scored_on != row.scored_on
    return None if found is row or elsewhere else found


def against(labels: Sequence[str], asked: str | None) -> str:
    """The label to set others against: what was asked, or FedAvg, or the first. Raises ValueError where it is none."""
    labels = [label for label in dict.fromkeys(labels) if label not in STARTS]
    wanted = asked or FEDAVG
    if any(wanted in (label, _named(label)[0]) for label in labels):
        return wanted
    if asked:
        raise ValueError(f"--against {asked!r} is no arm here; there are {', '.join(map(repr, labels))}")
    return labels[0]


def _named(label: str) -> tuple[str, str]:
    """A label's name, and what a sweep put after it: `FedAvg, pretrained` and `, edge.rank=4`."""
    found = re.fullmatch(r"(.*?)((?:, [\w.@/]+=.*)?)", label)
    return (found[1], found[2]) if found else (label, "")


def by_client(table_of: Sequence[Row]) -> str:
    """By how many points each client is better served than alone; empty where nobody is alone."""
    gains: list[tuple[Row, dict[str, list[float]]]] = []
    for row in table_of:
        alone = partner(row, _beside(row, table_of), LOCAL)
        if alone is not None and row.label not in STARTS:
            gains.append((row, _gains(row.own(), alone.own())))
    gains = [(row, gained) for row, gained in gains if 0 < len(gained) <= MOST_CLIENTS]
    clients = sorted({client for _, gained in gains for client in gained}, key=int)
    lines = ["| data | arm |" + "".join(f" client {c} |" for c in clients), "| --- | --- |" + " ---: |" * len(clients)]
    for row, gained in gains:
        points = "".join(f" {_points(gained.get(c, []))} |" for c in clients)
        lines.append(f"| {row.data} | {row.label} |{points}")
    return "\n".join(lines) if gains else ""


def _gains(
    mine: Mapping[int, Mapping[str, float]], theirs: Mapping[int, Mapping[str, float]]
) -> dict[str, list[float]]:
    """One accuracy less the other, by client, of each seed that has both."""
    found: dict[str, list[float]] = defaultdict(list)
    for seed in mine.keys() & theirs.keys():
        for client in mine[seed].keys() & theirs[seed].keys():
            found[client].append(mine[seed][client] - theirs[seed][client])
    return found


# ---- pieces -------------------------------------------------------------------------------------------------------


def _beside(row: Row, table_of: Sequence[Row]) -> dict[str, Row]:
    """The rows of the same data, by label."""
    return {other.label: other for other in table_of if other.data == row.data}


def _own(row: Row) -> dict[int, float]:
    return row.over_clients(statistics.fmean)


def _gap(row: Row, other: Row | None) -> str:
    return _points(gaps(row, other).values()) if other is not None else "–"


def _points(differences: Collection[float]) -> str:
    """Differences, one a seed; a single one is marked."""
    return percent(differences, "+") + (f" {ONE_SEED}" if len(differences) == 1 else "")


def _better_off(row: Row, local: Row | None) -> str:
    """In how many cases, clients times seeds, the client is better served than alone."""
    if local is None:
        return "–"
    alone = local.own()
    pairs = [(own, alone[seed]) for seed, own in row.own().items() if seed in alone]
    pays = [own[client] > other[client] for own, other in pairs for client in own.keys() & other.keys()]
    return f"{sum(pays)} of {len(pays)}" if pays else "–"


def _on_link(channel: str) -> bool:
    return channel not in (*ONCE, "control")


def _held(row: Row) -> str:
    """All of them: encoder, connector, token table, adapters, and the LLM where it is there."""
    held = [found["client_parameters"] for found in row.by_seed.values() if found.get("client_parameters")]
    return f"{statistics.fmean(held) / 1e6:,.2f}" if held else "–"


def _mean_of(row: Row, key: str) -> float:
    return statistics.fmean(found[key] for found in row.by_seed.values())


def _stages(row: Row, key: str) -> float:
    return statistics.fmean(
        sum(stage[key] for stage in found.get("stages", {}).values()) for found in row.by_seed.values()
    )


def _megabytes(count: float) -> str:
    return f"{count / 1e6:,.1f}" if count else "0"


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
    first: dict[tuple[str, str], Row] = {}
    for row in arms:
        other = first.setdefault((row.data, _named(row.label)[1]), row)
        mine, theirs = row.scored_on, other.scored_on
        if differ := _differing(theirs, mine):
            key = differ[0]
            raise ValueError(
                f"{other.label} and {row.label} are both on {row.data} and differ in {key}: {theirs.get(key)!r} and "
                f"{mine.get(key)!r}; compare them apart, or set data=... to call them by different names"
            )


def _agreed(folders: Sequence[Path]) -> Mapping[str, Any]:
    """What the runs of a row were asked. Raises ValueError where they differ in more than their seed."""
    seed, first = _settings(folders[0])
    for folder in folders[1:]:
        own, other = _settings(folder)
        if differ := [
            key
            for key in _differing(first, other)
            if not (key.endswith(".seed") and (first.get(key), other.get(key)) == (seed, own))  # as a rule's
        ]:
            key = differ[0]
            raise ValueError(
                f"{folders[0]} and {folder} have one label and differ in {key}: {first.get(key)!r} and "
                f"{other.get(key)!r}; set label=... to tell them apart"
            )
    return first


def _differing(first: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    return sorted(key for key in first.keys() | other.keys() if first.get(key) != other.get(key))


def _settings(folder: Path) -> tuple[int, dict[str, Any]]:
    """A run's seed, and its other settings by path."""
    cfg: Any = OmegaConf.load(folder / "config.yaml")
    return cfg.seed, {key: value for key, value in what(cfg).items() if key not in ("seed", "compare")}
