"""Schemas: what trains, what travels, what is kept; abstention; ranks of clients; each arm for two rounds."""

from __future__ import annotations

import json

import pytest
import safetensors.torch
import torch
from helpers import PROMPT, in_tiers, rounds, run, served, some_examples, visiting

from fedmm import seeds, tree
from fedmm.adapters.nano import cut
from fedmm.adapters.schema import AnySchema, fits, private, sent
from fedmm.config import composition, derived, targets
from fedmm.edge import frozen_modules
from fedmm.edge.prepare import collate, encode, prepare
from fedmm.federation import client as client_side
from fedmm.federation.export import export
from fedmm.link.session import HostRefused
from fedmm.methods.feddpa import feddpa
from fedmm.methods.feddpa import schema as feddpa_schema
from fedmm.methods.lora import lora
from fedmm.model import SplitModel
from fedmm.runs import summary
from fedmm.storage import machine_cache
from fedmm.train import train
from fedmm.types import State, Step

NAMES = ["image.down", "image.up", "text.down", "text.up", "encoder.q_proj.lora_A", "encoder.q_proj.lora_B"]
NAMES += ["llm.layers.0.mlp.bottleneck_down", "llm.layers.0.mlp.bottleneck_up"]
A, B = ({n for n in NAMES if n.endswith(ends)} for ends in (("down", "lora_A"), ("up", "lora_B")))
SCHEMAS = sorted({*composition.options("schema")} - {"creff", "private_head"})  # these two are of a classifier


def schema_of(name: str) -> AnySchema:
    return targets.make(composition.compose([f"schema={name}", *(["arm=feddpa"] if name == "feddpa" else [])]).schema)


@pytest.mark.parametrize("name", SCHEMAS)
def test_whatever_travels_is_trained_and_the_frozen_copy_never_is(name):
    schema = schema_of(name)
    for round in range(1, 6):
        now = schema(round, 5)
        sends = sent(schema, 5, NAMES, round)
        assert all(fits(f"shared.{key}", now.trains) for key in sends)
        assert set(sends) <= set(sent(schema, 5, NAMES))
        assert not any(fits(f"frozen.{key}", now.trains) for key in NAMES)
        keeps = private(schema, 5, [f"{one}.{key}" for one in ("shared", "local", "frozen") for key in NAMES], round)
        assert not {f"shared.{key}" for key in sent(schema, 5, NAMES)} & set(keeps)


def test_what_each_sends_and_holds():
    assert set(sent(schema_of("all"), 4, NAMES, 2)) == set(NAMES)
    assert set(sent(schema_of("freeze_a"), 4, NAMES)) == B
    assert set(sent(schema_of("share_a"), 4, NAMES)) == A
    rolora = schema_of("alternate")
    assert [set(sent(rolora, 4, NAMES, round)) for round in (1, 2, 3, 4)] == [B, A, B, A]
    assert set(sent(rolora, 4, NAMES)) == set(NAMES) and set(sent(rolora, 1, NAMES)) == B
    assert private(rolora, 4, [f"shared.{key}" for key in NAMES]) == []
    assert set(private(schema_of("share_a"), 4, [f"shared.{key}" for key in NAMES], 1)) == {
        f"shared.{key}" for key in B
    }
    assert private(schema_of("share_a"), 4, [f"shared.{key}" for key in NAMES], 0) == []


def test_who_has_a_model_of_its_own():
    personal = {arm: derived.personal(composition.compose([f"arm={arm}"])) for arm in composition.options("arm")}
    assert {arm for arm, own in personal.items() if own} == {
        "local",
        "feddat",
        "feddat_weak",
        "feddat_llm",
        "fedsa_lora",
        "feddpa",
    }


# ---- what trains -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("name", ["freeze_a", "alternate", "share_a"])
def test_training_moves_what_the_schema_says_to_the_bit_and_nothing_else(llava, local_llm, name, rank):
    schema = schema_of(name)
    inner = frozen_modules.Lora(rank, 4, ("q_proj", "linear_1")) if rank else None
    for round in (1, 2):
        edge, processor = frozen_modules.build(frozen_modules.take(*llava), rank=4, lora=inner)
        edge.reset(seeds.generator(0, "test"))
        with torch.no_grad():
            for parameter in edge.trainable("shared").values():
                parameter.add_(0.05)
        edge.freeze_all_but(schema(round, 2).trains)
        items = prepare(some_examples(6), processor, PROMPT)
        before, model = edge.state(), SplitModel(edge, local_llm)
        train(model, items if rank else encode(edge, items), lora, make_optimizer=lambda p: torch.optim.SGD(p, lr=0.5),
              anchor=before, seed=0, round=round, rounds=2, client=0)  # fmt: skip
        moved = {key for key, tensor in edge.state().items() if not torch.equal(tensor, before[key])}
        reached = {key for key in before if ".layers.2." not in key}  # features are those of the layer before
        assert moved == {key for key in reached if fits(f"shared.{key}", schema(round, 2).trains)}


# ---- runs ------------------------------------------------------------------------------------------------------------


def states(path) -> list[State]:
    files = sorted((path / "checkpoints").glob("*.safetensors"))
    return [{n.removeprefix("state/"): t for n, t in safetensors.torch.load_file(f).items()} for f in files]


@pytest.fixture
def deltas(monkeypatch) -> dict[tuple[int, int], State]:
    """What each client sends in each round."""
    seen: dict[tuple[int, int], State] = {}
    send = client_side._send
    monkeypatch.setattr(
        client_side,
        "_send",
        lambda session, update: (seen.__setitem__((session.round, update.client), update.delta), send(session, update)),
    )
    return seen


@pytest.mark.run
def test_ffa_lora_sends_b_alone_and_keeps_the_common_a(backbone, tmp_path, deltas):
    path = run(backbone, tmp_path / "run", "arm=ffa_lora", "optimizer.lr=0.05")
    assert {tuple(sorted(delta)) for delta in deltas.values()} == {("image.up", "text.up")}
    assert all(set(state) == {"image.up", "text.up"} for state in states(path))
    exact, median = (
        rounds(p)[0]["product_error"] for p in (path, run(backbone, tmp_path / "median", "arm=ffa_lora", "rule=median"))
    )
    assert exact.keys() == median.keys() == {"image", "text"}, "by the A that everybody has"
    assert max(exact.values()) < 1e-6 < 0.01 < min(median.values())
    from transformers import LlavaForConditionalGeneration

    export(path, tmp_path / "tuned")
    with pytest.raises(ValueError, match="tuned has files already; name a folder that is not there yet"):
        export(path, tmp_path / "tuned")
    tuned = LlavaForConditionalGeneration.from_pretrained(tmp_path / "tuned")
    start = LlavaForConditionalGeneration.from_pretrained(backbone[1].removeprefix("llm.path="))
    down = torch.empty(2 * 4, 16).uniform_(-0.25, 0.25, generator=seeds.generator(0, "adapters"))[4:]
    table_VD, up = start.get_input_embeddings().weight, states(path)[-1]["text.up"]
    assert up.abs().max() > 0
    wanted = table_VD + 32.0 / 4 * (table_VD @ down.T) @ up.T
    torch.testing.assert_close(tuned.get_input_embeddings().weight, wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.run
def test_rolora_alternates_and_what_did_not_travel_stays(backbone, tmp_path, deltas, monkeypatch):
    monkeypatch.setattr("fedmm.runs.folder.KEPT_CHECKPOINTS", 3)
    path = run(backbone, tmp_path / "run", "arm=rolora", "rounds=3")
    assert {round: tuple(sorted(delta)) for (round, _), delta in deltas.items()} == {
        1: ("image.up", "text.up"), 2: ("image.down", "text.down"), 3: ("image.up", "text.up"),
    }  # fmt: skip
    first, second, third = states(path)
    for before, after, moving in ((first, second, "down"), (second, third, "up")):
        for name in before:
            assert torch.equal(before[name], after[name]) == (not name.endswith(moving))


@pytest.fixture
def began(monkeypatch) -> dict[tuple[int, int], State]:
    """The shared set that each client begins a round with, the last scoring being one round more."""
    seen: dict[tuple[int, int], State] = {}
    load = client_side._load_sets

    def loaded(cfg, edge, order, arrived):
        load(cfg, edge, order, arrived)
        seen[order.round, order.client] = edge.state()

    monkeypatch.setattr(client_side, "_load_sets", loaded)
    return seen


@pytest.mark.run
def test_fedsa_lora_keeps_b_at_home_from_round_to_round(backbone, tmp_path, deltas, began):
    path = run(backbone, tmp_path / "run", "arm=fedsa_lora", "rounds=3")
    run_id = json.loads((path / "environment.json").read_text())["run"]
    assert {tuple(sorted(delta)) for delta in deltas.values()} == {("image.down", "text.down")}
    for client in range(3):
        mine = machine_cache.load_private(run_id, client, 3)
        assert set(mine) == {"shared.image.up", "shared.text.up"}
        for name, tensor in mine.items():
            assert torch.equal(began[4, client][name.removeprefix("shared.")], tensor), "scored with its own B"
    assert len({tree.digest(machine_cache.load_private(run_id, client, 3)) for client in range(3)}) == 3
    assert not torch.equal(began[2, 0]["text.up"], began[2, 1]["text.up"])
    assert torch.equal(began[4, 0]["text.down"], states(path)[-1]["text.down"])
    assert summary.scores(path)[3]["global"] is not None, "each client's own, on everybody's part"
    with pytest.raises(ValueError, match=r"with FedSA-LoRA every client keeps its own 'shared.image.up': no one model"):
        export(path, tmp_path / "no")


@pytest.mark.run
@pytest.mark.parametrize("arm", ["fedavg", "feddat"])
def test_a_private_head_stays_at_its_client_from_round_to_round(backbone, tmp_path, deltas, began, arm):
    classes = ["head=classes", "compact=resnet8", "dataset.kinds=[colour]", "dataset.layouts=[one]"]
    path = run(backbone, tmp_path / "run", f"arm={arm}", "rounds=3", *classes, "schema=private_head")
    heads = {"shared.head.weight", "shared.head.bias"}
    assert all(delta and all(name.startswith("trunk.") for name in delta) for delta in deltas.values())
    assert all(name.startswith("trunk.") for name in states(path)[-1])
    run_id = json.loads((path / "environment.json").read_text())["run"]
    for client in range(3):
        mine = machine_cache.load_private(run_id, client, 3)
        assert heads == {name for name in mine if name.startswith("shared.")}
        for name in heads:
            assert torch.equal(began[4, client][name.removeprefix("shared.")], mine[name]), "scored with its own head"
            assert not torch.equal(began[1, client][name.removeprefix("shared.")], mine[name])
    assert len({tree.digest({"head": began[3, client]["head.weight"]}) for client in range(3)}) == 3
    assert all(torch.equal(began[4, 0][name], tensor) for name, tensor in states(path)[-1].items())


@pytest.mark.run
def test_feddpa_tunes_local_adapters_on_the_shared_one_at_the_end(backbone, tmp_path, deltas):
    path = run(backbone, tmp_path / "run", "arm=feddpa", "rounds=4", "method.step.tune=2", "schedule=constant")
    plain = run(backbone, tmp_path / "plain", "arm=fedavg", "rounds=2", "schedule=constant")
    assert rounds(path)[1]["state"] == rounds(plain)[1]["state"], "until it tunes it is FedAvg"
    assert summary.scores(path)[1]["own"] == summary.scores(plain)[1]["own"], "half of each of two alike is one whole"
    assert all(not delta for (round, _), delta in deltas.items() if round > 2)
    assert tree.digest(states(path)[-1]) == tree.digest(states(path)[1]), "and then it is not touched"
    run_id = json.loads((path / "environment.json").read_text())["run"]
    shared = states(path)[-1]
    for client in range(3):
        first, last = (machine_cache.load_private(run_id, client, round) for round in (3, 4))
        assert set(last) == {f"local.{name}" for name in shared}
        steps = [(tensor - before).norm() for name, tensor in last.items() for before in [first[name]]]
        assert all(step > 0 for step in steps), "it goes on from what it kept"


def test_feddpa_says_which_adapters_act(edge, local_llm, batch, monkeypatch):
    acting = []
    monkeypatch.setattr(SplitModel, "answer_loss", lambda model, batch, use: (acting.append(use), torch.tensor(0.0))[1])
    for round in (1, 2, 3):
        list(feddpa(SplitModel(edge, local_llm), batch, Step(round, 3, 1, 1, {}), tune=1))
    assert acting == [("shared",), ("shared",), ("shared", "local")]
    assert [feddpa_schema(round, 3).trains for round in (1, 2, 3)] == [("shared.*",), ("shared.*",), ("local.*",)]


# ---- what the host takes ---------------------------------------------------------------------------------------------


def offered(llava, edge, llm, delta, **options):
    with served(llava, edge, llm) as (host, taken):
        host.open_round(1, edge.state(), [0, 1], **options)
        with visiting(host) as session:
            arrived = dict(session.call("state").tensors)
            tensors = {f"delta/{name}": tensor for name, tensor in delta.items()}
            session.call("update", tensors, num_examples=3, fisher=False, metrics={})
        return arrived, taken


def only_up(client, current):
    return {name: tensor for name, tensor in current.items() if name.endswith("up")}


def rank_two(client, current):
    return cut(current, 2)


def test_an_update_is_held_against_schema_client_and_round(llava, edge, local_llm):
    whole = tree.zeros_like(edge.state())
    up = only_up(0, whole)
    assert set(offered(llava, edge, local_llm, up, up=only_up)[1][0].delta) == set(up)
    with pytest.raises(HostRefused, match=r"has 'image.down', which the server does not know"):
        offered(llava, edge, local_llm, whole, up=only_up)
    with pytest.raises(HostRefused, match=r"lacks 'text.up'"):
        offered(llava, edge, local_llm, {"image.up": whole["image.up"]}, up=only_up)
    arrived, taken = offered(llava, edge, local_llm, rank_two(0, whole), up=rank_two, down=rank_two)
    assert arrived["image.down"].shape == (2, 16) and torch.equal(arrived["image.up"], edge.state()["image.up"][:, :2])
    assert taken[0].delta["text.up"].shape == (16, 2)
    with pytest.raises(HostRefused, match=r"'image.down' has shape \(4, 16\), wanted \(2, 16\)"):
        offered(llava, edge, local_llm, whole, up=rank_two)


def test_an_update_may_lack_the_image_adapter_whole_and_nothing_else(llava, edge, local_llm):
    whole = tree.zeros_like(edge.state())
    text = {name: tensor for name, tensor in whole.items() if name.startswith("text.")}
    assert set(offered(llava, edge, local_llm, text)[1][0].delta) == set(text)
    image = {name: tensor for name, tensor in whole.items() if name.startswith("image.")}
    for bad, says in ((image, "lacks 'text.down'"), (text | {"image.up": whole["image.up"]}, "lacks 'image.down'")):
        with pytest.raises(HostRefused, match=says):
            offered(llava, edge, local_llm, bad)


# ---- ranks -----------------------------------------------------------------------------------------------------------


def test_a_smaller_client_is_the_servers_cut(llava, local_llm, items):
    """The first rows of A and columns of B, at the server's scale: where the rest of B is zero, the same outputs."""
    large, _ = frozen_modules.build(frozen_modules.take(*llava), rank=4, alpha=8.0)
    small, _ = frozen_modules.build(frozen_modules.take(*llava), rank=4, alpha=8.0, client_rank=2)
    for edge in (large, small):
        edge.reset(seeds.generator(0, "test"))
    assert tree.digest(tree.clone(cut(large.state(), 2))) == tree.digest(small.state())
    state = {name: tensor + 0.1 for name, tensor in large.state().items()}
    for name in ("image.up", "text.up"):
        state[name][:, 2:] = 0
    large.load(state)
    small.load(cut(state, 2))
    batch = collate(items)
    torch.testing.assert_close(large(batch)[0].dense(), small(batch)[0].dense(), rtol=1e-6, atol=1e-6)


@pytest.mark.run
def test_clients_of_three_ranks_run_and_each_gets_its_own(backbone, tmp_path, deltas):
    for arm in ("hetlora", "exact_lowrank"):
        path = run(backbone, tmp_path / arm, f"arm={arm}", "edge.ranks=[1,4,2]", "rounds=2")
        assert [deltas[2, client]["text.up"].shape for client in range(3)] == [(16, 1), (16, 4), (16, 2)]
        assert states(path)[-1]["image.down"].shape == (4, 16)
        assert rounds(path)[1]["clients"] == [0, 1, 2]


# ---- arms ------------------------------------------------------------------------------------------------------------


RULES = ["fedavgm", "fedadam", "fedyogi", "median", "trimmed_mean", "krum", "multi_krum", "norm_clip"]


@pytest.mark.parametrize("rest", in_tiers(run=[["fedadam", "krum"]], nightly=[RULES]), ids=len)
def test_every_new_arm_runs_two_rounds(backbone, tmp_path, rest):
    """Of rules over whole updates, in one run; those above have runs of their own."""
    few = ["clients=5", "evaluate.every=0", "evaluate.max_tokens=1", "run.examples=0"]
    path = run(backbone, tmp_path / "run", "arm=fedavg", f"compare=[{','.join(rest)}]", *few)
    for arm in rest:
        rows = rounds(path / "arms" / arm)
        assert [row["clients"] for row in rows] == [[0, 1, 2, 3, 4]] * 2
    ends = {rounds(path / "arms" / arm)[1]["state"] for arm in rest} | {rounds(path)[1]["state"]}
    assert len(ends) == len(rest) + 1, "each is another rule"
