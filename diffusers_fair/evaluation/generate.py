"""Generate images with any diffusers pipeline, each image from a seed of its own.

The pipeline itself is called, so its adapters and baselines take effect.
"""

from collections.abc import Container, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from inspect import Parameter, signature
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffusers_fair.console import progress_console
from diffusers_fair.evaluation.batch_size import default_batch_size
from diffusers_fair.evaluation.checks import check_sampling, positive
from diffusers_fair.families import find_family
from diffusers_fair.families.base import execution_device, square
from diffusers_fair.verbosity import shows_progress


@dataclass(frozen=True)
class ImageBatch:
    """A batch of images, and the prompts they belong to."""

    images: Tensor
    """(n, 3, h, w) in [-1, 1]."""
    prompt: np.ndarray
    """Index i of each image's prompt, (n,)."""
    image: np.ndarray
    """Index j of the image among those of its prompt, (n,)."""
    seed: np.ndarray | None = None
    """Seed of each image's generator, (n,); None for images that were read from files."""
    file: np.ndarray | None = None
    """File of each image, (n,); None for images that were generated here."""


def image_seed(seed: int, prompt: int, image: int) -> int:
    """Return the seed of image j of prompt i, in [0, 2^32), which depends on (seed, i, j) alone.

    To generate the same image again:
    `pipe(prompt, generator=torch.Generator().manual_seed(image_seed(seed, i, j)))`.

    Args:
        seed: seed of the evaluation, >= 0.
        prompt: index i of the prompt.
        image: index j of the image among those of its prompt.
    """
    return int(np.random.SeedSequence([seed, prompt, image]).generate_state(1)[0])


def prompt_key(text: str, negative: str = "") -> int:
    """Identify a prompt in `image_seed` by its text instead of its index.

    Args:
        text: the prompt.
        negative: the negative prompt.
    """
    return int.from_bytes(sha256(f"{text}\n{negative}".encode()).digest()[:8], "big")


def pairs_of(images: Sequence[int], batch_size: int) -> list[np.ndarray]:
    """Split all images into batches of prompt and image indices, prompt by prompt.

    Args:
        images: number of images of each prompt.
        batch_size: images in a batch, of one prompt or several.

    Returns:
        For each batch, integers (n, 2), n <= batch_size.
    """
    pairs = np.array([(i, j) for i, count in enumerate(images) for j in range(count)])
    return [pairs[start : start + batch_size] for start in range(0, len(pairs), batch_size)]


def takes_negative_prompts(pipe: Any) -> bool:
    """Whether `negative_prompt` has an effect on the images of the pipeline."""
    if (family := find_family(pipe)) is not None and not family.takes_negative_prompts:
        return False
    parameters = signature(pipe.__call__).parameters
    return "negative_prompt" in parameters or any(
        parameter.kind is Parameter.VAR_KEYWORD for parameter in parameters.values()
    )


def generate_batch(
    pipe: Any,
    prompts: Sequence[str],
    pairs: np.ndarray,
    *,
    steps: int,
    guidance_scale: float,
    seed: int,
    size: int | None = None,
    negatives: Sequence[str] = (),
    keys: Sequence[int] = (),
) -> ImageBatch:
    """Generate one batch: images j of prompts i.

    An image does not depend on the rest of its batch: its initial noise and the noise that the
    scheduler adds come from its own CPU generator, seeded by `image_seed`.

    Args:
        pipe: a text-to-image pipeline of diffusers, which is not changed.
        prompts: all prompts.
        pairs: prompt i and image j of each image, (n, 2).
        steps: number of scheduler steps.
        guidance_scale: scale of classifier-free guidance.
        seed: random seed, >= 0.
        size: width and height in pixels; None for the pipeline's default.
        negatives: negative prompt of each prompt; empty for none. Only for a pipeline that
            `takes_negative_prompts`.
        keys: integer that identifies each prompt in `image_seed`; empty for its index.
    """
    seeds = [image_seed(seed, keys[i] if keys else int(i), int(j)) for i, j in pairs]
    negative = np.array([negatives[i] if negatives else "" for i, _ in pairs])
    options = {"num_inference_steps": steps, **_call_options(pipe, guidance_scale, size)}
    images: dict[int, Tensor] = {}  # (3, h, w) in [0, 1] each
    # SDXL takes zeros for no negative prompt, but encodes an empty one: one call for each kind
    for rows in (np.flatnonzero(negative == ""), np.flatnonzero(negative != "")):
        if not len(rows):
            continue
        if negative[rows[0]]:
            options["negative_prompt"] = negative[rows].tolist()  # not every pipeline takes it
        with _silent(pipe):
            made = pipe(
                prompt=[prompts[i] for i, _ in pairs[rows]],
                generator=[torch.Generator().manual_seed(seeds[row]) for row in rows],
                output_type="pt",
                **options,
            ).images
        images |= zip(rows.tolist(), made, strict=True)
    stacked = torch.stack([images[row] for row in range(len(pairs))]).float() * 2 - 1
    prompt, image = pairs.T  # (n,) each
    return ImageBatch(stacked, prompt, image, seed=np.array(seeds))


def _call_options(pipe: Any, guidance_scale: float, size: int | None) -> dict[str, Any]:
    family = find_family(pipe)
    if family is None:
        return {"guidance_scale": guidance_scale, **square(size)}
    return family.call_options(pipe, guidance_scale, size)


def checked_size(pipe: Any, size: int | None) -> int | None:
    """Return the size of the images; None if it is the pipeline's default.

    Raises:
        ValueError: the pipeline cannot generate images of this size.
    """
    if size is None or (family := find_family(pipe)) is None:
        return None if size is None else positive(size, "size")
    return None if family.noise_shape(pipe, size) == family.noise_shape(pipe) else size


def generate(
    pipe: Any,
    prompts: Sequence[str],
    *,
    images_per_prompt: int,
    steps: int,
    guidance_scale: float,
    seed: int,
    size: int | None = None,
    batch_size: int | None = None,
    skip: Container[tuple[int, int]] = (),
    progress: bool = True,
) -> Iterator[ImageBatch]:
    """Generate images of all prompts, prompt by prompt, and yield one batch at a time.

    Args:
        pipe: a text-to-image pipeline of diffusers, which is not changed.
        prompts: one prompt or more.
        images_per_prompt: images per prompt.
        steps: number of scheduler steps.
        guidance_scale: scale of classifier-free guidance.
        seed: random seed, >= 0.
        size: width and height in pixels. Default: the pipeline's.
        batch_size: images generated at once, of one prompt or several. Default: as
            `default_batch_size`.
        skip: images that are not needed, as pairs of prompt and image index. A batch is left out
            if it has no other images, so that the others stay the same bit for bit.
        progress: whether to show a progress bar on stderr.

    Raises:
        ValueError: a number is out of range.
    """
    size = checked_size(pipe, size)
    check_sampling(
        images_per_prompt=images_per_prompt, steps=steps, guidance_scale=guidance_scale, seed=seed
    )

    def generate_pairs(pairs: np.ndarray, steps: int) -> ImageBatch:
        return generate_batch(
            pipe, prompts, pairs, steps=steps, guidance_scale=guidance_scale, seed=seed, size=size
        )

    counts = [images_per_prompt] * len(prompts)
    if batch_size is None:
        first = pairs_of(counts, 1)[0]
        batch_size = default_batch_size(execution_device(pipe), lambda: generate_pairs(first, 1))
    batches = [
        pairs
        for pairs in pairs_of(counts, batch_size)
        if not all(pair in skip for pair in map(tuple, pairs.tolist()))
    ]
    with progress_bar(sum(map(len, batches)), "images" if progress else None) as advance:
        for pairs in batches:
            yield generate_pairs(pairs, steps)
            advance(len(pairs))


@contextmanager
def _silent(pipe):
    """Hide the pipeline's own progress bar in this context."""
    before = getattr(pipe, "_progress_bar_config", None)
    pipe.set_progress_bar_config(disable=True)
    try:
        yield
    finally:
        pipe.set_progress_bar_config(**(before or {}))


@contextmanager
def progress_bar(total: int, title: str | None):
    """Show a progress bar over images, unless it has no title; yield what advances it."""
    if title is None or not shows_progress():
        yield lambda images: None
        return
    try:
        from rich import progress as rich
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "the progress bar needs rich: pip install 'diffusers-fair[train]', or progress=False"
        ) from None
    text = rich.TextColumn("{task.description}", markup=False)
    count = text, rich.BarColumn(), rich.MofNCompleteColumn()
    times = rich.TimeElapsedColumn(), rich.TextColumn("left"), rich.TimeRemainingColumn()
    with rich.Progress(*count, *times, console=progress_console(stderr=True)) as bar:
        task = bar.add_task(title, total=total)
        yield lambda images: bar.update(task, advance=images)
