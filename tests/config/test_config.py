"""Every yaml composes and binds; every mistake is named with the knob to turn, all at once, before anything starts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from helpers import every
from omegaconf import OmegaConf

from fedmm.aggregate import lowrank
from fedmm.config import composition, targets
from fedmm.config.composition import check, compose, load, options
from fedmm.config.settings import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from fedmm.types import Update

CHOICES = [(group, name) for group in composition.groups() for name in options(group)]

OF_LONG_TAILS = {
    "balanced_tuning", "creff", "fedavg_pretrained", "mllmfl", "mllmfl_at_server", "mllmfl_not_pretrained",
    "mllmfl_unlabelled", "mllmfl_oracle", "fedavg_distilled", "private_head",
}  # fmt: skip
CREFF = {("schema", "creff")}


@pytest.mark.parametrize(("group", "name"), CHOICES)
def test_every_yaml_of_every_group_composes_and_binds(group, name):
    extra = {("rule", "fisher"): ["method=fednano"], ("schema", "feddpa"): ["arm=feddpa"]}.get((group, name), [])
    extra += [f"rule={'creff' if name == 'creff' else 'mean'}"] if group == "method" else []
    extra += ["llm.where=client"] if group == "inner" else []
    extra += ["compact=resnet8"] if group == "pretrain" else []
    extra += ["scenario=long_tail"] if name in OF_LONG_TAILS and group != "rule" else []
    extra += ["arm=creff"] if (group, name) in CREFF else []
    assert list(check(compose([f"{group}={name}", *extra]))) == []


def test_every_group_is_in_the_table_of_contents():
    text = (composition.folder() / "config.yaml").read_text()
    assert all(f"- {group}:" in text for group in composition.groups())


def test_the_default_is_fednano_with_fisher():
    cfg = load()
    assert cfg.label == "FedNano" and cfg.clients == 5
    assert cfg.rule["_target_"].endswith("fisher") and cfg.method.fisher is not None


def test_a_method_chosen_by_hand_names_itself():
    assert load(["method=fedprox", "rule=mean"]).label == "fedprox+mean"
    assert load(["method=fedprox", "rule=mean", "label=mine"]).label == "mine"


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("ronds=3", r"(?s)ronds.*available options.*rounds.*did you mean rounds\?"),
        ("lr=1e-3", r"(?s)did you mean optimizer\.lr\?"),
        ("arm=fedat", r"(?s)did you mean feddat"),
        ("arm=fedavg,feddat", r"(?s)several values are for fedmm sweep"),
        ("link.los=client", r"(?s)los.*available options in link.*loss"),
        ("method=fednanu", r"(?s)fednanu.*fednano"),
        ("rule=average", r"(?s)average.*mean"),
        ("nonsense=1", r"(?s)nonsense.*available options"),
        ("rounds=three", "three"),
        ("clients=2.5", "2.5"),
        ("rounds", "rounds"),
    ],
)
def test_an_unknown_override_and_a_wrong_type_name_what_is_there(override, says):
    with pytest.raises(ConfigError, match=says):
        load([override])


def test_a_wrong_yaml_is_named_and_not_composed_again(tmp_path, monkeypatch):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "wrong.yaml").write_text("defaults:\n  - override /nothing: there\n")
    monkeypatch.setenv("FEDMM_CONF", str(tmp_path))
    with pytest.raises(ConfigError, match="In 'experiment/wrong': Could not override 'nothing"):
        load(["experiment=wrong"])


def test_an_arm_tells_all_that_it_is_in_its_own_file(tmp_path, monkeypatch):
    """Else what a compared arm sets could not be told from what was asked for."""
    (tmp_path / "arm").mkdir()
    (tmp_path / "arm" / "mine.yaml").write_text("# @package _global_\ndefaults:\n  - feddat\nlabel: mine\n")
    monkeypatch.setenv("FEDMM_CONF", str(tmp_path))
    with pytest.raises(ConfigError, match=r"mine.yaml stands on feddat; name in it what that one chooses"):
        composition.arms(compose(["compare=[mine]"]), ["compare=[mine]"])


def test_the_options_named_are_those_of_what_was_chosen():
    with pytest.raises(ConfigError, match=r"(?s)available options in method.step: mu, use\ndid you mean mu\?$"):
        load(["method=fedprox", "rule=mean", "method.step.m=0.1"])


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["rule.floor=low"], "rule.floor must be float, got 'low'"),
        (["rule=mean", "rule.weights=heavy"], "rule.weights must be"),
        (["+rule.flor=1"], "rule.flor is unknown to fedmm.aggregate.fisher.fisher; available options: .*floor"),
        (["optimizer.lr=fast"], "optimizer.lr must be"),
        (["clients=0"], "clients must be at least 1"),
        (["clients_per_round=9"], "clients_per_round must be from 1 to clients=5"),
        (["link.loss=server"], "link.loss must be auto or client"),
        (["compare=[fedavg,fedmagic]"], "compare names 'fedmagic'; available options: .*fedavg"),
        (
            ["arm=fedavg", "rule=krum", "clients=4"],
            "rule.byzantine=1 needs at least 5 clients in a round, got 4; lower",
        ),
        (
            ["arm=fedavg", "rule=fisher"],
            "client 0 sent none; set method=fednano",
        ),
        (["arm=fedavg", "rule=trimmed_mean", "rule.trim=3"], "rule.trim=3 must leave one of 5 clients in a round"),
        (["arm=fedavg", "rule=fedadam", "rule.lr=0"], "rule.lr must be above 0, got 0"),
        (["arm=fedavg", "edge.ranks=[4,16]"], "one rank; set edge.ranks=null, or rule=hetlora"),
        (["arm=fedavg", "edge.ranks=[4,16]", "clients_per_round=1"], "one rank; set edge.ranks=null"),
        (["arm=hetlora", "edge.ranks=[4,32]"], "edge.ranks must be from 1 to edge.rank=16, the server's, got"),
        (["arm=hetlora", "edge.ranks=[]"], "edge.ranks must be from 1"),
        (["arm=ffa_lora", "rule=exact_lowrank"], "'image.up' travels without its other factor; set schema=all"),
        (["arm=feddpa", "rounds=1"], "method.step.tune=1 must be from 0 to below rounds=1"),
        (["arm=fedavg", "schema=feddpa"], "'method.step.tune' not found"),
        (["method.use=[local]"], "method.use="),
        (["evaluate.split=train"], "evaluate.split must be"),
        (["rule._target_=os.system"], "rule._target_=os.system is not allowed; conf/ names .*fisher.fisher.* there"),
        (["rule._target_=fedmm.aggregate.mean.median"], "is not allowed"),
        (["link.deadline_seconds=0"], "link.deadline_seconds must be at least 1"),
        (["edge.rank=0"], "edge.rank must be at least 1"),
        (["inner=lora"], "inner trains inside the LLM, .*; set llm.where=client, or inner=none"),
        (["llm.where=client", "inner=lora", "inner.rank=0"], "inner.rank must be at least 1, got 0; inner=none"),
        (["llm.where=client", "inner=bottleneck", "+inner.alpha=8"], "inner.alpha is unknown to"),
        (["llm.where=here"], "llm.where must be .*'server', 'client'.*, got 'here'"),
        (["llm.where=client", "edge.rank=0"], "edge.rank must be at least 1 where nothing trains inside the LLM"),
        (["edge.lora.rank=-1"], "edge.lora.rank must be at least 0"),
        (["schedule=linear"], "schedule must be constant or cosine"),
        (["clip_norm=0"], "clip_norm must be above 0, or null"),
        (["evaluate.batch_size=0"], "evaluate.batch_size must be at least 1"),
        (["method.use=[]"], "method.use"),
        (["link.bind=0.0.0.0:9443"], "needs link.address"),
        (["rule._target_=fedmm.tree"], "is not allowed"),
        (
            ["+optimizer.params=[{_target_:os.makedirs,name:/tmp/no}]"],
            r"optimizer.params\[0\] takes no _target_, got os.makedirs",
        ),
        (["+rule._args_=[1]"], "name the arguments"),
    ],
)
def test_what_cannot_be_is_refused_with_the_knob(overrides, says):
    with pytest.raises(ConfigError, match=says):
        load(overrides)


def test_every_mistake_is_reported_at_once():
    with pytest.raises(ConfigError) as caught:
        load(["clients=0", "link.loss=server", "rule.floor=low", "compare=[nobody]"])
    assert len(str(caught.value).splitlines()) >= 4
    with pytest.raises(ConfigError, match=r"(?s)link.loss must be.*travels without its other factor"):
        load(["link.loss=server", "arm=ffa_lora", "rule=exact_lowrank"])


def test_a_site_may_allow_targets_of_its_own(monkeypatch):
    overrides = ["rule=mean", "rule._target_=operator.add", "~rule.weights"]
    for wrong in ("", "operator", "operator.ad", "perator.", "os."):
        monkeypatch.setenv("FEDMM_ALLOW_TARGETS", wrong)
        with pytest.raises(ConfigError, match="not allowed"):
            compose(overrides)
    for right in ("operator.", "os.,operator.add"):
        monkeypatch.setenv("FEDMM_ALLOW_TARGETS", right)
        assert compose(overrides).rule["_target_"] == "operator.add"
    for own, says in (("operator.nothing", "does not exist"), ("fedmm.tree", "wanted a function")):
        monkeypatch.setenv("FEDMM_ALLOW_TARGETS", own)
        with pytest.raises(ConfigError, match=says):
            load(["rule=mean", f"rule._target_={own}"])


def folds(current: lowrank.Folded, updates: object, memory: object) -> tuple[object, object]:
    """A site's own rule: what it does to the base is told by its signature, not by its name."""
    return current, memory


def folds_unread(current: lowrank.Folded, updates: Iterable[Update], memory: object) -> tuple[object, object]:
    """One whose module imports some of its types for a type checker alone."""
    return current, memory


@pytest.mark.parametrize("rule", [folds, folds_unread])
def test_a_rule_of_a_site_is_known_by_its_signature(monkeypatch, rule):
    monkeypatch.setenv("FEDMM_ALLOW_TARGETS", f"{__name__}.")
    (said,) = check(compose(["arm=feddat", "rule=mean", f"rule._target_={__name__}.{rule.__name__}", "~rule.weights"]))
    assert f"rule={rule.__name__} folds products into the base, on which method.sets" in said.text


def test_a_target_is_looked_at_before_it_is_called():
    from omegaconf import OmegaConf

    with pytest.raises(ConfigError, match="named by no file of conf/"):
        targets.make(OmegaConf.create({"_target_": "fedmm.aggregate.mean.mean", "weights": {"_target_": "os.getcwd"}}))


def test_one_scalar_carries_a_whole_command_line():
    overrides = composition.split(
        """rounds=2 'llm.prompt="<image> {question}"' compare=[local,fedavg] run.dir=/tmp/x"""
    )
    cfg = compose(overrides)
    assert cfg.rounds == 2 and list(cfg.compare) == ["local", "fedavg"] and cfg.llm.prompt == "<image> {question}"
    with pytest.raises(ConfigError, match="cannot be split"):
        composition.split("run.dir='half")


@pytest.mark.parametrize("arm", every("arm", "fedavg", "feddat_llm", "mllmfl"))
def test_what_an_arm_sets_holds(arm):
    """A value of config.yaml must not win over the arm's own, nor a preset's, nor one asked for the main arm over a
    compared one's."""
    own = OmegaConf.load(composition.folder() / "arm" / f"{arm}.yaml")
    extra = ["scenario=long_tail"] if arm in OF_LONG_TAILS else []
    asked = [*extra, "rounds=5", "++rule.floor=0.1", "method.sets=[shared]", "pooled=false", f"compare=[{arm}]"]
    preset = ["experiment=mllmfl_embedded" if extra else "experiment=feddat", f"compare=[{arm}]"]
    compared = [composition.arms(compose(overrides), overrides)[1][1] for overrides in (asked, preset)]
    alone = [[*extra, f"arm={arm}"], [preset[0], f"arm={arm}"]]
    for cfg in map(load, [*alone, *compared]):
        for path, value in composition.leaves("", own):
            assert OmegaConf.select(cfg, path) == value, path
    assert load([*alone[1], "evaluate.every=3"]).evaluate.every == 3, "what is asked for wins over both"


def test_a_compared_arm_keeps_what_trains_inside_unless_it_chooses_itself():
    inside = ["llm.where=client", "inner=lora", "inner.rank=2", "edge.rank=0"]
    asked = ["arm=fedavg", *inside, "compare=[fedprox,feddat_llm]"]
    main, other, own = (load(overrides) for _, overrides in composition.arms(compose(asked), asked))
    assert main.inner == other.inner and main.inner.rank == 2 and main.edge.rank == other.edge.rank == 0
    assert own.inner["_target_"].endswith("bottleneck") and own.inner.rank == 8
    asked = ["arm=fedavg_llm", "compare=[fedavg]"]
    split = load(composition.arms(compose(asked), asked)[1][1])
    assert not split.inner and split.llm.where == "server" and split.edge.rank == 16


def test_the_plateau_is_four_times_as_long_unless_asked_for_by_name():
    assert load(["arm=fedavg_plateau"]).rounds == 4 * load().rounds
    assert load(["arm=fedavg_plateau", "rounds=2"]).rounds == 2


def test_compared_arms_keep_what_was_asked_but_their_method():
    overrides = ["arm=fednano", "rounds=3", "rule.floor=0.1", "compare=[local,centralised]", "dataset.train=100"]
    arms = composition.arms(compose(overrides), overrides)
    assert [name for name, _ in arms] == ["main", "local", "centralised"]
    for _, asked in arms[1:]:
        cfg = load(asked)
        assert cfg.rounds == 3 and cfg.dataset.train == 100
    assert load(arms[2][1]).pooled


@pytest.mark.parametrize(
    ("asked", "knob"),
    [
        (["scenario=long_tail", "arm=creff", "rule=mean"], "a head that rule=creff alone trains; set rule=creff"),
        (["align=mllm", "arm=flora"], "align does not see what rule=stack folds into the base; set align=none"),
        (["align=mllm", "align.step.check_every=0"], "align.step.check_every must be at least 1, got 0"),
        (["scenario=long_tail", "arm=fedavg", "rule=creff"], "a head from gradients that no client sends; set method"),
        (["scenario=long_tail", "arm=mllmfl", "captions.prompts=[]"], "captions.prompts is empty"),
        (["scenario=long_tail", "arm=mllmfl", "captions.chunk=0"], "captions.chunk must be at least 1"),
        (["scenario=long_tail", "compact.widths=[8,12,16]"], "compact.widths=[8, 12, 16] must be multiples of 8"),
        (["scenario=long_tail", "compact.layer=bottleneck"], "must be multiples of 32"),
        (["arm=mllmfl"], "set compact=resnet8 or pretrain=none"),
        (["arm=creff"], "method.retrained is a classifier's second head; set head=classes"),
        (["head=classes"], "head=classes needs a network under it; set compact=resnet8"),
        (["scenario=long_tail", "arm=creff", "align=mllm"], "align does not go with method.retrained; set align=none"),
        (["scenario=long_tail", "arm=local", "align=mllm"], "align tunes the shared state"),
        (["scenario=long_tail", "arm=local", "pretrain=mllm"], "pretrain reaches clients in the shared state"),
        (["scenario=long_tail", "arm=ffa_lora"], "the schema lets nothing train"),
        (["scenario=long_tail", "arm=hetlora"], "rule=hetlora merges low-rank pairs B A, of which clients train none"),
        (
            ["arm=exact_lowrank", "llm.where=client", "inner=bottleneck", "edge.rank=0"],
            "rule=exact_lowrank merges low-rank pairs B A, of which clients train none: it is the mean",
        ),
        (["scenario=long_tail", "edge.ranks=[1,2]"], "head=classes has none; set edge.ranks=null"),
        (["scenario=long_tail", "classes=[a,a]"], "classes must be different"),
        (["scenario=long_tail", "run.has_data=false", "evaluate.groups=null"], "takes the names from the data"),
        (["compact=resnet8", "llm.where=client"], "llm.where=client runs that one; set compact=none"),
        (["compact=resnet8", "edge.lora.rank=2"], "set it to 0, or compact=none"),
        (["arm=feddat", "rule=stack"], "whose one set is shared"),
        (["arm=feddat", "rule=stack", "edge.lora.rank=2"], "whose one set is shared"),
        (["arm=feddat", "rule=stack", "edge.lora.rank=2"], "LoRA"),
        (["arm=feddat", "method.step.teacher=[frozen]"], "method.step.teacher=['frozen'] has nothing that trains"),
        (
            ["arm=feddat", "method.step.student=[local]"],
            "method.sets has shared, which no branch of method.step trains",
        ),
        (
            ["arm=fedprox", "method.sets=[local]", "method.use=[local]", "method.step.use=[local]"],
            "method.step.near=['shared'] needs shared in method.sets",
        ),
        (
            ["arm=fedprox", *(f"++method.{which}=[local]" for which in ("sets", "use", "step.use", "step.near"))],
            "method.step.near is held near what the server sent, and method.sets=['local'] has no shared",
        ),
        (
            ["arm=fedprox", "method.sets=[shared,local]", "+method.step.near=[local]"],
            "method.sets has local, which no branch of method.step trains",
        ),
        (
            ["arm=fednano_ef", "method.sets=[local]", "method.use=[local]", "rule=mean"],
            "method.fisher is of the shared adapters, which method.sets=['local'] lacks",
        ),
        (["arm=multi_krum", "rule.keep=5"], "rule.keep=5 of 5 clients in a round keeps some of rule.byzantine=1"),
        (["arm=trimmed_mean", "rule.trim=1.5"], "or a whole number of clients from 1, got 1.5"),
        (["arm=trimmed_mean", "rule.trim=inf"], "or a whole number of clients from 1, got inf"),
        (["arm=feddat", "method.step.temperature=0"], "method.step.temperature must be at least 0.01"),
        (["arm=feddat", "method.step.ramp=-1"], "method.step.ramp must be at least 0"),
        (["arm=fedprox", "method.step.mu=-1"], "method.step.mu must be at least 0"),
        (["arm=fedavg", "rule=trimmed_mean", "clients=2"], "rule.trim=0.2 must leave one of 2 clients"),
        (["arm=flora", "inner=lora", "llm.where=client"], "LoRA"),
        (["arm=feddpa", "schema=freeze_a"], "leave schema=... out"),
        (["arm=feddpa", "clients_per_round=3"], "clients_per_round=null"),
        (["arm=fedprox", "method.sets=[local]", "method.use=[local]"], "needs shared"),
        (["arm=feddpa", "method.sets=[shared]", "method.use=[shared]"], "needs local"),
        (["arm=krum", "clients_per_round=4"], "at least 5 clients in a round, got 4"),
        (["arm=fedsa_lora", "rule=stack"], "travels without its other factor"),
    ],
)
def test_what_does_not_go_together_is_refused_before_anything_starts(asked, knob):
    assert any(knob in mistake.text for mistake in check(compose(asked)))


def test_a_prefix_of_hydra_changes_no_name():
    assert compose(["++label=mine", "method=lora"]).label == "mine"


def test_a_preset_with_other_data_is_called_by_it():
    assert compose(["experiment=mllmfl"]).data == "cifar10_lt"
    assert compose(["experiment=mllmfl", "scenario=domain"]).data == "cifar10_lt, domain"
    assert compose(["experiment=mllmfl", "dataset=cifar100_lt", "partition=equal"]).data == "cifar100_lt, equal"
    assert compose(["experiment=mllmfl", "dataset=cifar100_lt", "data=mine"]).data == "mine"


@pytest.mark.parametrize("by", ["halves", "[100]", "[20,100]", "[100,x]", "[100,20,1]", "3", "true"])
def test_groups_are_thirds_or_two_counts(by):
    with pytest.raises(ConfigError, match=r"evaluate.groups must be null, thirds, or two counts such as \[100,20\]"):
        load([f"evaluate.groups={by}"])


@pytest.mark.parametrize("by", ["null", "thirds", "[100,20]", "[5,5]"])
def test_groups_that_can_be(by):
    assert load([f"evaluate.groups={by}"])


def test_groups_need_the_servers_eyes():
    with pytest.raises(ConfigError) as caught:
        load(["evaluate.groups=thirds", "run.has_data=false", "evaluate.predictions=false"])
    assert "evaluate.groups=thirds needs run.has_data=true" in str(caught.value)
    assert "evaluate.groups=thirds needs evaluate.predictions=true" in str(caught.value)
    assert load(["scenario=long_tail", "run.has_data=false", "evaluate.groups=null", "classes=[a,b]"])


def test_a_compared_arm_keeps_settings_of_the_stages_that_it_has():
    asked = ["experiment=mllmfl_embedded", "align.per_class=5", "pretrain.step.steps=50", "align.step.steps=7"]
    arms = {name: load(overrides) for name, overrides in composition.arms(compose(asked), asked)}
    assert {name: (cfg.pretrain.step or {}).get("steps") for name, cfg in arms.items()} == {
        "main": 50, "fedavg": None, "fedavg_pretrained": 50, "mllmfl_not_pretrained": None, "balanced_tuning": 50,
    }  # fmt: skip
    assert {name: (cfg.align.step or {}).get("steps") for name, cfg in arms.items()} == {
        "main": 7, "fedavg": None, "fedavg_pretrained": None, "mllmfl_not_pretrained": 7, "balanced_tuning": 7,
    }  # fmt: skip
    assert arms["balanced_tuning"].align.per_class == 5 and arms["balanced_tuning"].align.step.beta == 0
    with pytest.raises(ConfigError, match="stepps"):
        compose([*asked, "align.step.stepps=7"])


def test_an_arm_brings_its_sampling_and_takes_it_along():
    asked = ["arm=class_balanced", "compare=[fedavg]"]
    main, other = (load(overrides) for _, overrides in composition.arms(compose(asked), asked))
    assert main.sampling["_target_"].endswith("class_balanced") and not other.sampling
    asked = ["arm=fedavg", "compare=[class_balanced]"]
    main, other = (load(overrides) for _, overrides in composition.arms(compose(asked), asked))
    assert other.sampling["_target_"].endswith("class_balanced") and not main.sampling


def test_what_is_composed_follows_the_environment(monkeypatch):
    for folder in ("/a", "/b"):
        monkeypatch.setenv("FEDMM_DATA", folder)
        assert compose(["scenario=feddat_task"]).dataset.of.vcr.path == f"{folder}/vcr"


@pytest.mark.parametrize("asked", ["optimizer.lr=nan", "clip_norm=nan", "method.step.mu=nan"])
def test_what_is_no_number_is_refused(asked):
    (said,) = check(compose(["method=fedprox", "rule=mean", asked]))
    assert "got nan" in said.text
