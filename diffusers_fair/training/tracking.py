"""Experiment trackers: curves and sample images, through accelerate."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from diffusers_fair.backends.needs import is_installed
from diffusers_fair.config.schema import RunConfig

_PROJECT = "diffusers-fair"
_SAMPLES = "samples"  # name of the images


def require_tracker(name: str) -> None:
    """Check that the package of a recipe's tracker is installed.

    Raises:
        ModuleNotFoundError: it is not.
    """
    if name != "none" and not is_installed(name):
        raise ModuleNotFoundError(
            f"tracker '{name}' needs the package '{name}': pip install {name}, or set tracker=none",
            name=name,
        )


class Tracker:
    """Logs to the recipe's tracker, if there is one. To be used in the main process.

    Args:
        accelerator: accelerator with that tracker; None without a tracker.
    """

    def __init__(self, accelerator: Any):
        self._accelerator = accelerator

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Log metrics."""
        if self._accelerator is not None:
            self._accelerator.log(metrics, step=step)

    def log_samples(self, image: np.ndarray, step: int) -> None:
        """Log a grid of sample images (height, width, 3) of bytes."""
        trackers = [] if self._accelerator is None else self._accelerator.trackers
        for tracker in trackers:
            log_image = _LOG_IMAGE.get(tracker.name)
            if log_image is not None:
                log_image(tracker, image, step)


@contextmanager
def tracking(accelerator: Any, config: RunConfig, step: int) -> Iterator[Tracker]:
    """Start the recipe's tracker, and finish it at the end of the `with` block.

    Args:
        accelerator: accelerator with that tracker; None without a tracker.
        config: the recipe.
        step: number of updates made; curves of an earlier run are cut off after it, if the tracker
            can do that.
    """
    if accelerator is None:
        yield Tracker(None)
        return
    logs = Path(accelerator.logging_dir)
    logs.mkdir(parents=True, exist_ok=True)
    project = "run" if config.tracker == "tensorboard" else _PROJECT  # a folder there
    options = _options(config.tracker, Path(config.output).name, str(logs), step)
    accelerator.init_trackers(project, init_kwargs={config.tracker: options})
    try:
        yield Tracker(accelerator)
    finally:
        for started in accelerator.trackers:
            started.finish()


def _options(tracker: str, name: str, logs: str, step: int) -> dict[str, Any]:
    """Return the arguments of a tracker: the run has the name of its folder, and logs into it."""
    match tracker:
        case "tensorboard":
            return {"purge_step": step + 1}
        case "wandb":
            return {"name": name, "dir": logs}
        case "trackio":
            return {"name": name}
        case "mlflow":
            return {"run_name": name}
        case "swanlab":
            return {"experiment_name": name, "logdir": logs}
        case "clearml":
            return {"task_name": name}
        case "dvclive":
            return {"dir": logs, "resume": step > 0}
    return {}


def _log_trackio(tracker: Any, image: np.ndarray, step: int) -> None:
    import trackio

    tracker.tracker.log({_SAMPLES: trackio.Image(image)}, step=step)


def _log_mlflow(tracker: Any, image: np.ndarray, step: int) -> None:
    import mlflow

    mlflow.log_image(image, f"{_SAMPLES}/{step:06d}.png")


_LOG_IMAGE: dict[str, Callable[[Any, np.ndarray, int], object]] = {
    "aim": lambda x, image, step: x.log_images({_SAMPLES: image}, step=step),
    "clearml": lambda x, image, step: x.log_images({_SAMPLES: image}, step=step),
    "comet_ml": lambda x, image, step: x.tracker.log_image(image, _SAMPLES, step=step),
    "dvclive": lambda x, image, step: x.tracker.log_image(f"{_SAMPLES}/{step:06d}.png", image),
    "mlflow": _log_mlflow,
    "swanlab": lambda x, image, step: x.log_images({_SAMPLES: [image]}, step=step),
    "tensorboard": lambda x, image, step: x.log_images(
        {_SAMPLES: image[None]}, step=step, dataformats="NHWC"
    ),
    "trackio": _log_trackio,
    "wandb": lambda x, image, step: x.log_images({_SAMPLES: [image]}, step=step),
}
"""Tracker -> how it takes an image, as accelerate has no way of its own for some of them."""
