"""Metrics against closed forms, enumeration, simulation, fairlearn and scipy."""

from itertools import product

import numpy as np
import pytest
import scipy.optimize
import scipy.stats
from fairlearn.metrics import MetricFrame, selection_rate

from diffusers_fair import metrics
from diffusers_fair.attributes import Attribute

TARGETS = {
    "two": [0.5, 0.5],
    "three": [1 / 3] * 3,
    "eight": [1 / 8] * 8,
    "75/25": [0.75, 0.25],
    "uneven": [0.2, 0.5, 0.3],
    "with a zero": [0.0, 0.6, 0.4],
}


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def test_class_counts_and_frequencies_agree_with_fairlearn(rng):
    prompt, labels = rng.integers(5, size=400), rng.integers(3, size=400)
    shares = metrics.frequencies(metrics.class_counts(labels, prompt, 5, 3))
    for k in range(3):
        frame = MetricFrame(
            metrics=selection_rate,
            y_true=labels == k,
            y_pred=labels == k,
            sensitive_features=prompt,
        )
        np.testing.assert_allclose(shares[:, k], frame.by_group)
    two = metrics.class_counts(labels == 2, prompt, 5, 2)
    by_prompt = frame.by_group  # bias of two classes is |1 - 2 f|
    np.testing.assert_allclose(metrics.bias(metrics.frequencies(two)), abs(1 - 2 * by_prompt))


def test_a_class_or_a_prompt_never_seen_counts_zero():
    counts = metrics.class_counts(np.array([0, 0]), np.array([2, 2]), 4, 3)
    assert counts.tolist() == [[0, 0, 0], [0, 0, 0], [2, 0, 0], [0, 0, 0]]
    with pytest.raises(ValueError, match="without faces has no class frequencies"):
        metrics.frequencies(counts)


@pytest.mark.parametrize(
    ("shares", "expected"),
    [([0.5, 0.5], 0), ([1, 0], 1), ([0.8, 0.2], 0.6), ([1, 0, 0, 0], 0.5), ([0.5, 0.3, 0.2], 0.2)],
)
def test_bias_closed_forms(shares, expected):
    assert metrics.bias(np.array(shares)) == pytest.approx(expected)


def test_bias_is_half_the_gini_mean_difference(rng):
    shares = rng.dirichlet(np.ones(6), size=7)
    pairwise = abs(shares[:, :, None] - shares[:, None]).sum((1, 2)) / (6 * 5)
    np.testing.assert_allclose(metrics.bias(shares), pairwise)


def test_deviation_is_bias_about_the_target(rng):
    shares = rng.dirichlet(np.ones(4), size=7)
    np.testing.assert_allclose(metrics.deviation(shares, [0.25] * 4), metrics.bias(shares))
    target = np.array([0.4, 0.3, 0.2, 0.1])
    assert metrics.deviation(target, target) == pytest.approx(0)
    assert metrics.deviation(np.array([0.6, 0.4]), [0.75, 0.25]) == pytest.approx(0.3)


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("centred", [False, True])
def test_metrics_do_not_depend_on_the_order_of_classes(name, centred, rng):
    target = np.array(TARGETS[name])
    centre = target if centred else None
    counts = rng.multinomial(30, target, size=9)
    order = rng.permutation(len(target))
    moved = None if centre is None else centre[order]

    def figures(counts, target, centre):
        return [
            *metrics.deviation(metrics.frequencies(counts), centre),
            metrics.noise_floor(30, target, centre),
            metrics.without_sampling_variance(*metrics.bias_moments(counts, centre).T),
        ]

    np.testing.assert_allclose(
        figures(counts, target, centre),
        figures(counts[:, order], target[order], moved),
        atol=1e-12,
    )


@pytest.mark.parametrize("images", [1, 2, 7, 60])
@pytest.mark.parametrize("share", [0.5, 0.75, 1.0])
def test_noise_floor_of_two_classes_by_enumeration(images, share):
    x = np.arange(images + 1)
    chances = scipy.stats.binom.pmf(x, images, share)
    for centre in (None, [share, 1 - share]):
        values = metrics.deviation(np.stack([x, images - x], -1) / images, centre)
        assert metrics.noise_floor(images, [share, 1 - share], centre) == pytest.approx(
            chances @ values, abs=1e-12
        )


@pytest.mark.parametrize("name", TARGETS)
def test_noise_floor_of_few_images_by_enumeration_of_all_outcomes(name):
    target = np.array(TARGETS[name])
    outcomes = np.array(list(product(range(len(target)), repeat=3)))  # labels of 3 images
    chances = target[outcomes].prod(1)
    shares = np.stack([(outcomes == k).mean(1) for k in range(len(target))], -1)
    for centre in (None, target):
        expected = chances @ metrics.deviation(shares, centre)
        assert metrics.noise_floor(3, target, centre) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("name", TARGETS)
def test_noise_floor_by_simulation(name, rng):
    target = np.array(TARGETS[name])
    values = metrics.deviation(rng.multinomial(80, target, size=20_000) / 80, target)
    error = values.std() / len(values) ** 0.5
    assert metrics.noise_floor(80, target, target) == pytest.approx(
        values.mean(), abs=5 * error + 1e-9
    )


@pytest.mark.parametrize(
    ("classes", "images", "rounded"), [(2, 60, 0.103), (4, 80, 0.063), (8, 160, 0.032)]
)
def test_noise_floor_is_near_the_normal_approximation(classes, images, rounded):
    normal = np.sqrt(2 / np.pi) * np.sqrt(2 / (classes * images))
    assert round(normal, 3) == rounded
    assert metrics.noise_floor(images, [1 / classes] * classes) == pytest.approx(normal, rel=0.005)


def test_noise_floor_of_many_images_and_of_none():
    assert metrics.noise_floor(100_000, [0.5, 0.5]) == pytest.approx(
        np.sqrt(2 / np.pi / 100_000), 1e-4
    )
    with pytest.raises(ValueError, match="needs 1 image or more, got 0"):
        metrics.noise_floor(0, [0.5, 0.5])


def test_bias_moments_are_unbiased(rng):
    p = np.array([0.5, 0.3, 0.2])
    b, m, s = metrics.bias_moments(rng.multinomial(12, p, size=100_000)).T
    true = np.mean([0.2**2, 0.3**2, 0.1**2])
    assert (m - s).mean() == pytest.approx(true, abs=5 * (m - s).std() / 100_000**0.5)
    assert b.mean() > metrics.bias(p)


@pytest.mark.parametrize("spread", [0.0, 0.1, 0.3])
def test_without_sampling_variance_finds_the_true_bias(spread, rng):
    difference = rng.normal(0, spread, size=5000).clip(-1, 1)
    first = rng.binomial(60, (1 + difference) / 2)
    moments = metrics.bias_moments(np.stack([first, 60 - first], -1))
    assert metrics.without_sampling_variance(*moments.T) == pytest.approx(
        abs(difference).mean(), abs=0.015
    )
    assert moments[:, 0].mean() > abs(difference).mean() + 0.005


def test_without_sampling_variance_about_a_target(rng):
    counts = rng.multinomial(40, [0.75, 0.25], size=2000)
    about_target = metrics.bias_moments(counts, [0.75, 0.25])
    assert metrics.without_sampling_variance(*about_target.T) < 0.03 < about_target[:, 0].mean()
    assert metrics.without_sampling_variance(*metrics.bias_moments(counts).T) == pytest.approx(
        0.5, abs=0.02
    )


def test_without_sampling_variance_at_the_ends():
    one_class = metrics.bias_moments(np.array([[9, 0], [0, 7]]))
    assert metrics.without_sampling_variance(*one_class.T) == 1
    equal = metrics.bias_moments(np.array([[4, 4], [5, 5]]))
    assert metrics.without_sampling_variance(*equal.T) == 0
    assert metrics.bias_moments(np.array([[1, 0], [0, 0]])).shape == (0, 3)


def test_bootstrap_interval_is_scipys(rng):
    values = rng.normal(size=40)
    mine = metrics.bootstrap_interval(values)
    theirs = scipy.stats.bootstrap(
        (values,), np.mean, n_resamples=10_000, method="percentile", rng=1
    ).confidence_interval
    np.testing.assert_allclose(mine, theirs, atol=0.02)
    assert mine == metrics.bootstrap_interval(values) != metrics.bootstrap_interval(values, seed=1)


def test_bootstrap_interval_covers_the_mean(rng):
    hits = 0
    for _ in range(200):
        low, high = metrics.bootstrap_interval(rng.normal(size=50))
        hits += low < 0 < high
    assert 0.88 < hits / 200 < 0.99


def test_bootstrap_interval_of_a_statistic_and_of_too_few():
    counts = np.array([[30, 30], [50, 10], [10, 50], [33, 27]])
    moments = metrics.bias_moments(counts)
    low, high = metrics.bootstrap_interval(*moments.T, statistic=metrics.without_sampling_variance)
    assert 0 <= low < metrics.without_sampling_variance(*moments.T) < high <= 1
    assert (
        metrics.bootstrap_interval(*moments[:1].T, statistic=metrics.without_sampling_variance)
        is None
    )
    assert metrics.bootstrap_interval(np.array([])) is None


def test_joint():
    glasses, hat = Attribute("glasses", ("with", "without"), (0.75, 0.25)), Attribute("hat", "abc")
    joint = metrics.joint_attribute([glasses, hat])
    assert joint.name == "glasses x hat"
    assert joint.classes[:4] == ("with, a", "with, b", "with, c", "without, a")
    np.testing.assert_allclose(joint.target, [0.25] * 3 + [0.25 / 3] * 3)
    labels = metrics.joint_labels([np.array([0, 1, 1]), np.array([2, 0, 1])], [2, 3])
    assert [joint.classes[k] for k in labels] == ["with, c", "without, a", "without, b"]


@pytest.mark.parametrize("share", [0.7, 0.85])
def test_image_interval_is_the_binomials(share, rng):
    first = rng.binomial(60, share, size=50)
    counts = np.stack([first, 60 - first], -1)
    low, high = metrics.image_interval(counts)
    mean = metrics.bias(counts / 60).mean()
    assert (low + high) / 2 == pytest.approx(mean, abs=0.004)
    f = first / 60  # the std of |2 f - 1| is that of 2 f, away from 1/2
    error = np.sqrt((4 * f * (1 - f) / 60).sum()) / 50
    assert (high - low) / 2 == pytest.approx(1.96 * error, rel=0.05)
    assert metrics.image_interval(counts) == (low, high)


def test_image_interval_leaves_out_the_choice_of_prompts():
    counts = np.array([[60, 0], [0, 60], [60, 0], [0, 60]])
    assert metrics.image_interval(counts) == (1, 1)
    low, high = metrics.image_interval(np.array([[60, 0], [30, 30]]))
    wide = metrics.bootstrap_interval(metrics.bias(np.array([[1, 0], [0.5, 0.5]])))
    assert wide[0] < low < high < wide[1]
    assert metrics.image_interval(np.array([[3, 1]]), [0.75, 0.25])[0] < 0.01


def test_joint_confusion_by_counting_all_pairs():
    glasses, hat = np.array([[9, 1], [2, 8]]), np.array([[5, 3, 2], [0, 7, 3], [1, 1, 8]])
    rates = metrics.joint_confusion([glasses, hat])
    for (i, j), (k, m) in product(product(range(2), range(3)), repeat=2):
        expected = glasses[i, k] / 10 * hat[j, m] / 10
        assert rates[i * 3 + j, k * 3 + m] == pytest.approx(expected)


def test_corrected_removes_the_classifiers_errors(rng):
    rates = rng.dirichlet(np.ones(4), size=4) * 0.3 + 0.7 * np.eye(4)
    shares = rng.dirichlet(np.ones(4), size=6)
    np.testing.assert_allclose(metrics.corrected(shares @ rates, rates), shares, atol=1e-5)
    np.testing.assert_allclose(metrics.corrected(shares, 50 * np.eye(4)), shares, atol=1e-5)
    assert metrics.corrected(shares[0], rates).shape == (4,)


def test_corrected_of_two_classes_is_the_adjusted_count():
    confusion = np.array([[80, 20], [10, 90]])
    for seen, true in ((0.45, 0.5), (0.8, 1.0), (0.95, 1.0), (0.05, 0.0)):
        found = metrics.corrected(np.array([seen, 1 - seen]), confusion)
        assert found[0] == pytest.approx(true, abs=1e-5)


def test_corrected_is_the_nearest_in_the_simplex(rng):
    rates = rng.dirichlet(np.ones(3), size=3) * 0.5 + 0.5 * np.eye(3)
    for observed in ([0.98, 0.01, 0.01], [0, 0.1, 0.9], [0.4, 0.6, 0]):
        best = scipy.optimize.minimize(
            lambda f, seen=observed: 1e4 * ((rates.T @ f - seen) ** 2).sum(),
            np.full(3, 1 / 3),
            bounds=[(0, 1)] * 3,
            constraints={"type": "eq", "fun": lambda f: f.sum() - 1},
        )
        found = metrics.corrected(np.array(observed), rates)
        assert found.min() >= 0
        assert found.sum() == pytest.approx(1)
        np.testing.assert_allclose(found, best.x, atol=2e-3)


def test_a_confusion_matrix_needs_every_true_class():
    with pytest.raises(ValueError, match="images of every true class, got a row of zeros"):
        metrics.corrected(np.array([0.5, 0.5]), np.array([[1, 0], [0, 0]]))


def test_paired_test_is_scipys_on_the_differences(rng):
    first = rng.uniform(size=30)
    second = first - rng.normal(0.05, 0.1, size=30)
    found = metrics.paired_test(first, second)
    assert found.p_value == pytest.approx(scipy.stats.wilcoxon(first, second).pvalue)
    assert found.difference == pytest.approx((second - first).mean())
    assert found.interval == metrics.bootstrap_interval(second - first)
    other = metrics.paired_test(second, first)
    assert other.p_value == found.p_value
    assert other.difference == -found.difference


def test_paired_test_detects_what_the_variance_of_prompts_hides(rng):
    first = rng.uniform(size=50)
    second = first - 0.02 + rng.normal(0, 0.01, size=50)
    assert metrics.paired_test(first, second).p_value < 1e-6
    assert scipy.stats.mannwhitneyu(first, second).pvalue > 0.3


def test_paired_test_of_gaps_of_equals_and_of_too_few():
    found = metrics.paired_test([0.1, None, 0.3, 0.2], [0.2, 0.1, float("nan"), 0.3])
    assert (found.prompts, found.difference) == (2, pytest.approx(0.1))
    same = metrics.paired_test([0.1, 0.2], [0.1, 0.2])
    assert (same.difference, same.p_value, same.interval) == (0, 1, (0, 0))
    assert metrics.paired_test([0.1], [0.2]).p_value is None
    nothing = metrics.paired_test([None], [0.2])
    assert (nothing.prompts, nothing.difference, nothing.interval) == (0, None, None)
    with pytest.raises(ValueError, match="need the same prompts, got 2 and 1 of them: evaluate"):
        metrics.paired_test([0.1, 0.2], [0.1])
