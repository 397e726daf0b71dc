"""Prompts that leave nothing to change, measured: drawn once, judged, saved, gone on with."""

import dataclasses
import json

import numpy as np
import pytest
from judging import HUE, PROMPTS, QUICK, TONE, find_all, find_faces, find_none, judges
from PIL import Image
from reports import group, report
from test_resuming import Counting, interrupt
from tiny import pipeline

from diffusers_fair.baselines.base import ChangedPipeline
from diffusers_fair.evaluation.evaluate import evaluate
from diffusers_fair.evaluation.generate import image_seed, prompt_key, takes_negative_prompts
from diffusers_fair.evaluation.groups import with_groups
from diffusers_fair.evaluation.judge import thumbnails
from diffusers_fair.prompts.groups import KeptPrompt, PromptGroup
from diffusers_fair.reports.estimate import Estimate
from diffusers_fair.reports.folder import load_report, save_report
from diffusers_fair.reports.groups import _share_obeyed, pixel_change, summaries_from_json
from diffusers_fair.reports.images import groups_sheet
from diffusers_fair.reports.measures import MEASURES, Measure, warning

NAMED = PromptGroup(
    "named",
    (
        KeptPrompt("a red baker", {"hue": "red"}),
        KeptPrompt("a blue judge", {"hue": "blue"}, unseen=True),
        KeptPrompt("a dark green nurse", {"hue": "green", "tone": "dark"}),
    ),
    2,
)
UNTOUCHED = PromptGroup(
    "untouched", (KeptPrompt(""), KeptPrompt("a lamp"), KeptPrompt("a lamp", negative="blurry")), 3
)
GROUPS = (NAMED, UNTOUCHED)


def measured(pipe=None, **options):
    attributes = options.pop("attributes", [HUE, TONE])
    options = {"judges": judges(), "groups": GROUPS, **QUICK} | options
    return evaluate(pipe or pipeline(), options.pop("prompts", PROMPTS), attributes, **options)


@pytest.fixture(scope="module")
def base():
    return measured()


@pytest.fixture(scope="module")
def other(base):
    return measured(pipeline(seed=1), reference=base)


# ---- images --------------------------------------------------------------------------------------


def same_records(one, other):
    a, b = one.arrays(), other.arrays()
    assert a.keys() == b.keys()
    for name, values in a.items():
        np.testing.assert_array_equal(values, b[name], err_msg=name)


def test_neutral_images_are_the_same_with_and_without_groups(base):
    without = measured(groups=())
    same_records(base.records, without.records)
    assert without.groups == {}
    assert without.summary == base.summary


@pytest.mark.slow
def test_they_are_measured_unless_they_are_left_out():
    found = measured(groups=None, attributes=[HUE], images_per_prompt=1)
    assert list(found.groups) == ["named", "untouched"]  # nothing implies a colour
    asked = {prompt.expected_classes["hue"] for prompt in found.groups["named"].group.prompts}
    assert asked == set(HUE.classes)


@pytest.mark.slow
def test_an_image_is_decided_by_its_words_and_not_by_its_place(base):
    turned = dataclasses.replace(NAMED, prompts=NAMED.prompts[::-1], images_per_prompt=1)
    again = measured(groups=[turned], batch_size=1).groups["named"]
    seeds = base.groups["named"].records.seed.reshape(3, 2)
    assert again.records.seed.tolist() == seeds[::-1, 0].tolist()
    assert again.records.seed[2] == image_seed(0, prompt_key("a red baker"), 0)
    np.testing.assert_allclose(
        again.records.features["dino"][::-1],
        base.groups["named"].records.features["dino"][::2],
        atol=1e-4,
    )


def test_negative_prompts_are_given_only_where_there_is_one():
    given = []

    class Watched:
        def __init__(self, pipe):
            self.pipe = pipe

        def __call__(self, **options):
            given.append(options.get("negative_prompt"))
            return self.pipe(**options)

        def __getattr__(self, name):
            return getattr(self.pipe, name)

    measured(Watched(pipeline()), batch_size=6)
    assert given[:4] == [None] * 4  # 15 neutral images in three batches, and the named ones
    assert given[4:] == [None, ["blurry"] * 3]


class NoNegatives:
    """A pipeline whose call has no parameter `negative_prompt`."""

    def __init__(self, pipe):
        self.pipe = pipe

    def __call__(self, prompt, generator, num_inference_steps, guidance_scale, output_type):
        return self.pipe(
            prompt=prompt,
            generator=generator,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            output_type=output_type,
        )

    def __getattr__(self, name):
        return getattr(self.pipe, name)


@pytest.mark.slow
def test_a_pipeline_without_negative_prompts_skips_prompts_that_have_one(base, tmp_path):
    pipe, alone = NoNegatives(pipeline()), PromptGroup("implied", UNTOUCHED.prompts[2:])
    out = tmp_path / "r"
    report = measured(pipe, groups=[*GROUPS, alone], reference=base, out=out)
    assert list(report.groups) == ["named", "untouched"]
    assert [p.text for p in report.groups["untouched"].group.prompts] == ["", "a lamp"]
    assert report.shortfalls() == []
    measured(pipe, groups=[*GROUPS, alone], reference=base, out=out)  # the report that is there
    plain = dataclasses.replace(base, groups={})
    added = with_groups(plain, pipe, GROUPS, judges=judges(), progress=False)
    assert added.groups["untouched"].group == report.groups["untouched"].group
    asked = [takes_negative_prompts(p) for p in (pipe, pipeline(), ChangedPipeline(pipeline()))]
    assert asked == [False, True, True]


def test_a_negative_prompt_changes_the_image_and_its_noise_is_its_own(base):
    records = base.groups["untouched"].records
    assert len(set(records.seed.tolist())) == len(records.seed) == 9
    lamp = measured(
        groups=[dataclasses.replace(UNTOUCHED, prompts=(KeptPrompt("a lamp", negative="x"),))]
    )
    changed = lamp.groups["untouched"].records.features["thumbnail"]
    assert (changed != records.features["thumbnail"][3:6]).any()


# ---- what is obeyed ------------------------------------------------------------------------------


@pytest.mark.parametrize("detector", [find_faces, find_all, find_none])
def test_obeyed_means_a_face_of_every_class_that_is_asked_for(detector):
    found = measured(judges=judges(face_detector=detector), groups=[NAMED]).groups["named"]
    records = found.records
    for row, i in enumerate(records.prompt):
        wanted = NAMED.prompts[i].expected_classes
        shown = {
            a.name: a.classes[int(np.argmax(records.probabilities[a.name][row]))]
            for a in (HUE, TONE)
        }
        expected = records.found[row] and all(shown[name] == c for name, c in wanted.items())
        assert records.scores["obeyed"][row] == expected
    by_prompt = records.scores["obeyed"].reshape(3, 2).mean(1)
    summary = found.summary
    assert summary.obeyed.mean == pytest.approx(by_prompt.mean(), abs=1e-6)
    assert summary.seen.mean == pytest.approx(by_prompt[[0, 2]].mean(), abs=1e-6)
    assert summary.unseen == Estimate(by_prompt[1], 0.0, None, 1)


def test_two_classes_asked_for_at_once_are_also_counted_apart():
    made = group(
        prompts=[KeptPrompt("a dark red hat", {"hue": "red", "tone": "dark"})],
        labels={"hue": [0, 0, 0, 1], "tone": [0, 1, 1, 0]},
        images=4,
    )
    assert made.summary.obeyed.mean == 0.25
    found = {name: estimate.mean for name, estimate in made.summary.attributes.items()}
    assert found == {"hue": 0.75, "tone": 0.5}


def test_where_every_face_counts_an_image_obeys_by_the_share_of_its_faces():
    whole = dataclasses.replace(TONE, region="image")
    prompts = [
        KeptPrompt("a red hat", {"hue": "red"}),
        KeptPrompt("a dark hat", {"tone": "dark"}),
        KeptPrompt("a dark red hat", {"hue": "red", "tone": "dark"}),
        KeptPrompt("a hat"),
    ]
    made = group(
        prompts=prompts,
        labels={"hue": [0, 0, 0, 0], "tone": [0, 0, 0, 0]},
        attributes=(HUE, whole),
        images=1,
    )
    records = dataclasses.replace(
        made.records,
        found=np.array([True, False, True, True]),
        others_found=np.array([[True, True], [False] * 2, [True, False], [True, True]]),
        others_boxes=np.zeros((4, 2, 4)),
        others_probabilities={"hue": np.eye(3)[[[0, 1], [1, 1], [2, 0], [0, 0]]]},
    )
    expected = [2 / 3, 1, 1 / 2, np.nan]
    found = _share_obeyed(prompts, (HUE, whole), records)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    alone = _share_obeyed(prompts, (HUE, whole), made.records)
    np.testing.assert_array_equal(alone, [1, 1, 1, np.nan])  # the largest faces


def test_where_nothing_is_asked_there_is_nothing_to_obey(base):
    found = base.groups["untouched"]
    assert np.isnan(found.records.scores["obeyed"]).all()
    assert found.summary.obeyed is None
    assert found.summary.attributes == {}
    assert found.summary.dino is None  # nothing to compare with


# ---- what is left alone --------------------------------------------------------------------------


def test_a_model_leaves_alone_what_it_draws_itself(base, other):
    same = measured(reference=base).groups["untouched"].summary
    assert same.pixels == Estimate(0.0, 0.0, (0.0, 0.0), 3)
    assert same.dino.mean == pytest.approx(1, abs=1e-5)
    changed = other.groups["untouched"].summary
    assert changed.pixels.mean > 0.01
    assert changed.clip_i.mean < 0.99


def test_pixels_change_by_their_mean_difference(base, other):
    small = [r.groups["untouched"].records.features["thumbnail"] for r in (base, other)]
    expected = np.abs(small[0].astype(int) - small[1]).mean(1) / 255
    np.testing.assert_allclose(
        other.groups["untouched"].records.scores["pixels"], expected, atol=1e-6
    )
    assert small[0].shape == (9, 3 * 64 * 64)
    assert pixel_change(np.zeros((1, 2), np.uint8), np.array([[255, 0]], np.uint8)) == [0.5]
    assert "thumbnail" not in base.groups["named"].records.features


def test_thumbnails_are_means_over_areas():
    import torch

    images = torch.full((1, 3, 128, 128), -1.0)
    images[..., ::2] = 1.0  # every other column white
    assert (thumbnails(images) == 128).all()
    assert thumbnails(torch.ones(2, 3, 16, 16)).shape == (2, 3 * 64 * 64)


# ---- figures -------------------------------------------------------------------------------------


def test_estimates_are_over_prompts_that_have_the_figure():
    found = Estimate.over([0.0, np.nan, 1.0])
    assert (found.mean, found.std, found.n) == (0.5, 0.5, 2)
    assert found.interval == (0.0, 1.0)
    assert Estimate.over([np.nan]) is None
    assert Estimate.from_json(json.loads(json.dumps(dataclasses.asdict(found)))) == found


def test_the_base_s_figures_are_of_the_same_prompts(base):
    fewer = (dataclasses.replace(NAMED, prompts=NAMED.prompts[1:], images_per_prompt=1),)
    found = measured(groups=fewer, reference=base)
    beside = base.group_summaries(found)
    assert list(beside) == ["named"]
    assert beside["named"].images == 2
    assert beside["named"].obeyed == found.groups["named"].summary.obeyed  # the same model
    assert found.shortfalls() == []


def test_other_words_may_be_unseen_by_another_adapter(base):
    told = tuple(dataclasses.replace(prompt, unseen=True) for prompt in NAMED.prompts)
    found = base.groups["named"].select(dataclasses.replace(NAMED, prompts=told)).summary
    assert found.seen is None
    assert found.unseen == base.groups["named"].summary.obeyed


def test_counted_by_one_attribute_only_its_prompts_are_left(base):
    one = base.select([HUE])
    assert [p.text for p in one.groups["named"].group.prompts] == ["a red baker", "a blue judge"]
    same_records(one.groups["untouched"].records, base.groups["untouched"].records)
    none = base.select([TONE])
    assert list(none.groups) == ["untouched"]
    again = measured(attributes=[HUE], groups=None, reference=base)  # those of the reference
    assert [g.group for g in again.groups.values()] == [g.group for g in one.groups.values()]


def test_short_of_the_base_is_told_in_words():
    prompts = [KeptPrompt(f"a red hat {i}", {"hue": "red"}) for i in range(10)]
    right, wrong = ({"hue": [label] * 10} for label in (0, 1))
    good = report(groups={"named": group(prompts=prompts, labels=right, images=1)})
    bad = report(
        "mine",
        reference=good,
        groups={"named": group(prompts=prompts, labels=wrong, images=1)},
    )
    assert [short.measure.name for short in bad.shortfalls()] == [
        "words obeyed",
        "words obeyed, words of training",
    ]
    told = warning(bad.shortfalls(), "mine")
    assert told.startswith("mine falls short of its base model by more than 5 points")
    assert "words obeyed 0.000, base 1.000" in told
    assert warning([], "mine") == ""


@pytest.mark.parametrize(("labels", "short"), [(([0] * 19 + [1]), 0), (([0] * 18 + [1] * 2), 2)])
def test_five_points_are_not_short(labels, short):
    prompts = [KeptPrompt("a red hat", {"hue": "red"})]
    good = report(groups={"named": group(prompts=prompts, labels={"hue": [0] * 20}, images=20)})
    found = report(groups={"named": group(prompts=prompts, labels={"hue": labels}, images=20)})
    assert len(found.shortfalls(good)) == short


def test_what_is_untouched_is_held_against_the_base_s_own_picture(other):
    names = {short.measure.name for short in other.shortfalls()}
    assert {"untouched: DINO", "untouched: pixel change"} <= names


def test_measures_have_names_of_their_own():
    names = [measure.name for measure in MEASURES]
    assert len(set(names)) == len(names)


def test_a_measure_by_prompt_has_gaps_for_other_prompts(base):
    found = Measure("named", "unseen", "words obeyed", "unseen words")
    values = found.by_prompt(base.groups["named"])
    assert np.isnan(values).tolist() == [True, False, True]


# ---- on disk -------------------------------------------------------------------------------------


def test_saved_and_loaded(other, tmp_path):
    save_report(other, tmp_path / "r")
    again = load_report(tmp_path / "r")
    assert again.group_summaries() == other.group_summaries()
    for name, made in other.groups.items():
        loaded = again.groups[name]
        assert loaded.group == made.group
        assert list(loaded.records.lines()) == list(made.records.lines())
        assert loaded.samples.keys() == made.samples.keys() != set()
        for key, values in made.records.features.items():
            np.testing.assert_array_equal(loaded.records.features[key], values)
    root = json.loads((tmp_path / "r" / "report.json").read_text())
    assert summaries_from_json(root) == other.group_summaries()
    beside = other.reference.group_summaries(other)
    assert summaries_from_json(root["reference"]) == beside
    lines = (tmp_path / "r" / "records.jsonl").read_text().splitlines()
    assert len(lines) == 15 + 6 + 9
    assert json.loads(lines[-1])["group"] == "untouched"
    assert (tmp_path / "r" / "samples-untouched-000.png").exists()


def test_a_sheet_shows_base_above_adapter(base, other, tmp_path):
    save_report(other, tmp_path / "r")
    sheet = np.array(Image.open(tmp_path / "r" / "groups.png"))
    top, bottom = (r.groups["named"].samples[0][0] for r in (base, other))  # 16 pixels, 6 times
    np.testing.assert_array_equal(sheet[36:132:6, 0:96:6], top)
    np.testing.assert_array_equal(sheet[132:228:6, 0:96:6], bottom)
    assert len(sheet) == 18 + 6 * (18 + 2 * 96)
    assert groups_sheet(dataclasses.replace(base, groups={}), other) is None


def test_a_loaded_report_is_a_reference(base, other, tmp_path):
    save_report(base, tmp_path / "base")
    again = measured(pipeline(seed=1), reference=load_report(tmp_path / "base"))
    assert again.group_summaries() == other.group_summaries()


def test_reports_from_before_there_were_groups(base, tmp_path):
    save_report(dataclasses.replace(base, groups={}), tmp_path)
    file = tmp_path / "report.json"
    root = json.loads(file.read_text())
    del root["groups"]
    file.write_text(json.dumps(root))
    assert load_report(tmp_path).groups == {}


def test_records_of_a_group_that_are_missing(other, tmp_path):
    save_report(other, tmp_path)
    file = tmp_path / "records.jsonl"
    file.write_text("\n".join(file.read_text().splitlines()[:-1]))
    with pytest.raises(ValueError, match=r"incomplete .*expected 9 records, got 8"):
        load_report(tmp_path)


@pytest.mark.slow
def test_stopped_and_started_again_it_repeats_nothing(base, tmp_path):
    out, options = tmp_path / "r", {"batch_size": 4}  # 4 neutral batches, 2 named, 3 untouched
    for done in (3, 2, 2):
        stop = judges(face_detector=Counting(stop_after=done, how=interrupt))
        with pytest.raises(KeyboardInterrupt):
            measured(out=out, judges=stop, **options)
    last = Counting()
    report = measured(out=out, judges=judges(face_detector=last), **options)
    assert last.looks == 9 - 7
    whole = measured(**options)
    for name, made in whole.groups.items():
        same_records(report.groups[name].records, made.records)
    assert not (out / ".partial").exists()
    counted = Counting()
    measured(out=out, judges=judges(face_detector=counted), **options)
    assert counted.looks == 0
    with pytest.raises(ValueError, match="already holds a report with other groups of prompts"):
        measured(out=out, groups=(), **options)


@pytest.mark.slow
def test_other_prompts_of_a_group_do_not_go_on(tmp_path):
    stop = judges(face_detector=Counting(stop_after=5, how=interrupt))
    with pytest.raises(KeyboardInterrupt):
        measured(out=tmp_path, judges=stop, batch_size=4)
    fewer = dataclasses.replace(NAMED, images_per_prompt=1)
    with pytest.raises(ValueError, match=r"was stopped, with other group, settings: start it with"):
        measured(out=tmp_path, groups=[fewer], batch_size=4)
    assert measured(out=tmp_path, groups=(), batch_size=4).groups == {}


# ---- a reference that lacks them -----------------------------------------------------------------


@pytest.mark.slow
def test_what_a_reference_lacks_is_measured(base, other, tmp_path):
    plain = dataclasses.replace(base, groups={})
    looks = Counting()
    full = with_groups(plain, pipeline(), GROUPS, judges=judges(face_detector=looks))
    assert looks.looks == 2
    assert full.group_summaries() == base.group_summaries()
    again = measured(pipeline(seed=1), reference=full)
    assert again.group_summaries() == other.group_summaries()


def test_what_a_reference_has_is_not_measured_again(base):
    looks = Counting()
    some = dataclasses.replace(NAMED, prompts=NAMED.prompts[:1], images_per_prompt=1)
    full = with_groups(base, pipeline(), [some], judges=judges(face_detector=looks))
    assert looks.looks == 0
    assert full.groups["named"].group == some


@pytest.mark.slow
def test_measuring_what_a_reference_lacks_may_be_stopped(base, tmp_path):
    plain = dataclasses.replace(base, groups={})
    options = {"batch_size": 4, "out": tmp_path / "r"}
    stop = judges(face_detector=Counting(stop_after=3, how=interrupt))
    with pytest.raises(KeyboardInterrupt):
        with_groups(plain, pipeline(), GROUPS, judges=stop, **options)
    looks = Counting()
    full = with_groups(
        plain, pipeline(), GROUPS, judges=judges(face_detector=looks), progress=False, **options
    )
    assert looks.looks == 2
    measured(reference=full, **options)
    assert not (tmp_path / "r" / ".partial").exists()


def test_pictures_that_were_there_already_get_no_others(base):
    settings = dataclasses.replace(base.settings, seed=None)
    with pytest.raises(ValueError, match="images come from a folder, so control prompts cannot"):
        with_groups(dataclasses.replace(base, settings=settings), None, GROUPS, judges=judges())


def added(reference):
    return with_groups(reference, None, [NAMED], judges=judges())


@pytest.mark.parametrize("ask", [measured, added])
def test_a_reference_that_counts_other_faces(ask, base):
    settings = dataclasses.replace(base.settings, people="all")
    message = "'base' was evaluated with people 'all', but the judges have people 'largest': evalu"
    with pytest.raises(ValueError, match=message):
        ask(reference=dataclasses.replace(base, settings=settings))


# ---- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        (
            None,
            "the reference measured no groups of control prompts: add them with evaluation",
        ),
        (GROUPS, "reference lacks images of the group of prompts 'named': add them with evaluat"),
    ],
)
def test_a_reference_without_groups(base, groups, message):
    plain = dataclasses.replace(base, groups={})
    with pytest.raises(ValueError, match=message):
        measured(reference=plain, groups=groups)
    assert measured(reference=plain, groups=()).groups == {}


RED = KeptPrompt("a red hat", {"hue": "red"})


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ([PromptGroup("mine", (RED,))], r"among named, implied, untouched, .* got \['mine'\]"),
        ([NAMED, NAMED], r"each at most once; got \['named', 'named'\]"),
        ([PromptGroup("named", ())], "the group 'named' has no prompts: leave it out"),
        ([PromptGroup("named", (RED,), 0)], "images_per_prompt of the group 'named' must be 1 or"),
        ([PromptGroup("named", (RED, RED))], "has the prompt 'a red hat' more than once: leave"),
        (
            [PromptGroup("named", (KeptPrompt("a hat", {"hue": "pink"}),))],
            r"'a hat' asks for 'pink' of 'hue', but the evaluated classes are {'hue': \('red',",
        ),
        (
            [PromptGroup("named", (KeptPrompt("a hat", {"size": "big"}),))],
            "asks for 'big' of 'size', but the evaluated classes are",
        ),
    ],
)
def test_groups_that_cannot_be_measured(groups, message):
    with pytest.raises(ValueError, match=message):
        measured(groups=groups)


def test_images_that_a_report_has_not(base):
    more = dataclasses.replace(NAMED, images_per_prompt=3)
    with pytest.raises(ValueError, match="lacks images of the prompt group 'named': evaluate"):
        base.groups["named"].select(more)
