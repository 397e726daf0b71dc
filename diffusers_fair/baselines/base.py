"""What a method is told, and what it makes of a pipeline."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from diffusers_fair.prompts.wording import Wording
from diffusers_fair.vision.judges import Judges


@dataclass(frozen=True, kw_only=True)
class Task:
    """What is to be balanced, and what there is to work with."""

    wordings: Sequence[Wording]
    """The attributes with their targets and words."""
    prompts: Sequence[str]
    """Neutral prompts to work out a change with; none that is evaluated on."""
    judges: Callable[[], Judges]
    """Loads what may look at images meanwhile: the models of training, not those of evaluation."""
    steps: int = 20
    """Scheduler steps of those images."""
    guidance_scale: float = 7.5
    """Of those images."""
    seed: int = 0
    """Of everything random in working out the change."""


Draw = Callable[..., Any]
"""(prompts, generators, **options of the pipeline) -> what the pipeline returns."""


class ChangedPipeline:
    """A pipeline with a method in it: called like the pipeline, whose attributes it has.

    Also a context manager, which restores the pipeline at its end.

    Args:
        pipe: a Stable Diffusion pipeline.
        draw: calls it for prompts and as many generators; left out, as it is.
        restore: takes back what was changed in the pipeline itself.
    """

    def __init__(
        self, pipe: Any, draw: Draw | None = None, restore: Callable[[], None] = lambda: None
    ):
        self.pipe = pipe
        self.restore = restore
        self._draw = draw or (
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
        """Draw one image for each prompt, each decided by its generator alone.

        Args:
            prompt: one or several.
            generator: one for each prompt.
            options: of the pipeline's own call.

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
        return self._draw(prompts, generators, **options)

    def __getattr__(self, name: str) -> Any:
        """Everything else is the pipeline's."""
        return getattr(self.pipe, name)

    def __enter__(self) -> "ChangedPipeline":
        """The pipeline is changed already."""
        return self

    def __exit__(self, *problem: object) -> None:
        """Restore the pipeline."""
        self.restore()


class Baseline(Protocol):
    """A published method: a dataclass of hyperparameters, and what it does to a pipeline."""

    def apply(self, pipe: Any, task: Task) -> ChangedPipeline:
        """Make a pipeline that draws by the method.

        Args:
            pipe: a Stable Diffusion 1.x or 2.x pipeline; whatever is changed in it, `restore` of
                the result takes back.
            task: what is to be balanced.
        """
