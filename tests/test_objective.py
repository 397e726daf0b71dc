"""Losses put together, with judges that are formulas."""

import pytest
import torch

from diffusers_fair.attributes import Attribute
from diffusers_fair.classifiers import NetworkClassifier
from diffusers_fair.evaluation import Judges
from diffusers_fair.faces import Faces
from diffusers_fair.objective import Aim, Objective, SemanticsWeights

TOY = Attribute("brightness", ("dark", "bright"))
WEIGHTS = SemanticsWeights(kept=2.0, changed=0.5, face=0.25)


class Detector:
    """A face in the middle of every picture whose corner is not black."""

    def __call__(self, images):
        n = len(images)
        return Faces(torch.tensor([[2.0, 2, 6, 6]]).repeat(n, 1), images[:, 0, 0, 0] > -1)


class Encoder:
    """Unit-length pixels."""

    def __call__(self, images):
        return torch.nn.functional.normalize(images.flatten(1) + 0.1, dim=1)

    def texts(self, texts):
        raise AssertionError("training reads no texts")


def classifier(classes=TOY.classes):
    sign = 1 if classes == TOY.classes else -1
    logit = lambda chips: sign * chips.mean((1, 2, 3))  # noqa: E731
    return NetworkClassifier(lambda x: torch.stack([-logit(x), logit(x)], 1), classes, 4)


def objective(threshold=0.0, classes=TOY.classes) -> Objective:
    judges = Judges(
        face_detector=Detector(),
        classifiers={"brightness": classifier(classes)},
        clip=Encoder(),
        dino=Encoder(),
    )
    return Objective(judges, [Aim(attribute=TOY, threshold=threshold)], WEIGHTS)


def pictures(levels, size=8):
    x = torch.tensor(levels).view(-1, 1, 1, 1).expand(-1, 3, size, size).clone()
    return x + 0.05 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))


def test_four_dark_pictures_are_sent_apart():
    x = pictures([-0.8, -0.6, -0.4, -0.2]).requires_grad_()
    aim = objective()
    loss, figures = aim(x, aim.originals(x.detach()))
    assert figures["bias/brightness"] == 1
    assert figures["semantics"] == pytest.approx(0, abs=1e-5)  # the originals themselves
    (g,) = torch.autograd.grad(loss, x)
    mean = g[:, :, 3:5, 3:5].mean((1, 2, 3))  # of the faces
    assert (mean[:2] > 0).all()  # the darkest get darker
    assert (mean[2:] < 0).all()  # the others brighter


def test_a_picture_without_a_face_has_no_part_in_alignment():
    x = pictures([-0.8, -0.6, 0.6, 0.8])
    x[1, :, 0, 0] = -2
    aim = objective()
    originals = aim.originals(x)
    x = (
        x + 0.01 * torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    ).requires_grad_()
    x.data[1, :, 0, 0] = -2
    _, figures = aim(x, originals)
    assert figures["faces"] == 0.75
    others = [0, 2, 3]
    part, _ = aim(x[others], aim.originals(x[others].detach()))
    assert figures["alignment"] * 4 == pytest.approx(part.item() * 3, abs=1e-5)


def test_no_face_at_all_leaves_the_semantics():
    x = pictures([-0.8, 0.8])
    x[:, :, 0, 0] = -2
    aim = objective()
    _, figures = aim(x.requires_grad_(), aim.originals(x.detach() * 0.9))
    assert figures["alignment"] == 0
    assert figures["loss"] == pytest.approx(figures["semantics"])
    assert not any(name.startswith("bias/") for name in figures)


def test_less_likeness_is_asked_where_a_class_changes():
    """Weight kept * changed outside the face, and face times that inside it."""
    aim = objective(threshold=1.0)  # no alignment: semantics alone
    original = pictures([-0.8, -0.7, -0.6, -0.5])
    x = (
        original + 0.1 * torch.randn(original.shape, generator=torch.Generator().manual_seed(2))
    ).requires_grad_()
    loss, _ = aim(x, aim.originals(original))
    (g,) = torch.autograd.grad(loss, x)
    features = [Encoder()(v) for v in (x, original)]
    plain = 2 * (1 - (features[0] * features[1]).sum(1)).mean() * WEIGHTS.kept
    (full,) = torch.autograd.grad(plain, x)
    ratio = g / full
    kept, changed = ratio[:2], ratio[2:]
    assert torch.allclose(kept, torch.ones_like(kept), atol=1e-3)
    assert torch.allclose(changed[..., 0, :], torch.tensor(0.5), atol=1e-3)
    assert torch.allclose(changed[..., 3:5, 3:5], torch.tensor(0.125), atol=1e-3)


def test_classes_in_another_order_change_nothing():
    x = pictures([-0.8, -0.6, 0.2, 0.9])
    losses = []
    for classes in (TOY.classes, TOY.classes[::-1]):
        aim = objective(classes=classes)
        losses.append(aim(x.clone().requires_grad_(), aim.originals(x * 0.9))[0].item())
    assert losses[0] == pytest.approx(losses[1])
