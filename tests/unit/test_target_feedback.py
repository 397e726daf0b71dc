"""The moving target, against sums done by hand and a loop whose end is known."""

import pytest
import torch

from diffusers_fair.objective.target_feedback import _DECAY, TargetFeedback

TARGET = (0.25, 0.25, 0.5)


def test_the_initial_target_is_the_given_one():
    assert torch.equal(
        TargetFeedback(TARGET, 0.1).shifted(), torch.tensor(TARGET, dtype=torch.float64)
    )


def test_a_gap_is_integrated_with_the_gain():
    feedback = TargetFeedback(TARGET, gain=0.5)
    feedback.update([0.15, 0.35, 0.5])
    once = 0.5 * (1 - _DECAY) * 0.1
    assert feedback.shifted().tolist() == pytest.approx([0.25 + once, 0.25 - once, 0.5])
    feedback.update([0.15, 0.35, 0.5])
    twice = once + 0.5 * (1 - _DECAY**2) * 0.1  # of a moving average of two
    assert feedback.shifted().tolist() == pytest.approx([0.25 + twice, 0.25 - twice, 0.5])


def test_without_a_gain_or_a_gap_the_target_stays():
    still, met = TargetFeedback(TARGET, gain=0), TargetFeedback(TARGET, gain=1)
    for _ in range(5):
        still.update([0.2, 0.2, 0.6])
        met.update(TARGET)
    assert still.shifted().tolist() == pytest.approx(TARGET)
    assert met.shifted().tolist() == pytest.approx(TARGET)


def test_far_off_nothing_adds_up():
    feedback = TargetFeedback(TARGET, gain=0.1)
    for _ in range(50):
        feedback.update([0.9, 0.05, 0.05])
    first = 0.1 * (1 - _DECAY) * 0.65  # before the average had left the reach
    assert feedback.shifted()[0].item() > 0.25 - 3 * first


def test_the_target_stays_a_distribution_within_reach():
    feedback = TargetFeedback(TARGET, gain=5.0)
    for _ in range(200):
        feedback.update([0.2, 0.2, 0.6])
        assert feedback.shifted().sum().item() == pytest.approx(1)
        assert (feedback.shifted() > 0).all()
    moved = torch.tensor([0.375, 0.375, 0.25])  # the most that each may move
    assert feedback.shifted().tolist() == pytest.approx(moved.tolist())


def shares_reached(gain: float) -> torch.Tensor:
    """Where a loop ends that follows the target in part, and is drawn to another place."""
    feedback = TargetFeedback((0.5, 0.5), gain)
    drawn, shares = torch.tensor([0.8, 0.2], dtype=torch.float64), torch.tensor([0.8, 0.2])
    for _ in range(600):
        end = 0.7 * feedback.shifted() + 0.3 * drawn
        shares = 0.9 * shares + 0.1 * end
        feedback.update(shares.tolist())
    return shares


def test_a_loop_that_a_constant_pull_keeps_off_its_target_gets_there():
    assert shares_reached(gain=0).tolist() == pytest.approx([0.59, 0.41], abs=1e-3)
    assert shares_reached(gain=0.05).tolist() == pytest.approx([0.5, 0.5], abs=1e-3)


def test_it_goes_on_from_where_it_was():
    first, second = TargetFeedback(TARGET, gain=0.5), TargetFeedback(TARGET, gain=0.5)
    first.update([0.2, 0.3, 0.5])
    second.load_state_dict(first.state_dict())
    for each in (first, second):
        each.update([0.3, 0.2, 0.5])
    assert torch.equal(first.shifted(), second.shifted())
    assert torch.equal(first.mean_shares, second.mean_shares)
