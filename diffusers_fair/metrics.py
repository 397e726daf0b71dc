"""Bias of class counts: noise floor, intervals, corrections and tests. Pure functions.

| here | paper | meaning |
|---|---|---|
| counts (P, K) | | images with a face (or all images), per prompt and perceived class |
| frequencies (P, K) | freq(i) | counts / images with a face |
| target (K,) | D | target share of each class |
| bias | bias(P) | mean over class pairs of the difference of their frequencies |
| confusion (K, K) | | images of true class i (row) that the classifier assigns to j (column) |

A prompt without faces has no frequencies. Callers leave its row out and report that they did.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import product
from math import prod
from typing import TypeAlias

import numpy as np

from diffusers_fair.attributes import Attribute

_LEVEL = 0.95  # confidence level of all intervals
_RESAMPLES = 10_000  # bootstrap resamples
_BATCH = 1_000  # resamples computed at once, to bound the memory

Shares: TypeAlias = Sequence[float] | np.ndarray  # (K,), sums to 1


def joint_attribute(attributes: Sequence[Attribute]) -> Attribute:
    """Combine attributes into one whose classes are all combinations of theirs.

    The targets are multiplied, as for independent attributes. The result is an attribute of faces
    if any of the attributes is. Its classes are in the order of `joint_labels`: the last attribute
    varies fastest.
    """
    return Attribute(
        name=" x ".join(a.name for a in attributes),
        classes=tuple(", ".join(c) for c in product(*(a.classes for a in attributes))),
        target=_products([a.target for a in attributes]),
        targets={
            prompt: _products([a.target_of(prompt) for a in attributes])
            for prompt in dict.fromkeys(prompt for a in attributes for prompt in a.targets)
        },
        region="face" if any(a.of_faces for a in attributes) else "image",
    )


def _products(targets: Sequence[tuple[float, ...]]) -> tuple[float, ...]:
    """Multiply the shares of independent attributes."""
    return tuple(prod(shares) for shares in product(*targets))


def joint_labels(labels: Sequence[np.ndarray], classes: Sequence[int]) -> np.ndarray:
    """Combine the labels (n,) of several attributes into the labels (n,) of their joint.

    Args:
        labels: one integer array (n,) per attribute.
        classes: number of classes of each attribute.
    """
    return np.ravel_multi_index(tuple(labels), tuple(classes))


def class_counts(labels: np.ndarray, prompt: np.ndarray, prompts: int, classes: int) -> np.ndarray:
    """Count how often each class was perceived for each prompt.

    Args:
        labels: class of each counted image, (n,) in [0, classes).
        prompt: prompt of each counted image, (n,) in [0, prompts).
        prompts: number of prompts P.
        classes: number of classes K.

    Returns:
        Integers (P, K).
    """
    cells = np.asarray(prompt, int) * classes + np.asarray(labels, int)
    return np.bincount(cells, minlength=prompts * classes).reshape(prompts, classes)


def frequencies(counts: np.ndarray) -> np.ndarray:
    """Compute the shares of the classes, freq(i) = n_i / n.

    Range [0, 1]; rows sum to 1. The standard error of a share is sqrt(p (1 - p) / n).

    Args:
        counts: (..., K).

    Raises:
        ValueError: a row has no images.
    """
    total = np.sum(counts, axis=-1, keepdims=True)  # (..., 1)
    if not np.all(total > 0):
        raise ValueError(
            "a prompt without faces has no class frequencies: leave it out and report the gap"
        )
    return np.asarray(counts) / total


def bias(frequencies: np.ndarray) -> np.ndarray:
    """Mean over class pairs {i, j} of |freq(i) - freq(j)|: the paper's metric (section 5.1).

    Range [0, 2/K] for K classes ([0, 1] for two); 0 means equal shares, 2/K a single class. The
    expected value for a generator on target is not 0 but `noise_floor`, because frequencies of
    finite samples vary. Uncertainty: `bootstrap_interval` over prompts.

    Args:
        frequencies: (..., K).

    Returns:
        (...).
    """
    return deviation(frequencies, None)


def deviation(frequencies: np.ndarray, target: Shares | None) -> np.ndarray:
    """Deviation from the target: mean over class pairs of |(f_i - t_i) - (f_j - t_j)|.

    `bias` measures the distance from equal shares, whatever the target is. The deviation measures
    the distance from the target, and equals the bias if the target is uniform. Ideal 0; the largest
    value depends on the target (for two classes it is 2 max(t)). Uncertainty as for `bias`.

    Args:
        frequencies: (..., K).
        target: (K,), or (P, K) with one for each row; None: equal shares.

    Returns:
        (...).
    """
    i, j = _pairs(frequencies.shape[-1])
    d = frequencies[..., i] - frequencies[..., j]  # (..., pairs)
    return np.abs(d - _differences(target, frequencies.shape[-1])).mean(-1)


def noise_floor(images: int, target: Shares, centre: Shares | None = None) -> float:
    """Expected bias, over n images, of a generator that is exactly on target.

    It is the mean over pairs of E|(f_i - f_j) - (c_i - c_j)|, with counts ~ Multinomial(n, target).
    The value is exact up to rounding: n_i - n_j is a sum of n independent steps +1, 0, -1 with
    probabilities t_i, 1 - t_i - t_j, t_j, so its distribution is an n-fold convolution (one FFT).
    Summing scipy's multinomial over all outcomes would take O(n^2) terms for each pair. For uniform
    targets it is about sqrt(2 / pi) sqrt(2 / (K n)). Range as for `deviation`.

    Args:
        images: number n of images with a face, >= 1.
        target: the generator's true shares (K,).
        centre: shares (K,) that the deviation is measured from; None: equal shares, as in `bias`.

    Raises:
        ValueError: `images` is below 1.
    """
    if images < 1:
        raise ValueError(f"the noise floor of the bias needs 1 image or more, got {images}")
    shares = np.asarray(target, float)
    i, j = _pairs(len(shares))
    pairs = np.stack(
        [shares[i], shares[j], _differences(centre, len(shares))], axis=-1
    )  # (pairs, 3)
    distinct, multiplicity = np.unique(pairs, axis=0, return_counts=True)  # one if uniform
    distances = [_expected_distance(images, *pair) for pair in distinct]
    return float(np.average(distances, weights=multiplicity))


def bias_moments(counts: np.ndarray, centre: Shares | None = None) -> np.ndarray:
    """Compute the moments of each prompt's bias that `without_sampling_variance` needs.

    With d the pairwise differences of the frequencies and c those of the centre, the moments are
    means over class pairs: of |d - c| (the `deviation`), of (d - c)^2, and of
    (f_i + f_j - d^2) / (n - 1), an unbiased estimate of the variance of d. The third needs two
    images, so prompts with fewer are left out.

    Args:
        counts: (P, K).
        centre: shares (K,) or (P, K) that the deviation is measured from; None: equal shares.

    Returns:
        (P', 3), P' <= P.
    """
    several = counts.sum(-1) > 1
    counts, centre = counts[several], _rows(centre, several)
    shares = frequencies(counts)
    i, j = _pairs(shares.shape[-1])
    d = shares[:, i] - shares[:, j]  # (P', pairs)
    excess = d - _differences(centre, shares.shape[-1])
    variance = (shares[:, i] + shares[:, j] - d**2) / (counts.sum(-1, keepdims=True) - 1)
    return np.stack([np.abs(excess).mean(-1), (excess**2).mean(-1), variance.mean(-1)], axis=-1)


def without_sampling_variance(
    deviation: np.ndarray, square: np.ndarray, variance: np.ndarray, axis: int = -1
) -> np.ndarray:
    """Estimate the mean bias over prompts without sampling variance: b sqrt(max(0, 1 - S / M)).

    b, M, S are the means over prompts of the three `bias_moments`. M - S is an unbiased estimate
    of the true mean squared difference, so b is shrunk by the ratio of the true root mean square to
    the observed one. Range [0, b]; ideal 0, and about 0 for a generator on target. The estimate is
    consistent for many prompts whose true differences are normal about 0. If all prompts share one
    difference D, it is too low by a factor of about D / sqrt(D^2 + S). Uncertainty:
    `bootstrap_interval` with this function as the statistic.

    Args:
        deviation: first moment of each prompt, (..., P), P >= 1.
        square: second moment, (..., P).
        variance: third moment, (..., P).
        axis: axis of the prompts.

    Returns:
        (...).
    """
    b, m, s = (moment.mean(axis) for moment in (deviation, square, variance))  # (...) each
    return b * np.sqrt(np.maximum(0, 1 - s / np.where(m > 0, m, 1)))


def bootstrap_interval(
    *values: np.ndarray, statistic: Callable[..., np.ndarray] = np.mean, seed: int = 0
) -> tuple[float, float] | None:
    """Compute a percentile bootstrap interval over prompts.

    Prompts are resampled with replacement; the images of a prompt stay together. The interval
    covers the choice of prompts and the sampling variance of images, not the classifier's errors.

    Args:
        values: one or more arrays with a value for each prompt, (P,) each.
        statistic: called as statistic(*values, axis=-1); default: the mean over prompts.
        seed: seed of the resampling.

    Returns:
        Lower and upper end of the central 95 %, or None for fewer than two prompts.
    """
    from scipy.stats import bootstrap

    if len(values[0]) < 2:
        return None
    low, high = bootstrap(
        values,
        statistic,
        n_resamples=_RESAMPLES,
        batch=_BATCH,
        vectorized=True,
        paired=True,
        confidence_level=_LEVEL,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return float(low), float(high)


def image_interval(
    counts: np.ndarray, centre: Shares | None = None, *, seed: int = 0
) -> tuple[float, float]:
    """Compute a bootstrap interval of the mean bias over the images of the same prompts.

    Images are resampled with replacement within each prompt. Resampling doubles the sampling
    variance, which raises the bias; the resampled means are therefore shifted so that their mean is
    the observed mean bias. The interval does not cover the choice of prompts, as
    `bootstrap_interval` does.

    Args:
        counts: (P, K), with at least one image in every row.
        centre: shares (K,) or (P, K) that the deviation is measured from; None: equal shares.
        seed: seed of the resampling.

    Returns:
        Lower and upper end of the central 95 %.
    """
    rng = np.random.default_rng(seed)
    shares, images = frequencies(counts), counts.sum(-1)  # (P, K), (P,)
    means = np.concatenate(
        [
            deviation(
                rng.multinomial(images, shares, (_BATCH, len(counts))) / images[:, None], centre
            ).mean(-1)
            for _ in range(_RESAMPLES // _BATCH)
        ]
    )
    centred = means - means.mean() + deviation(shares, centre).mean()
    low, high = np.quantile(centred, [(1 - _LEVEL) / 2, (1 + _LEVEL) / 2])
    return float(low), float(high)


def joint_confusion(confusions: Sequence[np.ndarray]) -> np.ndarray:
    """Error rates (K, K) of the joint of several attributes with independent errors.

    Args:
        confusions: (k, k) of each attribute, in the order of `joint_attribute`; counts or rates.

    Raises:
        ValueError: a true class has no images.
    """
    return reduce(np.kron, [_rates(confusion) for confusion in confusions])


def corrected(observed: np.ndarray, confusion: np.ndarray) -> np.ndarray:
    """Estimate the true shares, given the observed ones and the classifier's error rates.

    f = argmin |C^T f - observed| over the simplex, with error rates C. The quantification
    literature calls it adjusted count. Range [0, 1]; rows sum to 1. The result equals the observed
    shares if the classifier makes no errors. Show it beside the observed shares, never instead: it
    assumes that error rates measured on other images hold here, and has a larger variance (for two
    classes with error rates e, its std is larger by the factor 1 / (1 - e_1 - e_2)).

    Args:
        observed: (..., K), rows sum to 1.
        confusion: (K, K); counts or rates.

    Raises:
        ValueError: a true class has no images.
    """
    from scipy.optimize import nnls

    rates = _rates(confusion)
    sums = 1e3 * np.ones((1, len(rates)))  # a weight so large that the shares sum to 1
    system = np.concatenate([rates.T, sums])  # (K + 1, K)
    solutions = [
        nnls(system, np.append(row, sums[0, 0]))[0]
        for row in np.reshape(observed, (-1, len(rates)))
    ]
    shares = np.reshape(solutions, np.shape(observed))
    return shares / shares.sum(-1, keepdims=True)


@dataclass(frozen=True)
class PairedTest:
    """Difference of two methods on the same prompts."""

    prompts: int
    """Number of prompts that have a value for both methods."""
    difference: float | None
    """Mean over prompts of second minus first; None without prompts."""
    interval: tuple[float, float] | None
    """95 % bootstrap interval of the difference over prompts; None for fewer than two."""
    p_value: float | None
    """p-value in [0, 1] of Wilcoxon's signed-rank test, two-sided, with Pratt's treatment of ties;
    None for fewer than two prompts."""


def paired_test(
    first: Sequence[float | None] | np.ndarray,
    second: Sequence[float | None] | np.ndarray,
    *,
    seed: int = 0,
) -> PairedTest:
    """Compare a metric of two methods on the same prompts, prompt by prompt.

    Pairing removes the differences between prompts, which dominate the variance of a bias. The
    metric may be a bias, a score or a frequency. A prompt that lacks one of the two values is left
    out.

    Args:
        first: one value per prompt, (P,); None or NaN if it is missing.
        second: values of the other method, in the same order.
        seed: seed of the bootstrap.

    Raises:
        ValueError: the numbers of prompts differ.
    """
    from scipy.stats import wilcoxon

    a, b = np.array(first, float), np.array(second, float)  # None -> NaN
    if a.shape != b.shape:
        raise ValueError(
            f"paired values need the same prompts, got {len(a)} and {len(b)} of them: evaluate "
            "both methods on one list"
        )
    d = (b - a)[np.isfinite(b - a)]
    p = None
    if len(d) > 1:
        p = float(wilcoxon(d, zero_method="pratt").pvalue) if np.any(d) else 1.0
    mean = float(d.mean()) if len(d) else None
    return PairedTest(len(d), mean, bootstrap_interval(d, seed=seed), p)


def _rates(confusion: np.ndarray) -> np.ndarray:
    """Normalize rows of counts or rates (K, K) to sum to 1."""
    counts = np.asarray(confusion, float)
    total = counts.sum(-1, keepdims=True)
    if not np.all(total > 0):
        raise ValueError(
            "a confusion matrix needs images of every true class, got a row of zeros: measure "
            "the classifier on images of that class"
        )
    return counts / total


def _pairs(classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices i < j of all class pairs."""
    return np.triu_indices(classes, k=1)


def _rows(centre: Shares | None, chosen: np.ndarray) -> Shares | None:
    """Select rows by a mask (P,) from a centre that has a row per prompt."""
    return np.asarray(centre)[chosen] if np.ndim(centre) == 2 else centre  # type: ignore[arg-type]


def _differences(centre: Shares | None, classes: int) -> np.ndarray:
    """Differences c_i - c_j of the centre's shares: (pairs,) or (P, pairs)."""
    i, j = _pairs(classes)
    if centre is None:
        return np.zeros(len(i))
    shares = np.asarray(centre)  # (K,) or (P, K)
    return shares[..., i] - shares[..., j]


def _expected_distance(images: int, p: float, q: float, centre: float) -> float:
    """E|D / n - centre| for D, the sum of n independent steps: +1 (chance p), -1 (q) or 0."""
    turn = np.exp(-2j * np.pi * np.arange(2 * images + 1) / (2 * images + 1))
    chances = np.fft.ifft((p * turn + q / turn + (1 - p - q)) ** images).real  # D = 0..n, -n..-1
    values = np.concatenate([np.arange(images + 1), np.arange(-images, 0)]) / images
    return float(np.abs(values - centre) @ chances)
