"""The gradient by three routes: autograd through the loop, replay, finite differences."""

import itertools

import diffusers
import pytest
import torch
from tiny import BETAS, LATENT, pipeline

from diffusers_fair.adapters.lora import add_lora
from diffusers_fair.adapters.soft_tokens import add_soft_tokens
from diffusers_fair.diffusion.noise import Noise, initial_noise
from diffusers_fair.diffusion.replay import replay, sample_steps
from diffusers_fair.diffusion.sampling import Trajectory, decode, sample
from diffusers_fair.diffusion.scheduler import BiasedGradientScheduler
from diffusers_fair.families import family_of
from diffusers_fair.families.conditioning import Branches, backward

ADAPTERS = ("text_encoder", "unet", "soft tokens")
TOLERANCE = 1e-5  # relative; the rest is the scheduler's float32
PROMPTS = ["a dog", "two cats"]
COUNT = len(PROMPTS)
NAME = "encoder_hidden_states"
OTHERS = {
    "ddim": lambda: diffusers.DDIMScheduler(
        **BETAS, clip_sample=False, set_alpha_to_one=False, steps_offset=1
    ),
    "euler": lambda: diffusers.EulerDiscreteScheduler(**BETAS),
    "unipc": lambda: diffusers.UniPCMultistepScheduler(**BETAS),
    "heun": lambda: diffusers.HeunDiscreteScheduler(**BETAS),
    "velocity": lambda: diffusers.DPMSolverMultistepScheduler(
        **BETAS, prediction_type="v_prediction"
    ),
    "flow matching": lambda: diffusers.FlowMatchEulerDiscreteScheduler(),
}


def adapted(adapter, dtype=torch.float64, version=1):
    """A pipeline with an adapter that already does something, and the adapter's parameters."""
    pipe = pipeline(dtype, version=version)
    if adapter == "soft tokens":
        return pipe, [*add_soft_tokens(pipe, 3, torch.Generator().manual_seed(0)).values()]
    parameters = add_lora(pipe, adapter, 2)
    generator = torch.Generator().manual_seed(0)
    for parameter in parameters:
        drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.data = 0.2 * drawn.to(parameter.dtype)
    return pipe, parameters


@pytest.fixture(scope="module")
def world():
    """Adapted pipelines in float64; tests leave no gradient behind."""
    return {adapter: adapted(adapter) for adapter in ADAPTERS}


def biased(pipe, order=2, standardize="paper"):
    scheduler = diffusers.DPMSolverMultistepScheduler.from_config(
        pipe.scheduler.config, solver_order=order
    )
    return BiasedGradientScheduler(scheduler, standardize)


def branches(cond, uncond=None) -> Branches:
    """The guidance branches with these prompt embeddings."""
    given = {"cond": cond} if uncond is None else {"cond": cond, "uncond": uncond}
    return {branch: {NAME: embeddings} for branch, embeddings in given.items()}


def embed(pipe):
    """Embeddings of the prompts (n, L, d) and of the empty one (1, L, d)."""
    family = family_of(pipe)
    return family.encode(pipe, PROMPTS)[NAME], family.unconditional(pipe)[NAME]


def noise(dtype=torch.float64, count=COUNT):
    return initial_noise(LATENT, [Noise(seed) for seed in range(count)], dtype=dtype)


def loss_of(pipe, latents):
    """Not linear, and different for each image."""
    images = decode(pipe, latents / latents.detach().std())
    return (images * torch.linspace(-1, 1, images[0].numel()).view_as(images[0])).square().sum()


def loss_and_gradient(pipe, latents):
    latents = latents.clone().requires_grad_()
    loss_of(pipe, latents).backward()
    return latents.grad


def diffusers_loop(pipe, scheduler, cond, uncond, latents, steps, guidance_scale):
    """The denoising loop of StableDiffusionPipeline.__call__, word for word."""
    scheduler.set_timesteps(steps)
    guided = guidance_scale > 1
    embeddings = torch.cat([uncond.expand_as(cond), cond]) if guided else cond
    latents = latents * getattr(scheduler, "init_noise_sigma", 1.0)
    for t in scheduler.timesteps:
        model_input = torch.cat([latents] * 2) if guided else latents
        if hasattr(scheduler, "scale_model_input"):
            model_input = scheduler.scale_model_input(model_input, t)
        output = pipe.unet(model_input, t, encoder_hidden_states=embeddings, return_dict=False)[0]
        if guided:
            output_uncond, output_text = output.chunk(2)
            output = output_uncond + guidance_scale * (output_text - output_uncond)
        latents = scheduler.step(output, t, latents, return_dict=False)[0]
    return latents


def take_gradients(parameters):
    gradients = torch.cat([p.grad.flatten() for p in parameters])
    for p in parameters:
        p.grad = None
    return gradients


def by_autograd(pipe, parameters, scheduler, steps, guidance_scale):
    """Algorithm 1 in one graph. Returns z_K and the gradient."""
    latents = diffusers_loop(pipe, scheduler, *embed(pipe), noise(), steps, guidance_scale)
    loss_of(pipe, latents).backward()
    return latents.detach(), take_gradients(parameters)


def by_replay(pipe, parameters, scheduler, total, guidance_scale, **options):
    """Returns the trajectory, v = d loss / d z_K and the gradient."""
    encoded = branches(*embed(pipe))
    trajectory = sample(pipe, scheduler, encoded, noise(), total, guidance_scale)
    v = loss_and_gradient(pipe, trajectory.latents)
    gradients = replay(pipe, trajectory, encoded, v, scheduler.gradient_weights(), **options)
    for branch, found in gradients.items():
        backward(encoded[branch], found)
    return trajectory, v, take_gradients(parameters)


@torch.no_grad()
def surrogate(pipe, trajectory, v, weights):
    """sum_i C_i a_i <v, guided prediction at the kept z_i>: its gradient is the biased gradient."""
    steps, count = len(trajectory.inputs), len(v)
    z, t = torch.cat(trajectory.inputs), trajectory.timesteps.repeat_interleave(count)
    output, output_uncond = (
        pipe.unet(z, t, encoder_hidden_states=e.expand(count, -1, -1).repeat(steps, 1, 1))[0]
        for e in embed(pipe)
    )
    s = trajectory.guidance_scale
    guided = (output_uncond + s * (output - output_uncond)).view(steps, *v.shape)
    return torch.einsum("k,knchw,nchw->", weights, guided, v).item()


def by_differences(pipe, parameters, direction, trajectory, v, weights, size=1e-5):
    """Directional derivative of the surrogate, by central differences."""

    def at(distance):
        shifts = direction.split([p.numel() for p in parameters])
        start = [p.data for p in parameters]
        for p, shift in zip(parameters, shifts, strict=True):
            p.data = p.data + distance * shift.view_as(p)
        value = surrogate(pipe, trajectory, v, weights)
        for p, data in zip(parameters, start, strict=True):
            p.data = data
        return value

    return (at(size) - at(-size)) / (2 * size)


def relative(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.slow
@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("guidance_scale", [1, 7.5])
@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("steps", [1, 2, 5, 14, 15, 20])
def test_three_routes_to_the_gradient_agree(world, steps, order, guidance_scale, adapter):
    pipe, parameters = world[adapter]
    scheduler = biased(pipe, order)
    latents, expected = by_autograd(pipe, parameters, scheduler, steps, guidance_scale)
    trajectory, v, found = by_replay(pipe, parameters, scheduler, steps, guidance_scale)
    assert torch.equal(trajectory.latents, latents)
    assert expected.norm() > 0
    assert relative(found, expected) <= TOLERANCE
    direction = found / found.norm()
    weights = scheduler.coefficients() * scheduler.output_weights()
    slope = by_differences(pipe, parameters, direction, trajectory, v, weights)
    assert slope == pytest.approx(found.norm().item(), rel=TOLERANCE)


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("standardize", ["exact", "none"])
def test_routes_agree_however_steps_are_standardised(world, standardize, adapter):
    pipe, parameters = world[adapter]
    scheduler = biased(pipe, standardize=standardize)
    _, expected = by_autograd(pipe, parameters, scheduler, 5, 7.5)
    _, _, found = by_replay(pipe, parameters, scheduler, 5, 7.5)
    assert relative(found, expected) <= TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("name", OTHERS)
def test_routes_agree_with_any_linear_scheduler(world, name, adapter):
    pipe, parameters = world[adapter]
    scheduler = BiasedGradientScheduler(OTHERS[name](), "exact")
    latents, expected = by_autograd(pipe, parameters, scheduler, 5, 7.5)
    trajectory, _, found = by_replay(pipe, parameters, scheduler, 5, 7.5)
    assert torch.equal(trajectory.latents, latents)
    assert relative(found, expected) <= TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("guidance_scale", [1, 7.5])
def test_three_routes_agree_for_stable_diffusion_2(guidance_scale, adapter):
    pipe, parameters = adapted(adapter, version=2)
    assert pipe.scheduler.config.prediction_type == "v_prediction"
    scheduler = biased(pipe, standardize="exact")
    latents, expected = by_autograd(pipe, parameters, scheduler, 5, guidance_scale)
    trajectory, v, found = by_replay(pipe, parameters, scheduler, 5, guidance_scale)
    assert torch.equal(trajectory.latents, latents)
    assert relative(found, expected) <= TOLERANCE
    direction, weights = found / found.norm(), scheduler.gradient_weights()
    slope = by_differences(pipe, parameters, direction, trajectory, v, weights)
    assert slope == pytest.approx(found.norm().item(), rel=TOLERANCE)


@pytest.mark.slow
def test_text_encoder_and_unet_together(world):
    pipe, text = adapted("text_encoder")
    both = text + add_lora(pipe, "unet", 2)
    for p in both[len(text) :]:
        p.data += 0.1
    scheduler = biased(pipe)
    _, expected = by_autograd(pipe, both, scheduler, 5, 7.5)
    _, _, found = by_replay(pipe, both, scheduler, 5, 7.5)
    assert relative(found, expected) <= TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_biased_is_not_the_exact_gradient(world, adapter):
    """What is left out is not small: the routes agree on the biased gradient, not on any."""
    pipe, parameters = world[adapter]
    scheduler = biased(pipe, standardize="none")
    _, _, found = by_replay(pipe, parameters, scheduler, 5, 7.5)
    latents = diffusers_loop(pipe, scheduler.scheduler, *embed(pipe), noise(), 5, 7.5)
    loss_of(pipe, latents).backward()
    assert relative(found, take_gradients(parameters)) > 0.01


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("guidance_scale", [1, 7.5])
def test_samples_are_the_pipelines_bit_for_bit(dtype, guidance_scale):
    pipe = pipeline(dtype)
    # as many at a time as the pipeline encodes: on some processors, the last bit depends on it
    cond, uncond = pipe.encode_prompt(PROMPTS, "cpu", 1, guidance_scale > 1)
    for own, theirs in zip(embed(pipe), (cond, uncond), strict=True):
        if theirs is not None:
            torch.testing.assert_close(own.expand_as(theirs), theirs)
    generators = [torch.Generator().manual_seed(seed) for seed in range(COUNT)]
    expected = pipe(
        PROMPTS,
        num_inference_steps=5,
        guidance_scale=guidance_scale,
        generator=generators,
        output_type="latent",
    ).images
    for scheduler in (pipe.scheduler, BiasedGradientScheduler(pipe.scheduler)):
        found = sample(pipe, scheduler, branches(cond, uncond), noise(dtype), 5, guidance_scale)
        assert torch.equal(found.latents, expected)


@pytest.mark.slow
@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("micro_batch", [1, 2, 3, 5, 7])
def test_micro_batches_make_no_difference(world, micro_batch, adapter):
    pipe, parameters = world[adapter]
    cond, uncond = embed(pipe)
    encoded = branches(cond[:1], uncond)  # shared by all images
    scheduler = biased(pipe)
    trajectory = sample(pipe, scheduler, encoded, noise(count=5), 3, 7.5)
    v, weights = torch.randn_like(trajectory.latents), scheduler.gradient_weights()

    def gradients(size):
        found = replay(pipe, trajectory, encoded, v, weights, micro_batch=size)
        return [g[NAME] for g in found.values()] + [p.grad for p in parameters if p.is_leaf]

    whole = [None if g is None else g.clone() for g in gradients(None)]
    for p in parameters:
        p.grad = None
    parts = gradients(micro_batch)
    for one, other in zip(whole, parts, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(other, one, rtol=1e-9, atol=1e-9 * one.abs().max().item())
    for p in parameters:
        p.grad = None


@pytest.mark.slow
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_guidance_branches_one_after_the_other_make_no_difference(world, adapter):
    pipe, parameters = world[adapter]
    scheduler = biased(pipe)
    _, _, expected = by_replay(pipe, parameters, scheduler, 3, 7.5)
    sizes = []
    handle = pipe.unet.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    _, _, found = by_replay(pipe, parameters, scheduler, 3, 7.5, split_guidance=True)
    handle.remove()
    branches = 1 if adapter == "soft tokens" else 2  # the empty prompt has none
    assert sizes == [2 * COUNT] * 3 + [COUNT] * 3 * branches  # sampled together, replayed apart
    assert relative(found, expected) <= 1e-9


@pytest.mark.slow
def test_shared_embeddings_gather_the_gradients_of_all_images(world):
    pipe, _ = world["text_encoder"]
    cond, uncond = embed(pipe)
    one, all_of_them = cond[:1].detach(), cond[:1].detach().repeat(3, 1, 1)
    scheduler = biased(pipe)
    trajectory = sample(pipe, scheduler, branches(one, uncond), noise(count=3), 3, 7.5)
    v, weights = torch.randn_like(trajectory.latents), scheduler.gradient_weights()
    for embeddings in (one, all_of_them):
        embeddings.requires_grad_()
    shared, each = (
        replay(pipe, trajectory, branches(embeddings, uncond.detach()), v, weights)["cond"][NAME]
        for embeddings in (one, all_of_them)
    )
    assert shared.shape == one.shape
    assert each.shape == all_of_them.shape
    torch.testing.assert_close(each.sum(0, keepdim=True), shared)


@pytest.mark.slow
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_subsets_of_steps_average_to_the_whole(world, adapter):
    pipe, parameters = world[adapter]
    scheduler, (total, count) = biased(pipe), (5, 2)
    _, _, expected = by_replay(pipe, parameters, scheduler, total, 7.5)
    _, weights = sample_steps(total, count, COUNT, torch.Generator())
    parts = torch.arange(total).tensor_split(count)
    subsets = list(itertools.product(*(part.tolist() for part in parts)))
    found = [
        by_replay(
            *(pipe, parameters, scheduler, total, 7.5),
            steps=torch.tensor(steps),
            inverse_probabilities=weights,
        )[2]
        for steps in itertools.product(subsets, repeat=COUNT)  # each image has its own
    ]
    assert relative(torch.stack(found).mean(0), expected) <= 1e-9
    assert relative(found[0], expected) > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("micro_batch", [None, 1])
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_each_image_is_replayed_at_its_own_steps(world, adapter, micro_batch):
    pipe, parameters = world[adapter]
    scheduler = biased(pipe)
    steps, factors = torch.tensor([[0, 4], [2, 3]]), torch.tensor([3.0, 2.0])
    _, _, found = by_replay(
        *(pipe, parameters, scheduler, 5, 7.5),
        **{"steps": steps, "inverse_probabilities": factors, "micro_batch": micro_batch},
    )
    expected = torch.zeros_like(found)
    trajectory = sample(pipe, scheduler, branches(*embed(pipe)), noise(), 5, 7.5)
    v, weights = loss_and_gradient(pipe, trajectory.latents), scheduler.gradient_weights()
    for image, step, factor in ((0, 0, 3.0), (0, 4, 2.0), (1, 2, 3.0), (1, 3, 2.0)):
        alone = torch.zeros_like(v)
        alone[image] = factor * v[image]
        one = torch.zeros_like(weights)
        one[step] = weights[step]
        encoded = branches(*embed(pipe))
        for branch, gradients in replay(pipe, trajectory, encoded, alone, one).items():
            backward(encoded[branch], gradients)
        expected += take_gradients(parameters)
    assert relative(found, expected) <= 1e-9


def test_steps_are_sampled_evenly_and_reproducibly():
    generator = torch.Generator().manual_seed(0)
    drawn = torch.zeros(4, 7)
    for _ in range(3000):
        steps, weights = sample_steps(7, 2, 4, generator)
        assert weights.tolist() == [4.0, 3.0]  # inverse of the probabilities 1 / 4 and 1 / 3
        assert sorted(steps[:, 0].tolist()) == [0, 1, 2, 3]  # over the images, each once
        assert sorted(steps[:, 1].bincount(minlength=7)[4:].tolist()) == [1, 1, 2]
        drawn[torch.arange(4)[:, None], steps] += 1
    expected = torch.tensor([1 / 4] * 4 + [1 / 3] * 3).expand(4, -1)  # of every image
    torch.testing.assert_close(drawn / 3000, expected, rtol=0, atol=0.04)
    again = [sample_steps(9, 4, 5, torch.Generator().manual_seed(7))[0] for _ in range(2)]
    assert torch.equal(*again)


@pytest.mark.parametrize(
    ("adapter", "guidance_scale", "count"),
    [("text_encoder", 7.5, 2), ("soft tokens", 7.5, 1), ("unet", 7.5, 2), ("unet", 1, 1)],
)
def test_branches_without_anything_trainable_are_not_evaluated(
    world, adapter, guidance_scale, count
):
    pipe, parameters = world[adapter]
    encoded = branches(*embed(pipe))
    scheduler = biased(pipe)
    trajectory = sample(pipe, scheduler, encoded, noise(), 3, guidance_scale)
    sizes = []
    handle = pipe.unet.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    v = torch.ones_like(trajectory.latents)
    found = replay(pipe, trajectory, encoded, v, scheduler.gradient_weights())
    handle.remove()
    assert sizes == [count * COUNT] * 3
    trained = [adapter != "unet", adapter == "text_encoder"]
    assert [branch in found for branch in ("cond", "uncond")] == trained
    assert all(list(gradients) == [NAME] for gradients in found.values())
    for p in parameters:
        p.grad = None


def test_gradients_add_to_what_the_unet_has(world):
    pipe, parameters = world["unet"]
    scheduler = biased(pipe)
    encoded = branches(*embed(pipe))
    trajectory = sample(pipe, scheduler, encoded, noise(), 2, 7.5)
    arguments = pipe, trajectory, encoded, trajectory.latents
    replay(*arguments, scheduler.gradient_weights())
    once = [p.grad.clone() for p in parameters]
    with torch.no_grad():  # the caller's mode does not matter
        replay(*arguments, scheduler.gradient_weights())
    for p, gradient in zip(parameters, once, strict=True):
        torch.testing.assert_close(p.grad, 2 * gradient)
        p.grad = None


@pytest.mark.slow
def test_half_precision_embeddings_gather_in_float32():
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        pipe = pipeline(dtype)
        encoded = branches(*(e.to(dtype).requires_grad_() for e in embed(pipeline())))
        scheduler = biased(pipe)
        trajectory = sample(pipe, scheduler, encoded, noise(dtype), 4, 7.5)
        v = noise(torch.float32)
        arguments = pipe, trajectory, encoded, v, scheduler.gradient_weights()
        found[dtype] = replay(*arguments, micro_batch=1)["cond"][NAME]
    assert found[torch.bfloat16].dtype == torch.float32
    assert relative(found[torch.bfloat16], found[torch.float32]) < 0.1


def test_trajectory_keeps_inputs_only_if_requested(world):
    pipe, _ = world["text_encoder"]
    encoded = branches(*embed(pipe))
    kept = sample(pipe, pipe.scheduler, encoded, noise(), 3, 7.5)
    final = sample(pipe, pipe.scheduler, encoded, noise(), 3, 7.5, keep=False)
    assert torch.equal(kept.latents, final.latents)
    assert [z.shape for z in kept.inputs] == [noise().shape] * 3
    assert not kept.latents.requires_grad
    assert final.inputs == ()


def test_each_image_has_its_own_noise():
    together = initial_noise(LATENT, [Noise(3), Noise(1), Noise(2)])
    assert together.shape == (3, *LATENT)
    assert torch.equal(together[1:2], initial_noise(LATENT, [Noise(1)]))
    assert not torch.equal(together[0], together[1])


def test_noise_can_be_negated():
    pair = [Noise(0), Noise(3)]
    negated = [noise.negated() for noise in pair]
    assert torch.equal(initial_noise(LATENT, negated), -initial_noise(LATENT, pair))
    assert [noise.negated() for noise in negated] == pair
    assert [noise.cache_key for noise in negated] == [~0, ~3]  # as caches have it


def test_images_are_the_pipelines(world):
    pipe, _ = world["text_encoder"]
    latents = noise().requires_grad_()
    images = decode(pipe, 3 * latents)
    assert images.shape == (COUNT, 3, 16, 16)
    assert images.detach().abs().max() <= 1
    images.sum().backward()
    assert latents.grad.abs().max() > 0
    scaled = 3 * latents.detach() / pipe.vae.config.scaling_factor
    expected = pipe.image_processor.postprocess(pipe.vae.decode(scaled)[0], output_type="pt")
    torch.testing.assert_close(images.detach() / 2 + 0.5, expected)


def small_trajectory(**changes):
    found = {
        "latents": noise(),
        "inputs": (noise(),) * 3,
        "timesteps": torch.tensor([900, 500, 100]),
        "guidance_scale": 7.5,
    }
    return Trajectory(**(found | changes))


@pytest.mark.parametrize(
    ("changes", "arguments", "message"),
    [
        ({"inputs": ()}, {}, "kept no inputs of the denoiser: sample with keep=True"),
        (
            {},
            {"grad_latents": torch.ones(1)},
            r"shape of the final latents \(2, 4, 8, 8\), got \(1,\)",
        ),
        ({}, {"step_weights": torch.ones(4)}, "expected 3 step weights, .* got 4"),
        (
            {},
            {"steps": torch.tensor([[0], [3]])},
            r"lie in 0 to 2, got \[\[0\], \[3\]\]",
        ),
        (
            {},
            {"steps": torch.tensor([0, 1])},
            r"steps of each\) for 2 images, got \(2,\)",
        ),
        (
            {},
            {"inverse_probabilities": torch.ones(1)},
            r"3 inverse probabilities, one for each column of steps, got \(1,\)",
        ),
        (
            {},
            {"branches": branches(torch.zeros(2, 77, 16))},
            "guidance_scale 7.5 needs the embeddings of the empty prompt",
        ),
        (
            {},
            {"branches": branches(torch.zeros(3, 77, 16), torch.zeros(1, 77, 16))},
            "for 1 or 2 images, got 3",
        ),
    ],
)
def test_replay_refuses_what_does_not_fit(world, changes, arguments, message):
    pipe, _ = world["unet"]
    fitting = {
        "branches": branches(torch.zeros(2, 77, 16).double(), torch.zeros(1, 77, 16).double()),
        "grad_latents": noise(),
        "step_weights": torch.ones(3),
    }
    with pytest.raises(ValueError, match=message):
        replay(pipe, small_trajectory(**changes), **(fitting | arguments))


def test_replay_refuses_to_train_nothing(world):
    pipe, _ = world["text_encoder"]
    encoded = branches(*(e.detach() for e in embed(pipe)))
    with pytest.raises(ValueError, match=r"nothing to train: .* add an adapter"):
        replay(pipe, small_trajectory(), encoded, noise(), torch.ones(3))


@pytest.mark.parametrize("count", [0, 6])
def test_sampling_too_few_or_too_many_steps_is_refused(count):
    with pytest.raises(ValueError, match=f"can sample 1 to 5 of 5 steps, not {count}"):
        sample_steps(5, count, 2, torch.Generator())


def test_sampling_refuses_bad_guidance(world):
    pipe, _ = world["text_encoder"]
    cond, _ = embed(pipe)
    with pytest.raises(ValueError, match=r"must be at least 0 \(0 to 1: no guidance\), got -0.5"):
        sample(pipe, pipe.scheduler, branches(cond, cond), noise(), 2, -0.5)
    with pytest.raises(ValueError, match="pass uncond, or guidance_scale=1"):
        sample(pipe, pipe.scheduler, branches(cond), noise(), 2, 7.5)
