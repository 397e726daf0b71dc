"""Evaluation end to end on a tiny real pipeline, and its figures on made-up records."""

import dataclasses
import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from judging import HUE, PROMPTS, QUICK, TONE, classifier, find_faces, find_none, judges
from PIL import Image
from reports import report as random_report
from rich.console import Console
from tiny import pipeline

from diffusers_fair import metrics
from diffusers_fair.attributes import Attribute
from diffusers_fair.evaluation.evaluate import evaluate as evaluate_with_groups
from diffusers_fair.evaluation.generate import generate, image_seed, progress_bar
from diffusers_fair.reports.estimate import Estimate, estimate_text
from diffusers_fair.reports.folder import load_report, save_report
from diffusers_fair.reports.images import pairs_sheet, sample_prompts
from diffusers_fair.reports.records import Records, Settings
from diffusers_fair.reports.report import Report
from diffusers_fair.reports.summary import Summary
from diffusers_fair.reports.table import table
from diffusers_fair.vision.classifiers import NetworkClassifier
from diffusers_fair.vision.encoders import NetworkEncoder, Pixels
from diffusers_fair.vision.judges import recognition


def evaluate(*args, **options):
    """Of neutral prompts alone; test_evaluation_groups.py has the others."""
    return evaluate_with_groups(*args, **{"groups": ()} | options)


@pytest.fixture(scope="module")
def pipe():
    return pipeline()


@pytest.fixture(scope="module")
def base(pipe):
    return evaluate(pipe, PROMPTS, [HUE, TONE], judges=judges(), **QUICK)


@pytest.fixture(scope="module")
def other(base):
    """Another model, judged against the first."""
    return evaluate(
        pipeline(seed=1), PROMPTS, [HUE, TONE], judges=judges(), reference=base, **QUICK
    )


def made_up(found, labels, *, attributes=(HUE,), scores=None):
    """A report of given labels: found (prompts, images), labels per attribute of the same shape."""
    prompts, images = np.shape(found)
    index = np.indices((prompts, images)).reshape(2, -1)
    n = prompts * images
    return Report(
        label="base",
        settings=Settings(
            prompts=tuple(f"prompt {i}" for i in range(prompts)),
            attributes=attributes,
            images_per_prompt=images,
            steps=1,
            guidance_scale=1.0,
            seed=0,
        ),
        records=Records(
            prompt=index[0],
            image=index[1],
            seed=np.arange(n),
            found=np.ravel(found).astype(bool),
            boxes=np.zeros((n, 4)),
            probabilities={
                a.name: np.eye(len(a.classes))[np.ravel(given)]
                for a, given in zip(attributes, labels, strict=True)
            },
            scores=scores or {"clip_t": np.full(n, 0.3)},
            features={},
        ),
        samples={},
        provenance={},
    )


def shown(before, after=None, width=100):
    """The table's text at so many columns."""
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(table(before, after))
    return console.export_text()


def test_names_are_no_markup(capsys):
    name = "[/b] {x}"
    assert name in shown(random_report(name))
    with progress_bar(1, name) as advance:
        advance(1)
    assert name in capsys.readouterr().err


KEPT_REPORTS = sorted((Path(__file__).parents[2] / "model_cards").rglob("report.json"))


def finite(report):
    """Whether JSON can hold its statistics: no NaN, no infinity."""
    json.dumps([report.summary.json(), *(p.json() for p in report.prompts)], allow_nan=False)
    return True


# --- images ---


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["dpmsolver++", "sde-dpmsolver++"])
def test_images_do_not_depend_on_the_batch(algorithm):
    pipe = pipeline(algorithm_type=algorithm)
    asked = {k: QUICK[k] for k in QUICK} | {"images_per_prompt": 2, "seed": 4}
    drawn = [
        torch.cat([b.images for b in generate(pipe, PROMPTS, batch_size=size, **asked)])
        for size in (1, 4, 6)
    ]
    torch.testing.assert_close(drawn[0], drawn[1], atol=1e-4, rtol=0)
    torch.testing.assert_close(drawn[0], drawn[2], atol=1e-4, rtol=0)
    assert drawn[0].shape == (6, 3, 16, 16)
    assert drawn[0].abs().max() <= 1
    assert len({tuple(image.flatten().tolist()) for image in drawn[0]}) == 6


def test_an_image_can_be_drawn_again_from_its_record(pipe, base):
    seed = int(base.records.seed[7])
    assert seed == image_seed(0, 1, 2)
    image = pipe(
        PROMPTS[1],
        generator=torch.Generator().manual_seed(seed),
        num_inference_steps=2,
        guidance_scale=2.0,
        output_type="np",
    ).images[0]
    np.testing.assert_allclose(base.samples[1][2], image * 255, atol=0.51)


def test_seeds_are_their_own():
    seeds = {image_seed(s, i, j) for s in range(3) for i in range(20) for j in range(20)}
    assert len(seeds) == 1200


def test_the_pipeline_keeps_its_progress_bar():
    pipe = pipeline()
    pipe.set_progress_bar_config(leave=False)
    next(generate(pipe, PROMPTS, batch_size=1, seed=0, **QUICK))
    assert pipe._progress_bar_config == {"leave": False}


def test_progress_is_on_stderr_with_the_time_left(pipe, capsys):
    asked = QUICK | {"progress": True, "images_per_prompt": 1}
    evaluate(pipe, PROMPTS, [HUE], judges=judges(), **asked)
    out, err = capsys.readouterr()
    assert not out
    assert "3/3" in err
    assert "left" in err


# --- evaluate ---


@pytest.mark.slow
def test_records_do_not_depend_on_the_batch_size(pipe, base):
    for size in (1, 7):
        again = evaluate(
            pipe, PROMPTS, [HUE, TONE], judges=judges(), batch_size=size, **QUICK
        ).records
        for name in ("prompt", "image", "seed", "found", "boxes"):
            np.testing.assert_array_equal(getattr(again, name), getattr(base.records, name))
        for name in ("probabilities", "scores", "features"):
            for key, values in getattr(base.records, name).items():
                np.testing.assert_allclose(getattr(again, name)[key], values, atol=2e-3)


def test_order_of_a_classifiers_classes_changes_nothing(pipe, base):
    shuffled = {"hue": classifier(HUE.classes, [2, 0, 1]), "tone": classifier(TONE.classes)}
    again = evaluate(pipe, PROMPTS, [HUE, TONE], judges=judges(classifiers=shuffled), **QUICK)
    np.testing.assert_allclose(
        again.records.probabilities["hue"], base.records.probabilities["hue"]
    )
    assert again.summary == base.summary


def test_joint_only_of_several_attributes(pipe, base):
    assert list(base.summary.bias) == ["hue", "tone", "hue x tone"]
    alone = evaluate(pipe, PROMPTS, [HUE], judges=judges(), **QUICK)
    assert list(alone.summary.bias) == ["hue"]
    assert alone.summary.bias["hue"] == base.summary.bias["hue"]
    assert base.select([HUE]).summary == alone.summary


def test_every_combination_of_three_attributes():
    names = "abc"
    attributes = tuple(Attribute(name, ("x", "y")) for name in names)
    settings = Settings(
        prompts=("p",),
        attributes=attributes,
        images_per_prompt=1,
        steps=1,
        guidance_scale=1,
        seed=0,
    )
    joints = ["a x b", "a x c", "b x c", "a x b x c"]
    assert [a.name for a in settings.measured()] == [*names, *joints]
    assert settings.measured()[-1].classes[1] == "x, x, y"


def test_other_targets_and_fewer_images_need_no_other_images(pipe, base):
    even = base.select([dataclasses.replace(TONE, target=(0.5, 0.5)), HUE])
    assert list(even.summary.bias) == ["tone", "hue", "tone x hue"]
    assert not even.summary.deviation
    assert even.summary.bias["hue"] == base.summary.bias["hue"]
    fewer = evaluate(pipe, PROMPTS, [TONE], judges=judges(), **QUICK | {"images_per_prompt": 3})
    assert base.select([TONE], 3).summary == fewer.summary
    with pytest.raises(ValueError, match=r"has 5 images of each prompt, not 9"):
        base.select([HUE], 9)
    with pytest.raises(ValueError, match=r"evaluated .*, not 'tone' with classes .*: evaluate"):
        base.select([dataclasses.replace(TONE, classes=TONE.classes[::-1])])


def test_deviation_only_from_uneven_targets(base):
    assert list(base.summary.deviation) == ["tone", "hue x tone"]
    tone = base.prompts[0].attributes["tone"]
    share = tone.frequencies["dark"]
    assert tone.bias == pytest.approx(abs(2 * share - 1), abs=1e-6)
    assert tone.deviation == pytest.approx(abs(2 * (share - 0.75)), abs=1e-6)


def test_a_model_against_itself_and_against_another(pipe, base, other):
    same = evaluate(pipe, PROMPTS, [HUE, TONE], judges=judges(), reference=base, **QUICK)
    for name in ("clip_i", "dino"):
        np.testing.assert_allclose(same.records.scores[name], 1, atol=1e-5)
        assert name not in base.summary.scores
        assert other.summary.scores[name].mean < 0.999
    rows = {k: v @ base.records.features[k].T for k, v in other.records.features.items()}
    np.testing.assert_allclose(other.records.scores["dino"], rows["dino"].diagonal(), atol=1e-5)
    assert (base.label, other.label) == ("base", "adapter")


def test_what_the_classifiers_errors_do_is_shown_beside(pipe, base, tmp_path):
    counts = [[80, 15, 5], [10, 85, 5], [0, 10, 90]]
    order = [2, 0, 1]
    told = classifier(HUE.classes, order)
    told = dataclasses.replace(told, confusion=[[counts[i][j] for j in order] for i in order])
    half = judges(classifiers={"hue": told, "tone": classifier(TONE.classes)})
    report = evaluate(pipe, PROMPTS, [HUE, TONE], judges=half, **QUICK)
    assert report.confusion == {"hue": counts}
    assert list(report.summary.corrected) == ["hue"]
    assert report.summary.bias == base.summary.bias
    for mine, plain in zip(report.prompts, base.prompts, strict=True):
        shares = np.array(list(plain.attributes["hue"].frequencies.values()))
        expected = metrics.bias(metrics.corrected(shares, np.array(counts)))
        assert mine.attributes["hue"].corrected == pytest.approx(expected, abs=1e-5)
    assert "errors corrected" in shown(report)
    assert "errors corrected" not in shown(base)
    save_report(report, tmp_path / "report")
    assert load_report(tmp_path / "report").summary == report.summary
    both = dataclasses.replace(report, confusion={"hue": counts, "tone": [[9, 1], [1, 9]]})
    assert list(both.summary.corrected) == ["hue", "tone", "hue x tone"]


def test_reports_from_before_there_were_corrections(base, tmp_path):
    save_report(base, tmp_path)
    file = tmp_path / "report.json"
    root = json.loads(file.read_text())
    del root["confusion"]
    file.write_text(json.dumps(root))
    assert load_report(tmp_path).summary == base.summary


def test_only_faces_are_classified(pipe):
    report = evaluate(pipe, PROMPTS, [HUE], judges=judges(face_detector=find_faces), **QUICK)
    found = report.records.found
    assert 0 < found.sum() < len(found)
    assert (report.records.probabilities["hue"].sum(1) > 0.5).tolist() == found.tolist()
    lines = list(report.records.lines())
    assert [line["box"] is not None for line in lines] == found.tolist()
    assert sum(p.faces for p in report.prompts) == found.sum()


def test_scores_of_ones_own(pipe):
    wanted = {"a baker": "red", "a judge": "blue"}
    whole = NetworkClassifier(classifier(HUE.classes).network, HUE.classes, size=16)
    extra = {
        "context": recognition(whole, wanted.get),
        "brightness": lambda images, prompts: images.mean((1, 2, 3)).numpy(),
    }
    report = evaluate(pipe, PROMPTS, [HUE], judges=judges(extra=extra), **QUICK)
    context = report.records.scores["context"].reshape(3, 5)
    assert set(context[:2].ravel()) <= {0, 1}
    assert np.isnan(context[2]).all()
    assert report.prompts[2].scores["context"] is None
    assert report.summary.scores["context"].n == 2
    assert report.summary.scores["context"].mean == pytest.approx(context[:2].mean())
    assert finite(report)
    assert "brightness" in shown(report)


# --- figures from records ---


def test_figures_of_a_hand_made_report():
    labels = [[0, 0, 1, 2], [0, 0, 0, 0]]
    report = made_up([[1, 1, 1, 1], [1, 1, 1, 0]], [labels])
    first, second = report.prompts
    assert first.attributes["hue"].frequencies == {"red": 0.5, "green": 0.25, "blue": 0.25}
    assert first.attributes["hue"].bias == pytest.approx(0.5 / 3, abs=1e-6)
    assert second.attributes["hue"].bias == pytest.approx(2 / 3, abs=1e-6)
    bias = report.summary.bias["hue"]
    assert bias.mean == pytest.approx(2.5 / 6, abs=1e-6)
    assert bias.std == pytest.approx(0.25, abs=1e-6)
    floors = [metrics.noise_floor(n, HUE.target) for n in (4, 3)]
    assert bias.noise_floor == pytest.approx(np.mean(floors), abs=1e-6)
    assert report.summary.face_rate.mean == pytest.approx(7 / 8)
    assert report.summary.frequencies["hue"]["red"].mean == pytest.approx(0.75)


def test_a_prompt_without_faces_is_an_explicit_gap():
    report = made_up([[1, 1], [0, 0], [1, 1]], [[[0, 1], [0, 0], [2, 2]]])
    assert report.prompts[1].attributes == {"hue": None}
    assert report.summary.bias["hue"].n == 2
    assert report.summary.prompts_without_faces == ["prompt 1"]
    assert report.summary.face_rate.mean == pytest.approx(2 / 3, abs=1e-6)
    assert finite(report)
    assert "prompts without any face" in shown(report)


def test_no_face_at_all(pipe, tmp_path):
    report = evaluate(pipe, PROMPTS, [HUE, TONE], judges=judges(face_detector=find_none), **QUICK)
    assert set(report.summary.bias.values()) == {None}
    assert report.summary.frequencies["hue"] is None
    assert report.summary.face_rate.mean == 0
    assert finite(report)
    text = shown(report)
    assert "nan" not in text.lower()
    save_report(report, tmp_path / "report")
    assert load_report(tmp_path / "report").summary == report.summary


def test_one_image_of_a_prompt_has_no_bias():
    report = made_up([[1]], [[[1]], [[0]]], attributes=(HUE, TONE))
    assert set(report.summary.bias.values()) == {None}
    assert report.summary.frequencies["hue"] is None
    assert report.prompts[0].attributes["hue"] is None
    assert report.summary.prompts_with_one_face == ["prompt 0"]
    assert finite(report)
    text = shown(report)
    assert "nan" not in text.lower()
    assert "prompts with one face only" in text


def test_a_class_never_seen():
    report = made_up(np.ones((3, 4)), [[[0, 0, 1, 1]] * 3])
    assert report.summary.frequencies["hue"]["blue"] == Estimate(0, 0, None, 3)
    assert report.summary.bias["hue"].mean == pytest.approx(1 / 3, abs=1e-6)
    assert finite(report)


def test_a_generator_on_target_is_at_the_floor():
    rng = np.random.default_rng(0)
    draws = rng.choice(2, p=TONE.target, size=(50, 60))
    report = made_up(np.ones((50, 60)), [draws], attributes=(TONE,))
    away = report.summary.deviation["tone"]
    low, high = away.interval
    assert low < away.noise_floor < high
    assert away.without_sampling_variance.mean < away.noise_floor
    assert away.without_sampling_variance.interval[0] == 0
    assert report.summary.bias["tone"].noise_floor == pytest.approx(0.5, abs=1e-3)


# --- folder, table, pictures ---


def test_report_folder_round_trip(base, other, tmp_path):
    for report in (base, other):
        save_report(report, tmp_path / report.label)
        again = load_report(tmp_path / report.label)
        assert again.settings == report.settings
        assert again.label == report.label
        assert again.summary == report.summary
        assert again.prompts == report.prompts
        assert again.provenance == report.provenance
        for i, images in report.samples.items():
            np.testing.assert_array_equal(again.samples[i], images)
        for name, features in report.records.features.items():
            np.testing.assert_array_equal(again.records.features[name], features)
    root = json.loads((tmp_path / "adapter" / "report.json").read_text())
    assert root["summary"] == other.summary.json()
    assert root["settings"]["seed"] == 0
    assert {"command", "versions", "machine", "date"} <= root["provenance"].keys()
    lines = (tmp_path / "adapter" / "records.jsonl").read_text().splitlines()
    assert len(lines) == 15
    assert json.loads(lines[0])["seed"] == image_seed(0, 0, 0)
    assert not (tmp_path / "base" / "pairs.png").exists()
    picture = Image.open(tmp_path / "adapter" / "pairs.png")
    assert picture.size == pairs_sheet(base, other).size
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "base"]


def test_a_summary_is_read_from_its_json(base, other):
    for report in (base, other, made_up([[1, 1], [0, 1]], [[[0, 1], [0, 0]]])):
        assert Summary.from_json(json.loads(json.dumps(report.summary.json()))) == report.summary


@pytest.mark.parametrize("file", KEPT_REPORTS, ids=lambda file: file.parent.name)
def test_kept_summaries_are_written_as_they_were(file):
    root = json.loads(file.read_text("utf-8"))["summary"]
    assert json.dumps(Summary.from_json(root).json()) == json.dumps(root)


def test_an_estimate_as_text():
    assert str(Estimate(0.6714, 0.281, (0.592, 0.744), 9)) == "0.671 ± 0.281 [0.592, 0.744]"
    assert str(Estimate(0.5, None, (0.0, 1.0), 9)) == "0.500 [0.000, 1.000]"
    assert estimate_text(Estimate(0.5, 0.0, None, 1)) == "0.500 ± 0.000"
    assert estimate_text(None) == "-"


def test_a_loaded_report_is_a_reference(base, other, tmp_path):
    save_report(base, tmp_path / "base")
    loaded = load_report(tmp_path / "base")
    again = evaluate(
        pipeline(seed=1), PROMPTS, [HUE, TONE], judges=judges(), reference=loaded, **QUICK
    )
    assert again.summary == other.summary


def test_pairs_show_base_above_adapter(base, other):
    picture = np.array(pairs_sheet(base, other))
    top = base.samples[0][0]  # 16 pixels, shown six times larger
    bottom = other.samples[0][0]
    np.testing.assert_array_equal(picture[36:132:6, 0:96:6], top)
    np.testing.assert_array_equal(picture[132:228:6, 0:96:6], bottom)


def test_sampled_prompts_are_few_and_spread():
    assert sample_prompts(1) == [0]
    assert sample_prompts(3) == [0, 1, 2]
    assert sample_prompts(50) == [0, 10, 20, 29, 39, 49]


def test_a_narrow_console_wraps_the_table_and_cuts_nothing(base, other):
    def contents(width):
        lines = [line.split("│")[1:-1] for line in shown(base, other, width).splitlines()]
        assert all(len(cells) in (0, 3) for cells in lines)
        return [[word for cells in lines if cells for word in cells[i].split()] for i in range(3)]

    assert contents(72) == contents(100)


def test_table_is_tidy_at_100_columns(base, other):
    text = shown(base, other)
    assert max(map(len, text.splitlines())) <= 100
    assert "…" not in text
    heads = (
        "bias, hue x tone",
        "deviation, tone",
        "noise floor",
        "without sampling variance",
    )
    for head in (*heads, "images with a face", "CLIP-T", "CLIP-I", "DINO", "base", "adapter"):
        assert head in text
    assert all(line.count("│") in (0, 4) for line in text.splitlines())
    mean = base.summary.bias["hue"].mean
    assert f"{mean:.3f} ± " in text


# --- bad input ---


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": []}, "no prompts to evaluate: give one or more"),
        ({"prompts": "a baker"}, r"got one string: use \['a baker'\]"),
        ({"attributes": []}, "no attributes to evaluate"),
        ({"attributes": [HUE, HUE]}, r"different names, got \['hue', 'hue'\]"),
        ({"images_per_prompt": 0}, "images_per_prompt must be 1 or more, got 0"),
        (
            {"prompts": ["a cook", "a cook"]},
            "prompt 'a cook' is given 2 times: leave out the copies",
        ),
        ({"steps": 0}, "steps must be 1 or more, got 0"),
        (
            {"guidance_scale": float("nan")},
            "guidance_scale must be a finite number, 0 or more, got",
        ),
        ({"guidance_scale": -1}, "guidance_scale must be a finite number, 0 or more, got -1"),
        ({"seed": -1}, "seed must be 0 or more, got -1"),
        ({"batch_size": -1}, "batch_size must be 1 or more, got -1"),
        ({"attributes": [Attribute("hat", "ab")]}, r"no classifier for attribute 'hat'.*'tone'"),
        (
            {"attributes": [Attribute("hue", ("red", "green"))]},
            r"has classes \['red', 'green'\], but its classifier has \['red', 'green', 'blue'\]",
        ),
        ({"judges": judges(extra={"clip_t": len})}, "must not have the reserved name 'clip_t'"),
        (
            {"judges": judges(extra={"odd": lambda images, prompts: np.zeros(1)})},
            r"'odd' must return one number per image: expected shape \(15,\), got \(1,\)",
        ),
    ],
)
def test_bad_input(pipe, changes, message):
    asked = {"prompts": PROMPTS, "attributes": [HUE], "judges": judges()} | QUICK | changes
    with pytest.raises(ValueError, match=message):
        evaluate(pipe, asked.pop("prompts"), asked.pop("attributes"), **asked)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 1}, r"other seed \(0 instead of 1\)"),
        ({"steps": 3}, r"other steps \(2 instead of 3\)"),
        ({"size": 8}, r"other size \(None instead of 8\)"),
        ({"prompts": PROMPTS[:2]}, "other prompts: images can be compared only if"),
    ],
)
def test_reference_from_other_noise(pipe, base, changes, message):
    asked = {"prompts": PROMPTS} | QUICK | changes
    with pytest.raises(ValueError, match=message):
        evaluate(pipe, asked.pop("prompts"), [HUE], judges=judges(), reference=base, **asked)


def test_images_of_another_size(pipe, base, tmp_path):
    options = {"judges": judges(), "groups": (), "out": tmp_path / "x"} | QUICK
    with pytest.raises(ValueError, match=r"image size must be a multiple of 2 pixels .* got 33"):
        evaluate(pipe, PROMPTS, [HUE], size=33, **options)
    assert not (tmp_path / "x").exists()
    report = evaluate(pipe, PROMPTS, [HUE], size=32, **options)
    assert report.samples[0].shape[1:] == (32, 32, 3)
    assert load_report(tmp_path / "x").settings.size == report.settings.size == 32
    assert "size" not in base.settings.json()  # as in reports of earlier versions


def test_models_that_are_not_finite(pipe):
    bad = NetworkClassifier(lambda chips: chips.mean((2, 3)) * torch.nan, HUE.classes, size=8)
    with pytest.raises(ValueError, match="classifier of 'hue' returned non-finite prob"):
        evaluate(pipe, PROMPTS, [HUE], judges=judges(classifiers={"hue": bad}), **QUICK)
    dino = NetworkEncoder(lambda images: images.flatten(1) * torch.inf, Pixels(8))
    with pytest.raises(ValueError, match="dino encoder returned non-finite features"):
        evaluate(pipe, PROMPTS, [HUE], judges=judges(dino=dino), **QUICK)


def test_folders_that_do_not_work(base, tmp_path):
    save_report(base, tmp_path / "report")
    before = sorted(p.name for p in (tmp_path / "report").iterdir())
    with pytest.raises(ValueError, match="report' already holds a report"):
        save_report(base, tmp_path / "report")
    assert sorted(p.name for p in (tmp_path / "report").iterdir()) == before
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="file' is a file: choose another folder"):
        save_report(base, tmp_path / "file")
    with pytest.raises(ValueError, match=r"no report in '.*nowhere': expected a file report\.json"):
        load_report(tmp_path / "nowhere")


def test_a_report_without_features_is_read_but_is_no_reference(pipe, base, tmp_path):
    records = dataclasses.replace(base.records, features={})
    save_report(dataclasses.replace(base, records=records), tmp_path)
    assert not (tmp_path / "features.npz").exists()
    plain = load_report(tmp_path)
    assert plain.summary == base.summary
    with pytest.raises(ValueError, match="'base' has no image features to compare with: evaluate"):
        evaluate(pipe, PROMPTS, [HUE, TONE], judges=judges(), reference=plain, **QUICK)


@pytest.mark.parametrize("name", ["report.json", "records.jsonl", "features.npz"])
def test_a_truncated_report(base, tmp_path, name):
    save_report(base, tmp_path)
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="is damaged or incomplete"):
        load_report(tmp_path)


def test_a_report_of_another_format(base, tmp_path):
    save_report(base, tmp_path)
    file = tmp_path / "report.json"
    file.write_text(file.read_text().replace('"format": 1', '"format": 99'))
    with pytest.raises(
        ValueError, match=r"format version 99, but this version of .* reads 1: update"
    ):
        load_report(tmp_path)


def test_nothing_half_written_stays_behind(base, tmp_path):
    broken = dataclasses.replace(base, provenance={"date": object()})
    with pytest.raises(TypeError):
        save_report(broken, tmp_path / "report")
    assert list(tmp_path.iterdir()) == []


def test_missing_extra_names_the_install_command(base, pipe, monkeypatch):
    for name in [n for n in sys.modules if n.split(".")[0] == "rich"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "rich", None)
    command = r"pip install 'diffusers-fair\[train\]'"
    with pytest.raises(ModuleNotFoundError, match=command):
        table(base)
    with pytest.raises(ModuleNotFoundError, match=command):
        evaluate(pipe, PROMPTS, [HUE], judges=judges(), **QUICK | {"progress": True})


@pytest.mark.slow
def test_the_judge_does_not_know_the_contestant():
    code = (
        "import sys, diffusers_fair.evaluation as e\n"
        "unwanted = {f'diffusers_fair.{m}' for m in ('trainer', 'replay', 'losses', 'sampling')}\n"
        "assert not unwanted & sys.modules.keys()\n"
        "assert not {'diffusers', 'transformers', 'rich', 'scipy'} & sys.modules.keys()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
