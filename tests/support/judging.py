"""Judges of made-up attributes, and what they look at: shared by tests of evaluation."""

import dataclasses

import torch
from torch import nn

from diffusers_fair.attributes import Attribute
from diffusers_fair.vision.classifiers import NetworkClassifier
from diffusers_fair.vision.encoders import NetworkEncoder, Pixels
from diffusers_fair.vision.faces import Faces
from diffusers_fair.vision.judges import Judges

HUE = Attribute("hue", ("red", "green", "blue"))
TONE = Attribute("tone", ("dark", "light"), (0.75, 0.25))
PROMPTS = ["a baker", "a judge", "a nurse"]
QUICK = {"images_per_prompt": 5, "steps": 2, "guidance_scale": 2.0, "progress": False}


def find_faces(images):
    """A face in the middle wherever the picture is not too dark on average."""
    n, _, h, w = images.shape
    box = torch.tensor([w / 4, h / 4, 3 * w / 4, 3 * h / 4])
    return Faces(box.expand(n, 4), images.mean((1, 2, 3)) > images.mean((1, 2, 3)).min())


def find_all(images):
    return Faces(find_faces(images).boxes, torch.ones(len(images), dtype=torch.bool))


def find_none(images):
    return Faces(find_faces(images).boxes, torch.zeros(len(images), dtype=torch.bool))


def classifier(classes, order=None):
    """Class by the mean colours of the chip."""
    mix = torch.randn(3, len(classes), generator=torch.Generator().manual_seed(3))
    order = order or range(len(classes))
    weights = (200 * mix)[:, list(order)]
    names = tuple(classes[i] for i in order)
    return NetworkClassifier(lambda chips: chips.mean((2, 3)) @ weights, names, size=8)


class Clip(NetworkEncoder):
    def texts(self, texts):
        rows = [torch.randn(12, generator=torch.Generator().manual_seed(len(t))) for t in texts]
        return nn.functional.normalize(torch.stack(rows), dim=-1)


def encoder(kind, width):
    with torch.random.fork_rng():
        torch.manual_seed(width)
        network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, width))
    return kind(network.requires_grad_(False), Pixels(8))


def judges(**changes):
    made = Judges(
        face_detector=find_all,
        classifiers={"hue": classifier(HUE.classes), "tone": classifier(TONE.classes)},
        clip=encoder(Clip, 12),
        dino=encoder(NetworkEncoder, 10),
    )
    return dataclasses.replace(made, **changes)
