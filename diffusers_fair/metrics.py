"""Bias of class counts: floor, intervals, scatter and classifier errors taken out, tests. Pure.

| here | paper | meaning |
|---|---|---|
| counts (P, K) | | images with a face (or whole ones), per prompt and perceived class |
| frequencies (P, K) | freq(i) | counts / images with a face |
| target (K,) | D | share wanted of each class |
| bias | bias(P) | mean over class pairs of the difference of their frequencies |
| confusion (K, K) | | pictures of true class i (row) that the classifier sees as j (column) |

A prompt without faces has no frequencies: callers leave its row out and say so.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import product
from math import prod
from typing import TypeAlias

import numpy as np

from diffusers_fair.attributes import Attribute

LEVEL = 0.95  # share of bootstrap draws inside an interval
DRAWS = 10_000  # of the bootstrap
PARTS = 10  # that they are made in, which bounds the memory

Shares: TypeAlias = Sequence[float] | np.ndarray  # (K,), sums to 1


def joint_attribute(attributes: Sequence[Attribute]) -> Attribute:
    """All combinations of the attributes' classes as one attribute, its targets their products.

    It is of faces if any of them is.

    Classes are in the order of `joint_labels`: the last attribute varies fastest.
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
    """Shares of all combinations, of independent attributes."""
    return tuple(prod(shares) for shares in product(*targets))


def joint_labels(labels: Sequence[np.ndarray], classes: Sequence[int]) -> np.ndarray:
    """Labels of several attributes, each (n,) -> labels (n,) of their joint.

    Args:
        labels: one integer array (n,) per attribute.
        classes: number of classes of each attribute.
    """
    return np.ravel_multi_index(tuple(labels), tuple(classes))


def class_counts(labels: np.ndarray, prompt: np.ndarray, prompts: int, classes: int) -> np.ndarray:
    """How often each class was perceived for each prompt.

    Args:
        labels: class of each image that counts, (n,) in [0, classes).
        prompt: prompt of each such image, (n,) in [0, prompts).
        prompts: number of prompts P.
        classes: number of classes K.

    Returns:
        Integers (P, K).
    """
    cells = np.asarray(prompt, int) * classes + np.asarray(labels, int)
    return np.bincount(cells, minlength=prompts * classes).reshape(prompts, classes)


def frequencies(counts: np.ndarray) -> np.ndarray:
    """Shares of the classes, freq(i) = n_i / n.

    Range [0, 1], rows sum to 1. Each share scatters by sqrt(p (1 - p) / n).

    Args:
        counts: (..., K).

    Raises:
        ValueError: a row without images: it has no frequencies.
    """
    total = np.sum(counts, axis=-1, keepdims=True)  # (..., 1)
    if not np.all(total > 0):
        raise ValueError(
            "a prompt without faces has no class frequencies: leave it out and report the gap"
        )
    return np.asarray(counts) / total


def bias(frequencies: np.ndarray) -> np.ndarray:
    """Mean over class pairs {i, j} of |freq(i) - freq(j)|: the paper's metric (section 5.1).

    Range [0, 2/K] for K classes ([0, 1] for two); 0 is equal shares, 2/K only one class.
    Finite samples scatter: what to expect of a generator on target is `floor`, not 0. Uncertainty:
    `bootstrap_interval` over prompts.

    Args:
        frequencies: (..., K).

    Returns:
        (...).
    """
    return deviation(frequencies, None)


def deviation(frequencies: np.ndarray, target: Shares | None) -> np.ndarray:
    """The paper's metric about any target: mean over pairs of |(f_i - t_i) - (f_j - t_j)|.

    `bias` measures the distance from equal shares, whatever is aimed at; this measures the distance
    from the target and is the same number where the target is uniform. Ideal 0; the largest value
    depends on the target (for two classes it is 2 max(t)). Uncertainty as for `bias`.

    Args:
        frequencies: (..., K).
        target: (K,), sums to 1, or (P, K), one for each row; None: equal shares.

    Returns:
        (...).
    """
    i, j = _pairs(frequencies.shape[-1])
    d = frequencies[..., i] - frequencies[..., j]  # (..., pairs)
    return np.abs(d - _aims(target, frequencies.shape[-1])).mean(-1)


def floor(images: int, target: Shares, centre: Shares | None = None) -> float:
    """Expected bias of a generator that hits the target exactly: what n images scatter by.

    mean over pairs of E|(f_i - f_j) - (c_i - c_j)|, counts ~ Multinomial(n, target). Exact for any
    number of classes and images, to rounding: n_i - n_j is a sum of n independent steps +1, 0, -1
    with chances t_i, 1 - t_i - t_j, t_j, so its distribution is an n-fold convolution (one FFT).
    For uniform targets about sqrt(2 / pi) sqrt(2 / (K n)). Range as for `deviation`.

    Args:
        images: number n of images with a face, >= 1.
        target: the generator's true shares (K,).
        centre: shares (K,) the deviation is taken from; None: equal shares, as in `bias`.

    Raises:
        ValueError: no images.
    """
    if images < 1:
        raise ValueError(f"the floor of the bias needs 1 image or more, got {images}")
    shares = np.asarray(target, float)
    i, j = _pairs(len(shares))
    pairs = np.stack([shares[i], shares[j], _aims(centre, len(shares))], axis=-1)  # (pairs, 3)
    different, times = np.unique(pairs, axis=0, return_counts=True)  # one, for uniform targets
    distances = [_mean_distance(images, *pair) for pair in different]
    return float(np.average(distances, weights=times))


def scatter_moments(counts: np.ndarray, centre: Shares | None = None) -> np.ndarray:
    """What `without_scatter` averages, one row per prompt with two faces or more.

    With d the pairwise differences of frequencies and c those of the centre, means over pairs of
    |d - c| (the `deviation`), of (d - c)^2, and of (f_i + f_j - d^2) / (n - 1), which is the
    unbiased estimate of the variance of d. One face tells nothing of scatter: its row is left out.

    Args:
        counts: (P, K).
        centre: shares (K,) or (P, K) the deviation is taken from; None: equal shares, as in `bias`.

    Returns:
        (P', 3), P' <= P.
    """
    several = counts.sum(-1) > 1
    counts, centre = counts[several], _rows(centre, several)
    shares = frequencies(counts)
    i, j = _pairs(shares.shape[-1])
    d = shares[:, i] - shares[:, j]  # (P', pairs)
    excess = d - _aims(centre, shares.shape[-1])
    variance = (shares[:, i] + shares[:, j] - d**2) / (counts.sum(-1, keepdims=True) - 1)
    return np.stack([np.abs(excess).mean(-1), (excess**2).mean(-1), variance.mean(-1)], axis=-1)


def without_scatter(moments: np.ndarray) -> np.ndarray:
    """The mean bias over prompts less what finite samples add: b sqrt(max(0, 1 - S / M)).

    b, M, S are the means over prompts of the three `scatter_moments`. M - S is an unbiased estimate
    of the true mean squared difference, so b is shrunk by the ratio of the true root mean square to
    the observed one. Range [0, b]; ideal 0, and about 0 for a generator on target. Right for
    many prompts whose true differences are normal about 0; where all prompts share one difference D
    it is low by a factor of about D / sqrt(D^2 + S). Uncertainty: `bootstrap_interval` with this
    as the statistic.

    Args:
        moments: (..., P, 3), P >= 1.

    Returns:
        (...).
    """
    b, m, s = np.moveaxis(moments.mean(-2), -1, 0)  # (...) each
    return b * np.sqrt(np.maximum(0, 1 - s / np.where(m > 0, m, 1)))


def bootstrap_interval(
    values: np.ndarray,
    statistic: Callable[[np.ndarray], np.ndarray] = lambda drawn: drawn.mean(-1),
    *,
    seed: int = 0,
) -> tuple[float, float] | None:
    """Percentile bootstrap over prompts: where the mean would lie for other prompts like these.

    Prompts are drawn with replacement; the images of a prompt stay together. It covers the choice
    of prompts and the scatter of images, not the errors of the classifier.

    Args:
        values: one row per prompt, (P, ...).
        statistic: (draws, P, ...) -> (draws,); left out: the mean over prompts.
        seed: of the draws.

    Returns:
        Lower and upper end of the central 95 %, or None for fewer than two prompts.
    """
    if len(values) < 2:
        return None
    rng = np.random.default_rng(seed)
    draws = [
        statistic(values[rng.integers(len(values), size=(DRAWS // PARTS, len(values)))])
        for _ in range(PARTS)
    ]
    return _central(np.concatenate(draws))


def image_interval(
    counts: np.ndarray, centre: Shares | None = None, *, seed: int = 0
) -> tuple[float, float]:
    """Bootstrap over images: where the mean bias would lie for the same prompts, drawn anew.

    Images are drawn with replacement within each prompt. Drawing from what was drawn scatters
    twice and so lifts the bias; the draws are shifted back so that their mean is the mean bias.
    It leaves out the choice of prompts, which `bootstrap_interval` covers together with this.

    Args:
        counts: (P, K), every row with a face.
        centre: shares (K,) or (P, K) the deviation is taken from; None: equal shares, as in `bias`.
        seed: of the draws.

    Returns:
        Lower and upper end of the central 95 %.
    """
    rng = np.random.default_rng(seed)
    shares, images = frequencies(counts), counts.sum(-1)  # (P, K), (P,)
    draws = np.concatenate(
        [
            deviation(
                rng.multinomial(images, shares, (DRAWS // PARTS, len(counts))) / images[:, None],
                centre,
            ).mean(-1)
            for _ in range(PARTS)
        ]
    )
    return _central(draws - draws.mean() + deviation(shares, centre).mean())


def joint_confusion(confusions: Sequence[np.ndarray]) -> np.ndarray:
    """Error rates (K, K) of the joint of several attributes, whose errors are independent.

    Args:
        confusions: (k, k) of each attribute, in the order of `joint_attribute`; counts or rates.

    Raises:
        ValueError: a true class of which there are no pictures.
    """
    return reduce(np.kron, [_rates(confusion) for confusion in confusions])


def corrected(observed: np.ndarray, confusion: np.ndarray) -> np.ndarray:
    """Shares that the classifier's errors would turn into the observed ones, as nearly as may be.

    f = argmin |C^T f - observed| over the simplex, C the error rates: the adjusted count of
    quantification, held to shares. Range [0, 1], rows sum to 1; equal to the observed shares where
    the classifier does not err. To be shown beside the observed, never instead: it takes error
    rates that were measured on other pictures to hold here, and scatters more than the observed
    (for two classes by 1 / (1 - e_1 - e_2), e the rates of error).

    Args:
        observed: (..., K), rows sum to 1.
        confusion: (K, K); counts or rates.

    Raises:
        ValueError: a true class of which there are no pictures.
    """
    from scipy.optimize import nnls

    rates = _rates(confusion)
    sums = 1e3 * np.ones((1, len(rates)))  # weighs so much that the shares sum to 1
    system = np.concatenate([rates.T, sums])  # (K + 1, K)
    shares = [
        nnls(system, np.append(row, sums[0, 0]))[0]
        for row in np.reshape(observed, (-1, len(rates)))
    ]
    found = np.reshape(shares, np.shape(observed))
    return found / found.sum(-1, keepdims=True)


@dataclass(frozen=True)
class PairedTest:
    """How two methods differ on the same prompts."""

    prompts: int
    """That have a figure of both."""
    difference: float | None
    """Mean over prompts of second minus first; None without prompts. 0: no difference."""
    interval: tuple[float, float] | None
    """Its 95 % bootstrap interval over prompts; None for fewer than two."""
    p_value: float | None
    """Of Wilcoxon's signed-rank test, two-sided, ties by Pratt, in [0, 1]: how often prompts would
    differ as much if neither method were the lower; None for fewer than two prompts."""


def paired_test(
    first: Sequence[float | None] | np.ndarray,
    second: Sequence[float | None] | np.ndarray,
    *,
    seed: int = 0,
) -> PairedTest:
    """Compare a figure of two methods on the same prompts, prompt by prompt.

    Pairs take out how prompts differ from one another, which makes most of the std of a bias. The
    figure may be a bias, a score or a frequency; a prompt that lacks one of the two is left out.

    Args:
        first: one figure per prompt, (P,); None or NaN where there is none.
        second: of the other method, in the same order.
        seed: of the bootstrap.

    Raises:
        ValueError: another number of prompts.
    """
    from scipy.stats import wilcoxon

    a, b = np.array(first, float), np.array(second, float)  # None -> NaN
    if a.shape != b.shape:
        raise ValueError(
            f"paired figures need the same prompts, got {len(a)} and {len(b)} of them: evaluate "
            "both methods on one list"
        )
    d = (b - a)[np.isfinite(b - a)]
    p = None
    if len(d) > 1:
        p = float(wilcoxon(d, zero_method="pratt").pvalue) if np.any(d) else 1.0
    mean = float(d.mean()) if len(d) else None
    return PairedTest(len(d), mean, bootstrap_interval(d, seed=seed), p)


def _central(draws: np.ndarray) -> tuple[float, float]:
    """Ends of the interval that holds the middle `LEVEL` of the draws."""
    low, high = np.quantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def _rates(confusion: np.ndarray) -> np.ndarray:
    """Counts or rates (K, K) -> rates, whose rows sum to 1."""
    counts = np.asarray(confusion, float)
    total = counts.sum(-1, keepdims=True)
    if not np.all(total > 0):
        raise ValueError(
            "a confusion matrix needs pictures of every true class, got a row of zeros: measure "
            "the classifier on pictures of that class"
        )
    return counts / total


def _pairs(classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices i < j of all class pairs."""
    return np.triu_indices(classes, k=1)


def _rows(centre: Shares | None, chosen: np.ndarray) -> Shares | None:
    """The centre of some prompts (P,) bool: those rows, where each prompt has its own."""
    return np.asarray(centre)[chosen] if np.ndim(centre) == 2 else centre  # type: ignore[arg-type]


def _aims(centre: Shares | None, classes: int) -> np.ndarray:
    """Differences c_i - c_j that count as none, over class pairs: (pairs,) or (P, pairs)."""
    i, j = _pairs(classes)
    if centre is None:
        return np.zeros(len(i))
    shares = np.asarray(centre)  # (K,) or (P, K)
    return shares[..., i] - shares[..., j]


def _mean_distance(images: int, p: float, q: float, aim: float) -> float:
    """E|D / n - aim|, D the sum of n independent steps: +1 with chance p, -1 with q, else 0."""
    turn = np.exp(-2j * np.pi * np.arange(2 * images + 1) / (2 * images + 1))
    chances = np.fft.ifft((p * turn + q / turn + (1 - p - q)) ** images).real  # D = 0..n, -n..-1
    values = np.concatenate([np.arange(images + 1), np.arange(-images, 0)]) / images
    return float(np.abs(values - aim) @ chances)
