"""Progress of a training run: statistics and progress bar."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from diffusers_fair.console import progress_console
from diffusers_fair.objective.statistics import BatchStatistics
from diffusers_fair.verbosity import shows_progress


@dataclass(frozen=True, kw_only=True)
class IterationStatistics:
    """Statistics of one update."""

    batch: BatchStatistics | None
    """Statistics of the batch; None if its images were not finite."""
    gradient_norm: float
    """Gradient norm before clipping."""
    skipped: int
    """Number of updates skipped so far, including this one."""

    def metrics(self) -> dict[str, float]:
        """Return name -> value, as they are logged."""
        batch = {} if self.batch is None else self.batch.metrics()
        return batch | {"gradient": self.gradient_norm, "skipped": self.skipped}


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
        TextColumn("{task.description}", markup=False),
    )
    is_shown = is_shown and shows_progress()
    with Progress(*columns, console=progress_console(), disable=not is_shown) as progress:
        task = progress.add_task("", completed=step, total=total)
        yield advance


def _shown(batch: BatchStatistics | None) -> dict[str, float]:
    if batch is None:
        return {}
    losses = {name: batch.losses[name] for name in ("alignment", "semantics")}
    return losses | {name: classes.bias for name, classes in batch.attributes.items()}
