"""Adapters that respect words: prompts that name a class are the base model's, to the bit."""

import copy
import json

import pytest
import tiny
import torch
from diffusers import (
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionInstructPix2PixPipeline,
)
from test_io import edit
from test_loading import SIZES, assert_same, image_arguments, refused, save, save_trained, snapshot

from diffusers_fair import Attribute, load_fair_adapter, set_fair_adapter_scale, unload_fair_adapter
from diffusers_fair.adapters.folder import read_adapter
from diffusers_fair.adapters.format import EMBEDS_FILE, INFO_FILE, SoftTokens
from diffusers_fair.adapters.word_switch import adapter_words

WORDS = {"shape": {"round": ("round", "ball"), "square": ("square",), "flat": ("flat",)}}
SOFT = {"soft_tokens": SoftTokens(count=3)}
COMPONENTS = {
    "text encoder": {"text_encoder": SIZES["text_encoder"]},
    "U-Net": {"unet": SIZES["unet"]},
    "both": SIZES,
    "soft tokens": SOFT,
    "U-Net and soft tokens": {"unet": SIZES["unet"], **SOFT},
    "all": SIZES | SOFT,
}
MIXED = ["a Round chef", "a chef", "a round or flat nurse", "a nurse all around"]
NAMED = torch.tensor([True, False, True, False])


@pytest.fixture(scope="module", params=COMPONENTS.values(), ids=COMPONENTS)
def folder(request, tmp_path_factory):
    """An adapter of each kind, with words."""
    folder = tmp_path_factory.mktemp("words") / "adapter"
    save_trained(folder, request.param, words=WORDS)
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An adapter of everything, with words."""
    folder = tmp_path_factory.mktemp("words") / "adapter"
    save_trained(folder, SIZES | SOFT, words=WORDS)
    return folder


@pytest.fixture(scope="module")
def style(tmp_path_factory):
    """An ordinary LoRA in both parts."""
    return save(tmp_path_factory.mktemp("style") / "a", tiny.pipeline(), seed=1)


def loaded(folder, **options):
    pipe = tiny.pipeline()
    load_fair_adapter(pipe, folder, **options)
    return pipe


def draw(pipe, prompt=MIXED, **more):
    """Images (n, 3, 16, 16), each from noise of its own."""
    count = (1 if isinstance(prompt, str) else len(prompt)) * more.get("num_images_per_prompt", 1)
    generators = [torch.Generator().manual_seed(i) for i in range(count)]
    call = {"num_inference_steps": 2, "guidance_scale": 3.0} | more
    return pipe(prompt=prompt, generator=generators, output_type="pt", **call).images


def assert_mixed(images, base, adapted, named=NAMED):
    """Named prompts are the base's, others the adapter's; and the two differ."""
    assert torch.equal(images[named], base[named])
    assert torch.equal(images[~named], adapted[~named])
    assert not any(torch.equal(*pair) for pair in zip(base, adapted, strict=True))


CALLBACK = ["prompt_embeds", "latents"]


def guidance_ends(pipe, step, time, tensors):
    """Halve the batch, as `SDCFGCutoffCallback` does."""
    pipe._guidance_scale = 1.0
    return {"prompt_embeds": tensors["prompt_embeds"][-len(tensors["latents"]) :]}


@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    [
        {},
        {"guidance_scale": 1.0},
        {"num_images_per_prompt": 3},
        {"num_images_per_prompt": 2, "guidance_scale": 1.0},
        {"negative_prompt": ["a cat", "a flat cat", "a dog", ""]},
        {"guidance_rescale": 0.5, "cross_attention_kwargs": {"scale": 0.7}},
        {"callback_on_step_end": guidance_ends, "callback_on_step_end_tensor_inputs": CALLBACK},
    ],
    ids=lambda more: ", ".join(more) or "guidance",
)
def test_a_batch_of_both_kinds(folder, more):
    named = NAMED.repeat_interleave(more.get("num_images_per_prompt", 1))
    pipes = loaded(folder, respect_words=True), tiny.pipeline(), loaded(folder)
    assert_mixed(*(draw(pipe, **more) for pipe in pipes), named)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_prompt_after_another(folder, dtype):
    pipe, base, adapted = (tiny.pipeline(dtype) for _ in range(3))
    load_fair_adapter(pipe, folder, respect_words=True)
    load_fair_adapter(adapted, folder)
    for prompt, expected in (
        ("a chef", adapted),
        ("a ball-like chef", base),
        ("a chef", adapted),
        (["a flat chef", "a square nurse"], base),
        (["a chef"], adapted),
    ):
        assert torch.equal(draw(pipe, prompt), draw(expected, prompt))


def test_embeddings_are_the_base_models_too(folder):
    pipe, base = loaded(folder, respect_words=True), tiny.pipeline()
    for negative in (None, ["a cat"] * 4):
        found, expected = (
            p.encode_prompt(MIXED, "cpu", 2, True, negative_prompt=negative) for p in (pipe, base)
        )
        rows = NAMED.repeat_interleave(2)
        assert all(torch.equal(x[rows], y[rows]) for x, y in zip(found, expected, strict=True))


def test_off_unless_asked_for(folder):
    assert not torch.equal(
        draw(loaded(folder), "a round chef"), draw(tiny.pipeline(), "a round chef")
    )


@pytest.mark.slow
def test_unloading_restores_bit_for_bit(folder):
    pipe = tiny.pipeline()
    before, base, hooks = snapshot(pipe), draw(pipe), hook_count(pipe)
    for _ in range(2):
        pipe.load_fair_adapter(folder, respect_words=True)
        draw(pipe)
        pipe.unload_fair_adapter()
        assert_same(pipe, before)
        assert hook_count(pipe) == hooks == 0
        assert "encode_prompt" not in vars(pipe)
        assert torch.equal(draw(pipe), base)


def hook_count(pipe):
    return sum(
        len(module._forward_hooks) + len(module._forward_pre_hooks)
        for part in (pipe.text_encoder, pipe.unet)
        for module in part.modules()
    )


def test_an_error_half_way_is_taken_back(whole, monkeypatch):
    import diffusers_fair.loading as loading

    def fail(*_, **__):
        raise KeyboardInterrupt

    pipe = tiny.pipeline()
    before = snapshot(pipe)
    monkeypatch.setattr(loading, "set_fair_adapter_scale", fail)
    with pytest.raises(KeyboardInterrupt):
        load_fair_adapter(pipe, whole, respect_words=True)
    assert_same(pipe, before)
    assert hook_count(pipe) == 0


def test_scale(folder):
    pipe, base, adapted = (
        loaded(folder, respect_words=True, scale=0),
        tiny.pipeline(),
        loaded(folder),
    )
    assert torch.equal(draw(pipe), draw(base))
    embeds = base.encode_prompt("a chef", "cpu", 1, False)[0]
    pipe(prompt_embeds=embeds, guidance_scale=1.0, num_inference_steps=1)  # no words needed
    set_fair_adapter_scale(pipe, 1)
    assert_mixed(draw(pipe), draw(base), draw(adapted))


@pytest.mark.slow
@pytest.mark.parametrize("style_first", [False, True])
def test_beside_an_ordinary_lora(folder, style, style_first):
    """Only this adapter is switched off; what the host loaded stays."""
    pipes = tiny.pipeline(), tiny.pipeline(), tiny.pipeline()
    for pipe, options in zip(pipes, ({"respect_words": True}, None, {}), strict=True):
        if style_first:
            pipe.load_lora_weights(style, adapter_name="style")
        if options is not None:
            load_fair_adapter(pipe, folder, **options)
        if not style_first:
            pipe.load_lora_weights(style, adapter_name="style")
        ours = {"fair"} & {name for names in pipe.get_list_adapters().values() for name in names}
        pipe.set_adapters([*ours, "style"], [1.0] * len(ours) + [0.7])
    expected = draw(pipes[1])
    assert_mixed(draw(pipes[0]), expected, draw(pipes[2]))
    unload_fair_adapter(pipes[0])
    assert torch.equal(draw(pipes[0]), expected)


@pytest.mark.slow
def test_two_adapters_each_with_words_of_its_own(folder, tmp_path):
    colours = Attribute("colour", ("red", "blue"))
    info = {"attributes": (colours,), "words": {"colour": {"red": ("red",)}}}
    save_trained(tmp_path / "two", SIZES, seed=1, **info)
    pipe, one, two, both = (tiny.pipeline() for _ in range(4))
    for each, respect in ((pipe, True), (both, False)):
        load_fair_adapter(each, folder, respect_words=respect)
        load_fair_adapter(each, tmp_path / "two", adapter_name="two", respect_words=respect)
    load_fair_adapter(one, folder)
    load_fair_adapter(two, tmp_path / "two", adapter_name="two")
    prompts = ["a chef", "a red chef", "a round chef", "a round red chef"]
    expected = [draw(p, prompts)[i] for i, p in enumerate((both, one, two, tiny.pipeline()))]
    assert torch.equal(draw(pipe, prompts), torch.stack(expected))
    unload_fair_adapter(pipe)
    assert torch.equal(draw(pipe, prompts)[0], draw(two, prompts)[0])
    assert torch.equal(draw(pipe, prompts)[1], draw(tiny.pipeline(), prompts)[1])
    unload_fair_adapter(pipe, adapter_name="two")
    assert "encode_prompt" not in vars(pipe)


def test_a_second_adapter_that_does_not_look_at_words(whole, style):
    pipe, other = loaded(whole, respect_words=True), tiny.pipeline()
    load_fair_adapter(pipe, style, adapter_name="two")
    load_fair_adapter(other, style, adapter_name="two")
    assert torch.equal(draw(pipe, "a round chef"), draw(other, "a round chef"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", [StableDiffusionImg2ImgPipeline, StableDiffusionInpaintPipeline])
def test_other_pipelines_of_the_family(folder, kind):
    pipes = [kind(**tiny.pipeline().components, requires_safety_checker=False) for _ in range(3)]
    load_fair_adapter(pipes[0], folder, respect_words=True)
    load_fair_adapter(pipes[2], folder)
    given = {"num_inference_steps": 4} | image_arguments(kind)
    for pipe in pipes:
        pipe.set_progress_bar_config(disable=True)
    assert_mixed(*(draw(pipe, **given) for pipe in pipes))


def test_a_pipeline_of_the_same_parts_keeps_the_adapter(folder):
    """As one refines what another has drawn; words are read where they were asked to be."""
    pipe, adapted = loaded(folder, respect_words=True), loaded(folder)
    draw(pipe, "a round chef")
    drawn = []
    for each in (pipe, adapted):
        other = StableDiffusionImg2ImgPipeline.from_pipe(each)
        other.set_progress_bar_config(disable=True)
        given = image_arguments(StableDiffusionImg2ImgPipeline) | {"num_inference_steps": 4}
        drawn.append(draw(other, "a chef", **given))
    assert torch.equal(*drawn)


def test_the_u_net_can_be_copied(folder):
    pipe = loaded(folder, respect_words=True)
    draw(pipe, "a round chef")
    pipe.unet = copy.deepcopy(pipe.unet)
    assert torch.equal(draw(pipe, "a chef"), draw(loaded(folder), "a chef"))


@pytest.mark.slow
def test_models_that_are_offloaded_one_by_one(folder):
    pipe = loaded(folder, respect_words=True)
    pipe.enable_model_cpu_offload(device="cpu")
    assert_mixed(draw(pipe), draw(tiny.pipeline()), draw(loaded(folder)))


def test_a_sampling_loop_of_ones_own(folder):
    """The U-Net finds its prompts again, in whatever order guidance puts them."""
    pipe, base, adapted = loaded(folder, respect_words=True), tiny.pipeline(), loaded(folder)
    x, t = torch.randn(8, *tiny.LATENT, generator=torch.Generator().manual_seed(0)), 500
    found = []
    for each in (pipe, base, adapted):
        prompts, negative = each.encode_prompt(MIXED, "cpu", 1, True)
        found.append(each.unet(x, t, torch.cat([prompts, negative])).sample.chunk(2)[0])
    assert_mixed(*found)


def test_a_typed_placeholder_stays(tmp_path):
    save_trained(tmp_path / "soft", SOFT, words=WORDS)
    pipe, plain = loaded(tmp_path / "soft", respect_words=True), tiny.pipeline()
    plain.load_textual_inversion(tmp_path / "soft", weight_name=EMBEDS_FILE)
    prompt = "a <fair> round chef"
    assert torch.equal(draw(pipe, prompt), draw(plain, prompt))


# ---- where the words come from -------------------------------------------------------------------


def test_an_older_folder_goes_by_its_classes_and_its_recipe(tmp_path):
    recipe = {"attributes": [{"name": "shape", "words": {"flat": ["flat", "level"]}}]}
    save_trained(tmp_path / "old", SIZES, recipe=recipe)
    assert "words" not in json.loads((tmp_path / "old" / INFO_FILE).read_text())
    pipe, adapted = (loaded(tmp_path / "old", respect_words=each) for each in (True, False))
    prompts = ["a level chef", "a chef", "a square chef", "a ball"]
    assert_mixed(*(draw(each, prompts) for each in (pipe, tiny.pipeline(), adapted)))


@pytest.mark.parametrize(
    "recipe",
    [
        {},
        {"attributes": "shape"},
        {"attributes": ["shape", {"name": "size", "words": {"flat": ["big"]}}]},
        {"attributes": [{"name": "shape", "words": ["flat"]}]},
        {"attributes": [{"name": "shape", "words": {"flat": "level", "oval": ["egg"]}}]},
        {"attributes": [{"name": "shape", "words": {"flat": [7, ""]}, "nouns": ["disc"]}]},
    ],
)
def test_a_recipe_that_says_nothing_of_words(recipe, tmp_path):
    save_trained(tmp_path / "old", {"unet": SIZES["unet"]}, recipe=recipe)
    info, _ = read_adapter(tmp_path / "old")
    found = adapter_words(info)
    assert found == {"shape": {name: (name,) for name in ("round", "square", "flat")}}


def test_nouns_of_a_recipe_name_a_class_too(tmp_path):
    recipe = {"attributes": [None, {"name": "shape", "nouns": {"flat": ["disc", 7]}}]}
    save_trained(tmp_path / "old", {"unet": SIZES["unet"]}, recipe=recipe)
    assert adapter_words(read_adapter(tmp_path / "old")[0])["shape"]["flat"] == ("flat", "disc")


def test_older_folders_know_english(tmp_path):
    attributes = (Attribute("gender", ("female", "male")),)
    save_trained(tmp_path / "old", {"unet": SIZES["unet"]}, attributes=attributes)
    pipe, base = loaded(tmp_path / "old", respect_words=True), tiny.pipeline()
    for prompt in ("a chef, a woman", "she is a chef", "a man and a woman", "two men"):
        assert torch.equal(draw(pipe, prompt), draw(base, prompt))
    assert not torch.equal(draw(pipe, "a chef"), draw(base, "a chef"))


def test_words_that_cannot_be_are_refused(whole, tmp_path):
    for file in whole.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    edit(tmp_path, lambda data: data["words"]["shape"].update(oval=["egg"]))
    refused(tiny.pipeline(), "words of 'shape' are for its classes", tmp_path, respect_words=True)


# ---- what cannot work ----------------------------------------------------------------------------


def test_embeddings_instead_of_a_prompt(folder):
    pipe = loaded(folder, respect_words=True)
    embeds = tiny.pipeline().encode_prompt("a chef", "cpu", 1, False)[0]
    with pytest.raises(ValueError, match=r"'fair'.* prompt_embeds.*: pass the prompt as text"):
        pipe(prompt_embeds=embeds, guidance_scale=1.0, num_inference_steps=1)


def test_a_fused_adapter_cannot_be_switched_off(tmp_path):
    save_trained(tmp_path / "a", SIZES, words=WORDS)
    pipe = loaded(tmp_path / "a", respect_words=True)
    pipe.fuse_lora()
    draw(pipe, "a chef")
    with pytest.raises(ValueError, match=r"fused into .*: call pipe\.unfuse_lora\(\) first"):
        draw(pipe, "a round chef")
    pipe.unfuse_lora()
    assert torch.allclose(
        draw(pipe, "a flat cook"), draw(tiny.pipeline(), "a flat cook"), atol=1e-4
    )


def test_a_pipeline_whose_prompts_cannot_be_read(tmp_path):
    save_trained(tmp_path / "a", SIZES, words=WORDS)
    parts = tiny.pipeline().components
    pipe = StableDiffusionInstructPix2PixPipeline(**parts, requires_safety_checker=False)
    message = "respect_words needs a pipeline with encode_prompt, which .*Pix2PixPipeline lacks"
    refused(pipe, message, tmp_path / "a", respect_words=True)
