"""Balance an attribute of your own: here, whether an image is dark or light.

    python examples/quickstart/balance_attribute.py

1. Collect images of each class, a folder for each. Here the testbed's images are sorted by
   brightness; yours are labelled by people.
2. Train a classifier on them.
3. Train an adapter with a recipe that names the attribute, its target and the classifier.

The adapter is in runs/quickstart/lighting/run/adapter. Three iterations show that everything fits
together; leave out `train` and `prompts` for a whole training.
"""

import shutil
from pathlib import Path

import numpy as np

from diffusers_fair import FairnessFinetuner, testbed
from diffusers_fair.prompts import prompt_set
from diffusers_fair.training.classifier import Settings, read_images, train_classifier

OUT = Path("runs/quickstart/lighting")
IMAGES, CLASSIFIER = OUT / "labelled", OUT / "classifier"


def collect_images() -> None:
    """Write images to a folder for each class."""
    prompts = list(prompt_set("testbed-occupations").train[:32])
    images = testbed.pipeline()(prompts, num_inference_steps=8, guidance_scale=4.5).images
    images.sort(key=lambda image: np.asarray(image).mean())
    for i, image in enumerate(images):
        folder = IMAGES / ("dark" if i < len(images) / 2 else "light")
        folder.mkdir(parents=True, exist_ok=True)
        image.save(folder / f"{i:02d}.png")


def train_adapter() -> None:
    """Train an adapter for the attribute that the classifier sees."""
    classifiers = {"lighting": f"checkpoint:{CLASSIFIER}"}
    finetuner = FairnessFinetuner.from_recipe(
        "testbed-gender",  # its base model, learning rate and so on
        attributes=[
            {
                "name": "lighting",
                "classes": ["dark", "light"],
                "target": [0.5, 0.5],
                "region": "image",  # the whole image, not the face in it
            }
        ],
        models={"classifiers": classifiers},
        evaluation={"models": {"classifiers": classifiers}},  # better: one that training never sees
        prompts={"images_per_prompt": 8, "keep": None},
        train={"iterations": 3, "prompts_per_iteration": 1, "validate_every": None},
        tracker="none",
        output=str(OUT / "run"),
    )
    finetuner.train()


shutil.rmtree(OUT, ignore_errors=True)  # what an earlier run left
collect_images()
settings = Settings(size=64, epochs=6, batch_size=8, pretrained=False)
facts = train_classifier(read_images(IMAGES), CLASSIFIER, settings)
print(f"classifier accuracy on held-out images: {facts['accuracy']:.0%}")
train_adapter()
print(f"the adapter is in {OUT / 'run' / 'adapter'}")
