"""Checkpoints and other files of a run: whole or not there, found again, and few."""

import errno
import json
import os
import re
import resource
from contextlib import contextmanager

import pytest
import torch

from diffusers_fair import atomic
from diffusers_fair.training.checkpoints import (
    discard_checkpoints_after,
    load_checkpoint,
    save_checkpoint,
)
from diffusers_fair.training.run_folder import Events


def state(number: int) -> dict:
    return {"weights": torch.full((3000,), float(number)), "best": None, "more": {"a": [1, 2.5]}}


@pytest.fixture
def folder(tmp_path):
    """With the checkpoints of iterations 2, 4 and 6."""
    for number in (2, 4, 6):
        save_checkpoint(tmp_path / "checkpoints", number, state(number), keep=3)
    return tmp_path / "checkpoints"


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@contextmanager
def small_files(size: int):
    """Files cannot grow beyond so many bytes, as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_the_newest_checkpoint_is_loaded(folder):
    found = load_checkpoint(folder)
    assert found["iteration"] == 6
    assert torch.equal(found["weights"], state(6)["weights"])
    assert (found["best"], found["more"]) == (None, {"a": [1, 2.5]})


def test_without_checkpoints_nothing_is_loaded(tmp_path):
    assert load_checkpoint(tmp_path / "nowhere") is None


def test_only_the_newest_checkpoints_are_kept(folder):
    save_checkpoint(folder, 8, state(8), keep=2)
    assert names(folder) == ["step-000006", "step-000008"]


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (truncate, "another checksum"),
        (flip, "another checksum"),
        (lambda path: path.unlink(), "FileNotFoundError"),
    ],
)
def test_a_damaged_checkpoint_is_skipped(folder, damage, why, caplog):
    damage(folder / "step-000006" / "state.pt")
    found = load_checkpoint(folder)
    (message,) = caplog.messages
    assert re.search(rf"step-000006' is damaged \(.*{why}.*resuming from an older one$", message)
    assert found["iteration"] == 4
    discard_checkpoints_after(folder, 4)
    assert names(folder) == ["step-000002", "step-000004"]


def test_if_all_checkpoints_are_damaged_none_is_loaded(folder, caplog):
    for path in folder.iterdir():
        truncate(path / "state.pt")
    assert load_checkpoint(folder) is None
    assert caplog.text.count("is damaged") == 3


def test_checkpoints_of_the_first_version_have_no_checksum(folder, caplog):
    (folder / "step-000006" / "state.sha256").unlink()
    assert load_checkpoint(folder)["iteration"] == 6
    truncate(folder / "step-000006" / "state.pt")
    assert load_checkpoint(folder)["iteration"] == 4
    assert "is damaged" in caplog.text


def test_a_full_disk_does_not_damage_checkpoints(folder):
    with small_files(4096), pytest.raises(OSError, match="File too large") as full:
        save_checkpoint(folder, 8, state(8), keep=1)
    assert full.value.errno == errno.EFBIG
    assert names(folder) == ["step-000002", "step-000004", "step-000006"]
    assert load_checkpoint(folder)["iteration"] == 6


def test_unfinished_checkpoints_are_removed(folder):
    (folder / ".partial-17-step-000008").mkdir()
    (folder / ".partial-17-step-000008" / "state.pt").write_bytes(b"PK")
    assert load_checkpoint(folder)["iteration"] == 6
    discard_checkpoints_after(folder, 6)
    assert names(folder) == ["step-000002", "step-000004", "step-000006"]


def test_an_existing_checkpoint_is_replaced(folder):
    truncate(folder / "step-000006" / "state.pt")
    save_checkpoint(folder, 6, state(7), keep=3)
    assert load_checkpoint(folder)["weights"][0] == 7


# ---- files ---------------------------------------------------------------------------------------


def test_files_are_written_atomically(tmp_path):
    atomic.write(tmp_path / "file", b"old")
    with small_files(4096), pytest.raises(OSError, match="File too large"):
        atomic.write(tmp_path / "file", b"x" * 10_000)
    assert (tmp_path / "file").read_bytes() == b"old"
    assert names(tmp_path) == ["file"]


def test_data_is_flushed_before_renaming(tmp_path, monkeypatch):
    done = []
    sync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda number: done.append("sync") or sync(number))
    monkeypatch.setattr(os, "replace", lambda *paths: done.append("name") or replace(*paths))
    atomic.write(tmp_path / "file", b"new")
    assert done == ["sync", "name", "sync"]  # the file, its name, the folder with the name
    save_checkpoint(tmp_path, 2, state(2), keep=1)
    assert done[3:] == ["sync", "sync", "sync", "name", "sync"]  # two files and their folder


# ---- events --------------------------------------------------------------------------------------


def test_later_events_and_incomplete_lines_are_removed(tmp_path):
    events = Events(tmp_path / "events.jsonl")
    events.discard_after(0)  # there are none
    for number in (1, 2, 3, 4):
        events.write({"loss": 1 / number}, number)
        events.write({"validation/x": 0.5}, number)
    with events.file.open("a") as file:
        file.write('{"iteration": 2, "lo')
    events.discard_after(3)
    lines = [json.loads(line) for line in events.file.read_text().splitlines()]
    assert [line["iteration"] for line in lines] == [1, 1, 2, 2, 3, 3]
    before = events.file.stat().st_ino
    events.discard_after(3)
    assert events.file.stat().st_ino == before  # nothing to do


def test_damaged_lines_are_removed(tmp_path):
    events = Events(tmp_path / "events.jsonl")
    events.file.write_bytes(b'{"iteration": 1}\n\0\0\0\n[1]\n{"iteration": 2}\n')
    events.discard_after(5)
    assert events.file.read_bytes() == b'{"iteration": 1}\n{"iteration": 2}\n'


def test_metrics_that_are_not_finite_are_not_written(tmp_path):
    events = Events(tmp_path / "events.jsonl")
    events.write({"loss": float("nan"), "skipped": 1}, 3)
    assert events.file.read_text() == '{"iteration": 3, "skipped": 1}\n'
