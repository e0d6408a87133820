"""What several runs show together: by hand on summaries of three seeds and two clients; and how a sweep is planned."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from fedmm.cli import main
from fedmm.runs import config, evidence, plots, records, results, settings, sweep, table
from fedmm.types import FedmmError


def write_arm(path: Path, label: str, seed: int, own: dict[str, float], **more: object) -> Path:
    """A finished arm as summary.write_summary leaves it."""
    path.mkdir(parents=True, exist_ok=True)
    cfg = {"label": label, "seed": seed, "rounds": more.pop("rounds", 8), "link": {"bind": f"127.0.0.1:{seed}"}}
    cfg |= {"evaluate": {"split": more.pop("split", "test")}}
    (path / "config.yaml").write_text(json.dumps(cfg))
    score = {"global": sum(own.values()) / len(own), "own": own}
    summary = {
        "data": "domain", "label": label, "seed": seed, "zero_shot": {"global": 0.25, "own": {"0": 0.2, "1": 0.3}},
        "final": score, "bytes": {"steps": [3_000_000, 1_000_000], "control": [1000, 1000]}, "seconds": 10.0,
        "llm_samples": 640, "client_parameters": 5e6, **more,
    }  # fmt: skip
    (path / "summary.json").write_text(json.dumps(summary))
    return path


@pytest.fixture
def runs(tmp_path) -> list[Path]:
    """FedAvg and local, three seeds: client 0 gains 10 points by joining, client 1 loses 0, 2 and 4."""
    made = []
    for seed, (base, loss) in enumerate(((0.50, 0.00), (0.60, 0.02), (0.70, 0.04))):
        made.append(write_arm(tmp_path / f"avg{seed}", "FedAvg", seed, {"0": base + 0.1, "1": base - loss}))
        made.append(write_arm(tmp_path / f"local{seed}", "local", seed, {"0": base, "1": base}))
    return made


def rows_of(paths: list[Path]) -> list[evidence.Row]:
    return evidence.rows(records.load(paths).runs)


def cell(rows: list[evidence.Row], label: str, heading: str, against: str = "FedAvg") -> str:
    shown = table.columns(against, rows)
    at = [column.heading for column in shown].index(heading)
    return next(line for line in table.cells(rows, shown) if line[0] == label)[at]


def page(rows: list[evidence.Row]) -> str:
    return table.markdown(rows, table.columns("FedAvg", rows))


def test_figures_by_hand(runs):
    rows = rows_of(runs)
    assert [row.label for row in rows] == ["zero-shot", "local", "FedAvg"]
    t = 4.302653  # Student's, two degrees of freedom
    half = 100 * t * 0.1 / 3**0.5
    assert cell(rows, "local", "own test %") == f"60.0 ± {half:.1f}"
    gains = [0.05, 0.04, 0.03]
    spread = 100 * t * 0.01 / 3**0.5
    assert list(evidence.gaps(rows[2], rows[1]).values()) == pytest.approx(gains)
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


def test_what_cannot_be_averaged_is_refused(runs, tmp_path):
    with pytest.raises(ValueError, match=r"FedAvg with seed 0 again.*give each seed once"):
        rows_of([*runs, write_arm(tmp_path / "again", "FedAvg", 0, {"0": 0.5})])
    with pytest.raises(ValueError, match=r"differ in rounds: 8 and 9; set label"):
        rows_of([*runs, write_arm(tmp_path / "longer", "FedAvg", 7, {"0": 0.5}, rounds=9)])


def test_a_run_that_scored_nobody_is_no_zero(runs, tmp_path):
    rows = rows_of([*runs, write_arm(tmp_path / "x", "X", 0, {"0": 0.5}, final={"global": None, "own": {}})])
    assert cell(rows, "X", "own test %") == "–" and cell(rows, "X", "own - local") == "–"


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
    assert main(["compare", str(tmp_path)]) == 2
    assert "no finished run" in capsys.readouterr().err
    write_arm(tmp_path / "third", "X", 0, {"0": 0.5})
    assert main(["compare", *map(str, runs), str(tmp_path / "third"), "--against", "FedDAT"]) == 2
    assert "there are" in capsys.readouterr().err


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
    assert evidence.against(["FedAvg, plateau", "local"], None) == "FedAvg, plateau"
    with pytest.raises(ValueError, match="'FedAvg' is no arm here"):
        evidence.against(["FedAvg, plateau", "local"], "FedAvg")


def test_arms_of_other_data_do_not_stand_side_by_side(tmp_path):
    test = [write_arm(tmp_path / "a", "FedAvg", 0, {"0": 0.5})]
    tuning = write_arm(tmp_path / "b", "FedDAT", 0, {"0": 0.6}, split="validation")
    with pytest.raises(ValueError, match=r"FedAvg and FedDAT are both on domain and differ in evaluate.split: 'test'"):
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


# ---- the sweep's plan ---------------------------------------------------------------------------------------------


def test_hydra_reads_the_axes():
    found = config.axes(
        ["arm=fedavg,local", "seed=range(0,3)", "compare=[local,fedavg]", "dataset.kinds=[sum],[read,sum]"]
    )
    assert found == {
        "arm": ("fedavg", "local"), "seed": ("0", "1", "2"), "compare": ("[local,fedavg]",),
        "dataset.kinds": ("[sum]", "[read,sum]"),
    }  # fmt: skip
    with pytest.raises(settings.ConfigError, match="cannot be read"):
        config.axes(["arm=[fedavg"])


def test_every_combination_is_a_run_with_a_label_of_its_own(tmp_path):
    made = sweep.jobs(tmp_path, ["arm=fedavg,local", "seed=0,1", "edge.rank=4,8"])
    assert len({job.path for job in made}) == len(made) == 8
    labels = {config.compose(job.overrides).label for job in made}
    assert labels == {"FedAvg, edge.rank=4", "FedAvg, edge.rank=8", "local, edge.rank=4", "local, edge.rank=8"}
    (one,) = sweep.jobs(tmp_path, ["arm=fedavg"])
    assert config.compose(one.overrides).label == "FedAvg"


def test_who_was_not_scored_is_in_no_difference_and_said_to_be_missing(tmp_path):
    for seed in range(2):
        write_arm(tmp_path / f"avg{seed}", "FedAvg", seed, {"0": 0.5, "1": 0.5, "2": 0.5})
        write_arm(tmp_path / f"dat{seed}", "FedDAT", seed, {"0": 0.6, "1": 0.6}, unscored=[2], lost=3)
    rows = rows_of(sorted(tmp_path.iterdir()))
    assert cell(rows, "FedDAT", "own - FedAvg") == "+10.0 ± 0.0"
    assert cell(rows, "FedDAT", "clients unscored") == "2" and cell(rows, "FedAvg", "clients unscored") == "0"
    assert cell(rows, "FedDAT", "updates lost") == "6"


def test_settings_that_make_other_data_name_the_data(tmp_path):
    made = sweep.jobs(tmp_path, ["arm=fedavg,local", "dataset.train=100,200", "clients=2,3", "edge.rank=4,8"])
    cfgs = [config.compose(job.overrides) for job in made]
    assert {cfg.label for cfg in cfgs} == {f"{arm}, edge.rank={r}" for arm in ("FedAvg", "local") for r in (4, 8)}
    assert {cfg.data for cfg in cfgs} == {
        f"dirichlet, clients={clients}, dataset.train={train}" for train in (100, 200) for clients in (2, 3)
    }
    other = sweep.jobs(tmp_path, ["edge.rank=4,8", "clients=2,3", "dataset.train=100,200", "arm=fedavg,local"])
    assert {job.path for job in other} == {job.path for job in made}, "in whatever order it was asked"
    (one,) = sweep.jobs(tmp_path, ["dataset.train=100,200", "data=mine", "label=x", "arm=fedavg"])[:1]
    assert config.compose(one.overrides).data == "mine"


def test_the_search_is_on_validation_with_its_own_seed_and_takes_the_best(tmp_path):
    tuned = sweep.search("optimizer.lr=1e-3,3e-3,9e-3")
    cells = sweep.trials(tmp_path, ["arm=fedavg", "seed=0,1", "evaluate.every=1"], tuned)
    ((cell_, tried),) = cells.items()
    assert cell_ == ("arm=fedavg", "evaluate.every=1"), "the seeds that are reported take no part"
    for job in tried.values():
        cfg = config.compose(job.overrides)
        assert (cfg.evaluate.split, cfg.seed, cfg.evaluate.every) == ("validation", sweep.TUNING_SEED, 0)
    for job, right in zip(tried.values(), (0.4, 0.6, 0.6), strict=True):
        write_arm(job.path, "FedAvg", sweep.TUNING_SEED, {"0": right, "1": right})
    choice = records.Choice.of(tuned.key, cell_, sweep.accuracies(tried))
    assert choice.chosen == "0.003" and not choice.at_the_edge, "of equal ones the first"
    final = sweep.jobs(tmp_path, ["arm=fedavg", "seed=0,1"], lambda cell: ["optimizer.lr=3e-3"])
    assert [config.compose(job.overrides).optimizer.lr for job in final] == [3e-3, 3e-3]
    with pytest.raises(settings.ConfigError, match="gives one value"):
        sweep.search("optimizer.lr=1e-3")
    with pytest.raises(settings.ConfigError, match="gives 0.001 twice"):
        sweep.search("optimizer.lr=1e-3,3e-3,0.001")
    with pytest.raises(settings.ConfigError, match="seed=100 is that of the search"):
        sweep.trials(tmp_path, ["arm=fedavg", "seed=0,100"], tuned)


@pytest.mark.parametrize("scenario", config.options("scenario"))
def test_every_scenario_can_be_searched(tmp_path, scenario):
    ((_, tried),) = sweep.trials(tmp_path, [f"scenario={scenario}"], sweep.search("optimizer.lr=1e-3,3e-3")).items()
    for job in tried.values():
        assert not list(config.check(config.compose(job.overrides)))


def test_mistakes_of_all_runs_are_told_before_any_starts(tmp_path, capsys):
    from fedmm.flower import server_app

    with pytest.raises(settings.ConfigError, match=r"rounds must be at least 0[\s\S]*seed-0.*seed-1"):
        sweep.run(tmp_path, ["arm=fedavg", "seed=0,1", "rounds=-1"], None, at_once=1, check=server_app.plan, say=print)
    assert not any(tmp_path.iterdir())
    assert main(["sweep", str(tmp_path), "arm=fedavg,nothing"]) == 2
    assert "nothing" in capsys.readouterr().err


def test_a_run_that_fails_ends_the_sweep_with_its_last_words(tmp_path, monkeypatch):
    """The others are done, and the same command goes on with what is missing."""

    def fake(job: sweep.Job) -> bool:
        if "local" in job.name:
            job.log.parent.mkdir(parents=True, exist_ok=True)
            job.log.write_text("first\nthe disk is full\n")
            return False
        write_arm(job.path, job.name, 0, {"0": 0.5})
        return True

    monkeypatch.setattr(sweep, "_run_one", fake)
    said: list[str] = []
    with pytest.raises(FedmmError, match=r"1 of 3 runs failed.*the disk is full"):
        sweep.run(tmp_path, ["arm=fedavg,local,fedprox"], None, at_once=1, check=lambda _: None, say=said.append)
    assert sum("FAILED" in line for line in said) == 1
    assert {path.name for path in (tmp_path / "runs").glob("*/")} >= {"arm-fedavg", "arm-fedprox"}
    sweep.run(tmp_path, ["arm=fedavg,fedprox,fednano"], None, at_once=1, check=lambda _: None, say=said.append)
    assert said[-2] == "2 of 3 are done already", "more values later find what is there"


def test_a_tuned_sweep_goes_on_with_what_it_chose(tmp_path, monkeypatch):
    """Its runs hold the chosen value, which the command does not say: no reason to refuse them."""
    from fedmm.flower import server_app

    ran: list[str] = []

    def fake(job: sweep.Job) -> bool:
        cfg = config.compose(job.overrides)
        ran.append(job.name)
        write_arm(job.path, cfg.label, cfg.seed, {"0": cfg.optimizer.lr})
        (job.path / "config.yaml").write_text(OmegaConf.to_yaml(cfg))
        return len(ran) != 3 or bool(job.path.joinpath("summary.json").unlink())

    monkeypatch.setattr(sweep, "_run_one", fake)
    asked = (tmp_path, ["arm=fedavg", "seed=0,1"], sweep.search("optimizer.lr=1e-3,3e-3"))
    with pytest.raises(FedmmError):
        sweep.run(*asked, at_once=1, check=server_app.plan, say=print)
    done = sweep.run(*asked, at_once=1, check=server_app.plan, say=print)
    assert len(ran) == 5 and len(set(ran)) == 4, "two trials, two seeds, one of them again"
    assert [run.settings["optimizer.lr"] for run in done.runs] == [3e-3, 3e-3]
    sweep.run(tmp_path, ["arm=local"], asked[2], at_once=1, check=server_app.plan, say=print)
    sweep.run(tmp_path, ["arm=fedprox"], None, at_once=1, check=server_app.plan, say=print)
    known = [choice.combination for choice in records.beside(tmp_path).choices]
    assert known == [("arm=fedavg",), ("arm=local",)], "a later part keeps what an earlier one chose"
    with pytest.raises(settings.ConfigError, match="holds a run with another configuration"):
        sweep.run(asked[0], [*asked[1], "rounds=3"], asked[2], at_once=1, check=server_app.plan, say=print)


def test_a_search_goes_on_past_an_end_that_is_best(tmp_path, monkeypatch):
    """Accuracy rises with the rate for fedavg, without end, and falls for local; fedprox has its best in the middle."""

    def fake(job: sweep.Job) -> bool:
        cfg = config.compose(job.overrides)
        step = math.log2(cfg.optimizer.lr / 2e-3)
        right = {"FedAvg": 0.5 + step / 100, "local": 0.5 - step / 100, "FedProx": 0.5 - abs(step) / 100}[cfg.label]
        write_arm(job.path, cfg.label, cfg.seed, {"0": right})
        return True

    monkeypatch.setattr(sweep, "_run_one", fake)
    asked = ["arm=fedavg,local,fedprox"], sweep.search("optimizer.lr=1e-3,4e-3,2e-3")  # in whatever order
    sweep.run(tmp_path, *asked, at_once=1, check=lambda _: None, say=print)
    told = {choice.combination[0]: choice for choice in records.beside(tmp_path).choices}
    assert list(told["arm=fedavg"].tried) == ["0.001", "0.002", "0.004", "0.008", "0.016"]
    assert told["arm=fedavg"].chosen == "0.016" and told["arm=fedavg"].at_the_edge
    assert list(told["arm=local"].tried) == ["0.00025", "0.0005", "0.001", "0.002", "0.004"]
    assert list(told["arm=fedprox"].tried) == ["0.001", "0.002", "0.004"] and not told["arm=fedprox"].at_the_edge
    assert sweep.further(records.Choice("x", (), {}, {"a": 0, "c": 0, "b": 1}), 5) is None
    assert sweep.further(records.Choice("x", (), {}, {"0": 0, "1": 0, "2": 1}), 5) is None


def test_the_page_names_the_commands_that_made_its_runs(runs, tmp_path):
    for command in ("fedmm sweep one", "fedmm sweep two", "fedmm sweep one"):
        records.note(tmp_path, command=command)
    told = replace(records.load(runs), commands=records.beside(tmp_path).commands)
    page = results.write(tmp_path / "page.md", told, None, "fedmm compare").read_text()
    lines = [line for line in page.splitlines() if line.startswith("- `")]
    assert [line.split("`")[1] for line in lines] == ["fedmm compare", "fedmm sweep one", "fedmm sweep two"]


# ---- records ------------------------------------------------------------------------------------------------------


def composed_arm(path: Path, asked: list[str], own: dict[str, float]) -> Path:
    """A finished arm as a run of these overrides leaves it."""
    cfg = config.compose(asked)
    write_arm(path, cfg.label, cfg.seed, own, data=cfg.data)
    (path / "config.yaml").write_text(OmegaConf.to_yaml(cfg))
    return path


def asked_of(*overrides: str) -> dict[str, object]:
    return records.settings_of(config.compose(overrides))


@pytest.mark.parametrize("arm", config.options("arm"))
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
        choices=[records.Choice.of("optimizer.lr", ["arm=fedavg"], {"0.1": 0.5, "0.2": 0.6})],
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
    assert page(evidence.rows(twice.runs)) == page(rows_of(runs))


def test_a_run_told_of_twice_with_other_figures_is_refused(runs, tmp_path):
    records.save(tmp_path / "kept.jsonl", records.load(runs))
    write_arm(runs[0], "FedAvg", 0, {"0": 0.1, "1": 0.1})
    with pytest.raises(ValueError, match=r"FedAvg with seed 0 again, after .*avg0"):
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


@pytest.fixture
def ran(monkeypatch) -> list[str]:
    """What sweeps run, by label, rate and seed; each run ends at once, the better the higher its rate."""
    told: list[str] = []

    def fake(job: sweep.Job) -> bool:
        cfg = config.compose(job.overrides)
        told.append(f"{cfg.label} {cfg.optimizer.lr:g} {cfg.seed}")
        composed_arm(job.path, list(job.overrides), {"0": 0.5 + cfg.optimizer.lr * 10 + cfg.seed / 1000})
        return True

    monkeypatch.setattr(sweep, "_run_one", fake)
    return told


def test_what_is_known_is_not_run_again(tmp_path, ran, capsys):
    """A sweep in a new folder, given the records of an earlier one, runs what they lack, and its page is the same as if
    it had run it all."""
    tune = ["--tune", "optimizer.lr=1e-3,3e-3"]
    assert main(["sweep", str(tmp_path / "whole"), "arm=fedavg,local", "seed=0,1", *tune]) == 0
    assert main(["sweep", str(tmp_path / "part"), "arm=fedavg", "seed=0", *tune]) == 0
    known = str(tmp_path / "part" / "results.jsonl")
    ran.clear()
    asked = ["arm=fedavg,local", "seed=0,1", *tune, "--known", known]
    assert main(["sweep", str(tmp_path / "rest"), *asked]) == 0
    assert sorted(ran) == ["FedAvg 0.003 1", "local 0.001 100", "local 0.003 0", "local 0.003 1", "local 0.003 100"]
    assert "1 of 4 are known\n" in capsys.readouterr().out
    whole, rest = ((tmp_path / of / "results.md").read_text() for of in ("whole", "rest"))
    commands = [line.split("`")[1].split()[:3] for line in rest.splitlines() if line.startswith("- `")]
    assert commands == [["fedmm", "sweep", str(tmp_path / of)] for of in ("rest", "part")]
    assert whole[whole.index("\nMean") :] == rest[rest.index("\nMean") :]
    told = records.load([tmp_path / "rest"])
    assert len(told.runs) == 4, "a sweep's folder tells of what it was given too"
    assert sorted(told.commands) == sorted(records.load([tmp_path / "rest" / "results.jsonl"]).commands)
    ran.clear()
    assert main(["sweep", str(tmp_path / "again"), *asked[:-1], str(tmp_path / "rest")]) == 0
    assert not ran and len(records.load([tmp_path / "again"]).runs) == 4


def test_another_search_or_budget_is_not_known(tmp_path, ran):
    how = {"at_once": 1, "check": lambda _: None}
    said: list[str] = []
    asked, search = ["arm=fedavg", "seed=0"], sweep.search("optimizer.lr=1e-3,3e-3")
    known = sweep.run(tmp_path / "first", asked, search, say=said.append, **how)
    ran.clear()
    for number, other in enumerate(("optimizer.lr=1e-3,3e-3,9e-3", "clip_norm=1e-3,3e-3")):
        sweep.run(tmp_path / f"{number}", asked, sweep.search(other), known=known, say=said.append, **how)
        assert sum(line.endswith(" 100") for line in ran) >= 2, f"{other} is another search"
        ran.clear()
    sweep.run(tmp_path / "data", [*asked, "dataset.train=50"], search, known=known, say=said.append, **how)
    assert len(ran) == 3, "the search was on other data"
    ran.clear()
    sweep.run(tmp_path / "fixed", [*asked, "rounds=3", "optimizer.lr=3e-3"], None, known=known, say=said.append, **how)
    assert ran == ["FedAvg 0.003 0"] and "is known with rounds=8, and not with 3" in "".join(said)


def test_data_are_called_by_what_chose_them():
    assert config.compose(["scenario=function"]).data == "function"
    assert config.compose(["dataset=scenes_sites", "partition=iid"]).data == "scenes_sites, iid"
    assert config.compose(["partition=iid", "data=mine"]).data == "mine"


@pytest.mark.parametrize("arm", config.options("arm"))
def test_seeds_of_one_arm_are_one_row(tmp_path, arm):
    """As they are composed: some settings follow the seed, as a rule's own."""
    paths = []
    for seed in (0, 1):
        cfg = config.compose([f"arm={arm}", f"seed={seed}", f"run.dir={tmp_path}/{seed}"])
        paths.append(write_arm(tmp_path / str(seed), cfg.label, seed, {"0": 0.5}))
        (paths[-1] / "config.yaml").write_text(OmegaConf.to_yaml(cfg))
    assert [len(row.by_seed) for row in rows_of(paths)] == [2, 2]
    other = config.compose([f"arm={arm}", "seed=2", "dataset.seed=5"])
    paths.append(write_arm(tmp_path / "2", other.label, 2, {"0": 0.5}))
    (paths[-1] / "config.yaml").write_text(OmegaConf.to_yaml(other))
    with pytest.raises(ValueError, match=r"differ in dataset.seed"):
        rows_of(paths)


def test_over_a_setting_each_value_has_its_own_partner(tmp_path):
    runs = [
        write_arm(tmp_path / f"{label}{rank}", f"{label}, edge.rank={rank}", 0, {"0": right + rank / 100})
        for rank in (4, 8)
        for label, right in (("FedAvg", 0.6), ("local", 0.5))
    ]
    rows = rows_of(runs)
    assert evidence.against([row.label for row in rows], None) == "FedAvg"
    for rank in (4, 8):
        assert cell(rows, f"FedAvg, edge.rank={rank}", "own - local") == "+10.0 ¹"
        assert cell(rows, f"local, edge.rank={rank}", "own - FedAvg") == "-10.0 ¹"
    assert evidence.against([row.label for row in rows if "local" in row.label], None) == "local, edge.rank=4"
    gains = table.by_client(rows).splitlines()
    assert gains[2] == "| domain | FedAvg, edge.rank=4 | +10.0 ¹ |"


def test_a_sweep_refuses_what_its_table_could_not_tell_apart(tmp_path):
    with pytest.raises(settings.ConfigError, match="no compare"):
        sweep.jobs(tmp_path, ["arm=fedavg", "compare=[local]"])
    with pytest.raises(settings.ConfigError, match="are both called"):
        sweep.run(tmp_path, ["arm=fedavg,fedprox", "label=mine"], None, at_once=1, check=lambda _: None, say=print)
