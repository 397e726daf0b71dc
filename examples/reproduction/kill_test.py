"""Kill a training at random moments, let it go on, and compare with one that was left alone.

    python examples/reproduction/kill_test.py --kills 40 --seed 0 --out model_cards/kill_test.json

Trains a small adapter on the testbed once without disturbance. Then, as often as asked: starts the
same training in a process of its own, kills it (SIGKILL) after a random time, starts it again, and
compares the adapters, the last checkpoint, the events and the names of all files. Writes what was
found to JSON; exit code 1 if anything differed.
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
SMALL = {  # everything that is written is written often
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
TIMES = ("seconds", "training")  # what two trainings do not have in common


def main(
    kills: Annotated[int, typer.Option(help="How often.")] = 40,
    seed: Annotated[int, typer.Option(help="Of the moments.")] = 0,
    out: Annotated[Path, typer.Option(help="JSON file.")] = Path("kill_test.json"),
) -> None:
    """Kill and compare; say what was found."""
    with tempfile.TemporaryDirectory() as folder:
        found = kill_test(kills, seed, Path(folder))
    out.write_text(json.dumps(found | {"provenance": provenance()}, indent=1) + "\n", "utf-8")
    different = [kill for kill in found["kills"] if kill["differs"]]
    print(f"{kills} kills, {kills - len(different)} trainings like the one left alone; see {out}")
    if different:
        raise typer.Exit(1)


def kill_test(kills: int, seed: int, folder: Path) -> dict[str, Any]:
    """The moments, what each left behind, and in what the outcome differs."""
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
    """One that is killed and goes on."""
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
    """Train in a process, killed after so many seconds; whether it came to its end.

    Raises:
        RuntimeError: it failed by itself.
    """
    process = multiprocessing.get_context("fork").Process(target=train, args=(folder,))
    process.start()
    process.join(moment)
    killed = process.is_alive()
    process.kill()
    process.join()
    folder.mkdir(exist_ok=True)  # killed before it could
    if not killed and process.exitcode:
        raise RuntimeError(f"the training ended with exit code {process.exitcode}")
    return not killed


def train(folder: Path) -> None:
    torch.set_num_threads(1)  # the parent's threads are not here
    overrides = SMALL | {"output": str(folder)}
    FairnessFinetuner.from_recipe(RECIPE, **overrides).train(progress=False)


def outcome(folder: Path) -> dict[str, Any]:
    """What has to be the same."""
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))
    lines = (folder / "events.jsonl").read_text("utf-8").splitlines()
    return {
        "files": files,
        "events": [timeless(json.loads(line)) for line in lines],
        "checkpoint": timeless(load_checkpoint(folder / "checkpoints") or {}),
        **{name: content(folder / name) for name in files},
    }


def content(path: Path) -> Any:
    """What a file holds; of files that are compared otherwise, nothing."""
    if path.suffix == ".safetensors":
        return load_file(path)  # the order of the metadata is left to chance
    if path.name == "fair_adapter.json":
        return timeless(json.loads(path.read_text("utf-8")))
    return path.read_bytes() if path.suffix == ".png" else None


def timeless(facts: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in facts.items() if name not in TIMES}


def same(a: Any, b: Any) -> bool:
    """Whether both are equal to the last bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


if __name__ == "__main__":
    typer.run(main)
