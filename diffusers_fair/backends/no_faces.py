"""A face detector that finds no face: enough where all attributes are of the whole image."""

from typing import Any

from diffusers_fair.backends.needs import Need
from diffusers_fair.vision.faces import FaceDetector, no_faces


def load(device: Any = "cpu") -> FaceDetector:
    """Return the detector, which computes wherever its images are."""
    return no_faces


def needs() -> list[Need]:
    """List what `load` needs: nothing."""
    return []
