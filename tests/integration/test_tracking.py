"""Trackers: every one that accelerate knows, and none that is not installed."""

from typing import get_args

import pytest
from accelerate.tracking import LOGGER_TYPE_TO_CLASS

from diffusers_fair import FairnessFinetuner, cli
from diffusers_fair.config.schema import RunConfig
from diffusers_fair.doctor import examine
from diffusers_fair.training import tracking

TRACKERS = {*get_args(RunConfig.model_fields["tracker"].annotation)}


def test_every_tracker_of_accelerate_may_be_named():
    assert {*LOGGER_TYPE_TO_CLASS, "none"} == TRACKERS
    assert {*tracking._LOG_IMAGE} == {*LOGGER_TYPE_TO_CLASS}


def test_a_tracker_that_is_not_installed_is_refused_before_anything_is_claimed(
    monkeypatch, tmp_path, capsys
):
    monkeypatch.setattr(tracking, "is_installed", lambda name: False)
    words = ["testbed-gender", "tracker=comet_ml", f"output={tmp_path / 'run'}"]
    monkeypatch.setattr("sys.argv", ["diffusers-fair", "train", *words])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    sentence = (
        "tracker 'comet_ml' needs the package 'comet_ml': pip install comet_ml, or set tracker=none"
    )
    assert capsys.readouterr().err == f"diffusers-fair: {sentence}\n"
    assert not (tmp_path / "run").exists()
    with pytest.raises(ModuleNotFoundError, match=sentence):
        FairnessFinetuner.from_recipe("testbed-gender", tracker="comet_ml")


def test_the_doctor_says_how_to_install_a_tracker(monkeypatch):
    monkeypatch.setattr("diffusers_fair.backends.needs.find_spec", lambda name: None)
    needs = {need.what: need.advice for need in examine(RunConfig.load("testbed-gender"))}
    assert needs["package tensorboard"] == "pip install tensorboard"


def test_a_folder_is_not_a_package(tmp_path, monkeypatch):
    (tmp_path / "comet_ml").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="tracker 'comet_ml' needs the package"):
        tracking.require_tracker("comet_ml")
