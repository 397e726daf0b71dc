"""Paths that users give: home folders, and folders that cannot be written to."""

import os
import re
from pathlib import Path

import pytest

from diffusers_fair.adapters.folder import open_adapter
from diffusers_fair.adapters.repository import local_folder
from diffusers_fair.backends.reference_faces import needs as reference_faces_needs
from diffusers_fair.backends.registry import base, classifier_needs
from diffusers_fair.config.models import ClassifierSection
from diffusers_fair.evaluation.image_folder import image_folder
from diffusers_fair.paths import expand, require_writable
from diffusers_fair.prompts.tables import read_table
from diffusers_fair.publishing.card import write_card
from diffusers_fair.publishing.hub import push_adapter
from diffusers_fair.reports.folder import load_report, require_free
from diffusers_fair.testbed import world
from diffusers_fair.training.labelled_images import read_images


def test_home_folders(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert expand("~/a") == tmp_path / "a"
    assert expand("a/~") == Path("a/~")
    assert expand("~nobody-has-this-name/a") == Path("~nobody-has-this-name/a")


def test_an_empty_text_is_not_the_current_folder():
    with pytest.raises(ValueError, match="path of a file or folder, got an empty text"):
        expand("")


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


@pytest.mark.parametrize(
    "take",
    [
        open_adapter,
        image_folder,
        load_report,
        read_images,
        require_free,
        write_card,
        lambda path: push_adapter(path, "a/b", dry_run=True),
        lambda path: read_table(path, ("a", "b")),
    ],
)
def test_every_function_expands_the_paths_that_it_takes(take, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match=re.escape(str(tmp_path / "file" / "x"))):
        take("~/file/x")


def test_folders_of_models_are_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "faces").mkdir()
    (tmp_path / "faces" / "a.png").write_bytes(b"x")
    assert reference_faces_needs("~/faces")[0].available
    assert local_folder("~/faces") == tmp_path / "faces"
    single = "~/faces/model.safetensors"
    assert not base(single).needs(single, None)[0].available
    for name in ("model.safetensors", "classifier.json"):
        (tmp_path / "faces" / name).write_text("{}")
    section = ClassifierSection(kind="checkpoint", model="~/faces")
    (attribute,) = list(world.ATTRIBUTES.values())[:1]
    assert classifier_needs(section, attribute)[1].available
    assert base(single).needs(single, None)[0].available
