"""Balance an attribute of your own: here, whether an image is dark or light.

    python examples/quickstart/balance_attribute.py

1. Collect images of each class in a folder of its own. Here the testbed's images are sorted by
   brightness; in practice, people label them.
2. Train a classifier on the images.
3. Train an adapter with a recipe that names the attribute, its target and the classifier.

The adapter is written to runs/quickstart/lighting/run/adapter. Three iterations only show that all
parts work together; for a full training, leave out `train` and `prompts`.
"""

import shutil
from pathlib import Path

import numpy as np

from diffusers_fair import FairnessFinetuner, testbed
from diffusers_fair.prompts import prompt_set
from diffusers_fair.training.classifier import Settings, train_classifier
from diffusers_fair.training.labelled_images import read_images

OUT = Path("runs/quickstart/lighting")
IMAGES, CLASSIFIER = OUT / "labelled", OUT / "classifier"


def collect_images() -> None:
    """Write images of each class to a folder of its own."""
    prompts = list(prompt_set("testbed-occupations").train[:32])
    images = testbed.pipeline()(prompts, num_inference_steps=8, guidance_scale=4.5).images
    images.sort(key=lambda image: np.asarray(image).mean())
    for i, image in enumerate(images):
        folder = IMAGES / ("dark" if i < len(images) / 2 else "light")
        folder.mkdir(parents=True, exist_ok=True)
        image.save(folder / f"{i:02d}.png")


def train_adapter() -> None:
    """Train an adapter for the attribute of the classifier."""
    classifiers = {"lighting": f"checkpoint:{CLASSIFIER}"}
    finetuner = FairnessFinetuner.from_recipe(
        "testbed-gender",  # gives the base model, learning rate and so on
        attributes=[
            {
                "name": "lighting",
                "classes": ["dark", "light"],
                "target": [0.5, 0.5],
                "region": "image",  # the whole image, not the face in it
            }
        ],
        models={"classifiers": classifiers},
        evaluation={"models": {"classifiers": classifiers}},  # better: another one than in training
        prompts={"images_per_prompt": 8, "keep": None},
        train={"iterations": 3, "prompts_per_iteration": 1, "validate_every": None},
        tracker="none",
        output=str(OUT / "run"),
    )
    finetuner.train()


shutil.rmtree(OUT, ignore_errors=True)  # from an earlier run
collect_images()
settings = Settings(size=64, epochs=6, batch_size=8, pretrained=False)
facts = train_classifier(read_images(IMAGES), CLASSIFIER, settings)
print(f"classifier accuracy on held-out images: {facts['accuracy']:.0%}")
train_adapter()
print(f"the adapter is in {OUT / 'run' / 'adapter'}")
