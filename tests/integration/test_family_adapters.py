"""Adapters are the same in every family: saved, loaded, stacked, fused, switched off, unloaded."""

import json

import diffusers
import pytest
import torch
from command import run
from families import PIPELINES, flux, sdxl
from family_adapters import SOFT, draw, everything, layers, saved, trained
from safetensors.torch import load_file

from diffusers_fair import load_fair_adapter, set_fair_adapter_scale, unload_fair_adapter
from diffusers_fair.adapters.folder import open_adapter
from diffusers_fair.adapters.format import EMBEDS_FILE, INFO_FILE, Lora
from diffusers_fair.adapters.soft_tokens import add_soft_tokens
from diffusers_fair.families import embedding_keys, family_of, soft_token_encoders
from diffusers_fair.families.fingerprint import base_fingerprint
from diffusers_fair.families.flux import FLUX
from diffusers_fair.families.stable_diffusion_3 import STABLE_DIFFUSION_3
from diffusers_fair.families.stable_diffusion_xl import STABLE_DIFFUSION_XL
from diffusers_fair.publishing.card import card_text

WORDS = {"shape": {"round": ("round", "ball"), "square": ("square",), "flat": ("flat",)}}
MIXED = ["a round chef", "a chef", "a flat nurse", "a nurse"]
NAMED = torch.tensor([True, False, True, False])
WITH_WORDS = [
    name for name, make in PIPELINES.items() if family_of(make()).evaluates_prompts_together
]


@pytest.fixture(scope="module", params=PIPELINES)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def folder(name, tmp_path_factory):
    """LoRA layers in every component that can have them."""
    folder = tmp_path_factory.mktemp(name) / "adapter"
    saved(folder, name, layers(PIPELINES[name]()), words=WORDS)
    return folder


@pytest.fixture(scope="module")
def style(name, tmp_path_factory):
    """An ordinary LoRA."""
    folder = tmp_path_factory.mktemp(name) / "style"
    saved(folder, name, layers(PIPELINES[name]()), seed=1)
    return folder


def loaded(name, folder, **options):
    pipe = PIPELINES[name]()
    load_fair_adapter(pipe, folder, **options)
    return pipe


def weights(pipe):
    models = {n: m for n, m in pipe.components.items() if isinstance(m, torch.nn.Module)}
    return {n: {k: x.clone() for k, x in model.state_dict().items()} for n, model in models.items()}


def assert_equal_weights(pipe, before):
    for part, state in weights(pipe).items():
        assert list(state) == list(before[part])
        assert all(torch.equal(x, before[part][key]) for key, x in state.items())


def type_soft_tokens(pipe, folder):
    """Load soft tokens with diffusers alone; return the prompt to type."""
    found = load_file(folder / EMBEDS_FILE)
    encoders = soft_token_encoders(pipe)
    for part, key in embedding_keys(pipe, "<fair>").items():
        encoder, tokenizer = encoders[part]
        pipe.load_textual_inversion(
            {"<fair>": found[key]}, text_encoder=encoder, tokenizer=tokenizer
        )
    return "<fair> a chef"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The new embeddings")
def test_the_same_images_as_trained_and_with_diffusers_alone(name, tmp_path):
    pipe = saved(tmp_path / "a", name)
    plain, ours = PIPELINES[name](), PIPELINES[name]()
    base, before, method = draw(ours), weights(ours), family_of(ours).encode_method
    has_tokens = bool(family_of(plain).embedding_keys)
    load_fair_adapter(ours, tmp_path / "a")
    found = draw(ours)
    plain.load_lora_weights(tmp_path / "a")
    prompt = type_soft_tokens(plain, tmp_path / "a") if has_tokens else "a chef"
    for each in (pipe, plain):  # torch may compute with trainable weights in another order
        getattr(each, family_of(each).denoiser).requires_grad_(False)
    assert torch.equal(found, draw(pipe))
    assert torch.equal(found, draw(plain, prompt))
    assert not torch.allclose(found, base, atol=1e-5)
    assert base_fingerprint(pipe) == base_fingerprint(ours) == base_fingerprint(PIPELINES[name]())
    unload_fair_adapter(ours)
    assert_equal_weights(ours, before)
    assert torch.equal(draw(ours), base)
    assert method not in vars(ours)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "part"),
    [("sdxl", part) for part in STABLE_DIFFUSION_XL.targets]
    + [("sd3", part) for part in STABLE_DIFFUSION_3.targets]
    + [("flux", part) for part in FLUX.targets],
)
def test_each_component_alone(tmp_path, family, part):
    saved(tmp_path / "a", family, {part: Lora(rank=2, alpha=2.0)})
    plain, ours = PIPELINES[family](), PIPELINES[family]()
    base = draw(ours)
    plain.load_lora_weights(tmp_path / "a")
    load_fair_adapter(ours, tmp_path / "a")
    assert torch.equal(draw(ours), draw(plain))
    assert not torch.equal(draw(ours), base)


def test_keys_always_have_the_level_that_some_models_lack(folder, name):
    keys = open_adapter(folder).weights
    encoders = [key for key in keys if key.startswith("text_encoder")]
    assert bool(encoders) == ("text_encoder" in family_of(PIPELINES[name]()).targets)
    assert all(key.split(".")[1:3] == ["text_model", "encoder"] for key in encoders)


def test_what_people_are_told_of_the_components(folder, name, monkeypatch, capsys):
    """Version 2 of the format is that of components that Stable Diffusion lacks."""
    data = json.loads((folder / INFO_FILE).read_text())
    assert data["format_version"] == (1 if name == "sd" else 2)
    assert run(monkeypatch, "inspect", str(folder)) == 0
    shown = json.loads(capsys.readouterr().out)
    card = card_text(open_adapter(folder)).replace("\\", "")  # Markdown escapes underscores
    assert [*shown["components"]] == [*layers(PIPELINES[name]())]
    assert all(f"- {part}: low-rank layers, rank 2" in card for part in shown["components"])


@pytest.mark.slow
def test_scale(name, folder):
    pipe, full, half = PIPELINES[name](), loaded(name, folder), loaded(name, folder, scale=0.5)
    base = draw(pipe)
    assert not torch.allclose(draw(half), draw(full), atol=1e-4)
    set_fair_adapter_scale(full, 0.5)
    assert torch.equal(draw(full), draw(half))
    set_fair_adapter_scale(full, 0)
    assert torch.equal(draw(full), base)


@pytest.mark.slow
def test_before_and_after_an_ordinary_lora(name, folder, style):
    first, then = PIPELINES[name](), loaded(name, folder)
    first.load_lora_weights(style, adapter_name="style")
    styled = draw(first)
    load_fair_adapter(first, folder)
    then.load_lora_weights(style, adapter_name="style")
    set_fair_adapter_scale(then, 1)  # diffusers deactivates an adapter when it loads another
    assert torch.allclose(draw(first), draw(then), atol=1e-5)
    assert not torch.allclose(draw(first), styled, atol=1e-3)
    for pipe in (first, then):
        unload_fair_adapter(pipe)
        assert torch.equal(draw(pipe), styled)


@pytest.mark.slow
def test_fused_and_unfused(name, folder):
    pipe = loaded(name, folder)
    found, parts = draw(pipe), [*family_of(pipe).targets]
    pipe.fuse_lora(components=parts)
    assert torch.allclose(draw(pipe), found, atol=1e-3)
    for function in (unload_fair_adapter, lambda pipe: set_fair_adapter_scale(pipe, 0)):
        with pytest.raises(ValueError, match=r"fused into .* call pipe\.unfuse_lora\(\) first"):
            function(pipe)
    pipe.unfuse_lora(components=parts)
    set_fair_adapter_scale(pipe, 1)
    assert torch.allclose(draw(pipe), found, atol=1e-3)


@pytest.mark.slow
def test_pipelines_of_the_same_parts(name, folder):
    pipe = loaded(name, folder)
    same = type(pipe).from_pipe(pipe)
    same.set_progress_bar_config(disable=True)
    same.vae_scale_factor = pipe.vae_scale_factor  # of Lumina 2's own class, always 8
    assert torch.equal(draw(same), draw(pipe))


@pytest.mark.slow
@pytest.mark.parametrize("family", ["sd", "sdxl", "sd3", "flux"])
def test_pipelines_of_other_tasks(family, tmp_path):
    base, folder = PIPELINES[family](), tmp_path / "a"
    saved(folder, family)
    other = diffusers.AutoPipelineForImage2Image.from_pipe(base)
    before = weights(other)
    load_fair_adapter(other, folder)
    assert family_of(other) is family_of(base)
    unload_fair_adapter(other)
    assert_equal_weights(other, before)


@pytest.mark.slow
@pytest.mark.parametrize("later", [False, True])
def test_models_that_are_offloaded_one_by_one(name, folder, later):
    """`enable_model_cpu_offload`, here to the CPU again: its hooks are those of any device."""
    pipe, plain = PIPELINES[name](), loaded(name, folder)
    base = draw(pipe)
    if later:
        load_fair_adapter(pipe, folder)
    pipe.enable_model_cpu_offload(device="cpu")
    if not later:
        load_fair_adapter(pipe, folder)
    assert torch.equal(draw(pipe), draw(plain))
    unload_fair_adapter(pipe)
    assert torch.equal(draw(pipe), base)


@pytest.mark.slow
@pytest.mark.parametrize("load_first", [False, True])
def test_compiled_models(name, folder, load_first):
    pipe, plain = PIPELINES[name](), loaded(name, folder)
    base, found = draw(pipe), draw(plain)
    if load_first:
        load_fair_adapter(pipe, folder)
    for part in family_of(pipe).targets:
        setattr(pipe, part, torch.compile(getattr(pipe, part), backend="eager"))
    if not load_first:
        load_fair_adapter(pipe, folder)
    assert torch.allclose(draw(pipe), found, atol=1e-5)
    unload_fair_adapter(pipe)
    assert torch.allclose(draw(pipe), base, atol=1e-5)


# ---- words ---------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("family", WITH_WORDS)
def test_prompts_that_name_a_class_are_the_base_models(family, tmp_path):
    """Bit for bit, in a batch with others; with soft tokens, where the family has them."""
    saved(tmp_path / "a", family, words=WORDS)
    base, adapted = draw(PIPELINES[family](), MIXED), draw(loaded(family, tmp_path / "a"), MIXED)
    found = draw(loaded(family, tmp_path / "a", respect_words=True), MIXED)
    assert torch.equal(found[NAMED], base[NAMED])
    assert torch.equal(found[~NAMED], adapted[~NAMED])
    assert not any(torch.equal(*pair) for pair in zip(base, adapted, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("family", ["sdxl", "sd3", "flux"])
def test_words_of_the_prompts_for_other_text_encoders(family, tmp_path):
    saved(tmp_path / "a", family, words=WORDS)
    pipe = loaded(family, tmp_path / "a", respect_words=True)
    second = ["a ball", "a cat"]
    found = draw(pipe, ["a chef"] * 2, prompt_2=second)
    base = draw(PIPELINES[family](), ["a chef"] * 2, prompt_2=second)
    assert torch.equal(found[0], base[0])
    assert not torch.equal(found[1], base[1])


def test_negative_prompts_that_are_encoded_apart(tmp_path):
    saved(tmp_path / "a", "flux", words=WORDS)
    pipe = loaded("flux", tmp_path / "a", respect_words=True)
    call = {"negative_prompt": "a dog", "true_cfg_scale": 2.0}
    with pytest.raises(ValueError, match=r"the negative prompts of FLUX.1, .*: leave out negative"):
        draw(pipe, "a round chef", **call)
    adapted = loaded("flux", tmp_path / "a")
    assert torch.equal(draw(pipe, "a chef", **call), draw(adapted, "a chef", **call))


# ---- base models ---------------------------------------------------------------------------------


def pack(pipe):
    """Pretend that the denoiser's linear layers are in 4 bits, two weights to a byte."""
    for layer in getattr(pipe, family_of(pipe).denoiser).modules():
        if isinstance(layer, torch.nn.Linear):
            packed = torch.zeros(layer.weight.numel() // 2, 1, dtype=torch.uint8)
            layer.weight = torch.nn.Parameter(packed, requires_grad=False)
    return pipe


@pytest.mark.slow
def test_quantized_bases_are_the_same_base(name, folder):
    pipe = pack(PIPELINES[name]())
    before = weights(pipe)
    assert base_fingerprint(pipe) == base_fingerprint(PIPELINES[name]())
    load_fair_adapter(pipe, folder)
    unload_fair_adapter(pipe)
    assert_equal_weights(pipe, before)


@pytest.mark.parametrize("dev", [True, False])
def test_a_flux_adapter_on_a_base_with_other_guidance_layers(tmp_path, dev):
    pipe = flux(dev=dev)
    assert base_fingerprint(pipe) != base_fingerprint(flux(dev=not dev))
    saved(tmp_path / "a", "flux", layers(pipe))
    if dev:
        load_fair_adapter(pipe, tmp_path / "a")
        return
    message = "layers of this FluxPipeline without guidance layers, as FLUX.1-schnell, have other"
    with pytest.raises(ValueError, match=message):
        load_fair_adapter(pipe, tmp_path / "a")
    load_fair_adapter(pipe, tmp_path / "a", other_base=True)


def test_a_base_whose_frozen_encoders_were_freed(tmp_path):
    """T5 has no layers of the adapter, and its embeddings may be cached."""
    saved(tmp_path / "a", "flux")
    pipe = flux()
    pipe.text_encoder_2 = pipe.tokenizer_2 = None
    load_fair_adapter(pipe, tmp_path / "a")


# ---- soft tokens ---------------------------------------------------------------------------------


def end_at_2(pipe):
    """Give the second text encoder the `eos_token_id` of many configurations."""
    pipe.text_encoder_2.config.eos_token_id = 2
    pipe.text_encoder_2.text_model.eos_token_id = 2
    return pipe


@pytest.mark.slow
def test_soft_tokens_would_hide_the_prompt_from_the_pooled_embedding(monkeypatch):
    pipe = end_at_2(sdxl())
    with pytest.raises(ValueError, match=r"the text_encoder_2 of this base: .*use LoRA layers"):
        add_soft_tokens(pipe, 2, torch.Generator())
    assert "<fair>" not in pipe.tokenizer.get_vocab()

    def pooled(pipe):
        return family_of(pipe).encode(pipe, ["a dog", "two cats"])["text_embeds"]

    good, allowed = sdxl(), end_at_2(sdxl())
    assert not torch.equal(*pooled(allowed))  # without soft tokens
    monkeypatch.setattr("diffusers_fair.adapters.soft_tokens._check_pooling", lambda *_: None)
    for pipe in (good, allowed):
        add_soft_tokens(pipe, 2, torch.Generator().manual_seed(0))
    assert torch.equal(*pooled(allowed))
    assert not torch.equal(*pooled(good))


@pytest.mark.filterwarnings("ignore:The new embeddings")
def test_the_prefix_stands_before_the_prompts_of_both_text_encoders(tmp_path):
    saved(tmp_path / "a", "sdxl", SOFT)
    pipe, typed = loaded("sdxl", tmp_path / "a"), sdxl()
    type_soft_tokens(typed, tmp_path / "a")
    found = pipe.encode_prompt("a chef", "a cat", negative_prompt="a dog")
    expected = typed.encode_prompt("<fair> a chef", "<fair> a cat", negative_prompt="a dog")
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def test_an_error_between_the_text_encoders_is_taken_back(tmp_path, monkeypatch):
    saved(tmp_path / "a", "sdxl", SOFT)
    pipe = sdxl()
    before, base = weights(pipe), draw(pipe)

    def fail(*_args, **_kwargs):
        assert "<fair>" in pipe.tokenizer.get_vocab()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pipe.tokenizer_2, "add_tokens", fail)
        with pytest.raises(KeyboardInterrupt):
            load_fair_adapter(pipe, tmp_path / "a")
    assert_equal_weights(pipe, before)
    assert "<fair>" not in pipe.tokenizer.get_vocab()
    assert torch.equal(draw(pipe), base)


@pytest.mark.slow
def test_soft_tokens_of_another_family(tmp_path):
    saved(tmp_path / "a", "sd", SOFT)
    with pytest.raises(ValueError, match="no soft tokens 'clip_l' for the text encoders of this"):
        load_fair_adapter(sdxl(), tmp_path / "a", other_base=True)


@pytest.mark.parametrize("part", ["text_encoder", "text_encoder_2"])
def test_a_replaced_text_encoder(tmp_path, part):
    saved(tmp_path / "a", "sdxl", SOFT)
    pipe = loaded("sdxl", tmp_path / "a")
    setattr(pipe, part, getattr(sdxl(), part))
    with pytest.raises(ValueError, match=f"the {part} has 514 embeddings for the 516 tokens of"):
        draw(pipe)
    unload_fair_adapter(pipe)
    assert torch.equal(draw(pipe), draw(sdxl()))


@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_families_without_soft_tokens(family):
    with pytest.raises(
        ValueError, match=r"soft tokens are not available for .* use LoRA layers of"
    ):
        add_soft_tokens(PIPELINES[family](), 2, torch.Generator())
    with pytest.raises(ValueError, match=r"an adapter for .* can have text_encoder, .*, got soft_"):
        trained(PIPELINES[family](), SOFT)


@pytest.mark.parametrize(("family", "part"), [("sd", "transformer"), ("flux", "unet")])
def test_components_that_the_family_lacks(family, part):
    pipe = PIPELINES[family]()
    possible = ", ".join(everything(pipe))
    with pytest.raises(ValueError, match=f"can have {possible}, got {part}: choose among those"):
        trained(pipe, {part: Lora(rank=2, alpha=2.0)})
