"""The world that ships: its data, its pipeline, its cost."""

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline
from transformers import CLIPTextModel, CLIPTokenizer

from diffusers_fair import testbed
from diffusers_fair.prompts import prompt_set
from diffusers_fair.testbed import world

OCCUPATIONS = prompt_set("testbed-occupations")


@pytest.fixture(scope="module")
def pipe():
    return testbed.pipeline()


def test_it_is_a_genuine_stable_diffusion_pipeline(pipe):
    assert type(pipe) is StableDiffusionPipeline
    assert type(pipe.text_encoder) is CLIPTextModel
    assert type(pipe.tokenizer) is CLIPTokenizer
    assert type(pipe.scheduler) is DPMSolverMultistepScheduler
    assert {p.dtype for m in (pipe.unet, pipe.vae, pipe.text_encoder) for p in m.parameters()} == {
        torch.float32
    }


def test_two_pipelines_share_nothing_that_an_adapter_changes(pipe):
    other = testbed.pipeline()
    assert other.tokenizer is not pipe.tokenizer
    assert other.unet is not pipe.unet


def test_it_survives_saving(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    again = StableDiffusionPipeline.from_pretrained(tmp_path)
    draw = {"num_inference_steps": 2, "output_type": "np"}
    images = [
        p("a person", generator=torch.Generator().manual_seed(0), **draw).images
        for p in (pipe, again)
    ]
    assert (images[0] == images[1]).all()


def test_weights_are_small():
    size = sum(f.stat().st_size for f in testbed.WEIGHTS.rglob("*") if f.is_file())
    assert size <= 30e6
    assert not [f for f in testbed.WEIGHTS.rglob("*") if f.suffix in (".bin", ".pt", ".pkl")]


def test_occupations_are_split():
    splits = [set(OCCUPATIONS.train), set(OCCUPATIONS.validation), set(OCCUPATIONS.test)]
    assert [len(s) for s in splits[1:]] == [10, 50]
    assert len(splits[0]) >= 140
    assert len(set.union(*splits)) == sum(map(len, splits)) >= 200
    assert {o.text for o in world.occupations()} == set.union(*splits)


@pytest.mark.parametrize("text", ["senator", "chef", "a person reading"])
def test_a_subject_has_its_own_odds(text):
    one, again = world.subject(text), world.subject.__wrapped__(text)
    for name, attribute in world.ATTRIBUTES.items():
        assert one.odds[name].shape == (len(attribute.classes),)
        assert one.odds[name].sum() == pytest.approx(1)
        assert np.array_equal(one.odds[name], again.odds[name])


def test_the_world_is_biased_in_both_directions():
    male = np.array([o.odds["gender"][1] for o in world.occupations()])
    assert 0.4 < (male > 0.5).mean() < 0.8
    assert 0.5 < np.abs(2 * male - 1).mean() < 0.65


def test_families_are_found_in_prompts():
    assert world.family_in("a photo of the face of a legal secretary, a person") == "judge"
    assert world.family_in("an oil painting of a fence erector") == "builder"
    assert world.family_in("a person") is None
    longest = world.family_in("administrative law judge")
    assert longest == world.family_of("administrative law judge")


@pytest.mark.parametrize("name", ["sports", "styles", "descriptors", "non-templated"])
def test_every_prompt_is_expected_in_the_family_that_it_was_drawn_in(name):
    known = prompt_set(name)
    drawn = {s.text: s.family for s in world.sports() + world.sentences()}
    for text, prompt in zip(known.test, known.prompts("test"), strict=True):
        assert world.family_in(prompt) == drawn[text]


def test_an_occupation_that_a_sentence_names_does_not_decide_its_family():
    sentence = next(text for text in prompt_set("styles").test if text.startswith("magician "))
    assert world.family_in(sentence) == world.family_of(sentence) != world.family_of("magician")


def test_a_sport_is_one_where_it_is_played():
    assert world.family_in("an oil painting of a person playing trial") == "athlete"
    assert world.family_in("a baker who is running") == world.family_of("baker") != "athlete"
    assert world.family_in("a person at a trial") is None
