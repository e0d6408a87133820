"""The server's two stages: their mathematics, what a kill, a bad set and a bad rate do, and what clients notice."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import PROMPT, some_examples
from safetensors.torch import load_file

from fedmm import seeds, tree
from fedmm.config import composition, targets
from fedmm.config.composition import quoted
from fedmm.edge import compact, frozen_modules
from fedmm.edge.encoder import CachedEncoder, Encoder
from fedmm.edge.prepare import collate, encode, prepare
from fedmm.federation import client as client_side
from fedmm.federation.export import export
from fedmm.federation.server_stages import _common, _NotesAt
from fedmm.flower import inprocess
from fedmm.flower.server_app import plan
from fedmm.losses import answer_cross_entropy, divergence
from fedmm.model import Model, SplitModel
from fedmm.runs.folder import latest_checkpoint, read_rows
from fedmm.stages import align as aligning
from fedmm.stages import pretrain as learning
from fedmm.stages.align import align
from fedmm.stages.pretrain import Look, blend, losses, pretrain, weight
from fedmm.storage.tensor_store import Store

PLAN = compact.resnet(depths=(1, 1), widths=(8, 16), side=16)


class Notes:
    """Notes in memory; `dies_at` is a step at which the process would be killed, after its note."""

    def __init__(self, dies_at: int = 0) -> None:
        self.noted, self.dies_at = None, dies_at

    def read(self):
        return self.noted

    def write(self, step, loss, state):
        self.noted = step, tree.clone(state)
        if step == self.dies_at:
            raise SystemExit("killed")


@pytest.fixture
def model(edge, local_llm) -> Model:
    return SplitModel(edge, local_llm)


@pytest.fixture
def looks(edge, processor) -> list[Look]:
    examples = some_examples(6)
    items = encode(edge, prepare(examples, processor, PROMPT))
    return [
        Look(item, lambda e=e: compact.pixels(e.images, PLAN.side)) for item, e in zip(items, examples, strict=True)
    ]


def drawn(llava) -> compact.Compact:
    built = frozen_modules.empty_compact(frozen_modules.take(*llava), PLAN)
    compact.reset(built, seeds.generator(0, "test"))
    return built


# --- pretraining ------------------------------------------------------------------------------------------------------


def test_the_ends_of_the_blend_are_the_teacher_and_the_compact_encoder_to_the_bit(llava, model, looks):
    built = drawn(llava)
    batch = collate([look.item for look in looks])
    own = built.features(torch.cat([look.pixels() for look in looks]))
    assert torch.equal(blend(batch.features_MPE, own, 0.0), batch.features_MPE)
    assert torch.equal(blend(batch.features_MPE, own, 1.0), own)
    at_teacher, _ = losses(model, built, looks, 0.0, len(looks))
    assert torch.equal(at_teacher, model.answer_loss(batch, ()))
    at_compact, _ = losses(model, built, looks, 1.0, len(looks))
    assert torch.equal(at_compact, model.answer_loss(replace(batch, features_MPE=own, keys=None), ()))
    assert not torch.equal(at_teacher, at_compact)


def test_both_schedules_rise_from_the_teacher_to_the_compact_encoder():
    for schedule in ("linear", "cosine"):
        rising = [weight(schedule, step, 10, 0.5) for step in range(11)]
        assert rising[0] == 0 and rising[5:] == [1.0] * 6 and rising == sorted(rising)
    assert weight("linear", 2, 10, 1.0) == 0.2
    assert weight("cosine", 5, 10, 1.0) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("name", "width", "grid", "teacher"),
    [("resnet8", 96, 6, 469_824), ("resnet50", 1024, 24, 303_507_456)],  # the embedded tower, CLIP-L/336
)
def test_a_compact_encoder_is_at_most_a_quarter_of_its_teacher(name, width, grid, teacher):
    built = compact.Compact(targets.make(composition.compose([f"compact={name}"]).compact), grid, width)
    assert sum(parameter.numel() for parameter in built.parameters()) <= teacher / 4


def test_it_takes_over_the_teachers_mean_and_spread_and_comes_nearer(llava, model, looks):
    built, notes = drawn(llava), Notes()
    taken = pretrain(built, model, looks, notes, 0, steps=30, batch_size=6, texts=3, lr=1e-2, note_every=10)
    features_MPE = collate([look.item for look in looks]).features_MPE
    torch.testing.assert_close(built.mean, features_MPE.mean((0, 1)))
    torch.testing.assert_close(built.spread, features_MPE.std((0, 1)))
    assert taken[-1] < 0.7 * taken[0] and notes.noted[0] == 30


@pytest.mark.parametrize("dies_at", [10, 20])
def test_killed_pretraining_goes_on_from_its_note_with_the_same_bits(llava, model, looks, dies_at):
    settings = {"steps": 25, "batch_size": 4, "texts": 2, "note_every": 10}
    whole = drawn(llava)
    pretrain(whole, model, looks, Notes(), 0, **settings)
    notes = Notes(dies_at)
    with pytest.raises(SystemExit):
        pretrain(drawn(llava), model, looks, notes, 0, **settings)
    notes.dies_at = 0
    again = drawn(llava)
    assert len(pretrain(again, model, looks, notes, 0, **settings)) == 25 - dies_at
    assert tree.digest(again.state_dict()) == tree.digest(whole.state_dict())


def test_pretraining_that_diverges_says_which_knob(llava, model, looks):
    with pytest.raises(ValueError, match=r"pretraining diverged at step \d+: the loss is .*; lower pretrain.step.lr"):
        pretrain(drawn(llava), model, looks, Notes(), 0, steps=20, batch_size=4, texts=2, lr=1e30)


def test_clients_build_the_compact_encoder_from_the_frozen_parts(llava, processor):
    """It travels as any encoder does: its features are those of the server's, through a cache that never saw it."""
    built = drawn(llava)
    built.fit(torch.randn(3, 4, 12))
    frozen = frozen_modules.take(*llava)
    small = frozen_modules.with_compact(frozen, PLAN, tree.clone(built.state_dict()))
    assert tree.size_bytes(small) < tree.size_bytes(frozen) and tree.digest(small) != tree.digest(frozen)
    edge, own = frozen_modules.build(small, rank=4)
    assert isinstance(edge.encoder, Encoder)
    examples = some_examples(3)
    cached = CachedEncoder(lambda: edge.encoder, Store(memory_bytes=1 << 20), "small")
    features = collate(prepare(examples, own, PROMPT, cached)).features_MPE
    wanted = built.features(torch.cat([compact.pixels(e.images, PLAN.side) for e in examples]))
    torch.testing.assert_close(features, wanted, rtol=1e-4, atol=1e-5)
    assert features.shape[1] == processor.places, "as many positions as the large encoder's"


# --- alignment --------------------------------------------------------------------------------------------------------


@pytest.fixture
def open_items(edge, processor):
    return encode(edge, prepare(some_examples(9), processor, PROMPT))


def no_teacher(indices, batch):
    raise AssertionError("without beta the MLLM is not asked")


def loss_of(model, state, items) -> float:
    model.edge.load(state)
    return aligning.measured(model, items, 4)[0]


def test_alignment_returns_the_best_it_has_seen_on_held_out_data(model, open_items):
    start = model.edge.state()
    before = loss_of(model, start, open_items[6:])
    found = align(model, start, open_items[:6], no_teacher, open_items[6:], 0, 1, steps=20, lr=1e-2, beta=0.0)
    assert found.best_step > 0 and found.loss_before == pytest.approx(before)
    assert loss_of(model, found.state, open_items[6:]) == pytest.approx(found.loss_after)
    assert found.loss_after < before and found.steps == 20
    assert found.state.keys() == start.keys()


def test_it_is_the_written_out_loop(model, open_items):
    """CE plus beta KL to what the teacher says, AdamW, batches by (seed, round, step)."""
    start, items, held_out = model.edge.state(), open_items[:6], open_items[6:]
    says = torch.randn(6, 3, model.llm.vocabulary, generator=seeds.generator(0, "says"))

    def teacher(indices, batch):
        return says[list(indices), : batch.labels_BA.shape[1]]

    settings = {"batch_size": 4, "lr": 1e-3, "beta": 0.7, "temperature": 2.0}
    found = align(model, start, items, teacher, held_out, 3, 2, steps=2, check_every=1, patience=9, **settings)
    model.edge.load(start)
    model.edge.freeze_all_but(["shared.*"])
    optimizer = torch.optim.AdamW([p for p in model.edge.parameters() if p.requires_grad], lr=1e-3)
    states = []
    for step in (1, 2):
        picks = torch.randint(6, (4,), generator=seeds.generator(3, "align", 2, step)).tolist()
        batch = collate([items[i] for i in picks])
        logits = model(batch)
        loss = answer_cross_entropy(logits, batch.labels_BA)
        loss = loss + 0.7 * divergence(teacher(picks, batch), logits, batch.labels_BA, 2.0)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in model.edge.parameters() if p.requires_grad], 1.0)
        optimizer.step()
        states.append(model.edge.state())
    assert tree.digest(found.state) == tree.digest([start, *states][found.best_step])
    assert found.best_step, "a loss that was not lowered would show nothing"


def test_only_what_is_named_is_tuned(model, open_items):
    start = model.edge.state()
    found = align(
        model, start, open_items[:6], no_teacher, open_items[6:], 0, 1, trains=["shared.text.*"], lr=1e-2, beta=0.0
    )
    moved = {name for name in start if not torch.equal(start[name], found.state[name])}
    assert moved == {"text.down", "text.up"}
    with pytest.raises(
        ValueError, match=r"align.step.trains=\['shared.head.\*'\] names nothing; there are shared.image"
    ):
        align(model, start, open_items[:6], no_teacher, open_items[6:], 0, 1, trains=["shared.head.*"])


def test_alignment_that_is_not_finite_gives_the_aggregate_back(model, open_items):
    start = model.edge.state()
    found = align(model, start, open_items[:6], no_teacher, open_items[6:], 0, 1, lr=1e30, check_every=5, beta=0.0)
    assert found.best_step == 0 and tree.digest(found.state) == tree.digest(start) and found.steps < 60
    assert found.loss_after == found.loss_before and "lower align.step.lr" in found.reason


def test_alignment_stops_where_held_out_data_get_worse(model, open_items, monkeypatch):
    """Checked at steps 5, 10, ...: better at 5, worse at 10 and 15, which is enough for a patience of 2."""
    told = iter([1.0, 0.9, 0.95, 0.92, 1.0, 0.1])
    monkeypatch.setattr(aligning, "measured", lambda *_: (next(told), 0.5))
    start = model.edge.state()
    found = align(model, start, open_items[:6], no_teacher, open_items[6:], 0, 1, check_every=5, patience=2, beta=0.0)
    assert (found.steps, found.best_step, found.loss_before, found.loss_after) == (15, 5, 1.0, 0.9)
    assert found.reason == "no better on held-out open data since step 5"
    five = align(model, start, open_items[:6], no_teacher, open_items[6:], 0, 1, steps=5, beta=0.0)
    assert tree.digest(found.state) == tree.digest(five.state), "that of step 5, not the last"


# --- whole runs -------------------------------------------------------------------------------------------------------

SMALL = [
    "scenario=long_tail", "dataset.of.train=400", "dataset.largest=30", "dataset.imbalance=5", "dataset.of.test=40",
    "dataset.of.validation=0", "dataset.of.public=160", "clients=3", "rounds=2", "batch_size=16", "run.at_once=1",
    "pretrain.step.steps=6", "pretrain.step.note_every=2", "align.step.steps=6", "align.step.check_every=2",
    "align.per_class=8", "align.held_out=4", "evaluate.every=0", "partition.alpha=null", "compare=[]",
]  # fmt: skip
FORMS = {"classes": [], "llm": ["head=llm", "edge.rank=4"]}


def run(folder: Path, *overrides: str) -> Path:
    several = [o for o in SMALL if not (o.startswith(("pretrain", "align")) and f"{o.split('.')[0]}=none" in overrides)]
    return inprocess.run(plan([*several, *overrides, quoted("run.dir", folder)]), page=False)


def moved(path: Path) -> list[tuple]:
    """Every byte between clients and server, by round, client and channel."""
    keys = ("round", "client", "channel", "up_bytes", "down_bytes", "frames")
    rows = [row for row in read_rows(path / "ledger.jsonl") if row["kind"] == "bytes" and row["channel"] != "control"]
    return [tuple(row[key] for key in keys) for row in rows]


@pytest.mark.run
@pytest.mark.parametrize("form", FORMS)
def test_clients_do_not_notice_the_stages(tmp_path, monkeypatch, form):
    """No message grows by a byte; the state differs from the plain run's, so the stages have done something.

    The losses that go up beside an update are left out: their digits are more or fewer from run to run.
    """
    send = client_side._send
    monkeypatch.setattr(client_side, "_send", lambda session, update: send(session, replace(update, metrics={})))
    plain = run(tmp_path / "plain", *FORMS[form], "arm=fedavg", "pretrain=none", "align=none")
    whole = run(tmp_path / "whole", *FORMS[form], "arm=mllmfl")
    assert moved(whole) == moved(plain)
    rows = read_rows(whole / "stages.jsonl")
    assert [(row["stage"], row["round"]) for row in rows] == [
        ("pretrain", 0),
        ("open set", 0),
        ("align", 1),
        ("align", 2),
    ]
    assert not (plain / "stages.jsonl").exists()
    ends = [latest_checkpoint(path)[1] for path in (plain, whole)]
    assert ends[0].keys() == ends[1].keys() and tree.digest(ends[0]) != tree.digest(ends[1])


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A run that nothing disturbs, with a home of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDMM_HOME", str(tmp_path_factory.mktemp("home")))
        return run(tmp_path_factory.mktemp("whole") / "run", "arm=mllmfl")


@pytest.mark.run
@pytest.mark.parametrize("dies_in", ["captions", "pretraining", "between its last note and the encoder", "alignment"])
def test_a_run_killed_inside_a_stage_ends_as_if_it_had_not_been(whole, tmp_path, monkeypatch, dies_in):
    calls, write = [], _NotesAt.write

    def dies(honest, at):
        def maybe(*args, **kwargs):
            calls.append(args)
            if len(calls) == at:
                raise SystemExit("killed")
            return honest(*args, **kwargs)

        return maybe

    with monkeypatch.context() as patch:
        if dies_in == "captions":
            from fedmm.stages import captions

            patch.setattr(captions, "answers", dies(captions.answers, 3))
        elif dies_in == "pretraining":
            patch.setattr(learning, "losses", dies(learning.losses, 4))
        elif "last note" in dies_in:
            patch.setattr(_NotesAt, "write", lambda *args: (write(*args), args[1] == 6 and sys.exit("killed")))
        else:
            patch.setattr(aligning, "measured", dies(aligning.measured, 5))
        with pytest.raises(SystemExit):
            run(tmp_path / "killed", "arm=mllmfl")
    again = run(tmp_path / "killed", "arm=mllmfl")
    assert (again / "rounds.jsonl").read_text() == (whole / "rounds.jsonl").read_text()
    about = [
        [{k: v for k, v in row.items() if "seconds" not in k} for row in read_rows(p / "stages.jsonl")]
        for p in (again, whole)
    ]
    assert about[0][2:] == about[1][2:], "what each alignment did, too"
    assert about[0][0]["steps"] == 6 and about[0][0]["loss"] == about[1][0]["loss"]
    if dies_in != "captions":
        assert about[0][0]["llm_samples"] >= about[1][0]["llm_samples"], "what the killed one took is paid too"


def test_answers_that_open_data_have_once_are_left_out_with_a_warning(caplog):
    with caplog.at_level("WARNING", logger="fedmm"):
        assert _common(["two", "five", "two", "", "", "one"]) == ["two"]
    assert "2 of 3 answers of open examples occur once and are not aligned on: ['five', 'one']" in caplog.text


@pytest.mark.run
def test_a_compact_network_is_not_exported_as_the_backbone_it_is_not(whole, tmp_path):
    with pytest.raises(ValueError, match=r"compact network of their own, which is no part of a Hugging Face LLaVA"):
        export(whole, tmp_path / "tuned")
    assert not (tmp_path / "tuned").exists()


@pytest.mark.run
def test_another_run_finds_the_encoder_made(tmp_path, monkeypatch):
    asked = ["arm=fedavg_pretrained", "align=none", "rounds=1"]
    first = run(tmp_path / "first", *asked)
    monkeypatch.setattr(learning, "losses", no_teacher)
    second = run(tmp_path / "second", *asked)
    assert (second / "rounds.jsonl").read_text() == (first / "rounds.jsonl").read_text()


@pytest.mark.run
def test_each_stage_has_its_override(tmp_path):
    """Off are the first, the third, and the second, where one alignment follows pretraining and no client trains."""
    not_pretrained = run(tmp_path / "1", "arm=mllmfl", "pretrain=none", "rounds=1")
    assert [row["stage"] for row in read_rows(not_pretrained / "stages.jsonl")] == ["open set", "align"]
    not_aligned = run(tmp_path / "3", "arm=mllmfl", "align=none", "rounds=1")
    assert [row["stage"] for row in read_rows(not_aligned / "stages.jsonl")] == ["pretrain"]
    no_clients = run(tmp_path / "2", "arm=mllmfl", "rounds=0")
    assert [(row["stage"], row["round"]) for row in read_rows(no_clients / "stages.jsonl")] == [
        ("pretrain", 0),
        ("open set", 0),
        ("align", 0),
    ]
    _, state, _ = latest_checkpoint(no_clients)
    began = load_file(no_clients / "compact.safetensors")
    trunk = [name for name in state if name.startswith("trunk")]
    made, start = (torch.cat([of[name].flatten() for name in trunk]) for of in (state, began))
    assert (made - start).abs().mean() < 0.1 * start.abs().mean(), "it is the pretrained encoder, aligned"
    assert torch.equal(made, start) == (read_rows(no_clients / "stages.jsonl")[-1]["kept"] == 0)
    assert not (no_clients / "rounds.jsonl").exists()


@pytest.mark.run
def test_a_class_without_open_images_is_told_before_anybody_trains(tmp_path):
    with pytest.raises(
        ValueError, match=r"fewer than two are of class 10; raise dataset.public .*, or set align.labels"
    ):
        run(tmp_path / "run", "arm=mllmfl", "pretrain=none", "classes=[0,1,2,3,4,5,6,7,8,9,10]")
    assert not (tmp_path / "run" / "rounds.jsonl").exists()
    with pytest.raises(ValueError, match=r"align.step.trains=\['shared.haed.\*'\] names nothing; there are shared"):
        run(tmp_path / "typo", "arm=mllmfl", "pretrain=none", "align.step.trains=[shared.haed.*]")
    assert not (tmp_path / "typo" / "rounds.jsonl").exists()
    with pytest.raises(ValueError, match="need open images, and there are none; raise dataset.public"):
        run(tmp_path / "none", "arm=mllmfl", "dataset.of.public=0")
    with pytest.raises(
        ValueError, match=r"captions.writer.folder=captions has no \*.jsonl; prepare texts there, a line"
    ):
        run(tmp_path / "texts", "arm=mllmfl", "captions=prepared")
    assert not (tmp_path / "none").exists() and not (tmp_path / "texts").exists(), "before anything starts"


@pytest.mark.run
def test_an_alignment_every_other_round_and_by_the_mllms_own_labels(tmp_path):
    path = run(
        tmp_path / "run",
        "arm=mllmfl",
        "pretrain=none",
        "align.every=2",
        "align.labels=mllm",
        "align.per_class=2",
        "align.held_out=1",
    )
    rows = read_rows(path / "stages.jsonl")
    assert [row["round"] for row in rows] == [0, 2] and 0.5 < rows[0]["zero_shot"] < 0.95


@pytest.mark.run
def test_creff_runs_and_pays_for_what_its_clients_tell(tmp_path):
    plain = run(tmp_path / "plain", "arm=fedavg", "pretrain=none", "align=none")
    path = run(tmp_path / "creff", "arm=creff", "pretrain=none", "align=none")
    state = latest_checkpoint(path)[1]
    assert not torch.equal(state["head.weight"], state["retrained.weight"]) and not state["gradients"].any()
    up = [sum(row[3] for row in moved(p) if row[2] == "adapters") for p in (plain, path)]
    told_bytes = 4 * (10 * 10 * 65 + 10 * 65)
    assert up[1] - up[0] == pytest.approx(2 * 3 * told_bytes, rel=0.02)
