"""Progress of a run while it goes on, from the events in its folder: in this process, another one, or beside Flower.

On a terminal a live display; into a pipe or a log one plain line per round. Bytes are told apart by wire: the link,
which carries tensors, and Flower's control plane, which says who works.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from fedmm.config.derived import per_round
from fedmm.results import intervals, table
from fedmm.runs import events, records, summary
from fedmm.runs.events import Event, Logged, Tail
from fedmm.runs.folder import read_config, read_rows
from fedmm.shown import one_line

POLL_SECONDS = 0.25
GAP = 3  # characters between two columns of the last table


def watch(
    run: Path,
    *,
    until: Callable[[], bool] | None = None,
    console: Console | None = None,
    stall_seconds: float = 600.0,  # longer than one client's part in a round takes
) -> int:
    """Show the run in folder `run` until it ends: 0 where it finished, 1 where it failed, was left, or went silent.

    `until` tells that the process behind the run is gone. While it says no, an end that was there before the watcher is
    taken for that of an earlier attempt. Without `until` nobody can know, and such an end counts at once.
    """
    console = console or Console()
    state = _Watched(Path(run))
    show = _Live(console) if console.is_terminal else _Lines(console)
    with show:
        why = _follow(state, show, until, stall_seconds)
    return _close(state, why, console)


def _follow(state: _Watched, show: _Live | _Lines, until: Callable[[], bool] | None, stall_seconds: float) -> str:
    """Show events as they come; returns "" where the last is an end, else why there is none."""
    began, last_news = time.time(), time.monotonic()
    while True:
        gone = until() if until else False  # asked before reading: what it wrote before it went is then seen
        news = False
        for arm, event in state.read():
            news = True
            show.event(state, arm, event)
        show.tick(state)
        if news:
            last_news = time.monotonic()
        silent = time.monotonic() - last_news > stall_seconds
        if state.end and (gone or silent or until is None or state.end.time >= began):
            return ""
        if gone:
            return f"the run is gone before it finished{_where(state)}"
        if silent:
            return (
                f"nothing has happened for {_duration(stall_seconds)}{_where(state)}; its process may hang or be gone"
            )
        time.sleep(min(POLL_SECONDS, stall_seconds))


def _close(state: _Watched, why: str, console: Console) -> int:
    """The last words: what went wrong, the table of the arms that finished, the path of the report."""
    end = state.end.event if state.end and not why else None
    if state.end and isinstance(end, events.RunFailed):
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(state.end.time))
        why = f"the run failed at {when}: {end.error}"
    if summary.arm_folders(state.run):
        console.print(_arms_table(state.run, console.width))
    if why:
        if any((state.run / "checkpoints").glob("*.safetensors")):
            _say(console, f"the same command with run.dir={state.run} goes on from the last whole round")
        _say(console, why, "bold red")
        return 1
    assert isinstance(end, events.RunFinished)
    _say(console, end.report or str(state.run / "report.html"))
    return 0


# ---- what the events have told ------------------------------------------------------------------------------------


@dataclass
class _Arm:
    """Where one arm stands. `round` is the last whole one; `scores` are (right, count) by client of state `scored`."""

    label: str
    rounds: int = 0
    expected: int = 0  # clients in a round
    round: int = 0
    finished: bool = False
    done: set[int] = field(default_factory=set)
    losses: dict[int, float] = field(default_factory=dict)
    lost: int = 0
    loss: float | None = None
    scored: int = 0
    scores: dict[int, tuple[int, int]] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)
    moved: tuple[int, int, int, int] = (0, 0, 0, 0)  # bytes: link up, link down, control up, control down

    @property
    def accuracy(self) -> float | None:
        """Mean over the clients scored so far of accuracy on their own test examples."""
        shares = [right / count for right, count in self.scores.values() if count]
        return statistics.fmean(shares) if shares else None

    def advance(self, event: Event, folder: Path) -> None:
        """Take in an event of this arm, whose files are in `folder`."""
        match event:
            case events.UpdateArrived(client=client, loss=loss):
                self.done.add(client)
                if loss is not None:
                    self.losses[client] = loss
                    self.loss = statistics.fmean(self.losses.values())
            case events.ClientScored():
                if event.round != self.scored:
                    self.scored, self.scores = event.round, {}
                self.scores[event.client] = (event.right, event.count)
            case events.BytesCounted(round=round):
                self.moved = _moved(folder, round)
            case events.RoundEnded():
                self.round, self.loss, self.lost = event.round, event.loss, len(event.lost)
                self.done, self.losses = set(), {}
                self.seconds.append(event.seconds)
            case events.ArmFinished():
                self.finished = True


class _Watched:
    """The run as its files have told it so far. Files that do not exist yet are asked for again each time."""

    def __init__(self, run: Path) -> None:
        self.run = run
        self.labels: list[str] = []  # of all arms, the main one first
        self.arms: dict[Path, _Arm] = {}  # by folder, in the order in which they began
        self.end: Logged | None = None  # of which the event is RunFinished or RunFailed
        self.stage = ""  # what the server does by itself, while it does
        self._tails: dict[Path, Tail] = {}

    def read(self) -> Iterator[tuple[_Arm | None, Event]]:
        """The new events in the order of their time, each applied as it is given, with the arm that it belongs to."""
        news: list[tuple[Path, Logged]] = []
        for folder in (self.run, *sorted((self.run / "arms").glob("*"))):
            tail = self._tails.setdefault(folder, Tail(folder))
            news += [(folder, logged) for logged in tail.read()]
        for folder, logged in sorted(news, key=lambda entry: entry[1].time):
            yield self._apply(folder, logged), logged.event

    def _apply(self, folder: Path, logged: Logged) -> _Arm | None:
        """Take the event in; returns the arm that it belongs to."""
        self.stage = ""
        match logged.event:
            case events.StageProgress(label=label, says=says):
                self.stage = f"{label}: {says}"
            case events.RunFinished() | events.RunFailed():
                self.end = logged
            case events.RunBegan(arms=labels):
                self.end, self.labels = None, list(labels)
                for arm in self.arms.values():
                    arm.done, arm.losses = set(), {}
            case events.ArmBegan(label=label, rounds=rounds, start=start):
                self.arms[folder] = _Arm(label, rounds, per_round(read_config(folder)), start)
                self.arms[folder].moved = _moved(folder, start)
            case event if folder in self.arms:
                self.arms[folder].advance(event, folder)
        return self.arms.get(folder)

    @property
    def current(self) -> _Arm | None:
        """The arm that began last and has not finished."""
        return next((arm for arm in reversed(self.arms.values()) if not arm.finished), None)

    @property
    def left_seconds(self) -> float | None:
        """Time the remaining rounds of all arms take at the mean of those seen; None before the first."""
        every = [seconds for arm in self.arms.values() for seconds in arm.seconds]
        if not every:
            return None
        left = 0.0
        for arm in self.arms.values():
            left += 0.0 if arm.finished else (arm.rounds - arm.round) * statistics.fmean(arm.seconds or every)
        unknown = max(0, len(self.labels) - len(self.arms) - self._finished_before())
        rounds = max(arm.rounds for arm in self.arms.values())
        return left + unknown * rounds * statistics.fmean(every)

    def _finished_before(self) -> int:
        """Arms that an earlier attempt finished, of which this watcher has seen no event."""
        return sum(folder not in self.arms for folder in summary.arm_folders(self.run))


def _moved(folder: Path, last: int) -> tuple[int, int, int, int]:
    """Bytes to round `last`: link up and down, Flower's up and down. Read whole, as a resume rewrites the ledger."""
    sums = [0, 0, 0, 0]
    for row in read_rows(folder / "ledger.jsonl"):
        if row["kind"] == "bytes" and row["round"] <= last:
            at = 2 if row["channel"] == "control" else 0
            sums[at] += row["up_bytes"]
            sums[at + 1] += row["down_bytes"]
    return sums[0], sums[1], sums[2], sums[3]


# ---- showing it ---------------------------------------------------------------------------------------------------


class _Lines:
    """One plain line per round, for pipes and logs."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: object) -> None:
        return None

    def event(self, state: _Watched, arm: _Arm | None, event: Event) -> None:
        match event:
            case events.RunBegan():
                _say(self._console, f"run: {', '.join(state.labels)}")
            case events.StageProgress():
                _say(self._console, state.stage)
            case events.RoundEnded() if arm:
                _say(self._console, _round_line(state, arm))
            case events.ArmFinished() if arm:
                _say(self._console, f"{_name(state, arm)} finished: {_accuracy(arm)}")

    def tick(self, state: _Watched) -> None:
        """Nothing moves between rounds."""


class _Live:
    """A table of the arms that redraws itself in place."""

    def __init__(self, console: Console) -> None:
        self._live = Live(console=console, auto_refresh=False, transient=True)

    def __enter__(self) -> None:
        self._live.start()

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def event(self, state: _Watched, arm: _Arm | None, event: Event) -> None:
        """The next tick shows it."""

    def tick(self, state: _Watched) -> None:
        self._live.update(_panel(state), refresh=True)


def _panel(state: _Watched) -> Group | Text:
    if not state.labels:
        return Text(f"waiting for {state.run}", style="dim")
    seen = {arm.label: arm for arm in state.arms.values()}
    grid = Table.grid(padding=(0, 1))
    for label in state.labels:
        arm = seen.get(label)
        grid.add_row(*(_row(arm, arm is state.current) if arm else (" ", Text(label, style="dim"))))
    return Group(grid, _below(state))


def _below(state: _Watched) -> Text:
    if state.stage:
        return Text(f"  {state.stage}", style="dim")
    return _wires(state) if state.arms else Text("waiting for the clients and the LLM", style="dim")


def _row(arm: _Arm, current: bool) -> tuple[Any, ...]:
    mark = Text("✓", style="green") if arm.finished else Text("▸" if current else " ", style="bold cyan")
    words = _accuracy(arm)
    if current and arm.round < arm.rounds:
        words = f"clients {len(arm.done)}/{arm.expected}  {_loss(arm)}  {words}"
    bar = ProgressBar(max(1, arm.rounds), arm.rounds if arm.finished else arm.round, width=14)
    return mark, Text(arm.label, style="bold" if current else ""), bar, Text(f"{arm.round}/{arm.rounds}"), Text(words)


def _wires(state: _Watched) -> Text:
    arm = state.current or [*state.arms.values()][-1]
    left = state.left_seconds
    if state.current is None and len(state.arms) == len(state.labels):
        return Text("  all arms done; writing the report", style="dim")
    return Text(f"  {_bytes(arm)}" + (f"  ·  about {_duration(left)} left" if left and left >= 1 else ""), style="dim")


def _round_line(state: _Watched, arm: _Arm) -> str:
    left = state.left_seconds
    parts = [
        f"{_name(state, arm)} round {arm.round}/{arm.rounds}",
        _loss(arm),
        _accuracy(arm),
        _bytes(arm),
        f"{arm.seconds[-1]:.1f} s",
        f"{arm.lost} lost" if arm.lost else "",
        f"about {_duration(left)} left" if left and left >= 1 else "",
    ]
    return "  ".join(part for part in parts if part)


def _name(state: _Watched, arm: _Arm) -> str:
    at = state.labels.index(arm.label) + 1 if arm.label in state.labels else 1
    return f"[{at}/{max(1, len(state.labels))}] {arm.label}"


def _loss(arm: _Arm) -> str:
    return "" if arm.loss is None else f"loss {arm.loss:.3f}"


def _accuracy(arm: _Arm) -> str:
    """The state after round r is scored in round r + 1, so the words say which round the figure is of."""
    if arm.accuracy is None:
        return ""
    return f"test {100 * arm.accuracy:.1f}% " + (f"after round {arm.scored}" if arm.scored else "at the start")


def _bytes(arm: _Arm) -> str:
    up, down, control_up, control_down = map(_size, arm.moved)
    return f"link {up} up {down} down, Flower {control_up} up {control_down} down"


def _size(count: int) -> str:
    if count < 1e6:
        return f"{count / 1e3:.1f} kB"
    return f"{count / 1e6:.1f} MB" if count < 1e9 else f"{count / 1e9:.2f} GB"


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def _where(state: _Watched) -> str:
    arm = state.current
    return f" (in {arm.label}, after round {arm.round} of {arm.rounds})" if arm else f" (looked in {state.run})"


def _arms_table(run: Path, width: int) -> Table:
    """What fits into so many characters, without a word broken; the report has the rest."""
    rows = intervals.rows(map(records.of_arm, summary.arm_folders(run)))
    shown = table.short_columns(rows)
    cells = table.cells(rows, shown)
    under = [(column.heading, *of) for column, *of in zip(shown, *cells, strict=True)]
    widths = [max(map(len, texts)) for texts in under]
    if sum(widths) + GAP * len(widths) > width:  # headings in several lines
        widths = [max(len(word) for word in (*heading.split(), *of)) for heading, *of in under]
    while len(widths) > 2 and sum(widths) + GAP * len(widths) > width:
        widths.pop()
    out = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for i, own in enumerate(widths):
        out.add_column(shown[i].heading, justify="right" if i else "left", width=own)
    for line in cells:
        out.add_row(*map(Text, line[: len(widths)]))
    return out


def _say(console: Console, text: str, style: str = "") -> None:
    """One line as it is: labels and errors are no markup and move no cursor, and a path is not broken."""
    console.print(Text(one_line(text, limit=None), style=style), soft_wrap=True)
