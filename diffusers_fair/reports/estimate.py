"""A mean over prompts with its uncertainty, as reports store and show it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from diffusers_fair import metrics

DIGITS = 3  # decimals shown; values that are equal to as many decimals are tied
GAP = "-"  # shown where there is no estimate

Interval = tuple[float, float]


@dataclass(frozen=True)
class Estimate:
    """A mean over prompts and its uncertainty, rounded as in report.json."""

    mean: float
    std: float | None
    """Standard deviation over these prompts, not an estimate for other prompts; None if a single
    prompt has no such value."""
    interval: Interval | None
    """95 % bootstrap interval of the mean over prompts; None if there is only one prompt."""
    n: int
    """Number of prompts."""

    @classmethod
    def over(cls, values: Sequence[float] | np.ndarray) -> "Estimate | None":
        """Estimate the mean of one value per prompt, ignoring NaN; None without any value."""
        finite = np.asarray(values, float)
        finite = finite[np.isfinite(finite)]
        if not len(finite):
            return None
        interval = rounded_interval(metrics.bootstrap_interval(finite))
        return cls(rounded(finite.mean()), rounded(finite.std()), interval, len(finite))

    @classmethod
    def from_json(cls, root: Mapping[str, Any] | None) -> "Estimate | None":
        """Read what `json` or, for groups of prompts, `dataclasses.asdict` wrote."""
        if root is None:
            return None
        n = root["n"] if "n" in root else root["prompts"]
        return cls(root["mean"], root["std"], interval_from_json(root["interval"]), n)

    def json(self) -> dict[str, Any]:
        """Return the JSON object that report.json holds in its summary."""
        interval = None if self.interval is None else list(self.interval)
        return {"mean": self.mean, "std": self.std, "interval": interval, "prompts": self.n}

    @property
    def mean_and_std(self) -> str:
        """For example `0.671 ± 0.281`."""
        spread = "" if self.std is None else f" ± {self.std:.{DIGITS}f}"
        return f"{self.mean:.{DIGITS}f}{spread}"

    def __str__(self) -> str:
        """For example `0.671 ± 0.281 [0.592, 0.744]`."""
        return self.mean_and_std + interval_text(self.interval)


def estimate_text(estimate: Estimate | None) -> str:
    """Format an estimate for the console, Markdown and cards; a dash if there is none."""
    return GAP if estimate is None else str(estimate)


def interval_text(interval: Interval | None) -> str:
    """Format an interval, for example ` [0.592, 0.744]`; empty if there is none."""
    if interval is None:
        return ""
    low, high = interval
    return f" [{low:.{DIGITS}f}, {high:.{DIGITS}f}]"


def rounded(value: Any) -> float:
    """Round to the six decimals of report.json."""
    return round(float(value), 6)


def rounded_interval(interval: Interval | None) -> Interval | None:
    """Round both ends like `rounded`."""
    return None if interval is None else (rounded(interval[0]), rounded(interval[1]))


def interval_from_json(ends: Sequence[float] | None) -> Interval | None:
    """Read an interval, which JSON holds as a list."""
    return None if ends is None else (ends[0], ends[1])
