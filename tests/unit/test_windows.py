"""What Windows does otherwise: played by the functions of `os` and by missing modules."""

import ast
import fcntl
import os
import shutil
import stat
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from diffusers_fair import atomic
from diffusers_fair.folder_lock import LOCK, folder_lock
from diffusers_fair.training import memory
from diffusers_fair.training.checkpoints import load_checkpoint, save_checkpoint
from diffusers_fair.training.run_folder import Events

DENIED = PermissionError(13, "Permission denied")
open_files: dict[int, str] = {}


@pytest.fixture
def windows(monkeypatch):
    """No folder is opened, nothing flushed that is read only, and no open file removed."""
    real = SimpleNamespace(open=os.open, close=os.close, fsync=os.fsync, unlink=os.unlink)

    def opening(path, flags, *args, **options):
        if os.path.isdir(path):
            raise DENIED
        descriptor = real.open(path, flags, *args, **options)
        open_files[descriptor] = str(path)
        return descriptor

    def closing(descriptor):
        open_files.pop(descriptor, None)
        real.close(descriptor)

    def flushing(descriptor):
        if not isinstance(descriptor, int):
            descriptor = descriptor.fileno()
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(9, "Bad file descriptor")
        real.fsync(descriptor)

    def removing(path, **options):
        if str(path) in open_files.values():
            raise DENIED
        real.unlink(path, **options)

    def locking(descriptor, mode, count):
        assert (mode, count) == (2, 1)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DENIED from None

    functions = {"open": opening, "close": closing, "fsync": flushing, "unlink": removing}
    for name, function in functions.items():
        monkeypatch.setattr(os, name, function)
    monkeypatch.setattr(shutil, "_use_fd_functions", False)  # rmtree opens no folders there
    for name in ("resource", "fcntl"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, "msvcrt", SimpleNamespace(LK_NBLCK=2, locking=locking))
    yield
    open_files.clear()


def test_the_fixture_denies_what_windows_denies(windows, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(PermissionError):
        os.open(tmp_path, os.O_RDONLY)
    descriptor = os.open(tmp_path / "file", os.O_RDONLY)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fsync(descriptor)
    with pytest.raises(PermissionError):
        (tmp_path / "file").unlink()
    os.close(descriptor)


def test_files_and_checkpoints_are_written(windows, tmp_path):
    atomic.write(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"new"
    for step in (1, 2):
        save_checkpoint(tmp_path / "checkpoints", step, {"weights": torch.ones(2)}, keep=1)
    found = load_checkpoint(tmp_path / "checkpoints")
    assert found is not None
    assert found["iteration"] == 2
    events = Events(tmp_path / "events.jsonl")
    events.write({"loss": 1.0}, 1)
    events.sync()
    events.discard_after(0)


def test_a_file_that_cannot_be_flushed_is_an_error(windows, tmp_path, monkeypatch):
    """Only that of a folder is passed over."""
    (tmp_path / "file").touch()
    monkeypatch.setattr(os, "open", lambda *_: (_ for _ in ()).throw(DENIED))
    with pytest.raises(PermissionError):
        atomic.fsync(tmp_path / "file")


def test_a_folder_is_locked(windows, tmp_path):
    with folder_lock(tmp_path / "run"):
        assert stat.S_ISREG((tmp_path / "run" / LOCK).stat().st_mode)
        with (
            pytest.raises(ValueError, match="being written by another process"),
            folder_lock(tmp_path / "run"),
        ):
            pass
    assert not (tmp_path / "run").exists()


def test_memory_is_measured_without_the_module_resource(windows, monkeypatch):
    used = SimpleNamespace(peak_wset=7_000_000_000)
    process = SimpleNamespace(memory_info=lambda: used)
    monkeypatch.setitem(sys.modules, "psutil", SimpleNamespace(Process=lambda: process))
    assert memory.peak(torch.device("cpu")) == 7_000_000_000


def test_text_is_utf_8_whatever_the_system_prefers():
    """Every call that reads or writes text names its encoding."""
    texts = {"read_text": 1, "write_text": 2}  # position after which an encoding has been given
    for file in Path(atomic.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                named = {keyword.arg for keyword in node.keywords} >= {"encoding"}
                given = len(node.args) >= texts.get(node.func.attr, 0)
                assert named or given, f"{file}:{node.lineno}"
