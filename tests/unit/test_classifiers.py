import pytest
import torch
from pictures import held_out

from diffusers_fair.backends.labels import merge_counts
from diffusers_fair.testbed import judges
from diffusers_fair.testbed.world import ATTRIBUTES
from diffusers_fair.vision.classifiers import NetworkClassifier
from diffusers_fair.vision.faces import face_chips

SHAPES = ("round", "square", "long")  # any three classes will do


def network(chips: torch.Tensor) -> torch.Tensor:
    return chips.mean((2, 3))


def chips_of(count: int):
    portraits, labels = held_out("portrait", count)
    return face_chips(portraits, judges.face_detector()(portraits), judges.CHIP), labels


def test_probabilities_of_three_classes():
    classify = NetworkClassifier(network, SHAPES, 8)
    chips = torch.rand(5, 3, 8, 8, generator=torch.Generator().manual_seed(0), requires_grad=True)
    p = classify(chips)
    assert p.shape == (5, 3)
    assert torch.allclose(p.sum(1), torch.ones(5))
    (gradient,) = torch.autograd.grad(p[:, 0].sum(), chips)
    assert gradient.abs().sum() > 0


def test_chips_of_another_size_are_refused():
    with pytest.raises(
        ValueError, match=r"expected chips of shape \(n, 3, 8, 8\), got \(5, 3, 9, 9\).*size=8"
    ):
        NetworkClassifier(network, SHAPES, 8)(torch.zeros(5, 3, 9, 9))


def test_network_with_another_number_of_classes_is_refused():
    with pytest.raises(ValueError, match=r"expected logits for 2 classes .*, got shape \(5, 3\)"):
        NetworkClassifier(network, SHAPES[:2], 8)(torch.zeros(5, 3, 8, 8))


@pytest.mark.parametrize("evaluation", [False, True])
@pytest.mark.parametrize("name", list(ATTRIBUTES))
def test_testbed_classifier(name, evaluation):
    classify = judges.classifier(name, evaluation=evaluation)
    assert classify.classes == ATTRIBUTES[name].classes
    chips, labels = chips_of(96)
    column = {"age": "age_group1"}.get(name, f"{name}1")
    guess = [classify.classes[i] for i in classify(chips).argmax(1)]
    assert sum(a == b for a, b in zip(guess, labels[column], strict=True)) >= 85


@pytest.mark.parametrize("evaluation", [False, True])
def test_testbed_classifier_is_differentiable(evaluation):
    portraits = held_out("portrait", 8)[0].clone().requires_grad_()
    faces = judges.face_detector()(portraits)
    classify = judges.classifier("gender", evaluation=evaluation)
    p = classify(face_chips(portraits, faces, classify.size))
    (gradient,) = torch.autograd.grad(p[:, 0].log().sum(), portraits)
    assert gradient.isfinite().all()
    assert (gradient.abs().amax((1, 2, 3)) > 0).all()


def test_testbed_evaluation_uses_other_classifiers():
    chips, _ = chips_of(8)
    training, evaluation = (judges.classifier("race", evaluation=e)(chips) for e in (False, True))
    assert not torch.allclose(training, evaluation)


def test_testbed_names_the_attributes_it_knows():
    with pytest.raises(ValueError, match="classifiers for gender, race, age, none for 'height'"):
        judges.classifier("height")


def test_held_out_accuracy_of_the_evaluation_classifiers():
    found = judges.metadata("evaluation_classifiers")["accuracy"]["sharp"]
    assert found["gender"] >= 0.97
    assert found["race"] >= 0.95
    assert found["age"] >= 0.94


def test_confusion_counts_every_held_out_face():
    tables = judges.metadata("evaluation_classifiers")["confusion"]
    for name, attribute in ATTRIBUTES.items():
        table = torch.tensor(tables[name])
        assert table.shape == (len(attribute.classes),) * 2
        assert 1490 <= table.sum() <= 1536


def test_classifiers_report_their_confusion():
    for evaluation, file in ((False, "classifiers"), (True, "evaluation_classifiers")):
        found = judges.classifier("race", evaluation=evaluation).confusion
        assert [list(row) for row in found] == judges.metadata(file)["confusion"]["race"]


def test_labels_that_make_one_class_share_their_counts():
    counts = [[5, 1, 2], [0, 7, 1], [3, 0, 4]]
    assert merge_counts(counts, {"a": [0, 2], "b": [1]}) == ((14, 1), (1, 7))
    assert merge_counts(counts, {"b": [1], "a": [2, 0]}) == ((7, 1), (1, 14))


def test_family_classifier():
    classify = judges.family_classifier()
    portraits, labels = held_out("portrait", 150)
    guess = [classify.classes[i] for i in classify(portraits).argmax(1)]
    telling = ~(labels["plain_wall"] | labels["plain_clothes1"])
    right = [a == b for a, b, t in zip(guess, labels["family"], telling, strict=True) if t]
    assert sum(right) / len(right) >= 0.95
    assert judges.metadata("family_classifier")["accuracy"]["sharp"]["not plain"] >= 0.97


def test_judges_take_no_gradients_themselves():
    for load in (judges.face_detector, judges.family_classifier):
        holder = load().network
        assert not holder.training
        assert not any(p.requires_grad for p in holder.parameters())
        assert all(p.dtype == torch.float32 for p in holder.parameters())
