"""Warns about training that makes no progress."""

import logging
from dataclasses import dataclass, field

from diffusers_fair.objective.statistics import BatchStatistics

logger = logging.getLogger(__name__)
_PATIENCE = 20  # successive iterations before a warning


@dataclass
class TrainingMonitor:
    """Warns once about each persistent problem."""

    streaks: dict[str, int] = field(default_factory=dict)
    """Problem -> number of successive iterations with it so far."""
    warned: set[str] = field(default_factory=set)

    def check_batch(self, statistics: BatchStatistics) -> None:
        """Check the statistics of an iteration."""
        if statistics.face_rate is not None:
            self._count(
                "no face",
                statistics.face_rate == 0,
                f"no face was found in {_PATIENCE} iterations in a row, and nothing is balanced "
                "without faces: check models.face_detector, that the prompts ask for faces, and "
                "that sampling.steps and sampling.guidance_scale give clear images",
            )
        for name, classes in statistics.attributes.items():
            self._count(
                f"attribute {name}",
                max(classes.shares) == 1,
                "every face, or image, was assigned the same class of "
                f"'{name}' in {_PATIENCE} iterations in a row: check its classifier on images of "
                "each class; if it is right, raise prompts.images_per_prompt or optimizer.lr",
            )

    def check_clip_t(self, value: float, minimum: float) -> None:
        """Check the CLIP-T of a validation."""
        self._warn_once(
            "clip_t",
            value < minimum,
            f"CLIP-T fell to {value:.3f}, below {minimum:.3f}, the minimum for the best adapter: "
            "raise losses.semantics, lower optimizer.lr, or allow a larger drop with "
            "train.clip_t_drop",
        )

    def _count(self, problem: str, occurs: bool, message: str) -> None:
        self.streaks[problem] = self.streaks.get(problem, 0) + 1 if occurs else 0
        self._warn_once(problem, self.streaks[problem] >= _PATIENCE, message)

    def _warn_once(self, problem: str, occurs: bool, message: str) -> None:
        if occurs and problem not in self.warned:
            self.warned.add(problem)
            logger.warning(message)
