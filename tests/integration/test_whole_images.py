"""Attributes of whole images: what their classifiers see, what counts, how training moves it."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from judging import HUE, PROMPTS, QUICK, TONE, find_faces, find_none, judges
from judging import classifier as by_colour
from stand_ins import checkpoint_folder, open_clip_folder, vit_folder
from test_baselines import PROMPTS as RIVAL_PROMPTS
from test_baselines import judges as rival_judges
from test_baselines import task as rival_task
from test_evaluation import made_up
from test_io import adapter_info, weights
from test_objective import (
    CONTRAST,
    TOY,
    Detector,
    Encoder,
    classifier,
    logged,
    pictures,
    richness,
    section,
)
from tiny import pipeline
from together import together
from torch.nn import functional as F

import diffusers_fair.training.trainer as trainer_module
from diffusers_fair import FairnessFinetuner, distributed, testbed
from diffusers_fair.adapters.folder import read_adapter, write_adapter
from diffusers_fair.adapters.format import INFO_FILE
from diffusers_fair.attributes import Attribute
from diffusers_fair.backends.registry import load_judges
from diffusers_fair.baselines.uce import _class_shares
from diffusers_fair.config.models import ModelsSection
from diffusers_fair.config.schema import LossesSection, RunConfig
from diffusers_fair.evaluation.evaluate import evaluate
from diffusers_fair.loading import load_fair_adapter
from diffusers_fair.objective.losses import alignment_loss
from diffusers_fair.objective.objective import Objective
from diffusers_fair.objective.targets import _joint_targets, expected_targets, region_targets
from diffusers_fair.reports.comparison import Entry, compare
from diffusers_fair.reports.folder import load_report, save_report
from diffusers_fair.testbed import world
from diffusers_fair.vision.classifiers import NetworkClassifier, classifier_input
from diffusers_fair.vision.encoders import Pixels
from diffusers_fair.vision.faces import no_faces
from diffusers_fair.vision.judges import Judges

WHOLE = replace(TOY, region="image")  # how bright the whole image is
WHOLE_HUE = replace(HUE, region="image")


def test_the_whole_image_is_squeezed_to_the_classifiers_size():
    x = torch.rand(2, 3, 12, 20, generator=torch.Generator().manual_seed(0)) * 2 - 1
    seen = classifier_input(WHOLE, x, no_faces(x), 8)
    assert seen.shape == (2, 3, 8, 8)
    torch.testing.assert_close(seen, Pixels(8)(x))
    assert torch.equal(classifier_input(WHOLE, seen, no_faces(x), 8), seen)  # of that size already
    small = x[:1, :, :6, :10].double().requires_grad_()
    assert torch.autograd.gradcheck(lambda v: classifier_input(WHOLE, v, no_faces(v), 4), small)


def test_a_region_is_one_of_two():
    with pytest.raises(
        ValueError, match=r"region of attribute 'hat' must be one of .*, got 'nose'"
    ):
        Attribute("hat", ("on", "off"), region="nose")


# ---- targets -------------------------------------------------------------------------------------


def simplex(n, classes, seed):
    return torch.rand(n, classes, generator=torch.Generator().manual_seed(seed)).softmax(1)


def test_images_with_a_face_are_transported_together_and_the_others_apart():
    face, whole = simplex(4, 2, 0), simplex(6, 3, 1)
    counts = torch.tensor([1, 0, 1, 1, 0, 1])
    shown = counts > 0
    target, cost = [[0.5, 0.5], [0.5, 0.3, 0.2]], [1.0, 2.0]
    found = region_targets([face, whole], target, counts, [False, True], cost_weights=cost)
    together_ = _joint_targets([face, whole[shown]], target, cost_weights=cost)
    apart = expected_targets(whole[~shown], target[1])
    torch.testing.assert_close(found[0].plan, together_[0].plan)
    torch.testing.assert_close(found[1].plan[shown], together_[1].plan)
    torch.testing.assert_close(found[1].plan[~shown], apart.plan)
    assert torch.equal(found[1].labels, found[1].plan.argmax(1))
    assert torch.equal(found[1].confidence, found[1].plan.amax(1))


@pytest.mark.parametrize("counts", [[1, 0, 1], [0, 0, 0], [1, 1, 1]])
def test_whole_images_alone_are_transported_whether_there_is_a_face_or_not(counts):
    whole = simplex(3, 2, 0)
    (found,) = region_targets([whole], [[0.5, 0.5]], torch.tensor(counts), [True])
    torch.testing.assert_close(found.plan, expected_targets(whole, [0.5, 0.5]).plan)


def test_without_a_face_there_are_no_targets_of_faces():
    empty, whole = torch.zeros(0, 2), simplex(3, 2, 0)
    found = region_targets([empty, whole], [[0.5, 0.5]] * 2, torch.zeros(3).long(), [False, True])
    assert [len(target.labels) for target in found] == [0, 3]


# ---- the loss ------------------------------------------------------------------------------------


def objective(*attributes, detector=None, **options) -> Objective:
    """Brightness, of the face or of the whole image, and contrast."""
    made = Judges(
        face_detector=detector or Detector(),
        classifiers={
            "brightness": classifier(),
            "contrast": NetworkClassifier(richness, CONTRAST.classes, 4),
        },
        clip=Encoder(),
        dino=Encoder(),
    )
    sections = [section(a, **{"threshold": 0.0} | options) for a in attributes]
    return Objective(made, sections, LossesSection(semantics=2.0))


def test_every_image_counts_and_all_of_it():
    x = pictures([-0.8, -0.6, -0.4, -0.2])
    x[1, :, 0, 0] = -2  # no face
    x.requires_grad_()
    aim = objective(WHOLE)
    originals = aim.originals(x.detach())
    loss, figures = logged(aim(x, originals))
    p = classifier()(F.interpolate(x, (4, 4), mode="bicubic", antialias=True))
    expected = alignment_loss(p, expected_targets(p, (0.5, 0.5)), 0.0).mean()
    assert figures["alignment"] == pytest.approx(expected.item(), rel=1e-5)
    assert figures["share/brightness/dark"] == 1
    assert "faces" not in figures  # nothing depends on them
    (g,) = torch.autograd.grad(loss, x)
    assert (g.flatten(2).abs().amin(2) > 0).all()  # of every pixel, of the one without a face, too
    (wanted,) = torch.autograd.grad(expected, x)
    torch.testing.assert_close(g, wanted, atol=1e-4, rtol=1e-3)  # no semantics: the originals


def test_no_detector_is_needed():
    x = pictures([-0.8, -0.6, 0.4])
    gradients = []
    for detector in (None, no_faces):
        y = x.clone().requires_grad_()
        aim = objective(WHOLE, detector=detector)
        loss, _ = aim(y, aim.originals(0.9 * x))
        gradients.append(torch.autograd.grad(loss, y)[0])
    assert torch.equal(*gradients)


def test_less_likeness_is_asked_of_a_changed_image_but_no_less_of_its_face():
    aim = objective(WHOLE, threshold=1.0, semantics_changed=0.5, semantics_face=0.1)
    original = pictures([-0.8, -0.7, -0.6, -0.5])  # the last two should become bright
    x = original + 0.1 * torch.randn(original.shape, generator=torch.Generator().manual_seed(2))
    x.requires_grad_()
    originals = aim.originals(original)
    (g,) = torch.autograd.grad(aim(x, originals)[0], x)
    like = [Encoder()(v) for v in (x, original)]
    (full,) = torch.autograd.grad(2 * 2 * (1 - (like[0] * like[1]).sum(1)).mean(), x)
    expected = torch.tensor([1, 1, 0.5, 0.5]).view(4, 1, 1, 1).expand_as(g)
    torch.testing.assert_close(g / full, expected, atol=1e-3, rtol=1e-3)


def mixed() -> tuple[torch.Tensor, torch.Tensor]:
    """Eight images of two prompts with brightness and contrast of all kinds, and originals."""
    levels = torch.tensor([-0.6, -0.4, 0.5, -0.2, 0.3, 0.6, -0.5, 0.7]).view(8, 1, 1, 1)
    spread = torch.tensor([0.05, 0.5, 0.3, 0.05, 0.5, 0.05, 0.05, 0.4]).view(8, 1, 1, 1)
    noise = torch.randn(2, 8, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    x = levels + spread * noise[0]
    originals = x + 0.05 * noise[1]
    x[:, :, 0, 0] = originals[:, :, 0, 0] = 0.5
    x[[2, 6], :, 0, 0] = -2  # a prompt's third image shows no face
    return x, originals


def looked(x, originals, micro_batch=None):
    """This process's part of: gradient, and the figures of all."""
    aim, share = objective(WHOLE, CONTRAST), distributed.shard(len(x))
    images = x[share].clone().requires_grad_()
    before = aim.originals(originals[share], micro_batch)
    loss, figures = logged(aim(images, before, ("a", "b"), micro_batch))
    return torch.autograd.grad(loss, images)[0].numpy(), figures


def test_a_face_and_its_whole_image_are_balanced_together():
    x, originals = mixed()
    x = x.requires_grad_()
    aim = objective(WHOLE, CONTRAST)
    _, figures = logged(aim(x, aim.originals(originals), ("a", "b")))
    shown = x[:, 0, 0, 0] > -1
    p = aim.judges.probabilities(WHOLE, x, no_faces(x))
    q = aim.judges.probabilities(CONTRAST, x, Detector()(x))
    expected = torch.zeros(8)
    for rows in (torch.arange(4), torch.arange(4, 8)):
        seen, rest = rows[shown[rows]], rows[~shown[rows]]
        both = _joint_targets([p[seen], q[seen]], [[0.5, 0.5]] * 2)
        expected[seen] = alignment_loss(p[seen], both[0], 0) + alignment_loss(q[seen], both[1], 0)
        expected[rest] = alignment_loss(p[rest], expected_targets(p[rest], [0.5, 0.5]), 0)
    assert figures["alignment"] == pytest.approx(expected.mean().item(), rel=1e-4)
    assert figures["faces"] == 0.75
    assert figures["share/brightness/dark"] == (p[:, 0] > 0.5).float().mean().item()
    assert figures["share/contrast/flat"] == pytest.approx(
        (q[shown, 0] > 0.5).float().mean().item()
    )


@pytest.mark.parametrize("count", [1, 3])
def test_shares_and_micro_batches_change_nothing(count):
    x, originals = mixed()
    gradient, figures = looked(x, originals)
    parts = together(count, looked, x, originals, 3)
    found = torch.cat([torch.from_numpy(part[0]) for part in parts])
    torch.testing.assert_close(found, torch.from_numpy(gradient), atol=1e-7, rtol=1e-5)
    for _, seen in parts:
        assert seen == pytest.approx(figures, abs=1e-6)


# ---- evaluation ----------------------------------------------------------------------------------


def test_counts_of_whole_images_faces_and_both():
    """Two prompts of three images; in one of each there is no face."""
    whole = replace(TONE, region="image")
    hues, tones = [[0, 1, 2], [0, 0, 1]], [[0, 1, 1], [0, 1, 0]]
    report = made_up([[1, 0, 1], [1, 1, 0]], [hues, tones], attributes=(HUE, whole))
    first, second = (prompt.attributes for prompt in report.prompts)
    assert list(first["hue"].frequencies.values()) == [0.5, 0, 0.5]
    assert list(first["tone"].frequencies.values()) == pytest.approx([1 / 3, 2 / 3], abs=1e-6)
    assert list(second["tone"].frequencies.values()) == pytest.approx([2 / 3, 1 / 3], abs=1e-6)
    joint = first["hue x tone"].frequencies
    assert {name: share for name, share in joint.items() if share} == {
        "red, dark": 0.5,
        "blue, light": 0.5,
    }
    assert report.summary.bias["tone"].faces_per_prompt == 3
    assert report.summary.bias["hue x tone"].faces_per_prompt == 2
    assert report.summary.face_rate.mean == pytest.approx(2 / 3, abs=1e-6)


def test_without_attributes_of_faces_no_prompt_lacks_one():
    whole = made_up([[0, 0], [1, 0]], [[[0, 1], [2, 2]]], attributes=(WHOLE_HUE,))
    assert whole.summary.bias["hue"].n == 2
    assert whole.summary.prompts_without_faces == whole.summary.prompts_with_one_face == []
    assert "prompt 0" in made_up([[0, 0], [1, 0]], [[[0, 1], [2, 2]]]).summary.prompts_without_faces


@pytest.mark.slow
def test_evaluation_sees_whole_images_with_and_without_a_face(tmp_path):
    pipe = pipeline()
    asked = judges(face_detector=find_faces)
    asked = replace(asked, classifiers=asked.classifiers | {"all": by_colour(TONE.classes)})
    everything = Attribute("all", TONE.classes, TONE.target, region="image")
    report = evaluate(pipe, PROMPTS, [HUE, everything], judges=asked, **QUICK)
    found = report.records.found
    assert 0 < found.sum() < len(found)
    assert np.allclose(report.records.probabilities["all"].sum(1), 1, atol=1e-5)
    plain = evaluate(pipe, PROMPTS, [HUE], judges=asked, **QUICK)
    assert report.summary.bias["hue"] == plain.summary.bias["hue"]
    save_report(report, tmp_path / "mixed")
    again = load_report(tmp_path / "mixed")
    assert again.settings == report.settings
    assert again.summary == report.summary
    assert (
        "they do not count for attributes of faces"
        in (tmp_path / "mixed" / "report.html").read_text()
    )
    lines = again.records.lines(again.settings.attributes)
    assert [set(line["probabilities"]) for line in lines] == [
        {"hue", "all"} if there else {"all"} for there in found
    ]
    with pytest.raises(ValueError, match=r"not 'all' with classes .*\(face\): evaluate again"):
        report.select([replace(everything, region="face")])
    without = replace(asked, face_detector=no_faces)
    faceless = evaluate(pipe, PROMPTS, [everything], judges=without, **QUICK)
    assert faceless.summary.bias["all"] == report.summary.bias["all"]
    save_report(faceless, tmp_path / "whole")
    page = (tmp_path / "whole" / "report.html").read_text()
    assert "no face was found; they do not count" not in page
    assert "only the largest counts" not in page


def test_reports_of_faces_are_written_as_before_there_were_regions(tmp_path):
    report = made_up([[1, 1]], [[[0, 1]]])
    save_report(report, tmp_path / "report")
    asked = json.loads((tmp_path / "report" / "report.json").read_text())["settings"]
    assert asked["attributes"] == [
        {"name": "hue", "classes": ["red", "green", "blue"], "target": [1 / 3] * 3}
    ]
    assert load_report(tmp_path / "report").settings == report.settings


def test_a_face_and_a_whole_image_are_not_compared():
    face = made_up([[1, 1]], [[[0, 1]]])
    whole = made_up([[1, 1]], [[[0, 1]]], attributes=(WHOLE_HUE,))
    with pytest.raises(ValueError, match="no attribute with the same classes in common"):
        compare([Entry(label="a", report=face), Entry(label="b", report=whole)])


def test_an_adapter_knows_the_region_of_its_attributes(tmp_path):
    attributes = (
        Attribute("hat", ("on", "off")),
        Attribute("sky", ("day", "night"), region="image"),
    )
    write_adapter(tmp_path / "adapter", weights(), adapter_info(attributes=attributes))
    assert read_adapter(tmp_path / "adapter")[0].attributes == attributes
    entries = json.loads((tmp_path / "adapter" / INFO_FILE).read_text())["attributes"]
    assert [entry.get("region") for entry in entries] == [None, "image"]
    assert set(entries[0]) == {"name", "classes", "target"}  # as older ones


def test_a_rival_method_counts_whole_images():
    wordings = [
        replace(w, attribute=replace(w.attribute, region="image")) for w in rival_task().wordings
    ]
    asked = rival_task(*wordings)
    pipe = pipeline()
    shares = _class_shares(pipe, RIVAL_PROMPTS, asked, rival_judges(find_none), 2)
    assert np.isfinite(shares).all()


# ---- recipes and models --------------------------------------------------------------------------

SKY = {"name": "sky", "classes": ["day", "night"], "region": "image"}
PHRASES = {"day": ["a blue sky", "noon"], "night": ["a dark sky", "stars"]}


def recipe(**overrides) -> RunConfig:
    """Of a whole-image attribute, with classifiers for training and evaluation."""
    sees = {"classifiers": {"sky": "checkpoint:mine"}, "face_detector": "none"}
    given = {"attributes": [SKY], "models": sees, "evaluation": {"models": sees}}
    return RunConfig.load("testbed-gender", given | overrides)


def test_a_recipe_of_whole_images_needs_no_face_detector():
    assert recipe().attributes[0].attribute() == Attribute("sky", ("day", "night"), region="image")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"attributes": [SKY | {"region": "nose"}]}, r"attributes\.0\.region: expected 'face' or"),
        (
            {"attributes": [SKY | {"region": "face"}]},
            "'sky' has region 'face', but face_detector 'none",
        ),
        (
            {"models": {"classifiers": "testbed"}},
            "'sky' has region 'image', but classifiers of kind 'testbed' only",
        ),
        (
            {"losses": {"face": 0.1}},
            r"losses\.face is 0\.1, but models\.face_detector 'none' finds",
        ),
    ],
)
def test_recipes_that_do_not_fit(overrides, message):
    with pytest.raises(ValueError, match=message):
        recipe(**overrides)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["zero_shot", "transformers", "checkpoint"])
def test_any_classifier_may_see_whole_images(kind, tmp_path):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        folder = {
            "zero_shot": lambda: open_clip_folder(tmp_path / "clip"),
            "transformers": lambda: vit_folder(tmp_path / "vit", SKY["classes"]),
            "checkpoint": lambda: checkpoint_folder(tmp_path / "mine", SKY["classes"]),
        }[kind]()
    section = {"kind": kind, "model": str(folder)}
    section |= {"phrases": PHRASES} if kind == "zero_shot" else {}
    sky = Attribute(**SKY)
    models = ModelsSection(face_detector="none", classifiers={"sky": section})
    loaded = load_judges(models, [sky])
    x = torch.rand(3, 3, 48, 40, generator=torch.Generator().manual_seed(0)) * 2 - 1
    x.requires_grad_()
    p = loaded.probabilities(sky, x, loaded.face_detector(x))
    assert torch.allclose(p.sum(1), torch.ones(3))
    (g,) = torch.autograd.grad(p[:, 0].sum(), x)
    assert (g.abs().amax((1, 2, 3)) > 0).all()


# ---- training ------------------------------------------------------------------------------------


def backdrop(images):
    """Logits (n, 2) of dark and light, by the mean brightness of the border."""
    edge = torch.ones(64, 64)
    edge[6:, 6:-6] = 0
    light = (images.mean(1) * edge).sum((1, 2)) / edge.sum()
    logit = 15 * (light - 0.3)
    return torch.stack([-logit, logit], 1)


BACKDROP = Attribute("backdrop", ("dark", "light"), region="image")


@pytest.mark.slow
def test_a_few_iterations_balance_the_backgrounds_of_the_testbed(tmp_path, monkeypatch):
    """A chef stands before something light; half of the backgrounds should be dark."""

    def with_backdrop(models, attributes, device, people="largest"):
        sees = {"backdrop": NetworkClassifier(backdrop, BACKDROP.classes, 64)}
        return replace(load_judges(models, [], device), classifiers=sees)

    monkeypatch.setattr(trainer_module, "load_judges", with_backdrop)
    prompt = world.NEUTRAL.format("chef")
    (tmp_path / "prompts.txt").write_text(prompt)
    sees = {"classifiers": {"backdrop": "checkpoint:none"}, "face_detector": "none"}
    trained = FairnessFinetuner.from_recipe(
        "testbed-gender",
        base={"dtype": "float32"},
        attributes=[BACKDROP.json() | {"threshold": 0.6}],
        prompts={"sets": [str(tmp_path / "prompts.txt")], "images_per_prompt": 6},
        models=sees,
        adapter={"rank": 4},
        sampling={"steps": 4},
        gradient={"replay_steps": 2},
        losses={"semantics": 1},
        optimizer={"lr": 5e-3, "schedule": "constant", "warmup": 0, "ema_decay": 0},
        train={
            **{"iterations": 6, "prompts_per_iteration": 1, "distinct_iterations": 1},
            **{"validate_every": None, "checkpoint_every": 100},
        },
        evaluation={"models": sees},
        tracker="none",
        output=str(tmp_path / "run"),
    )
    trained.train(progress=False)
    lines = (tmp_path / "run" / "events.jsonl").read_text().splitlines()
    shares = [json.loads(line)["share/backdrop/light"] for line in lines]
    assert shares[0] == 1
    assert all(0.1 < share < 0.9 for share in shares[-2:])
    info, _ = read_adapter(tmp_path / "run" / "adapter")
    assert info.attributes == (BACKDROP,)
    pipe = testbed.pipeline()
    load_fair_adapter(pipe, tmp_path / "run" / "adapter")
    report = evaluate(
        pipe,
        [prompt],
        info.attributes,
        judges=with_backdrop(ModelsSection(face_detector="none"), [], "cpu"),
        **{"images_per_prompt": 8, "steps": 4, "guidance_scale": 4.5, "seed": 99},
        progress=False,
    )
    assert report.summary.bias["backdrop"].mean < 0.8  # of other noise; 1 without
