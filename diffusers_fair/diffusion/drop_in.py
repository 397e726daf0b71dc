"""Algorithm 1 in a pipeline's own call."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from diffusers_fair.diffusion.scheduler import BiasedGradientScheduler, Standardize
from diffusers_fair.families import denoiser_of, family_of


@contextmanager
def biased_gradient(
    pipe: Any, standardize: Standardize = "exact"
) -> Iterator[BiasedGradientScheduler]:
    """Give a pipeline's call the paper's biased gradient within a `with` block.

    The images are the same bit for bit. diffusers disables gradients in the call itself:
    `type(pipe).__call__.__wrapped__(pipe, prompt, output_type="latent")` does not. In contrast to a
    `BiasedGradientScheduler` alone, it also detaches the latents in pipelines that do not call
    `scale_model_input`, as those with flow matching.

    Args:
        pipe: a pipeline of a known family.
        standardize: as for `BiasedGradientScheduler`.

    Yields:
        The scheduler that replaces the pipeline's.

    Raises:
        ValueError: as for `BiasedGradientScheduler`, or a pipeline of no known family.
    """
    name = family_of(pipe).latents_argument

    def detach(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            return (_detached(args[0]), *args[1:]), kwargs
        return args, {**kwargs, name: _detached(kwargs[name])}

    before = pipe.scheduler
    scheduler = BiasedGradientScheduler(before, standardize)
    scheduler.detaches_elsewhere = True
    handle = denoiser_of(pipe).register_forward_pre_hook(detach, with_kwargs=True)
    try:
        pipe.scheduler = scheduler
        yield scheduler
    finally:
        pipe.scheduler = before
        handle.remove()


def _detached(latents: Tensor | list[Tensor]) -> Tensor | list[Tensor]:
    """Detach the latents of a batch, which some denoisers take as a list of images."""
    return [x.detach() for x in latents] if isinstance(latents, list) else latents.detach()
