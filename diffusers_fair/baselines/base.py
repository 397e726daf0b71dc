"""The protocol of baselines: the task that they get, and the pipeline that they return."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from diffusers_fair.prompts.wording import Wording
from diffusers_fair.vision.judges import Judges


@dataclass(frozen=True, kw_only=True)
class Task:
    """The attributes to balance, and the prompts and models that a method may be fitted with."""

    wordings: Sequence[Wording]
    """The attributes with their targets and words."""
    prompts: Sequence[str]
    """Neutral prompts to fit a method on; none of them is evaluated."""
    judges: Callable[[], Judges]
    """Loads the judges that a method may be fitted with: those of training, not of evaluation."""
    steps: int = 20
    """Scheduler steps of the images that a method generates to be fitted."""
    guidance_scale: float = 7.5
    """Guidance scale of these images."""
    seed: int = 0
    """Random seed of these images."""
    size: int | None = None
    """Width and height of these images in pixels; None for the pipeline's default."""


Generate = Callable[..., Any]
"""(prompts, generators, **options of the pipeline) -> output of the pipeline."""


class ChangedPipeline:
    """A pipeline with a method applied, which has the call and the attributes of the pipeline.

    As a context manager, it restores the pipeline on exit.

    Args:
        pipe: a pipeline of diffusers.
        generate: calls the pipeline for prompts and as many generators; None calls it directly.
        restore: undoes the changes to the pipeline itself.
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
            generator: one generator for each prompt.
            options: arguments of the pipeline's own call.

        Raises:
            ValueError: the numbers of generators and prompts differ.
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
        """Look up all other attributes in the pipeline."""
        return getattr(self.pipe, name)

    def __enter__(self) -> "ChangedPipeline":
        """Return the pipeline, to which the method is already applied."""
        return self

    def __exit__(self, *problem: object) -> None:
        """Restore the pipeline."""
        self.restore()


class Baseline(Protocol):
    """A published method: a dataclass of hyperparameters that can be applied to a pipeline."""

    def check(self, pipe: Any) -> None:
        """Check that the method works with a pipeline, before anything is computed.

        Raises:
            ValueError: it does not.
        """
        return None  # most methods work with every pipeline

    def apply(self, pipe: Any, task: Task) -> ChangedPipeline:
        """Return a pipeline that generates images with the method.

        Args:
            pipe: a pipeline of a known family. `restore` of the result undoes every change to it.
            task: the attributes to balance.

        Raises:
            ValueError: as for `check`.
        """
        ...


def require(works: bool, method: str, needs: str, pipe: Any) -> None:
    """Refuse a pipeline that a method does not work with.

    Raises:
        ValueError: it does not work.
    """
    if not works:
        raise ValueError(
            f"{method} {needs}, which this {type(pipe).__name__} does not have: choose another "
            "baseline, such as attribute-words, or another base model"
        )
