"""The contract of pipeline families, as Stable Diffusion fulfils it, and its conditioning."""

from types import SimpleNamespace

import pytest
import torch
from accelerate import cpu_offload_with_hook
from diffusers import StableDiffusionImg2ImgPipeline
from families import PIPELINES, TOKENS, flux, flux2_klein, sdxl, size_of, z_image
from tiny import LATENT, pipeline

from diffusers_fair.baselines import ChangedPipeline
from diffusers_fair.diffusion.sampling import decode, decode_backward
from diffusers_fair.families import (
    FAMILIES,
    LORA_PREFIXES,
    conditioning,
    denoiser_of,
    encode_negatives,
    family_of,
    find_family,
)
from diffusers_fair.families.base import Usual, execution_device
from diffusers_fair.families.fingerprint import base_fingerprint
from diffusers_fair.families.flux import FLUX
from diffusers_fair.families.flux2_klein import FLUX2_KLEIN
from diffusers_fair.families.lumina2 import LUMINA2
from diffusers_fair.families.stable_diffusion import STABLE_DIFFUSION
from diffusers_fair.families.z_image import Z_IMAGE
from diffusers_fair.loading import _check_words

NAME = "encoder_hidden_states"


@pytest.fixture(scope="module")
def pipe():
    return pipeline()


def test_the_family_of_a_pipeline(pipe):
    other = StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
    for each in (pipe, other, ChangedPipeline(pipe)):
        assert family_of(each) is STABLE_DIFFUSION
        assert denoiser_of(each) is pipe.unet


def test_an_offloaded_pipeline_computes_elsewhere_than_it_is():
    """What `enable_model_cpu_offload` does on a GPU, for which meta stands here."""
    each = pipeline()
    assert execution_device(each) == execution_device(ChangedPipeline(each)) == each.device
    for part in (each.text_encoder, each.unet, each.vae):
        cpu_offload_with_hook(part, torch.device("meta"))
    assert each.device == torch.device("cpu")
    assert execution_device(each) == torch.device("meta")


@pytest.mark.parametrize("parts", [(), ("unet", "text_encoder", "vae", "tokenizer")])
def test_a_pipeline_of_no_known_family(parts):
    strange = SimpleNamespace(text_encoder_2=None, **dict.fromkeys(parts))
    assert find_family(strange) is None
    message = (
        r"expected a pipeline of Stable Diffusion 1 or 2 or .* klein, got SimpleNamespace: load"
    )
    with pytest.raises(ValueError, match=message):
        family_of(strange)


@pytest.mark.parametrize("name", PIPELINES)
def test_the_components_of_a_family_exist(name):
    pipe = PIPELINES[name]()
    family = family_of(pipe)
    assert [each for each in FAMILIES if each.matches(pipe)] == [family]
    modules = {*family.components, *family.targets, *family.inversions, family.denoiser}
    assert all(isinstance(getattr(pipe, name), torch.nn.Module) for name in modules)
    assert all(hasattr(pipe, name) for name in (*family.inversions.values(), family.encode_method))
    assert family.lora_prefixes.keys() == family.targets.keys()
    assert all(LORA_PREFIXES[name] == key for name, key in family.lora_prefixes.items())
    size = size_of(pipe)
    default = 1024 if name in ("z_image", "aura_flow") else size  # fixed in the pipeline's call
    assert family.noise_shape(pipe) == family.noise_shape(pipe, default)
    _, h, w = family.noise_shape(pipe, size)
    assert family.noise_shape(pipe, 2 * size)[1:] == (2 * h, 2 * w)
    assert family.usual(pipe).steps >= 1


MULTIPLES = {"sd": 2, "sdxl": 2, "sana": 4} | dict.fromkeys(
    ("sd3", "flux", "z_image", "lumina2", "aura_flow", "flux2_klein"), 4
)


@pytest.mark.parametrize(("name", "multiple"), MULTIPLES.items())
def test_sizes_that_do_not_fit_the_latents_are_refused(name, multiple):
    pipe = PIPELINES[name]()
    with pytest.raises(ValueError, match=f"multiple of {multiple} pixels for this .*, got 15"):
        family_of(pipe).noise_shape(pipe, 15)


def test_the_unconditional_branch_is_the_empty_prompt(pipe):
    expected = pipe.encode_prompt("", "cpu", 1, False)[0]
    assert torch.equal(STABLE_DIFFUSION.unconditional(pipe)[NAME], expected)


@pytest.mark.parametrize("scale", [1, 1.5, 7.5])
def test_branch_weights_agree_with_combine(pipe, scale):
    branches = STABLE_DIFFUSION.guidance_branches(pipe, scale)
    predictions = torch.randn(len(branches), 2, *LATENT, dtype=torch.float64).unbind()
    expected = sum(w * p for (_, w), p in zip(branches, predictions, strict=True))
    torch.testing.assert_close(STABLE_DIFFUSION.combine(predictions, scale), expected)


def test_negative_prompts_are_encoded_as_the_pipeline_does():
    """SDXL's empty one is zeros, in most models."""
    pipe = sdxl()
    found = encode_negatives(pipe, ["a cat", "", "a cat"])
    _, expected, _, pooled = pipe.encode_prompt(
        ["a dog"], device="cpu", negative_prompt=["a cat"], do_classifier_free_guidance=True
    )
    torch.testing.assert_close(found[NAME][[0, 2]], expected.expand(2, -1, -1))
    torch.testing.assert_close(found["text_embeds"][[0, 2]], pooled.expand(2, -1))
    assert not found[NAME][1].any()
    assert not found["text_embeds"][1].any()
    encoded = encode_negatives(sdxl(zeros=False), [""])[NAME]
    assert encoded.any()


def test_flux_reads_as_much_of_a_prompt_as_its_tokenizer_does():
    assert FLUX.call_options(flux(), 3.5)["max_sequence_length"] == TOKENS
    long = flux()
    long.tokenizer_2.model_max_length = 10**9
    assert FLUX.call_options(long, 3.5)["max_sequence_length"] == 512
    long.transformer.register_to_config(guidance_embeds=False)
    assert FLUX.call_options(long, 0)["max_sequence_length"] == 256


@pytest.mark.parametrize("name", ["z_image", "lumina2", "flux2_klein"])
def test_prompts_that_are_evaluated_apart_cannot_be_told_apart(name):
    with pytest.raises(
        ValueError, match=r"respect_words is not available for .*: load the adapter"
    ):
        _check_words(PIPELINES[name]())


def test_families_have_different_fingerprints():
    digests = {base_fingerprint(make()) for make in PIPELINES.values()}
    assert len(digests) == len(PIPELINES)


def test_z_image_is_guided_by_any_positive_scale():
    pipe = z_image()
    assert Z_IMAGE.guidance_branches(pipe, 0) == [("cond", 1.0)]
    predictions = torch.randn(2, 3, 4, 2, 2, dtype=torch.float64).unbind()
    weights = [w for _, w in Z_IMAGE.guidance_branches(pipe, 0.5)]
    expected = weights[0] * predictions[0] + weights[1] * predictions[1]
    torch.testing.assert_close(Z_IMAGE.combine(predictions, 0.5), expected)
    with pytest.raises(ValueError, match=r"must be at least 0 .*, got -1"):
        Z_IMAGE.guidance_branches(pipe, -1)


def test_lumina_2_keeps_the_norm_of_the_prompts_prediction():
    uncond, cond = torch.randn(2, 3, 4, 5, 5).unbind()
    found = LUMINA2.combine([uncond, cond], 4)
    torch.testing.assert_close(found.norm(dim=-1), cond.norm(dim=-1))
    guided = uncond + 4 * (cond - uncond)
    torch.testing.assert_close(torch.cosine_similarity(found, guided, -1), torch.ones(3, 4, 5))


@pytest.mark.parametrize("name", ["sana", "lumina2"])
def test_instructions_precede_prompts_but_not_negative_prompts(name):
    pipe = PIPELINES[name]()
    family = family_of(pipe)
    mask = "encoder_attention_mask"
    prompt, negative = (family.encode(pipe, ["a dog"], prefix=p)[mask] for p in (True, False))
    assert negative.sum() == 3  # with the token that begins each text
    assert prompt.sum() > 3


def test_usual_sampling_of_distilled_models():
    assert FLUX2_KLEIN.usual(flux2_klein(distilled=True)) == Usual(guidance_scale=1.0, steps=4)
    assert FLUX2_KLEIN.usual(flux2_klein()) == Usual(guidance_scale=4.0, steps=50)
    pipe = flux2_klein(distilled=True)
    assert FLUX2_KLEIN.guidance_branches(pipe, 4) == [("cond", 1.0)]
    pipe = z_image()
    pipe.register_to_config(_name_or_path="Tongyi-MAI/Z-Image-Turbo")
    assert Z_IMAGE.usual(pipe) == Usual(guidance_scale=0.0, steps=8)
    assert Z_IMAGE.usual(z_image()) == Usual(guidance_scale=5.0, steps=50)
    assert FLUX.usual(flux(dev=False)) == Usual(guidance_scale=0.0, steps=4)
    assert FLUX.usual(flux()) == Usual(guidance_scale=3.5, steps=28)


# ---- conditioning --------------------------------------------------------------------------------


def two(n, **options):
    """Two tensors of n rows, as families have them that pool embeddings as well."""
    g = torch.Generator().manual_seed(n)
    return {
        "tokens": torch.randn(n, 3, 4, generator=g, **options),
        "pooled": torch.randn(n, 4, generator=g, **options),
    }


def test_rows_are_expanded_selected_repeated_and_joined():
    one, three = two(1), two(3)
    assert conditioning.expand(one, 3)["pooled"].shape == (3, 4)
    assert conditioning.expand(three, 3)["tokens"].shape == (3, 3, 4)
    assert torch.equal(conditioning.select(three, slice(1, 3))["pooled"], three["pooled"][1:])
    twice = conditioning.repeat_interleave(three, 2)
    assert torch.equal(twice["tokens"][:2], three["tokens"][[0, 0]])
    joined = conditioning.concatenate([one, three])
    assert torch.equal(joined["pooled"][1:], three["pooled"])
    with pytest.raises(ValueError, match="for 1 or 2 images, got 3: pass one for each image"):
        conditioning.expand(three, 2)


def test_only_floating_point_tensors_change_their_dtype():
    given = two(2) | {"mask": torch.ones(2, 3, dtype=torch.bool)}
    found = conditioning.cast(given, torch.zeros((), dtype=torch.bfloat16))
    assert [x.dtype for x in found.values()] == [torch.bfloat16, torch.bfloat16, torch.bool]


def test_leaves_collect_gradients_of_trainable_tensors():
    given = two(2, dtype=torch.bfloat16)
    given["tokens"].requires_grad_()
    assert conditioning.requires_grad(given)
    leaves = conditioning.leaves(given)
    assert leaves["pooled"] is given["pooled"]
    (leaves["tokens"].sum() + leaves["pooled"].sum()).backward()
    found = conditioning.gradients(leaves)
    assert list(found) == ["tokens"]
    assert found["tokens"].dtype == torch.float32
    assert given["tokens"].grad is None


def test_tensors_that_share_a_graph_are_back_propagated_together():
    weight = torch.ones(4, requires_grad=True)
    hidden = two(2)["tokens"] * weight.exp()  # `exp` keeps what its backward needs once
    encoded = {"tokens": hidden * 1, "pooled": hidden[:, 0] * 2, "fixed": torch.ones(2)}
    gradients = {"tokens": torch.ones(2, 3, 4), "pooled": torch.ones(2, 4)}
    conditioning.backward(encoded, gradients)
    expected = (two(2)["tokens"].sum((0, 1)) + 2 * two(2)["tokens"][:, 0].sum(0)) * torch.e
    torch.testing.assert_close(weight.grad, expected)
    conditioning.backward(encoded, {})  # nothing to send


def overflowing(dtype, **config):
    """SDXL, whose VAE has activations above the largest number of float16, 65504."""
    pipe = sdxl()
    pipe.vae.register_to_config(**config)
    pipe.vae.decoder.conv_in.weight.mul_(1e5)
    return pipe.to(torch.float16).to(dtype)  # the same weights in every dtype


def test_a_vae_that_overflows_in_float16_is_used_in_float32():
    """Forward and backward, as the pipeline does, and in float16 again afterwards."""
    latents = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0)).half()
    upcast, plain = overflowing(torch.float16), overflowing(torch.float32)
    images = decode(plain, latents.float())
    torch.testing.assert_close(decode(upcast, latents, 2), images)
    gradient = decode_backward(upcast, latents, torch.ones_like(images), 2)
    expected = decode_backward(plain, latents.float(), torch.ones_like(images))
    assert gradient.dtype == torch.float16
    torch.testing.assert_close(gradient, expected.half())
    assert gradient.any()
    assert upcast.vae.dtype == torch.float16
    broken = overflowing(torch.float16, force_upcast=False)
    assert not decode(broken, latents).isfinite().all()


def test_sdxl_in_float16_decodes_the_images_of_its_pipeline():
    pipe = overflowing(torch.float16)
    options = {"num_inference_steps": 2, "guidance_scale": 1.0}
    images, latents = (
        pipe(
            ["a dog"], generator=torch.Generator().manual_seed(0), output_type=kind, **options
        ).images
        for kind in ("pt", "latent")
    )
    with torch.no_grad():
        torch.testing.assert_close((decode(pipe, latents) + 1) / 2, images)


def test_latents_and_vae_may_have_other_dtypes():
    pipe = sdxl()
    latents = torch.randn(1, 4, 8, 8)
    pipe.vae.to(torch.bfloat16)
    assert decode(pipe, latents).dtype == torch.bfloat16
    assert decode_backward(pipe, latents, torch.ones(1, 3, 16, 16)).dtype == torch.float32
