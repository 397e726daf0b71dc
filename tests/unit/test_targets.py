import itertools
import math
import time

import numpy as np
import ot
import pytest
import torch

import diffusers_fair.objective.targets as module
from diffusers_fair.objective.targets import _joint_targets, expected_targets


def probabilities(count, classes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, classes, generator=generator, dtype=torch.float64).mul(2).softmax(1)


def distance(p, k):
    return math.sqrt(sum((x - (j == k)) ** 2 for j, x in enumerate(p.tolist())))


def brute_force(cost, share):
    """Equation 5 literally: every draw u_1..u_n, every permutation. cost[i][k]."""
    count, classes = len(cost), len(share)
    plan = np.zeros((count, classes))
    for draw in itertools.product(range(classes), repeat=count):
        best = min(
            itertools.permutations(draw),
            key=lambda labels: sum(cost[i][k] for i, k in enumerate(labels)),
        )
        chance = math.prod(share[k] for k in draw)
        for i, k in enumerate(best):
            plan[i, k] += chance
    return torch.from_numpy(plan)


def by_pot(cost, share):
    """Equation 5 by POT: every vector of counts as a marginal of an optimal transport."""
    count, classes = len(cost), len(share)
    plan = np.zeros((count, classes))
    for counts in itertools.product(range(count + 1), repeat=classes):
        if sum(counts) == count:
            ways = math.factorial(count) / math.prod(math.factorial(k) for k in counts)
            chance = ways * math.prod(s**k for s, k in zip(share, counts, strict=True))
            marginals = np.ones(count), np.array(counts, dtype=float)
            plan += chance * ot.emd(*marginals, np.array(cost))
    return torch.from_numpy(plan)


def cost_of(p):
    return [[distance(row, k) for k in range(p.shape[1])] for row in p]


@pytest.mark.parametrize(
    ("count", "share"),
    [
        (1, [0.5, 0.5]),
        (5, [0.5, 0.5]),
        (6, [0.3, 0.7]),
        (4, [0.25, 0.25, 0.5]),
        (4, [0.0, 0.4, 0.6]),
        (3, [0.1, 0.2, 0.3, 0.4]),
    ],
)
def test_plan_is_brute_force_over_permutations(count, share):
    p = probabilities(count, len(share))
    targets = expected_targets(p, share, mass=1.0)
    torch.testing.assert_close(targets.plan, brute_force(cost_of(p), share), rtol=0, atol=1e-12)
    assert targets.error < 1e-12


@pytest.mark.parametrize(
    ("count", "share"),
    [(24, [0.5, 0.5]), (24, [0.25, 0.75]), (40, [0.9, 0.1]), (12, [0.2, 0.3, 0.5])],
)
def test_plan_is_optimal_transport_by_pot(count, share):
    p = probabilities(count, len(share))
    targets = expected_targets(p, share, mass=1.0)
    torch.testing.assert_close(targets.plan, by_pot(cost_of(p), share), rtol=0, atol=1e-9)


def test_two_classes_are_binomial_tails():
    from scipy.stats import binom

    count, share = 24, 0.3
    p = torch.linspace(0.99, 0.01, count)
    plan = expected_targets(torch.stack([p, 1 - p], 1), [share, 1 - share]).plan
    expected = torch.from_numpy(binom.sf(np.arange(count), count, share))
    torch.testing.assert_close(plan[:, 0], expected, rtol=0, atol=1e-12)


def test_two_classes_agree_with_the_general_sum(monkeypatch):
    p = probabilities(10, 2)
    exact = expected_targets(p, [0.3, 0.7]).plan
    padded = torch.cat([p, torch.zeros(10, 1)], dim=1)  # a third class that nothing is sent to
    found = expected_targets(padded, [0.3, 0.7, 0.0], mass=1.0).plan
    torch.testing.assert_close(found[:, :2], exact, rtol=0, atol=1e-12)


@pytest.mark.parametrize("mass", [0.5, 0.9, 0.999])
def test_partial_sums_are_as_close_as_they_say(mass):
    p, share = probabilities(16, 3), [0.2, 0.3, 0.5]
    targets = expected_targets(p, share, mass=mass)
    exact = expected_targets(p, share, mass=1.0)
    assert 0 < targets.error <= 1 - mass
    assert (targets.plan - exact.plan).abs().max() <= targets.error
    torch.testing.assert_close(targets.plan.sum(1), torch.ones(16).double())


def test_samples_are_as_close_as_they_say(monkeypatch):
    p, share = probabilities(12, 4), [0.1, 0.2, 0.3, 0.4]
    exact = expected_targets(p, share, mass=1.0).plan
    monkeypatch.setattr(module, "_ENUMERATED", 0)
    errors = []
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        found = expected_targets(p, share, samples=500, generator=generator)
        assert 0.015 < found.error <= 0.5 / math.sqrt(500)
        errors.append(found.plan - exact)
    spread = torch.stack(errors).square().mean(0).sqrt()
    assert spread.max() < 1.6 * found.error
    assert torch.stack(errors).mean(0).abs().max() < 4 * found.error / math.sqrt(20)


def test_samples_are_the_same_on_every_process():
    p = [probabilities(32, 2), probabilities(32, 4, seed=1)]
    share = [[0.5, 0.5], [0.25] * 4]
    for one, other in zip(_joint_targets(p, share), _joint_targets(p, share), strict=True):
        assert torch.equal(one.plan, other.plan)
        assert 0 < one.error <= (0.25 / 512) ** 0.5  # of a share of one half


@pytest.mark.parametrize("cost_weights", [None, [1.0, 1.0], [1.0, 2.5]])
def test_joint_plan_is_brute_force_marginalised(cost_weights):
    a, b = probabilities(4, 2), probabilities(4, 2, seed=1)
    joint = torch.tensor([[0.4, 0.1], [0.2, 0.3]])
    weight, pairs = (cost_weights or [1.0, 1.0])[1], list(itertools.product((0, 1), repeat=2))
    cost = [
        [math.hypot(distance(x, i), math.sqrt(weight) * distance(y, j)) for i, j in pairs]
        for x, y in zip(a, b, strict=True)
    ]
    expected = brute_force(cost, joint.flatten().tolist()).view(4, 2, 2)
    found = _joint_targets([a, b], joint, cost_weights=cost_weights, mass=1.0)
    torch.testing.assert_close(found[0].plan, expected.sum(2), rtol=0, atol=1e-7)
    torch.testing.assert_close(found[1].plan, expected.sum(1), rtol=0, atol=1e-7)


def test_shares_of_each_attribute_mean_their_product():
    p = [probabilities(6, 2), probabilities(6, 2, seed=1)]
    joint = torch.tensor([0.5, 0.5]).outer(torch.tensor([0.75, 0.25]))
    for one, other in zip(
        _joint_targets(p, [[0.5, 0.5], (0.75, 0.25)]), _joint_targets(p, joint), strict=True
    ):
        torch.testing.assert_close(one.plan, other.plan, rtol=0, atol=1e-7)


def test_three_attributes():
    p = [probabilities(40, 2), probabilities(40, 4, 1), probabilities(40, 2, 2)]
    found = _joint_targets(p, [[0.5, 0.5], [0.25] * 4, [0.75, 0.25]])
    for targets, share in zip(found, ([0.5, 0.5], [0.25] * 4, [0.75, 0.25]), strict=True):
        mean = targets.plan.mean(0)  # of a plan is the target itself
        torch.testing.assert_close(mean, torch.tensor(share).double(), rtol=0, atol=0.01)
        torch.testing.assert_close(targets.plan.sum(1), torch.ones(40).double())


@pytest.mark.parametrize("classes", [2, 3])
def test_labels_and_confidence_are_read_off_the_plan(classes):
    targets = expected_targets(probabilities(9, classes).float(), [1 / classes] * classes)
    assert torch.equal(targets.labels, targets.plan.argmax(1))
    assert torch.equal(targets.confidence, targets.plan.amax(1))
    assert targets.labels.dtype == torch.long


@pytest.mark.parametrize("classes", [2, 3, 4])
def test_permuting_images_permutes_the_plan(classes):
    p, share = probabilities(9, classes), torch.arange(1.0, classes + 1).softmax(0)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        expected_targets(p[order], share).plan, expected_targets(p, share).plan[order]
    )


@pytest.mark.parametrize("classes", [2, 3, 4])
def test_permuting_classes_permutes_the_plan(classes):
    p, share = probabilities(9, classes), torch.arange(1.0, classes + 1).softmax(0)
    order = torch.arange(classes).roll(1)
    found = expected_targets(p[:, order], share[order], mass=1.0).plan
    expected = expected_targets(p, share, mass=1.0).plan[:, order]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-7)


def test_a_balanced_batch_is_left_alone():
    p = torch.eye(2).repeat(12, 1) * 0.9 + 0.05
    targets = expected_targets(p, [0.5, 0.5])
    assert torch.equal(targets.labels, p.argmax(1))


@pytest.mark.parametrize("classes", [2, 3, 4])
def test_images_all_alike_are_sent_to_different_classes(classes):
    """A saturated classifier must not leave every target unsure."""
    p = torch.eye(classes)[:1].repeat(24, 1)
    targets = expected_targets(p, [1 / classes] * classes)
    assert targets.labels.unique().tolist() == list(range(classes))
    assert (targets.confidence > 0.8).float().mean() > {2: 0.7, 3: 0.3, 4: 0.2}[classes]


def test_a_target_of_one_class_is_certain():
    targets = expected_targets(probabilities(5, 3), [0, 0, 1], mass=1.0)
    assert targets.labels.tolist() == [2] * 5
    assert targets.confidence.tolist() == pytest.approx([1] * 5)


@pytest.mark.parametrize("classes", [2, 3])
def test_no_images(classes):
    targets = expected_targets(torch.zeros(0, classes), [1 / classes] * classes)
    assert targets.plan.shape == (0, classes)
    assert targets.labels.shape == targets.confidence.shape == (0,)


def test_no_gradient_flows_through_targets():
    p = probabilities(6, 2).requires_grad_()
    assert not expected_targets(p, [0.5, 0.5]).plan.requires_grad


@pytest.mark.parametrize(
    ("count", "sizes", "seconds"),
    [
        (24, [2], 0.3),
        (40, [2], 0.3),
        (32, [4], 2),
        (40, [4], 2),
        (32, [2, 4], 2),
        (40, [2, 4, 2], 3),
    ],
)
def test_batches_of_the_paper_are_quick(count, sizes, seconds):
    p = [probabilities(count, k, seed=i) for i, k in enumerate(sizes)]
    start = time.process_time()
    _joint_targets(p, [[1 / k] * k for k in sizes])
    assert time.process_time() - start < seconds


@pytest.mark.parametrize(
    ("p", "share", "message"),
    [
        (torch.rand(4, 3), [0.5, 0.5], r"one share for each class, shape \[3\], got \[2\]"),
        (torch.rand(4, 2), [0.5, 0.6], r"a distribution: .* sum to 1, got \[0\.5, 0\.6\]"),
        (torch.rand(4, 2), [1.5, -0.5], r"a distribution: shares of 0 or more"),
        (torch.rand(4, 2), [math.nan, 1.0], r"a distribution"),
        (torch.rand(2), [0.5, 0.5], r"must be \(images, classes\)"),
        (torch.full((4, 2), math.nan), [0.5, 0.5], r"must be finite, got NaN"),
    ],
)
def test_bad_input_of_one_attribute_is_refused(p, share, message):
    with pytest.raises(ValueError, match=message):
        expected_targets(p, share)


def test_bad_input_of_several_attributes_is_refused():
    a, b = torch.rand(4, 2), torch.rand(5, 2)
    with pytest.raises(ValueError, match=r"of the same images, got \[\(4, 2\), \(5, 2\)\]"):
        _joint_targets([a, b], [[0.5, 0.5], [0.5, 0.5]])
    with pytest.raises(ValueError, match=r"shape \[2, 2\], got \[2\]"):
        _joint_targets([a, a], [[0.5, 0.5]])
    with pytest.raises(ValueError, match="expected 2 cost weights, got 1"):
        _joint_targets([a, a], [[0.5, 0.5]] * 2, cost_weights=[1.0])
