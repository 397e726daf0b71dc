"""Kill a training at random moments, resume it, and compare it with one that was never killed.

    python examples/reproduction/kill_test.py --kills 40 --seed 0 --out model_cards/kill_test.json

Trains a small adapter on the testbed without interruption. Then, `--kills` times, it starts the same
training in its own process, kills it (SIGKILL) after a random time, resumes it, and compares the
adapter, the last checkpoint, the events and the names of all files. Writes the results to a JSON
file; the exit code is 1 if anything differed.
"""

import json
import multiprocessing
import random
import shutil
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from safetensors.torch import load_file

from diffusers_fair import FairnessFinetuner
from diffusers_fair.atomic import PARTIAL
from diffusers_fair.provenance import provenance
from diffusers_fair.training.checkpoints import load_checkpoint

RECIPE = "testbed-gender"
SMALL = {  # overrides for a short training that often writes every kind of file
    "base": {"dtype": "float32"},
    "adapter": {"rank": 2},
    "prompts": {"images_per_prompt": 2},
    "sampling": {"steps": 2},
    "gradient": {"replay_steps": 1},
    "optimizer": {"warmup": 0},
    "train": {
        "iterations": 6,
        "prompts_per_iteration": 1,
        "distinct_iterations": 4,
        "checkpoint_every": 1,
        "validate_every": 3,
        "validation_images": 2,
        "clip_t_drop": 1.0,
    },
    "tracker": "none",
}
TIMES = ("seconds", "training")  # keys with measured times, which are not compared


def main(
    kills: Annotated[int, typer.Option(help="Number of trainings to kill.")] = 40,
    seed: Annotated[int, typer.Option(help="Random seed of the kill times.")] = 0,
    out: Annotated[Path, typer.Option(help="JSON file to write.")] = Path("kill_test.json"),
) -> None:
    """Kill, resume and compare trainings; write the results."""
    with tempfile.TemporaryDirectory() as folder:
        found = kill_test(kills, seed, Path(folder))
    out.write_text(json.dumps(found | {"provenance": provenance()}, indent=1) + "\n", "utf-8")
    different = [kill for kill in found["kills"] if kill["differs"]]
    print(
        f"{kills - len(different)} of {kills} trainings ended like the uninterrupted one; see {out}"
    )
    if different:
        raise typer.Exit(1)


def kill_test(kills: int, seed: int, folder: Path) -> dict[str, Any]:
    """Return the time of each kill, the files that it left, and the differences in the end."""
    start = time.perf_counter()
    run(folder / "alone")
    whole = time.perf_counter() - start
    expected, moments = outcome(folder / "alone"), random.Random(seed)
    found = []
    for _ in range(kills):
        moment = moments.uniform(0, whole)
        found.append(killed(folder / "killed", moment, expected))
        shutil.rmtree(folder / "killed")
    return {"recipe": RECIPE, "changed": SMALL, "seed": seed, "seconds": whole, "kills": found}


def killed(folder: Path, moment: float, expected: dict[str, Any]) -> dict[str, Any]:
    """Kill a training after `moment` seconds, resume it, and compare its outcome."""
    finished = run(folder, moment)
    left = {
        "second": round(moment, 3),
        "finished": finished,
        "checkpoints": len(list(folder.glob("checkpoints/step-*"))),
        "unfinished": [
            p.name for p in folder.rglob("*") if p.name.startswith((PARTIAL, ".adapter"))
        ],
    }
    run(folder)
    got = outcome(folder)
    return left | {
        "differs": [name for name in expected if not same(expected[name], got.get(name))]
    }


def run(folder: Path, moment: float | None = None) -> bool:
    """Train in a process, kill it after `moment` seconds, and return whether it finished before.

    Raises:
        RuntimeError: the training failed without being killed.
    """
    process = multiprocessing.get_context("fork").Process(target=train, args=(folder,))
    process.start()
    process.join(moment)
    killed = process.is_alive()
    process.kill()
    process.join()
    folder.mkdir(exist_ok=True)  # in case it was killed before it created the folder
    if not killed and process.exitcode:
        raise RuntimeError(f"the training ended with exit code {process.exitcode}")
    return not killed


def train(folder: Path) -> None:
    torch.set_num_threads(1)  # a forked process does not have its parent's threads
    overrides = SMALL | {"output": str(folder)}
    FairnessFinetuner.from_recipe(RECIPE, **overrides).train(progress=False)


def outcome(folder: Path) -> dict[str, Any]:
    """Return everything that must be the same after every training."""
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))
    lines = (folder / "events.jsonl").read_text("utf-8").splitlines()
    return {
        "files": files,
        "events": [timeless(json.loads(line)) for line in lines],
        "checkpoint": timeless(load_checkpoint(folder / "checkpoints") or {}),
        **{name: content(folder / name) for name in files},
    }


def content(path: Path) -> Any:
    """Return the content of a file; None for files that are compared differently."""
    if path.suffix == ".safetensors":
        return load_file(path)  # the order of the metadata varies
    if path.name == "fair_adapter.json":
        return timeless(json.loads(path.read_text("utf-8")))
    return path.read_bytes() if path.suffix == ".png" else None


def timeless(facts: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in facts.items() if name not in TIMES}


def same(a: Any, b: Any) -> bool:
    """Return whether both are bit-identical."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


if __name__ == "__main__":
    typer.run(main)
