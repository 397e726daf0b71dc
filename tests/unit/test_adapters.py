"""Low-rank layers, soft tokens, and both as one adapter in training."""

import pytest
import torch
from families import PIPELINES, SIZE
from family_adapters import everything
from family_adapters import trained as trained_in
from tiny import LATENT, encode_prompts, pipeline

from diffusers_fair import testbed
from diffusers_fair.adapters.format import Lora, SoftTokens
from diffusers_fair.adapters.lora import _trainable_parameters, add_lora, without_adapter
from diffusers_fair.adapters.prompt_encoder import prompt_prefix
from diffusers_fair.adapters.soft_tokens import add_soft_tokens, load_soft_tokens
from diffusers_fair.adapters.trainable import TrainableAdapter
from diffusers_fair.diffusion.noise import Noise, initial_noise
from diffusers_fair.families import family_of
from diffusers_fair.families.fingerprint import base_fingerprint
from diffusers_fair.families.stable_diffusion import STABLE_DIFFUSION

SOFT = {"soft_tokens": SoftTokens(count=3)}
TEXT = {"text_encoder": Lora(rank=2, alpha=6.0)}
UNET = {"unet": Lora(rank=3, alpha=3.0)}
COMPONENTS = [SOFT, TEXT, UNET, TEXT | SOFT, SOFT | UNET | TEXT]
PROMPT = "a dog"


def predict(pipe):
    """What the U-Net makes of a prompt, (1, 4, 8, 8)."""
    noise = initial_noise(LATENT, [Noise(0)])
    with torch.no_grad():
        return pipe.unet(noise, 5, encoder_hidden_states=encode_prompts(pipe, [PROMPT]))[0]


def images(pipe):
    generator = torch.Generator().manual_seed(0)
    return pipe(PROMPT, num_inference_steps=2, generator=generator, output_type="pt").images


def trained(components, dtype=torch.float32):
    """A pipeline with an adapter that does something, and the adapter."""
    pipe = pipeline(dtype)
    adapter = TrainableAdapter(pipe, components, seed=0)
    generator = torch.Generator().manual_seed(0)
    for parameter in adapter.parameters:
        parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
    return pipe, adapter


# ---- LoRA --------------------------------------------------------------------------------------


@pytest.mark.parametrize("component", STABLE_DIFFUSION.targets)
def test_new_lora_has_no_effect_and_freezes_the_model(component):
    pipe = pipeline()
    before = predict(pipe)
    parameters = add_lora(pipe, component, 4, seed=1)
    assert torch.equal(predict(pipe), before)
    assert _trainable_parameters(getattr(pipe, component)) == parameters
    assert {min(p.shape) for p in parameters} == {4}
    assert all("lora_" in n for n, p in pipe.unet.named_parameters() if p.requires_grad)
    again = add_lora(pipeline(), component, 4, seed=1)
    assert all(torch.equal(p, q) for p, q in zip(parameters, again, strict=True))


def test_text_encoder_lora_reaches_every_layer():
    parameters = add_lora(pipeline(), "text_encoder", 2)
    assert len(parameters) == 2 * 2 * len(
        STABLE_DIFFUSION.targets["text_encoder"]
    )  # layers, A and B


@pytest.mark.parametrize("component", STABLE_DIFFUSION.targets)
def test_without_adapter_restores_the_original_model_temporarily(component):
    pipe, adapter = trained({component: Lora(rank=2, alpha=2)})
    found = predict(pipe)
    with without_adapter(pipe):
        assert torch.equal(predict(pipe), predict(pipeline()))
    assert torch.equal(predict(pipe), found)
    assert _trainable_parameters(getattr(pipe, component)) == adapter.parameters


# ---- soft tokens ---------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", [PROMPT, "", "a very long story " * 9, "x" * 70, "x" * 75])
def test_soft_tokens_encode_as_a_textual_inversion_does(prompt):
    pipe, by_hand = pipeline(), pipeline()
    plain = by_hand.encode_prompt(prompt, "cpu", 1, False)[0]
    tokens = add_soft_tokens(pipe, 5, torch.Generator().manual_seed(0))["<fair>"]
    found = encode_prompts(pipe, [prompt])
    assert torch.equal(encode_prompts(pipe, [prompt], prefix=False), plain)
    by_hand.load_textual_inversion({"<fair>": tokens.detach()})
    expected = by_hand.encode_prompt(f"<fair> {prompt}", "cpu", 1, False)[0]
    assert torch.equal(found, expected)
    assert not torch.equal(found, plain)


def test_soft_tokens_encode_the_same_in_training_and_when_loaded():
    """On the testbed, as large as its text encoder is; in one batch, as it is generated."""
    pipe, loaded = testbed.pipeline(), testbed.pipeline()
    prompts = ["a photo of the face of a nurse, a person", "portrait"]
    tokens = SoftTokens(count=5, token="<even>")
    adapter = TrainableAdapter(pipe, {"soft_tokens": tokens})
    adapter.parameters[0].data += 0.1
    load_soft_tokens(loaded, tokens, adapter.weights(), "fair")
    found = loaded.encode_prompt(prompts, "cpu", 1, True, [""] * 2)
    assert torch.equal(found[0], encode_prompts(pipe, prompts))
    assert torch.equal(found[1], encode_prompts(pipe, ["", ""], prefix=False))


def test_soft_tokens_are_initialized_from_the_vocabulary():
    pipe = pipeline()
    vocabulary = pipe.text_encoder.get_input_embeddings().weight
    tokens = add_soft_tokens(pipe, 4, torch.Generator().manual_seed(0))["<fair>"]
    assert tokens.shape == (4, vocabulary.shape[1])
    assert all((vocabulary == token).all(1).any() for token in tokens)
    assert _trainable_parameters(pipe.text_encoder) == [tokens]


def test_a_half_precision_pipeline_stays_so_around_float32_parameters():
    pipe = pipeline(torch.bfloat16)
    adapter = TrainableAdapter(pipe, SOFT | TEXT | UNET)
    assert {p.dtype for p in adapter.parameters} == {torch.float32}
    assert encode_prompts(pipe, [PROMPT]).dtype == pipe.text_encoder.dtype == torch.bfloat16


def test_only_soft_tokens_get_a_gradient():
    pipe, adapter = trained(SOFT)
    encode_prompts(pipe, [PROMPT]).square().sum().backward()
    assert adapter.parameters[0].grad.abs().sum(1).min() > 0
    assert not encode_prompts(pipe, [""], prefix=False).requires_grad


# ---- both as one ---------------------------------------------------------------------------------


@pytest.mark.parametrize("components", COMPONENTS)
def test_only_the_adapter_is_trained(components):
    pipe = pipeline()
    for module in (pipe.vae, pipe.text_encoder, pipe.unet):
        module.requires_grad_(True)
    adapter = TrainableAdapter(pipe, components)
    free = [p for m in (pipe.vae, pipe.text_encoder, pipe.unet) for p in _trainable_parameters(m)]
    assert {id(p) for p in free} == {id(p) for p in adapter.parameters}
    assert len(free) == len(adapter.parameters) > 0


@pytest.mark.parametrize("components", COMPONENTS)
def test_disabled_restores_the_original_model_temporarily(components):
    pipe, adapter = trained(components)
    base = pipeline()
    found, encoded = images(pipe), encode_prompts(pipe, [PROMPT, ""])
    assert not torch.equal(found, images(base))
    with adapter.disabled():
        assert torch.equal(encode_prompts(pipe, [PROMPT, ""]), encode_prompts(base, [PROMPT, ""]))
        assert torch.equal(images(pipe), images(base))
    assert torch.equal(images(pipe), found)
    assert torch.equal(encode_prompts(pipe, [PROMPT, ""]), encoded)
    assert all(p.requires_grad for p in adapter.parameters)


def test_the_adapter_is_enabled_again_after_an_error():
    pipe, adapter = trained(SOFT | UNET)
    found = images(pipe)
    with pytest.raises(KeyboardInterrupt), adapter.disabled():
        raise KeyboardInterrupt
    assert torch.equal(images(pipe), found)


@pytest.mark.parametrize("components", COMPONENTS)
def test_weights_are_copies_that_another_adapter_continues_from(components):
    pipe, adapter = trained(components)
    weights, expected = adapter.weights(), images(pipe)
    for parameter in adapter.parameters:
        parameter.data += 1
    assert not torch.equal(images(pipe), expected)
    other = pipeline()
    continued = TrainableAdapter(other, components, seed=1)
    parameters = list(continued.parameters)
    continued.load({key: weight.half().float() for key, weight in weights.items()})
    continued.load(weights)
    assert torch.equal(images(other), expected)
    assert all(
        p is q and p.requires_grad for p, q in zip(continued.parameters, parameters, strict=True)
    )


def test_the_seed_determines_the_initial_weights():
    one, same, other = (TrainableAdapter(pipeline(), TEXT | SOFT, seed) for seed in (1, 1, 2))
    pairs = [(w, same.weights()[key], other.weights()[key]) for key, w in one.weights().items()]
    assert all(torch.equal(w, v) for w, v, _ in pairs)
    assert not any(torch.equal(w, v) for w, _, v in pairs if w.any())  # lora_B starts from 0


@pytest.mark.parametrize(
    ("saved", "message"),
    [
        (TEXT, r"expected '<fair>' to be of shape \[3, 16\], got nothing"),
        (TEXT | UNET | SOFT, "expected 'unet.* to be nothing, got of shape"),
        (TEXT | {"soft_tokens": SoftTokens(count=4)}, r"\[3, 16\], got of shape \[4, 16\]"),
        (
            TEXT | {"soft_tokens": SoftTokens(count=3, token="<a>")},
            "expected '<a>' to be nothing, got of",
        ),
        (SOFT | {"text_encoder": Lora(rank=4, alpha=4)}, r"\[2, 16\], got of shape \[4, 16\]"),
    ],
)
def test_weights_of_another_adapter_are_refused(saved, message):
    _, adapter = trained(TEXT | SOFT)
    before = adapter.weights()
    weights = TrainableAdapter(pipeline(), saved).weights()
    with pytest.raises(ValueError, match=f"{message}.*: train with the components of the adapter"):
        adapter.load(weights)
    assert all(torch.equal(weight, before[key]) for key, weight in adapter.weights().items())


@pytest.mark.parametrize("name", PIPELINES)
def test_every_saved_weight_gets_a_gradient(name):
    """Layers that images do not depend on have none, such as the last ones of text encoders."""
    pipe = PIPELINES[name]()
    family = family_of(pipe)
    adapter = trained_in(pipe, everything(pipe))
    shape, scale = family.noise_shape(pipe, SIZE), family.usual(pipe).guidance_scale
    encoded = family.complete(pipe, family.encode(pipe, ["a dog"]), shape, scale)
    noise = initial_noise(shape, [Noise(0)])
    denoiser = getattr(pipe, family.denoiser)
    family.predict(denoiser, noise, torch.tensor(5.0), encoded).square().sum().backward()
    assert all(parameter.grad.any() for parameter in adapter.parameters)
    assert len(adapter.weights()) == len(adapter.parameters)


@pytest.mark.parametrize("components", COMPONENTS)
def test_the_fingerprint_only_depends_on_the_base_model(components):
    assert base_fingerprint(trained(components)[0]) == base_fingerprint(pipeline())


# ---- refused -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "components", [{}, {"unet": SoftTokens(count=2)}, {"soft_tokens": TEXT["text_encoder"]}]
)
def test_components_of_the_wrong_kind_are_refused(components):
    pipe = pipeline()
    with pytest.raises(
        ValueError, match=r"Lora for \['text_encoder', 'unet'\] and SoftTokens .*got"
    ):
        TrainableAdapter(pipe, components)
    assert torch.equal(images(pipe), images(pipeline()))


def test_invalid_adapters_are_refused():
    pipe, _ = trained(TEXT | SOFT)
    with pytest.raises(ValueError, match=r"one of \['text_encoder', 'unet'\], got 'vae'"):
        add_lora(pipe, "vae", 4)
    with pytest.raises(ValueError, match="the text_encoder has an adapter 'fair' already"):
        add_lora(pipe, "text_encoder", 4)
    with pytest.raises(ValueError, match="has soft tokens already, those of the adapter 'fair'"):
        add_soft_tokens(pipe, 1, torch.Generator())


@pytest.mark.parametrize(
    ("count", "token", "message"),
    [
        (0, "<fair>", "there can be 1 to 1024 soft tokens, got 0"),
        (76, "<fair>", "a prompt has room for 1 to 75 soft tokens, got 76"),
        (1, "fair", "the placeholder .* in angle brackets, such as '<fair>', got 'fair'"),
        (1, "<Fair>", "lowercase letters.* got '<Fair>'"),
        (3, "<other>", "tokenizer has a token '<other>_2' already: unload that textual inversion"),
    ],
)
def test_soft_tokens_that_do_not_fit_are_refused(count, token, message):
    pipe = pipeline()
    pipe.load_textual_inversion({"<other>_2": torch.zeros(1, 16)})
    before = len(pipe.tokenizer)
    with pytest.raises(ValueError, match=message):
        add_soft_tokens(pipe, count, torch.Generator(), token=token)
    assert len(pipe.tokenizer) == before
    assert prompt_prefix(pipe) is None


def test_text_encoder_with_spare_embeddings_is_refused():
    pipe = pipeline()
    pipe.text_encoder.resize_token_embeddings(520)
    with pytest.raises(ValueError, match="the tokenizer's 514 tokens, this one has 520"):
        add_soft_tokens(pipe, 1, torch.Generator())
