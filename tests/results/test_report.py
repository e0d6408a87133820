"""The report, its figures and the watcher, on a small run folder written through the same API as a run."""

from __future__ import annotations

import dataclasses
import io
import json
import re
import threading
import time
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from PIL import Image
from rich.console import Console

from fedmm import cli
from fedmm.config import composition
from fedmm.evaluate.answers import Answer
from fedmm.federation import build
from fedmm.results import intervals, plots, progress, report, table
from fedmm.results.progress import watch
from fedmm.runs import events, records, summary
from fedmm.runs.folder import RunFolder

ROUNDS, CLIENTS = 3, 2
SMALL = ["rounds=3", "clients=2", "partition=iid", "dataset.train=8", "dataset.validation=4", "dataset.test=16"]
CARD = {"edge_parameters": 400_000, "model_parameters": 1_000_000}
RIGHT = {"FedNano": (2, 4, 5, 6), "FedAvg": (2, 3, 3, 5)}  # of 8 at each client, after each round


def write_arm(folder: RunFolder, label: str, rounds: int = ROUNDS) -> RunFolder:
    """The rows and events of one arm as the round loop writes them, without a summary."""
    folder.log(events.ArmBegan(label, ROUNDS, CLIENTS, start=0, card=CARD))
    for round in range(rounds + 1):
        for client in range(CLIENTS):
            right = RIGHT[label][round] - client
            folder.append("scores.jsonl", round=round, client=client, part=client, right=right, count=8)
            folder.log(events.ClientScored(round, client, right, count=8))
            for channel, up, down in (
                ("steps", 2_000_000, 1_000_000),
                ("adapters", 5_000, 5_000),
                ("control", 300, 700),
            ):
                folder.append("ledger.jsonl", kind="bytes", round=round + 1, client=client, channel=channel,
                              up_bytes=up, down_bytes=down, frames=2, llm_seconds=0.1, llm_samples=8)  # fmt: skip
            times = {
                "seconds": 3.0,
                "start_seconds": 0.5,
                "score_seconds": 0.5,
                "train_seconds": 2.0,
                "link_seconds": 1.0,
            }
            folder.append("ledger.jsonl", kind="client", round=round + 1, client=client, **times, fisher_seconds=0.0,
                          peak_rss_bytes=1e9, edge_parameters=4e5, trained_parameters=1e4)  # fmt: skip
            if round < rounds:
                folder.log(events.UpdateArrived(round + 1, client, loss=1.5))
        folder.log(events.BytesCounted(round + 1))
        if round < rounds:
            lost = {"1": "<i>late</i>"} if round == 1 else {}
            folder.append("rounds.jsonl", round=round + 1, clients=[0, 1], lost=lost,
                          examples={"0": 4, "1": 4}, loss={"0": 1.5}, state="ab12",
                          product_error={"shared.text": 0.01 * round, "shared.image": 0.02 * round})  # fmt: skip
            folder.log(events.RoundEnded(round + 1, loss=1.5, seconds=0.2))
    return folder


def open_run(path: Path, *overrides: str) -> tuple[RunFolder, RunFolder]:
    asked = [*SMALL, *overrides, "compare=[fedavg]", f"run.dir={path}"]
    (_, _), (name, arm) = composition.arms(composition.load(asked), asked)
    main = RunFolder(path, OmegaConf.to_yaml(composition.load(asked)), asked)
    main.log(events.RunBegan(["FedNano", "FedAvg"], str(path)))
    return main, RunFolder(path / "arms" / name, OmegaConf.to_yaml(composition.load(arm)), arm)


def write_run(path: Path, *overrides: str) -> Path:
    """Two arms of three rounds, with answers to every test example before and after."""
    main, other = open_run(path, *overrides)
    cfg = composition.load([*SMALL, *overrides])
    examples = build.splits(cfg)["test"]
    for client, part in enumerate(build.partition(cfg, "test")):
        for at, i in enumerate(part):
            for round, wrong in ((0, at % 4), (ROUNDS, at % 2)):
                said = "<b>wrong</b>" if wrong else examples[i].answer
                main.append("predictions.jsonl", round=round, client=client, part=client, id=examples[i].id,
                            said=said, truth=examples[i].answer)  # fmt: skip
    for folder, label in ((main, "FedNano"), (other, "FedAvg")):
        write_arm(folder, label)
        summary.write_summary(folder.path)
        folder.log(events.ArmFinished(label))
    return path


class Page(HTMLParser):
    """What a browser would fetch or run, and the text it would show."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.fetched: list[str] = []
        self.ids: Counter[str] = Counter()
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        for name, value in attrs:
            if name in ("src", "href", "xlink:href", "data", "srcset", "action"):
                self.fetched.append(value or "")
            if name == "id":
                self.ids[value or ""] += 1
            self.fetched += re.findall(r"url\(([^)]*)\)", value or "")

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    path = write_run(tmp_path_factory.mktemp("report") / "run")
    report.write(path)
    return path


@pytest.fixture(scope="module")
def html(run) -> str:
    return (run / "report.html").read_text()


# ---- the report


def test_the_page_fetches_nothing_and_runs_nothing(html):
    page = Page(html)
    assert page.tags["img"] and page.tags["svg"] == 6, "three figures, each for a page and a phone"
    assert not {"script", "link", "iframe", "object", "base"} & page.tags.keys()
    outside = [url for url in page.fetched if not url.startswith(("data:image/png;base64,", "#", "'#", '"#'))]
    assert outside == []
    assert "http://" not in html and "https://" not in html and "@import" not in html


def test_a_page_that_fetches_would_be_seen():
    page = Page('<img src="//x/y.png"><p style="background: url(z.png)"></p>')
    assert page.fetched == ["//x/y.png", "z.png"]


def test_the_table_is_the_one_of_the_run(run, html):
    text = Page(html).text
    arms = intervals.rows(records.load([run]).runs)
    rows = table.cells(arms, table.short_columns(arms))
    assert [row[0] for row in rows] == ["zero-shot", "FedAvg", "FedNano"]
    for row in rows:
        for cell in row:
            assert f"<td>{cell}</td>" in html or re.search(rf'<td class="share"[^>]*>{re.escape(cell)}</td>', html), (
                cell
            )
    assert "68.8" in rows[2][1], "11 of 16"
    assert "One seed is one seed" in text and "fedmm compare" in text


def test_the_table_has_groups_where_they_were_asked_for(tmp_path, html):
    """Of answers where every second is wrong in the end, by classes counted as the round loop counts them."""
    path = tmp_path / "run"
    main, _ = open_run(path, "evaluate.groups=thirds")
    counts = build.class_counts(composition.load([*SMALL, "evaluate.groups=thirds"]))
    for arm in (path, path / "arms" / "fedavg"):
        (arm / summary.CLASSES).write_text(json.dumps(counts))
    page = report.write(write_run(path, "evaluate.groups=thirds")).read_text()
    assert main.path == path and "<th>many %</th><th>medium %</th><th>few %</th>" in page
    assert "many %" not in html
    shares = json.loads((path / "summary.json").read_text())["final"]["groups"]
    assert sum(right for right, _ in shares.values()) == 8 and sum(count for _, count in shares.values()) == 16


def test_the_count_of_what_a_client_stores_includes_adapters(html):
    text = " ".join(Page(html).text.split())
    assert "A client stores 410 k, which is 59.0% less than the 1.00 M of the whole model" in text


def test_what_the_rule_misses_of_the_products_is_told(run, html):
    assert json.loads((run / "summary.json").read_text())["product_error"] == pytest.approx(0.015)
    assert "1.5% (FedNano), 1.5% (FedAvg)" in " ".join(html.split())


def test_text_from_the_network_is_escaped(html):
    assert "&lt;b&gt;wrong&lt;/b&gt;" in html and "<b>wrong" not in html
    assert "&lt;i&gt;late&lt;/i&gt;" in html and "<i>late" not in html


def test_a_question_is_escaped(run, monkeypatch):
    def splits(cfg):
        found = build.splits(cfg)
        return {**found, "test": [dataclasses.replace(e, question="which <b>digit</b> ?") for e in found["test"]]}

    monkeypatch.setattr(report, "splits", splits)
    html = report.render(run, plots.figures(run))
    assert "which &lt;b&gt;digit&lt;/b&gt; ?" in html and "which <b>" not in html


def test_without_examples_there_is_no_image_and_no_data_is_read(tmp_path, monkeypatch):
    path = write_run(tmp_path / "run", "run.examples=0")

    def splits(cfg):
        raise AssertionError("the server does not hold the clients' data")

    monkeypatch.setattr(report, "splits", splits)
    page = Page(report.write(path).read_text())
    assert page.tags["img"] == 0 and "before and after" not in page.text


def test_a_run_without_a_finished_arm_has_a_page_too(tmp_path):
    main, _ = open_run(tmp_path / "run")
    write_arm(main, "FedNano", rounds=1)
    assert "No arm of this run has finished yet" in report.write(tmp_path / "run").read_text()


def test_a_run_of_no_rounds_has_a_page_too(tmp_path):
    path = tmp_path / "run"
    asked = [*SMALL, "rounds=0", f"run.dir={path}"]
    folder = RunFolder(path, OmegaConf.to_yaml(composition.load(asked)), asked)
    write_arm(folder, "FedNano", rounds=0)
    summary.write_summary(path)
    assert "18.8%" in report.write(path).read_text(), "3 of 16, before as after"


def test_the_gallery_is_fixed_by_the_seed_and_in_proportion():
    def pair(i: int, before: bool, after: bool) -> report.Pair:
        given = [Answer(f"test/{i}", "yes" if right else "no", "yes") for right in (before, after)]
        return report.Pair(i % 4, *given)

    pairs = [pair(i, i % 10 < 3, 1 < i % 10 < 8) for i in range(100)]  # 20 lost, 10 kept, 50 put right, 20 wrong
    shown = report.choose(pairs, 10, seed=0)
    assert Counter(p.outcome for p in shown) == {
        "put right": 5,
        "no longer right": 2,
        "still wrong": 2,
        "still right": 1,
    }
    assert shown == report.choose(pairs[::-1], 10, seed=0), "the order of the rows says nothing"
    assert shown != report.choose(pairs, 10, seed=1)
    assert {p.client for p in shown if p.outcome == "put right"} == {0, 1, 2, 3}
    rare = [*pairs, pair(100, True, False)][-12:]
    assert len(report.choose(rare, 100, seed=0)) == 12, "no more than there are"


def test_answers_of_an_attempt_that_was_made_again_count_once(run, html):
    rows = [json.loads(line) for line in (run / "predictions.jsonl").read_text().splitlines()]
    assert report._pairs([*rows, *rows], ROUNDS) == report._pairs(rows, ROUNDS)
    assert len(report._pairs(rows, ROUNDS)) == 16


# ---- the figures


def test_figures_lie_beside_the_page(run):
    for name in ("accuracy_by_round", "accuracy_by_client", "bytes_by_channel"):
        with Image.open(run / "plots" / f"{name}.png") as image:
            assert image.width > 1000


def test_a_curve_is_global_in_every_round_or_in_none(run, tmp_path):
    both = plots.curve(run)
    assert both.everybody and both.values == tuple((2 * n - 1) / 16 for n in RIGHT["FedNano"])
    partly = write_run(tmp_path / "run", "run.examples=0")
    rows = [json.loads(line) for line in (partly / "scores.jsonl").read_text().splitlines()]
    kept = [json.dumps(row) for row in rows if (row["round"], row["client"]) != (1, 1)]
    (partly / "scores.jsonl").write_text("\n".join(kept) + "\n")
    own = plots.curve(partly)
    assert not own.everybody and own.values[1] == 4 / 8, "client 0 alone"


def test_a_figure_follows_the_page_into_the_dark_and_keeps_labels_as_they_are():
    curves = [plots.Curve("$x^<b>$", (0, 1), (0.2, 0.5), True)]
    drawn = plots.svg(plots.accuracy_by_round(curves), "title")
    assert "var(--series-1)" in drawn and plots.COLOURS["series-1"][0] not in drawn
    assert ">$x^&lt;b&gt;$  50.0</text>" in drawn, "neither mathematics nor markup"
    assert drawn == plots.svg(plots.accuracy_by_round(curves), "title")


def test_many_clients_are_drawn_as_their_spread():
    few, many = ({c: {0: 0.1, 1: c / 100} for c in range(count)} for count in (plots.PANELS, plots.PANELS + 1))
    assert len(plots.accuracy_by_client(few).axes) >= plots.PANELS
    assert len(plots.accuracy_by_client(many).axes) == 1


def test_bytes_are_written_with_three_digits():
    written = [plots.readable_bytes(count) for count in (0, 999, 2_100, 99_960, 999_600, 27_700_000_000)]
    assert written == ["0 B", "999 B", "2.10 kB", "100 kB", "1.00 MB", "27.7 GB"]


def test_names_are_moved_apart_no_further_than_needed():
    assert plots._apart([0.1, 0.5], 0.1) == [0.1, 0.5]
    assert plots._apart([0.5, 0.5, 0.9], 0.1) == pytest.approx([0.45, 0.55, 0.9])
    assert plots._apart([0.5, 0.52, 0.6], 0.1) == pytest.approx([0.44, 0.54, 0.64])


# ---- the watcher


def watched(path: Path, terminal: bool = False, **kwargs) -> tuple[int, str]:
    out = io.StringIO()
    console = Console(file=out, width=80, force_terminal=terminal, color_system=None)
    return watch(path, console=console, **{"stall_seconds": 5.0, **kwargs}), out.getvalue()


@pytest.fixture
def finished(tmp_path) -> Path:
    path = write_run(tmp_path / "run", "run.examples=0")
    folder = RunFolder(path, (path / "config.yaml").read_text(), [])
    folder.log(events.RunFinished(str(path / "report.html")))
    return path


def test_a_finished_run_ends_with_its_table_and_the_page(finished):
    code, out = watched(finished)
    assert code == 0
    assert out.splitlines()[-1] == str(finished / "report.html")
    rows = intervals.rows(records.load([finished]).runs)
    for cell in table.cells(rows, table.short_columns(rows))[-1]:
        assert cell in out
    assert max(map(len, out[out.rindex("finished: test") :].splitlines()[1:-1])) <= 80
    assert "[1/2] FedNano round 3/3  loss 1.500" in out and "[2/2] FedAvg round 1/3" in out
    assert len([line for line in out.splitlines() if " round " in line and "loss" in line]) == 2 * ROUNDS


def test_a_table_that_is_too_wide_loses_columns_and_no_word_is_broken(finished):
    rows = intervals.rows(records.load([finished]).runs)
    whole, narrow = (progress._arms_table(finished, width) for width in (200, 45))
    assert [column.header for column in whole.columns] == [column.heading for column in table.short_columns(rows)]
    assert 2 <= len(narrow.columns) < len(whole.columns)
    out = io.StringIO()
    Console(file=out, width=45, color_system=None).print(narrow)
    assert max(map(len, out.getvalue().splitlines())) <= 45
    assert all(word in out.getvalue().split() for column in narrow.columns for word in str(column.header).split())


def test_both_wires_are_counted_apart(finished):
    assert "link 4.0 MB up 2.0 MB down, Flower 0.6 kB up 1.4 kB down" in watched(finished)[1].splitlines()[1]
    RunFolder(finished, (finished / "config.yaml").read_text(), []).append(
        "ledger.jsonl", kind="bytes", round=2, channel="control", up_bytes=4_000_000, down_bytes=9_000_000
    )
    lines = watched(finished)[1].splitlines()
    assert "Flower 0.6 kB up" in lines[1] and "Flower 4.0 MB up 9.0 MB down" in lines[2], "of the rounds so far"


def test_a_failed_run_says_why(tmp_path):
    main, _ = open_run(tmp_path / "run")
    main.log(events.RunFailed("FedmmError: round 1: no client [bold]returned"))
    code, out = watched(tmp_path / "run")
    assert code == 1 and "FedmmError: round 1: no client [bold]returned" in out


def test_a_run_whose_process_is_gone_has_not_finished(tmp_path):
    main, _ = open_run(tmp_path / "run")
    write_arm(main, "FedNano", rounds=1)
    code, out = watched(tmp_path / "run", until=lambda: True)
    assert code == 1 and "gone before it finished (in FedNano, after round 1 of 3)" in out
    code, out = watched(tmp_path / "none", until=lambda: True)
    assert code == 1 and "gone before it finished" in out


def test_silence_ends_the_watch(tmp_path):
    open_run(tmp_path / "run")
    code, out = watched(tmp_path / "run", until=lambda: False, stall_seconds=0.3)
    assert code == 1 and "nothing has happened for" in out


@pytest.mark.parametrize("ended", [events.RunFailed("the first attempt"), events.RunFinished("the first attempt")])
def test_an_earlier_end_is_not_the_end_of_a_resumed_run(tmp_path, ended):
    main, _ = open_run(tmp_path / "run")
    main.log(ended)
    main.log(events.RunBegan(["FedNano"]))
    code, out = watched(tmp_path / "run", stall_seconds=0.3)
    assert code == 1 and "nothing has happened" in out and "first attempt" not in out
    main.log(events.RunFinished("new"))
    code, out = watched(tmp_path / "run")
    assert (code, out.splitlines()[-1]) == (0, "new")


def test_an_old_end_waits_for_the_process_that_goes_on(tmp_path):
    """A watcher that is quicker than the resumed run sees the end of the first attempt before the run event."""
    main, _ = open_run(tmp_path / "run")
    main.log(events.RunFailed("the first attempt"))
    found: list[tuple[int, str]] = []
    gone = threading.Event()
    thread = threading.Thread(target=lambda: found.append(watched(tmp_path / "run", until=gone.is_set)))
    thread.start()
    time.sleep(0.5)
    assert not found
    main.log(events.RunBegan(["FedNano"]))
    main.log(events.RunFinished("new"))
    thread.join(5)
    assert found and found[0][0] == 0 and found[0][1].splitlines()[-1] == "new"
    assert watched(tmp_path / "run", until=lambda: True)[0] == 0, "and with nobody behind it the old end is the end"


@pytest.mark.parametrize("terminal", [False, True])
def test_a_watcher_may_come_before_the_folder(tmp_path, terminal):
    path, found = tmp_path / "run", []
    thread = threading.Thread(target=lambda: found.append(watched(path, terminal, until=lambda: False)))
    thread.start()
    time.sleep(0.4)
    main, _ = open_run(path)
    write_arm(main, "FedNano", rounds=2)
    time.sleep(0.6)
    main.log(events.RunFinished(str(path / "report.html")))
    thread.join(10)
    assert found and found[0][0] == 0
    assert ("2/3" if terminal else "[1/2] FedNano round 2/3") in found[0][1]


def test_a_line_that_a_kill_cut_off_is_skipped(tmp_path):
    main, _ = open_run(tmp_path / "run")
    written = main.path / "events.jsonl"
    written.write_text(written.read_text() + '{"time": 1, "ev\n')
    main.log(events.RunFinished("new"))
    assert watched(tmp_path / "run")[0] == 0


def test_an_interrupted_watch_ends_without_a_traceback(tmp_path, monkeypatch):
    def interrupted(*args, **how):
        raise KeyboardInterrupt

    monkeypatch.setattr(progress, "watch", interrupted)
    assert cli.main(["watch", str(tmp_path)]) == 130
