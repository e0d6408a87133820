"""Figures of runs, from the files of their folders alone; the only file of the runs that imports matplotlib.

A figure is drawn once, in the colours of a light page. `png` keeps them; `svg` turns each into a CSS variable
(`--ink`, `--series-1`), so that the same drawing follows the page into the dark. Arms differ in colour and in marker.
"""

from __future__ import annotations

import functools
import io
import json
import math
import re
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any, Literal

import matplotlib
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fedmm.results import intervals
from fedmm.runs import summary

WIDE, NARROW = 8.6, 4.6  # inches: a page and a phone, on which text of one size is read well
PANELS = 12  # clients shown one by one; beyond it their spread is
MARKERS = ("o", "s", "^", "D", "v", "P")

COLOURS = {  # Okabe and Ito's hues, darkened to 4.5:1 on white; in the dark their bright selves
    "ink": ("#1c2430", "#e8ebf0"),
    "muted": ("#5a6675", "#a3adba"),
    "line": ("#d5dae1", "#39424e"),
    "series-1": ("#0069a6", "#56b4e9"),
    "series-2": ("#c24e00", "#ff8f52"),
    "series-3": ("#007d5a", "#35c79c"),
    "series-4": ("#a8437f", "#e795c6"),
    "series-5": ("#8a6100", "#e3b341"),
    "series-6": ("#4b5b8c", "#a9b7ea"),
}
"""Name: colour on a light page, on a dark one."""


@dataclass(frozen=True)
class Curve:
    """Accuracy of an arm by round, from 0 to 1; `everybody` tells whose test examples: all, or each client's own."""

    label: str
    rounds: tuple[int, ...]
    values: tuple[float, ...]
    everybody: bool


def curve(folder: Path) -> Curve:
    """Global accuracy where every scored round has it, else the mean of each client's own; never a mix of both."""
    label = json.loads((folder / "summary.json").read_text())["label"]
    found = summary.scores(folder)
    overall = {round: score["global"] for round, score in found.items() if score["global"] is not None}
    if overall.keys() == found.keys():
        return Curve(label, tuple(overall), tuple(overall.values()), True)
    own = {round: statistics.fmean(score["own"].values()) for round, score in found.items() if score["own"]}
    return Curve(label, tuple(own), tuple(own.values()), False)


def by_client(folder: Path) -> dict[int, dict[int, float]]:
    """Each client's accuracy on its own test examples by round, of one arm."""
    found: dict[int, dict[int, float]] = {}
    for round, score in summary.scores(folder).items():
        for client, value in score["own"].items():
            found.setdefault(client, {})[round] = value
    return found


def figures(run: Path) -> dict[str, Callable[[float], Figure]]:
    """What there is to draw of a run, by name, each a function of the width in inches; empty before an arm finished."""
    folders = summary.arm_folders(run)
    if not folders:
        return {}
    moved = json.loads((folders[0] / "summary.json").read_text())["bytes"]
    return {
        "accuracy_by_round": functools.partial(accuracy_by_round, [curve(folder) for folder in folders]),
        "accuracy_by_client": functools.partial(accuracy_by_client, by_client(folders[0])),
        "bytes_by_channel": functools.partial(bytes_by_channel, moved),
    }


def accuracy_by_round(curves: Sequence[Curve], width: float = WIDE) -> Figure:
    """One line per arm, their start as a dashed level."""
    curves = [arm for arm in curves if arm.rounds]
    figure, (axes,) = _panels(width, 3.7, 1, 1)
    named: list[tuple[str, float, str]] = []
    for i, arm in enumerate(curves):
        colour = _series(i)
        style: dict[str, Any] = {
            "marker": MARKERS[i % len(MARKERS)],
            "markersize": 5,
            "linewidth": 2.4 if i == 0 else 1.6,
        }
        axes.plot(arm.rounds, arm.values, color=colour, zorder=9 - i, clip_on=False, **style)
        star = "" if arm.everybody else "*"
        named.append((f"{_short(arm.label)}{star}  {100 * arm.values[-1]:.1f}", arm.values[-1], colour))
    if start := [arm.values[0] for arm in curves if arm.rounds[0] == 0]:
        axes.axhline(start[0], color=_light("muted"), linewidth=1.2, linestyle=(0, (4, 3)), zorder=1)
        named.append((f"at the start  {100 * start[0]:.1f}", start[0], _light("muted")))
    _rounds_axis(axes, [round for arm in curves for round in arm.rounds])
    _percent_axis(axes, [value for arm in curves for value in arm.values])
    right = width - 0.085 * max((len(text) for text, _, _ in named), default=0) - 0.15
    figure.subplots_adjust(left=0.5 / width, right=right / width, top=0.97, bottom=0.47 / 3.7)
    _name_ends(axes, named)
    return figure


def accuracy_by_client(accuracy: Mapping[int, Mapping[int, float]], width: float = WIDE) -> Figure:
    """Client: round: accuracy. A panel per client with the others behind it; beyond PANELS clients, their spread."""
    return _spread(accuracy, width) if len(accuracy) > PANELS else _small_multiples(accuracy, width)


def bytes_by_channel(moved: Mapping[str, Sequence[int]], width: float = WIDE) -> Figure:
    """Channel: bytes up and down. Dots, as bars have no zero on a logarithm."""
    channels = sorted(moved.items(), key=lambda item: sum(item[1]))
    columns = 2 if width > NARROW else 1
    height = (0.32 * len(channels) + 0.75) * (2 // columns)
    figure, panels = _panels(width, height, 2 // columns, columns)
    largest = max((value for _, both in channels for value in both), default=1)
    for i, (axes, direction) in enumerate(
        zip(panels, ("up: clients to server", "down: server to clients"), strict=True)
    ):
        _dots(axes, [(channel, both[i]) for channel, both in channels], _series(i), largest)
        axes.set_title(direction, loc="left", fontsize=10, color=_light("ink"), fontweight="bold")
        if i and columns == 2:
            axes.set_yticklabels([])
    top, bottom = 1 - 0.3 / height, 0.38 / height
    figure.subplots_adjust(left=0.8 / width, right=1 - 0.3 / width, top=top, bottom=bottom, wspace=0.1, hspace=0.5)
    return figure


def comparison(rows: Sequence[intervals.Row], width: float = WIDE) -> Figure:
    """Arms beside each other, a panel for each kind of data: mean and 95% interval, and every seed as a small dot."""
    names = list(dict.fromkeys(row.data for row in rows))
    by_name = [[row for row in rows if row.data == name] for name in names]
    inches = [0.34 * len(chosen) for chosen in by_name]
    above, between, below = 0.62, 0.66, 0.3  # inches: legend and first title; axis and title; the last axis
    height = above + sum(inches) + between * (len(names) - 1) + below
    figure = Figure(figsize=(width, height))
    grid = figure.add_gridspec(len(names), 1, height_ratios=inches)
    both = [_own_and_global(row) for row in rows]
    shares = [end for pair in both for values in pair for end in _ends(values)]
    low, high = min(shares, default=0.0) - 0.03, max(shares, default=1.0) + 0.03
    for i, (name, chosen) in enumerate(zip(names, by_name, strict=True)):
        axes = figure.add_subplot(grid[i])
        _bare(axes, "x")
        axes.set_xlim(max(0.0, low), min(1.0, high))
        axes.set_ylim(-0.6, len(chosen) - 0.4)
        axes.set_yticks(range(len(chosen)), [_short(row.label, 34) for row in chosen])
        axes.tick_params(axis="y", labelcolor=_light("ink"))
        axes.xaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{100 * value:.0f}%"))
        axes.set_title(name, loc="left", fontsize=10, color=_light("ink"), fontweight="bold")
        for y, row in enumerate(chosen):
            for series, (values, offset) in enumerate(zip(_own_and_global(row), (0.13, -0.13), strict=True)):
                _with_interval(axes, list(values), y + offset, series)
        if i == 0:
            for series, word in enumerate(("own test part", "everybody's")):
                axes.plot([], [], marker=MARKERS[series], linestyle="none", color=_series(series), label=word)
            axes.plot([], [], marker=".", markersize=4, linestyle="none", color=_light("muted"), label="a seed")
            place: dict[str, Any] = {"loc": "upper right", "bbox_to_anchor": (1.0, 1.0), "borderaxespad": 0.4}
            place["bbox_transform"] = figure.transFigure
            axes.legend(**place, ncols=3, frameon=False, fontsize=9.5, handletextpad=0.2, labelcolor=_light("ink"))
    left = 0.085 * max((len(_short(row.label, 34)) for row in rows), default=4) + 0.25
    margins = {"left": left / width, "right": 1 - 0.2 / width, "top": 1 - above / height, "bottom": below / height}
    figure.subplots_adjust(**margins, hspace=between * len(inches) / max(sum(inches), 0.34))
    return figure


def png(figure: Figure) -> bytes:
    """The figure on white, for files and slides."""
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=200, facecolor="white", metadata={"Software": None})
    return out.getvalue()


def svg(figure: Figure, title: str) -> str:
    """The figure as an element of a page that defines the variables of COLOURS; the same bytes for the same figure.

    Fonts are the page's, and nothing in it refers outside. For a moment this sets matplotlib's process-wide settings.
    """
    out = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "fedmm"}):
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    text = out.getvalue()
    box = re.search(r'viewBox="([^"]*)"', text)
    assert box
    body = text[text.index("<defs>") : text.rindex("</svg>")]
    body = re.sub(r'<g id="[^"]*"', "<g", body)  # several figures share a page, and no id may stand there twice
    for name, (light, _) in COLOURS.items():
        body = body.replace(light, f"var(--{name})")
    return f'<svg viewBox="{box[1]}" role="img" aria-label="{escape(title)}">{body}</svg>'


def readable_bytes(count: float) -> str:
    """Decimal units, three digits: 27.7 GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 999.5:
            digits = 0 if unit == "B" or count >= 99.95 else 1 if count >= 9.995 else 2
            return f"{count:.{digits}f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"


# ---- the two forms of accuracy by client --------------------------------------------------------------------------


def _small_multiples(accuracy: Mapping[int, Mapping[int, float]], width: float) -> Figure:
    columns = min(max(1, len(accuracy)), 5 if width > NARROW else 3)
    rows = max(1, math.ceil(len(accuracy) / columns))
    height = 1.55 * rows + 0.25
    figure, panels = _panels(width, height, rows, columns)
    everything = [value for values in accuracy.values() for value in values.values()]
    for i, (axes, client) in enumerate(zip(panels, sorted(accuracy), strict=False)):
        for other in accuracy.values():
            axes.plot(list(other), list(other.values()), color=_light("line"), linewidth=1, zorder=1)
        own = accuracy[client]
        ends = [*own][-1]
        axes.plot(list(own), list(own.values()), color=_series(0), linewidth=2, zorder=3)
        axes.plot([ends], [own[ends]], color=_series(0), marker="o", markersize=4.5, zorder=4, clip_on=False)
        axes.axhline(own[min(own)], color=_light("muted"), linewidth=1, linestyle=(0, (4, 3)), zorder=2)
        _rounds_axis(axes, list(own), "round" if i == 0 else "")
        _percent_axis(axes, everything, ticks=3)
        axes.set_title(f"client {client}", loc="left", fontsize=10, color=_light("ink"))
        axes.set_title(f"{100 * own[ends]:.0f}", loc="right", fontsize=10, color=_series(0), fontweight="bold")
        if i % columns:
            axes.set_yticklabels([])
    for axes in panels[len(accuracy) :]:
        axes.set_visible(False)
    margins = {"left": 0.5 / width, "right": 1 - 0.12 / width, "top": 1 - 0.3 / height, "bottom": 0.47 / height}
    figure.subplots_adjust(**margins, wspace=0.18, hspace=0.62)
    return figure


def _spread(accuracy: Mapping[int, Mapping[int, float]], width: float) -> Figure:
    """Median, middle half and full range over the clients that were scored in a round."""
    figure, (axes,) = _panels(width, 3.4, 1, 1)
    rounds = sorted({round for values in accuracy.values() for round in values})
    found = [sorted(values[round] for values in accuracy.values() if round in values) for round in rounds]
    worst, best = [values[0] for values in found], [values[-1] for values in found]
    quarters = [[values[round(q * (len(values) - 1))] for values in found] for q in (0.25, 0.5, 0.75)]
    axes.fill_between(rounds, worst, best, color=_series(0), alpha=0.15, linewidth=0)
    axes.fill_between(rounds, quarters[0], quarters[2], color=_series(0), alpha=0.25, linewidth=0)
    axes.plot(rounds, quarters[1], color=_series(0), linewidth=2.4)
    _rounds_axis(axes, rounds)
    _percent_axis(axes, [*worst, *best])
    figure.subplots_adjust(left=0.5 / width, right=1 - 0.9 / width, top=0.97, bottom=0.47 / 3.4)
    names = zip(("worst", "median", "best"), (worst, quarters[1], best), strict=True)
    _name_ends(axes, [(f"{name}  {100 * values[-1]:.0f}", values[-1], _series(0)) for name, values in names])
    return figure


# ---- pieces -------------------------------------------------------------------------------------------------------


def _panels(width: float, height: float, rows: int, columns: int) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(width, height))
    panels = [figure.add_subplot(rows, columns, i + 1) for i in range(rows * columns)]
    for axes in panels:
        _bare(axes, "y")
    return figure, panels


def _bare(axes: Axes, grid: Literal["x", "y"]) -> None:
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(_light("line"))
    axes.tick_params(length=0, labelsize=9.5, labelcolor=_light("muted"))
    axes.grid(True, axis=grid, color=_light("line"), linewidth=0.7)
    axes.set_axisbelow(True)


def _own_and_global(row: intervals.Row) -> tuple[list[float], list[float]]:
    return list(row.mean_accuracy().values()), list(row.overall().values())


def _ends(values: Sequence[float]) -> list[float]:
    """How far a mean's interval and its seeds reach."""
    centre, half = intervals.mean(values), intervals.interval(values)
    return [*values, *([centre - half, centre + half] if centre is not None and half is not None else [])]


def _with_interval(axes: Axes, values: Sequence[float], y: float, series: int) -> None:
    """A marker at the mean, its interval as a line, the seeds as small dots."""
    if not values:
        return
    centre, half = statistics.fmean(values), intervals.interval(values)
    if half is not None:
        axes.plot([centre - half, centre + half], [y, y], color=_series(series), linewidth=1.6, alpha=0.75)
        axes.plot(values, [y] * len(values), marker=".", markersize=4, linestyle="none", color=_light("muted"))
    axes.plot([centre], [y], marker=MARKERS[series], markersize=6.5, color=_series(series))


def _rounds_axis(axes: Axes, rounds: Sequence[int], name: str = "round") -> None:
    last = max(rounds, default=0)
    axes.set_xlim(-0.02 * max(1, last), max(1, last))
    step = next(step for step in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, last + 1) if last <= 8 * step)
    narrow = _inches(axes)[0] < 2.5
    axes.set_xticks(sorted({0, last}) if narrow else [*range(0, last + 1, step)])
    axes.set_xlabel(name, fontsize=9.5, color=_light("muted"), loc="left")


def _percent_axis(axes: Axes, values: Sequence[float], ticks: int = 6) -> None:
    low = math.floor(10 * max(0.0, min(values, default=0.0) - 0.02)) / 10
    high = math.ceil(10 * min(1.0, max(values, default=1.0) + 0.02)) / 10
    axes.set_ylim(low, max(high, low + 0.1))
    axes.yaxis.set_major_locator(ticker.MaxNLocator(ticks, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{100 * value:.0f}%"))


def _name_ends(axes: Axes, named: Sequence[tuple[str, float, str]]) -> None:
    """Write the name of each line at its right end, moved apart where they would overlap."""
    low, high = axes.get_ylim()
    gap = 0.19 * (high - low) / _inches(axes)[1]
    order = sorted(named, key=lambda name: name[1])
    for (text, _, colour), y in zip(order, _apart([value for _, value, _ in order], gap), strict=True):
        place: dict[str, Any] = {
            "xy": (1, y),
            "xycoords": ("axes fraction", "data"),
            "xytext": (9, 0),
            "textcoords": "offset points",
        }
        axes.annotate(text, **place, va="center", fontsize=10, color=colour, annotation_clip=False, parse_math=False)


def _apart(rising: Sequence[float], gap: float) -> list[float]:
    """The nearest heights to these, by least squares, in which neighbours stand `gap` apart."""
    groups: list[tuple[float, int]] = []  # centre, members
    for value in rising:
        groups.append((value, 1))
        while len(groups) > 1 and groups[-1][0] - groups[-2][0] < gap * (groups[-1][1] + groups[-2][1]) / 2:
            (a, n), (b, m) = groups[-2:]
            groups[-2:] = [((a * n + b * m) / (n + m), n + m)]
    return list(_members(groups, gap))


def _members(groups: Sequence[tuple[float, int]], gap: float) -> Iterator[float]:
    for centre, members in groups:
        yield from (centre + gap * (i - (members - 1) / 2) for i in range(members))


def _dots(axes: Axes, rows: Sequence[tuple[str, int]], colour: str, largest: int) -> None:
    floor = 100
    axes.set_xscale("log")
    axes.set_xlim(floor, 30 * max(largest, 10 * floor))
    axes.set_ylim(-0.6, len(rows) - 0.4)
    axes.set_yticks(range(len(rows)), [channel for channel, _ in rows])
    axes.tick_params(axis="y", labelcolor=_light("ink"))
    axes.xaxis.set_major_locator(ticker.LogLocator(base=1000, numticks=9))
    axes.xaxis.set_minor_locator(ticker.NullLocator())
    axes.xaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: readable_bytes(value).replace(".00", "")))
    axes.grid(False)
    for y, (_, value) in enumerate(rows):
        at = max(value, floor)
        if value:
            axes.plot([floor, at], [y, y], color=_light("line"), linewidth=1)
            axes.plot([at], [y], marker="o", markersize=7, color=colour, clip_on=False)
        place: dict[str, Any] = {"xytext": (9 if value else 4, 0), "textcoords": "offset points", "va": "center"}
        shade = _light("ink" if value else "muted")
        axes.annotate(readable_bytes(value) if value else "none", (at, y), **place, fontsize=9.5, color=shade)


def _inches(axes: Axes) -> tuple[float, float]:
    box = axes.bbox.transformed(axes.figure.dpi_scale_trans.inverted())
    return box.width, box.height


def _series(i: int) -> str:
    return _light(f"series-{i % 6 + 1}")


def _light(name: str) -> str:
    return COLOURS[name][0]


def _short(label: str, most: int = 20) -> str:
    return label if len(label) <= most else label[: most - 1] + "…"
