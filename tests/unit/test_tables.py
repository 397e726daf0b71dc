"""Targets of prompts' own: read, spread over prompts, aimed at in training, measured by."""

import json

import numpy as np
import pytest
import torch
from reports import HUE, report

from diffusers_fair import metrics
from diffusers_fair.attributes import Attribute
from diffusers_fair.config.schema import RunConfig
from diffusers_fair.objective.target_feedback import TargetFeedback
from diffusers_fair.prompts import prompt_set
from diffusers_fair.prompts.tables import read_table, targets_by_prompt

CLASSES = ["female", "male"]
SENATOR = "a photo of the face of a senator, a person"


def test_a_table_is_read_from_csv_by_its_columns(tmp_path):
    file = tmp_path / "shares.csv"
    file.write_text("occupation,male,female\nsenator,.7,.3\n judge ,0.6,0.4\n")
    assert read_table(file, CLASSES) == {"senator": (0.3, 0.7), "judge": (0.4, 0.6)}


def test_a_table_is_read_from_json(tmp_path):
    file = tmp_path / "shares.json"
    file.write_text('{"senator": [0.3, 0.7]}')
    assert read_table(file, CLASSES) == {"senator": (0.3, 0.7)}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "occupation,women\nsenator,.3\n", "is not a table of targets.*columns are"),
        ("a.csv", "occupation,female,male\nsenator,.3,many\n", "could not convert string"),
        ("a.json", "[1, 2]", "is not a table of targets"),
        ("a.json", "{", "is not a table of targets"),
    ],
)
def test_files_that_are_not_tables_are_refused(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        read_table(tmp_path / name, CLASSES)


def test_a_missing_table_is_refused():
    with pytest.raises(ValueError, match=r"there is no table of targets 'nowhere\.csv'"):
        read_table("nowhere.csv", CLASSES)


def test_a_subject_stands_for_its_prompts():
    found = targets_by_prompt({"senator": (0.3, 0.7)}, ["testbed-occupations"])
    assert found == {SENATOR: (0.3, 0.7)}
    assert targets_by_prompt({SENATOR: (0.3, 0.7)}, ["testbed-occupations"]) == found


def test_two_unicode_forms_of_a_name_are_one(tmp_path):
    two = {"caf\u00e9 owner": [0.3, 0.7], "cafe\u0301 owner": [0.5, 0.5]}
    (tmp_path / "a.json").write_text(json.dumps(two))
    with pytest.raises(ValueError, match="targets are given twice for 'caf\u00e9 owner'"):
        read_table(tmp_path / "a.json", CLASSES)
    with pytest.raises(ValueError, match="targets are given twice for 'caf\u00e9 owner'"):
        targets_by_prompt(two, ["testbed-occupations"])


def test_targets_of_unknown_prompts_are_refused():
    with pytest.raises(ValueError, match="'astronaut chef', which is neither a prompt nor a subj"):
        targets_by_prompt({"astronaut chef": (0.3, 0.7)}, ["testbed-occupations"])


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ("{senator: [.3, .6]}", "'gender' for 'senator' must sum to 1, got"),
        ("{senator: [.3, .3, .4]}", "'gender' for 'senator' needs 2 shares"),
        ("{senator: [-.5, 1.5]}", "'gender' for 'senator' must not hold negative shares"),
        ("{no such title: [.3, .7]}", "neither a prompt nor a subject of testbed-occupations"),
        ("nowhere.csv", r"there is no table of targets 'nowhere\.csv'"),
    ],
)
def test_a_recipe_with_bad_targets_is_refused(targets, message):
    with pytest.raises(ValueError, match=message):
        RunConfig.load("testbed-gender", [f"attributes.0.targets={targets}"])


def test_a_recipe_keeps_the_table_itself(tmp_path):
    file = tmp_path / "shares.csv"
    file.write_text("occupation,female,male\nsenator,.3,.7\n")
    config = RunConfig.load("testbed-gender", [f"attributes.0.targets={file}"])
    assert config.balanced()[0].target_of(SENATOR) == (0.3, 0.7)
    assert config.balanced()[0].target_of("a chef") == (0.5, 0.5)
    (tmp_path / "run.yaml").write_text(config.to_yaml())
    file.unlink()
    assert RunConfig.load(tmp_path / "run.yaml") == config


def test_joint_targets_are_products_of_each_prompt_s_own():
    one = Attribute("one", ("a", "b"), targets={"p": (0.2, 0.8)})
    other = Attribute("other", ("c", "d"), (0.25, 0.75), {"q": (1, 0)})
    joint = metrics.joint_attribute([one, other])
    assert joint.target_of("p") == pytest.approx((0.05, 0.15, 0.2, 0.6))
    assert joint.target_of("q") == (0.5, 0.0, 0.5, 0.0)
    assert joint.target_of("r") == pytest.approx((0.125, 0.375, 0.125, 0.375))


def test_feedback_sees_the_gap_to_each_prompt_s_own_target():
    general, own = TargetFeedback((0.5, 0.5), 0.1), TargetFeedback((0.5, 0.5), 0.1)
    for _ in range(3):
        general.update([0.4, 0.6])
        own.update([0.1, 0.9], [0.2, 0.8])  # as far below its target
    torch.testing.assert_close(general.shifted(), own.shifted())
    moved = own.shifted([0.2, 0.8])
    assert moved[0].item() > 0.2
    assert moved.sum().item() == pytest.approx(1)


def test_feedback_on_target_stays():
    feedback = TargetFeedback((0.5, 0.5), 0.1)
    feedback.update([0.2, 0.8], [0.2, 0.8])
    assert feedback.shifted([0.2, 0.8]).tolist() == pytest.approx([0.2, 0.8])


def test_a_report_measures_each_prompt_by_its_own_target():
    plain = report()
    counts = [p.attributes["hue"].frequencies for p in plain.prompts]
    own = {
        prompt: tuple(np.array(list(counts[i].values())) / sum(counts[i].values()))
        for i, prompt in enumerate(plain.settings.prompts)
    }
    exact = plain.select([Attribute("hue", HUE.classes, HUE.target, own)])
    assert exact.summary.deviation["hue"].mean == pytest.approx(0, abs=1e-5)
    assert exact.summary.bias["hue"].mean == plain.summary.bias["hue"].mean
    floors = [metrics.noise_floor(p.faces, own[p.prompt], own[p.prompt]) for p in exact.prompts]
    assert exact.summary.deviation["hue"].noise_floor == pytest.approx(np.mean(floors), abs=1e-6)


def test_splits_other_than_training_s_count():
    title = prompt_set("testbed-occupations").train[0]
    assert targets_by_prompt({title: (1, 0)}, ["testbed-occupations"])


def test_a_whole_prompt_counts_more_than_its_subject():
    table = {SENATOR: (0.1, 0.9), "senator": (0.3, 0.7)}
    assert targets_by_prompt(table, ["testbed-occupations"]) == {SENATOR: (0.1, 0.9)}


def test_a_subject_that_comes_twice_is_refused(tmp_path):
    (tmp_path / "a.csv").write_text("occupation,female,male\nsenator,.3,.7\nsenator,.4,.6\n")
    with pytest.raises(ValueError, match="given twice for 'senator'"):
        read_table(tmp_path / "a.csv", CLASSES)
