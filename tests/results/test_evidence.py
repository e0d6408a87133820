"""What several runs show together: by hand on summaries of three seeds and two clients."""

from __future__ import annotations

import re

import pytest
from finished import composed_arm, page, rows_of, write_arm
from helpers import ROOT, every

from fedmm.cli import main
from fedmm.results import intervals, plots, table

RECORDS = ROOT / "docs" / "records"


def cell(rows: list[intervals.Row], label: str, heading: str, against: str = "FedAvg") -> str:
    shown = table.columns(against, rows)
    at = [column.heading for column in shown].index(heading)
    return next(line for line in table.cells(rows, shown) if line[0] == label)[at]


def test_figures_by_hand(runs):
    rows = rows_of(runs)
    assert [row.label for row in rows] == ["zero-shot", "local", "FedAvg"]
    t = 4.302653  # Student's, two degrees of freedom
    half = 100 * t * 0.1 / 3**0.5
    assert cell(rows, "local", "own test %") == f"60.0 ± {half:.1f}"
    spread = 100 * t * 0.01 / 3**0.5
    gained = intervals.differences(rows[2], rows[1])
    assert gained == {s: pytest.approx({"0": 0.1, "1": -loss}) for s, loss in enumerate((0.0, 0.02, 0.04))}
    assert cell(rows, "FedAvg", "own - local") == f"+4.0 ± {spread:.1f}", "paired: not the difference of intervals"
    assert cell(rows, "local", "own - FedAvg") == f"-4.0 ± {spread:.1f}"
    assert cell(rows, "FedAvg", "own - FedAvg") == "–"
    assert cell(rows, "FedAvg", "clients better off") == "3 of 6", "equal is not better"
    assert cell(rows, "FedAvg", "worst client %").startswith("58.0 ±")
    assert cell(rows, "FedAvg", "spread").startswith("6.0 ±"), "half of 10, 12 and 14 points apart"
    assert cell(rows, "FedAvg", "link MB") == "4.0" and cell(rows, "FedAvg", "Flower kB") == "2"
    assert cell(rows, "FedAvg", "LLM samples") == "640" and cell(rows, "zero-shot", "LLM samples") == "0"


def test_what_scoring_moves_is_no_cost_of_an_arm(runs, tmp_path):
    moved = {"steps": [3_000_000, 0], "answers": [9_000_000, 0], "features": [5_000_000, 0], "adapters": [1_000_000, 0]}
    rows = rows_of([*runs, write_arm(tmp_path / "x", "X", 0, {"0": 0.5}, bytes=moved)])
    assert [cell(rows, "X", of) for of in ("link MB", "scoring MB", "features MB")] == ["4.0", "9.0", "5.0"]


def test_clients_that_a_seed_deals_out_anew_are_not_averaged(runs, tmp_path):
    assert "| domain | FedAvg |" in table.by_client(rows_of(runs))
    dealt = []
    for seed in range(2):
        start = {"global": 0.3, "own": {"0": 0.2 + seed / 10, "1": 0.3}}
        for label in ("local", "FedAvg"):
            path = tmp_path / f"{label}-{seed}"
            dealt.append(write_arm(path, label, seed, {"0": 0.5, "1": 0.6}, data="dirichlet", zero_shot=start))
    assert table.by_client(rows_of(dealt)) == "" and "dirichlet" not in table.by_client(rows_of([*runs, *dealt]))


def test_one_seed_is_marked(runs):
    text = page(rows_of(runs[:2]))
    assert "| 1 ¹ |" in text and "¹ one seed" in text and "±" not in text
    assert "¹" not in page(rows_of(runs))


def test_a_figure_of_fewer_seeds_than_its_row_says_so(runs, tmp_path):
    """Here global accuracy of one of three, and the difference to an arm with two of the three."""
    for seed in range(3):
        final = {"global": 0.5 if seed == 0 else None, "own": {"0": 0.7, "1": 0.7}}
        runs.append(write_arm(tmp_path / f"x{seed}", "X", seed, {"0": 0.7}, final=final))
    rows = rows_of([run for run in runs if run.name != "local2"])
    assert cell(rows, "X", "global accuracy %") == "50.0 ¹" and "¹ one seed" in page(rows)
    assert cell(rows, "X", "own - local").endswith(" (2 seeds)") and "(" not in cell(rows, "X", "own - FedAvg")


def test_what_cannot_be_averaged_is_refused(runs, tmp_path):
    with pytest.raises(ValueError, match=r"both have FedAvg with seed 0; give each seed once"):
        rows_of([*runs, write_arm(tmp_path / "again", "FedAvg", 0, {"0": 0.5})])
    with pytest.raises(ValueError, match=r"differ in rounds: 8 and 9; give one of them another label"):
        rows_of([*runs, write_arm(tmp_path / "longer", "FedAvg", 7, {"0": 0.5}, rounds=9)])


def test_a_run_that_scored_nobody_is_no_zero(runs, tmp_path):
    rows = rows_of([*runs, write_arm(tmp_path / "x", "X", 0, {"0": 0.5}, final={"global": None, "own": {}})])
    assert cell(rows, "X", "own test %") == "–" and cell(rows, "X", "own - local") == "–"


def test_a_table_says_what_was_scored(runs, tmp_path):
    tuned = write_arm(tmp_path / "v", "FedAvg", 0, {"0": 0.5}, data="function", split="validation")
    assert [c.heading for c in table.columns(None, rows_of([tuned]))][2] == "own validation %"
    assert [c.heading for c in table.columns(None, rows_of([*runs, tuned]))][2] == "own part %"


def test_kinds_of_data_stand_apart(runs, tmp_path):
    other = write_arm(tmp_path / "f", "FedAvg", 0, {"0": 0.9, "1": 0.9}, data="function")
    rows = rows_of([*runs, other])
    text = page(rows)
    assert text.index("### domain") < text.index("### function")
    shown = table.columns("FedAvg", rows)
    at = [column.heading for column in shown].index("own - local")
    assert table.cells(rows, shown)[-1][at] == "–", "no local on that data"
    assert plots.png(plots.comparison(rows)).startswith(b"\x89PNG")


def test_columns_stand_where_they_say_something_and_the_page_says_what(runs):
    alone, nobody = rows_of(runs), rows_of([run for run in runs if "local" not in run.name])
    for heading in ("own - local", "clients better off"):
        assert heading in [column.heading for column in table.columns(None, alone)]
        assert heading not in [column.heading for column in table.columns(None, nobody)]
    assert "*clients better off* clients times seeds" in table.reading(table.columns(None, alone))
    assert "better off" not in table.reading(table.columns(None, nobody))


def test_compare_writes_a_page(runs, tmp_path, capsys):
    into = tmp_path / "page" / "results.md"
    into.parent.mkdir()
    assert main(["compare", *map(str, runs), "--into", str(into)]) == 0
    assert "| FedAvg |" in capsys.readouterr().out
    assert "![accuracy" in into.read_text() and into.with_suffix(".png").exists()
    assert main(["compare", *map(str, runs[:-1]), "--into", str(into)]) == 2
    assert "has 1 runs or searches that would be lost, such as ('domain', 'local', 2); add" in capsys.readouterr().err
    assert main(["compare", *map(str, runs[:-1]), str(into.with_suffix(".jsonl")), "--into", str(into)]) == 0
    assert main(["compare", *map(str, runs), "--into", str(runs[0] / "summary.json" / "page.md")]) == 1
    assert main(["compare", str(tmp_path)]) == 2
    assert "no finished run" in capsys.readouterr().err
    write_arm(tmp_path / "third", "X", 0, {"0": 0.5})
    assert main(["compare", *map(str, runs), str(tmp_path / "third"), "--against", "FedDAT"]) == 2
    assert "none of these arms" in capsys.readouterr().err


def test_records_go_where_they_are_asked_to(runs, tmp_path, capsys):
    page_file, records_file = tmp_path / "page.md", tmp_path / "records" / "page.jsonl"
    records_file.parent.mkdir()
    compare = ["compare", *map(str, runs), "--into", str(page_file)]
    assert main([*compare, "--records", str(records_file)]) == 0
    assert "[page.jsonl](records/page.jsonl)" in page_file.read_text()
    assert records_file.exists() and not page_file.with_suffix(".jsonl").exists()
    assert main(["compare", *map(str, runs[:-1]), "--into", str(page_file), "--records", str(records_file)]) == 2
    assert f"add {records_file} to" in capsys.readouterr().err
    assert main([*compare, "--records", str(tmp_path / "page.txt")]) == 2
    assert "must end in .jsonl" in capsys.readouterr().err
    assert main(["compare", *map(str, runs), "--records", str(records_file)]) == 2
    assert "needs a page: give --into" in capsys.readouterr().err


@pytest.mark.parametrize("name", sorted(path.stem for path in RECORDS.glob("*.jsonl")))
def test_a_published_page_shows_what_its_records_say(name):
    """The table of docs/NAME.md, computed again from docs/records/NAME.jsonl."""
    published = (RECORDS.parent / f"{name}.md").read_text()
    against = re.search(r"--against ('[^']*'|\S+)", published.splitlines()[2])
    rows = rows_of([RECORDS / f"{name}.jsonl"])
    assert f"[{name}.jsonl](records/{name}.jsonl)" in published
    assert table.markdown(rows, table.columns(against and against[1].strip("'"), rows)) in published


def test_groups_have_columns_where_a_row_has_them(runs, tmp_path):
    bare = rows_of(runs)
    assert not {"many %", "medium %", "few %"} & {column.heading for column in table.columns("FedAvg", bare)}
    assert "few %" not in page(bare)
    made = []
    for seed, few in enumerate((2, 4, 6)):
        score = {"global": 0.5, "own": {"0": 0.5}, "groups": {"many": [9, 10], "few": [few, 10]}}
        made.append(write_arm(tmp_path / f"tail{seed}", "X", seed, {"0": 0.5}, final=score))
    rows = rows_of([*runs, *made])
    half = 100 * 4.302653 * 0.2 / 3**0.5
    assert cell(rows, "X", "few %") == f"40.0 ± {half:.1f}" and cell(rows, "X", "many %") == "90.0 ± 0.0"
    assert cell(rows, "FedAvg", "few %") == "–"
    headings = [column.heading for column in table.columns("FedAvg", rows)]
    assert headings[3:7] == ["worst client %", "many %", "few %", "spread"], "nobody was asked about medium classes"
    assert [column.heading for column in table.short_columns(rows)][3:6] == headings[3:6]


def test_an_arm_named_after_another_is_set_against_it(tmp_path):
    made = [
        write_arm(tmp_path / f"{label}{rank}", f"{label}, edge.rank={rank}", 0, {"0": right + rank / 100})
        for label, right in (("FedAvg", 0.5), ("FedAvg, LoRA in the LLM", 0.6))
        for rank in (4, 8)
    ]
    rows = rows_of([*made, write_arm(tmp_path / "plateau", "FedAvg, plateau", 0, {"0": 0.7}, data="other")])
    for rank in (4, 8):
        assert cell(rows, f"FedAvg, LoRA in the LLM, edge.rank={rank}", "own - FedAvg") == "+10.0 ¹"
        assert cell(rows, f"FedAvg, edge.rank={rank}", "own - FedAvg") == "–"
    assert intervals.against(["FedAvg, plateau", "local"], None) == "FedAvg, plateau"
    with pytest.raises(ValueError, match="'FedAvg' is none of these arms"):
        intervals.against(["FedAvg, plateau", "local"], "FedAvg")


def test_arms_of_other_data_do_not_stand_side_by_side(tmp_path):
    test = [write_arm(tmp_path / "a", "FedAvg", 0, {"0": 0.5})]
    tuning = write_arm(tmp_path / "b", "FedDAT", 0, {"0": 0.6}, split="validation")
    with pytest.raises(
        ValueError, match=r"FedAvg and FedDAT have the same data=domain but differ in evaluate.split: 'test'"
    ):
        rows_of([*test, tuning])
    swept = write_arm(tmp_path / "c", "FedDAT, evaluate.split=validation", 0, {"0": 0.6}, split="validation")
    rows = rows_of([*test, swept])
    assert cell(rows, "FedDAT, evaluate.split=validation", "own - FedAvg") == "–"


def test_what_arms_were_given_stands_there_where_it_differs(tmp_path):
    made = [write_arm(tmp_path / f"{n}", label, 0, {"0": 0.5}, rounds=n) for label, n in (("FedAvg", 8), ("long", 32))]
    heading = "rounds x epochs x batch"
    assert cell(rows_of(made), "long", heading) == "32 x – x –"
    assert heading not in [column.heading for column in table.columns(None, rows_of(made[:1]))]


def test_what_a_rule_misses_of_the_products_stands_beside_its_accuracy(tmp_path):
    made = [
        write_arm(tmp_path / f"x{seed}", "X", seed, {"0": 0.5}, product_error=off) for seed, off in ((0, 0.1), (1, 0.3))
    ]
    rows = rows_of([*made, write_arm(tmp_path / "old", "FedAvg", 0, {"0": 0.5})])
    assert cell(rows, "X", "product error %").startswith("20.0 ± ")
    assert cell(rows, "FedAvg", "product error %") == cell(rows, "zero-shot", "product error %") == "–"


def test_a_classifier_that_has_learnt_nothing_is_no_zero_shot(tmp_path):
    rows = rows_of([write_arm(tmp_path / "run", "FedAvg", 0, {"0": 0.5}, head="classes")])
    assert [row.label for row in rows] == ["untrained", "FedAvg"]


def test_who_was_not_scored_is_in_no_difference_and_said_to_be_missing(tmp_path):
    for seed in range(2):
        write_arm(tmp_path / f"avg{seed}", "FedAvg", seed, {"0": 0.5, "1": 0.5, "2": 0.5})
        write_arm(tmp_path / f"dat{seed}", "FedDAT", seed, {"0": 0.6, "1": 0.6}, unscored=[2], lost=3)
    rows = rows_of(sorted(tmp_path.iterdir()))
    assert cell(rows, "FedDAT", "own - FedAvg") == "+10.0 ± 0.0"
    assert cell(rows, "FedDAT", "clients unscored") == "2" and cell(rows, "FedAvg", "clients unscored") == "0"
    assert cell(rows, "FedDAT", "updates lost") == "6"


@pytest.mark.parametrize("arm", every("arm", "fedavg", "feddat_llm", "mllmfl"))
def test_seeds_of_one_arm_are_one_row(tmp_path, arm):
    """As they are composed: some settings follow the seed, as a rule's own."""
    asked = ([f"arm={arm}", f"seed={seed}", f"run.dir={tmp_path}/{seed}"] for seed in (0, 1))
    paths = [composed_arm(tmp_path / str(seed), overrides, {"0": 0.5}) for seed, overrides in enumerate(asked)]
    assert [len(row.by_seed) for row in rows_of(paths)] == [2, 2]


def test_seeds_on_other_data_are_no_row(tmp_path):
    asked = ["seed=0"], ["seed=1", "dataset.seed=5"]
    paths = [composed_arm(tmp_path / str(seed), overrides, {"0": 0.5}) for seed, overrides in enumerate(asked)]
    with pytest.raises(ValueError, match=r"differ in dataset.seed"):
        rows_of(paths)


def test_over_a_setting_each_value_has_its_own_partner(tmp_path):
    runs = [
        write_arm(tmp_path / f"{label}{rank}", f"{label}, edge.rank={rank}", 0, {"0": right + rank / 100})
        for rank in (4, 8)
        for label, right in (("FedAvg", 0.6), ("local", 0.5))
    ]
    rows = rows_of(runs)
    assert intervals.against([row.label for row in rows], None) == "FedAvg"
    for rank in (4, 8):
        assert cell(rows, f"FedAvg, edge.rank={rank}", "own - local") == "+10.0 ¹"
        assert cell(rows, f"local, edge.rank={rank}", "own - FedAvg") == "-10.0 ¹"
    assert intervals.against([row.label for row in rows if "local" in row.label], None) == "local, edge.rank=4"
    gains = table.by_client(rows).splitlines()
    assert gains[2] == "| domain | FedAvg, edge.rank=4 | +10.0 ¹ |"


def test_a_row_is_set_against_itself_with_another_value_of_a_setting(tmp_path):
    lost = {"none": 0.0, "flipped": 0.1, "scaled": 0.3}
    ends = [f"{fault}, edge.ranks=[4, 8]" for fault in lost]
    rows = rows_of([
        write_arm(tmp_path / f"{label}{end}", f"{label}, fault={end}", 0, {"0": right - loss * times})
        for end, loss in zip(ends, lost.values(), strict=True)
        for label, right, times in (("FedAvg", 0.8, 1), ("median", 0.9, 2))
    ])  # fmt: skip
    rows += rows_of([write_arm(tmp_path / "local", "local", 0, {"0": 0.5})])
    for label, times in (("FedAvg", 1), ("median", 2)):
        shown = [cell(rows, f"{label}, fault={end}", "own - fault=none", "fault=none") for end in ends]
        assert shown == ["–", f"-{10.0 * times} ¹", f"-{30.0 * times} ¹"]
    assert cell(rows, "local", "own - fault=none", "fault=none") == "–"
    with pytest.raises(ValueError, match="'fault=nan' is none of these arms"):
        intervals.against([row.label for row in rows], "fault=nan")
