"""Callbacks: code of the user that runs during training, in the main process."""

from pathlib import Path

from diffusers_fair.reports.report import Report
from diffusers_fair.training.progress import IterationStatistics
from diffusers_fair.training.validation import ValidationResult


class TrainingCallback:
    """Base class of callbacks, whose methods do nothing; override those that you need.

    class Plot(TrainingCallback):
        def on_iteration(self, step, statistics):
            plot(step, statistics.metrics()["loss"])

    finetuner = FairnessFinetuner.from_recipe("my-recipe.yaml", callbacks=[Plot()])

    All methods are called in the main process only. An error in a callback stops the training,
    which can be resumed from its last checkpoint.
    """

    def on_iteration(self, step: int, statistics: IterationStatistics) -> None:
        """Follow an iteration.

        Args:
            step: number of updates made, 1 after the first iteration.
            statistics: losses, class shares and gradient norm; `statistics.metrics()` has them by
                name.
        """

    def on_validation(self, step: int, result: ValidationResult, report: Report) -> None:
        """Follow a validation.

        Args:
            step: number of updates made.
            result: bias and CLIP-T, and whether the adapter is the best so far.
            report: the whole evaluation; `report.samples` has sample images of some prompts.
        """

    def on_checkpoint(self, step: int, folder: Path) -> None:
        """Follow a checkpoint.

        Args:
            step: number of updates made.
            folder: the run folder, with `checkpoints/` in it.
        """
