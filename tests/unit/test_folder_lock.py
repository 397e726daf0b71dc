"""The lock on a folder: one launch at a time, and nothing left of it."""

import multiprocessing
import os
import signal

import pytest
from together import together

from diffusers_fair.folder_lock import LOCK, folder_lock

IN_USE = "is being written by another process: wait until it has finished, or choose another folder"


def test_a_second_launch_is_refused_and_the_folder_free_afterwards(tmp_path):
    folder = tmp_path / "a" / "run"
    for _ in range(2):
        with folder_lock(folder):
            assert (folder / LOCK).exists()
            with pytest.raises(ValueError, match=rf"'{folder}' {IN_USE}"), folder_lock(folder):
                pass
    assert not list(tmp_path.iterdir())  # nothing was written to it


def test_only_the_lock_is_removed(tmp_path):
    with folder_lock(tmp_path / "run"):
        (tmp_path / "run" / "file").touch()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["file"]


def hold(folder, ready):
    with folder_lock(folder):
        ready.set()
        signal.pause()


def test_it_dies_with_its_process(tmp_path):
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    process = context.Process(target=hold, args=(tmp_path, ready), daemon=True)
    process.start()
    assert ready.wait(30)
    with pytest.raises(ValueError, match=IN_USE), folder_lock(tmp_path):
        pass
    process.kill()
    process.join()
    assert (tmp_path / LOCK).exists()
    with folder_lock(tmp_path):
        pass
    assert not list(tmp_path.iterdir())


def test_a_file_that_its_holder_removes_meanwhile_is_not_locked(tmp_path, monkeypatch):
    opened, removed = os.open, []

    def remove_first(path, *args):
        descriptor = opened(path, *args)
        if not removed:
            removed.append(os.unlink(path))
        return descriptor

    monkeypatch.setattr(os, "open", remove_first)
    with folder_lock(tmp_path):
        assert (tmp_path / LOCK).exists()
        with pytest.raises(ValueError, match=IN_USE), folder_lock(tmp_path):
            pass


def test_what_cannot_be_locked_is_used_without_a_lock(tmp_path):
    file = tmp_path / "file"
    file.touch()
    with folder_lock(file), folder_lock(file / "below"):
        assert file.read_bytes() == b""


def enter(folder) -> str:
    try:
        with folder_lock(folder):
            return "held"
    except ValueError as error:
        return str(error)


def test_processes_of_one_launch_share_it_and_are_refused_together(tmp_path):
    assert together(2, enter, tmp_path) == ["held"] * 2
    with folder_lock(tmp_path):
        first, second = together(2, enter, tmp_path)
    assert IN_USE in first
    assert first == second
