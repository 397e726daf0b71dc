"""The gradients replay is compared with: against finite differences, the host's loop and replay."""

import pytest
import torch
from test_replay import (
    COUNT,
    OTHERS,
    TOLERANCE,
    adapted,
    biased,
    branches,
    by_replay,
    diffusers_loop,
    embed,
    loss_of,
    noise,
    relative,
    take_gradients,
)
from tiny import pipeline

from diffusers_fair.adapters.lora import add_lora
from diffusers_fair.diffusion.sampling import decode, sample
from diffusers_fair.diffusion.scheduler import BiasedGradientScheduler
from diffusers_fair.diffusion.unrolled import unroll

STEPS = 5
SIZE = 5.0  # of latents: about their standard deviation


@pytest.fixture(scope="module")
def world():
    """Pipeline in float64 with LoRA on text encoder and U-Net that already do something."""
    pipe, parameters = adapted("text_encoder")
    more = add_lora(pipe, "unet", 2)
    generator = torch.Generator().manual_seed(1)
    for p in more:
        p.data = 0.2 * torch.randn(p.shape, generator=generator, dtype=torch.float64)
    return pipe, parameters + more


def unrolled(pipe, scheduler, guidance_scale=5, **options):
    return unroll(
        pipe, scheduler, branches(*embed(pipe)), noise(), STEPS, guidance_scale, **options
    )


def gradient_of(world, scheduler, guidance_scale=5, **options):
    pipe, parameters = world
    loss_of(pipe, unrolled(pipe, scheduler, guidance_scale, **options)).backward()
    return take_gradients(parameters)


@pytest.mark.slow
@pytest.mark.parametrize("guidance_scale", [1, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_latents_are_those_of_sampling_bit_for_bit(dtype, guidance_scale):
    pipe, _ = adapted("text_encoder", dtype)
    arguments = branches(*embed(pipe)), noise(dtype), STEPS, guidance_scale
    expected = sample(pipe, pipe.scheduler, *arguments).latents
    for scheduler in (pipe.scheduler, biased(pipe)):
        for last in (None, 2):
            found = unroll(pipe, scheduler, *arguments, last=last)
            assert torch.equal(found, expected)


@pytest.mark.slow
@pytest.mark.parametrize("guidance_scale", [1, 5])
@pytest.mark.parametrize("standardize", ["paper", "exact", "none"])
def test_biased_scheduler_gives_what_replay_gives(world, standardize, guidance_scale):
    scheduler = biased(world[0], standardize=standardize)
    found = gradient_of(world, scheduler, guidance_scale)
    _, _, expected = by_replay(*world, scheduler, STEPS, guidance_scale)
    assert relative(found, expected) <= TOLERANCE


@pytest.mark.parametrize("guidance_scale", [1, 5])
def test_plain_scheduler_gives_the_gradient_of_the_hosts_loop(world, guidance_scale):
    pipe, parameters = world
    found = gradient_of(world, pipe.scheduler, guidance_scale)
    latents = diffusers_loop(pipe, pipe.scheduler, *embed(pipe), noise(), STEPS, guidance_scale)
    loss_of(pipe, latents).backward()
    assert relative(found, take_gradients(parameters)) <= 1e-9


def real_loss(pipe, latents, size):
    """A loss of images, in units in which latents of this size decode to middling greys."""
    return (decode(pipe, latents / size) - 0.1).square().sum()


def slopes(world, scheduler, index):
    """d loss / d one number of every eighth matrix, through sampling: central differences."""
    pipe, parameters = world

    @torch.no_grad()
    def loss():
        latents = sample(pipe, scheduler, branches(*embed(pipe)), noise(), STEPS, 5).latents
        return real_loss(pipe, latents, SIZE).item()

    found = []
    for p in parameters[::8]:
        values = []
        for distance in (1e-5, -1e-5):
            start = p.data.clone()
            p.data[index] += distance
            values.append(loss())
            p.data = start
        found.append((values[0] - values[1]) / 2e-5)
    return torch.tensor(found, dtype=torch.float64)


def entries(world, scheduler, index):
    """The same by back-propagation through `unroll`."""
    pipe, parameters = world
    real_loss(pipe, unrolled(pipe, scheduler), SIZE).backward()
    found = torch.stack([p.grad[index] for p in parameters[::8]])
    take_gradients(parameters)
    return found


@pytest.mark.slow
def test_exact_gradient_is_that_of_finite_differences_and_the_biased_is_not(world):
    """By DDIM, whose steps keep float64."""
    index = (1, 1)
    expected = slopes(world, OTHERS["ddim"](), index)
    exact = entries(world, OTHERS["ddim"](), index)
    torch.testing.assert_close(exact, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())
    wrapped = BiasedGradientScheduler(OTHERS["ddim"](), "none")
    assert relative(entries(world, wrapped, index), expected) > 0.01


def test_last_of_all_steps_is_the_whole_gradient(world):
    scheduler = world[0].scheduler
    whole, last = gradient_of(world, scheduler), gradient_of(world, scheduler, last=STEPS)
    assert relative(last, whole) <= 1e-12


def test_last_one_is_the_last_steps_share(world):
    found = gradient_of(world, world[0].scheduler, last=1)
    scheduler = biased(world[0], standardize="none")
    last = torch.full((COUNT, 1), STEPS - 1)
    _, _, expected = by_replay(*world, scheduler, STEPS, 5, steps=last)
    assert relative(found, expected) <= TOLERANCE


def test_more_steps_come_nearer_to_the_whole_gradient(world):
    scheduler = world[0].scheduler
    whole = gradient_of(world, scheduler)
    left_out = [relative(gradient_of(world, scheduler, last=k), whole) for k in (1, 4)]
    assert left_out[0] > left_out[1] > 1e-3


@pytest.mark.parametrize(("last", "again"), [(None, STEPS), (2, 2)])
def test_unet_is_evaluated_again_for_each_step_of_the_gradient(world, last, again):
    """The activations of one step at a time are in memory."""
    pipe, _ = world
    sizes = []
    handle = pipe.unet.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    latents = unrolled(pipe, pipe.scheduler, last=last)
    assert sizes == [2 * COUNT] * STEPS
    torch.autograd.grad(latents.sum(), world[1])
    handle.remove()
    assert sizes == [2 * COUNT] * (STEPS + again)


def test_the_callers_mode_does_not_matter(world):
    with torch.no_grad():
        latents = unrolled(world[0], world[0].scheduler)
    assert latents.requires_grad  # through the U-Net: the embeddings were made without gradient


@pytest.mark.parametrize("last", [0, STEPS + 1])
def test_too_few_or_too_many_last_steps_are_refused(world, last):
    with pytest.raises(ValueError, match=f"last must be 1 to 5, the number of steps, got {last}"):
        unrolled(world[0], world[0].scheduler, last=last)


def test_nothing_to_train_is_refused():
    pipe = pipeline(torch.float64)
    with pytest.raises(ValueError, match=r"nothing to train: .* add an adapter"):
        unrolled(pipe, pipe.scheduler)


def test_bad_guidance_is_refused(world):
    pipe, _ = world
    cond, _ = embed(pipe)
    with pytest.raises(ValueError, match="pass uncond, or guidance_scale=1"):
        unroll(pipe, pipe.scheduler, branches(cond), noise(), STEPS, 5)
