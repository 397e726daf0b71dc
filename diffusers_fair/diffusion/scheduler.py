"""Algorithm 1 of the paper as a scheduler, and the weights that replay uses.

*Biased gradient* is the statistical term: its expectation is not that of the exact gradient. It
omits the coupling between denoising steps on purpose (section 4.2).

| here | paper |
|---|---|
| steps, number of `timesteps` | K (the paper's loop ends at K - 1) |
| `output_weights()[i]` | a_i = d z_K / d output_i, with the denoiser's inputs held fixed |
| `coefficients()[i]` | C_i |
| model output | epsilon_t, the denoiser's prediction: noise, or velocity |
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

Standardize = Literal["paper", "exact", "none"]

_TOLERANCE = 1e-4  # relative, of the linearity check; schedulers compute in float32


class BiasedGradientScheduler:
    """A diffusers scheduler whose gradient is the paper's biased gradient.

    It replaces the scheduler that it wraps in any differentiable sampling loop (Algorithm 1):
    `scale_model_input` detaches the latents, `step` multiplies the gradient of the model output by
    C_i. Values are those of the wrapped scheduler, bit for bit. All other attributes are those of
    the wrapped scheduler.

    Args:
        scheduler: any diffusers scheduler that is linear in the latents and in the model output,
            but for noise that it adds.
        standardize: choice of C_i; the geometric mean of |C_i| is always 1.
            `"paper"`: 1 / A_t, from the influence of the noise prediction in DDPM (equation 9).
            `"exact"`: 1 / a_i, from the influence of the model output in this very scheduler, so
            that all C_i a_i are equal.
            `"none"`: 1.

    Raises:
        ValueError: an unknown `standardize`; `"paper"` on a scheduler without a noise-prediction
            schedule, such as flow matching.
    """

    def __init__(self, scheduler: Any, standardize: Standardize = "paper"):
        if standardize not in ("paper", "exact", "none"):
            raise ValueError(f"standardize must be 'paper', 'exact' or 'none', got {standardize!r}")
        if standardize == "paper":
            _require_noise_schedule(scheduler)
        self.scheduler = scheduler
        self.standardize = standardize
        self.detaches_elsewhere = False  # whether something else detaches the model's input
        steps = getattr(scheduler, "num_inference_steps", None)
        self._options = {} if steps is None else {"num_inference_steps": steps}
        self._index = -1  # index of the last step taken
        self._input_is_detached = False  # since the last step
        self._solved: dict[tuple[float, ...], tuple[Tensor, Tensor]] = {}  # timesteps -> a, C

    def __getattr__(self, name: str) -> Any:
        if name == "scheduler":  # not set yet while being copied
            raise AttributeError(name)
        return getattr(self.scheduler, name)

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: Any = None,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
        **kwargs: Any,
    ) -> None:
        """Set the timesteps of the wrapped scheduler and compute the weights of its steps.

        The arguments are those of diffusers' schedulers; only those that are given are passed on.
        Pipelines look for their names.

        Raises:
            ValueError: the scheduler is not linear in the model output.
        """
        named = {"timesteps": timesteps, "sigmas": sigmas, "mu": mu, **kwargs}
        options = {name: value for name, value in named.items() if value is not None}
        if num_inference_steps is not None:
            options["num_inference_steps"] = num_inference_steps
        self.scheduler.set_timesteps(**options, device=device)
        self._options = options
        self._index = -1
        self._input_is_detached = False
        self._solve()

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """Detach the latents, z'_i = detach(z_i), then scale them as the scheduler does."""
        self._input_is_detached = True
        return scaled_input(self.scheduler, sample.detach(), timestep)

    def step(
        self,
        model_output: Tensor,
        timestep: Any,
        sample: Tensor,
        generator: Any = None,
        eta: float = 0.0,
        **kwargs: Any,
    ) -> Any:
        """Take the scheduler's step; the gradient of `model_output` is multiplied by C_i.

        As in diffusers' pipelines, eta is 0 by default for every scheduler that takes it.

        Raises:
            ValueError: `timestep` is not among `timesteps`, or the model's input is attached.
        """
        self._index = self._index_of(timestep)
        self._check_input(model_output, sample)
        kwargs |= step_options(self.scheduler, generator, eta)
        if model_output.requires_grad:
            coefficient = self._solve()[1][self._index].item()
            model_output = model_output.view_as(model_output)  # the caller's tensor gets no hook
            model_output.register_hook(lambda gradient: gradient * coefficient)  # Algorithm 1
        return self.scheduler.step(model_output, timestep, sample, **kwargs)

    def _check_input(self, model_output: Tensor, sample: Tensor) -> None:
        """Refuse a loop in which the gradient also flows through the model's input."""
        is_detached = self._input_is_detached or self.detaches_elsewhere
        self._input_is_detached = False
        if model_output.requires_grad and sample.requires_grad and not is_detached:
            raise ValueError(
                "the pipeline does not call scale_model_input, so the model's input is attached "
                "and the gradient is not that of Algorithm 1: sample within `with "
                "biased_gradient(pipe)` from diffusers_fair.diffusion.drop_in"
            )

    def output_weights(self) -> Tensor:
        """Return a_i = d z_K / d output_i for the timesteps that are set.

        Returns:
            (K,) float64 on the CPU. Schedulers that evaluate the model several times per step have
            one weight for each evaluation.

        Raises:
            ValueError: no timesteps are set, or the scheduler is not linear in the model output.
        """
        return self._solve()[0].clone()

    def coefficients(self) -> Tensor:
        """Return C_i, by which Algorithm 1 multiplies the gradient of each model output.

        Returns:
            (K,) float64 on the CPU; the geometric mean of |C_i| is 1.

        Raises:
            ValueError: as for `output_weights`; with `"exact"`, a step that has no influence.
        """
        return self._solve()[1].clone()

    def gradient_weights(self) -> Tensor:
        """Return C_i a_i: d loss / d output_i = C_i a_i d loss / d z_K. (K,) float64."""
        weights, coefficients = self._solve()
        return coefficients * weights

    def _solve(self) -> tuple[Tensor, Tensor]:
        """Compute a_i and C_i of the timesteps that are set; cached."""
        timesteps = self.scheduler.timesteps.detach().cpu()  # (K,)
        key = tuple(timesteps.tolist())
        if key not in self._solved:
            weights = _measure(lambda: self._fresh(timesteps))
            self._solved[key] = weights, self._standardized(weights, timesteps)
        return self._solved[key]

    def _fresh(self, timesteps: Tensor) -> Any:
        """Build a scheduler like the wrapped one, whose state is not touched."""
        if not self._options:
            raise ValueError("no timesteps are set: call set_timesteps(number of steps) first")
        fresh = type(self.scheduler).from_config(self.scheduler.config)
        fresh.set_timesteps(**self._options)
        if not torch.equal(fresh.timesteps, timesteps):
            raise ValueError(
                "the timesteps are not those that set_timesteps of BiasedGradientScheduler and the "
                f"scheduler's config give ({len(timesteps)} timesteps, expected "
                f"{len(fresh.timesteps)} from {self._options}): set them through the "
                "BiasedGradientScheduler, and change settings with from_config"
            )
        return fresh

    def _standardized(self, weights: Tensor, timesteps: Tensor) -> Tensor:
        """Return C_i for the step weights a_i, both (K,)."""
        if self.standardize == "paper":
            return _geometric_mean_one(1 / _paper_influence(self.scheduler, timesteps))
        if self.standardize == "exact":
            _require_influence(weights)
            return _geometric_mean_one(1 / weights) * weights.sum().sign()
        return torch.ones_like(weights)

    def _index_of(self, timestep: Any) -> int:
        """Return the index of `timestep`: its next occurrence after the last step taken."""
        timesteps = self.scheduler.timesteps.tolist()
        indices = [i for i, t in enumerate(timesteps) if t == float(timestep)]
        if not indices:
            raise ValueError(
                f"timestep {float(timestep):g} is not one of the {len(timesteps)} that are set: "
                "call set_timesteps and go through scheduler.timesteps in order"
            )
        return next((i for i in indices if i > self._index), indices[0])


def step_options(scheduler: Any, generator: Any = None, eta: float = 0.0) -> dict[str, Any]:
    """Return the arguments on noise for a scheduler's step that the scheduler takes.

    Args:
        scheduler: a diffusers scheduler.
        generator: one or several generators of the noise that it adds; None for torch's own.
        eta: 0 is the default of diffusers' pipelines, though not of every scheduler.
    """
    options = {"eta": eta} if generator is None else {"eta": eta, "generator": generator}
    parameters = inspect.signature(scheduler.step).parameters
    return {name: value for name, value in options.items() if name in parameters}


def scaled_input(scheduler: Any, sample: Tensor, timestep: Any) -> Tensor:
    """Scale latents for the model; flow-matching schedulers have no method for it."""
    if not hasattr(scheduler, "scale_model_input"):
        return sample
    return scheduler.scale_model_input(sample, timestep)


def _run(scheduler: Any, latents: Tensor, outputs: list[Tensor]) -> Tensor:
    """Run the scheduler over given model outputs, from z_0 to z_K, always with the same noise."""
    options = step_options(scheduler, torch.Generator().manual_seed(0))
    for output, timestep in zip(outputs, scheduler.timesteps, strict=True):
        scaled_input(scheduler, latents, timestep)  # some schedulers require the call
        latents = scheduler.step(output, timestep, latents, return_dict=False, **options)[0]
    return latents


def _measure(fresh: Any) -> Tensor:
    """Measure a_i of the scheduler that `fresh()` returns, and check that it is linear.

    Returns:
        (K,) float64.

    Raises:
        ValueError: the scheduler is not linear.
    """
    with (
        torch.random.fork_rng(devices=[]),
        torch.enable_grad(),
    ):  # stochastic schedulers sample noise
        scheduler = fresh()
        inputs = torch.zeros(len(scheduler.timesteps) + 1, 1, 1, 1, 1, dtype=torch.float64)
        start, *outputs = inputs.requires_grad_().unbind()
        gradient = torch.autograd.grad(_run(scheduler, start, outputs).sum(), inputs)[0]
        gradient = gradient.flatten()  # (1 + K,): d z_K / d z_0, then a_i
        for scale in (1.0, 100.0):
            if not _predicts(gradient, fresh, scale):
                raise ValueError(
                    f"{type(scheduler).__name__} as configured is not linear in the model output, "
                    "so its steps have no fixed weights: switch off thresholding and clip_sample, "
                    "or use another one, such as DPM-Solver++, DDIM, Euler or UniPC"
                )
    return gradient[1:].detach()


@torch.no_grad()
def _predicts(gradient: Tensor, fresh: Callable[[], Any], scale: float) -> bool:
    """Return whether z_K = noise + gradient . (z_0, outputs) for random inputs of this scale."""
    generator = torch.Generator().manual_seed(0)
    shape = (len(gradient), 2, 4, 4, 4)
    inputs = scale * torch.randn(shape, generator=generator, dtype=torch.float64)
    start, *outputs = inputs
    zeros = torch.zeros_like(start)
    latents = _run(fresh(), start, outputs) - _run(fresh(), zeros, [zeros] * len(outputs))
    terms = gradient.view(-1, 1, 1, 1, 1) * inputs
    return bool(((latents - terms.sum(0)).abs() <= _TOLERANCE * terms.abs().sum(0).max()).all())


def _require_noise_schedule(scheduler: Any) -> None:
    """Refuse a scheduler for which A_t of equation 9 does not exist."""
    prediction = scheduler.config.get("prediction_type")
    if not hasattr(scheduler, "alphas_cumprod") or prediction not in ("epsilon", "v_prediction"):
        raise ValueError(
            "standardize='paper' needs a noise schedule (alphas_cumprod) and a model that predicts "
            f"epsilon or v_prediction, got {type(scheduler).__name__} with prediction_type "
            f"{prediction!r}: use standardize='exact'"
        )


def _paper_influence(scheduler: Any, timesteps: Tensor) -> Tensor:
    """Return the paper's divisor of the gradient of the model output. (K,) float64.

    For a model that predicts the noise it is A_t of equation 9. The biased gradient is then
    v . sum_t d epsilon_t / d theta, and it stays so for a model that predicts the velocity v_t:
    epsilon = sqrt(abar) v_t + sqrt(1 - abar) z, so d v_t / d theta should have the weight
    sqrt(abar). A deterministic sampler gives it A_t abar: one sqrt(abar) is this chain rule; the
    other arises because z moves with the velocity held fixed instead of the noise. Hence
    A_t sqrt(abar).
    """
    t = timesteps.round().long()  # some schedulers use timesteps between those of training
    abar = scheduler.alphas_cumprod.cpu().double()[t]
    influence = scheduler.betas.cpu().double()[t] / (1 - abar).sqrt()  # A_t sqrt(abar)
    if scheduler.config.prediction_type == "v_prediction":
        return influence
    return influence / abar.sqrt()  # A_t, equation 9


def _require_influence(weights: Tensor) -> None:
    """Refuse to standardize a step that hardly affects the result."""
    least = int(weights.abs().argmin())
    if weights[least].abs() <= 1e-6 * weights.abs().max():
        raise ValueError(
            f"step {least} of {len(weights)} has no influence on the result, so standardize="
            "'exact' cannot weigh it: use 'paper' or 'none', or another scheduler"
        )


def _geometric_mean_one(values: Tensor) -> Tensor:
    """Scale values so that the geometric mean of their sizes is 1."""
    return values / values.abs().log().mean().exp()
