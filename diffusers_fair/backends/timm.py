"""Face embedders of timm."""

from pathlib import Path

import torch

from diffusers_fair.backends.errors import loading
from diffusers_fair.backends.needs import Need, package, pretrained
from diffusers_fair.vision.encoders import NetworkEncoder, Pixels

PACKAGE = "timm"  # import name
_INSTALL = "pip install timm"
_HUB = "hf-hub:"
_FORMS = f"a name that timm knows, {_HUB}ORG/MODEL, or a folder with config.json and weights"


def load(name: str, device: torch.device | str = "cpu") -> NetworkEncoder:
    """Load a face embedder.

    The last layer is kept, because it computes the embedding in models that were trained to
    distinguish faces. The layer that classified the people of the training set is not in the file.

    Args:
        name: as `timm.create_model` takes it, or a folder.
        device: device that it computes on, in float32.

    Raises:
        ModuleNotFoundError: timm is not installed.
        ValueError: the model does not exist, cannot be reached, or its images are not square.
    """
    with loading(f"the face embedder '{name}' of timm", _FORMS, _INSTALL):
        import timm

        source = f"local-dir:{name}" if Path(name).is_dir() else name
        network = timm.create_model(source, pretrained=True)
        config = timm.data.resolve_model_data_config(network)
        channels, height, width = config["input_size"]
        if channels != 3 or height != width:
            raise ValueError(f"it takes images of {config['input_size']}, not square RGB images")
    network = network.to(device).eval().requires_grad_(False)
    return NetworkEncoder(network, Pixels(width, tuple(config["mean"]), tuple(config["std"])))


def needs(name: str) -> list[Need]:
    """List the requirements of `load`."""
    installed = package(PACKAGE, _INSTALL)
    if not installed.available:
        return [installed]
    if Path(name).is_dir() or name.startswith(_HUB):
        return [installed, pretrained(name.removeprefix(_HUB))]
    import timm

    known = timm.models.is_model(name) and timm.models.get_pretrained_cfg(name)
    if not known or not known.hf_hub_id:
        return [
            installed,
            Need(name, False, f"unknown to timm, or without weights: expected {_FORMS}"),
        ]
    return [installed, pretrained(known.hf_hub_id)]
