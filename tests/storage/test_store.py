"""Tensors by owner and key: what is found is what was put last, and neither bound is ever exceeded."""

from __future__ import annotations

import logging
import os
import random
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch
from safetensors import SafetensorError

from fedmm.storage import tensor_store as module
from fedmm.storage.tensor_store import Store

KIB = 1024
ROOMY = 1 << 20


def filled(value: int, size_bytes: int = KIB) -> torch.Tensor:
    return torch.full((size_bytes,), value, dtype=torch.uint8)


def file_bytes(tensor: torch.Tensor) -> int:
    return len(safetensors.torch.save({"tensor": tensor}))


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def same(left: torch.Tensor | None, right: torch.Tensor) -> bool:
    return left is not None and left.dtype == right.dtype and torch.equal(left, right)


def on_disk(folder: Path, **options) -> Store:
    return Store(memory_bytes=0, folder=folder, disk_bytes=ROOMY, **options)


# ---- what is forgotten -----------------------------------------------------------------------------------------------


def test_the_oldest_goes_and_a_get_makes_new():
    store = Store(memory_bytes=3 * KIB)
    for value, key in enumerate("abc"):
        store.put("0", key, filled(value))
    assert same(store.get("0", "a"), filled(0))
    store.put("0", "d", filled(3))
    assert [store.has("0", key) for key in "abcd"] == [True, False, True, True]
    assert store.get("0", "b") is None and len(store) == 3 and store.memory_used_bytes == 3 * KIB


def test_has_makes_nothing_new():
    store = Store(memory_bytes=2 * KIB)
    store.put("0", "a", filled(0))
    store.put("0", "b", filled(1))
    assert store.has("0", "a")
    store.put("0", "c", filled(2))
    assert not store.has("0", "a")


@pytest.mark.parametrize("disk", [False, True])
def test_an_owner_who_puts_much_pushes_out_only_its_own(tmp_path, disk):
    disk_bytes = 8 * file_bytes(filled(0)) if disk else 0
    store = Store(memory_bytes=0 if disk else 8 * KIB, folder=tmp_path, disk_bytes=disk_bytes)
    for key in "ab":
        store.put("modest", key, filled(7))
    for key in range(50):
        store.put("greedy", str(key), filled(1))
    assert store.has("modest", "a") and store.has("modest", "b")
    assert [key for key in range(50) if store.has("greedy", str(key))] == list(range(44, 50))


def test_replaced_is_replaced_in_either_tier(tmp_path):
    store = Store(memory_bytes=2 * KIB, folder=tmp_path, disk_bytes=ROOMY)
    for size_bytes in (8 * KIB, KIB, 8 * KIB):  # disk, memory, disk
        store.put("0", "a", filled(size_bytes % 251, size_bytes))
        assert same(store.get("0", "a"), filled(size_bytes % 251, size_bytes)) and len(store) == 1
    store.put("0", "a", filled(5))
    store.close()  # the one in memory goes, and the file of the one before is gone already
    assert store.get("0", "a") is None and files(tmp_path) == []


def test_empty_tensors_count_too():
    store = Store(memory_bytes=10 * KIB)
    for key in range(1000):
        store.put("0", str(key), torch.empty(0))
    assert len(store) == 10 and same(store.get("0", "999"), torch.empty(0))


class Naive:
    """The rule written out: lists of (owner, key, size), oldest first."""

    def __init__(self, memory_bytes: int, disk_bytes: int) -> None:
        self.bounds = (memory_bytes, disk_bytes)
        self.tiers: tuple[list, list] = ([], [])

    def find(self, owner, key):
        return next((t, e) for t, tier in enumerate(self.tiers) for e in tier if e[0] == owner and e[1] == key)

    def holds(self, owner, key) -> bool:
        return any(e[:2] == (owner, key) for tier in self.tiers for e in tier)

    def get(self, owner, key) -> bool:
        if not self.holds(owner, key):
            return False
        t, entry = self.find(owner, key)
        self.tiers[t].remove(entry)
        self.tiers[t].append(entry)
        return True

    def put(self, owner, key, tensor) -> None:
        for tier in self.tiers:
            tier[:] = [e for e in tier if e[:2] != (owner, key)]
        self.enter(0 if tensor.nbytes <= self.bounds[0] else 1, owner, key, tensor)

    def enter(self, t, owner, key, tensor) -> None:
        size = file_bytes(tensor) if t else tensor.nbytes
        if t and tensor.nbytes + KIB > self.bounds[1]:
            return
        tier = self.tiers[t]
        tier.append((owner, key, size, tensor))
        while sum(e[2] for e in tier) > self.bounds[t]:
            heaviest = max({e[0] for e in tier}, key=lambda owner: sum(e[2] for e in tier if e[0] == owner))
            gone = next(e for e in tier if e[0] == heaviest)
            tier.remove(gone)
            if t == 0:
                self.enter(1, gone[0], gone[1], gone[3])


@pytest.mark.parametrize("memory_kib, disk_kib", [(20, 0), (0, 24), (12, 20), (5, 40)])
@pytest.mark.parametrize("seed", [0, 1])
def test_three_hundred_random_operations_follow_the_rule_written_out(tmp_path, memory_kib, disk_kib, seed):
    draw = random.Random(seed)
    store = Store(memory_bytes=memory_kib * KIB, folder=tmp_path, disk_bytes=disk_kib * KIB)
    naive, last = Naive(memory_kib * KIB, disk_kib * KIB), {}
    for step in range(300):
        name = draw.choice("012"), draw.choice("abcdefgh")
        if draw.random() < 0.6:
            last[name] = filled(step % 251, draw.randint(KIB, 6 * KIB))  # so many sizes that no two owners tie
            if last[name].nbytes > memory_kib * KIB and last[name].nbytes + KIB > disk_kib * KIB:
                continue
            store.put(*name, last[name])
            naive.put(*name, last[name])
        else:
            found = store.get(*name)
            assert naive.get(*name) == (found is not None)
            assert found is None or same(found, last[name])
        assert store.memory_used_bytes == sum(e[2] for e in naive.tiers[0]) <= memory_kib * KIB
        assert store.disk_used_bytes == sum(path.stat().st_size for path in files(tmp_path)) <= disk_kib * KIB
        assert len(store) == sum(map(len, naive.tiers))
        for owner in "012":
            assert all(store.has(owner, key) == naive.holds(owner, key) for key in "abcdefgh")


# ---- disk ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.bool, torch.int64])
@pytest.mark.parametrize("shape", [(), (0, 3), (7,), (5, 30, 40)])
def test_what_spills_returns_bit_for_bit(tmp_path, dtype, shape):
    store = Store(memory_bytes=64 * KIB, folder=tmp_path, disk_bytes=ROOMY)
    tensor = (torch.randn(shape) * 50).to(dtype)
    store.put("0", "a", tensor)
    store.put("0", "big", filled(0, 64 * KIB))
    assert [path.name for path in files(tmp_path)] == ["a.safetensors"]
    found = store.get("0", "a")
    assert same(found, tensor) and found.shape == tensor.shape


def test_a_nan_returns_with_its_bits(tmp_path):
    bits = torch.tensor([0x7FC00001, 0x7F800000, -1], dtype=torch.int32)
    store = on_disk(tmp_path)
    store.put("0", "a", bits.view(torch.float32))
    assert torch.equal(store.get("0", "a").view(torch.int32), bits)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc")
def test_a_get_from_disk_maps_the_file_and_outlives_it(tmp_path):
    store = on_disk(tmp_path)
    store.put("0", "mapped", filled(3, 64 * KIB))
    tensor = store.get("0", "mapped")
    assert str(tmp_path / "0" / "mapped.safetensors") in Path("/proc/self/maps").read_text()
    (tmp_path / "0" / "mapped.safetensors").unlink()
    assert same(tensor, filled(3, 64 * KIB))


def test_a_get_from_disk_leaves_memory_as_it_is(tmp_path):
    store = Store(memory_bytes=2 * KIB, folder=tmp_path, disk_bytes=ROOMY)
    for value, key in enumerate("abc"):
        store.put("0", key, filled(value))
    assert same(store.get("0", "a"), filled(0))
    assert [path.stem for path in files(tmp_path)] == ["a"] and store.memory_used_bytes == 2 * KIB


def test_what_is_too_large_for_memory_alone_goes_to_disk_and_pushes_nothing_out(tmp_path):
    store = Store(memory_bytes=2 * KIB, folder=tmp_path, disk_bytes=ROOMY)
    store.put("0", "a", filled(1))
    store.put("0", "large", filled(2, 4 * KIB))
    assert [path.stem for path in files(tmp_path)] == ["large"] and store.memory_used_bytes == KIB


def test_what_is_too_large_for_the_disk_alone_pushes_nothing_out_there(tmp_path):
    store = Store(memory_bytes=8 * KIB, folder=tmp_path, disk_bytes=4 * KIB)
    store.put("0", "small", filled(1))
    store.put("0", "large", filled(2, 8 * KIB))  # small spills
    store.put("0", "again", filled(3, 8 * KIB))  # large cannot
    assert [store.has("0", key) for key in ("small", "large", "again")] == [True, False, True]


def test_a_later_process_finds_what_is_there_and_its_age(tmp_path):
    first = on_disk(tmp_path)
    for value, key in enumerate("abc"):
        first.put("0", key, filled(value))
        os.utime(tmp_path / "0" / f"{key}.safetensors", (1000 + value, 1000 + value))
    assert same(first.get("0", "a"), filled(0))  # now newer than b
    first.close()
    second = Store(memory_bytes=0, folder=tmp_path, disk_bytes=3 * KIB)  # less than before: b goes
    assert len(second) == 2 and second.disk_used_bytes == sum(path.stat().st_size for path in files(tmp_path))
    assert same(second.get("0", "a"), filled(0)) and second.get("0", "b") is None
    assert same(second.get("0", "c"), filled(2))


def test_two_stores_on_one_folder_find_each_others(tmp_path):
    left, right = on_disk(tmp_path), on_disk(tmp_path)
    left.put("0", "a", filled(1))
    assert right.has("0", "a") and same(right.get("0", "a"), filled(1)) and len(right) == 1
    right.put("0", "a", filled(2, 3 * KIB))
    assert same(left.get("0", "a"), filled(2, 3 * KIB))
    assert left.disk_used_bytes == right.disk_used_bytes == file_bytes(filled(2, 3 * KIB))


def test_two_stores_on_one_folder_together_keep_about_the_bound(tmp_path):
    stores = [Store(memory_bytes=0, folder=tmp_path, disk_bytes=64 * KIB) for _ in range(2)]
    for key in range(300):
        stores[key % 2].put(str(key % 2), str(key), filled(1))
        assert sum(path.stat().st_size for path in files(tmp_path)) <= (64 + 8 + 2) * KIB


def test_while_a_file_is_written_others_find_the_whole_one_before_it(tmp_path, monkeypatch):
    writer, reader = on_disk(tmp_path), on_disk(tmp_path)
    writer.put("0", "a", filled(1))
    seen = []

    def watched(tensors, path):
        seen.append(reader.get("0", "a"))
        Path(path).write_bytes(b"half")
        seen.append(reader.get("0", "a"))
        safetensors.torch.save_file(tensors, path)
        seen.append(reader.get("0", "a"))

    monkeypatch.setattr(module, "save_file", watched)
    writer.put("0", "a", filled(2))
    assert len(seen) == 3 and all(same(found, filled(1)) for found in seen)
    assert same(reader.get("0", "a"), filled(2))


WORKER = """
import random, sys, torch
from pathlib import Path
from fedmm.storage.tensor_store import Store
torch.set_num_threads(1)
store = Store(memory_bytes=0, folder=Path(sys.argv[1]), disk_bytes=40 << 10)
draw, found = random.Random(int(sys.argv[2])), 0
for _ in range(1500):
    key = draw.randrange(30)
    tensor = torch.full((1024 + 8 * key,), key, dtype=torch.uint8)
    if (got := store.get("0", str(key))) is None:
        store.put("0", str(key), tensor)
    else:
        assert torch.equal(got, tensor)
        found += 1
assert found > 100
"""


def test_processes_share_a_folder_that_is_too_small_for_them(tmp_path):
    workers = [
        subprocess.Popen([sys.executable, "-c", WORKER, tmp_path, str(seed)], stderr=subprocess.PIPE, text=True)
        for seed in range(2)
    ]
    for worker in workers:
        _, errors = worker.communicate(timeout=120)
        assert worker.returncode == 0 and errors == ""
    assert all(path.suffix == ".safetensors" for path in files(tmp_path))


# ---- disks fail ------------------------------------------------------------------------------------------------------


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def garbage(path: Path) -> None:
    path.write_bytes(b"\xff" * 2000)


def another_kind(path: Path) -> None:
    safetensors.torch.save_file({"other": filled(1)}, path)


@pytest.mark.parametrize("spoil", [cut, empty, garbage, another_kind])
def test_a_corrupt_file_is_absent_and_goes(tmp_path, spoil):
    store = on_disk(tmp_path)
    store.put("0", "a", filled(1))
    spoil(tmp_path / "0" / "a.safetensors")
    assert store.get("0", "a") is None and not store.has("0", "a")
    assert files(tmp_path) == [] and len(store) == store.disk_used_bytes == 0
    store.put("0", "a", filled(2))
    assert same(store.get("0", "a"), filled(2))


def test_a_vanished_file_is_absent(tmp_path):
    store = on_disk(tmp_path)
    store.put("0", "a", filled(1))
    (tmp_path / "0" / "a.safetensors").unlink()
    assert not store.has("0", "a") and store.get("0", "a") is None
    assert len(store) == store.disk_used_bytes == 0


def test_a_file_that_cannot_be_opened_now_is_not_deleted(tmp_path, monkeypatch):
    store = on_disk(tmp_path)
    store.put("0", "a", filled(1))

    def refuse(*_):
        raise RuntimeError("unable to open file: Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(module, "safe_open", refuse)
        assert store.get("0", "a") is None
    assert same(store.get("0", "a"), filled(1))


@pytest.mark.parametrize("error", [OSError("no space"), SafetensorError("I/O error: no space")])
def test_a_full_disk_is_a_warning_once_and_no_error(tmp_path, monkeypatch, caplog, error):
    store = on_disk(tmp_path)
    store.put("0", "a", filled(1))

    def half(tensors, path):
        Path(path).write_bytes(b"half")
        raise error

    monkeypatch.setattr(module, "save_file", half)
    with caplog.at_level(logging.WARNING, "fedmm.storage.tensor_store"):
        store.put("0", "a", filled(2))
        store.put("0", "b", filled(3))
    assert store.get("0", "a") is None and store.get("0", "b") is None  # a's older value is not a's value
    assert files(tmp_path) == [] and len(caplog.records) == 1 and "no space" in caplog.text


def test_a_folder_that_cannot_be_made_is_no_error(tmp_path, caplog):
    (tmp_path / "0").write_text("a file in the way")
    store = on_disk(tmp_path)
    store.put("0", "a", filled(1))
    assert store.get("0", "a") is None and "going on without" in caplog.text


def test_what_a_killed_process_left_aside_goes_when_old(tmp_path):
    (tmp_path / "0").mkdir()
    ours, theirs, young = (
        tmp_path / "0" / f".{name}" for name in ("a.safetensors." + "0" * 32, "tmpQeKRyY", "tmpabcdef")
    )
    foreign = tmp_path / "0" / ".profile"
    for path in (ours, theirs, young, foreign):
        path.write_bytes(b"half")
    for path in (ours, theirs, foreign):
        os.utime(path, (time.time() - 4000,) * 2)
    assert len(on_disk(tmp_path)) == 0
    assert files(tmp_path) == sorted([young, foreign])


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["../x", "", "a/b", "x" * 200, ".", "..", ".hidden", "a\n", "a\0", "ä", "a b", "a\\b"])
def test_bad_names_are_refused(tmp_path, name):
    store = on_disk(tmp_path / "inside")
    for owner, key in ((name, "a"), ("0", name)):
        for call in (lambda o, k: store.put(o, k, filled(1)), store.get, store.has):
            with pytest.raises(ValueError, match="wanted 1 to 128 of"):
                call(owner, key)
    assert list(tmp_path.iterdir()) == []


def test_the_longest_name_is_good(tmp_path):
    store = on_disk(tmp_path)
    store.put("x" * 128, "y" * 128, filled(1))
    assert same(store.get("x" * 128, "y" * 128), filled(1))


def test_too_large_says_what_came_and_which_knob(tmp_path):
    store = Store(memory_bytes=2 * KIB, folder=tmp_path, disk_bytes=4 * KIB)
    store.put("0", "a", filled(1))
    with pytest.raises(
        ValueError, match="9216 bytes.* 2048 bytes of memory .* 4096 bytes of disk; .*link.cache_memory_mb"
    ):
        store.put("0", "a", filled(2, 9 * KIB))
    assert same(store.get("0", "a"), filled(1))  # untouched
    with pytest.raises(ValueError, match="raise client.features_mb$"):
        Store(memory_bytes=0, folder=tmp_path, knobs="client.features_mb").put("0", "a", filled(1))


def test_a_huge_expanded_tensor_is_refused_before_it_takes_memory():
    with pytest.raises(ValueError, match="fits neither"):
        Store(memory_bytes=ROOMY).put("0", "a", torch.zeros(1).expand(1 << 45))


# ---- lifetimes -------------------------------------------------------------------------------------------------------


def test_a_view_does_not_keep_its_buffer_and_a_whole_tensor_is_not_copied():
    store = Store(memory_bytes=ROOMY)
    buffer = torch.arange(1 << 16)
    views = {"slice": buffer[10:20], "columns": buffer.view(256, 256)[:, :3], "expanded": buffer[:1].expand(500)}
    for key, view in views.items():
        store.put("0", key, view)
        found = store.get("0", key)
        assert same(found, view) and found.untyped_storage().nbytes() == view.nbytes
    whole = torch.randn(300, requires_grad=True)
    store.put("0", "whole", whole)
    found = store.get("0", "whole")
    assert found.data_ptr() == whole.data_ptr() and not found.requires_grad


def test_closing_keeps_the_files_unless_ephemeral(tmp_path):
    store = Store(memory_bytes=KIB, folder=tmp_path, disk_bytes=ROOMY)
    for key in "ab":
        store.put("0", key, filled(1))
    store.close()
    assert store.memory_used_bytes == 0 and [path.stem for path in files(tmp_path)] == ["a"]


def test_an_ephemeral_close_leaves_nothing(tmp_path):
    folder = tmp_path / "run" / "samples"
    store = Store(memory_bytes=2 * KIB, folder=folder, disk_bytes=8 * KIB, ephemeral=True)
    for key in range(30):
        store.put(str(key % 3), str(key), filled(1))
    assert files(folder)
    store.close()
    store.close()
    assert len(store) == 0 and not folder.exists() and folder.parent.exists()


def test_an_ephemeral_close_leaves_what_others_wrote(tmp_path):
    on_disk(tmp_path).put("0", "theirs", filled(1))
    store = on_disk(tmp_path, ephemeral=True)
    store.put("0", "own", filled(2))
    store.get("0", "theirs")
    store.close()
    assert [path.stem for path in files(tmp_path)] == ["theirs"]


def test_closing_one_without_a_folder_touches_no_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "0").mkdir()
    safetensors.torch.save_file({"tensor": filled(1)}, tmp_path / "0" / "a.safetensors")
    store = Store(memory_bytes=ROOMY, ephemeral=True)
    assert not store.has("0", "a") and store.get("0", "a") is None
    store.put("0", "a", filled(2))
    store.close()
    assert (tmp_path / "empty").exists() and len(files(tmp_path)) == 1


@pytest.fixture
def restless():
    """Threads take turns at almost every instruction."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def test_threads_hammer_one_store(tmp_path, restless):
    store = Store(memory_bytes=12 * KIB, folder=tmp_path, disk_bytes=16 * KIB)
    failures: list[BaseException] = []

    def hammer(seed: int) -> None:
        draw = random.Random(seed)
        try:
            for _ in range(300):
                owner, key = str(draw.randrange(3)), draw.randrange(12)
                if draw.random() < 0.5:
                    store.put(owner, str(key), filled(key, KIB + key))
                elif (found := store.get(owner, str(key))) is not None:
                    assert same(found, filled(key, KIB + key))
                assert store.memory_used_bytes <= 12 * KIB and store.disk_used_bytes <= 16 * KIB
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=hammer, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert store.disk_used_bytes == sum(path.stat().st_size for path in files(tmp_path))
