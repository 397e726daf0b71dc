"""What diffusers, torch.compile and the user can do to a pipeline behind a loaded adapter."""

import copy
import re

import pytest
import tiny
import torch
from diffusers import StableDiffusionPipeline
from test_loading import SIZES, images, refused, save, save_trained, snapshot

from diffusers_fair import (
    Attribute,
    evaluate,
    load_fair_adapter,
    set_fair_adapter_scale,
    unload_fair_adapter,
)
from diffusers_fair.adapters.format import SoftTokens
from diffusers_fair.adapters.prompt_encoder import without_prefix

pytestmark = pytest.mark.slow
SOFT = {"soft_tokens": SoftTokens(count=2)}
WORDS = {"shape": {"round": ("round",), "square": ("square",), "flat": ("flat",)}}
NAMED = "a round chef"
REMOVED = "were removed from the pipeline: call unload_fair_adapter, and load the adapter again"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """An adapter of layers, one of soft tokens, one of both, and an ordinary LoRA."""
    folder = tmp_path_factory.mktemp("states")
    save_trained(folder / "layers", SIZES, words=WORDS)
    save_trained(folder / "soft", SOFT)
    save_trained(folder / "whole", SIZES | SOFT, words=WORDS)
    save(folder / "style", tiny.pipeline(), ["text_encoder"], seed=1)
    return folder


@pytest.fixture(scope="module")
def base():
    return images(tiny.pipeline())


@pytest.fixture(scope="module")
def full(folders):
    """Kind of adapter -> image with it."""
    return {kind: images(loaded(folders, kind)) for kind in ("layers", "soft", "whole")}


def loaded(folders, kind, **options):
    pipe = tiny.pipeline()
    load_fair_adapter(pipe, folders / kind, **options)
    return pipe


def refuses(message, function, *args, **kwargs):
    with pytest.raises(ValueError, match=message) as caught:
        function(*args, **kwargs)
    assert "\n" not in str(caught.value)


# ---- fused ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("components", [["unet", "text_encoder"], ["unet"]])
def test_the_scale_of_a_fused_adapter_is_refused(folders, base, components):
    pipe = loaded(folders, "layers")
    pipe.fuse_lora(components=components)
    message = r"adapters are fused into the pipeline's weights: call pipe\.unfuse_lora\(\) first"
    refuses(message, set_fair_adapter_scale, pipe, 0)
    pipe.unfuse_lora(components=components)
    set_fair_adapter_scale(pipe, 0)
    assert torch.allclose(images(pipe), base, atol=1e-4)


def test_an_adapter_that_is_fused_for_good_keeps_its_prefix(folders, full):
    pipe = loaded(folders, "whole")
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    assert torch.allclose(images(pipe), full["whole"], atol=1e-4)
    for function in (unload_fair_adapter, lambda pipe: set_fair_adapter_scale(pipe, 0)):
        refuses("fused into .* were removed: load the base model again", function, pipe)
    refuses(
        "adapter 'fair' is fused .*: pass another adapter_name",
        load_fair_adapter,
        pipe,
        folders / "soft",
    )


# ---- switched off and scaled ---------------------------------------------------------------------


def disable(pipe, folders):
    pipe.disable_lora()


def activate_another(pipe, folders):
    pipe.load_lora_weights(save(folders / "none", tiny.pipeline()), adapter_name="style")
    pipe.set_adapters("style", 0.0)


def set_weight(pipe, folders):
    pipe.set_adapters("fair", 0.0)


@pytest.mark.parametrize("switch_off", [disable, activate_another, set_weight])
def test_the_prefix_is_off_when_the_layers_are(folders, base, full, switch_off):
    pipe = loaded(folders, "whole")
    switch_off(pipe, folders)
    assert torch.equal(images(pipe), base)
    pipe.enable_lora()
    pipe.set_adapters("fair")
    assert torch.equal(images(pipe), full["whole"])
    switch_off_again = disable if switch_off is activate_another else switch_off
    switch_off_again(pipe, folders)
    unload_fair_adapter(pipe)
    assert torch.equal(images(pipe), base)


def test_disabled_layers_are_neither_scaled_nor_joined_by_others(folders, base):
    pipe = loaded(folders, "whole")
    pipe.disable_lora()
    message = r"LoRA layers are disabled: call pipe\.enable_lora\(\) first"
    refuses(message, set_fair_adapter_scale, pipe, 1)
    refuses(message, load_fair_adapter, pipe, folders / "layers", adapter_name="two")
    set_fair_adapter_scale(pipe, 0)
    pipe.enable_lora()
    assert torch.equal(images(pipe), base)


def test_the_scale_activates_an_adapter_that_another_has_displaced(folders):
    """Loading a LoRA for the text encoder deactivates other adapters there, and only there."""
    pipe, expected = tiny.pipeline(), tiny.pipeline()
    for each, order in ((pipe, ["whole", "style"]), (expected, ["style", "whole"])):
        for kind in order:
            if kind == "whole":
                load_fair_adapter(each, folders / kind)
            else:
                each.load_lora_weights(folders / kind, adapter_name=kind)
    refuses(r"soft tokens of .* strengths \[0\.0, 1\.0\]: call set_fair_adapter", images, pipe)
    set_fair_adapter_scale(pipe, 1)
    assert torch.allclose(images(pipe), images(expected), atol=1e-5)
    pipe.set_adapters(["fair", "style"], [0.5, 1.0])
    refuses(r"soft tokens of .* strengths \[0\.5\]: call set_fair_adapter_scale", images, pipe)


def test_words_follow_the_layers(folders, base):
    pipe = loaded(folders, "layers", respect_words=True)
    embeds = tiny.pipeline().encode_prompt("a chef", "cpu", 1, False)[0]
    call = {"prompt_embeds": embeds, "guidance_scale": 1.0, "num_inference_steps": 1}
    refuses("respects words", pipe, **call)
    pipe.disable_lora()
    pipe(**call)
    pipe.enable_lora()
    pipe.delete_adapters("fair")
    pipe(**call)
    assert torch.equal(images(pipe), base)
    refuses(f"layers of the adapter 'fair' {REMOVED}", set_fair_adapter_scale, pipe, 1)
    unload_fair_adapter(pipe)
    assert "encode_prompt" not in vars(pipe)


def test_prompts_without_the_prefix_for_a_while(folders):
    pipe = loaded(folders, "whole")
    call = ("a chef", "cpu", 1, False)
    with without_prefix(pipe):
        assert torch.equal(pipe.encode_prompt(*call)[0], type(pipe).encode_prompt(pipe, *call)[0])
    assert not torch.equal(pipe.encode_prompt(*call)[0], type(pipe).encode_prompt(pipe, *call)[0])


# ---- removed and replaced ------------------------------------------------------------------------


@pytest.mark.parametrize("remove", ["delete_adapters", "unload_lora_weights"])
def test_without_its_layers_the_whole_adapter_is_off(folders, base, full, remove):
    pipe = loaded(folders, "whole")
    before = snapshot(tiny.pipeline())["prompts"][1:3]
    getattr(pipe, remove)(*["fair"] if remove == "delete_adapters" else [])
    assert torch.equal(images(pipe), base)
    refuses(f"layers of the unet of .*{REMOVED}", set_fair_adapter_scale, pipe, 1)
    unload_fair_adapter(pipe)
    assert snapshot(pipe)["prompts"][1:3] == before
    load_fair_adapter(pipe, folders / "whole")
    assert torch.equal(images(pipe), full["whole"])


@pytest.mark.parametrize("tokens", [[], ["<fair>"]])
@pytest.mark.parametrize("kind", ["soft", "whole"])
def test_soft_tokens_that_the_user_has_unloaded(folders, base, full, kind, tokens):
    """Alone they were the adapter, which is off; beside layers the adapter is only half there."""
    pipe = loaded(folders, kind)
    pipe.unload_textual_inversion(*tokens)
    if tokens and kind == "whole":  # of two soft tokens
        tokens = []
    if kind == "soft":
        assert torch.equal(images(pipe), base)
    else:
        refuses(f"soft tokens of the adapter 'fair' {REMOVED}", images, pipe)
    refuses(f"soft tokens of the adapter 'fair' {REMOVED}", set_fair_adapter_scale, pipe, 1)
    unload_fair_adapter(pipe)
    assert torch.equal(images(pipe), base)
    load_fair_adapter(pipe, folders / kind)
    assert torch.equal(images(pipe), full[kind])


@pytest.mark.parametrize("part", ["tokenizer", "text_encoder"])
def test_a_replaced_tokenizer_or_text_encoder(folders, base, full, part):
    pipe = loaded(folders, "soft")
    setattr(pipe, part, getattr(tiny.pipeline(), part))
    message = "embeddings for the .* tokens of the tokenizer, .*: call unload_fair_adapter"
    refuses(message, images, pipe)
    unload_fair_adapter(pipe)
    assert torch.equal(images(pipe), base)
    load_fair_adapter(pipe, folders / "soft")
    assert torch.equal(images(pipe), full["soft"])


def test_a_replaced_u_net(folders, base):
    pipe = loaded(folders, "whole")
    pipe.unet = tiny.pipeline().unet
    refuses(f"layers of the unet of the adapter 'fair' {REMOVED}", images, pipe)
    unload_fair_adapter(pipe)
    assert torch.equal(images(pipe), base)


def test_a_copied_u_net_respects_words(folders, full):
    pipe = loaded(folders, "whole", respect_words=True)
    images(pipe)
    pipe.unet = copy.deepcopy(pipe.unet)
    assert torch.equal(images(pipe, NAMED), images(tiny.pipeline(), NAMED))
    assert torch.equal(images(pipe), full["whole"])


def test_pipelines_of_the_same_parts(folders, base, full):
    """Whichever unloads the layers: they are gone from both, and the prefix goes with them."""
    pipe = loaded(folders, "whole")
    other = StableDiffusionPipeline(**pipe.components, requires_safety_checker=False)
    unload_fair_adapter(other)
    assert torch.equal(images(pipe), base)
    unload_fair_adapter(pipe)
    load_fair_adapter(pipe, folders / "whole")
    assert torch.equal(images(pipe), full["whole"])


def test_copies_of_a_pipeline(folders, base, full):
    pipe = loaded(folders, "whole", respect_words=True)
    deep = copy.deepcopy(pipe)
    unload_fair_adapter(deep)
    assert torch.equal(images(deep), base)
    shallow = copy.copy(pipe)
    assert torch.equal(images(shallow), full["whole"])
    unload_fair_adapter(shallow)
    assert torch.equal(images(pipe), base)
    load_fair_adapter(shallow, folders / "whole")
    unload_fair_adapter(shallow)
    assert torch.equal(images(shallow), base)


# ---- compiled ------------------------------------------------------------------------------------


def wrap(model):
    return torch.compile(model, backend="eager")


def in_place(model):
    model.compile(backend="eager")
    return model


def blocks(model):
    if hasattr(model, "compile_repeated_blocks"):
        model.compile_repeated_blocks(backend="eager")
        return model
    return wrap(model)


@pytest.mark.parametrize("load_first", [False, True])
@pytest.mark.parametrize("compile_model", [wrap, in_place, blocks])
def test_compiled_models(folders, base, full, compile_model, load_first):
    pipe = tiny.pipeline()
    if load_first:
        load_fair_adapter(pipe, folders / "whole")
    for part in ("unet", "text_encoder"):
        setattr(pipe, part, compile_model(getattr(pipe, part)))
    if not load_first:
        assert torch.allclose(images(pipe), base, atol=1e-6)
        load_fair_adapter(pipe, folders / "whole")
    assert torch.allclose(images(pipe), full["whole"], atol=1e-6)
    set_fair_adapter_scale(pipe, 0)
    assert torch.allclose(images(pipe), base, atol=1e-6)
    set_fair_adapter_scale(pipe, 1)
    unload_fair_adapter(pipe)
    assert torch.allclose(images(pipe), base, atol=1e-6)


@pytest.mark.parametrize("compile_model", [wrap, in_place, blocks])
def test_words_are_refused_in_compiled_models(folders, compile_model):
    """Models share compiled code with and without the hooks, so that those of one are skipped."""
    pipe = loaded(folders, "layers", respect_words=True)
    pipe.unet = compile_model(pipe.unet)
    message = "respect_words has no effect on LoRA layers in a compiled model: load"
    refuses(message, pipe.encode_prompt, NAMED, "cpu", 1, False)
    pipe.encode_prompt("a chef", "cpu", 1, False)
    unload_fair_adapter(pipe)
    refused(pipe, message, folders / "layers", respect_words=True)


def test_fused_projections(folders, base, full):
    pipe = tiny.pipeline()
    pipe.fuse_qkv_projections(vae=False)
    message = r"projections are fused, .*: call pipe\.unfuse_qkv_projections\(\) first"
    for options in ({}, {"other_base": True}):
        refuses(message, load_fair_adapter, pipe, folders / "whole", **options)
    pipe.unfuse_qkv_projections(vae=False)
    load_fair_adapter(pipe, folders / "whole")
    pipe.fuse_qkv_projections(vae=False)
    refuses(message, images, pipe)
    refuses(message, set_fair_adapter_scale, pipe, 1)
    pipe.unfuse_qkv_projections(vae=False)
    assert torch.equal(images(pipe), full["whole"])


# ---- not there -----------------------------------------------------------------------------------


def without(*names):
    parts = tiny.pipeline().components | dict.fromkeys(names)
    return StableDiffusionPipeline(**parts, requires_safety_checker=False)


@pytest.mark.parametrize("names", [["text_encoder"], ["unet"], ["tokenizer"]])
def test_a_pipeline_without_a_component(folders, names):
    has_none = re.escape(f"this StableDiffusionPipeline has no {' and no '.join(names)}")
    refused_parts = f"{has_none}, which the adapter needs: load the base model with all"
    for options in ({}, {"other_base": True}):
        refuses(refused_parts, load_fair_adapter, without(*names), folders / "whole", **options)


def test_an_adapter_that_does_not_need_the_missing_component(tmp_path):
    save_trained(tmp_path / "unet", {"unet": SIZES["unet"]})
    load_fair_adapter(without("text_encoder", "tokenizer"), tmp_path / "unet", other_base=True)


def test_evaluating_a_pipeline_without_components():
    pipe = without("text_encoder", "unet")
    message = "StableDiffusionPipeline has no text_encoder and no unet: load the base model with"
    refuses(message, evaluate, pipe, ["a chef"], [Attribute("shape", ("a", "b"))], judges=None)
