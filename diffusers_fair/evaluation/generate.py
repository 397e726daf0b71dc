"""Images of prompts from any diffusers pipeline, each from a seed of its own.

Calls the pipeline itself: whatever sits in it (an adapter, a rival method) takes part.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Some images, and whose they are."""

    images: Tensor
    """(n, 3, h, w) in [-1, 1]."""
    prompt: np.ndarray
    """Index i of each image's prompt, (n,)."""
    image: np.ndarray
    """Index j of the image among those of its prompt, (n,)."""
    seed: np.ndarray
    """Seed of each image's generator, (n,)."""


def image_seed(seed: int, prompt: int, image: int) -> int:
    """Seed of image j of prompt i: a function of (seed, i, j) alone, in [0, 2^32).

    `pipe(prompt, generator=torch.Generator().manual_seed(image_seed(seed, i, j)))` draws the very
    same image again.

    Args:
        seed: of the evaluation, >= 0.
        prompt: index i of the prompt.
        image: index j of the image among those of its prompt.
    """
    return int(np.random.SeedSequence([seed, prompt, image]).generate_state(1)[0])


def generate(
    pipe: Any,
    prompts: Sequence[str],
    *,
    images_per_prompt: int,
    steps: int,
    guidance_scale: float,
    seed: int,
    batch_size: int,
    progress: bool = True,
) -> Iterator[Batch]:
    """Images of all prompts, prompt by prompt, one batch in memory at a time.

    An image depends on (pipeline, prompt, seed, i, j, steps, guidance_scale), not on the batch it
    is drawn in: its own CPU generator, seeded by `image_seed`, gives its first noise and whatever
    noise the scheduler adds.

    Args:
        pipe: a text-to-image pipeline of diffusers; called, never changed.
        prompts: one or more.
        images_per_prompt: images of each prompt.
        steps: scheduler steps.
        guidance_scale: of classifier-free guidance.
        seed: >= 0.
        batch_size: images drawn at once, of one prompt or several.
        progress: whether to show a bar with the time left, on stderr.
    """
    pairs = [(i, j) for i in range(len(prompts)) for j in range(images_per_prompt)]
    with _bar(len(pairs), progress) as advance:
        for start in range(0, len(pairs), batch_size):
            part = pairs[start : start + batch_size]
            seeds = [image_seed(seed, i, j) for i, j in part]
            with _silent(pipe):
                images = pipe(
                    prompt=[prompts[i] for i, _ in part],
                    generator=[torch.Generator().manual_seed(s) for s in seeds],
                    num_inference_steps=steps,
                    guidance_scale=guidance_scale,
                    output_type="pt",
                ).images  # (n, 3, h, w) in [0, 1]
            prompt, image = np.array(part).T  # (n,) each
            yield Batch(images.float() * 2 - 1, prompt, image, np.array(seeds))
            advance(len(part))


@contextmanager
def _silent(pipe):
    """The pipeline without its own progress bar, for as long as one call takes."""
    before = getattr(pipe, "_progress_bar_config", None)
    pipe.set_progress_bar_config(disable=True)
    try:
        yield
    finally:
        pipe.set_progress_bar_config(**(before or {}))


@contextmanager
def _bar(total: int, shown: bool):
    """A bar over images with the time left; gives the function that advances it."""
    if not shown:
        yield lambda images: None
        return
    try:
        from rich import progress as rich
        from rich.console import Console
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "the progress bar needs rich: pip install 'diffusers-fair[train]', or progress=False"
        ) from None
    count = rich.TextColumn("images"), rich.BarColumn(), rich.MofNCompleteColumn()
    times = rich.TimeElapsedColumn(), rich.TextColumn("left"), rich.TimeRemainingColumn()
    with rich.Progress(*count, *times, console=Console(stderr=True)) as bar:
        task = bar.add_task("images", total=total)
        yield lambda images: bar.update(task, advance=images)
