"""Kept prompts: the gradient against autograd, the pool, what recipes may ask for."""

import pytest
import torch
from tiny import encode_prompts, pipeline

from diffusers_fair import FairnessFinetuner, distributed
from diffusers_fair.adapters.format import Lora, SoftTokens
from diffusers_fair.adapters.trainable import TrainableAdapter
from diffusers_fair.config.schema import RunConfig
from diffusers_fair.diffusion.scheduler import BiasedGradientScheduler
from diffusers_fair.prompts import prompt_set
from diffusers_fair.prompts.groups import vocabulary
from diffusers_fair.training.kept_prompts import KeptPrompts, _default_sets, kept_prompts

KEEP = {"pairs": 7, "new_prompts": 2, "pool": 3, "prediction": 2.5, "images": 2}
COMPONENTS = {
    "text_encoder": {"text_encoder": Lora(rank=2, alpha=2)},
    "unet": {"unet": Lora(rank=2, alpha=2)},
    "both": {"text_encoder": Lora(rank=2, alpha=2), "unet": Lora(rank=2, alpha=2)},
    "soft_tokens": {"soft_tokens": SoftTokens(count=3)},
}


def config(scale=4.0, **keep) -> RunConfig:
    return RunConfig.load(
        "testbed-gender",
        {
            "sampling": {"steps": 3, "guidance_scale": scale},
            "gradient": {"replay_steps": None},
            "prompts.keep": None,  # the recipe's own
            "prompts": {"keep": KEEP | keep},
            "output": "unused",
        },
    )


def keeper(components, *, scale=4.0, moved=True) -> KeptPrompts:
    """Of a tiny pipeline in float64 with an adapter that has moved already."""
    pipe = pipeline(torch.float64)
    adapter = TrainableAdapter(pipe, COMPONENTS[components])
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapter.parameters if moved else ():
            noise = torch.randn(parameter.shape, generator=g, dtype=torch.float64)
            parameter.data = parameter.double() + 0.3 * noise
    return KeptPrompts(config(scale), pipe, adapter, BiasedGradientScheduler(pipe.scheduler))


def gradients(kept) -> list[torch.Tensor]:
    found = [p.grad for p in kept.adapter.parameters]
    for parameter in kept.adapter.parameters:
        parameter.grad = None
    assert all(g is not None and g.any() for g in found)
    return found


def by_autograd(kept, number, scale) -> float:
    """L_keep written out, pair by pair, and its gradient by autograd."""
    pairs = kept._pairs(number)
    loss = 0.0
    for pair in pairs:
        x, t = pair.scaled[None], pair.timestep[None]
        cond = encode_prompts(kept.pipe, [pair.prompt.text])
        output = kept.pipe.unet(x, t, encoder_hidden_states=cond).sample
        if scale > 1:
            uncond = encode_prompts(kept.pipe, [pair.prompt.negative], prefix=False)
            empty = kept.pipe.unet(x, t, encoder_hidden_states=uncond).sample
            output = empty + scale * (output - empty)
        loss = loss + (output[0] - pair.output).square().mean() / len(pairs)
    (KEEP["prediction"] * loss).backward()
    return loss.item()


@pytest.mark.slow
@pytest.mark.parametrize("components", COMPONENTS)
@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_the_gradient_is_that_of_autograd(components, scale):
    kept = keeper(components, scale=scale)
    expected = by_autograd(kept, 2, scale)
    wanted = gradients(kept)
    for size, split in ((7, False), (3, False), (1, True)):
        assert kept.prediction_backward(2, size, split_guidance=split) == pytest.approx(
            expected, rel=1e-6
        )
        for got, exact in zip(gradients(kept), wanted, strict=True):
            torch.testing.assert_close(got, exact, rtol=1e-6, atol=1e-9)


def test_the_change_of_embeddings_is_measured_token_by_token():
    kept = keeper("text_encoder")
    chosen = [kept.prompts.prompt(3 * kept.options.texts + i) for i in range(kept.options.texts)]
    negatives = dict.fromkeys(prompt.negative for prompt in chosen)
    texts = [*(prompt.text for prompt in chosen), *negatives]
    with kept.adapter.disabled():
        before = encode_prompts(kept.pipe, texts)
    after = encode_prompts(kept.pipe, texts)
    change = ((after - before).norm(dim=2) / before.norm(dim=2)).square().mean()
    (kept.options.embedding * change).backward()
    wanted = gradients(kept)
    assert kept.embedding_backward(3) == pytest.approx(change.item(), rel=1e-6)
    for got, exact in zip(gradients(kept), wanted, strict=True):
        torch.testing.assert_close(got, exact, rtol=1e-6, atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("components", ["text_encoder", "unet", "both"])
def test_an_adapter_that_changes_nothing_has_nothing_to_lose(components):
    kept = keeper(components, moved=False)
    assert kept.prediction_backward(0, 7) == pytest.approx(0, abs=1e-12)


def test_the_original_model_s_way_is_that_of_its_pipeline():
    """The last step of the pool leads to what the pipeline draws without the adapter."""
    kept = keeper("both")
    (way,) = [kept._original_steps(5)]
    with kept.adapter.disabled():
        noise = kept.pipe.unet.dtype
        image = kept.pipe(
            [step.prompt.text for step in way[:2]],
            negative_prompt=[step.prompt.negative for step in way[:2]],
            latents=torch.stack([step.scaled for step in way[:2]]).to(noise),
            num_inference_steps=3,
            guidance_scale=4.0,
            output_type="latent",
        ).images
    scheduler = kept.pipe.scheduler
    scheduler.set_timesteps(3)
    z = torch.stack([step.scaled for step in way[:2]])
    for k, t in enumerate(scheduler.timesteps):
        output = torch.stack([step.output for step in way[2 * k : 2 * k + 2]])
        z = scheduler.step(output, t, z, return_dict=False)[0]
    torch.testing.assert_close(z, image)


@pytest.mark.slow
def test_a_run_that_goes_on_has_the_same_pairs():
    through, resumed = keeper("text_encoder"), keeper("text_encoder")
    for number in range(6):
        pairs = through._pairs(number)
    again = resumed._pairs(5)
    assert [pair.prompt for pair in again] == [pair.prompt for pair in pairs]
    for a, b in zip(again, pairs, strict=True):
        assert torch.equal(a.scaled, b.scaled)
        assert torch.equal(a.output, b.output)
    assert len(resumed.pool) == KEEP["pool"]


def test_kept_images_come_again():
    kept = keeper("text_encoder")
    kept.options = kept.options.model_copy(update={"distinct": 6})
    batches = [kept.batch(number) for number in range(4)]
    assert batches[3] == batches[0]
    assert len({batch.noise for batch, _ in batches[:3]}) == 3
    assert [len(batch.noise) for batch, _ in batches] == [2] * 4
    assert all(len(asks) == 2 for _, asks in batches)


def test_kept_prompts_come_in_the_shares_of_their_sets():
    mixture = kept_prompts(config(sets={"named": 2, "untouched": 1}))
    found = [mixture.prompt(i) for i in range(90)]
    assert sum(bool(prompt.expected_classes) for prompt in found) == 60
    assert {prompt.negative for prompt in found} > {"", "blurry, low quality"}


def test_kept_prompts_are_of_training_alone():
    found = [p for pool in kept_prompts(config()).prompts for p in pool]
    assert not any(prompt.unseen for prompt in found)
    subjects = prompt_set("testbed-occupations").train
    (named, *_) = kept_prompts(config(sets=["named"])).prompts
    assert all(any(s in prompt.text for s in subjects) for prompt in named)


def test_prompts_of_one_s_own_are_kept(tmp_path):
    file = tmp_path / "mine.txt"
    file.write_text("a man and a woman\na chess board\nan old woman\n")
    found = kept_prompts(config(sets=[str(file)])).prompts[0]
    assert {"a man and a woman", "a chess board", "an old woman"} == {p.text for p in found}
    asks = {prompt.text: prompt.expected_classes for prompt in found}
    assert asks["an old woman"] == {"gender": "female"}
    assert asks["a man and a woman"] == {}  # left as the base draws it


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        ({"sets": ["nemed"]}, "names 'nemed': expected named, implied, untouched, testbed-untouch"),
        (
            {"images": 0, "prediction": 0, "embedding": 0},
            r"prompts\.keep trains nothing: set prompts\.keep\.images or",
        ),
        ({"sets": []}, r"prompts\.keep\.sets.*: expected 1 or more, got 0"),
        ({"sets": {"named": 0}}, r"prompts\.keep\.sets\.named: expected greater than 0"),
        ({"weight": -1}, r"prompts\.keep\.weight: expected greater than 0"),
        ({"prediction": -1}, r"prompts\.keep\.prediction: expected greater than or equal to 0"),
        ({"pairs": 0}, r"prompts\.keep\.pairs: expected greater than or equal to 1"),
        ({"pears": 3}, r"unknown key 'prompts\.keep\.pears': did you mean 'pairs'"),
    ],
)
def test_what_cannot_be_kept_is_refused(keep, message):
    with pytest.raises(ValueError, match=message):
        kept_prompts(config(**keep))


def test_a_set_without_prompts_for_the_attributes_is_refused():
    bare = RunConfig.load(
        "testbed-gender",
        {
            "attributes": [{"name": "hue", "classes": ["teal", "pink"]}],
            "prompts": {"keep": {"sets": ["implied"]}},
        },
    )
    with pytest.raises(ValueError, match=r"names 'implied', but there are no such prompts for hue"):
        kept_prompts(bare)


def test_words_of_no_class_are_refused():
    for key in ("words", "nouns"):
        with pytest.raises(ValueError, match=r"(words|nouns) are for the classes .* got 'femele'"):
            RunConfig.load("testbed-gender", [f"attributes.0.{key}={{femele: [x]}}"])


@pytest.mark.slow
def test_an_iteration_logs_and_trains_on_kept_prompts(tmp_path):
    small = {
        "base": {"dtype": "float32"},
        "adapter": {"rank": 2},
        "prompts": {"images_per_prompt": 2, "keep": KEEP},
        "sampling": {"steps": 3},
        "gradient": {"replay_steps": 2},
        "train": {"iterations": 2, "prompts_per_iteration": 1, "validate_every": None},
        "optimizer": {"warmup": 0},
        "tracker": "none",
        "output": str(tmp_path / "run"),
    }
    finetuner = FairnessFinetuner.from_recipe("testbed-gender", **small)
    first, second = (finetuner.iteration(step).metrics() for step in (0, 1))
    assert first["keep/prediction"] == pytest.approx(0, abs=1e-10)
    assert second["keep/prediction"] > 1e-8
    assert first["keep/embedding"] == pytest.approx(0, abs=1e-10)
    assert second["keep/embedding"] > 1e-8
    assert first["keep/loss"] >= 0
    assert (tmp_path / "run" / "originals").is_dir()  # of kept images alone


def test_the_words_of_kept_prompts_are_those_of_the_recipe():
    found = kept_prompts(config(sets=["named"])).prompts[0]
    words = vocabulary([section.wording() for section in config().attributes])
    assert all(
        any(word in prompt.text for word in words["gender"][prompt.expected_classes["gender"]])
        for prompt in found
    )


def test_every_class_is_named_with_the_same_subjects():
    (named,) = kept_prompts(config(sets=["named"])).prompts
    texts = {
        name: {
            prompt.text.replace(name, "")
            for prompt in named
            if prompt.expected_classes["gender"] == name
        }
        for name in ("female", "male")
    }
    assert texts["female"] == texts["male"]


def test_a_recipe_that_names_no_sets_keeps_those_of_its_base():
    plain = config()
    assert _default_sets(plain) == {"named": 2, "implied": 1, "testbed-untouched": 1}
    elsewhere = plain.model_copy(update={"base": plain.base.model_copy(update={"model": "a/b"})})
    assert "untouched" in _default_sets(elsewhere)


def test_soft_tokens_leave_no_embedding_to_hold():
    for components, held in (
        (["text_encoder"], True),
        (["text_encoder", "soft_tokens"], False),
        (["unet"], False),
    ):
        found = RunConfig.load("testbed-gender", {"adapter": {"components": components}})
        assert found.embeddings_stay is held


def test_too_many_processes_are_refused(monkeypatch):
    monkeypatch.setattr(distributed, "world_size", lambda: 3)
    with pytest.raises(
        ValueError, match=r"prompts\.keep\.images is 2, which cannot be shared by 3"
    ):
        keeper("unet")


def test_an_empty_section_turns_it_on(tmp_path):
    (tmp_path / "plain.yaml").write_text("extends: testbed-gender\nprompts: {keep: null}\n")
    assert RunConfig.load(tmp_path / "plain.yaml").prompts.keep is None
    for overrides in (["prompts.keep={}"], {"prompts": {"keep": {}}}):
        assert RunConfig.load(tmp_path / "plain.yaml", overrides).prompts.keep is not None
    assert RunConfig.load("testbed-gender", ["prompts.keep={}"]).prompts.keep.images == 12
