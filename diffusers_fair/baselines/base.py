"""The protocol of a baseline: its task, and the pipeline that it returns."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from diffusers_fair.families.stable_diffusion import STABLE_DIFFUSION
from diffusers_fair.prompts.wording import Wording
from diffusers_fair.vision.judges import Judges


@dataclass(frozen=True, kw_only=True)
class Task:
    """The attributes to balance, and the means to work out how."""

    wordings: Sequence[Wording]
    """The attributes with their targets and words."""
    prompts: Sequence[str]
    """Neutral prompts to work out a change with, apart from those of the evaluation."""
    judges: Callable[[], Judges]
    """Loads the judges that a method may use: those of training, not those of the evaluation."""
    steps: int = STABLE_DIFFUSION.steps
    """Scheduler steps of the images that a method generates to work out its change."""
    guidance_scale: float = STABLE_DIFFUSION.guidance_scale
    """Guidance scale of these images."""
    seed: int = 0
    """Random seed of these images."""


Generate = Callable[..., Any]
"""(prompts, generators, **options of the pipeline) -> what the pipeline returns."""


class ChangedPipeline:
    """A pipeline with a method applied, which is called like the pipeline and has its attributes.

    Also a context manager, which restores the pipeline on exit.

    Args:
        pipe: a Stable Diffusion pipeline.
        generate: calls it for prompts and as many generators; None to call it directly.
        restore: undoes what was changed in the pipeline itself.
    """

    def __init__(
        self,
        pipe: Any,
        generate: Generate | None = None,
        restore: Callable[[], None] = lambda: None,
    ):
        self.pipe = pipe
        self.restore = restore
        self._generate = generate or (
            lambda prompts, generators, **options: pipe(
                prompt=prompts, generator=generators, **options
            )
        )

    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        generator: torch.Generator | Sequence[torch.Generator],
        **options: Any,
    ) -> Any:
        """Generate one image for each prompt, determined by its generator alone.

        Args:
            prompt: one prompt or several.
            generator: one for each prompt.
            options: arguments of the pipeline's own call.

        Raises:
            ValueError: not one generator for each prompt.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        single = isinstance(generator, torch.Generator)
        generators = [generator] if single else list(generator)  # type: ignore[arg-type]
        if len(generators) != len(prompts):
            raise ValueError(
                f"expected one generator for each of {len(prompts)} prompts, got "
                f"{len(generators)}: give a list"
            )
        return self._generate(prompts, generators, **options)

    def __getattr__(self, name: str) -> Any:
        """Look everything else up in the pipeline."""
        return getattr(self.pipe, name)

    def __enter__(self) -> "ChangedPipeline":
        """Return the pipeline, which is changed already."""
        return self

    def __exit__(self, *problem: object) -> None:
        """Restore the pipeline."""
        self.restore()


class Baseline(Protocol):
    """A published method: a dataclass of hyperparameters that can be applied to a pipeline."""

    def apply(self, pipe: Any, task: Task) -> ChangedPipeline:
        """Return a pipeline that generates images by the method.

        Args:
            pipe: a Stable Diffusion 1 or 2 pipeline. `restore` of the result undoes every change
                to it.
            task: the attributes to balance.
        """
