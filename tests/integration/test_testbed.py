"""The world that ships: its data, its pipelines, their cost."""

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, FluxPipeline, StableDiffusionPipeline
from transformers import CLIPTextModel, CLIPTokenizer

from diffusers_fair import testbed
from diffusers_fair.families.flux import FLUX
from diffusers_fair.prompts import prompt_set
from diffusers_fair.testbed import world
from diffusers_fair.testbed.tokenizer import tokenizer

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


@pytest.fixture(scope="module")
def flux():
    pipe = testbed.flux_pipeline()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generated(pipe, prompt="a photo of a chef", **options):
    """One image (64, 64, 3) of a FLUX pipeline, from the same noise every time."""
    options = {"num_inference_steps": 2, "max_sequence_length": testbed.FLUX_TOKENS} | options
    noise = torch.Generator().manual_seed(0)
    return pipe(prompt, generator=noise, output_type="np", **options).images[0]


def test_the_second_is_a_genuine_flux_pipeline(flux):
    assert type(flux) is FluxPipeline
    assert {type(flux.text_encoder), type(flux.text_encoder_2)} == {CLIPTextModel}
    assert flux.transformer.config.guidance_embeds
    assert flux.vae.config.shift_factor != 0
    assert {p.dtype for p in flux.transformer.parameters()} == {torch.float32}


def test_the_second_shares_no_component_that_an_adapter_changes(flux):
    """LoRA in one text encoder must not change the other, which has the same weights."""
    assert flux.tokenizer is not flux.tokenizer_2
    assert flux.tokenizer is not tokenizer()
    assert flux.tokenizer.model_max_length == 77
    weights = zip(flux.text_encoder.parameters(), flux.text_encoder_2.parameters(), strict=True)
    assert all(torch.equal(a, b) and a.data_ptr() != b.data_ptr() for a, b in weights)


@pytest.mark.slow
def test_the_second_follows_prompt_and_guidance(flux):
    """Both text encoders and the embedded guidance scale affect the image."""
    image = generated(flux)
    assert image.shape == (testbed.SIZE, testbed.SIZE, 3)
    changes = (
        {"prompt": "a photo of a senator"},
        {"prompt_2": "a photo of a senator"},
        {"guidance_scale": 1.5},
    )
    for change in changes:
        assert np.abs(generated(flux, **change) - image).mean() > 1e-4, change


def test_a_prompt_of_the_second_has_at_most_32_tokens(flux):
    """Its family truncates by the tokenizer; the call has to be told."""
    long = "a photo of a chef, " + "very " * 40
    embedded = FLUX.encode(flux, [long])["encoder_hidden_states"]
    assert embedded.shape[1] == testbed.FLUX_TOKENS == flux.tokenizer_2.model_max_length


@pytest.mark.slow
def test_the_second_survives_saving(flux, tmp_path):
    flux.save_pretrained(tmp_path)
    again = FluxPipeline.from_pretrained(tmp_path)
    assert again.tokenizer_2.model_max_length == testbed.FLUX_TOKENS
    size = {"height": testbed.SIZE, "width": testbed.SIZE}  # not saved by diffusers
    assert np.allclose(generated(again, **size), generated(flux), atol=1e-5)


def test_weights_are_small():
    size = sum(f.stat().st_size for f in testbed.WEIGHTS.rglob("*") if f.is_file())
    assert size <= 36e6
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
