"""`diffusers-fair evaluate`: a recipe's defaults, folders of pictures, going on."""

import numpy as np
import pytest
from pictures import held_out
from PIL import Image
from test_cli import run

from diffusers_fair.evaluation.journal import Journal
from diffusers_fair.reports.folder import load_report

RECIPE = """
extends: testbed-race
prompts: {{sets: [{lines}]}}
evaluation: {{split: validation, images_per_prompt: 2, steps: 2, guidance_scale: 3.0, seed: 5}}
"""


@pytest.fixture
def recipe(tmp_path):
    """A recipe with an evaluation section and two prompts of its own."""
    lines = tmp_path / "prompts.txt"
    lines.write_text("a person reading\na photo of a chef\n")
    file = tmp_path / "mine.yaml"
    file.write_text(RECIPE.format(lines=lines))
    return file


@pytest.mark.slow
def test_what_is_left_out_comes_from_the_recipe(recipe, tmp_path, monkeypatch):
    words = ["--recipe", recipe, "--no-groups"]
    assert run(monkeypatch, "evaluate", *words, "--out", tmp_path / "r") == 0
    report = load_report(tmp_path / "r")
    settings = report.settings
    assert settings.prompts == ("a person reading", "a photo of a chef")
    assert [a.name for a in settings.attributes] == ["race"]
    assert (settings.images_per_prompt, settings.steps) == (2, 2)
    assert (settings.guidance_scale, settings.seed) == (3.0, 5)
    assert report.provenance["model"]["base"] == "testbed"
    assert "evaluate --recipe" in report.provenance["command"]
    words += ["--images", 3, "--seed", 0, "--steps", 1]
    assert run(monkeypatch, "evaluate", *words, "--out", tmp_path / "s") == 0
    other = load_report(tmp_path / "s").settings
    assert (other.images_per_prompt, other.steps, other.seed) == (3, 1, 0)


@pytest.mark.slow
def test_the_same_command_goes_on(recipe, tmp_path, monkeypatch, capsys):
    out = tmp_path / "r"
    keep = Journal.__setitem__

    def interrupted(journal, batch, seen):
        keep(journal, batch, seen)
        raise KeyboardInterrupt

    words = ["evaluate", "--recipe", recipe, "--no-groups"]
    words += ["--images", 13, "--out", out]  # batches of 24 and 2
    with monkeypatch.context() as patch:
        patch.setattr(Journal, "__setitem__", interrupted)
        assert run(patch, *words) == 130
    assert [file.name for file in (out / ".partial").glob("batch*")] == ["batch-000000.npz"]
    assert run(monkeypatch, *words[:-1], out, "--seed", 9) == 2
    assert "was stopped, with other settings" in capsys.readouterr().err
    assert run(monkeypatch, *words) == 0
    assert load_report(out).summary.images == 26


@pytest.mark.slow
def test_pictures_made_by_anything(tmp_path, monkeypatch, capsys):
    images, labels = held_out("portrait", 12)
    for number, (image, name) in enumerate(zip(images, labels["gender1"], strict=True)):
        folder = tmp_path / "pictures" / f"a {name} person"
        folder.mkdir(parents=True, exist_ok=True)
        pixels = ((image + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(folder / f"{number}.png")
    words = ["evaluate", "--images", tmp_path / "pictures", "--recipe", "testbed-gender"]
    assert run(monkeypatch, *words, "--out", tmp_path / "r") == 0
    report = load_report(tmp_path / "r")
    assert report.settings.prompts == ("a female person", "a male person")
    shares = [p.attributes["gender"].frequencies["female"] for p in report.prompts]
    np.testing.assert_allclose(shares, [1, 0])
    assert report.summary.bias["gender"].mean == 1
    assert report.summary.corrected["gender"].mean == pytest.approx(1, abs=1e-4)
    assert "images" in capsys.readouterr().out


BAD = {
    "no folder": (["--images", "nowhere"], "or a folder of images, got 'nowhere'"),
    "no models": (["--images", "."], "there are no models to judge the images in"),
    "an adapter, too": (["--images", ".", "--adapter", "y"], "leave out --adapter"),
    "options of generating, too": (
        ["--images", ".", "--respect-words", "--steps", "5", "--seed", "0"],
        "leave out --steps, --seed, --respect-words, or give a number of images",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case, tmp_path, monkeypatch, capsys):
    words, message = BAD[case]
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, "evaluate", *words) == 2
    assert message in capsys.readouterr().err
    assert not any(tmp_path.iterdir())
