"""What a run tells of itself: events.jsonl, curves, and a bar with running means."""

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from diffusers_fair import atomic

Figures = dict[str, float]


class Events:
    """`events.jsonl` of a run folder: a line for each iteration and each validation.

    Args:
        folder: of the run.
    """

    def __init__(self, folder: Path):
        self.file = folder / "events.jsonl"

    def cut(self, done: int) -> None:
        """Take out what comes after an iteration, and a line that was not finished."""
        if not self.file.exists():
            return
        lines = self.file.read_bytes().splitlines(keepends=True)
        kept = [line for line in lines if line.endswith(b"\n") and _iteration(line) <= done]
        if kept != lines:
            atomic.write(self.file, b"".join(kept))

    def write(self, figures: Figures, iteration: int) -> None:
        """Add a line; a figure that is not finite is left out."""
        finite = {name: value for name, value in figures.items() if math.isfinite(value)}
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"iteration": iteration, **finite}) + "\n")

    def settle(self) -> None:
        """Wait until all lines are on the disk."""
        atomic.sync(self.file)


def _iteration(line: bytes) -> float:
    """Of a line; without end for one that is damaged."""
    try:
        return json.loads(line)["iteration"]
    except (ValueError, KeyError, TypeError):
        return math.inf


@contextmanager
def tracker(accelerator: Any, done: int) -> Iterator[Callable[[Figures, int], None]]:
    """Function (figures, iteration) that hands figures to the recipe's tracker, if it has one.

    Args:
        accelerator: of accelerate, made with that tracker.
        done: iterations; curves that went on after them are cut.
    """
    accelerator.init_trackers("run", init_kwargs={"tensorboard": {"purge_step": done + 1}})
    try:
        yield lambda figures, iteration: accelerator.log(figures, step=iteration)
    finally:
        for each in accelerator.trackers:
            each.finish()


@contextmanager
def bar(done: int, total: int, shown: bool) -> Iterator[Callable[[Figures], None]]:
    """Function (figures) that moves a progress bar on; figures shown are running means."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    running: Figures = {}

    def advance(figures: Figures) -> None:
        for name, value in figures.items():
            running[name] = 0.9 * running.get(name, value) + 0.1 * value
        names = [n for n in running if n.startswith("bias/") or n in ("alignment", "semantics")]
        text = "  ".join(f"{n.removeprefix('bias/')} {running[n]:.2f}" for n in names)
        if figures["skipped"]:
            text += f"  skipped {figures['skipped']:.0f}"
        progress.update(task, advance=1, description=text)

    columns = (
        TextColumn("training"),
        BarColumn(20),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, disable=not shown) as progress:
        task = progress.add_task("", completed=done, total=total)
        yield advance
