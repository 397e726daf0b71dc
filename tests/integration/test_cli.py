"""The command as a user types it: what it writes, and what it says of bad input."""

import dataclasses
import io
import json
import os
import re
import shutil
import signal

import numpy as np
import pytest
from command import run
from PIL import Image

from diffusers_fair import FairnessFinetuner, assess
from diffusers_fair.adapters.folder import read_adapter, write_info
from diffusers_fair.assess import EvaluationDefaults, control_groups
from diffusers_fair.backends import registry
from diffusers_fair.baselines import BASELINES
from diffusers_fair.prompts.training_words import kept_sets
from diffusers_fair.reports import folder as report_folder
from diffusers_fair.reports.folder import load_report
from diffusers_fair.testbed import world

TINY = [
    "adapter.rank=2",
    "prompts.images_per_prompt=4",
    "sampling.steps=2",
    "gradient.replay_steps=1",
    "train.iterations=1",
    "train.prompts_per_iteration=1",
    "train.validation_images=1",
    "tracker=none",
]


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """An adapter folder, trained by the command."""
    folder = tmp_path_factory.mktemp("cli") / "run"
    with pytest.MonkeyPatch.context() as patch:
        at_once = ["optimizer.warmup=0", "optimizer.lr=1e-2"]  # one iteration has to show
        assert run(patch, "train", "testbed-gender", *TINY, *at_once, f"output={folder}") == 0
    return folder / "adapter"


@pytest.fixture
def lines(tmp_path):
    """A file of two prompts."""
    file = tmp_path / "prompts.txt"
    file.write_text("a photo of the face of a senator, a person\na person reading\n")
    return file


@pytest.mark.slow
def test_evaluate_writes_both_reports_and_prints_the_table(
    adapter, lines, tmp_path, monkeypatch, capsys
):
    out = tmp_path / "report"
    words = ["--adapter", adapter, "--prompts", lines, "--images", 2, "--steps", 2, "--out", out]
    assert run(monkeypatch, "evaluate", *words, "--group-images", 1) == 0
    base, after = load_report(out / "base"), load_report(out)
    assert base.settings == after.settings
    assert after.summary.images == 4
    summaries = after.group_summaries()
    assert [s.images for s in summaries.values()] == [len(g.prompts) for g in groups_of(base)]
    assert groups_of(base) == groups_of(after)
    assert summaries["untouched"].dino is not None
    assert "clip_i" in after.summary.scores
    assert Image.open(out / "pairs.png").size[0] > 64
    printed = capsys.readouterr()
    assert "images with a face" in printed.out
    assert "implied words obeyed" in printed.out
    parts = ("neutral", "named", "implied", "untouched")
    titles = [f"{label}, {part} prompts" for label in ("base", "adapter") for part in parts]
    assert [printed.err.find(title) >= 0 for title in titles] == [True] * 8


def groups_of(report):
    return [group.group for group in report.groups.values()]


@pytest.mark.slow
def test_a_reference_spares_the_base_models_half(adapter, lines, tmp_path, monkeypatch, capsys):
    common = ["--prompts", lines, "--images", 2, "--steps", 2, "--group-images", 1]
    asked = ["--attribute", "race", "--attribute", "gender", "--out", tmp_path / "base"]
    asked += ["--no-groups"]  # as a report from before there were any
    assert run(monkeypatch, "evaluate", *common, *asked) == 0
    assert load_report(tmp_path / "base").groups == {}
    words = ["--adapter", adapter, *common, "--out", tmp_path / "spared"]
    assert run(monkeypatch, "evaluate", *words, "--reference", tmp_path / "base") == 0
    assert not (tmp_path / "spared" / "base").exists()
    words[-1] = tmp_path / "whole"
    assert run(monkeypatch, "evaluate", *words) == 0
    assert "bias, race" not in capsys.readouterr().out.split("bias, gender")[-1]
    spared, whole = (load_report(tmp_path / name) for name in ("spared", "whole"))
    assert spared.summary == whole.summary
    assert spared.settings == whole.settings
    assert spared.group_summaries() == whole.group_summaries()
    assert groups_of(spared) == groups_of(whole) != []
    words[-1] = tmp_path / "other"
    more = ["--seed", 3, "--reference", tmp_path / "base"]
    assert run(monkeypatch, "evaluate", *words, *more) == 2
    assert "the reference was evaluated with other seed (0 instead of 3)" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "more"), [("attribute-words", []), ("concept-algebra", ["--recipe", "testbed-race"])]
)
def test_evaluate_a_baseline(name, more, lines, tmp_path, monkeypatch):
    words = ["--baseline", name, "--prompts", lines, "--images", 2, "--steps", 2]
    words += ["--group-images", 1]
    assert run(monkeypatch, "evaluate", *words, *more, "--out", tmp_path / "out") == 0
    report, base = load_report(tmp_path / "out"), load_report(tmp_path / "out" / "base")
    assert report.label == name
    assert report.settings == base.settings
    assert 0.5 < report.summary.scores["clip_i"].mean < 0.9999
    assert report.provenance["model"]["baseline"] == name
    assert report.group_summaries()["untouched"].pixels.mean > 0.001


def test_help_names_every_baseline(monkeypatch, capsys):
    assert run(monkeypatch, "evaluate", "--help") == 0
    said = "".join(capsys.readouterr().out.replace("│", " ").split())
    assert all(name in said for name in BASELINES)


@pytest.mark.slow
def test_evaluate_a_base_model_alone(lines, tmp_path, monkeypatch):
    words = ["--attribute", "gender", "--attribute", "race", "--prompts", lines]
    words += ["--images", 2, "--steps", 2, "--out", tmp_path / "base", "--no-groups"]
    assert run(monkeypatch, "evaluate", *words) == 0
    assert set(load_report(tmp_path / "base").summary.bias) >= {"gender", "race"}


def with_recipe(adapter, folder, **prompts):
    """A copy of an adapter whose recipe has a word of its own for one class, and these prompts."""
    shutil.copytree(adapter, folder)
    info = read_adapter(folder)[0]
    section = info.recipe["attributes"][0] | {"words": {"female": ["womanly"]}}
    recipe = {"attributes": [section], "prompts": prompts}
    write_info(folder, dataclasses.replace(info, recipe=recipe))
    return folder


@pytest.mark.slow
def test_words_of_training_are_those_that_the_adapter_kept(adapter, lines, tmp_path, monkeypatch):
    folder = with_recipe(adapter, tmp_path / "mine", keep={"sets": {"named": 1.0}})
    words = ["--adapter", folder, "--prompts", lines, "--images", 1, "--steps", 1]
    words += ["--group-images", 1, "--out", tmp_path / "r"]
    assert run(monkeypatch, "evaluate", *words) == 0
    report = load_report(tmp_path / "r")
    named = report.groups["named"].group.prompts
    seen = {p.text for p in named if p.expected_classes == {"gender": "female"} and not p.unseen}
    assert seen
    assert all(" womanly " in text for text in seen)
    assert any(p.unseen for p in named)
    assert all(p.unseen for p in report.groups["implied"].group.prompts)
    assert report.group_summaries()["implied"].seen is None


KEEP = {"sets": {"named": 1.0, "implied": 1.0}}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("prompts", "recipe", "attributes", "expected"),
    [
        ({}, None, ["gender"], {"gender": 0}),
        ({"keep": None}, "testbed-gender", ["gender"], {"gender": 0}),
        ({"keep": KEEP}, None, ["gender", "race"], {"gender": 2, "race": 0}),
        ({"keep": {"sets": {"implied": 1.0}}}, None, ["gender"], {"gender": 1}),
        (None, None, ["gender"], {"gender": 0}),
        (None, "testbed-gender", ["gender"], {"gender": 1}),
    ],
    ids=["older", "null", "balanced alone", "one group", "base", "recipe"],
)
def test_whose_words_are_words_of_training(
    prompts, recipe, attributes, expected, adapter, tmp_path
):
    """In how many of the two groups with words an attribute has any of training."""
    folder = None if prompts is None else str(with_recipe(adapter, tmp_path / "a", **prompts))
    chosen = [world.ATTRIBUTES[name] for name in attributes]
    info = None if folder is None else read_adapter(folder)[0]
    defaults = EvaluationDefaults.of("testbed", recipe)
    made = control_groups(["a chef"], chosen, defaults, info, images_per_prompt=1)
    found = {
        name: sum(
            any(p.expected_classes.keys() == {name} and not p.unseen for p in g.prompts)
            for g in made
        )
        for name in attributes
    }
    assert found == expected
    pairs = [p for p in made[0].prompts if len(p.expected_classes) == 2]
    assert len(pairs) == 8 * (len(attributes) == 2)
    assert all(p.unseen for p in pairs)


@pytest.mark.parametrize(
    "recipe",
    [{}, {"prompts": []}, {"prompts": {"keep": []}}, {"prompts": {"keep": {"sets": 3}}}],
)
def test_a_recipe_that_keeps_nothing(recipe):
    assert kept_sets(recipe) == set()


@pytest.mark.slow
def test_an_adapter_that_draws_what_it_likes_is_warned_of(
    adapter, lines, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr("diffusers_fair.reports.measures.MARGIN", -0.1)
    words = ["--adapter", adapter, "--prompts", lines, "--images", 1, "--steps", 1]
    words += ["--group-images", 1, "--out", tmp_path / "r"]
    assert run(monkeypatch, "evaluate", *words) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "Warning: adapter falls short of its base model by more than" in said
    assert "untouched: DINO" in said


def test_generate_draws_the_same_images_again(adapter, tmp_path, monkeypatch):
    for folder in ("a", "b"):
        words = ["a photo of a chef", "--images", 2, "--steps", 2, "--out", tmp_path / folder]
        assert run(monkeypatch, "generate", *words, "--adapter", adapter) == 0
    names = sorted(file.name for file in (tmp_path / "a").iterdir())
    name = r"a-photo-of-a-chef-seed0-run-adapter-[0-9a-f]{10}-00[01]\.png"
    assert [bool(re.fullmatch(name, file)) for file in names] == [True, True]
    first, second = (np.array(Image.open(tmp_path / f / names[1])) for f in ("a", "b"))
    assert first.shape == (64, 64, 3)
    assert (first == second).all()


def test_images_of_another_size(lines, tmp_path, monkeypatch, capsys):
    words = ["generate", "x", "--images", 1, "--steps", 1, "--out", tmp_path / "images"]
    for size in (["--size", 32], ["--size", 64], []):
        assert run(monkeypatch, *words, *size) == 0
    assert "1 images in" in (said := capsys.readouterr().out)
    assert said.count("1 of them from before") == 1  # 64 pixels are the default
    sizes = {Image.open(file).size for file in (tmp_path / "images").iterdir()}
    assert sizes == {(32, 32), (64, 64)}
    words = ["--prompts", lines, "--images", 2, "--steps", 1, "--no-groups"]
    for size, code in ((64, 0), (33, 2)):
        out = ["--out", tmp_path / str(size)]
        assert run(monkeypatch, "evaluate", *words, *out, "--size", size) == code
    assert "the image size must be a multiple of" in capsys.readouterr().err
    assert not (tmp_path / "33").exists()
    assert load_report(tmp_path / "64").settings.size is None


def test_generate_respects_words(adapter, tmp_path, monkeypatch):
    words = ["a photo of a chef", "a photo of a woman", "--images", 1, "--steps", 2]
    folders = {
        "base": [],
        "adapter": ["--adapter", adapter],
        "respecting": ["--adapter", adapter, "--respect-words"],
    }
    for folder, more in folders.items():
        assert run(monkeypatch, "generate", *words, *more, "--out", tmp_path / folder) == 0
    chef, woman = (
        {f: next((tmp_path / f).glob(f"*-{name}-*.png")).read_bytes() for f in folders}
        for name in ("chef", "woman")
    )
    assert chef["respecting"] == chef["adapter"] != chef["base"]
    assert woman["respecting"] == woman["base"] != woman["adapter"]


@pytest.mark.slow
def test_generate_overwrites_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    common = ["--images", 1, "--steps", 1, "--out", "[/b] images"]
    prompts = ["a doctor, smiling", "a doctor: smiling", "A doctor, smiling", "", "x" * 2000]
    assert run(monkeypatch, "generate", *prompts, *common) == 0
    assert run(monkeypatch, "generate", prompts[0], *common, "--seed", 1) == 0
    files = {file: file.read_bytes() for file in (tmp_path / "[/b] images").iterdir()}
    assert len({file.name.casefold() for file in files}) == 6
    assert "5 images in [/b] images\n1 images in [/b] images\n" in capsys.readouterr().out
    next(iter(files)).unlink()
    assert run(monkeypatch, "generate", *prompts, *common) == 0  # the same again
    said = capsys.readouterr().out
    assert re.search(r"5 images in \[/b\] images, [45] of them from before\n", said)
    assert run(monkeypatch, "generate", prompts[0], *common, "--seed", 1) == 0
    assert files == {file: file.read_bytes() for file in (tmp_path / "[/b] images").iterdir()}
    for dtype, before in {"float32": ", 1 of them from before", "bfloat16": ""}.items():
        assert run(monkeypatch, "generate", prompts[0], *common, "--seed", 1, "--dtype", dtype) == 0
        assert capsys.readouterr().out.endswith(f"1 images in [/b] images{before}\n")


def test_a_long_path_is_not_broken(tmp_path, monkeypatch, capsys):
    out = tmp_path / "long" / ("x" * 100)
    assert run(monkeypatch, "generate", "x", "--images", 1, "--steps", 1, "--out", out) == 0
    assert capsys.readouterr().out == f"1 images in {out}\n"


def test_what_the_terminal_cannot_encode_is_escaped(tmp_path, monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr("sys.stdout", stream)
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, "generate", "x", "--images", 1, "--steps", 1, "--out", "\u2603") == 0
    stream.flush()
    assert stream.buffer.getvalue() == b"1 images in \\u2603\n"


STOPPED = {
    "train": (["testbed-gender", *TINY, "output=out"], FairnessFinetuner, "__init__"),
    "evaluate": (["--images", "1"], assess, "load_base"),
    "generate": (["x"], registry, "load_base"),
    "compare": (["x"], report_folder, "load_report"),
}


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("command", STOPPED)
def test_a_signal_is_one_sentence_and_its_exit_code(
    command, number, code, tmp_path, monkeypatch, capsys
):
    words, home, name = STOPPED[command]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(home, name, lambda *_, **__: os.kill(os.getpid(), number))
    out = [] if command == "train" else ["--out", "out"]
    assert run(monkeypatch, command, *words, *out) == code
    assert last_line(capsys) == "diffusers-fair: stopped: give the same command again to go on"
    if command != "compare":
        (tmp_path / "out").mkdir()
        assert run(monkeypatch, command, *words, *out) == code
        assert last_line(capsys) == (
            "diffusers-fair: stopped, with what was finished in 'out': give the same command again "
            "to go on"
        )


def last_line(capsys) -> str:
    """The last line on stderr, after progress bars."""
    return capsys.readouterr().err.splitlines()[-1]


def test_a_corrected_command_is_not_refused_as_another_run(tmp_path, monkeypatch, capsys):
    words = ["train", "testbed-gender", *TINY, f"output={tmp_path / 'run'}"]
    assert run(monkeypatch, *words, "prompts.sets=[testbed-ocupations]") == 2
    assert "did you mean 'testbed-occupations'" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(FairnessFinetuner, "_loop", lambda *_: None)
    assert run(monkeypatch, *words) == 0


def test_an_adapter_of_another_base_is_refused_before_anything_is_evaluated(
    adapter, lines, tmp_path, monkeypatch, capsys
):
    shutil.copytree(adapter, tmp_path / "other")
    info = read_adapter(adapter)[0]
    write_info(tmp_path / "other", dataclasses.replace(info, fingerprint="0" * 64))
    words = ["--adapter", tmp_path / "other", "--prompts", lines, "--out", tmp_path / "out"]
    assert run(monkeypatch, "evaluate", *words) == 2
    assert "have other shapes" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_an_adapter_is_evaluated_on_another_base(adapter, lines, tmp_path, monkeypatch, capsys):
    """What its card records on its own base stands beside what it does here: the same, here."""
    few = ["--prompts", lines, "--images", 2, "--steps", 2, "--no-groups"]
    other = shutil.copytree(adapter, tmp_path / "other")
    assert run(monkeypatch, "evaluate", "--adapter", other, *few, "--out", tmp_path / "own") == 0
    assert "trained on" not in capsys.readouterr().out
    info = read_adapter(other)[0]
    unknown = dataclasses.replace(info, fingerprint="0" * 64, base_model="org/own")
    words = ["evaluate", "--adapter", other, "--other-base", *few]
    write_info(other, unknown)
    assert run(monkeypatch, *words, "--out", tmp_path / "first") == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "with the adapter here; nothing is recorded on org/own, which it was trained on" in said
    report = json.loads((tmp_path / "own" / "report.json").read_text())
    sides = {"before": report["reference"]["summary"], "after": report["summary"]}
    (before, after) = (side["bias"]["gender"] for side in sides.values())
    before["mean"], after["mean"] = before["mean"] + 0.5, after["mean"] + 0.1
    write_info(other, dataclasses.replace(unknown, evaluation=sides))
    assert run(monkeypatch, *words, "--out", tmp_path / "second") == 0
    said = " ".join(capsys.readouterr().out.split())
    own = f"{before['mean']:.3f} and {after['mean']:.3f} on org/own, which it was trained on"
    reduction = before["mean"] - after["mean"]
    share = (reduction - 0.4) / reduction
    assert f"{own}: {share:.0%} of the reduction carries over" in said
    model = json.loads((tmp_path / "second" / "report.json").read_text())["provenance"]["model"]
    assert model["adapter was trained on"] == "org/own"


def test_inspect_says_what_an_adapter_is(adapter, monkeypatch, capsys):
    assert run(monkeypatch, "inspect", adapter) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["base_model"] == "testbed"
    assert facts["components"] == {"text_encoder": {"rank": 2, "alpha": 2.0}}
    assert "woman" in facts["words"]["gender"]["female"]
    assert facts["parameters"] == 4 * 2 * (4 * 256 + 2 * 640)


def test_export_says_how_to_use_the_file(adapter, tmp_path, monkeypatch, capsys):
    words = ["export", adapter, "--to", "comfyui", "--out", str(tmp_path / "out")]
    assert run(monkeypatch, *words) == 0
    (file,) = (tmp_path / "out").iterdir()
    assert capsys.readouterr().out == (
        f"{file}: put the file in `models/loras` and select it in a Load LoRA node, with strength "
        "1 for model and clip\n"
    )
    assert run(monkeypatch, *words) == 2
    assert "exists already: remove it, or choose another --out" in capsys.readouterr().err


def test_recipes_lists_every_key_with_its_documentation_and_default(monkeypatch, capsys):
    assert run(monkeypatch, "recipes", "--keys") == 0
    listed = capsys.readouterr().out
    for line in (
        "base.model  (required)",
        "attributes.0.target_feedback  (default: 0.0)",
        "prompts.keep  (default: null)",
        'models.classifiers  (default: {"*": {"kind": "testbed"}})',
        "optimizer:",
        "optimizer.lr  (default: 5e-05)",
    ):
        assert f"{line}\n" in listed
    assert "    Learning rate after the warm-up.\n" in listed


def test_recipes_lists_what_is_shipped(monkeypatch, capsys):
    assert run(monkeypatch, "recipes") == 0
    shown = capsys.readouterr().out
    assert "testbed-gender" in shown
    assert "testbed-demo" in shown


BAD = {
    "unknown recipe": (["train", "testbed-gendr"], "did you mean 'testbed-gender'?"),
    "unknown key": (["train", "testbed-gender", "train.iteration=1"], "'iterations'"),
    "negative target": (
        ["train", "testbed-gender", "attributes.0.target=[-.5,1.5]"],
        "must not hold negative shares",
    ),
    "target that does not sum to 1": (
        ["train", "testbed-gender", "attributes.0.target=[.5,.6]"],
        "must sum to 1",
    ),
    "target of another length": (
        ["train", "testbed-gender", "attributes.0.target=[.5,.25,.25]"],
        "needs 2 shares",
    ),
    "missing adapter": (
        ["generate", "x", "--adapter", "nowhere"],
        "no adapter folder at 'nowhere'",
    ),
    "nothing to export": (
        ["export", "nowhere", "--to", "comfyui"],
        "no adapter folder at 'nowhere'",
    ),
    "no program to export to": (["export", "x"], "Missing option '--to'"),
    "missing base": (["generate", "x", "--base", "./nowhere"], "cannot load the base model"),
    "unknown prompts": (["evaluate", "--prompts", "testbed-ocupations"], "testbed-occupations"),
    "unknown attribute": (["evaluate", "--attribute", "height"], "unknown attribute 'height'"),
    "another base of nothing": (["evaluate", "--other-base"], "--other-base needs an adapter"),
    "a reference for nothing": (["evaluate", "--reference", "x"], "give --adapter or --baseline"),
    "unknown baseline": (["evaluate", "--baseline", "USE"], "unknown baseline 'USE': expected"),
    "two at a time": (
        ["evaluate", "--baseline", "uce", "--adapter", "x"],
        "leave out --adapter or --baseline",
    ),
    "no images": (["evaluate", "--images", "0"], "expected a number of images, 1 or more, or a"),
    "images by the thousand": (
        ["evaluate", "--images", "1e3"],
        "Invalid value for '--images': expected a number of images, 1 or more, or a folder of "
        "images, got '1e3'",
    ),
    "a digit of another kind": (["evaluate", "--images", "\u00b2"], "got '\u00b2'"),
    "no images to draw": (["generate", "x", "--images", "0"], "Invalid value for '--images'"),
    "endless images to draw": (
        ["generate", "x", "--images", "9" * 22],
        "images_per_prompt must be 1000000 or less, got 9999999999999999999999",
    ),
    "no images of a demo": (["demo", "--images", "-1"], "Invalid value for '--images'"),
    "no steps": (["evaluate", "--steps", "0"], "Invalid value for '--steps'"),
    "no steps to draw": (["generate", "x", "--steps", "0"], "Invalid value for '--steps'"),
    "steps by the thousand": (["generate", "x", "--steps", "1e3"], "Invalid value for '--steps'"),
    "a negative seed": (["evaluate", "--seed", "-1"], "Invalid value for '--seed'"),
    "a negative seed to draw": (["generate", "x", "--seed", "-1"], "Invalid value for '--seed'"),
    "no number of guidance": (["evaluate", "--guidance-scale", "nan"], "guidance"),
    "endless guidance": (
        ["evaluate", "--guidance-scale", "inf"],
        "guidance_scale must be a finite number, 0 or more, got inf",
    ),
    "endless guidance to draw": (
        ["generate", "x", "--guidance-scale", "inf"],
        "guidance_scale must be a finite number, 0 or more, got inf",
    ),
    "an empty split": (["evaluate", "--split", ""], "there is no split ''"),
    "an empty folder name": (
        ["evaluate", "--out", ""],
        "Invalid value for '--out': expected a folder, got an empty text",
    ),
    "too long a name": (["evaluate", "--prompts", "a" * 300], "File name too long"),
    "no recipe": (["train"], "Missing argument 'recipe'"),
    **{
        f"{words[0]} into a file": ([*words, f"{__file__}/x"], "is a file: choose another folder")
        for words in (
            ["evaluate", "--out"],
            ["generate", "x", "--out"],
            ["demo", "--out"],
        )
    },
    "train into a file": (
        ["train", "testbed-gender", f"output={__file__}/x"],
        "is a file: choose another folder",
    ),
    "no images of groups": (
        ["evaluate", "--group-images", "0"],
        "--group-images must be 1 or more, got 0: to skip the control prompts, use --no-groups",
    ),
    "no adapter's words": (["evaluate", "--respect-words"], "name one with --adapter"),
    "no adapter's words to draw": (["generate", "x", "--respect-words"], "name one with --adapter"),
    "unknown option": (["evaluate", "--imges", "3"], "--imges"),
    "unknown command": (["trian"], "trian"),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_sentence_and_exit_code_2(case, tmp_path, monkeypatch, capsys):
    words, message = BAD[case]
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, *words) == 2
    said = capsys.readouterr().err
    assert message in said
    assert "Traceback" not in said
    assert not any(tmp_path.iterdir()), "something half-written stays behind"


def test_no_prompts(tmp_path, monkeypatch, capsys):
    (tmp_path / "empty.txt").write_text("\n")
    words = ["evaluate", "--prompts", tmp_path / "empty.txt", "--out", tmp_path / "out"]
    assert run(monkeypatch, *words) == 2
    assert "prompt" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("error", [PermissionError, IsADirectoryError, FileNotFoundError])
def test_a_file_that_cannot_be_read_is_bad_input(error, lines, monkeypatch, capsys):
    def refuse(path, *_, **__):
        raise error(1, "No luck", str(path))

    monkeypatch.setattr("pathlib.Path.read_text", refuse)
    assert run(monkeypatch, "evaluate", "--prompts", lines) == 2
    said = capsys.readouterr().err
    assert f"cannot read or write '{lines}': No luck; choose another path" in said


def test_other_errors_of_the_system_keep_their_traceback(monkeypatch):
    def fail(*_, **__):
        raise ConnectionError("the network is down")

    monkeypatch.setattr("diffusers_fair.doctor.examine", fail)
    with pytest.raises(ConnectionError):
        run(monkeypatch, "doctor", "testbed-gender")


def test_an_option_may_be_zero(lines, tmp_path, monkeypatch):
    words = ["--prompts", lines, "--images", 1, "--steps", 1, "--no-groups"]
    words += ["--guidance-scale", 0, "--out", "~/report"]
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, "evaluate", *words) == 0
    assert load_report("~/report").settings.guidance_scale == 0
    assert not (tmp_path / "~").exists()


def test_generate_takes_zero_for_zero(monkeypatch, tmp_path):
    for scale in (0, 4.5):
        words = ["x", "--images", 1, "--steps", 2, "--guidance-scale", scale]
        assert run(monkeypatch, "generate", *words, "--out", tmp_path / str(scale)) == 0
    zero, usual = (next((tmp_path / name).iterdir()).read_bytes() for name in ("0", "4.5"))
    assert zero != usual
