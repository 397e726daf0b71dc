import errno
import json
import os
import threading
import traceback
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import tiny
import torch
from diffusers import (
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionPipeline,
)
from peft import LoraConfig, get_peft_model_state_dict
from test_io import adapter_info

from diffusers_fair import load_fair_adapter, set_fair_adapter_scale, unload_fair_adapter
from diffusers_fair.adapters import format as adapter_format
from diffusers_fair.adapters.folder import read_adapter, write_adapter
from diffusers_fair.adapters.format import (
    EMBEDS_FILE,
    INFO_FILE,
    MAX_BYTES,
    WEIGHTS_FILE,
    Lora,
    SoftTokens,
)
from diffusers_fair.adapters.prompt_encoder import prompt_prefix
from diffusers_fair.adapters.trainable import TrainableAdapter
from diffusers_fair.families import LORA_PREFIXES
from diffusers_fair.families.fingerprint import base_fingerprint

TARGETS = {
    "text_encoder": ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"],
    "unet": ["to_q", "to_k", "to_v", "to_out.0"],
}
SIZES = {"text_encoder": Lora(rank=3, alpha=12.0), "unet": Lora(rank=2, alpha=2.0)}


def train(pipe, parts=SIZES, seed=0):
    """Put random LoRA layers on a pipeline with peft; return them in diffusers' layout."""
    weights = {}
    torch.manual_seed(seed)
    for part in parts:
        model = getattr(pipe, part)
        size = {"r": SIZES[part].rank, "lora_alpha": SIZES[part].alpha}
        model.add_adapter(LoraConfig(**size, target_modules=TARGETS[part], init_lora_weights=False))
        state = get_peft_model_state_dict(model, adapter_name="default")
        weights |= {LORA_PREFIXES[part] + key: value for key, value in state.items()}
    return weights


def save(folder, pipe, parts=SIZES, seed=0, **info):
    """Write the adapter folder that a training of this pipeline could end with."""
    info = {"components": {part: SIZES[part] for part in parts}} | info
    fingerprint = base_fingerprint(pipe)
    write_adapter(
        folder, train(pipe, parts, seed), adapter_info(**{"fingerprint": fingerprint} | info)
    )
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save(tmp_path_factory.mktemp("fair") / "adapter", tiny.pipeline())


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """An ordinary LoRA, in the text encoder only and on some of the layers."""
    return save(tmp_path_factory.mktemp("other") / "a", tiny.pipeline(), ["text_encoder"], seed=1)


def save_trained(folder, components, seed=0, **info):
    """Train an adapter that does something, as the package does; write its folder."""
    pipe = tiny.pipeline()
    adapter = TrainableAdapter(pipe, components, seed)
    generator = torch.Generator().manual_seed(seed)
    for parameter in adapter.parameters:
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    info = adapter_info(fingerprint=base_fingerprint(pipe), components=components, **info)
    write_adapter(folder, adapter.weights(), info)
    return pipe


@pytest.fixture(scope="module")
def soft(tmp_path_factory):
    """Soft tokens only."""
    folder = tmp_path_factory.mktemp("soft") / "adapter"
    save_trained(folder, {"soft_tokens": SoftTokens(count=3)})
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Low-rank layers in both parts, and soft tokens."""
    folder = tmp_path_factory.mktemp("whole") / "adapter"
    save_trained(folder, SIZES | {"soft_tokens": SoftTokens(count=2, token="<even>")})
    return folder


def images(pipe, prompt="a chef"):
    return pipe(
        prompt,
        num_inference_steps=2,
        guidance_scale=3.0,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
    ).images  # (1, 3, 16, 16)


def snapshot(pipe):
    """Everything that an adapter could change."""
    state = {}
    for part in ("text_encoder", "unet", "vae"):
        model = getattr(pipe, part)
        state[part] = (
            {key: value.clone() for key, value in model.state_dict().items()},
            [(name, type(module)) for name, module in model.named_modules()],
            {name: value.requires_grad for name, value in model.named_parameters()},
            {name for name, module in model.named_modules() if module.training},
            set(getattr(model, "peft_config", {})),
            [getattr(module, "active_adapters", None) for module in model.modules()],
        )
    tokenizer = json.loads(pipe.tokenizer.backend_tokenizer.to_str())
    tokenizer |= {"padding": None, "truncation": None}  # as it was called the last time
    words = pipe.tokenizer.decode(pipe.tokenizer("a dog").input_ids)
    embedding = pipe.text_encoder.get_input_embeddings()
    sizes = len(pipe.tokenizer), embedding.num_embeddings, pipe.text_encoder.config.vocab_size
    state["prompts"] = {}, tokenizer, words, embedding, sizes, vars(pipe).get("encode_prompt")
    return state


def assert_same(pipe, before):
    for part, (weights, *rest) in snapshot(pipe).items():
        old_weights, *old_rest = before[part]
        assert list(weights) == list(old_weights)
        assert all(torch.equal(weights[key], old_weights[key]) for key in weights)
        assert rest == old_rest


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_images_as_plain_diffusers_and_as_trained(folder, dtype):
    trained, plain, ours = (tiny.pipeline(dtype) for _ in range(3))
    base = images(ours)
    train(trained)
    plain.load_lora_weights(folder)
    load_fair_adapter(ours, folder)
    assert torch.equal(images(ours), images(plain))
    assert not torch.equal(images(ours), base)
    if dtype == torch.float32:
        assert torch.equal(images(ours), images(trained))


@pytest.mark.parametrize("part", ["text_encoder", "unet"])
def test_one_part_only(tmp_path, part):
    save(tmp_path / "adapter", tiny.pipeline(), [part])
    plain, ours = tiny.pipeline(), tiny.pipeline()
    plain.load_lora_weights(tmp_path / "adapter")
    load_fair_adapter(ours, tmp_path / "adapter")
    assert torch.equal(images(ours), images(plain))
    assert set(ours.get_list_adapters()) == {part}


COMPONENTS = [
    {"text_encoder": Lora(rank=4, alpha=4)},
    SIZES,
    {"soft_tokens": SoftTokens(count=3)},
    SIZES | {"soft_tokens": SoftTokens(count=1)},
]


@pytest.mark.parametrize("components", COMPONENTS)
def test_what_is_trained_is_what_is_loaded_and_what_plain_diffusers_loads(tmp_path, components):
    loaded, plain = tiny.pipeline(), tiny.pipeline()
    trained = save_trained(tmp_path / "adapter", components)
    load_fair_adapter(loaded, tmp_path / "adapter")
    assert torch.equal(images(loaded), images(trained))
    assert torch.equal(
        tiny.encode_prompts(trained, ["a chef", ""]), tiny.encode_prompts(loaded, ["a chef", ""])
    )
    if (tmp_path / "adapter" / WEIGHTS_FILE).exists():
        plain.load_lora_weights(tmp_path / "adapter")
    if prefix := "soft_tokens" in components:
        plain.load_textual_inversion(tmp_path / "adapter", weight_name=EMBEDS_FILE)
    assert torch.equal(images(loaded), images(plain, "<fair> a chef" if prefix else "a chef"))
    assert not torch.equal(images(loaded), images(tiny.pipeline()))


def test_methods_of_the_pipeline(folder):
    pipe = tiny.pipeline()
    base = images(pipe)
    pipe.load_fair_adapter(str(folder), scale=0.5)
    half = images(pipe)
    pipe.set_fair_adapter_scale(1.0)
    full = images(pipe)
    pipe.unload_fair_adapter()
    assert torch.equal(images(pipe), base)
    assert not torch.equal(half, base)
    assert not torch.equal(half, full)


def test_unloading_restores_bit_for_bit(folder):
    pipe = tiny.pipeline()
    pipe.unet.requires_grad_(True)
    before, base = snapshot(pipe), images(pipe)
    load_fair_adapter(pipe, folder, scale=0.7)
    unload_fair_adapter(pipe)
    assert_same(pipe, before)
    assert torch.equal(images(pipe), base)
    load_fair_adapter(pipe, folder)  # and it can be loaded again
    unload_fair_adapter(pipe)
    assert_same(pipe, before)


def test_adapter_is_frozen_and_the_rest_as_it_was(folder):
    pipe = tiny.pipeline()
    pipe.unet.requires_grad_(True)
    load_fair_adapter(pipe, folder)
    for part, expected in {"text_encoder": False, "unet": True}.items():
        for name, parameter in getattr(pipe, part).named_parameters():
            assert parameter.requires_grad == (expected and ".lora_" not in name)


def test_loading_draws_no_random_numbers(folder):
    pipe = tiny.pipeline()
    state = torch.get_rng_state()
    load_fair_adapter(pipe, folder)
    assert torch.equal(torch.get_rng_state(), state)


def test_scale(folder):
    pipe, by_diffusers = tiny.pipeline(), tiny.pipeline()
    base = images(pipe)
    load_fair_adapter(pipe, folder, scale=0)
    assert torch.equal(images(pipe), base)
    set_fair_adapter_scale(pipe, 0.3)
    by_diffusers.load_lora_weights(folder, adapter_name="fair")
    by_diffusers.set_adapters("fair", 0.3)
    assert torch.equal(images(pipe), images(by_diffusers))


@pytest.mark.parametrize("scale", [float("nan"), float("inf")])
def test_scale_that_is_no_number(folder, scale):
    pipe = tiny.pipeline()
    before = snapshot(pipe)
    with pytest.raises(ValueError, match=f"scale must be a finite number, got {scale}"):
        load_fair_adapter(pipe, folder, scale=scale)
    assert_same(pipe, before)


def test_beside_another_adapter(folder, other):
    pipe = tiny.pipeline()
    pipe.load_lora_weights(other, adapter_name="style")
    before, styled = snapshot(pipe), images(pipe)
    load_fair_adapter(pipe, folder, scale=0)
    assert torch.equal(images(pipe), styled)
    set_fair_adapter_scale(pipe, 1)
    assert not torch.equal(images(pipe), styled)
    unload_fair_adapter(pipe)
    assert_same(pipe, before)
    assert torch.equal(images(pipe), styled)


def test_an_adapter_that_is_switched_off_stays_off(folder, other):
    pipe = tiny.pipeline()
    pipe.load_lora_weights(other, adapter_name="off")
    pipe.load_lora_weights(other, adapter_name="on")
    pipe.set_adapters("on", 0.5)
    before, expected = snapshot(pipe), images(pipe)
    load_fair_adapter(pipe, folder, scale=0)
    assert torch.equal(images(pipe), expected)
    unload_fair_adapter(pipe)
    assert_same(pipe, before)


def test_two_of_ours(folder, other):
    pipe = tiny.pipeline()
    load_fair_adapter(pipe, other, adapter_name="one")
    one = images(pipe)
    load_fair_adapter(pipe, folder, adapter_name="two")
    unload_fair_adapter(pipe, adapter_name="two")
    assert torch.equal(images(pipe), one)


def test_fingerprint_is_of_the_shapes():
    pipe = tiny.pipeline()
    fingerprint = base_fingerprint(pipe)
    assert base_fingerprint(tiny.pipeline(torch.bfloat16, seed=1)) == fingerprint
    train(pipe)
    assert base_fingerprint(pipe) == fingerprint
    pipe.unet.register_parameter("extra", torch.nn.Parameter(torch.zeros(3)))
    assert base_fingerprint(pipe) != fingerprint


@pytest.mark.parametrize("scales", [(1.0, 0.5), (0.3, -1.0)])
def test_ours_and_others_at_once_by_diffusers_own_methods(folder, other, scales):
    """`set_adapters` sees no difference between ours, a second of ours and an ordinary LoRA."""
    ours, plain = tiny.pipeline(), tiny.pipeline()
    for pipe, load in ((ours, load_fair_adapter), (plain, tiny_lora)):
        load(pipe, folder, adapter_name="fair")
        load(pipe, other, adapter_name="two")
        pipe.load_lora_weights(other, adapter_name="style")
        pipe.set_adapters(["fair", "style"], list(scales))
    assert torch.equal(images(ours), images(plain))
    assert ours.get_list_adapters() == plain.get_list_adapters()
    ours.set_adapters("style")
    unload_fair_adapter(ours)
    unload_fair_adapter(ours, adapter_name="two")
    alone = tiny.pipeline()
    alone.load_lora_weights(other)
    assert torch.equal(images(ours), images(alone))


def tiny_lora(pipe, folder, adapter_name):
    pipe.load_lora_weights(folder, adapter_name=adapter_name)


def test_fused_and_unfused(folder):
    pipe, base = tiny.pipeline(), tiny.pipeline()
    load_fair_adapter(pipe, folder)
    beside = images(pipe)
    pipe.fuse_lora()
    assert torch.allclose(images(pipe), beside, atol=1e-4)
    pipe.unfuse_lora()
    assert torch.allclose(images(pipe), beside, atol=1e-4)
    unload_fair_adapter(pipe)
    assert torch.allclose(images(pipe), images(base), atol=1e-4)
    assert not torch.allclose(beside, images(base), atol=1e-2)


@pytest.mark.parametrize("later", [False, True])
def test_models_that_are_offloaded_one_by_one(whole, later):
    """`enable_model_cpu_offload`, here to the CPU again: its hooks are those of any device."""
    pipe, plain = tiny.pipeline(), tiny.pipeline()
    base = images(plain)
    load_fair_adapter(plain, whole)
    if later:
        load_fair_adapter(pipe, whole)
    pipe.enable_model_cpu_offload(device="cpu")
    if not later:
        load_fair_adapter(pipe, whole)
    assert torch.equal(images(pipe), images(plain))
    unload_fair_adapter(pipe)
    assert torch.equal(images(pipe), base)
    assert all(hasattr(getattr(pipe, part), "_hf_hook") for part in ("text_encoder", "unet"))


def test_layers_that_are_offloaded_one_by_one(folder):
    """What `enable_sequential_cpu_offload` does, which itself asks for a GPU."""
    from accelerate import cpu_offload

    pipe, plain = tiny.pipeline(), tiny.pipeline()
    load_fair_adapter(plain, folder)
    cpu_offload(pipe.unet, execution_device=torch.device("cpu"))
    message = r"offloaded layer by layer: call pipe\.remove_all_hooks\(\) first"
    with pytest.raises(ValueError, match=message):
        load_fair_adapter(pipe, folder)
    pipe.remove_all_hooks()
    load_fair_adapter(pipe, folder)
    cpu_offload(pipe.unet, execution_device=torch.device("cpu"))
    assert torch.equal(images(pipe), images(plain))
    with pytest.raises(ValueError, match=message):
        unload_fair_adapter(pipe)


@pytest.mark.parametrize("kind", [StableDiffusionImg2ImgPipeline, StableDiffusionInpaintPipeline])
def test_low_rank_layers_in_other_pipelines_of_the_family(folder, kind):
    ours, plain = (
        kind(**tiny.pipeline().components, requires_safety_checker=False) for _ in range(2)
    )
    before = snapshot(ours)
    load_fair_adapter(ours, folder)
    plain.load_lora_weights(folder)
    drawn = []
    for pipe in (ours, plain):
        pipe.set_progress_bar_config(disable=True)
        generator, given = torch.Generator().manual_seed(0), image_arguments(kind)
        call = {"num_inference_steps": 2, "generator": generator, "output_type": "pt"}
        drawn.append(pipe(prompt="a chef", **call, **given).images)
    assert torch.equal(*drawn)
    unload_fair_adapter(ours)
    assert_same(ours, before)


# ---- soft tokens ---------------------------------------------------------------------------------


def image_arguments(kind):
    picture = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    if kind is StableDiffusionPipeline:
        return {}
    if kind is StableDiffusionInpaintPipeline:
        return {"image": picture, "mask_image": picture[:, :1], "height": 16, "width": 16}
    return {"image": picture}


@pytest.mark.parametrize(
    "kind",
    [StableDiffusionPipeline, StableDiffusionImg2ImgPipeline, StableDiffusionInpaintPipeline],
)
def test_prefix_as_one_would_type_it_in_every_pipeline(soft, kind):
    ours, plain = (
        kind(**tiny.pipeline().components, requires_safety_checker=False) for _ in range(2)
    )
    before, base = snapshot(ours), ours.encode_prompt
    load_fair_adapter(ours, soft)
    plain.load_textual_inversion(soft, weight_name=EMBEDS_FILE)
    for pipe in (ours, plain):
        pipe.set_progress_bar_config(disable=True)

    def draw(pipe, prompts):
        return pipe(
            prompt=prompts,
            negative_prompt=["a cat"] * len(prompts),
            num_inference_steps=2,
            generator=torch.Generator().manual_seed(0),
            output_type="pt",
            **image_arguments(kind),
        ).images

    expected = draw(plain, ["<fair> a chef", "a <fair> nurse"])
    assert torch.equal(draw(ours, ["a chef", "a <FAIR> nurse"]), expected)
    unload_fair_adapter(ours)
    assert_same(ours, before)
    assert ours.encode_prompt == base


@pytest.mark.parametrize("prompt", ["<fair> a chef", "<Fair> a chef"])
def test_a_typed_placeholder_is_not_doubled(soft, prompt):
    pipe = tiny.pipeline()
    load_fair_adapter(pipe, soft)
    assert torch.equal(images(pipe, prompt), images(pipe, "a chef"))


def test_the_negative_prompt_stays_as_it_is(soft):
    pipe, base = tiny.pipeline(), tiny.pipeline()
    load_fair_adapter(pipe, soft)
    for negative in (None, "a cat"):
        with_it, without = (
            p.encode_prompt("a chef", "cpu", 1, True, negative_prompt=negative)
            for p in (pipe, base)
        )
        assert torch.equal(with_it[1], without[1])
        assert not torch.equal(with_it[0], without[0])


def test_embeddings_instead_of_a_prompt(soft):
    pipe = tiny.pipeline()
    embeds = pipe.encode_prompt("a chef", "cpu", 1, False)[0]
    load_fair_adapter(pipe, soft)
    message = "tokens of the adapter 'fair' cannot be put before prompt_embeds: pass the prompt as"
    with pytest.raises(ValueError, match=message):
        pipe(prompt_embeds=embeds, guidance_scale=1.0, num_inference_steps=1)
    set_fair_adapter_scale(pipe, 0)
    assert torch.equal(pipe.encode_prompt(None, "cpu", 1, False, prompt_embeds=embeds)[0], embeds)


@pytest.mark.parametrize(("letters", "warned"), [(72, False), (73, True), (75, True), (76, False)])
@pytest.mark.parametrize("typed", ["", "<fair> "])
def test_a_prompt_that_the_prefix_cuts_off(soft, caplog, letters, warned, typed):
    pipe = tiny.pipeline()
    load_fair_adapter(pipe, soft)
    for _ in range(2):
        pipe.encode_prompt([typed + "x" * letters, "a chef"], "cpu", 1, True)
    message = (
        f"with the 3 soft tokens of the adapter 'fair' before it, the prompt has {letters + 5} "
    )
    found = [text for text in caplog.messages if "soft tokens" in text]
    assert len(found) == warned
    assert all(text.startswith(message) and text.endswith(f"'{'x' * letters}'") for text in found)


def test_scale_of_soft_tokens(whole):
    pipe = tiny.pipeline()
    base = images(pipe)
    load_fair_adapter(pipe, whole, scale=0)
    assert torch.equal(images(pipe), base)
    set_fair_adapter_scale(pipe, 1)
    full = images(pipe)
    assert not torch.equal(full, base)
    with pytest.raises(ValueError, match=r"scale must be 0 or 1, got 0\.5"):
        set_fair_adapter_scale(pipe, 0.5)
    assert torch.equal(images(pipe), full)
    refused(tiny.pipeline(), r"cannot be scaled: scale must be 0 or 1, got 1\.5", whole, scale=1.5)


def test_unloading_soft_tokens_restores_bit_for_bit(whole):
    pipe = tiny.pipeline()
    pipe.text_encoder.requires_grad_(True)
    before, base = snapshot(pipe), images(pipe)
    assert prompt_prefix(pipe) is None
    state = torch.get_rng_state()
    for _ in range(2):
        load_fair_adapter(pipe, whole)
        assert not torch.equal(images(pipe), base)
        unload_fair_adapter(pipe)
        assert_same(pipe, before)
        assert torch.equal(images(pipe), base)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("later", [False, True])
def test_beside_another_textual_inversion(soft, later):
    pipe, other = tiny.pipeline(), tiny.pipeline()
    toy = {"<toy>": torch.randn(2, 16, generator=torch.Generator().manual_seed(2))}
    other.load_textual_inversion(toy)
    if not later:
        pipe.load_textual_inversion(toy)
    load_fair_adapter(pipe, soft)
    if later:
        pipe.load_textual_inversion(toy)
    assert base_fingerprint(pipe) == base_fingerprint(tiny.pipeline())
    with_both = images(pipe, "a <toy>")
    unload_fair_adapter(pipe)
    assert torch.equal(images(pipe, "a <toy>"), images(other, "a <toy>"))
    assert not torch.equal(images(pipe, "a <toy>"), with_both)
    assert pipe.tokenizer.get_vocab() == other.tokenizer.get_vocab()
    assert all(
        torch.equal(weight, other.text_encoder.state_dict()[key])
        for key, weight in pipe.text_encoder.state_dict().items()
    )


def test_beside_low_rank_layers_of_another_adapter(soft, folder):
    pipe, reverse = tiny.pipeline(), tiny.pipeline()
    load_fair_adapter(pipe, folder, adapter_name="layers")
    layers, before = images(pipe), snapshot(pipe)
    load_fair_adapter(pipe, soft)
    load_fair_adapter(reverse, soft)
    load_fair_adapter(reverse, folder, adapter_name="layers")
    assert torch.equal(images(pipe), images(reverse))
    unload_fair_adapter(reverse, adapter_name="layers")
    alone = tiny.pipeline()
    load_fair_adapter(alone, soft)
    assert torch.equal(images(reverse), images(alone))
    unload_fair_adapter(pipe)
    assert_same(pipe, before)
    assert torch.equal(images(pipe), layers)


def test_a_second_prefix_is_refused(soft, whole):
    pipe = tiny.pipeline()
    load_fair_adapter(pipe, soft, adapter_name="one")
    message = "soft tokens already, those of the adapter 'one', and .*: unload that adapter first"
    refused(pipe, message, whole, adapter_name="two")
    refused(pipe, "already has an adapter 'one'", whole, adapter_name="one")


def test_a_placeholder_in_use(soft):
    pipe = tiny.pipeline()
    pipe.load_textual_inversion({"<fair>": torch.zeros(1, 16)})
    refused(pipe, "tokenizer has a token '<fair>' already: unload that textual inversion", soft)


def test_soft_tokens_of_another_width(tmp_path):
    pipe = tiny.pipeline()
    info = {"components": {"soft_tokens": SoftTokens(count=2)}}
    info = adapter_info(fingerprint=base_fingerprint(pipe), **info)
    write_adapter(tmp_path / "adapter", {"<fair>": torch.ones(2, 8)}, info)
    message = "soft tokens have 8 dimensions, .* pipeline's text_encoder have 16"
    refused(pipe, message, tmp_path / "adapter")


def test_a_pipeline_whose_prompts_cannot_be_given_a_prefix(soft):
    parts = tiny.pipeline().components
    pipe = StableDiffusionInstructPix2PixPipeline(**parts, requires_safety_checker=False)
    refused(pipe, "encode_prompt and .*, and StableDiffusionInstructPix2PixPipeline is none", soft)


@pytest.mark.parametrize("place", ["resize_token_embeddings", "add_tokens", "inject"])
def test_an_error_between_soft_tokens_is_taken_back(whole, monkeypatch, place):
    import peft.functional

    pipe, calls = tiny.pipeline(), []
    before, base = snapshot(pipe), images(pipe)
    owner, name = {
        "resize_token_embeddings": (pipe.text_encoder, "resize_token_embeddings"),
        "add_tokens": (pipe.tokenizer, "add_tokens"),
        "inject": (peft.functional, "inject_adapter_in_model"),
    }[place]
    real = getattr(owner, name)

    def fail(*args, **kwargs):
        result = real(*args, **kwargs)
        calls.append(result)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return result

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, fail)
        with pytest.raises(KeyboardInterrupt):
            load_fair_adapter(pipe, whole)
    assert_same(pipe, before)
    assert torch.equal(images(pipe), base)


# ---- refused, and nothing changed ----------------------------------------------------------------


def refused(pipe, message, *args, **kwargs):
    before = snapshot(pipe)
    with pytest.raises(ValueError, match=message) as caught:
        load_fair_adapter(pipe, *args, **kwargs)
    assert "\n" not in str(caught.value)
    assert_same(pipe, before)


def test_missing_folder(tmp_path):
    refused(tiny.pipeline(), "there is no adapter folder at", tmp_path / "nowhere")


def test_truncated_weights(folder, tmp_path):
    for name in (INFO_FILE, WEIGHTS_FILE):
        content = (folder / name).read_bytes()
        (tmp_path / name).write_bytes(content if name == INFO_FILE else content[:-4])
    refused(tiny.pipeline(), "is truncated or damaged", tmp_path)


def test_other_format_version(folder, tmp_path):
    info = json.loads((folder / INFO_FILE).read_text())
    (tmp_path / INFO_FILE).write_text(json.dumps(info | {"format_version": 9}))
    (tmp_path / WEIGHTS_FILE).write_bytes((folder / WEIGHTS_FILE).read_bytes())
    refused(tiny.pipeline(), "is of format version 9, and", tmp_path)


def test_other_base_model(folder, monkeypatch):
    monkeypatch.setattr(tiny, "WIDTH", 32)
    message = (
        "trained for the base model 'testbed', but the layers of this StableDiffusionPipeline "
        "have other shapes: pass other_base=True"
    )
    refused(tiny.pipeline(), message, folder)
    refused(tiny.pipeline(), "fits no layer of the text_encoder", folder, other_base=True)


def named(name):
    """A pipeline as `from_pretrained(name)` leaves it."""
    pipe = tiny.pipeline()
    pipe.register_to_config(_name_or_path=name)
    return pipe


@pytest.mark.parametrize(
    ("trained_on", "base"),
    [
        ("org/base", "org/base"),
        ("org/base", None),
        ("org/base", "/home/me/base"),
        ("testbed", "org/base"),
        ("stable-diffusion-v1-5/stable-diffusion-v1-5", "runwayml/stable-diffusion-v1-5"),
    ],
)
def test_bases_that_are_the_same_or_cannot_be_told_apart(tmp_path, trained_on, base):
    folder = save(tmp_path / "adapter", tiny.pipeline(), base_model=trained_on)
    load_fair_adapter(named(base), folder)


def test_a_base_of_the_same_shapes_but_another_name(tmp_path, monkeypatch):
    folder = save(tmp_path / "adapter", tiny.pipeline(), base_model="org/base")
    message = "the base model 'org/base', but this pipeline is 'org/fine-tuned': pass other_base="
    refused(named("org/fine-tuned"), message, folder)
    pipe, plain = named("org/fine-tuned"), tiny.pipeline()
    load_fair_adapter(pipe, folder, other_base=True)
    plain.load_lora_weights(folder)
    assert torch.equal(images(pipe), images(plain))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "fine-tuned").mkdir(parents=True)  # a folder, not an id
    load_fair_adapter(named("org/fine-tuned"), folder)


def test_another_u_net_around_the_same_text_encoder(tmp_path):
    """As that of inpainting, which sees the mask as well."""
    folder = save(tmp_path / "adapter", tiny.pipeline(), ["text_encoder"])
    pipe = tiny.pipeline()
    pipe.unet = tiny.unet(in_channels=9)
    refused(pipe, "have other shapes: pass other_base=True", folder)
    load_fair_adapter(pipe, folder, other_base=True)
    assert pipe.get_list_adapters() == {"text_encoder": ["fair"]}


@pytest.mark.parametrize(
    ("key", "shape"),
    [
        ("unet.nowhere.lora_A.weight", (2, 8)),
        ("unet.mid_block.lora_A.weight", (2, 8)),
        ("unet.conv_in.lora_A.weight", (2, 8)),
        ("unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k.lora_A.weight", (2, 8)),
    ],
)
def test_weight_without_a_layer(tmp_path, key, shape):
    """An adapter whose fingerprint is right but whose weights are not."""
    pipe = tiny.pipeline()
    weights = {key: torch.ones(shape), key.replace("lora_A", "lora_B"): torch.ones(16, 2)}
    info = adapter_info(
        fingerprint=base_fingerprint(pipe), components={"unet": Lora(rank=2, alpha=2.0)}
    )
    write_adapter(tmp_path / "adapter", weights, info)
    name = key.removeprefix("unet.")
    refused(pipe, f"weight '{name}' fits no layer of the unet", tmp_path / "adapter")


def test_name_in_use(folder, other):
    pipe = tiny.pipeline()
    pipe.load_lora_weights(other, adapter_name="fair")
    refused(pipe, "already has an adapter 'fair': unload it first or pass", folder)


@pytest.mark.parametrize("name", ["", "a.b", "a b"])
def test_bad_name(folder, name):
    refused(tiny.pipeline(), "adapter_name must be letters", folder, adapter_name=name)


def test_nothing_to_unload_or_scale(other):
    pipe = tiny.pipeline()
    pipe.load_lora_weights(other, adapter_name="style")
    message = r"has no adapter 'fair', only \['style'\]"
    with pytest.raises(ValueError, match=message):
        unload_fair_adapter(pipe)
    with pytest.raises(ValueError, match=message):
        set_fair_adapter_scale(pipe, 1)


def test_fused_adapters_stay(folder, other):
    pipe = tiny.pipeline()
    load_fair_adapter(pipe, folder)
    pipe.fuse_lora()
    before = snapshot(pipe)
    message = r"fused into the pipeline's weights: call pipe\.unfuse_lora\(\) first"
    with pytest.raises(ValueError, match=message):
        unload_fair_adapter(pipe)
    assert_same(pipe, before)
    refused(pipe, message, other, adapter_name="two")


@pytest.mark.parametrize("part", [0, 1])
@pytest.mark.parametrize("function", ["inject_adapter_in_model", "set_peft_model_state_dict"])
@pytest.mark.parametrize("stacked", [False, True])
def test_an_error_half_way_is_taken_back(folder, other, monkeypatch, function, part, stacked):
    import peft.functional

    pipe = tiny.pipeline()
    if stacked:
        load_fair_adapter(pipe, other, adapter_name="one")
    before, calls, real = snapshot(pipe), [], getattr(peft.functional, function)

    def fail(*args, **kwargs):
        result = real(*args, **kwargs)
        calls.append(result)
        if len(calls) > part:
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(peft.functional, function, fail)
    with pytest.raises(KeyboardInterrupt):
        load_fair_adapter(pipe, folder)
    assert_same(pipe, before)


# ---- from the Hub --------------------------------------------------------------------------------

COMMIT = "c" * 40


@pytest.fixture
def hub(whole, tmp_path, monkeypatch):
    """A server on this machine that holds `org/fair`, and an empty cache."""
    files = {path.name: path.read_bytes() for path in whole.iterdir()} | {"evil.bin": b"pickle"}
    asked = []

    class Hub(BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.do_GET()

        def do_GET(self):
            path = self.path.partition("?")[0]
            shown = path if self.command == "GET" else f"{self.command} {path}"
            asked.append((shown, self.headers.get("authorization")))
            tree = [{"type": "file", "path": n, "size": len(b), "oid": n} for n, b in files.items()]
            known = {f"/api/models/org/fair/revision/{r}" for r in ("main", "v1")}
            if path in known:
                self.answer(json.dumps({"id": "org/fair", "sha": COMMIT}).encode())
            elif path == f"/api/models/org/fair/tree/{COMMIT}":
                self.answer(json.dumps(tree).encode())
            elif path.startswith(f"/org/fair/resolve/{COMMIT}/"):
                self.answer(files[Path(path).name], ETag=f'"{Path(path).name}"')
            elif path.startswith("/api/models/org/broken"):
                self.answer(b"", 403)
            else:
                kind = "Revision" if path.startswith("/api/models/org/fair") else "Repo"
                self.answer(b"", 404, **{"X-Error-Code": f"{kind}NotFound"})

        def answer(self, body, status=200, **headers):
            self.send_response(status)
            length = {"Content-Length": str(len(body)), "X-Repo-Commit": COMMIT}
            for name, value in (length | headers).items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", url)
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    yield asked
    server.shutdown()
    server.server_close()


def test_from_the_hub_and_then_from_the_cache(hub, whole, monkeypatch):
    here, there = tiny.pipeline(), tiny.pipeline()
    load_fair_adapter(here, whole)
    load_fair_adapter(there, "org/fair", token="secret-word")
    assert torch.equal(images(here), images(there))
    assert ("/api/models/org/fair/revision/main", "Bearer secret-word") in hub
    assert not any("evil.bin" in path for path, _ in hub)

    hub.clear()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    offline = tiny.pipeline()
    load_fair_adapter(offline, "org/fair")
    assert torch.equal(images(here), images(offline))
    assert not hub


def read_only(monkeypatch, commit):
    """Let a commit have no folder in the cache, as on a read-only disk."""
    make = os.makedirs

    def refuse(path, *args, **kwargs):
        if str(path).endswith(commit):
            raise OSError(errno.EROFS, "Read-only file system", str(path))
        make(path, *args, **kwargs)

    monkeypatch.setattr(os, "makedirs", refuse)


def test_a_read_only_cache_whose_weights_are_there(hub, monkeypatch):
    """Only the card has changed on the Hub."""
    load_fair_adapter(tiny.pipeline(), "org/fair")
    monkeypatch.setitem(globals(), "COMMIT", "d" * 40)
    read_only(monkeypatch, COMMIT)
    load_fair_adapter(tiny.pipeline(), "org/fair")
    assert f"/api/models/org/fair/tree/{COMMIT}" in [path for path, _ in hub]


def test_a_read_only_cache_without_the_weights(hub, monkeypatch):
    read_only(monkeypatch, COMMIT)
    message = "'org/fair' on the Hub is not in the local cache, which cannot be written: make"
    refused(tiny.pipeline(), message, "org/fair")


def test_a_file_that_is_too_large_is_not_downloaded(hub, monkeypatch):
    monkeypatch.setitem(MAX_BYTES, WEIGHTS_FILE, 50)
    message = f"'org/fair/{WEIGHTS_FILE}' has [0-9]+ bytes, more than the 50 allowed"
    refused(tiny.pipeline(), message, "org/fair")
    file = f"/org/fair/resolve/{COMMIT}/{WEIGHTS_FILE}"
    assert file not in [path for path, _ in hub]
    monkeypatch.setitem(MAX_BYTES, WEIGHTS_FILE, 2**20)
    load_fair_adapter(tiny.pipeline(), "org/fair")
    assert file in [path for path, _ in hub]


def test_the_token_stays_out_of_messages_and_of_the_cache(hub, tmp_path, capfd):
    token = "-".join(["very", "secret"])  # a traceback quotes the lines of this test
    load_fair_adapter(tiny.pipeline(), "org/fair", token=token)
    for repository, revision in (("org/fair", "v2"), ("org/nothing", None), ("org/broken", None)):
        with pytest.raises(ValueError, match="there is no adapter folder") as caught:
            load_fair_adapter(tiny.pipeline(), repository, revision=revision, token=token)
        assert token not in "".join(traceback.format_exception(caught.value))
    assert token not in "".join(capfd.readouterr())
    files = [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert files
    assert not any(token.encode() in path.read_bytes() for path in files)


def test_revision(hub):
    load_fair_adapter(tiny.pipeline(), "org/fair", revision="v1")
    assert "/api/models/org/fair/revision/v1" in [path for path, _ in hub]
    message = "'org/fair', and its repository on the Hub has no revision 'v2'"
    refused(tiny.pipeline(), message, "org/fair", revision="v2")


def test_no_such_repository(hub):
    message = "'org/nothing', and no repository on the Hub that you may read .* pass token="
    refused(tiny.pipeline(), message, "org/nothing", token="secret-word")


def test_hub_error(hub):
    message = "'org/broken', and .*the Hub"
    refused(tiny.pipeline(), message, "org/broken")


def test_offline_and_not_in_the_cache(hub, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    message = "'org/fair', and it is not in the local cache, and the Hub cannot be reached"
    refused(tiny.pipeline(), message, "org/fair")


def test_what_is_read_from_the_hub_is_checked(hub, monkeypatch):
    monkeypatch.setattr(adapter_format, "_FORMAT_VERSIONS", (2, 3))
    message = r"is of format version 1, and this package reads the versions \(2, 3\)"
    refused(tiny.pipeline(), message, "org/fair")


def test_card_and_samples_are_not_needed(folder):
    assert {path.name for path in folder.iterdir()} == {INFO_FILE, WEIGHTS_FILE}
    assert read_adapter(folder)[0].base_model == "testbed"


def test_weights_in_half_precision_compute_as_those_of_training(folder, tmp_path):
    info, weights = read_adapter(folder)
    half = {key: weight.half() for key, weight in weights.items()}
    write_adapter(tmp_path / "half", half, info)
    write_adapter(tmp_path / "whole", {key: weight.float() for key, weight in half.items()}, info)
    pipes = [tiny.pipeline(), tiny.pipeline()]
    for pipe, name in zip(pipes, ("half", "whole"), strict=True):
        load_fair_adapter(pipe, tmp_path / name)
        assert {w.dtype for w in pipe.text_encoder.parameters()} == {torch.float32}
    assert torch.equal(*(images(pipe) for pipe in pipes))
