"""What a run reports while it trains: metrics, curves and a progress bar."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from diffusers_fair.objective.statistics import BatchStatistics


@dataclass(frozen=True, kw_only=True)
class IterationStatistics:
    """Statistics of one update."""

    batch: BatchStatistics | None
    """None: its images were not finite."""
    gradient_norm: float
    """Before clipping."""
    skipped: int
    """Updates skipped so far, this one included."""

    def metrics(self) -> dict[str, float]:
        """Return name -> value, as they are logged."""
        batch = {} if self.batch is None else self.batch.metrics()
        return batch | {"gradient": self.gradient_norm, "skipped": self.skipped}


@contextmanager
def tracker(accelerator: Any, step: int) -> Iterator[Callable[[dict[str, float], int], None]]:
    """Yield a function (metrics, step) that passes metrics to the recipe's tracker, if any.

    Args:
        accelerator: accelerate's, made with that tracker.
        step: iterations done; curves that continue after it are cut.
    """
    accelerator.init_trackers("run", init_kwargs={"tensorboard": {"purge_step": step + 1}})
    try:
        yield lambda metrics, step: accelerator.log(metrics, step=step)
    finally:
        for each in accelerator.trackers:
            each.finish()


@contextmanager
def progress_bar(
    step: int, total: int, is_shown: bool
) -> Iterator[Callable[[IterationStatistics], None]]:
    """Yield a function that advances a progress bar, which shows running means."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    running: dict[str, float] = {}

    def advance(statistics: IterationStatistics) -> None:
        for name, value in _shown(statistics.batch).items():
            running[name] = 0.9 * running.get(name, value) + 0.1 * value
        text = "  ".join(f"{name} {value:.2f}" for name, value in running.items())
        if statistics.skipped:
            text += f"  skipped {statistics.skipped:.0f}"
        progress.update(task, advance=1, description=text)

    columns = (
        TextColumn("training"),
        BarColumn(20),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, disable=not is_shown) as progress:
        task = progress.add_task("", completed=step, total=total)
        yield advance


def _shown(batch: BatchStatistics | None) -> dict[str, float]:
    if batch is None:
        return {}
    losses = {name: batch.losses[name] for name in ("alignment", "semantics")}
    return losses | {name: classes.bias for name, classes in batch.attributes.items()}
