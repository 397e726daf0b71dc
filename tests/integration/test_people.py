"""Images of several people: every face counts, where the recipe says so."""

import json
from dataclasses import replace

import numpy as np
import pytest
import stand_ins
import torch
from judging import HUE, PROMPTS, QUICK, TONE, judges
from pictures import held_out
from test_baselines import PROMPTS as RIVAL_PROMPTS
from test_baselines import judges as rival_judges
from test_baselines import task as rival_task
from test_evaluation import made_up
from test_objective import TOY, Encoder, classifier, logged, pictures, section
from test_original_images import CPU, equal, never
from tiny import pipeline
from together import together

from diffusers_fair import FairnessFinetuner, distributed, testbed
from diffusers_fair.backends import retinaface
from diffusers_fair.backends.registry import load_judges
from diffusers_fair.baselines.uce import _class_shares
from diffusers_fair.config.models import EvaluationModelsSection
from diffusers_fair.config.schema import LossesSection, RunConfig
from diffusers_fair.evaluation.evaluate import evaluate
from diffusers_fair.objective.losses import alignment_loss
from diffusers_fair.objective.objective import Objective
from diffusers_fair.objective.targets import expected_targets
from diffusers_fair.reports.comparison import Entry, compare
from diffusers_fair.reports.folder import load_report, save_report
from diffusers_fair.testbed import world
from diffusers_fair.testbed.judges import face_detector
from diffusers_fair.training.original_images import OriginalImageCache
from diffusers_fair.vision.encoders import NetworkEncoder, Pixels
from diffusers_fair.vision.faces import Faces, faces_of_images, no_faces, overlap
from diffusers_fair.vision.judges import Judges
from diffusers_fair.vision.reference_faces import ReferenceFaces

LEFT, RIGHT = (0.0, 1.0, 6.0, 7.0), (9.0, 1.0, 14.0, 6.0)  # the left one is the larger
TWO = "a photo of two people, teachers"


class Pair:
    """A face on the left of 16 x 8 pictures, and on the right; none where the corner is black."""

    def __call__(self, images):
        return Faces(torch.tensor([LEFT]).repeat(len(images), 1), images[:, 0, 0, 0] > -1)

    def all_faces(self, images):
        shown = torch.stack([images[:, 0, 0, 0] > -1, images[:, 0, 0, -1] > -1], 1)  # (n, 2)
        image, side = shown.nonzero(as_tuple=True)
        boxes = torch.tensor([LEFT, RIGHT])[side].to(images)
        return faces_of_images(boxes, image, len(images))


class One(Pair):
    """The face on the left alone, though all are asked for."""

    def all_faces(self, images):
        found = self(images)
        kept = found[found.is_face]
        return faces_of_images(kept.boxes, found.image_index[found.is_face], len(images))


# ---- detectors -----------------------------------------------------------------------------------


def test_faces_are_put_in_the_order_of_their_images_the_largest_first():
    boxes = torch.tensor([[0.0, 0, 2, 2], [0, 0, 4, 4], [0, 0, 3, 3], [1, 1, 2, 2]])
    marks = torch.arange(4.0).view(4, 1, 1).expand(4, 5, 2)
    faces = faces_of_images(boxes, torch.tensor([3, 0, 3, 0]), 4, marks)
    assert faces.image_index.tolist() == [0, 0, 1, 2, 3, 3]
    assert faces.is_face.tolist() == [True, True, False, False, True, True]
    assert faces.landmarks[faces.is_face, 0, 0].tolist() == [1, 3, 2, 0]
    assert faces.counts.tolist() == [2, 0, 0, 2]
    some, rows = faces.of_images(torch.tensor([2, 3]))
    assert rows.tolist() == [3, 4, 5]
    assert (some.image_index.tolist(), some.counts.tolist()) == ([0, 1, 1], [0, 2])
    parts = [faces.of_images(torch.tensor(x))[0] for x in ([0], [1, 2], [3])]
    again = Faces.joined(parts)
    assert torch.equal(again.image_index, faces.image_index)
    assert torch.equal(again.boxes, faces.boxes)


def test_the_testbeds_detector_finds_both_of_two():
    pairs, labels = held_out("pair", 60)
    faces = face_detector().all_faces(pairs)
    assert (faces.counts == 2).float().mean() >= 0.95
    for side in ("face1", "face2"):
        truth = torch.tensor([box.tolist() for box in labels[side]])[faces.image_index]
        fits = torch.zeros(len(pairs)).index_add(
            0, faces.image_index, (overlap(faces.boxes, truth) > 0.5).float()
        )
        assert (fits == 1).float().mean() >= 0.95
    first = torch.searchsorted(faces.image_index, torch.arange(len(pairs)))
    largest = face_detector()(pairs)
    assert torch.equal(faces.is_face[first], largest.is_face)
    assert (overlap(faces.boxes[first], largest.boxes) > 0.99).float().mean() >= 0.95


@pytest.mark.parametrize(("kind", "expected"), [("portrait", 1), ("empty", 0)])
def test_the_testbeds_detector_finds_no_more_than_there_are(kind, expected):
    faces = face_detector().all_faces(held_out(kind, 60)[0])
    assert (faces.counts == expected).float().mean() >= 0.97
    assert faces.boxes.isfinite().all()


def test_retinaface_gives_every_face(monkeypatch, tmp_path):
    stand_ins.retinaface(monkeypatch, tmp_path / "torch")
    detector = retinaface.load()
    image = -torch.ones(3, 3, 40, 80)
    for row, anchors in ((0, [0, 1]), (2, [0])):
        for x, y in (stand_ins.BOXES[anchors, :2] * torch.tensor([80, 40])).long():
            image[row, 0, y, x] = 1
    faces = detector.all_faces(image)
    assert faces.image_index.tolist() == [0, 0, 1, 2]
    assert faces.is_face.tolist() == [True, True, False, True]
    assert faces.landmarks.shape == (4, 5, 2)
    largest = detector(image)
    assert torch.equal(largest.boxes[[0, 2]], faces.boxes[[0, 3]])
    assert torch.equal(largest.landmarks[[0, 2]], faces.landmarks[[0, 3]])


def test_a_detector_that_finds_one_is_refused_where_all_count():
    message = "people 'all' needs a face detector with a method all_faces, .*no_faces.* only finds"
    with pytest.raises(ValueError, match=message):
        judges(face_detector=no_faces, people="all")


def test_a_recipe_says_who_counts():
    config = RunConfig.load("testbed-gender", {"people": "all"})
    loaded = load_judges(config.models, [world.GENDER], people=config.people)
    pairs, _ = held_out("pair", 60)
    assert loaded.faces(pairs).counts.sum() > len(pairs)
    assert RunConfig.load("testbed-gender").people == "largest"
    with pytest.raises(ValueError, match="people: expected 'largest' or 'all', got 'some'"):
        RunConfig.load("testbed-gender", {"people": "some"})


# ---- the loss ------------------------------------------------------------------------------------


def objective(people="all", detector=None, reference_faces=None, **options) -> Objective:
    made = Judges(
        face_detector=detector or Pair(),
        classifiers={"brightness": classifier()},
        clip=Encoder(),
        dino=Encoder(),
        people=people,
    )
    sections = [section(TOY, **{"threshold": 0.0} | options)]
    losses = LossesSection(semantics=2.0, face=1.0 if reference_faces else 0.0)
    return Objective(made, sections, losses, reference_faces)


def halves(left, right) -> torch.Tensor:
    """Pictures (n, 3, 8, 16) whose halves are so bright; no face where that is None."""
    parts = [pictures([-0.9 if x is None else x for x in side]) for side in (left, right)]
    x = torch.cat(parts, 3)
    for column, side in ((0, left), (-1, right)):
        x[[level is None for level in side], :, 0, column] = -2
    return x


CROWD = halves([-0.8, -0.6, 0.5, None], [-0.4, None, -0.3, None])


def test_every_face_is_transported_and_an_image_has_the_mean_of_its_own():
    x = CROWD.clone().requires_grad_()
    aim = objective()
    loss, figures = logged(aim(x, aim.originals(CROWD)))
    faces = Pair().all_faces(x)
    shown = faces[faces.is_face]
    p = aim.judges.probabilities(TOY, x[shown.image_index], shown)  # of the five faces
    each = alignment_loss(p, expected_targets(p, (0.5, 0.5)), 0.0)
    assert shown.image_index.tolist() == [0, 0, 1, 2, 2]
    expected = ((each[0] + each[1]) / 2 + each[2] + (each[3] + each[4]) / 2) / 4
    assert figures["alignment"] == pytest.approx(expected.item(), rel=1e-5)
    assert figures["faces"] == 0.75
    assert figures["share/brightness/dark"] == pytest.approx(4 / 5)
    (g,) = torch.autograd.grad(loss, x)
    (wanted,) = torch.autograd.grad(expected, x)
    torch.testing.assert_close(g, wanted, atol=1e-4, rtol=1e-3)  # no semantics: the originals
    assert (wanted[0, 0, 3, [2, 11]] != 0).all()  # both faces of one image


def test_with_one_face_each_all_are_the_largest():
    before = CROWD + 0.05 * torch.randn(CROWD.shape, generator=torch.Generator().manual_seed(1))
    found = []
    for people in ("largest", "all"):
        aim, x = objective(people, One()), CROWD.clone().requires_grad_()
        loss, figures = logged(aim(x, aim.originals(before)))
        found.append((torch.autograd.grad(loss, x)[0], figures))
    torch.testing.assert_close(found[0][0], found[1][0])
    assert found[0][1] == pytest.approx(found[1][1])


def looked(x, originals, micro_batch=None):
    """This process's part of: gradient, and the figures of all."""
    embeddings = torch.nn.functional.normalize(torch.ones(1, 3 * 16), dim=1)
    embedder = NetworkEncoder(lambda chips: chips.flatten(1) + 0.1, Pixels(4))
    real = ReferenceFaces(embedder, embeddings)
    aim, share = objective(reference_faces=real), distributed.shard(len(x))
    images = x[share].clone().requires_grad_()
    before = aim.originals(originals[share], micro_batch)
    loss, figures = logged(aim(images, before, ("a", "b"), micro_batch))
    return torch.autograd.grad(loss, images)[0].numpy(), figures


@pytest.mark.parametrize("count", [1, 3])
def test_shares_and_micro_batches_change_nothing(count):
    x = torch.cat([CROWD, halves([0.2, None, None, 0.6], [None, 0.4, None, -0.5])])
    originals = x + 0.03 * torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    originals[[1, 6], :, 0, 0] = -2  # there is one face less in these originals
    gradient, figures = looked(x, originals)
    assert figures["face"] > 0
    parts = together(count, looked, x, originals, 3)
    found = torch.cat([torch.from_numpy(part[0]) for part in parts])
    torch.testing.assert_close(found, torch.from_numpy(gradient), atol=1e-7, rtol=1e-5)
    for _, seen in parts:
        assert seen == pytest.approx(figures, abs=1e-6)


@pytest.mark.parametrize(("right", "factor"), [(-0.6, 1.0), (0.6, 0.5), (None, 0.5)])
def test_a_face_is_compared_with_the_one_that_was_in_its_place(right, factor):
    """Two dark faces and two bright ones stay; in the first original one was otherwise."""
    x = halves([-0.8, 0.8], [-0.6, 0.7])
    aim = objective(threshold=1.0, semantics_changed=0.5, semantics_face=1.0)  # semantics alone
    before = halves([-0.8, 0.8], [right, 0.7])
    noise = 0.05 * torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    before = before + noise.masked_fill(before == -2, 0)
    x.requires_grad_()
    (g,) = torch.autograd.grad(aim(x, aim.originals(before))[0], x)
    like = [Encoder()(v) for v in (x, before)]
    (full,) = torch.autograd.grad(2 * 2 * (1 - (like[0] * like[1]).sum(1)).mean(), x)
    ratio = (g * full).sum((1, 2, 3)) / full.square().sum((1, 2, 3))
    assert ratio.tolist() == pytest.approx([factor, 1.0], abs=1e-3)


def test_the_originals_of_crowds_come_back_from_the_disk(tmp_path):
    cache = OriginalImageCache(tmp_path, None)
    made = objective().originals(CROWD)
    cache.get({}, lambda: made, CPU)
    again = cache.get({}, never, CPU)
    assert equal(again.faces.image_index, made.faces.image_index)
    assert equal(again.classes, made.classes)


# ---- evaluation ----------------------------------------------------------------------------------


class Corners:
    """Two faces in the corners of some images, the larger one first; one in the others."""

    def __call__(self, images):
        n = len(images)
        return Faces(torch.tensor([[0.0, 0, 8, 8]]).repeat(n, 1), torch.ones(n, dtype=torch.bool))

    def all_faces(self, images):
        n = len(images)
        second = (images[:, 0, 4, 4] > images[:, 0, 12, 12]).nonzero().squeeze(1)
        boxes = torch.tensor([[0.0, 0, 8, 8]] * n + [[10.0, 10, 16, 16]] * len(second))
        return faces_of_images(boxes, torch.cat([torch.arange(n), second]), n)


@pytest.mark.slow
def test_every_face_is_counted_with_its_image(tmp_path):
    pipe, whole = pipeline(), replace(TONE, region="image")
    asked = judges(face_detector=Corners(), people="all")
    report = evaluate(pipe, PROMPTS, [HUE, whole], judges=asked, batch_size=4, **QUICK)
    largest = evaluate(
        pipe, PROMPTS, [HUE, whole], judges=replace(asked, people="largest"), **QUICK
    )
    records = report.records
    others = records.others_found.sum(1)
    assert 0 < others.sum() < len(others)
    np.testing.assert_array_equal(records.found, largest.records.found)
    np.testing.assert_allclose(
        records.probabilities["hue"], largest.records.probabilities["hue"], atol=2e-3
    )
    for i, prompt in enumerate(report.prompts):
        mine = records.prompt == i
        hues = [*records.probabilities["hue"][mine].argmax(1)]
        tones = [*records.probabilities["tone"][mine].argmax(1)]
        for row in np.flatnonzero(mine):
            for j in np.flatnonzero(records.others_found[row]):
                hues.append(records.others_probabilities["hue"][row, j].argmax())
                tones.append(records.probabilities["tone"][row].argmax())
        shares = np.bincount(hues, minlength=3) / len(hues)
        got = list(prompt.attributes["hue"].frequencies.values())
        np.testing.assert_allclose(got, shares, atol=1e-6)
        joint = np.bincount(np.array(hues) * 2 + tones, minlength=6) / len(hues)
        got = list(prompt.attributes["hue x tone"].frequencies.values())
        np.testing.assert_allclose(got, joint, atol=1e-6)
        assert prompt.faces == 5  # images with a face
    assert report.summary.bias["tone"] == largest.summary.bias["tone"]
    faces = report.summary.bias["hue"].faces_per_prompt
    assert faces == pytest.approx((15 + others.sum()) / 3, abs=1e-6)
    save_report(report, tmp_path / "report")
    again = load_report(tmp_path / "report")
    assert again.settings == report.settings
    assert again.settings.people == "all"
    assert again.summary == report.summary
    assert list(again.records.lines()) == list(records.lines())
    assert "every one counts" in (tmp_path / "report" / "report.html").read_text()
    assert again.select([HUE], 3).records.others_found.shape == (9, records.others_found.shape[1])
    entries = [Entry(label="a", report=report), Entry(label="b", report=largest)]
    with pytest.raises(
        ValueError, match="'b' was evaluated with people 'largest', 'a' with people"
    ):
        compare(entries)


@pytest.mark.slow
def test_all_may_be_one(tmp_path):
    asked = judges(face_detector=One(), people="all")
    report = evaluate(pipeline(), PROMPTS, [HUE], judges=asked, **QUICK)
    assert report.records.others_found.shape == (15, 0)
    save_report(report, tmp_path / "report")
    again = load_report(tmp_path / "report")
    assert again.summary == report.summary
    largest = evaluate(pipeline(), PROMPTS, [HUE], judges=judges(face_detector=One()), **QUICK)
    assert report.summary == largest.summary


def test_a_report_of_the_largest_is_written_as_before(tmp_path):
    save_report(made_up([[1, 1]], [[[0, 1]]]), tmp_path / "report")
    assert "people" not in json.loads((tmp_path / "report" / "report.json").read_text())["settings"]
    assert "others" not in (tmp_path / "report" / "records.jsonl").read_text()


def test_a_rival_method_counts_every_face():
    asked = replace(rival_judges(Corners()), people="all")
    shares = _class_shares(pipeline(), RIVAL_PROMPTS, rival_task(), asked, 2)
    assert np.allclose(shares[:, :3].sum(1), 1)


# ---- the testbed ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_both_teachers_are_counted():
    loaded = load_judges(EvaluationModelsSection(), [world.GENDER], people="all")
    report = evaluate(
        testbed.pipeline(),
        [TWO],
        [world.GENDER],
        judges=loaded,
        **{"images_per_prompt": 4, "steps": 8, "guidance_scale": 4.5, "progress": False},
    )
    assert report.summary.bias["gender"].faces_per_prompt >= 7
    assert report.summary.faces == 4


@pytest.mark.slow
def test_both_teachers_are_trained_on(tmp_path):
    (tmp_path / "prompts.txt").write_text(TWO)
    options = {"prompts_per_iteration": 1, "distinct_iterations": 1, "validate_every": None}
    trained = FairnessFinetuner.from_recipe(
        "testbed-gender",
        base={"dtype": "float32"},
        people="all",
        prompts={"sets": [str(tmp_path / "prompts.txt")], "images_per_prompt": 4},
        adapter={"rank": 2},
        sampling={"steps": 4},
        gradient={"replay_steps": 1},
        losses={"face": 0.1},
        train={"iterations": 2, "micro_batch": 3} | options,
        tracker="none",
        output=str(tmp_path / "run"),
    )
    figures = [
        trained.iteration(i).metrics() for i in range(2)
    ]  # the second has its originals from the disk
    assert all(f["skipped"] == 0 and f["gradient"] > 0 for f in figures)
    female = figures[0]["share/gender/female"]
    assert female * 4 != pytest.approx(round(female * 4))  # of more faces than images
