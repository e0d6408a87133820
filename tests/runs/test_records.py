"""Files of records: a run is known by what it was asked, a page is the same from them, and what is none is told."""

from __future__ import annotations

from dataclasses import replace

import pytest
from finished import composed_arm, page, rows_of, write_arm
from helpers import every

from fedmm.cli import main
from fedmm.config import composition
from fedmm.results import intervals
from fedmm.runs import records
from fedmm.sweep import results


def test_the_page_names_the_commands_that_made_its_runs(runs, tmp_path):
    for command in ("fedmm sweep one", "fedmm sweep two", "fedmm sweep one"):
        records.note(tmp_path, records.Records(commands={command: records.now()}))
    told = replace(records.load(runs), commands=records.noted(tmp_path).commands)
    page = results.write(tmp_path / "page.md", told, None, "fedmm compare").read_text()
    lines = [line for line in page.splitlines() if line.startswith("- `")]
    assert [line.split("`")[1] for line in lines] == ["fedmm compare", "fedmm sweep one", "fedmm sweep two"]


def test_a_page_names_the_days_of_its_runs(runs, tmp_path):
    paths = [
        write_arm(tmp_path / day, "X", seed, {"0": 0.5}, environment={"started": f"{day}T10:00:00+0000"})
        for seed, day in enumerate(("2026-11-28", "2026-11-27", "2026-11-29"))
    ]
    told = records.load([*runs, *paths])
    assert records.days(told.runs) == "2026-11-27 to 2026-11-29" and records.days(told.runs[-1:]) == "2026-11-29"
    page = results.write(tmp_path / "page.md", told, None, "fedmm compare").read_text()
    assert "\n- Runs of 2026-11-27 to 2026-11-29.\n" in page
    assert records.days(records.load(runs).runs) == "", "older ones do not tell"


def asked_of(*overrides: str) -> dict[str, object]:
    return records.settings_of(composition.compose(overrides))


@pytest.mark.parametrize("arm", every("arm", "fedavg", "feddat_llm", "mllmfl"))
def test_a_run_is_known_by_what_it_was_asked(tmp_path, arm):
    """Whatever its file made of lists, interpolations and small numbers; and not by where it ran."""
    made = composed_arm(tmp_path / "run", [f"arm={arm}", "seed=3", f"run.dir={tmp_path}/run"], {"0": 0.5})
    records.save(tmp_path / "kept.jsonl", records.load([made, composed_arm(tmp_path / "x", ["seed=4"], {"0": 0.6})]))
    kept = records.load([tmp_path / "kept.jsonl"]).runs
    for told in (kept, records.load([made]).runs):
        (found,) = [run for run in told if run.settings == asked_of(f"arm={arm}", "seed=3", "run.dir=/elsewhere")]
        assert found.summary["final"]["own"] == {"0": 0.5}
        assert asked_of(f"arm={arm}", "seed=5") not in [run.settings for run in told]


def test_a_page_is_the_same_from_its_file_of_records(runs, tmp_path):
    told = replace(
        records.load(runs), commands={"fedmm sweep": "2026-01-02"},
        choices=[records.Choice.of("optimizer.lr", ["arm=fedavg"], {"0.1": 0.5, "0.2": 0.6}, "0.2")],
    )  # fmt: skip
    first = results.write(tmp_path / "a" / "page.md", told, None, "fedmm compare").read_text()
    assert "| arm=fedavg | optimizer.lr | 0.2 | 50.0 | 60.0 |" in first
    again = records.load([tmp_path / "a" / "page.jsonl"])
    assert again.choices == told.choices
    assert results.write(tmp_path / "b" / "page.md", again, None, "fedmm compare").read_text() == first
    kept = [(tmp_path / of / "page.jsonl").read_text() for of in "ab"]
    assert kept[0] == kept[1]
    twice = records.load([*runs, tmp_path / "a" / "page.jsonl"])
    assert len(twice.runs) == len(runs), "told of twice alike is one"
    assert page(intervals.rows(twice.runs)) == page(rows_of(runs))


def test_a_search_is_known_again_beside_runs_of_another_arm(tmp_path):
    """What all runs of a file share is told once, and is no matter of a search that asked something else."""
    run = composed_arm(tmp_path / "run", ["arm=fedprox", f"run.dir={tmp_path}/run"], {"0": 0.5})
    choices = [records.Choice.of("optimizer.lr", [f"arm={arm}"], {"1": 0.5}, "1") for arm in ("fedavg", "fedprox")]
    records.save(tmp_path / "kept.jsonl", replace(records.load([run]), choices=choices))
    assert records.load([tmp_path / "kept.jsonl"]).choices == choices


def test_a_page_shows_the_mean_that_a_common_value_was_chosen_by(runs, tmp_path):
    """Each scenario's own figures beside it, values in rising order, and what all combinations share left out."""
    found = {"domain": {"0.003": 0.5, "0.0015": 0.4}, "function": {"0.003": 0.6, "0.0015": 0.8}}
    choices = [
        records.Choice.of("optimizer.lr", ["arm=fedavg", f"scenario={name}", "rounds=2"], tried, "0.0015", ["scenario"])
        for name, tried in found.items()
    ]
    told = replace(records.load(runs), choices=choices)
    page = results.write(tmp_path / "page.md", told, None, "fedmm compare").read_text()
    assert page.splitlines()[-5:] == [
        "| combination | setting | chosen | 0.0015 | 0.003 |",
        "| --- | --- | ---: | ---: | ---: |",
        "| scenario=domain | optimizer.lr | 0.0015 | 40.0 | 50.0 |",
        "| scenario=function | optimizer.lr | 0.0015 | 80.0 | 60.0 |",
        "| (mean over scenario) | optimizer.lr | 0.0015 | 60.0 | 55.0 |",
    ]


def test_a_run_told_of_twice_with_other_figures_is_refused(runs, tmp_path):
    records.save(tmp_path / "kept.jsonl", records.load(runs))
    write_arm(runs[0], "FedAvg", 0, {"0": 0.1, "1": 0.1})
    with pytest.raises(ValueError, match=r"avg0 both have FedAvg with seed 0"):
        rows_of([*runs, tmp_path / "kept.jsonl"])


@pytest.mark.parametrize(
    "text, told",
    [
        ("", "no finished run to compare"),
        ('{"settings": {}}\n# Results', "line 2, is no record"),
        ('{"settings": {}}\n{"settings": {"rounds": 3}}', "line 2, is where another file of records begins"),
        ('{"settings": {}, "summary": {}}', "line 1, is where another file of records begins, or the first line is"),
        ('{"settings": {}}\n{"summary": {}}', "line 2, is no run, search or command, it has ['summary']"),
    ],
)
def test_a_file_of_no_records_is_told(tmp_path, text, told, capsys):
    (tmp_path / "page.jsonl").write_text(text)
    assert main(["compare", str(tmp_path / "page.jsonl")]) == 2
    assert told in capsys.readouterr().err
    if text:
        assert main(["sweep", str(tmp_path / "sweep"), "arm=fedavg", "--known", str(tmp_path / "page.jsonl")]) == 2
        assert told in capsys.readouterr().err
    assert main(["sweep", str(tmp_path / "sweep"), "arm=fedavg", "--known", str(tmp_path / "typo.jsonl")]) == 2
    assert "typo.jsonl is not there" in capsys.readouterr().err and not (tmp_path / "sweep").exists()


def test_a_page_overwrites_no_records(runs, tmp_path, capsys):
    (tmp_path / "mine.jsonl").write_text("precious")
    assert main(["compare", *map(str, runs), "--into", str(tmp_path / "mine.jsonl")]) == 2
    assert "must end in .md" in capsys.readouterr().err and (tmp_path / "mine.jsonl").read_text() == "precious"
