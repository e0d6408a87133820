"""How a sweep is planned: combinations, labels, searches, and what is known already; runs end at once here."""

from __future__ import annotations

import fcntl
import math
import subprocess
import sys

import pytest
from finished import composed_arm, write_arm
from omegaconf import OmegaConf

from fedmm.cli import main
from fedmm.config import composition, settings
from fedmm.runs import records
from fedmm.sweep import plan, runner
from fedmm.types import FedmmError


def test_hydra_reads_the_axes():
    found = composition.axes(
        ["arm=fedavg,local", "seed=range(0,3)", "compare=[local,fedavg]", "dataset.kinds=[sum],[read,sum]"]
    )
    assert found == {
        "arm": ("fedavg", "local"), "seed": ("0", "1", "2"), "compare": ("[local,fedavg]",),
        "dataset.kinds": ("[sum]", "[read,sum]"),
    }  # fmt: skip
    with pytest.raises(settings.ConfigError, match="cannot be read"):
        composition.axes(["arm=[fedavg"])


def test_every_combination_is_a_run_with_a_label_of_its_own(tmp_path):
    made = plan.jobs(tmp_path, ["arm=fedavg,local", "seed=0,1", "edge.rank=4,8"])
    assert len({job.path for job in made}) == len(made) == 8
    labels = {composition.compose(job.overrides).label for job in made}
    assert labels == {"FedAvg, edge.rank=4", "FedAvg, edge.rank=8", "local, edge.rank=4", "local, edge.rank=8"}
    (one,) = plan.jobs(tmp_path, ["arm=fedavg", "rounds=3"])
    assert composition.compose(one.overrides).label == "FedAvg" and one.name == "arm-fedavg"
    assert one.overrides[:2] == ("arm=fedavg", "rounds=3") and len(one.overrides) == 3, "each once, and where"


def test_settings_that_make_other_data_name_the_data(tmp_path):
    made = plan.jobs(tmp_path, ["arm=fedavg", "dataset.train=100,200", "clients=2,3", "edge.rank=4,8"])
    cfgs = [composition.compose(job.overrides) for job in made]
    assert {cfg.label for cfg in cfgs} == {f"FedAvg, edge.rank={r}" for r in (4, 8)}
    assert {cfg.data for cfg in cfgs} == {
        f"dirichlet, clients={clients}, dataset.train={train}" for train in (100, 200) for clients in (2, 3)
    }
    other = plan.jobs(tmp_path, ["edge.rank=4,8", "clients=2,3", "dataset.train=100,200", "arm=fedavg"])
    assert {job.path for job in other} == {job.path for job in made}, "in whatever order it was asked"
    (one,) = plan.jobs(tmp_path, ["dataset.train=100,200", "data=mine", "label=x", "arm=fedavg"])[:1]
    assert composition.compose(one.overrides).data == "mine"


def test_the_search_is_on_validation_with_its_own_seed_and_takes_the_best(tmp_path):
    tuned = plan.search("optimizer.lr=1e-3,3e-3,9e-3")
    cells = plan.trials(tmp_path, ["arm=fedavg", "seed=0,1", "evaluate.every=1"], tuned)
    ((cell_, tried),) = cells.items()
    assert cell_ == ("arm=fedavg", "evaluate.every=1"), "the seeds that are reported take no part"
    for job in tried.values():
        cfg = composition.compose(job.overrides)
        assert (cfg.evaluate.split, cfg.seed, cfg.evaluate.every) == ("validation", plan.TUNING_SEED, 0)
    for job, right in zip(tried.values(), (0.4, 0.6, 0.6), strict=True):
        write_arm(job.path, "FedAvg", plan.TUNING_SEED, {"0": right, "1": right})
    found = {value: runner.accuracy(job) for value, job in tried.items()}
    assert plan.best(found) == "0.003" and plan.further(found, 5) is None, "of equal ones the first"
    final = plan.jobs(tmp_path, ["arm=fedavg", "seed=0,1"], lambda cell: ["optimizer.lr=3e-3"])
    assert [composition.compose(job.overrides).optimizer.lr for job in final] == [3e-3, 3e-3]
    with pytest.raises(settings.ConfigError, match="gives one value"):
        plan.search("optimizer.lr=1e-3")
    with pytest.raises(settings.ConfigError, match="gives 0.001 twice"):
        plan.search("optimizer.lr=1e-3,3e-3,0.001")
    with pytest.raises(settings.ConfigError, match="seed=100 is reserved for the search"):
        plan.trials(tmp_path, ["arm=fedavg", "seed=0,100"], tuned)


@pytest.mark.parametrize("scenario", composition.options("scenario"))
def test_every_scenario_can_be_searched(tmp_path, scenario):
    ((_, tried),) = plan.trials(tmp_path, [f"scenario={scenario}"], plan.search("optimizer.lr=1e-3,3e-3")).items()
    for job in tried.values():
        assert not list(composition.check(composition.compose(job.overrides)))


@pytest.mark.run
def test_mistakes_of_all_runs_are_told_before_any_starts(tmp_path, capsys):
    from fedmm.flower import server_app

    with pytest.raises(settings.ConfigError, match=r"rounds must be at least 0[\s\S]*seed-0.*seed-1"):
        runner.run(tmp_path, ["arm=fedavg", "seed=0,1", "rounds=-1"], None, at_once=1, check=server_app.plan, say=print)
    assert not any(tmp_path.iterdir())
    assert main(["sweep", str(tmp_path), "arm=fedavg,nothing"]) == 2
    assert "nothing" in capsys.readouterr().err


@pytest.mark.run
def test_a_run_that_fails_ends_the_sweep_with_its_last_words(tmp_path, monkeypatch):
    """The others are done, and the same command goes on with what is missing."""

    def fake(job: plan.Job) -> bool:
        if "local" in job.name:
            job.log.parent.mkdir(parents=True, exist_ok=True)
            job.log.write_text("first\nthe disk is full\n")
            return False
        write_arm(job.path, job.name, 0, {"0": 0.5})
        return True

    monkeypatch.setattr(runner, "_run_one", fake)
    said: list[str] = []
    with pytest.raises(FedmmError, match=r"1 of 3 runs failed.*the disk is full"):
        runner.run(tmp_path, ["arm=fedavg,local,fedprox"], None, at_once=1, check=lambda _: None, say=said.append)
    assert sum("FAILED" in line for line in said) == 1
    assert {path.name for path in (tmp_path / "runs").glob("*/")} >= {"arm-fedavg", "arm-fedprox"}
    runner.run(tmp_path, ["arm=fedavg,fedprox,fednano"], None, at_once=1, check=lambda _: None, say=said.append)
    assert said[-2] == "2 of 3 runs are already done", "more values later find what is there"


def test_what_a_killed_sweep_left_running_is_waited_for(tmp_path):
    """From its first moment, before it has read its command: what holds the log is the process itself."""
    (job,) = plan.jobs(tmp_path / "runs", ["arm=fedavg"])
    job.path.mkdir(parents=True)
    finish = f"import pathlib, time; time.sleep(1); pathlib.Path({str(job.path / 'summary.json')!r}).write_text('{{}}')"
    with job.log.open("a") as log:
        fcntl.flock(log, fcntl.LOCK_EX)
        left = subprocess.Popen([sys.executable, "-c", finish], stdout=log, stderr=subprocess.STDOUT)
    assert not job.done
    assert runner._run_one(job), "the one that was there came to its end, and no other began"
    assert left.wait() == 0 and job.log.read_text() == ""


@pytest.mark.run
def test_a_tuned_sweep_goes_on_with_what_it_chose(tmp_path, monkeypatch):
    """Its runs hold the chosen value, which the command does not say: no reason to refuse them."""
    from fedmm.flower import server_app

    ran: list[str] = []

    def fake(job: plan.Job) -> bool:
        cfg = composition.compose(job.overrides)
        ran.append(job.name)
        write_arm(job.path, cfg.label, cfg.seed, {"0": cfg.optimizer.lr})
        (job.path / "config.yaml").write_text(OmegaConf.to_yaml(cfg))
        return len(ran) != 3 or bool(job.path.joinpath("summary.json").unlink())

    monkeypatch.setattr(runner, "_run_one", fake)
    asked = (tmp_path, ["arm=fedavg", "seed=0,1"], plan.search("optimizer.lr=1e-3,3e-3"))
    with pytest.raises(FedmmError):
        runner.run(*asked, at_once=1, check=server_app.plan, say=print)
    done = runner.run(*asked, at_once=1, check=server_app.plan, say=print)
    assert len(ran) == 5 and len(set(ran)) == 4, "two trials, two seeds, one of them again"
    assert [run.settings["optimizer.lr"] for run in done.runs] == [3e-3, 3e-3]
    runner.run(tmp_path, ["arm=local"], asked[2], at_once=1, check=server_app.plan, say=print)
    runner.run(tmp_path, ["arm=fedprox"], None, at_once=1, check=server_app.plan, say=print)
    known = [choice.combination for choice in records.noted(tmp_path).choices]
    assert known == [("arm=fedavg",), ("arm=local",)], "a later part keeps what an earlier one chose"
    with pytest.raises(settings.ConfigError, match="holds a run with another configuration"):
        runner.run(asked[0], [*asked[1], "rounds=3"], asked[2], at_once=1, check=server_app.plan, say=print)


@pytest.mark.run
def test_a_search_goes_on_past_an_end_that_is_best(tmp_path, monkeypatch):
    """Accuracy rises with the rate for fedavg, without end, and falls for local; fedprox has its best in the middle."""

    def fake(job: plan.Job) -> bool:
        cfg = composition.compose(job.overrides)
        step = math.log2(cfg.optimizer.lr / 2e-3)
        right = {"FedAvg": 0.5 + step / 100, "local": 0.5 - step / 100, "FedProx": 0.5 - abs(step) / 100}[cfg.label]
        write_arm(job.path, cfg.label, cfg.seed, {"0": right})
        return True

    monkeypatch.setattr(runner, "_run_one", fake)
    asked = ["arm=fedavg,local,fedprox"], plan.search("optimizer.lr=1e-3,4e-3,2e-3")  # in whatever order
    runner.run(tmp_path, *asked, at_once=1, check=lambda _: None, say=print)
    told = {choice.combination[0]: choice for choice in records.noted(tmp_path).choices}
    assert list(told["arm=fedavg"].tried) == ["0.001", "0.002", "0.004", "0.008", "0.016"]
    assert told["arm=fedavg"].chosen == "0.016" and told["arm=local"].chosen == "0.00025"
    assert told["arm=fedavg"].at_the_edge and not told["arm=fedprox"].at_the_edge
    assert list(told["arm=local"].tried) == ["0.00025", "0.0005", "0.001", "0.002", "0.004"]
    assert list(told["arm=fedprox"].tried) == ["0.001", "0.002", "0.004"] and told["arm=fedprox"].chosen == "0.002"
    assert plan.further({"a": 0, "c": 0, "b": 1}, 5) is None and plan.further({"0": 0, "1": 0, "2": 1}, 5) is None


@pytest.mark.run
def test_one_value_for_all_scenarios_is_the_best_on_average(tmp_path, monkeypatch):
    """Each scenario by itself would take another; what is known of one is not tried again."""
    right = {"domain": (0.5, 0.6, 0.8), "function": (0.5, 0.6, 0.1)}
    rates = (1e-3, 3e-3, 9e-3)
    ran: list[str] = []

    def fake(job: plan.Job) -> bool:
        cfg = composition.compose(job.overrides)
        ran.append(f"{cfg.data} {cfg.optimizer.lr:g} {cfg.seed}")
        composed_arm(job.path, list(job.overrides), {"0": right[cfg.data][rates.index(cfg.optimizer.lr)]})
        return True

    monkeypatch.setattr(runner, "_run_one", fake)
    how = {"at_once": 1, "check": lambda _: None, "say": print}
    asked, tune = ["arm=fedavg", "scenario=domain,function"], "optimizer.lr=1e-3,3e-3,9e-3"
    tried = dict(zip(("0.001", "0.003", "0.009", "0.027"), (*right["domain"], 0.2), strict=True))
    choice = records.Choice.of("optimizer.lr", ["arm=fedavg", "scenario=domain"], tried, "0.009")
    known = records.Records(choices=[choice])
    made = runner.run(tmp_path / "one", asked, plan.search(tune, "scenario"), known=known, **how)
    assert ran == [
        "function 0.001 100",
        "function 0.003 100",
        "function 0.009 100",
        "domain 0.003 0",
        "function 0.003 0",
    ]
    assert [(choice.chosen, max(choice.tried.values())) for choice in made.choices] == [("0.003", 0.8), ("0.003", 0.6)]
    ran.clear()
    alone = runner.run(tmp_path / "each", ["arm=fedavg", "scenario=domain"], plan.search(tune), known=known, **how)
    assert alone.choices[0].chosen == "0.009" and list(alone.choices[0].tried) == ["0.001", "0.003", "0.009", "0.027"]
    assert ran == ["domain 0.009 0"], "it goes on past the end that is best, to what is known"
    with pytest.raises(settings.ConfigError, match="--tune-across method must name settings that this sweep overrides"):
        runner.run(tmp_path / "x", asked, plan.search(tune, "method"), **how)
    with pytest.raises(settings.ConfigError, match="--tune-across seed"):
        runner.run(tmp_path / "x", [*asked, "seed=0,1"], plan.search(tune, "seed"), **how)
    with pytest.raises(settings.ConfigError, match="needs a setting to choose; add --tune"):
        plan.search(None, "scenario")


@pytest.fixture
def ran(monkeypatch) -> list[str]:
    """What sweeps run, by label, rate and seed; each run ends at once, the better the higher its rate."""
    told: list[str] = []

    def fake(job: plan.Job) -> bool:
        cfg = composition.compose(job.overrides)
        told.append(f"{cfg.label} {cfg.optimizer.lr:g} {cfg.seed}")
        composed_arm(job.path, list(job.overrides), {"0": 0.5 + cfg.optimizer.lr * 10 + cfg.seed / 1000})
        return True

    monkeypatch.setattr(runner, "_run_one", fake)
    return told


@pytest.mark.run
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
    assert "1 of 4 runs are in --known\n" in capsys.readouterr().out
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


@pytest.mark.run
def test_another_search_or_budget_is_not_known(tmp_path, ran):
    how = {"at_once": 1, "check": lambda _: None}
    said: list[str] = []
    asked, search = ["arm=fedavg", "seed=0"], plan.search("optimizer.lr=1e-3,3e-3")
    known = runner.run(tmp_path / "first", asked, search, say=said.append, **how)
    ran.clear()
    for number, other in enumerate(("optimizer.lr=1e-3,3e-3,9e-3", "clip_norm=1e-3,3e-3")):
        runner.run(tmp_path / f"{number}", asked, plan.search(other), known=known, say=said.append, **how)
        assert sum(line.endswith(" 100") for line in ran) >= 2, f"{other} is another search"
        ran.clear()
    runner.run(tmp_path / "data", [*asked, "dataset.train=50"], search, known=known, say=said.append, **how)
    assert len(ran) == 3, "the search was on other data"
    ran.clear()
    runner.run(tmp_path / "fixed", [*asked, "rounds=3", "optimizer.lr=3e-3"], None, known=known, say=said.append, **how)
    assert ran == ["FedAvg 0.003 0"] and "has rounds=8 there, and 3 here" in "".join(said)


@pytest.mark.run
def test_a_scenario_that_comes_later_may_change_what_is_chosen(tmp_path, monkeypatch):
    """Others run, and those of the former value leave the table, other seeds' too; where it is chosen again they are
    done. What differs in more than the value is refused."""
    from fedmm.flower import server_app

    right = {"domain": (0.5, 0.8), "function": (0.9, 0.1)}
    ran: list[str] = []

    def fake(job: plan.Job) -> bool:
        cfg = composition.compose(job.overrides)
        ran.append(f"{cfg.data} {cfg.optimizer.lr:g} {cfg.seed}")
        composed_arm(job.path, list(job.overrides), {"0": right[cfg.data][(1e-3, 3e-3).index(cfg.optimizer.lr)]})
        return True

    monkeypatch.setattr(runner, "_run_one", fake)
    said: list[str] = []
    how = {"at_once": 1, "check": server_app.plan, "say": said.append}
    search = plan.search("optimizer.lr=1e-3,3e-3", "scenario")
    runner.run(tmp_path, ["arm=fedavg", "scenario=domain", "seed=0,1"], search, **how)
    assert ran[2:] == ["domain 0.003 0", "domain 0.003 1"]
    both = ["arm=fedavg", "scenario=domain,function", "seed=0"]
    made = runner.run(tmp_path, both, search, **how)
    assert ran[6:] == ["domain 0.001 0", "function 0.001 0"]
    assert [run.settings["optimizer.lr"] for run in made.runs] == [1e-3, 1e-3]
    told = records.load([tmp_path])
    assert {run.settings["optimizer.lr"] for run in told.runs} == {1e-3} and len(told.runs) == 2
    assert {choice.chosen for choice in told.choices} == {"0.001"}
    ran.clear()
    runner.run(tmp_path, ["arm=fedavg", "scenario=domain", "seed=0"], search, **how)
    assert not ran and {run.settings["optimizer.lr"] for run in records.load([tmp_path]).runs} == {1e-3, 3e-3}
    runner.run(tmp_path, both, search, **how)
    assert not ran and {run.settings["optimizer.lr"] for run in records.load([tmp_path]).runs} == {1e-3}
    with pytest.raises(settings.ConfigError, match="holds a run with another configuration"):
        runner.run(tmp_path, [*both, "rounds=3"], search, **how)


@pytest.mark.run
def test_a_search_ends_before_a_value_that_cannot_be(tmp_path, ran):
    """Half an epoch is none, and a momentum above 1 the rule refuses: the sweep goes on with what there is."""
    assert plan.further({"1": 0.9, "2": 0.5, "4": 0.1}, 5) is None
    assert plan.further({"1": 0.1, "2": 0.5, "4": 0.9}, 5) == ("1", "2", "4", "8")

    def check(asked: list[str]) -> None:
        if (rate := composition.compose(asked).optimizer.lr) > 0.01:
            raise ValueError(f"{rate} is too high")

    search = plan.search("optimizer.lr=1e-3,3e-3,9e-3")
    made = runner.run(tmp_path, ["arm=fedavg"], search, at_once=1, check=check, say=print)
    assert [choice.chosen for choice in made.choices] == ["0.009"] and ran[-1] == "FedAvg 0.009 0"


@pytest.mark.run
def test_what_is_searched_cannot_be_given_too(tmp_path):
    search = plan.search("optimizer.lr=1e-3,3e-3")
    for given in ("optimizer.lr=1e-3,3e-3", "++optimizer.lr=5e-3"):
        with pytest.raises(settings.ConfigError, match="optimizer.lr is set by --tune and by optimizer.lr=...; remove"):
            runner.run(tmp_path, ["arm=fedavg", given], search, at_once=1, check=lambda _: None, say=print)


@pytest.mark.run
def test_a_sweep_keeps_what_it_was_given_through_its_later_parts(tmp_path, ran):
    how = {"at_once": 1, "check": lambda _: None, "say": print}
    known = runner.run(tmp_path / "first", ["arm=fedavg,fedprox"], None, **how)
    runner.run(tmp_path / "next", ["arm=fedavg,fedprox"], None, known=known, **how)
    runner.run(tmp_path / "next", ["arm=local"], None, **how)
    assert len(ran) == 3, "two at first, one more"
    told = records.load([tmp_path / "next"]).runs
    assert sorted(run.summary["label"] for run in told) == ["FedAvg", "FedProx", "local"]


def test_data_are_called_by_what_chose_them():
    assert composition.compose(["scenario=function"]).data == "function"
    assert composition.compose(["dataset=scenes_sites", "partition=iid"]).data == "scenes_sites, iid"
    assert composition.compose(["partition=iid", "data=mine"]).data == "mine"


@pytest.mark.run
def test_a_sweep_refuses_what_its_table_could_not_tell_apart(tmp_path):
    with pytest.raises(settings.ConfigError, match="cannot use compare"):
        plan.jobs(tmp_path, ["arm=fedavg", "compare=[local]"])
    with pytest.raises(settings.ConfigError, match="both have the label"):
        runner.run(tmp_path, ["arm=fedavg,fedprox", "label=mine"], None, at_once=1, check=lambda _: None, say=print)


@pytest.mark.run
def test_a_search_ends_before_a_value_whose_run_fails(tmp_path, monkeypatch):
    """Where it went on by itself, as training that diverges has no figure; a value that was asked for must have one."""

    def fake(job: plan.Job) -> bool:
        cfg = composition.compose(job.overrides)
        if cfg.optimizer.lr > 0.01:
            return False
        composed_arm(job.path, list(job.overrides), {"0": 0.5 + cfg.optimizer.lr})
        return True

    monkeypatch.setattr(runner, "_run_one", fake)
    said: list[str] = []
    how = {"at_once": 1, "check": lambda _: None, "say": said.append}
    asked = ["arm=fedavg", "scenario=domain,function"]
    for folder in (tmp_path / "a", tmp_path / "a", tmp_path / "b"):
        across = "scenario" if folder.name == "b" else None
        made = runner.run(folder, asked, plan.search("optimizer.lr=1e-3,3e-3,9e-3", across), **how)
        assert {choice.chosen for choice in made.choices} == {"0.009"} and len(made.runs) == 2
    assert "the search stops before a value whose run failed" in "".join(said)
    with pytest.raises(FedmmError, match="2 of 6 runs failed"):
        runner.run(tmp_path / "c", asked, plan.search("optimizer.lr=1e-3,3e-3,2e-2"), **how)


@pytest.mark.run
def test_a_setting_that_others_follow_can_be_searched_again(tmp_path, monkeypatch):
    """stack's rank follows edge.rank: a run of another rank differs from the one asked in both."""
    right = {"domain": (0.5, 0.8), "function": (0.9, 0.1)}

    def fake(job: plan.Job) -> bool:
        cfg = composition.compose(job.overrides)
        composed_arm(job.path, list(job.overrides), {"0": right[cfg.data][(4, 8).index(cfg.edge.rank)]})
        return True

    monkeypatch.setattr(runner, "_run_one", fake)
    how = {"at_once": 1, "check": lambda _: None, "say": print}
    search = plan.search("edge.rank=4,8", "scenario")
    asked = ["method=lora", "rule=stack"]
    assert composition.compose([*asked, "edge.rank=8"]).rule.rank == 8, "else this shows nothing"
    runner.run(tmp_path, [*asked, "scenario=domain"], search, **how)
    runner.run(tmp_path, [*asked, "scenario=domain,function"], search, **how)
    assert {run.settings["edge.rank"] for run in records.load([tmp_path]).runs} == {4}


@pytest.mark.run
def test_what_was_asked_last_is_what_a_folder_tells(tmp_path, ran):
    """Also where it is known, and the folder has run the same arm with other settings: page and comparison agree."""
    how = {"at_once": 1, "check": lambda _: None, "say": print}
    asked = ["arm=fedavg", "seed=0,1"]
    known = runner.run(tmp_path / "known", asked, None, **how)
    runner.run(tmp_path / "sweep", [*asked, "rounds=20"], None, **how)
    runner.run(tmp_path / "sweep", asked, None, known=known, **how)
    assert [run.settings["rounds"] for run in records.load([tmp_path / "sweep"]).runs] == [8, 8]


@pytest.mark.run
def test_a_search_that_stopped_leaves_no_mixture(tmp_path, monkeypatch):
    """Known runs of a value that is chosen no more are out of the table before the first of another is in."""
    right = {"domain": (0.5, 0.8), "function": (0.9, 0.1)}
    finals: list[str] = []

    def fake(job: plan.Job) -> bool:
        cfg = composition.compose(job.overrides)
        if cfg.seed != plan.TUNING_SEED:
            finals.append(job.name)
            if len(finals) == 4:
                raise KeyboardInterrupt
        composed_arm(job.path, list(job.overrides), {"0": right[cfg.data][(1e-3, 3e-3).index(cfg.optimizer.lr)]})
        return True

    monkeypatch.setattr(runner, "_run_one", fake)
    how = {"at_once": 1, "check": lambda _: None, "say": print}
    search = plan.search("optimizer.lr=1e-3,3e-3", "scenario")
    known = runner.run(tmp_path / "known", ["arm=fedavg,fedprox", "scenario=domain"], search, **how)
    asked = ["arm=fedavg,fedprox", "scenario=domain,function"]
    runner.run(tmp_path / "sweep", [*asked[:1], "scenario=domain"], search, known=known, **how)
    with pytest.raises(KeyboardInterrupt):
        runner.run(tmp_path / "sweep", asked, search, known=known, **how)
    assert {run.settings["optimizer.lr"] for run in records.load([tmp_path / "sweep"]).runs} == {1e-3}


def test_a_client_that_a_trial_lost_counts_as_wrong(tmp_path):
    (job,) = plan.jobs(tmp_path, ["arm=fedavg"])
    write_arm(job.path, "FedAvg", 0, {"0": 0.9}, unscored=[1, 2])
    assert runner.accuracy(job) == pytest.approx(0.3)


def test_values_that_differ_in_odd_characters_have_folders_of_their_own(tmp_path):
    made = plan.jobs(tmp_path, ["arm=fedavg_llm", "inner.targets=[q_proj,v_proj],[q_proj-v_proj]"])
    assert len({job.path for job in made}) == 2 and all(set(" ,[]=") & set(job.name) == set() for job in made)


@pytest.mark.parametrize("asked", [["seed=0", "seed=1"], ["++seed=0,1"], ["arm=fedavg", "+arm=local"]])
def test_a_key_is_given_once_and_the_seed_by_its_name(asked):
    with pytest.raises(settings.ConfigError, match=r"given twice|write seed="):
        composition.axes(asked)
