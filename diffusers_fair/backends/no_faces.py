"""A face detector that finds no faces, for recipes that need none."""

from typing import Any

from diffusers_fair.backends.needs import Need
from diffusers_fair.vision.faces import FaceDetector, no_faces


def load(device: Any = "cpu") -> FaceDetector:
    """Return the detector, which runs on the device of its images."""
    return no_faces


def needs() -> list[Need]:
    """List the requirements of `load`: none."""
    return []
