"""The run folder: its files, the recipe that it belongs to, and cleaning up before resuming."""

import math
import shutil
from pathlib import Path

from diffusers_fair import atomic, distributed, strict_json
from diffusers_fair.config.schema import MEMORY_OPTIONS, RunConfig
from diffusers_fair.folder_lock import has_files
from diffusers_fair.paths import require_writable
from diffusers_fair.training.checkpoints import discard_checkpoints_after

_RECIPE = "recipe.yaml"
_SAME_RESULT = {  # keys that may change when a run is resumed
    "tracker",
    "train.micro_batch",
    "train.memory_budget",
    *(f"train.{option}" for option in MEMORY_OPTIONS),
}


class RunFolder:
    """Paths of a run's files.

    Args:
        path: the folder.
    """

    def __init__(self, path: Path):
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.originals = path / "originals"
        self.adapter = path / "adapter"
        self.best_adapter = path / "adapter-best"
        self.events = Events(path / "events.jsonl")

    def samples(self, step: int) -> Path:
        """Return the path of the sample images of a validation."""
        return self.path / "samples" / f"step-{step:06d}.png"

    def has_iterations(self) -> bool:
        """Whether a training has made an iteration here, which another recipe would discard."""
        return self.events.file.exists() or any(self.checkpoints.glob("step-*"))

    def discard_after(self, step: int) -> None:
        """Remove unfinished files, and everything that was written after an iteration."""
        discard_checkpoints_after(self.checkpoints, step)
        self.events.discard_after(step)
        atomic.remove_partial(self.path)
        atomic.remove_partial(self.originals)
        for unfinished in self.path.glob(".adapter*"):
            shutil.rmtree(unfinished)


def claim_run_folder(config: RunConfig) -> RunFolder:
    """Create the run folder, and write the recipe to it; the main process does, for all.

    Raises:
        ValueError: as `check_run_folder`.
    """
    folder = check_run_folder(config)
    recipe = folder.path / _RECIPE
    if distributed.is_main() and (
        not recipe.exists() or config.differences(RunConfig.load(recipe))
    ):
        folder.path.mkdir(parents=True, exist_ok=True)
        atomic.write(recipe, config.to_yaml().encode())
    distributed.barrier()
    return folder


def check_run_folder(config: RunConfig) -> RunFolder:
    """Check that a training may use its run folder, without changing it.

    The folder may hold a run of the same recipe, with as many iterations or fewer; or a run without
    any iteration yet, of any recipe.

    The tracker may differ, and memory options, so that a run that is out of memory can be resumed.

    Raises:
        ValueError: the folder holds another run, or something else.
    """
    folder = RunFolder(require_writable(config.output))
    recipe = folder.path / _RECIPE
    if not recipe.exists():
        if folder.path.exists() and has_files(folder.path, _RECIPE):
            raise ValueError(f"output '{folder.path}' holds something else: choose another folder")
        return folder
    different = config.differences(RunConfig.load(recipe))
    mine, theirs = different.get("train.iterations", (0, 0))
    if mine > theirs:
        del different["train.iterations"]
    different = {key: pair for key, pair in different.items() if key not in _SAME_RESULT}
    if different and folder.has_iterations():
        key, (mine, theirs) = next(iter(different.items()))
        raise ValueError(
            f"output '{folder.path}' holds another run ({key} is {theirs} there and {mine} here): "
            "choose another folder, or use the same recipe to resume that run"
        )
    return folder


class Events:
    """`events.jsonl`: one line per iteration and per validation.

    Args:
        file: its path.
    """

    def __init__(self, file: Path):
        self.file = file

    def write(self, metrics: dict[str, float], step: int) -> None:
        """Append a line, without metrics that are not finite."""
        finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
        with self.file.open("a", encoding="utf-8") as file:
            file.write(strict_json.dumps({"iteration": step, **finite}) + "\n")

    def sync(self) -> None:
        """Flush all lines to the disk."""
        atomic.fsync(self.file)

    def discard_after(self, step: int) -> None:
        """Remove the lines of later iterations, and damaged or unfinished lines."""
        if not self.file.exists():
            return
        lines = self.file.read_bytes().splitlines(keepends=True)
        kept = [line for line in lines if line.endswith(b"\n") and _step(line) <= step]
        if kept != lines:
            atomic.write(self.file, b"".join(kept))


def _step(line: bytes) -> float:
    """Read the iteration of a line; infinity if the line is damaged."""
    try:
        return strict_json.loads(line)["iteration"]
    except (ValueError, KeyError, TypeError):
        return math.inf
