"""Pictures to look at: the first images of a few prompts, two models' on the same noise."""

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image

    from diffusers_fair.evaluation.report import Report

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
    from PIL import Image, ImageDraw

    blocks = []
    for i in sorted(base.samples.keys() & adapter.samples.keys()):
        rows = [np.concatenate(list(r.samples[i]), axis=1) for r in (base, adapter)]
        block = np.concatenate(rows)
        zoom = max(1, -(-PAIR_HEIGHT * 2 // block.shape[0]))
        blocks.append((i, block.repeat(zoom, 0).repeat(zoom, 1)))
    width = max(CAPTION_WIDTH, *(block.shape[1] for _, block in blocks))
    height = CAPTION + sum(CAPTION + len(block) for _, block in blocks)
    picture = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(picture)
    draw.text((4, 3), f"same noise; above: {base.label}; below: {adapter.label}", fill="black")
    top = CAPTION
    for i, block in blocks:
        draw.text((4, top + 3), base.settings.prompts[i], fill="black")
        picture.paste(Image.fromarray(block), (0, top + CAPTION))
        top += CAPTION + len(block)
    return picture
