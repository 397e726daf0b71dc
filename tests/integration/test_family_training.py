"""Whole runs in every family, at a size that takes seconds: train, resume, load, evaluate."""

import functools
import json

import numpy as np
import pytest
import torch
from families import SIZE, flux, sd3, sdxl
from judging import Clip, classifier, encoder, find_all

import diffusers_fair.training.trainer as trainer_module
from diffusers_fair import FairnessFinetuner, evaluate
from diffusers_fair.adapters.folder import read_adapter
from diffusers_fair.attributes import Attribute
from diffusers_fair.evaluation.generate import generate, generate_batch
from diffusers_fair.families import family_of
from diffusers_fair.prompts.groups import PromptGroup, untouched_prompts
from diffusers_fair.reports.folder import load_report
from diffusers_fair.vision.encoders import NetworkEncoder
from diffusers_fair.vision.judges import Judges

GENDER = Attribute("gender", ("female", "male"))
PROMPTS = ["a photo of a chef", "a photo of a nurse"]
MODELS = {
    "sdxl": sdxl,
    "sd3": sd3,
    "flux-dev": flux,
    "flux-schnell": functools.partial(flux, dev=False),
}
SMALL = {
    "base": {"dtype": "float32"},
    "attributes": [{"name": "gender", "classes": ["female", "male"], "threshold": 0.5}],
    "prompts": {
        "images_per_prompt": 2,
        "keep": {
            **{"images": 1, "distinct": 1, "texts": 3},
            **{"prediction": 1.0, "pairs": 2, "new_prompts": 1},
        },
    },
    "sampling": {"steps": 2, "size": SIZE},
    "gradient": {"replay_steps": 1},
    "optimizer": {"warmup": 0, "schedule": "constant", "lr": 0.01, "text_encoder_lr": None},
    "train": {
        "iterations": 2,
        "prompts_per_iteration": 1,
        "checkpoint_every": 1,
        "validate_every": 2,
        "validation_images": 2,
        "distinct_iterations": 2,
    },
    "tracker": "none",
}


def judges() -> Judges:
    return Judges(
        face_detector=find_all,
        classifiers={"gender": classifier(GENDER.classes)},
        clip=encoder(Clip, 12),
        dino=encoder(NetworkEncoder, 10),
    )


@pytest.fixture
def finetuner(tmp_path, monkeypatch):
    """Make a finetuner of a tiny base model, with judges that are tiny, too."""
    monkeypatch.setattr(trainer_module, "load_judges", lambda *args: judges())

    def make(model, components, folder="run", **overrides):
        base = tmp_path / "base"
        if not base.exists():
            MODELS[model]().save_pretrained(base)
            (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
        sections = {
            "base": {"model": str(base)},
            "adapter": {"components": components, "rank": 2},
            "prompts": {"sets": [str(tmp_path / "prompts.txt")]},
        }
        for name, section in (SMALL | overrides).items():
            section = section | sections.get(name, {}) if isinstance(section, dict) else section
            sections[name] = section
        return FairnessFinetuner.from_recipe(
            "testbed-gender", **sections, output=str(tmp_path / folder)
        )

    return make


def parts(model):
    """The denoiser alone, the text encoders alone, and everything."""
    targets = family_of(MODELS[model]()).targets
    encoders = [name for name in targets if "text_encoder" in name]
    denoisers = [name for name in targets if name not in encoders]
    return {"denoiser": denoisers, "text encoders": encoders, "both": [*denoisers, *encoders]}


def images_of(pipe):
    options = {"images_per_prompt": 1, "steps": 2, "guidance_scale": 3.0, "seed": 0, "size": SIZE}
    batches = generate(pipe, PROMPTS, batch_size=2, progress=False, **options)
    return torch.cat([batch.images for batch in batches])


@pytest.mark.slow
@pytest.mark.parametrize("trained", ["denoiser", "text encoders", "both"])
@pytest.mark.parametrize("model", MODELS)
def test_a_whole_run(model, trained, finetuner):
    components = parts(model)[trained]
    whole = finetuner(model, components)
    before = images_of(whole.pipe)
    folder = whole.train(progress=False)
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    assert all(event["skipped"] == 0 for event in events if "skipped" in event)
    losses = {"keep/loss", "keep/prediction"}
    losses |= {"keep/embedding"} if trained != "denoiser" else set()
    assert {key for key in events[0] if key.startswith("keep/")} - {"keep/obeyed"} == losses
    info, weights = read_adapter(folder / "adapter")
    assert list(info.components) == components
    moved = {key for key, weight in weights.items() if ".lora_B" in key and weight.any()}
    assert moved == {key for key in weights if ".lora_B" in key}
    pipe = MODELS[model]()
    assert torch.equal(images_of(pipe), before)
    pipe.load_lora_weights(folder / "adapter")
    with whole.averaged():
        torch.testing.assert_close(images_of(pipe), images_of(whole.pipe))
    assert not torch.allclose(images_of(pipe), before)


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_a_stopped_run_resumes_to_the_same_bits(model, finetuner, tmp_path, monkeypatch):
    components = parts(model)["both"]
    finetuner(model, components, "whole").train(progress=False)
    update = FairnessFinetuner.iteration

    def stop(self, step):
        if step == 1:
            raise KeyboardInterrupt
        return update(self, step)

    with monkeypatch.context() as patch:
        patch.setattr(FairnessFinetuner, "iteration", stop)
        with pytest.raises(KeyboardInterrupt):
            finetuner(model, components, "stopped").train(progress=False)
    finetuner(model, components, "stopped").train(progress=False)
    whole, stopped = (read_adapter(tmp_path / x / "adapter")[1] for x in ("whole", "stopped"))
    assert all(torch.equal(stopped[key], weight) for key, weight in whole.items())


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_control_prompts_are_evaluated(model, tmp_path):
    """Some of them have a negative prompt, which FLUX does not take."""
    untouched = untouched_prompts("untouched", "test")
    chosen = [next(kept for kept in untouched if bool(kept.negative) is x) for x in (False, True)]
    groups = [PromptGroup("untouched", tuple(chosen), images_per_prompt=1)]
    options = {"images_per_prompt": 2, "steps": 2, "guidance_scale": 3.0, "size": SIZE}
    options |= {"judges": judges(), "groups": groups, "progress": False}
    report = evaluate(MODELS[model](), PROMPTS, [GENDER], out=tmp_path / "report", **options)
    assert len(report.groups["untouched"].records.prompt) == (1 if model.startswith("flux") else 2)
    assert load_report(tmp_path / "report").settings == report.settings
    plain = options | {"groups": ()}
    for size, message in ((SIZE + 1, "the image size must be a multiple of"), (0, "multiple of")):
        with pytest.raises(ValueError, match=message):
            evaluate(
                MODELS[model](), PROMPTS, [GENDER], **plain | {"size": size, "out": tmp_path / "x"}
            )
    assert not (tmp_path / "x").exists()


def test_a_size_that_does_not_suit_the_base_model_leaves_no_run_folder(finetuner, tmp_path):
    with pytest.raises(
        ValueError, match=r"the image size must be a multiple of 2 pixels .* got 17"
    ):
        finetuner("sdxl", ["unet"], sampling={"size": 17})
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("zeros", [True, False])
def test_images_without_a_negative_prompt_do_not_depend_on_those_with_one(zeros):
    """SDXL takes zeros without a negative prompt; it would encode an empty one."""
    pipe = sdxl(zeros=zeros)
    pairs = np.array([(0, 0), (1, 0), (2, 0)])
    options = {"steps": 2, "guidance_scale": 5.0, "seed": 0}
    prompts = ["a dog", "a cat", "a cow"]
    mixed = generate_batch(pipe, prompts, pairs, negatives=["", "blurry", ""], **options).images
    plain = generate_batch(pipe, prompts, pairs, **options).images
    negative = generate_batch(pipe, prompts, pairs, negatives=["blurry"] * 3, **options).images
    torch.testing.assert_close(mixed, torch.stack([plain[0], negative[1], plain[2]]))
    assert not torch.allclose(mixed[1], plain[1], atol=1e-3)
