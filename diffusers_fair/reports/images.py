"""Sample sheets: images of a few prompts from two models, started from the same noise."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from diffusers_fair.reports.report import Report

if TYPE_CHECKING:
    from PIL.Image import Image

SAMPLE_PROMPTS, SAMPLE_IMAGES = 6, 8  # prompts whose images are kept, and images of each
GROUP_SAMPLES = 4  # prompts of a group whose images are kept
_PAIR_HEIGHT = 96  # minimum height of an image in pairs.png, in pixels
_CAPTION, _CAPTION_WIDTH = 18, 480  # height and minimum width of a line of text, in pixels


def sample_prompts(prompts: int, limit: int = SAMPLE_PROMPTS) -> list[int]:
    """Choose the prompts whose images are kept: evenly spaced, the same for every report."""
    chosen = np.linspace(0, prompts - 1, min(prompts, limit))
    return [int(i) for i in chosen.round()]


def pairs_sheet(base: Report, adapter: Report) -> "Image":
    """Put the adapter's images below the base model's images from the same noise.

    Args:
        base: report of the base model.
        adapter: report with the same settings.
    """
    blocks = [
        (base.settings.prompts[i], _above(base.samples[i], adapter.samples[i]))
        for i in sorted(base.samples.keys() & adapter.samples.keys())
    ]
    return _sheet(blocks, base.label, adapter.label)


def groups_sheet(base: Report, adapter: Report) -> "Image | None":
    """Make the same sheet for control prompts; None if the reports share no samples of them.

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
            caption = f"{name}: {prompt.text or '(empty prompt)'}"
            caption += f" (negative prompt: {prompt.negative})" if prompt.negative else ""
            blocks.append((caption, _above(before.samples[i], after.samples[i])))
    return _sheet(blocks, base.label, adapter.label) if blocks else None


def _above(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """Put one row of images (m, h, w, 3) above the other, enlarged to the minimum height."""
    count = min(len(before), len(after))
    block = np.concatenate([np.concatenate(list(x[:count]), axis=1) for x in (before, after)])
    zoom = max(1, -(-_PAIR_HEIGHT * 2 // block.shape[0]))
    return block.repeat(zoom, 0).repeat(zoom, 1)


def _sheet(blocks: Sequence[tuple[str, np.ndarray]], above: str, below: str) -> "Image":
    """Draw blocks of images, each below its caption."""
    from PIL import Image, ImageDraw

    width = max(_CAPTION_WIDTH, *(block.shape[1] for _, block in blocks))
    height = _CAPTION + sum(_CAPTION + len(block) for _, block in blocks)
    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((4, 3), f"same noise; above: {above}; below: {below}", fill="black")
    top = _CAPTION
    for caption, block in blocks:
        draw.text((4, top + 3), caption, fill="black")
        sheet.paste(Image.fromarray(block), (0, top + _CAPTION))
        top += _CAPTION + len(block)
    return sheet
