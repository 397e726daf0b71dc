"""Images of prompts from any diffusers pipeline, each from a seed of its own.

Calls the pipeline itself: whatever sits in it (an adapter, a rival method) takes part.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from inspect import Parameter, signature
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Pictures:
    """Some images, and whose they are."""

    images: Tensor
    """(n, 3, h, w) in [-1, 1]."""
    prompt: np.ndarray
    """Index i of each image's prompt, (n,)."""
    image: np.ndarray
    """Index j of the image among those of its prompt, (n,)."""
    seed: np.ndarray | None = None
    """Seed of each image's generator, (n,); None for images that were not drawn here."""
    file: np.ndarray | None = None
    """Where each image was read from, (n,); None for images that were drawn."""


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


def prompt_key(text: str, negative: str = "") -> int:
    """A number for a prompt in `image_seed` that depends on its words, not on its place in a list.

    Args:
        text: the prompt.
        negative: the negative prompt.
    """
    return int.from_bytes(sha256(f"{text}\n{negative}".encode()).digest()[:8], "big")


def pairs_of(images: Sequence[int], batch_size: int) -> list[np.ndarray]:
    """(prompt, image) of all images, prompt by prompt, cut into batches.

    Args:
        images: of each prompt.
        batch_size: images in a batch, of one prompt or several.

    Returns:
        Integers (n, 2) of each batch, n <= batch_size.
    """
    pairs = np.array([(i, j) for i, count in enumerate(images) for j in range(count)])
    return [pairs[start : start + batch_size] for start in range(0, len(pairs), batch_size)]


def takes_negative_prompts(pipe: Any) -> bool:
    """Whether the pipeline can be called with `negative_prompt`."""
    parameters = signature(pipe.__call__).parameters
    return "negative_prompt" in parameters or any(
        parameter.kind is Parameter.VAR_KEYWORD for parameter in parameters.values()
    )


def draw(
    pipe: Any,
    prompts: Sequence[str],
    pairs: np.ndarray,
    *,
    steps: int,
    guidance_scale: float,
    seed: int,
    negatives: Sequence[str] = (),
    keys: Sequence[int] = (),
) -> Pictures:
    """Images (i, j) of prompts, in one batch.

    An image depends on (pipeline, prompt, seed, i, j, steps, guidance_scale), not on the batch it
    is drawn in: its own CPU generator, seeded by `image_seed`, gives its first noise and whatever
    noise the scheduler adds.

    Args:
        pipe: a text-to-image pipeline of diffusers; called, never changed.
        prompts: of which some are drawn.
        pairs: prompt i and image j of each image, (n, 2).
        steps: scheduler steps.
        guidance_scale: of classifier-free guidance.
        seed: >= 0.
        negatives: negative prompt of each prompt; left out, none has one. Only for a pipeline that
            `takes_negative_prompts`.
        keys: what stands for each prompt in `image_seed`; left out, its index.
    """
    seeds = [image_seed(seed, keys[i] if keys else int(i), int(j)) for i, j in pairs]
    negative = [negatives[i] if negatives else "" for i, _ in pairs]
    options = {"negative_prompt": negative} if any(negative) else {}  # not every pipeline takes it
    with _silent(pipe):
        images = pipe(
            prompt=[prompts[i] for i, _ in pairs],
            generator=[torch.Generator().manual_seed(s) for s in seeds],
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            output_type="pt",
            **options,
        ).images  # (n, 3, h, w) in [0, 1]
    prompt, image = pairs.T  # (n,) each
    return Pictures(images.float() * 2 - 1, prompt, image, seed=np.array(seeds))


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
) -> Iterator[Pictures]:
    """Images of all prompts, prompt by prompt, one batch in memory at a time.

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
    batches = pairs_of([images_per_prompt] * len(prompts), batch_size)
    with bar(sum(map(len, batches)), progress) as advance:
        for pairs in batches:
            yield draw(pipe, prompts, pairs, steps=steps, guidance_scale=guidance_scale, seed=seed)
            advance(len(pairs))


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
def bar(total: int, shown: bool):
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
