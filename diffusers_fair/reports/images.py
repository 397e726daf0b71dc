"""Pictures to look at: the first images of a few prompts, two models' on the same noise."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image

    from diffusers_fair.reports.report import Report

SAMPLE_PROMPTS, SAMPLE_IMAGES = 6, 8  # pictures that are kept to look at
GROUP_SAMPLES = 4  # prompts of a group whose pictures are kept
PAIR_HEIGHT = 96  # least height in pixels of an image in pairs.png
CAPTION, CAPTION_WIDTH = 18, 480  # height and least width of a line of text, pixels


def sampled(prompts: int, most: int = SAMPLE_PROMPTS) -> list[int]:
    """The few prompts whose pictures are kept: evenly spread, the same for every report."""
    chosen = np.linspace(0, prompts - 1, min(prompts, most))
    return [int(i) for i in chosen.round()]


def pairs_picture(base: "Report", adapter: "Report") -> "Image":
    """Same noise, base above and adapter below, for the prompts that both kept pictures of.

    Args:
        base: report of the base model.
        adapter: report with the same settings.
    """
    blocks = [
        (base.settings.prompts[i], _above(base.samples[i], adapter.samples[i]))
        for i in sorted(base.samples.keys() & adapter.samples.keys())
    ]
    return _sheet(blocks, base.label, adapter.label)


def groups_picture(base: "Report", adapter: "Report") -> "Image | None":
    """The same for prompts that leave nothing to change; None where both kept no pictures of any.

    Args:
        base: report of the base model.
        adapter: report with the same settings.
    """
    blocks = []
    for name, after in adapter.groups.items():
        before = base.group_like(after)
        if before is None:
            continue
        for i in sorted(before.samples.keys() & after.samples.keys()):
            prompt = after.group.prompts[i]
            told = f"{name}: {prompt.text or '(empty prompt)'}"
            told += f" (negative prompt: {prompt.negative})" if prompt.negative else ""
            blocks.append((told, _above(before.samples[i], after.samples[i])))
    return _sheet(blocks, base.label, adapter.label) if blocks else None


def _above(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """Images (m, h, w, 3) of the one in a row above those of the other, made large enough."""
    count = min(len(before), len(after))
    block = np.concatenate([np.concatenate(list(x[:count]), axis=1) for x in (before, after)])
    zoom = max(1, -(-PAIR_HEIGHT * 2 // block.shape[0]))
    return block.repeat(zoom, 0).repeat(zoom, 1)


def _sheet(blocks: Sequence[tuple[str, np.ndarray]], above: str, below: str) -> "Image":
    """Blocks of pictures, each under its caption."""
    from PIL import Image, ImageDraw

    width = max(CAPTION_WIDTH, *(block.shape[1] for _, block in blocks))
    height = CAPTION + sum(CAPTION + len(block) for _, block in blocks)
    picture = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(picture)
    draw.text((4, 3), f"same noise; above: {above}; below: {below}", fill="black")
    top = CAPTION
    for caption, block in blocks:
        draw.text((4, top + 3), caption, fill="black")
        picture.paste(Image.fromarray(block), (0, top + CAPTION))
        top += CAPTION + len(block)
    return picture
