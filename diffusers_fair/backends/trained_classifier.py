"""Classifiers trained by `diffusers-fair classifier train`: a folder with a MobileNetV3-Large.

`model.safetensors` holds the weights, `classifier.json` the classes and the accuracy.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from diffusers_fair import atomic, strict_json
from diffusers_fair.attributes import Attribute
from diffusers_fair.backends.errors import loading
from diffusers_fair.backends.labels import group, merge, merge_counts
from diffusers_fair.backends.needs import Need, package
from diffusers_fair.backends.sources import ClassifierTraining
from diffusers_fair.vision.classifiers import NetworkClassifier
from diffusers_fair.vision.encoders import Pixels

_FORMAT = 1
MAX_SIZE = 1024  # pixels of a side of the input
WEIGHTS, _FACTS = "model.safetensors", "classifier.json"
MEAN, STD = (
    (0.485, 0.456, 0.406),
    (0.229, 0.224, 0.225),
)  # of ImageNet, per channel, for values in [0, 1]
_TRAIN = "train one with: diffusers-fair classifier train"


def mobilenet(classes: int) -> nn.Module:
    """Create a MobileNetV3-Large with random weights: (n, 3, size, size) -> logits (n, classes)."""
    from torchvision.models import mobilenet_v3_large

    return mobilenet_v3_large(num_classes=classes)


def write(folder: str | Path, network: nn.Module, facts: Mapping[str, Any]) -> None:
    """Write the folder of a classifier, atomically.

    Args:
        folder: new or empty.
        network: a `mobilenet`.
        facts: `classes`, `size`, and any other JSON values.
    """
    from safetensors.torch import save

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: value.cpu().contiguous() for name, value in network.state_dict().items()}
    atomic.write(folder / WEIGHTS, save(state))
    text = strict_json.dumps({"format": _FORMAT, **facts}, indent=1)
    atomic.write(folder / _FACTS, text.encode())


def _read_facts(folder: str | Path) -> dict[str, Any]:
    """Read `classifier.json`.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file has another format.
    """
    facts = strict_json.loads((Path(folder) / _FACTS).read_text(encoding="utf-8"))
    version = facts.get("format") if isinstance(facts, dict) else None
    if version != _FORMAT:
        raise ValueError(f"{_FACTS} must have format {_FORMAT}, got {version}")
    labels, size = facts.get("classes"), facts.get("size")
    if not isinstance(labels, list) or len({str(c) for c in labels}) < 2:
        raise ValueError(f"{_FACTS} must name two or more classes, got {labels}")
    if not isinstance(size, int) or not 32 <= size <= MAX_SIZE:
        raise ValueError(f"{_FACTS} must have a size of 32 to {MAX_SIZE} pixels, got {size}")
    return facts


def load(
    folder: str, classes: Mapping[str, Sequence[str]], device: torch.device | str = "cpu"
) -> NetworkClassifier:
    """Load a classifier.

    Args:
        folder: folder of the classifier.
        classes: class -> labels of the classifier; empty if the labels are the classes.
        device: device that it computes on, in float32.

    Raises:
        ModuleNotFoundError: torchvision is not installed.
        ValueError: there is no such classifier, or it has other labels.
    """
    from safetensors.torch import load_file

    with loading(f"the classifier '{folder}'", f"a folder with {WEIGHTS} and {_FACTS}; {_TRAIN}"):
        facts = _read_facts(folder)
        groups = group(facts["classes"], classes)
        network = mobilenet(len(facts["classes"]))
        network.load_state_dict(load_file(Path(folder) / WEIGHTS))
    network = network.to(device).eval().requires_grad_(False)
    pixels = Pixels(facts["size"], MEAN, STD)
    return NetworkClassifier(
        merge(lambda chips: network(pixels(chips)), groups),
        tuple(groups),
        pixels.size,
        confusion=merge_counts(facts["confusion"], groups) if "confusion" in facts else None,
    )


def needs(folder: str) -> list[Need]:
    """List the requirements of `load`."""
    files = [Path(folder) / name for name in (WEIGHTS, _FACTS)]
    available = all(path.is_file() for path in files)
    size = files[0].stat().st_size if available else 0
    return [package("torchvision"), Need(f"folder '{folder}'", available, _TRAIN, size)]


def trainable(need: Need, training: ClassifierTraining) -> list[Need]:
    """Add to the need of a missing classifier how to train it, and what that requires."""
    advice = f"train it with: {training.command}"
    return [
        package("pyarrow", "pip install pyarrow"),
        replace(need, advice=advice, source=training),
    ]


def classes_need(folder: str, classes: Mapping[str, Sequence[str]], attribute: Attribute) -> Need:
    """Check that the labels map to the attribute's classes.

    Args:
        folder: folder of the classifier.
        classes: class -> labels, as in `load`.
        attribute: attribute to classify.
    """
    name = f"classes of '{folder}'"
    try:
        known = set(group(_read_facts(folder)["classes"], classes))
    except (OSError, ValueError) as error:
        return Need(name, False, str(error))
    advice = f"expected {list(attribute.classes)}, got {sorted(known)}: map them with classes"
    return Need(name, known == set(attribute.classes), advice)
