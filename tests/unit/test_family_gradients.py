"""The gradient in every family: replay, the pipeline's own call under autograd, differences."""

import functools
import itertools

import diffusers
import families
import pytest
import torch
from families import PIPELINES, flux, sd3, sdxl, size_of
from safetensors.torch import save_file
from tiny import BETAS

from diffusers_fair.adapters.lora import add_lora, lora_tensors
from diffusers_fair.diffusion.drop_in import biased_gradient
from diffusers_fair.diffusion.noise import Noise, initial_noise, noise_generators
from diffusers_fair.diffusion.replay import replay
from diffusers_fair.diffusion.sampling import decode, guided_prediction, sample
from diffusers_fair.diffusion.scheduler import BiasedGradientScheduler
from diffusers_fair.families import family_of
from diffusers_fair.families.conditioning import backward

PROMPTS = ["a dog", "two cats"]
STEPS = 4
TOLERANCE = 1e-6  # relative; the rest is the scheduler's float32
DIFFERENCES = 1e-6  # finite differences

FLOW = diffusers.FlowMatchEulerDiscreteScheduler
SCHEDULERS = {
    "sdxl": {
        "usual": lambda: None,
        "karras": lambda: diffusers.EulerDiscreteScheduler(**BETAS, use_karras_sigmas=True),
        "dpm": lambda: diffusers.DPMSolverMultistepScheduler(**BETAS),
        "ancestral": lambda: diffusers.EulerAncestralDiscreteScheduler(
            **BETAS, timestep_spacing="trailing"
        ),
        "lcm": lambda: diffusers.LCMScheduler(**BETAS),
        "tcd": lambda: diffusers.TCDScheduler(**BETAS),
        "sde": lambda: diffusers.DPMSolverMultistepScheduler(
            **BETAS, algorithm_type="sde-dpmsolver++"
        ),
    },
    "sd3": {
        "usual": lambda: None,
        "dynamic": lambda: FLOW(use_dynamic_shifting=True),
        "heun": lambda: diffusers.FlowMatchHeunDiscreteScheduler(),
        "dpm": lambda: diffusers.DPMSolverMultistepScheduler(**families.FLOW),
        "stochastic": lambda: FLOW(shift=3.0, stochastic_sampling=True),
    },
    "flux": {
        "usual": lambda: None,
        "static": lambda: FLOW(shift=3.0),
        "unipc": lambda: diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True
        ),
    },  # not with noise in between, which the pipeline lays out in packed latents
    "sana": {
        "usual": lambda: None,
        "euler": lambda: FLOW(shift=3.0),
        "unipc": lambda: diffusers.UniPCMultistepScheduler(**families.FLOW),
    },
    "z_image": {
        "usual": lambda: None,
        "dynamic": lambda: FLOW(use_dynamic_shifting=True),
        "karras": lambda: FLOW(use_karras_sigmas=True),
    },
    "lumina2": {
        "usual": lambda: None,
        "dynamic": lambda: FLOW(use_dynamic_shifting=True),
        "stochastic": lambda: FLOW(shift=6.0, stochastic_sampling=True),
    },
    "aura_flow": {
        "usual": lambda: None,
        "heun": lambda: diffusers.FlowMatchHeunDiscreteScheduler(),
        "dpm": lambda: diffusers.DPMSolverMultistepScheduler(**families.FLOW),
    },
    "flux2_klein": {
        "usual": lambda: None,
        "static": lambda: FLOW(shift=3.0),
        "unipc": lambda: diffusers.UniPCMultistepScheduler(**families.FLOW),
    },
}
SCALES = {"flux": (3.5,), "z_image": (0, 5)}  # one without guidance and one with it
SLOW = ("sana", "z_image", "lumina2", "aura_flow", "flux2_klein")  # long prompts
NAMES = [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in SCHEDULERS]
CASES = [
    pytest.param(name, scheduler, scale, marks=[pytest.mark.slow] * (name in SLOW))
    for name, schedulers in SCHEDULERS.items()
    for scheduler, scale in itertools.product(schedulers, SCALES.get(name, (1, 5)))
]
APART = ("sd3", "lumina2", "flux2_klein")  # branches or empty prompts, in the pipeline's call


def adapted(pipe):
    """Add LoRA layers that already do something to every component; return their parameters."""
    generator = torch.Generator().manual_seed(0)
    found = {name: add_lora(pipe, name, 2) for name in family_of(pipe).targets}
    for name, parameters in found.items():
        for parameter in parameters:
            drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.data = 0.2 * drawn.to(parameter.dtype)
            parameter.requires_grad_(True)
        assert parameters, name
    return found


def loss_of(pipe, latents):
    """Not linear, and different for each image."""
    images = decode(pipe, latents / 4)
    return (images * torch.linspace(-1, 1, images[0].numel()).view_as(images[0])).square().sum()


def take_gradients(parameters):
    """Component -> gradient of all its parameters; each of them must have one."""
    found = {}
    for name, part in parameters.items():
        found[name] = torch.cat([p.grad.flatten() for p in part])
        for p in part:
            p.grad = None
    return found


def call(pipe, scale):
    """The pipeline's own call, of which diffusers disables gradients from outside: latents."""
    steps = []

    def keep(_pipe, _step, _timestep, given):
        steps.append(given["latents"])
        return {}

    type(pipe).__call__.__wrapped__(
        pipe,
        prompt=list(PROMPTS),
        num_inference_steps=STEPS,
        generator=[torch.Generator().manual_seed(i) for i in range(len(PROMPTS))],
        output_type="latent",
        callback_on_step_end=keep,
        **family_of(pipe).call_options(pipe, scale, size_of(pipe)),
    )
    return steps[-1]


@torch.enable_grad()
def called(pipe, scale):
    """Latents of the pipeline's own call, with its graph."""
    latents = call(pipe, scale)
    c, h, w = family_of(pipe).noise_shape(pipe, size_of(pipe))
    if latents.ndim == 4:
        return latents
    if latents.shape[2] == c:  # a sequence of pixels, in FLUX.2
        return latents.transpose(1, 2).unflatten(2, (h, w))
    return diffusers.FluxPipeline._unpack_latents(latents, h, w, 1)  # of patches, in FLUX.1


def by_call(pipe, parameters, scale):
    """Algorithm 1 by autograd through the pipeline's own call: z_K and the gradient."""
    with biased_gradient(pipe) as scheduler:
        if pipe.scheduler.config.get("stochastic_sampling"):  # to which no pipeline passes them
            generators = noise_generators(*start(pipe), latents_dtype(pipe))
            scheduler.step = functools.partial(scheduler.step, generator=generators)
        latents = called(pipe, scale)
    loss_of(pipe, latents).backward()
    return latents.detach(), take_gradients(parameters)


def start(pipe):
    """Shape and seeds of the initial noise."""
    shape = family_of(pipe).noise_shape(pipe, size_of(pipe))
    return shape, [Noise(i) for i in range(len(PROMPTS))]


def latents_dtype(pipe):
    return family_of(pipe).latents_dtype(pipe)


def encoded(pipe, scale):
    family = family_of(pipe)
    branches = {"cond": family.encode(pipe, PROMPTS)}
    if len(family.guidance_branches(pipe, scale)) > 1:
        branches["uncond"] = family.unconditional(pipe)
    return branches


def sampled(pipe, scheduler, branches, scale):
    noise = initial_noise(*start(pipe), dtype=latents_dtype(pipe))
    generators = noise_generators(*start(pipe), latents_dtype(pipe))
    return sample(pipe, scheduler, branches, noise, STEPS, scale, generators=generators)


def by_replay(pipe, parameters, scale, **options):
    scheduler = BiasedGradientScheduler(pipe.scheduler, "exact")
    branches = encoded(pipe, scale)
    trajectory = sampled(pipe, scheduler, branches, scale)
    z = trajectory.latents.clone().requires_grad_()
    loss_of(pipe, z).backward()
    weights = scheduler.gradient_weights()
    found = replay(pipe, trajectory, branches, z.grad, weights, **options)
    for branch, gradients in found.items():
        backward(branches[branch], gradients)
    return trajectory.latents, take_gradients(parameters)


def assert_close(found, expected, tolerance=TOLERANCE):
    for name, gradient in expected.items():
        assert gradient.norm() > 0, name
        error = (found[name] - gradient).norm() / gradient.norm()
        assert error <= tolerance, (name, error)


@pytest.mark.parametrize(("name", "scheduler", "scale"), CASES)
def test_replay_is_the_pipelines_own_call_under_autograd(name, scheduler, scale):
    pipe = PIPELINES[name](torch.float64, SCHEDULERS[name][scheduler]())
    parameters = adapted(pipe)
    latents, expected = by_call(pipe, parameters, scale)
    again, found = by_replay(pipe, parameters, scale)
    if name in APART and scale > 1:  # other sizes of batches have another last bit
        torch.testing.assert_close(again, latents, rtol=1e-12, atol=1e-12)
    else:
        assert torch.equal(again, latents)
    assert_close(found, expected)


@pytest.mark.parametrize("name", NAMES)
def test_images_are_the_pipelines_own(name):
    pipe = PIPELINES[name]()
    expected = pipe(
        prompt=list(PROMPTS),
        num_inference_steps=STEPS,
        generator=[torch.Generator().manual_seed(i) for i in range(len(PROMPTS))],
        output_type="pt",
        **family_of(pipe).call_options(pipe, 5, size_of(pipe)),
    ).images
    latents = sampled(pipe, pipe.scheduler, encoded(pipe, 5), 5).latents
    with torch.no_grad():
        found = decode(pipe, latents) / 2 + 0.5
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sana", "z_image"])
def test_latents_stay_in_float32_where_the_pipeline_keeps_them_so(name):
    pipe = PIPELINES[name](torch.bfloat16)
    parameters = adapted(pipe)
    with torch.no_grad():
        expected = call(pipe, 5)
    latents, gradients = by_replay(pipe, parameters, 5)
    assert latents.dtype == torch.float32
    assert torch.equal(latents, expected)
    assert gradients["transformer"].isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_plain_diffusers_loads_the_adapter(name, tmp_path):
    pipe, fresh = PIPELINES[name](), PIPELINES[name]()
    adapted(pipe)
    save_file(lora_tensors(pipe), tmp_path / "pytorch_lora_weights.safetensors")
    with torch.no_grad():
        before = call(fresh, 5)
        fresh.load_lora_weights(tmp_path)
        after = call(fresh, 5)
        assert torch.equal(after, call(pipe, 5))
    assert not torch.equal(after, before)


def test_a_loop_that_does_not_detach_is_refused():
    """Flow-matching pipelines do not call `scale_model_input`: 8 % off, silently, without this."""
    pipe = sd3(torch.float64)
    adapted(pipe)
    pipe.scheduler = BiasedGradientScheduler(pipe.scheduler, "exact")
    with pytest.raises(ValueError, match=r"does not call scale_model_input, .* biased_gradient"):
        called(pipe, 5)


def test_without_gradients_the_scheduler_takes_part_in_any_pipeline():
    for pipe, scale in ((sd3(), 5), (flux(), 3.5), (sdxl(), 5)):
        with torch.no_grad():
            expected = call(pipe, scale)
            pipe.scheduler = BiasedGradientScheduler(pipe.scheduler, "exact")
            assert torch.equal(call(pipe, scale), expected)


def test_the_pipeline_is_restored():
    pipe = sd3()
    before = pipe.scheduler
    with biased_gradient(pipe) as scheduler:
        assert pipe.scheduler is scheduler
    assert pipe.scheduler is before
    assert not pipe.transformer._forward_pre_hooks


OPTIONS = {
    "micro-batches": {"micro_batch": 1},
    "guidance branches one after the other": {"split_guidance": True},
    "each image in its own order of steps": {
        "steps": torch.stack([torch.randperm(STEPS), torch.randperm(STEPS)])
    },
}


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("name", NAMES)
def test_options_of_replay_make_no_difference(name, option):
    pipe = PIPELINES[name](torch.float64)
    parameters = adapted(pipe)
    _, expected = by_replay(pipe, parameters, 5)
    assert_close(by_replay(pipe, parameters, 5, **OPTIONS[option])[1], expected)


@pytest.mark.parametrize("name", NAMES)
def test_replay_is_the_slope_of_the_loss(name, monkeypatch):
    """Finite differences, with the denoiser's inputs held fixed, in one random direction."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)  # too coarse for differences
    monkeypatch.setattr(torch, "float32", torch.float64)
    pipe = PIPELINES[name](torch.float64)
    parameters = adapted(pipe)
    latents, gradients = by_replay(pipe, parameters, 5)
    scheduler = BiasedGradientScheduler(pipe.scheduler, "exact")
    trajectory = sampled(pipe, scheduler, encoded(pipe, 5), 5)
    coefficients = scheduler.coefficients()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        before = outputs_of(pipe, trajectory, 5)
    influence = coefficients * scheduler.output_weights()  # C_i a_i

    @torch.no_grad()
    def moved(part, direction, by):
        """The loss if the adapter moves: each step's output with it, times C_i a_i."""
        for p, d in zip(part, direction, strict=True):
            p.add_(by * d)
        outputs = outputs_of(pipe, trajectory, 5)
        for p, d in zip(part, direction, strict=True):
            p.sub_(by * d)
        terms = zip(influence, outputs, before, strict=True)
        return loss_of(pipe, latents + sum(w * (new - old) for w, new, old in terms)).item()

    for component, part in parameters.items():
        direction = [torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in part]
        expected = torch.cat([d.flatten() for d in direction]).dot(gradients[component])
        h = 1e-5
        slope = (moved(part, direction, h) - moved(part, direction, -h)) / (2 * h)
        assert abs(slope - expected) <= DIFFERENCES * abs(expected), component


def outputs_of(pipe, trajectory, scale):
    """The guided prediction of every step, at the inputs of a trajectory."""
    guided = guided_prediction(pipe, encoded(pipe, scale), trajectory.latents.shape, scale)
    pairs = zip(trajectory.inputs, trajectory.timesteps, strict=True)
    return [guided(scaled, t) for scaled, t in pairs]
