"""Paths that users give: home folders, and folders that cannot be written to."""

import os
from pathlib import Path

import pytest

from diffusers_fair.paths import expand, require_writable


def test_home_folders(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert expand("~/a") == tmp_path / "a"
    assert expand("a/~") == Path("a/~")
    assert expand("~nobody-has-this-name/a") == Path("~nobody-has-this-name/a")


def test_a_writable_folder_is_not_created(tmp_path):
    folder = tmp_path / "a" / "b"
    assert require_writable(folder) == folder
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["file", "file/x", "file/x/y"])
def test_a_file_is_no_folder(name, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match=r"cannot be a folder, as '.*file' is a file: choose"):
        require_writable(tmp_path / name)


def test_a_read_only_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    with pytest.raises(ValueError, match=r"no permission to write to '.*'; choose another folder"):
        require_writable(tmp_path / "a")
