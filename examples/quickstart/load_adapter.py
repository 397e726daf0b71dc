"""Load an adapter, and generate images from the same noise without and with it.

    python examples/quickstart/load_adapter.py

Writes runs/quickstart/loaded.png: base model above, adapter below. To use another model, replace the
pipeline with any `StableDiffusionPipeline`, and the folder with an adapter for that model.
"""

from pathlib import Path

import torch
from PIL import Image

import diffusers_fair

ADAPTER = Path(__file__).parents[2] / "model_cards" / "adapters" / "testbed-gender"
PROMPT = "a photo of the face of a senator, a person"
OUT = Path("runs/quickstart")


def generate(pipe) -> Image.Image:
    """Generate six images side by side, from the same noise in every call."""
    images = pipe(
        PROMPT,
        num_images_per_prompt=6,
        num_inference_steps=12,
        guidance_scale=4.5,
        generator=torch.Generator().manual_seed(0),
    ).images
    row = Image.new("RGB", (6 * images[0].width, images[0].height))
    for i, image in enumerate(images):
        row.paste(image, (i * image.width, 0))
    return row


pipe = diffusers_fair.testbed.pipeline()
before = generate(pipe)
pipe.load_fair_adapter(ADAPTER)  # or a repository on the Hub
after = generate(pipe)

both = Image.new("RGB", (before.width, 2 * before.height))
both.paste(before, (0, 0))
both.paste(after, (0, before.height))
OUT.mkdir(parents=True, exist_ok=True)
both.save(OUT / "loaded.png")
print(f"see {OUT / 'loaded.png'}")
