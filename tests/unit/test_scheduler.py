import copy
import inspect
import itertools

import diffusers
import pytest
import torch
from tiny import BETAS, pipeline

from diffusers_fair.diffusion.scheduler import BiasedGradientScheduler

DPM = diffusers.DPMSolverMultistepScheduler
LINEAR = {
    "dpm-solver++ 2M": lambda: DPM(**BETAS, steps_offset=1),
    "dpm-solver++ 1": lambda: DPM(**BETAS, solver_order=1),
    "dpm-solver++ 3": lambda: DPM(**BETAS, solver_order=3),
    "dpm-solver++ karras": lambda: DPM(**BETAS, use_karras_sigmas=True),
    "dpm-solver++ heun": lambda: DPM(**BETAS, solver_type="heun"),
    "dpm-solver++ v": lambda: DPM(**BETAS, prediction_type="v_prediction"),
    "ddim": lambda: diffusers.DDIMScheduler(
        **BETAS, clip_sample=False, set_alpha_to_one=False, steps_offset=1
    ),
    "euler": lambda: diffusers.EulerDiscreteScheduler(**BETAS),
    "unipc": lambda: diffusers.UniPCMultistepScheduler(**BETAS),
    "heun": lambda: diffusers.HeunDiscreteScheduler(**BETAS),
    "pndm": lambda: diffusers.PNDMScheduler(**BETAS, skip_prk_steps=True),
    "flow matching": lambda: diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
}
STOCHASTIC = {
    "sde": lambda: DPM(**BETAS, algorithm_type="sde-dpmsolver++"),
    "ancestral": lambda: diffusers.EulerAncestralDiscreteScheduler(**BETAS),
    "ddpm": lambda: diffusers.DDPMScheduler(**BETAS, clip_sample=False),
    "lcm": lambda: diffusers.LCMScheduler(**BETAS),
    "tcd": lambda: diffusers.TCDScheduler(**BETAS),
    "stochastic flow": lambda: diffusers.FlowMatchEulerDiscreteScheduler(stochastic_sampling=True),
}
LINEAR |= STOCHASTIC  # but for the noise that they add
NOT_LINEAR = {
    "thresholding": lambda: DPM(**BETAS, thresholding=True),
    "thresholding, large": lambda: DPM(**BETAS, thresholding=True, sample_max_value=50.0),
    "ddim thresholding": lambda: diffusers.DDIMScheduler(
        **BETAS, clip_sample=False, thresholding=True
    ),
    "clip_sample": lambda: diffusers.DDIMScheduler(**BETAS),
    "clip_sample, ddpm": lambda: diffusers.DDPMScheduler(**BETAS),
}
DRIFT = 1e-5  # relative; schedulers compute in float32


def run(scheduler, latents, outputs):
    """A diffusers-style loop over given model outputs, with the same noise each time."""
    options = {"generator": torch.Generator().manual_seed(0), "eta": 0.0}
    taken = inspect.signature(scheduler.step).parameters
    options = {name: value for name, value in options.items() if name in taken}
    for output, t in zip(outputs, scheduler.timesteps, strict=True):
        if hasattr(scheduler, "scale_model_input"):
            scheduler.scale_model_input(latents, t)
        latents = scheduler.step(output, t, latents, return_dict=False, **options)[0]
    return latents


def draw(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return list(torch.randn(count, 2, 4, 3, 3, generator=generator, dtype=torch.float64))


def biased(name, standardize="exact", steps=5):
    scheduler = BiasedGradientScheduler(LINEAR[name](), standardize)
    scheduler.set_timesteps(steps)
    return scheduler


@pytest.mark.parametrize("steps", [1, 2, 5, 14, 15, 20])
@pytest.mark.parametrize("name", LINEAR)
def test_output_weights_are_finite_differences_of_the_scheduler(name, steps):
    weights = biased(name, "none", steps).output_weights()
    scheduler = LINEAR[name]()
    scheduler.set_timesteps(steps)
    latents, *outputs = draw(len(scheduler.timesteps) + 1)
    assert len(weights) == len(outputs)
    scheduler.set_timesteps(steps)
    base = run(scheduler, latents, outputs)
    for i, weight in enumerate(weights):
        scheduler.set_timesteps(steps)
        moved = [*outputs[:i], outputs[i] + 10, *outputs[i + 1 :]]  # linear: any size will do
        slope = (run(scheduler, latents, moved) - base) / 10
        torch.testing.assert_close(
            slope, weight.expand_as(slope), rtol=0, atol=3 * DRIFT * weights.abs().max().item()
        )


REFUSED = {  # tested below
    ("flow matching", "paper"),
    ("stochastic flow", "paper"),
    ("pndm", "exact"),
}


@pytest.mark.parametrize(
    ("name", "standardize"),
    sorted(set(itertools.product(LINEAR, ["paper", "exact", "none"])) - REFUSED),
)
def test_gradient_of_the_loop_is_coefficient_times_step_weight(name, standardize):
    scheduler = biased(name, standardize)
    latents, *outputs = draw(len(scheduler.timesteps) + 1)
    (direction,) = draw(1, seed=1)
    for output in outputs:
        output.requires_grad_()
    (run(scheduler, latents, outputs) * direction).sum().backward()
    for output, weight in zip(outputs, scheduler.gradient_weights(), strict=True):
        error = (output.grad - weight * direction).abs().max() / direction.abs().max()
        assert error <= DRIFT * scheduler.gradient_weights().abs().max()


@pytest.mark.parametrize("name", LINEAR)
def test_values_are_the_wrapped_schedulers_bit_for_bit(name):
    plain, scheduler = LINEAR[name](), biased(name, "none")
    plain.set_timesteps(5)
    latents, *outputs = draw(len(plain.timesteps) + 1)
    outputs = [output.requires_grad_() for output in outputs]
    assert torch.equal(run(scheduler, latents, outputs), run(plain, latents, outputs))


@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize("name", ["ancestral", "lcm", "tcd"])
def test_every_step_of_a_few_step_sampler_has_influence(name, steps):
    """So that `exact` can weigh them equally."""
    scheduler = BiasedGradientScheduler(LINEAR[name](), "exact")
    scheduler.set_timesteps(steps)
    weights = scheduler.gradient_weights()
    assert torch.allclose(weights, weights[0].expand(steps))


def test_turbo_hardly_weighs_its_last_step_without_standardization():
    scheduler = BiasedGradientScheduler(
        diffusers.EulerAncestralDiscreteScheduler(**BETAS, timestep_spacing="trailing"), "none"
    )
    scheduler.set_timesteps(4)
    weights = scheduler.gradient_weights()
    assert (weights[0] / weights[-1]).round() == 19  # as sdxl-turbo-gender says


def test_it_takes_a_schedulers_place_in_a_pipeline():
    pipe = pipeline()

    def generate():
        generator = torch.Generator().manual_seed(0)
        return pipe("a dog", generator=generator, num_inference_steps=3, output_type="pt").images

    before = generate()
    pipe.scheduler = BiasedGradientScheduler(pipe.scheduler)
    assert torch.equal(generate(), before)
    assert pipe.scheduler.config.solver_order == 2
    assert pipe.scheduler.init_noise_sigma == 1


def test_model_input_is_detached_and_scaled():
    scheduler = biased("euler")
    latents = torch.ones(1, 4, 2, 2, requires_grad=True)
    t = scheduler.timesteps[1]
    scaled = scheduler.scale_model_input(latents, t)
    assert not scaled.requires_grad
    assert torch.equal(scaled, scheduler.scheduler.scale_model_input(latents, t))


def test_callers_tensor_gets_no_hook():
    scheduler = biased("ddim", "paper")
    output = draw(1)[0].requires_grad_()
    scheduler.step(output, scheduler.timesteps[0], draw(1)[0])
    output.sum().backward()
    assert torch.equal(output.grad, torch.ones_like(output))


def test_paper_coefficients_are_algorithm_1():
    scheduler = biased("dpm-solver++ 2M", "paper", 20)
    betas = torch.linspace(BETAS["beta_start"] ** 0.5, BETAS["beta_end"] ** 0.5, 1000).double() ** 2
    abar = (1 - betas).cumprod(0)
    c = torch.tensor(
        [1 / (betas[t] / (abar[t].sqrt() * (1 - abar[t]).sqrt())) for t in scheduler.timesteps]
    ).double()
    torch.testing.assert_close(
        scheduler.coefficients(), c / c.prod() ** (1 / 20), rtol=1e-4, atol=0
    )


def test_what_the_paper_leaves_of_this_solver():
    weights = biased("dpm-solver++ 2M", "paper", 20).gradient_weights()
    assert weights[1:-3].sub(-0.39).abs().max() < 0.03
    torch.testing.assert_close(weights[0].item(), -0.217, rtol=0, atol=1e-3)
    torch.testing.assert_close(weights[-1].item(), -0.7125, rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    "name", [name for name in LINEAR if name not in ("pndm", "stochastic flow")]
)
def test_exact_coefficients_make_all_steps_equal(name):
    weights = biased(name, "exact", 20).gradient_weights()
    torch.testing.assert_close(weights, weights[:1].expand_as(weights), rtol=1e-12, atol=0)


@pytest.mark.parametrize("standardize", ["paper", "exact", "none"])
@pytest.mark.parametrize("name", ["dpm-solver++ 2M", "dpm-solver++ v", "euler", "ddim"])
def test_coefficients_are_positive_with_geometric_mean_one(name, standardize):
    coefficients = biased(name, standardize, 20).coefficients()
    assert (coefficients > 0).all()
    assert coefficients.log().mean().abs() < 1e-12


def test_velocity_and_noise_models_of_one_denoiser_have_the_same_biased_gradient():
    """epsilon = sqrt(abar) v + ..., so a velocity's gradient weighs sqrt(abar) times a noise's."""
    ddim = {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}
    weights = {}
    for prediction in ("epsilon", "v_prediction"):
        scheduler = BiasedGradientScheduler(
            diffusers.DDIMScheduler(**BETAS, **ddim, prediction_type=prediction), "paper"
        )
        scheduler.set_timesteps(500)
        weights[prediction] = scheduler.gradient_weights()
    chain = scheduler.alphas_cumprod[scheduler.timesteps].double().sqrt()
    ratio = (weights["v_prediction"] / (chain * weights["epsilon"]))[:-1]  # the last hardly moves
    assert ratio.max() / ratio.min() < 1.02
    assert chain.max() / chain.min() > 14  # what is told apart


def test_zero_terminal_snr_velocity_has_paper_coefficients():
    scheduler = BiasedGradientScheduler(
        DPM(
            **BETAS,
            prediction_type="v_prediction",
            rescale_betas_zero_snr=True,
            timestep_spacing="trailing",
        ),
        "paper",
    )
    scheduler.set_timesteps(5)
    assert scheduler.coefficients().isfinite().all()


def test_weights_are_measured_once_for_each_number_of_steps(monkeypatch):
    import diffusers_fair.diffusion.scheduler as module

    measured, measure = [], module._measure
    monkeypatch.setattr(module, "_measure", lambda fresh: measured.append(1) or measure(fresh))
    scheduler = BiasedGradientScheduler(LINEAR["ddim"]())
    for steps in (5, 5, 7, 5):
        scheduler.set_timesteps(steps)
        assert len(scheduler.coefficients()) == len(scheduler.output_weights()) == steps
    assert len(measured) == 2


def test_results_cannot_be_changed_from_outside():
    scheduler = biased("ddim")
    scheduler.output_weights().zero_()
    scheduler.coefficients().zero_()
    assert scheduler.gradient_weights().abs().min() > 0


@pytest.mark.parametrize("name", ["dpm-solver++ 2M", "unipc", "heun"])
def test_measuring_in_the_middle_of_a_loop_leaves_the_scheduler_alone(name):
    plain, shared = LINEAR[name](), LINEAR[name]()
    plain.set_timesteps(5)
    shared.set_timesteps(5)
    latents, *outputs = draw(len(plain.timesteps) + 1)
    outputs = [output.requires_grad_() for output in outputs]  # the state holds a graph
    expected, found = latents, latents
    for i, (output, t) in enumerate(zip(outputs, plain.timesteps, strict=True)):
        expected = plain.step(output, t, expected)[0]
        found = shared.step(output, t, found)[0]
        if i == 2:
            BiasedGradientScheduler(shared, "none").output_weights()
    assert torch.equal(found, expected)


def test_random_numbers_of_the_program_are_not_touched():
    torch.manual_seed(0)
    expected = torch.randn(3)
    torch.manual_seed(0)
    biased("dpm-solver++ 2M")
    biased("sde")
    assert torch.equal(torch.randn(3), expected)


def test_copies_are_independent():
    scheduler = biased("dpm-solver++ 2M")
    other = copy.deepcopy(scheduler)
    other.set_timesteps(7)
    assert len(scheduler.output_weights()) == 5
    assert len(other.output_weights()) == 7


def test_a_scheduler_without_state_can_be_looped_again():
    scheduler = biased("ddim", "paper")
    expected = scheduler.gradient_weights()
    for _ in range(2):
        latents, *outputs = draw(6)
        for output in outputs:
            output.requires_grad_()
        run(scheduler, latents, outputs).sum().backward()
        found = torch.stack([output.grad.mean() for output in outputs])
        torch.testing.assert_close(found, expected, rtol=DRIFT, atol=0)


def test_custom_timesteps_are_measured_as_given():
    scheduler = BiasedGradientScheduler(LINEAR["dpm-solver++ 2M"](), "exact")
    scheduler.set_timesteps(timesteps=[900, 500, 100])
    assert len(scheduler.coefficients()) == 3


@pytest.mark.parametrize("name", NOT_LINEAR)
def test_nonlinear_schedulers_are_refused(name):
    scheduler = BiasedGradientScheduler(NOT_LINEAR[name](), "none")
    with pytest.raises(ValueError, match=r"not linear .* thresholding and clip_sample, or "):
        scheduler.set_timesteps(20)


def test_paper_on_flow_matching_is_refused():
    with pytest.raises(ValueError, match=r"alphas_cumprod.*FlowMatchEuler.*standardize='exact'"):
        BiasedGradientScheduler(LINEAR["flow matching"](), "paper")


def test_unknown_standardize_is_refused():
    with pytest.raises(ValueError, match=r"'paper', 'exact' or 'none', got 'both'"):
        BiasedGradientScheduler(LINEAR["ddim"](), "both")


def test_weights_without_timesteps_are_refused():
    with pytest.raises(ValueError, match=r"no timesteps are set: call set_timesteps"):
        BiasedGradientScheduler(LINEAR["ddim"]()).output_weights()


def test_timesteps_set_behind_its_back_are_refused():
    scheduler = biased("ddim")
    scheduler.scheduler.set_timesteps(9)
    with pytest.raises(ValueError, match=r"9 timesteps, expected 5 .* set them through"):
        scheduler.coefficients()


def test_timestep_that_is_not_set_is_refused():
    scheduler = biased("ddim")
    with pytest.raises(ValueError, match=r"timestep 999 is not one of the 5 that are set"):
        scheduler.step(draw(1)[0], 999, draw(1)[0])


def test_noise_that_erases_the_first_steps_is_refused():
    """Each stochastic flow step mixes what came before with fresh noise."""
    with pytest.raises(ValueError, match=r"step 0 of 20 has no influence"):
        biased("stochastic flow", "exact", 20)


def test_exact_without_influence_is_refused():
    scheduler = BiasedGradientScheduler(LINEAR["pndm"](), "exact")
    with pytest.raises(ValueError, match=r"step 5 of 6 has no influence .* 'paper' or 'none'"):
        scheduler.set_timesteps(5)
