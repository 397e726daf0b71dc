"""Files of older versions still work: a run resumes, a report gives the same metrics.

`old_run` was written by commit 90651496: three iterations, of which the last checkpoint is removed.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from diffusers_fair import FairnessFinetuner, RunConfig
from diffusers_fair.adapters.folder import read_adapter
from diffusers_fair.objective.objective import Objective
from diffusers_fair.reports.folder import load_report

OLD = Path(__file__).parent / "old_run"
REPORTS = Path(__file__).parents[2] / "model_cards" / "comparison" / "reports"


def events(folder: Path) -> list[dict]:
    lines = map(json.loads, (folder / "events.jsonl").read_text().splitlines())
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


def has_values(new, old) -> bool:
    """Whether every old value is there; keys may have come since."""
    if isinstance(old, dict):
        return all(key in new and has_values(new[key], value) for key, value in old.items())
    return new == old


def test_an_old_run_goes_on_to_the_same_adapter(tmp_path, monkeypatch):
    folder = tmp_path / "run"
    shutil.copytree(OLD, folder, ignore=shutil.ignore_patterns("adapter"))
    refuse = pytest.fail  # the originals come from the cache
    monkeypatch.setattr(Objective, "originals", lambda *args: refuse("judged again"))
    state = torch.load(folder / "checkpoints" / "step-000002" / "state.pt", weights_only=True)
    recipe = folder / "recipe.yaml"
    resumed = FairnessFinetuner.from_recipe(recipe, output=str(folder))
    resumed.load_state_dict(state)
    assert resumed.step == 2
    feedback = resumed.gradient.objective.feedback["gender"]
    assert torch.equal(feedback.mean_shares, state["steering"]["gender"]["seen"])
    assert torch.equal(feedback.offset, state["steering"]["gender"]["offset"])
    assert resumed.guard.state_dict() == state["caution"]
    FairnessFinetuner.from_recipe(recipe, output=str(folder)).train(progress=False)
    (info, weights), (old, expected) = (read_adapter(f / "adapter") for f in (folder, OLD))
    assert has_values(info.recipe, old.recipe)
    assert weights.keys() == expected.keys()
    for name in weights:
        torch.testing.assert_close(weights[name], expected[name], atol=1e-5, rtol=1e-4)
    found, wanted = events(folder), events(OLD)
    assert found[:2] == wanted[:2]
    assert list(found[2]) == list(wanted[2])
    assert found[2] == pytest.approx(wanted[2], rel=1e-3, abs=1e-5)
    assert len(list((folder / "originals").iterdir())) == 1


def test_the_recipe_of_an_old_run_is_the_same(tmp_path):
    config = RunConfig.load(OLD / "recipe.yaml")
    assert config.attributes[0].target_feedback == 0.5
    (tmp_path / "again.yaml").write_text(config.to_yaml())
    again, old = (
        yaml.safe_load(f.read_text()) for f in (tmp_path / "again.yaml", OLD / "recipe.yaml")
    )
    assert has_values(again, old)
    assert RunConfig.load(tmp_path / "again.yaml").differences(config) == {}


@pytest.mark.parametrize("goal", ["testbed-gender", "testbed-race", "testbed-gender-race"])
def test_an_old_report_gives_the_same_metrics(goal):
    folder = REPORTS / goal / "ours"
    stored = json.loads((folder / "report.json").read_text("utf-8"))
    report = load_report(folder)
    assert report.summary.json() == stored["summary"]
    assert [prompt.json() for prompt in report.prompts] == stored["prompts"]
