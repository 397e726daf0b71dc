import math

import pytest
import torch

from diffusers_fair.objective.losses import (
    alignment_loss,
    face_realism_loss,
    scale_gradient,
    semantics_loss,
)
from diffusers_fair.objective.targets import Targets, expected_targets


def targets(labels, confidence, classes):
    plan = torch.zeros(len(labels), classes, dtype=torch.float64)
    return Targets(torch.tensor(labels), torch.tensor(confidence, dtype=torch.float64), plan, 0.0)


def test_alignment_is_cross_entropy_of_the_sure_targets():
    p = torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.25, 0.75], [0.5, 0.5]])
    found = alignment_loss(p, targets([0, 1, 1, 0], [0.95, 0.8, 0.79, 0.5], 2), 0.8)
    expected = torch.tensor([-math.log(0.9), -math.log(0.1), 0, 0])  # at C counts, below does not
    torch.testing.assert_close(found, expected)


def test_alignment_gradient_is_that_of_cross_entropy_on_logits():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    labels = [0, 1, 2, 0, 1, 2]
    alignment_loss(logits.softmax(1), targets(labels, [1.0] * 6, 3), 0.8).mean().backward()
    expected = (logits.softmax(1) - torch.eye(3).double()[labels]) / 6
    torch.testing.assert_close(logits.grad, expected)


def test_images_below_the_threshold_get_no_gradient():
    p = torch.full((2, 2), 0.5, requires_grad=True)
    alignment_loss(p, targets([0, 1], [0.9, 0.6], 2), 0.8).sum().backward()
    assert p.grad.tolist() == [[-2, 0], [0, 0]]


def test_a_probability_of_zero_is_finite():
    p = torch.tensor([[0.0, 1.0]], requires_grad=True)
    loss = alignment_loss(p, targets([0], [1.0], 2), 0.8)
    loss.sum().backward()
    assert loss.isfinite().all()
    assert p.grad.isfinite().all()


def test_following_the_gradient_lowers_the_alignment_loss():
    logits = torch.randn(24, 2, generator=torch.Generator().manual_seed(0)).add(
        torch.tensor([2.0, 0.0])
    )
    logits.requires_grad_()
    before = None
    for _ in range(50):
        p = logits.softmax(1)
        loss = alignment_loss(p, expected_targets(p, [0.5, 0.5]), 0.8).mean()
        before = loss.item() if before is None else before
        (gradient,) = torch.autograd.grad(loss, logits)
        logits.data -= 10 * gradient
    assert loss.item() < 0.2 * before
    assert 0.3 < logits.softmax(1)[:, 0].mean() < 0.7


@pytest.mark.parametrize("size", [1.0, 3.0])
def test_semantics_is_one_minus_cosine(size):
    x = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [3.0, 4.0]])
    o = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [4.0, 3.0]]) * size
    torch.testing.assert_close(semantics_loss(x, o), torch.tensor([0.0, 1.0, 2.0, 1 - 24 / 25]))


def test_semantics_gradient_turns_towards_the_original():
    x = torch.tensor([[1.0, 0.0]], requires_grad=True)
    semantics_loss(x, torch.tensor([[0.6, 0.8]])).sum().backward()
    torch.testing.assert_close(x.grad, torch.tensor([[0.0, -0.8]]))


def test_gradients_are_scaled_and_values_are_not():
    images = torch.rand(2, 3, 2, 2, requires_grad=True)
    factor = torch.tensor([1.0, 0.2]).view(2, 1, 1, 1)
    scaled = scale_gradient(images, factor)
    assert torch.equal(scaled, images)
    scaled.sum().backward()
    torch.testing.assert_close(images.grad, factor.expand_as(images))


def test_targets_of_other_images_are_refused():
    with pytest.raises(ValueError, match=r"probabilities of \(1, 2\) images .* got \(3, 2\)"):
        alignment_loss(torch.rand(3, 2), targets([0], [1.0], 2), 0.8)


def test_features_of_another_encoder_are_refused():
    with pytest.raises(ValueError, match=r"same images and encoder, got shapes \(3, 2\) and"):
        semantics_loss(torch.rand(3, 2), torch.rand(3, 4))


# ---- face realism --------------------------------------------------------------------------------

FACES = torch.tensor([[1.0, 0.0], [0.6, 0.8]])
BANK = torch.tensor([[0.0, 1.0], [0.8, 0.6], [-1.0, 0.0]])
OWN = torch.tensor([[-1.0, 0.0], [0.0, -1.0]])
NONE, BOTH = torch.tensor([False, False]), torch.tensor([True, True])


def unit(*shape, seed=0):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.nn.functional.normalize(x, dim=-1)


def test_a_face_is_compared_with_the_nearest_real_one():
    found = face_realism_loss(FACES, BANK, OWN, NONE)
    torch.testing.assert_close(found, torch.tensor([1 - 0.8, 1 - 0.96]))


def test_a_kept_face_is_compared_with_its_original():
    found = face_realism_loss(FACES, BANK, OWN, torch.tensor([True, False]))
    torch.testing.assert_close(found, torch.tensor([2.0, 1 - 0.96]))
    torch.testing.assert_close(face_realism_loss(FACES, BANK, FACES, BOTH), torch.zeros(2))


def test_gradient_pulls_towards_the_face_compared_with():
    x = FACES.clone().requires_grad_()
    face_realism_loss(x, BANK, OWN, torch.tensor([True, False])).sum().backward()
    torch.testing.assert_close(x.grad, -torch.stack([OWN[0], BANK[1]]))


def test_the_order_of_the_reference_faces_is_of_no_matter():
    x, reference = unit(5, 8), unit(40, 8, seed=1)
    reference = torch.cat([reference, reference[:7]])  # some are as near as others
    losses, gradients = [], []
    for rows in (torch.arange(47), torch.randperm(47, generator=torch.Generator().manual_seed(2))):
        v = x.clone().requires_grad_()
        loss = face_realism_loss(v, reference[rows], x, torch.zeros(5, dtype=torch.bool))
        losses.append(loss.detach())
        gradients.append(torch.autograd.grad(loss.sum(), v)[0])
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*gradients)


def test_more_reference_faces_never_raise_the_loss():
    x, reference, nobody = unit(5, 8), unit(40, 8, seed=1), torch.zeros(5, dtype=torch.bool)
    few, many = (face_realism_loss(x, reference[:n], x, nobody) for n in (3, 40))
    assert (many <= few).all()
    assert ((many >= 0) & (few <= 2)).all()


@pytest.mark.parametrize("reference", [torch.zeros(0, 2), torch.zeros(4, 3)])
def test_reference_faces_that_do_not_fit_are_refused(reference):
    shape = rf"\({len(reference)}, "
    message = rf"one or more reference faces with embeddings of size 2, .* got shape {shape}"
    with pytest.raises(ValueError, match=message):
        face_realism_loss(FACES, reference, OWN, NONE)


def test_original_faces_of_other_images_are_refused():
    with pytest.raises(ValueError, match=r"same images by the same embedder, .* \(1, 2\)"):
        face_realism_loss(FACES, BANK, OWN[:1], NONE)
