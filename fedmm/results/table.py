"""Rows of evidence as a table: columns, each with a heading, what stands under it, and how it is to be read."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from fedmm.evaluate.groups import GROUPS
from fedmm.results.intervals import LOCAL, STARTS, Row, against, differences, interval, mean, named, partner

MOST_CLIENTS = 12  # that a table by client shows
ONE_SEED = "¹"
ONCE = ("edge", "features")  # channels: once a machine, once a sample and run; of a run's arms the first pays for all
SCORING = "answers"  # channel: no cost of an arm, a personal one is scored everywhere
_APART = "of all rounds; what goes once (features, frozen modules) and scoring apart"


@dataclass(frozen=True)
class Column:
    """A heading and what stands under it; `cell` is given the row and the rows of the same data by label. `meaning`,
    where the heading does not say it."""

    heading: str
    cell: Callable[[Row, Mapping[str, Row]], str]
    meaning: str = ""


def short_columns(table_of: Sequence[Row]) -> tuple[Column, ...]:
    """What a run's own report and the watcher show of these rows."""
    return (
        *_accuracy_columns(table_of),
        Column("link MB up", lambda row, others: _megabytes(row.moved_bytes(_on_link, [0])), _APART),
        Column("link MB down", lambda row, others: _megabytes(row.moved_bytes(_on_link, [1]))),
        *_stage_columns(table_of)[:1],
        Column("seconds", lambda row, others: f"{_mean_of(row, 'seconds'):.0f}"),
    )


def columns(requested: str | None, table_of: Sequence[Row]) -> tuple[Column, ...]:
    """What a comparison of these rows shows; `requested` as in `against`. Raises ValueError where it is no arm."""
    chosen = against([row.label for row in table_of], requested)
    return (
        *_accuracy_columns(table_of),
        *_budget_columns(table_of),
        Column(
            "spread",
            lambda row, others: _percent(row, row.over_clients(statistics.pstdev).values()),
            "standard deviation of own accuracy over clients",
        ),
        _gap_column(chosen),
        *_local_columns(table_of, chosen),
        *_product_columns(table_of),
        *_lost_columns(table_of),
        Column("link MB", lambda row, others: _megabytes(row.moved_bytes(_on_link)), _APART),
        _channel_column("features MB", "features", "of trained and of scored images"),
        _channel_column("scoring MB", SCORING, "where models are personal, each client is scored on everybody's part"),
        Column("Flower kB", lambda row, others: f"{row.moved_bytes(lambda name: name == 'control') / 1e3:,.0f}"),
        Column("M parameters a client holds", lambda row, others: _held(row)),
        *_stage_columns(table_of),
        Column(
            "LLM samples",
            lambda row, others: f"{_mean_of(row, 'llm_samples'):,.0f}",
            "through the frozen LLM, once for each branch of a step, a backward not counted apart, scoring included",
        ),
        Column(
            "seconds",
            lambda row, others: f"{_mean_of(row, 'seconds'):.0f}",
            "beside as many other runs as there are cores, so no cost of an arm to compare closely",
        ),
        Column("seeds", lambda row, others: str(len(row.by_seed)) if len(row.by_seed) > 1 else f"1 {ONE_SEED}"),
    )


def _accuracy_columns(table_of: Sequence[Row]) -> tuple[Column, ...]:
    """Who the row is of, and how right it is on whose questions."""
    split = _split(table_of)
    return (
        Column("arm", lambda row, others: row.label),
        Column(
            "global accuracy %",
            lambda row, others: _percent(row, row.overall().values()),
            f"on everybody's {split} questions",
        ),
        Column(
            f"own {split} %",
            lambda row, others: _percent(row, row.mean_accuracy().values()),
            "each client on its own part, their mean",
        ),
        Column("worst client %", lambda row, others: _percent(row, row.over_clients(min).values())),
        *_group_columns(table_of),
    )


def _split(table_of: Sequence[Row]) -> str:
    """What they were scored on, where it is the same for all: test, validation."""
    splits = {row.settings.get("evaluate.split", "test") for row in table_of if row.settings} or {"test"}
    return splits.pop() if len(splits) == 1 else "part"


def _group_columns(table_of: Sequence[Row]) -> tuple[Column, ...]:
    """Many, medium and few classes, where some row has them."""
    return tuple(
        Column(f"{name} %", lambda row, others, name=name: _percent(row, row.group(name).values()))  # type: ignore[misc]
        for name in GROUPS
        if any(row.group(name) for row in table_of)
    )


def _budget_columns(table_of: Sequence[Row]) -> tuple[Column, ...]:
    """What the arms were given, where it is not the same for all."""
    if len({row.budget for row in table_of if row.label not in STARTS}) < 2:
        return ()
    return (Column("rounds x epochs x batch", lambda row, others: row.budget if row.settings else "–"),)


def _channel_column(heading: str, channel: str, meaning: str) -> Column:
    return Column(heading, lambda row, others: _megabytes(row.moved_bytes(lambda name: name == channel)), meaning)


def _gap_column(label: str) -> Column:
    return Column(f"own - {label}", lambda row, others: _gap(row, partner(row, others, label)))


def _local_columns(table_of: Sequence[Row], chosen: str) -> tuple[Column, ...]:
    """Whether it pays to join, where some row is alone."""
    if not any(named(row.label)[0] == LOCAL for row in table_of):
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
            lambda row, others: _percent(row, row.product_error().values()),
            "of the adapters' merged products B A against the mean of the clients', without those that send garbage, "
            "relative to it, over rounds; none where clients keep one of the two to themselves, or are too many for it",
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


def by_client(table_of: Sequence[Row]) -> str:
    """By how many points each client is better served than alone; empty where nobody is alone. Where a seed deals the
    data out anew, client 0 of one seed is not that of another, and there is nothing to average."""
    gains: list[tuple[Row, dict[str, list[float]]]] = []
    for row in table_of:
        alone = partner(row, _beside(row, table_of), LOCAL)
        if alone is not None and row.label not in STARTS and row.same_clients:
            gains.append((row, _by_client(differences(row, alone))))
    gains = [(row, gained) for row, gained in gains if 0 < len(gained) <= MOST_CLIENTS]
    clients = sorted({client for _, gained in gains for client in gained}, key=int)
    lines = ["| data | arm |" + "".join(f" client {c} |" for c in clients), "| --- | --- |" + " ---: |" * len(clients)]
    for row, gained in gains:
        points = "".join(f" {_percent(row, gained.get(c, []), '+')} |" for c in clients)
        lines.append(f"| {row.data} | {row.label} |{points}")
    return "\n".join(lines) if gains else ""


def _by_client(by_seed: Mapping[int, Mapping[str, float]]) -> dict[str, list[float]]:
    """Differences by client, one a seed."""
    found: dict[str, list[float]] = defaultdict(list)
    for of_clients in by_seed.values():
        for client, difference in of_clients.items():
            found[client].append(difference)
    return found


def _beside(row: Row, table_of: Sequence[Row]) -> dict[str, Row]:
    """The rows of the same data, by label."""
    return {other.label: other for other in table_of if other.data == row.data}


def _gap(row: Row, other: Row | None) -> str:
    if other is None:
        return "–"
    gaps = [statistics.fmean(of_clients.values()) for of_clients in differences(row, other).values()]
    return _percent(row, gaps, "+")


def _better_off(row: Row, local: Row | None) -> str:
    """In how many cases, clients times seeds, the client is better served than alone."""
    if local is None:
        return "–"
    pays = [gain > 0 for of_clients in differences(row, local).values() for gain in of_clients.values()]
    return f"{sum(pays)} of {len(pays)}" if pays else "–"


def _on_link(channel: str) -> bool:
    return channel not in (*ONCE, SCORING, "control")


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


def _percent(row: Row, values: Collection[float], sign: str = "") -> str:
    """Mean and 95% interval in per cent of figures, one a seed; a dash where none was measured. Where not all of the
    row's seeds have one, how many do; a difference of one seed is marked too."""
    centre, half, count, seeds = mean(values), interval(values), len(values), len(row.by_seed)
    if centre is None:
        return "–"
    if half is None:
        return f"{100 * centre:{sign}.1f}" + (f" {ONE_SEED}" if sign or seeds > 1 else "")
    return f"{100 * centre:{sign}.1f} ± {100 * half:.1f}" + (f" ({count} seeds)" if count < seeds else "")
