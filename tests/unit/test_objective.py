"""Losses put together, with judges that are formulas."""

from dataclasses import replace

import pytest
import torch

from diffusers_fair.attributes import Attribute
from diffusers_fair.config.schema import AttributeSection, LossesSection
from diffusers_fair.objective.objective import Objective
from diffusers_fair.objective.statistics import BatchStatistics
from diffusers_fair.vision.classifiers import NetworkClassifier
from diffusers_fair.vision.encoders import NetworkEncoder, Pixels
from diffusers_fair.vision.faces import Faces, aligned_chips, face_chips
from diffusers_fair.vision.judges import Judges
from diffusers_fair.vision.reference_faces import ReferenceFaces, embed_faces

TOY = Attribute("brightness", ("dark", "bright"))
CONTRAST = Attribute("contrast", ("flat", "rich"))
KEPT, CHANGED, FACE = 2.0, 0.5, 0.25  # of the semantics loss: lambda_1, and its shares


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


def section(attribute: Attribute, **options) -> AttributeSection:
    """An attribute as recipes have it."""
    return AttributeSection(**attribute.json(), **options)


def logged(result) -> tuple[torch.Tensor, dict[str, float]]:
    """A loss, and its statistics as they are logged."""
    loss, statistics = result
    return loss, statistics.metrics()


def objective(threshold=0.0, classes=TOY.classes) -> Objective:
    judges = Judges(
        face_detector=Detector(),
        classifiers={"brightness": classifier(classes)},
        clip=Encoder(),
        dino=Encoder(),
    )
    options = {"semantics_changed": CHANGED, "semantics_face": FACE}
    toy = section(TOY, threshold=threshold, **options)
    return Objective(judges, [toy], LossesSection(semantics=KEPT))


def pictures(levels, size=8):
    x = torch.tensor(levels).view(-1, 1, 1, 1).expand(-1, 3, size, size).clone()
    return x + 0.05 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))


def test_batch_statistics_shift_the_target():
    x = pictures([0.3, 0.4, -0.2, 0.3])
    plain = objective()
    toy = plain.sections[0].model_copy(update={"target_feedback": 1.0})
    aim = Objective(plain.judges, [toy], plain.losses)
    _, statistics = aim(x, aim.originals(x))
    figures, feedback = statistics.metrics(), aim.feedback["brightness"]
    shares = [figures[f"share/brightness/{c}"] for c in TOY.classes]
    assert shares == [0.25, 0.75]  # of faces, however sure the classifier is of them
    assert statistics.attributes["brightness"].shares == (0.25, 0.75)
    assert feedback.shifted().tolist() == [0.5, 0.5]  # until it is told
    aim.update_targets(statistics)
    assert feedback.shifted()[0].item() > 0.5  # more dark ones are asked for
    before = feedback.shifted()
    aim.update_targets(BatchStatistics(losses={}, face_rate=0.0, attributes={}))
    assert torch.equal(feedback.shifted(), before)


def test_four_dark_images_get_different_targets():
    x = pictures([-0.8, -0.6, -0.4, -0.2]).requires_grad_()
    aim = objective()
    loss, figures = logged(aim(x, aim.originals(x.detach())))
    assert figures["bias/brightness"] == 1
    assert figures["semantics"] == pytest.approx(0, abs=1e-5)  # the originals themselves
    (g,) = torch.autograd.grad(loss, x)
    mean = g[:, :, 3:5, 3:5].mean((1, 2, 3))  # of the faces
    assert (mean[:2] > 0).all()  # the darkest get darker
    assert (mean[2:] < 0).all()  # the others brighter


def test_an_image_without_a_face_has_no_alignment_loss():
    x = pictures([-0.8, -0.6, 0.6, 0.8])
    x[1, :, 0, 0] = -2
    aim = objective()
    originals = aim.originals(x)
    x = (
        x + 0.01 * torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    ).requires_grad_()
    x.data[1, :, 0, 0] = -2
    _, figures = logged(aim(x, originals))
    assert figures["faces"] == 0.75
    others = [0, 2, 3]
    part, _ = aim(x[others], aim.originals(x[others].detach()))
    assert figures["alignment"] * 4 == pytest.approx(part.item() * 3, abs=1e-5)


def test_no_face_at_all_leaves_the_semantics():
    x = pictures([-0.8, 0.8])
    x[:, :, 0, 0] = -2
    aim = objective()
    _, figures = logged(aim(x.requires_grad_(), aim.originals(x.detach() * 0.9)))
    assert figures["alignment"] == 0
    assert figures["loss"] == pytest.approx(figures["semantics"])
    assert not any(name.startswith("bias/") for name in figures)


def test_the_semantics_loss_is_weaker_where_a_class_changes():
    """Weight kept * changed outside the face, and face times that inside it."""
    aim = objective(threshold=1.0)  # no alignment: semantics alone
    original = pictures([-0.8, -0.7, -0.6, -0.5])
    x = (
        original + 0.1 * torch.randn(original.shape, generator=torch.Generator().manual_seed(2))
    ).requires_grad_()
    loss, _ = aim(x, aim.originals(original))
    (g,) = torch.autograd.grad(loss, x)
    features = [Encoder()(v) for v in (x, original)]
    plain = 2 * (1 - (features[0] * features[1]).sum(1)).mean() * KEPT
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


def test_prompts_in_one_batch_equal_separate_prompts():
    """Targets are found within a prompt; one prompt has no face at all."""
    aim = objective()
    x = pictures([-0.8, -0.6, -0.4, -0.2, 0.1, 0.3, 0.5, 0.7])
    x = torch.cat([x, pictures([-0.5, 0.5, -0.1, 0.1])])
    x[8:, :, 0, 0] = x[1, :, 0, 0] = -2
    original = (0.9 * x + 0.02 * torch.randn(x.shape)).clamp_min(-2)
    original[x[:, 0, 0, 0] == -2] = 1.1 * x[x[:, 0, 0, 0] == -2]
    x.requires_grad_()
    loss, figures = logged(aim(x, aim.originals(original), prompts=["a", "b", "c"]))
    apart = [
        logged(aim(part, aim.originals(o)))
        for part, o in zip(x.split(4), original.split(4), strict=True)
    ]
    (whole,) = torch.autograd.grad(loss, x)
    (parts,) = torch.autograd.grad(sum(part for part, _ in apart) / 3, x)
    torch.testing.assert_close(whole, parts)
    for name in ("loss", "alignment", "semantics", "faces"):
        assert figures[name] == pytest.approx(sum(f[name] for _, f in apart) / 3, abs=1e-6)
    with_faces = [f["bias/brightness"] for _, f in apart[:2]]
    assert figures["bias/brightness"] == pytest.approx(sum(with_faces) / 2)


# ---- several attributes --------------------------------------------------------------------------


def richness(chips):
    """Logits (n, 2) of flat and rich, by whether the pixels' spread is above 0.1."""
    logit = 100 * (chips.std((1, 2, 3)) - 0.1)
    return torch.stack([-logit, logit], 1)


def test_of_several_attributes_to_change_the_smallest_factor_counts():
    judges = Judges(
        face_detector=Detector(),
        classifiers={
            "brightness": classifier(),
            "contrast": NetworkClassifier(richness, CONTRAST.classes, 4),
        },
        clip=Encoder(),
        dino=Encoder(),
    )
    sections = [
        section(TOY, threshold=1.0, semantics_changed=0.5, semantics_face=0.1),
        section(CONTRAST, threshold=1.0, semantics_changed=0.3, semantics_face=0.4),
    ]
    aim = Objective(judges, sections, LossesSection(semantics=KEPT))
    levels = torch.tensor([-0.6, -0.6, 0.6, 0.6]).view(4, 1, 1, 1)
    spread = torch.tensor([0.05, 0.5, 0.05, 0.5]).view(4, 1, 1, 1)
    noise = torch.randn(2, 4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    x = (levels + spread * noise[0]).requires_grad_()  # one of each kind, as should be
    originals = aim.originals((x + 0.03 * noise[1]).detach())
    brightness, contrast = originals.classes["brightness"], originals.classes["contrast"]
    assert (brightness.tolist(), contrast.tolist()) == ([0, 0, 1, 1], [0, 1, 0, 1])
    other = {
        "brightness": brightness ^ torch.tensor([0, 1, 0, 1]),  # the second and the last changed
        "contrast": contrast ^ torch.tensor([0, 0, 1, 1]),
    }
    (full,) = torch.autograd.grad(aim(x, originals)[0], x)
    (less,) = torch.autograd.grad(aim(x, replace(originals, classes=other))[0], x)
    ratio = less / full
    for part, factors in (
        (ratio[..., :1, :], [1, 0.5, 0.3, 0.3]),
        (ratio[..., 3:5, 3:5], [1, 0.5 * 0.1, 0.3 * 0.4, 0.3 * 0.1]),
    ):
        expected = torch.tensor(factors).view(4, 1, 1, 1).expand_as(part)
        torch.testing.assert_close(part, expected, atol=1e-3, rtol=1e-3)


# ---- face realism --------------------------------------------------------------------------------

EMBEDDER = NetworkEncoder(lambda chips: chips.flatten(1) + 0.1, Pixels(4))
REAL = pictures([-0.3, 0.2, 0.5]) + torch.linspace(-0.5, 0.5, 8)


def realistic(weight=0.5, threshold=0.0) -> Objective:
    plain = objective(threshold)
    real = ReferenceFaces(EMBEDDER, embed_faces(EMBEDDER, REAL, Detector()(REAL)))
    losses = LossesSection(semantics=KEPT, face=weight)
    return Objective(plain.judges, plain.sections, losses, real)


def cosines(x, others) -> torch.Tensor:
    """Between the faces of pictures (n) and others (m), (n, m)."""
    a, b = (embed_faces(EMBEDDER, v, Detector()(v)) for v in (x, others))
    return a @ b.T


def changed(x, seed=3) -> torch.Tensor:
    return x + 0.1 * torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))


LEVELS = [-0.8, -0.7, -0.6, -0.5]  # the last two should become bright


@pytest.mark.parametrize(("threshold", "kept"), [(0.5, 2), (0.9, 0)])
def test_faces_that_stay_are_compared_with_their_own_if_their_class_is_sure(threshold, kept):
    """Every class has a probability of 0.73 to 0.84."""
    original, aim = pictures(LEVELS), realistic(threshold=threshold)
    x = changed(original)
    _, figures = logged(aim(x.requires_grad_(), aim.originals(original)))
    nearest, own = cosines(x, REAL).amax(1), cosines(x, original).diag()
    expected = 0.5 * (1 - torch.cat([own[:kept], nearest[kept:]])).mean()
    assert figures["face"] == pytest.approx(expected.item(), rel=1e-4)
    assert (own - nearest).abs().min() > 0.05  # so that it matters which


def test_the_loss_is_the_sum_of_what_is_logged():
    aim, x = realistic(), changed(pictures(LEVELS))
    loss, figures = logged(aim(x, aim.originals(pictures(LEVELS))))
    assert loss.item() == figures["loss"]
    terms = figures["alignment"] + figures["semantics"] + figures["face"]
    assert loss.item() == pytest.approx(terms, rel=1e-5)
    assert "face" not in logged(objective()(x, objective().originals(x)))[1]


def test_only_images_with_a_face_have_a_realism_loss():
    original = pictures(LEVELS)
    original[2, :, 0, 0] = -2  # no face there, and in the second only the original has none
    x = changed(original)
    original[1, :, 0, 0] = -2
    x[2, :, 0, 0] = -2
    x.requires_grad_()
    gradients, figures = [], {}
    for weight in (0.0, 1.0):
        aim = realistic(weight)
        loss, figures = logged(aim(x, aim.originals(original)))
        gradients.append(torch.autograd.grad(loss, x)[0])
    pull = (gradients[1] - gradients[0]).abs().amax((1, 2, 3))
    assert (pull > 1e-4).tolist() == [True, True, False, True]
    nearest, own = cosines(x, REAL).amax(1), cosines(x, original).diag()
    one_kept = 1 - torch.stack([own[0], nearest[1], nearest[3]])
    assert figures["face"] == pytest.approx(one_kept.sum().item() / 4, rel=1e-4)


def test_without_any_face_nothing_is_compared():
    x = pictures([-0.8, 0.8])
    x[:, :, 0, 0] = -2
    aim = realistic()
    assert logged(aim(x.requires_grad_(), aim.originals(x.detach())))[1]["face"] == 0


def test_a_weight_without_reference_faces_is_refused():
    plain = objective()
    with pytest.raises(
        ValueError, match=r"face weight of 0\.1 needs reference faces, got none: load"
    ):
        Objective(plain.judges, plain.sections, LossesSection(semantics=1.0, face=0.1))


def test_landmarks_align_the_chips():
    faces = Detector()(REAL)
    marks = torch.tensor([[3.0, 3], [5, 3], [4, 4], [3, 5], [5, 5]]).repeat(3, 1, 1)
    marked = replace(faces, landmarks=marks)
    square, aligned = (embed_faces(EMBEDDER, REAL, f) for f in (faces, marked))
    torch.testing.assert_close(square, EMBEDDER(face_chips(REAL, faces, 4)))
    torch.testing.assert_close(aligned, EMBEDDER(aligned_chips(REAL, marked, 4)))
    assert not torch.allclose(square, aligned, atol=1e-2)


def test_each_prompt_is_aligned_with_its_own_target():
    """Of the same pictures, one prompt's are to be dark and another's bright."""
    plain, targets = objective(), {"night": (1, 0), "noon": (0, 1)}
    own = plain.sections[0].model_copy(update={"targets": targets})
    aim = Objective(plain.judges, [own], plain.losses)
    x = pictures([-0.3, 0.1, 0.2, 0.3])
    x = torch.cat([x, x])
    targets, assign = [], aim.targets.assign
    aim.targets.assign = lambda *args: targets.extend(assign(*args)) or targets[-1:]
    _, figures = logged(aim(x, aim.originals(x), prompts=["night", "noon"]))
    assert targets[0].labels.tolist() == [0] * 4 + [1] * 4
    assert figures["target/brightness/dark"] == figures["target/brightness/bright"] == 0.5


# ---- kept prompts --------------------------------------------------------------------------------


def test_kept_images_should_not_change_and_show_the_named_class():
    aim = objective()
    x = pictures([-0.3, 0.1, 0.2, 0.3])
    x[3, :, 0, 0] = -2  # without a face
    original = aim.originals(0.5 * x)
    asked = [{"brightness": "bright"}, {}, {"brightness": "dark"}, {"brightness": "dark"}]
    loss, figures = logged(aim.kept_images(x, original, asked))
    features = zip(aim.semantics.features(x), original.features, strict=True)
    distance = sum(1 - (a * b).sum(1) for a, b in features)
    p = aim.judges.probabilities(TOY, x, aim.judges.face_detector(x))  # (n, 2), dark and bright
    expected = aim.losses.semantics * distance
    expected[0] -= p[0, 1].log()
    expected[2] -= p[2, 0].log()
    assert loss.item() == pytest.approx(expected.mean().item(), rel=1e-5)
    right = [float(p[0].argmax() == 1), float(p[2].argmax() == 0), 0.0]
    assert figures["keep/obeyed"] == pytest.approx(sum(right) / 3)


def test_kept_images_do_not_depend_on_the_micro_batch():
    aim = objective()
    x = pictures([-0.3, 0.1, 0.2, 0.3]).requires_grad_()
    original, asked = aim.originals(0.5 * x), [{"brightness": "bright"}, {}] * 2
    whole, figures = logged(aim.kept_images(x, original, asked))
    parts, again = logged(aim.kept_images(x, original, asked, micro_batch=3))
    torch.testing.assert_close(*(torch.autograd.grad(loss, x)[0] for loss in (whole, parts)))
    assert again == pytest.approx(figures)


def test_kept_images_without_a_named_class_have_no_obeyed_share():
    aim = objective()
    x = pictures([-0.3, 0.1])
    loss, figures = logged(aim.kept_images(x, aim.originals(x), [{}, {}]))
    assert loss.item() == pytest.approx(0, abs=1e-6)
    assert "keep/obeyed" not in figures
