"""A file is written whole or not at all: `disk.replacing`, which everything that writes whole files goes through."""

from __future__ import annotations

import os
import stat

import pytest

from fedmm.storage import disk


@pytest.mark.parametrize("flush", [True, False])
def test_a_reader_sees_the_old_file_until_the_new_one_is_whole(tmp_path, flush):
    path = tmp_path / "new" / "file"
    with disk.replacing(path, flush=flush) as aside:
        aside.write_text("first")
        assert not path.exists()
    with disk.replacing(path, flush=flush) as aside:
        aside.write_text("second")
        assert path.read_text() == "first"
    assert path.read_text() == "second"


def test_a_block_that_raises_leaves_the_old_file_and_nothing_beside(tmp_path):
    (tmp_path / "file").write_text("old")
    with pytest.raises(OSError, match="No space left"), disk.replacing(tmp_path / "file") as aside:
        aside.write_text("ha")
        raise OSError(28, "No space left on device")
    assert (tmp_path / "file").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(("public", "folder_mode", "file_mode"), [(False, 0o700, 0o600), (True, 0o777, 0o666)])
def test_new_files_and_folders_are_for_their_owner_unless_public(tmp_path, public, folder_mode, file_mode):
    before = os.umask(0)
    try:
        with disk.replacing(tmp_path / "new" / "file", public=public) as aside:
            aside.write_text("text")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == folder_mode
    assert stat.S_IMODE((tmp_path / "new" / "file").stat().st_mode) == file_mode


def test_a_flush_reaches_the_disk_before_the_rename(tmp_path, monkeypatch):
    order = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: order.append(sorted(path.name for path in tmp_path.iterdir())))
    for flush in (True, False):
        with disk.replacing(tmp_path / "file", flush=flush) as aside:
            aside.write_text("text")
        (tmp_path / "file").unlink()
    assert len(order) == 1 and "file" not in order[0]
