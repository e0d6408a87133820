"""Features are made once and kept on disk: the same bits from there, and whatever happens to the disk."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from dataclasses import replace

import pytest
import safetensors.torch
import torch
from helpers import PROMPT, rounds, run, some_examples
from PIL import Image

from fedmm import codecs, tree
from fedmm.config import composition, targets
from fedmm.edge import frozen_modules
from fedmm.edge.base import Connector
from fedmm.edge.encoder import CachedEncoder
from fedmm.edge.prepare import collate, content_of, encode, prepare
from fedmm.federation import build
from fedmm.storage import machine_cache
from fedmm.storage.tensor_store import Store
from fedmm.types import Example

SAMPLE_BYTES = 2048  # more than a file of one sample takes: 4 patches, 12 wide


class Eyes:
    """Cached encoders over one folder, and a count of what they do."""

    def __init__(self, frozen, folder) -> None:
        self.frozen, self.folder = frozen, folder
        self.built, self.images = [], 0

    def open(self, owner="parts", codec="none", disk_bytes=1 << 20) -> CachedEncoder:
        """As a new process would."""
        return CachedEncoder(self.build, Store(memory_bytes=0, folder=self.folder, disk_bytes=disk_bytes), owner, codec)

    def build(self):
        encoder = frozen_modules.build_encoder(self.frozen)
        encoder.register_forward_pre_hook(self._count)
        self.built.append(weakref.ref(encoder))
        return encoder

    def _count(self, module, args) -> None:
        self.images += int((args[0].flatten(1) != 0).any(1).sum())  # blank ones fill up a chunk


@pytest.fixture
def eyes(llava, tmp_path) -> Eyes:
    return Eyes(frozen_modules.take(*llava), tmp_path / "features")


@pytest.fixture
def many(processor):
    return prepare(some_examples(7), processor, PROMPT)


@pytest.fixture
def exact(edge, many):
    return [collate([item]).features_MPE for item in encode(edge, many)]


def same(features, wanted) -> bool:
    return all(torch.equal(own, other) for own, other in zip(features, wanted, strict=True))


# ---- names ----------------------------------------------------------------------------------------------------------


def test_an_image_is_named_by_all_that_a_processor_sees_of_it():
    raw = bytes(range(48))
    palettes = [Image.frombytes("P", (12, 4), raw) for _ in range(2)]
    for i, image in enumerate(palettes):
        image.putpalette([i] * 768)
    clear = Image.frombytes("P", (12, 4), raw)
    clear.putpalette([0] * 768)
    clear.info["transparency"] = 3
    shown = [
        [Image.frombytes("RGB", (4, 4), raw)],
        [Image.frombytes("RGB", (4, 4), raw[:-1] + b"\0")],
        [Image.frombytes("RGB", (2, 8), raw)],
        [Image.frombytes("L", (12, 4), raw)],
        *([image] for image in palettes),
        [clear],
        [Image.frombytes("RGB", (4, 4), raw), Image.frombytes("L", (12, 4), raw)],
        [Image.frombytes("L", (12, 4), raw), Image.frombytes("RGB", (4, 4), raw)],
    ]
    assert len({content_of(images) for images in shown}) == len(shown)
    assert content_of(shown[0]) == content_of([shown[0][0].copy()])


@pytest.mark.parametrize("change", ["owner", "codec", "threads", "torch"])
def test_features_of_anything_else_are_not_taken_for_these(eyes, many, monkeypatch, change):
    eyes.open().fill(many)
    if change == "threads":
        monkeypatch.setattr(torch, "get_num_threads", lambda: 17)
    if change == "torch":
        monkeypatch.setattr(torch, "__version__", "99")
    given = {"owner": {"owner": "others"}, "codec": {"codec": "int8"}}.get(change, {})
    eyes.open(**given)(many)
    assert len(eyes.built) == 2 and eyes.images == 14


# ---- tokens and pixels ----------------------------------------------------------------------------------------------


def shown(sizes: Sequence[tuple[int, int]], question: str) -> Example:
    return Example("a", [Image.effect_noise(size, 80).convert("RGB") for size in sizes], question, "two")


@pytest.mark.parametrize("name", ["small", "tiny"])
def test_tokens_and_pixels_are_the_processors_own(llava, name):
    model, theirs = llava
    if name == "tiny":
        backbone = targets.make(composition.compose().llm)
        model, theirs = backbone.model, backbone.processor
    _, processor = frozen_modules.build(frozen_modules.take(model, theirs))
    examples = [
        shown([(16, 16)], "which digit is red ?"),
        shown([(40, 30), (9, 64)], "<image>what is the sum ?"),
        shown([(48, 48), (48, 48), (31, 17)], "is <image> left <image>"),
    ]
    items = prepare(examples, processor, PROMPT)
    for example, item in zip(examples, items, strict=True):
        wanted = theirs(
            images=list(example.images), text=[PROMPT.format(question=example.question)], return_tensors="pt"
        )
        assert item.prompt.tolist() == wanted["input_ids"][0].tolist()
        assert item.image.tolist() == (wanted["input_ids"][0] == theirs.image_token_id).tolist()
        assert torch.equal(item.pixels(), wanted["pixel_values"])
    assert collate(items).image_BT.sum() == 6 * processor.places


@pytest.mark.parametrize(("count", "question"), [(2, "is red ?"), (1, "<image> is red ?")])
def test_a_prompt_without_a_place_for_each_image_is_refused(processor, count, question):
    examples = [shown([(16, 16)] * count, question), shown([(16, 16)] * (3 - count), question)]
    with pytest.raises(ValueError, match="a: . placeholders in its prompt for . images; see llm.prompt"):
        prepare(examples, processor, PROMPT)


# ---- the cached encoder ---------------------------------------------------------------------------------------------


def test_a_later_process_has_the_bits_of_the_first_without_an_encoder(eyes, many, exact):
    first = eyes.open()
    first.fill(many)
    assert len(eyes.built) == 1 and eyes.images == 7
    assert same(first(many), exact) and same(eyes.open()(many), exact)
    eyes.open().fill(many)
    assert len(eyes.built) == 1 and eyes.images == 7


def test_an_image_has_the_same_bits_whatever_comes_with_it(eyes, edge, many, exact, processor):
    eyes.open().fill(many[4:5])
    assert same(eyes.open()(many), exact)
    pair = [Example("pair", [*some_examples(7)[1].images, *some_examples(7)[6].images], "<image> is red ?", "two")]
    (both,) = collate(encode(edge, prepare(pair, processor, PROMPT))).features_MPE.split(2)
    assert same(both.split(1), [exact[1], exact[6]])


def test_an_encoder_is_let_go_when_nothing_is_missing(eyes, many):
    cached = eyes.open()
    cached.fill(many)
    assert [encoder() for encoder in eyes.built] == [None]


def test_questions_about_one_image_share_its_features(eyes, processor):
    example = some_examples(1)[0]
    eyes.open().fill(prepare([example, replace(example, id="b", question="is red ?")], processor, PROMPT))
    assert eyes.images == 1


def test_what_a_small_store_forgot_is_made_again(eyes, many, exact):
    cached = eyes.open(disk_bytes=2 * SAMPLE_BYTES)
    cached.fill(many)
    for _ in range(2):
        assert same([cached([item])[0] for item in many], exact)
        assert same(cached(many), exact)
    assert len(eyes.built) == 2, "once to fill, and then no more often than once"


@pytest.mark.parametrize("harm", ["truncated", "garbage", "gone"])
def test_a_file_that_is_not_whole_is_made_anew(eyes, many, exact, harm):
    eyes.open().fill(many)
    files = sorted(eyes.folder.rglob("*.safetensors"))
    assert len(files) == 7
    for path in files[:4]:
        if harm == "gone":
            path.unlink()
        else:
            path.write_bytes(path.read_bytes()[:-1] if harm == "truncated" else b"garbage")
    assert same(eyes.open()(many), exact)
    assert same(eyes.open()(many), exact) and eyes.images == 7 + 4, "and the files are whole again"


def test_lossy_features_are_rounded_once(eyes, many, exact):
    for _ in range(2):
        features = eyes.open(codec="int8")(many)
        assert same(features, [codecs.rounded(own, "int8") for own in exact])
        assert same(features, [codecs.rounded(own, "int8") for own in features])
    assert not same(features, exact)
    assert same(eyes.open()(many), exact), "beside those of another codec"


def test_images_are_not_held(eyes, processor):
    """A dataset may decode them when it is asked for an example."""
    decoded = []

    class Decoding(Sequence):
        def __len__(self):
            return 3

        def __getitem__(self, i):
            example = some_examples(3)[i]
            decoded.extend(map(weakref.ref, example.images))
            return example

    items = prepare(Decoding(), processor, PROMPT, eyes.open())
    for _ in range(2):
        collate(items)
        assert decoded and not any(image() for image in decoded)


# ---- the frozen parts on disk ---------------------------------------------------------------------------------------


def test_frozen_parts_are_mapped_and_those_that_are_not_whole_are_not_there(llava, own_home):
    taken = frozen_modules.take(*llava)
    digest = tree.digest(taken)
    assert machine_cache.load_modules(digest) is None
    with pytest.raises(ValueError, match="the host's frozen modules have hash"):
        machine_cache.save_modules("0" * 64, taken)
    machine_cache.save_modules(digest, taken)
    mapped = machine_cache.load_modules(digest)
    assert tree.digest(mapped) == digest and "table" in mapped and "other" not in mapped
    built, _ = frozen_modules.build(mapped, encoder=False)
    assert built.encoder is None
    path = machine_cache.home() / "edge" / f"{digest}.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    assert machine_cache.load_modules(digest) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_rows_of_a_file_are_those_of_the_tensor(tmp_path, dtype):
    table_VD = torch.randn(50, 6).to(dtype)
    machine_cache.save({"other": torch.ones(3), "table": table_VD}, tmp_path / "file.safetensors")
    rows = machine_cache.Mapped(tmp_path / "file.safetensors").rows("table")
    tokens_N = torch.tensor([49, 0, 7, 7, 31])
    assert rows.shape == table_VD.shape
    assert torch.equal(rows[tokens_N], table_VD[tokens_N]) and rows[tokens_N[:0]].shape == (0, 6)


@pytest.mark.parametrize("change", ["missing", "shape"])
def test_parts_that_their_config_does_not_describe_are_refused(llava, change):
    taken = frozen_modules.take(*llava)
    name = next(name for name in taken if name.startswith("encoder/"))
    if change == "missing":
        del taken[name]
    else:
        taken[name] = taken[name][:1]
    with pytest.raises(ValueError, match="config says"):
        frozen_modules.build(taken)


def test_the_connector_is_transformers_own(llava):
    from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

    theirs = LlavaMultiModalProjector(llava[0].config)
    ours = Connector(12, 16)
    ours.load_state_dict(theirs.state_dict())
    features_MPE = torch.randn(2, 4, 12)
    assert torch.equal(ours(features_MPE), theirs(features_MPE))


# ---- runs -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def built(monkeypatch):
    """The threads of those who built an encoder."""
    names, build = [], frozen_modules.build_encoder
    monkeypatch.setattr(
        frozen_modules, "build_encoder", lambda given: (names.append(threading.current_thread().name), build(given))[1]
    )
    return names


def by_clients(names) -> int:
    return sum(name.startswith("fedmm-client") for name in names)


@pytest.mark.run
def test_an_encoder_is_built_once_a_run_and_bits_do_not_depend_on_what_was_there(
    backbone, tmp_path, monkeypatch, built
):
    cold = rounds(run(backbone, tmp_path / "cold"))
    assert by_clients(built) == 3, "once for each of three clients, in three messages each"
    warm = rounds(run(backbone, tmp_path / "warm"))
    assert by_clients(built) == 3
    for path in machine_cache.home().rglob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:100])
    assert rounds(run(backbone, tmp_path / "harmed")) == cold == warm
    assert by_clients(built) == 6
    small = Store(memory_bytes=0, folder=tmp_path / "small", disk_bytes=3 * SAMPLE_BYTES)
    monkeypatch.setattr(build, "_store", lambda *_: small)
    assert rounds(run(backbone, tmp_path / "evicted")) == cold


@pytest.mark.run
def test_another_backbone_finds_nothing_of_the_first(backbone, tmp_path, built):
    from helpers import small_llava

    run(backbone, tmp_path / "one", "rounds=1")
    other = small_llava(tmp_path / "llava", seed=1, image_size=48)
    run(backbone, tmp_path / "other", "rounds=1", f"llm.path={other}")
    assert by_clients(built) == 6
    assert len(list((machine_cache.home() / "features").iterdir())) == 2


@pytest.mark.run
def test_without_a_cache_pixels_are_encoded_in_every_step(backbone, tmp_path):
    kept = rounds(run(backbone, tmp_path / "kept", "rounds=1"))
    none = rounds(run(backbone, tmp_path / "none", "rounds=1", "edge.cache_disk_mb=0"))
    assert none[0]["loss"]["0"] == pytest.approx(kept[0]["loss"]["0"], rel=1e-5)


@pytest.mark.run
def test_lossy_features_go_through_a_whole_run(backbone, tmp_path):
    exact = run(backbone, tmp_path / "exact", "rounds=1")
    int8 = run(backbone, tmp_path / "int8", "rounds=1", "link.codec.features=int8")
    assert rounds(exact)[0]["state"] != rounds(int8)[0]["state"]
    stored = [
        safetensors.torch.load_file(path)["tensor"]
        for path in (machine_cache.home() / "features").rglob("*.safetensors")
    ]
    lossy = [features for features in stored if torch.equal(codecs.rounded(features, "int8"), features)]
    assert len(lossy) == len(stored) / 2 > 0
