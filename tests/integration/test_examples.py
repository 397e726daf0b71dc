"""The tables of the examples follow from what was measured, and their loops measure it once."""

import json
import runpy
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from pathlib import Path
from threading import Barrier
from time import sleep

import aims
import comparison
import experiments
import memory
import pytest
import torch
from reports import report

from diffusers_fair import RunConfig
from diffusers_fair.adapters.folder import read_adapter
from diffusers_fair.reports.folder import load_report, save_report
from diffusers_fair.testbed import world

CARDS = Path(__file__).parents[2] / "model_cards"
GOALS = ["testbed-gender", "testbed-race", "testbed-gender-race"]


def test_the_table_of_experiments_is_what_its_reports_and_recipes_say():
    assert (CARDS / "experiments" / "experiments.md").read_text("utf-8") == experiments.table(CARDS)


def test_an_adapter_that_starts_from_another_is_trained_after_it(monkeypatch, tmp_path):
    done = []

    class Finetuner:
        def __init__(self, recipe, adapter, output):
            self.recipe, self.start, self.folder = recipe, adapter["init_from"], Path(output)

        @classmethod
        def from_recipe(cls, recipe, **overrides):
            return cls(recipe, **overrides)

        def train(self):
            assert self.start is None or Path(self.start).exists()
            (self.folder / "adapter").mkdir(parents=True)
            done.append((self.recipe, self.start))

    monkeypatch.setattr(experiments, "FairnessFinetuner", Finetuner)
    for _ in range(2):  # what is there is not trained again
        last = experiments.trained("testbed-gender-race-age", tmp_path)
    recipes = ["testbed-race", "testbed-gender-race", "testbed-gender-race-age"]
    first, second, third = (tmp_path / recipe / "adapter" for recipe in recipes)
    assert done == list(zip(recipes, [None, str(first), str(second)], strict=True))
    assert last == third


def test_processes_remove_a_base_report_with_fewer_images_once_all_have_read_it(
    monkeypatch, tmp_path
):
    folder = tmp_path / "reports" / "base" / "sports"
    save_report(report(), folder)
    barrier, index = Barrier(2), ContextVar("index")
    load = load_report

    def slow(folder):
        sleep(0.2 * index.get())  # the first process is done long before the second
        return load(folder)

    def run(number):
        index.set(number)
        return experiments.base("sports", 10**6, RunConfig.load("testbed-gender"), tmp_path)

    monkeypatch.setattr(experiments.distributed, "barrier", lambda: barrier.wait(timeout=10))
    monkeypatch.setattr(experiments.distributed, "rank", index.get)
    monkeypatch.setattr(experiments, "load_report", slow)
    monkeypatch.setattr(experiments, "base_pipeline", lambda config: None)
    monkeypatch.setattr(experiments, "evaluate_pipeline", lambda *_: folder.exists())
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(run, range(2))) == [False, False]


def test_a_recipe_that_changed_since_is_told():
    adapter = CARDS / "adapters" / "testbed-prefix"
    origin = experiments.since("testbed-gender", adapter)
    trained = read_adapter(adapter)[0].recipe
    assert "adapter.components.0=soft_tokens" in origin
    assert f"optimizer.lr={trained['optimizer']['lr']}" in origin
    assert not [key for key in origin if key.startswith("output")]


@pytest.mark.parametrize(
    ("shares", "faces", "bias"),
    [
        ((1, 0), [9, 4], "1.000"),  # one class alone
        ((0.5, 0.5), [1, 1], "1.000"),  # a single face is of one class
        ((0.5, 0.5), [2, 2], "0.500"),  # two are of the same class every other time
        ((0.5, 0.5), [1, 2, 2], "0.667"),
        ((0.75, 0.25), [10_000], "0.500"),
    ],
)
def test_a_bias_were_all_prompts_alike(shares, faces, bias):
    found = bias_of(1, interval=[0.9, 1], floor=0.25)
    spreads = {name: {"mean": share, "std": 0} for name, share in zip("ab", shares, strict=True)}
    prompts = [{"faces": n, "attributes": {"hue": {"bias": 1}}} for n in faces]
    prompts.append({"faces": 0, "attributes": {"hue": None}})  # has no frequencies
    summary = COUNTS | {"bias": {"hue": found}, "frequencies": {"hue": spreads}, "scores": {}}
    told = experiments.part({"summary": summary, "prompts": prompts}, "hue")
    assert told == ["1.000", "0.900 to 1.000", bias, "0.250"]


COUNTS = {"prompts": 1, "images": 1, "faces": 1}


def estimate_of(mean, std=0.0):
    return {"mean": mean, "std": std, "interval": None, "prompts": 1}


def bias_of(mean, **changes):
    without = {"mean": mean, "interval": None}
    more = {
        "interval_images": [0, 1],
        "floor": 0,
        "faces_per_prompt": 1,
        "without_scatter": without,
    }
    return estimate_of(mean) | more | changes


def summary_of(gender, race, old, spread, faces, context, clip):
    biases = {"gender": gender, "race": race, "gender x race": race / 2}
    scores = {"clip_t": clip, "context": context}
    bias = {name: bias_of(x) for name, x in biases.items()}
    return {
        **COUNTS,
        "bias": bias | {"age": bias_of(0.5)},
        "frequencies": {"age": {"old": {"mean": old, "std": spread}}},
        "face_rate": estimate_of(faces),
        "scores": {name: None if x is None else estimate_of(x) for name, x in scores.items()},
    }


@pytest.mark.parametrize(
    ("experiment", "figures", "short"),
    [
        ("testbed-gender", (0.15, 0.9, 0.9, 0.9, 0.78, 0.47, 0.59), []),  # the rest is not asked
        ("testbed-gender", (0.16, 0.1, 0.3, 0.1, 0.8, 0.5, 0.6), ["bias, gender"]),
        (
            "testbed-gender-race",
            (0.1, 0.12, 0.2, 0, 1, 1, 1),
            ["bias, race", "bias, gender x race"],
        ),
        ("testbed-gender-race-age", (0.1, 0.1, 0.28, 0.09, 1, 1, 1), []),
        ("testbed-gender-race-age", (0.1, 0.1, 0.2, 0.1, 1, 1, 1), ["old, mean", "old, std"]),
        ("testbed-gender-race-age", (0.1, 0.1, 0.3, 0.0, 1, 1, 1), ["old, mean"]),
        ("testbed-multi-concept-on-sports", (0.3, 0.21, 0.2, 0, 1, None, 1), ["bias, race"]),
        (
            "testbed-unet",
            (0.2, 0.4, 0.2, 0, 0.77, 0.46, 0.58),
            ["faces", "context", "CLIP-T"],
        ),
    ],
)
def test_what_falls_short_is_told(experiment, figures, short):
    base = summary_of(0.6, 0.4, 0.25, 0.3, 0.8, 0.5, 0.6)
    told = list(
        aims.missed(experiment, {"summary": summary_of(*figures), "reference": {"summary": base}})
    )
    assert [row[1] for row in told] == short
    assert {row[0] for row in told} <= {experiment}


WORDS_GROUPS = {  # group -> figures of the base, figures of an adapter
    "named": ({"seen": 1.0, "unseen": 0.9}, {"seen": 0.96, "unseen": 0.81}),
    "untouched": ({}, {"dino": 0.96, "pixels": 0.0123}),
}


def with_words(summary, side):
    """What a report.json, or its reference, says with groups of prompts."""
    blank = {"prompts": 2, "images": 8, "attributes": {}}
    blank |= dict.fromkeys(["obeyed", "seen", "unseen", "clip_i", "dino", "pixels"])
    told = {
        name: {k: {"mean": x, "std": 0, "interval": None, "n": 2} for k, x in sides[side].items()}
        for name, sides in WORDS_GROUPS.items()
    }
    groups = {name: {"summary": blank | figures} for name, figures in told.items()}
    return {"summary": summary, "groups": groups}


@pytest.mark.parametrize(
    ("experiment", "short"),
    [
        ("testbed-gender", ["named, seen", "named, unseen", "untouched, DINO"]),
        ("testbed-prefix", []),
    ],
)
def test_words_that_are_lost_fall_short(experiment, short):
    summary = summary_of(0.1, 0.1, 0.25, 0, 1, 1, 1)
    found = with_words(summary, 1) | {"reference": with_words(summary, 0)}
    assert [row[1] for row in aims.missed(experiment, found)] == short


def test_words_stand_in_the_table_where_a_report_has_them():
    plain = report(attributes=list(world.ATTRIBUTES.values())).summary
    assert experiments.cells({"summary": plain.json()})[-5:] == ["-"] * 5
    told = experiments.cells(with_words(plain.json(), 1))[-5:]
    assert told == ["0.960", "0.810", "-", "0.960", "0.012"]


def test_an_adapter_is_asked_for_the_words_of_its_recipe():
    groups = experiments.controls(experiments.OCCUPATIONS, RunConfig.load("testbed-gender"))
    assert [group.name for group in groups] == ["named", "implied", "untouched"]
    assert {name for group in groups for p in group.prompts for name in p.expected_classes} == {
        "gender"
    }
    assert "a photo of a kitchen without anybody" in [p.text for p in groups[2].prompts]


def test_a_range_is_told_in_words():
    assert aims.range_text(0, 0.15) == "at most 0.1500"
    assert aims.range_text(0.5, 1) == "at least 0.5000"
    assert aims.range_text(0.22, 0.28) == "0.2200 to 0.2800"


def test_every_aim_is_of_an_experiment_and_every_reason_of_a_shortfall():
    kept = {e.name: e.kept(CARDS) / "report.json" for e in experiments.EXPERIMENTS}
    assert aims.BIAS.keys() | aims.OLD.keys() <= kept.keys()
    found = {name: json.loads(file.read_text("utf-8")) for name, file in kept.items()}
    assert aims.CAUSES.keys() == {(row[0], row[1]) for row in experiments.shortfalls(found)}


@pytest.fixture
def drawn(monkeypatch):
    """No model: reports and costs are made up; (method, folder's recipe) of what was measured."""
    calls = []

    def measured(pipe, name, config, folder, images, reference=None):
        calls.append((name, folder.parent.name))
        return report(name, attributes=[world.GENDER, world.RACE], images=images, seed=len(calls))

    monkeypatch.setattr(comparison, "base_pipeline", lambda config: None)
    monkeypatch.setattr(comparison, "applied", lambda method, config, adapter: (None, 2.5))
    monkeypatch.setattr(comparison, "measured", measured)
    monkeypatch.setattr(comparison, "slowdown", lambda pipe, config: 1.25)
    return calls


@pytest.mark.slow
def test_every_method_for_every_goal_is_compared_and_measured_once(drawn, tmp_path):
    runs, out = tmp_path / "runs", tmp_path / "out"
    methods = [comparison.OURS, *comparison.BASELINES]
    comparison.main(out, runs, images=4)
    assert drawn[1:] == [(method, goal) for goal in GOALS for method in methods]

    rows = json.loads((out / "compare.json").read_text("utf-8"))["rows"]
    assert [row["label"] for row in rows[:2]] == ["base", "this package, gender"]
    assert {row["group"] for row in rows[1:]} == {"gender", "race", "gender x race"}
    assert len(rows) == 1 + 3 * len(methods)
    assert not [*(out / "reports").rglob("*.html"), *(out / "reports").rglob("*.png")]
    for goal in GOALS:
        table = json.loads((out / goal / "compare.json").read_text("utf-8"))
        assert table["against"].startswith("this package, ")
        assert len(table["rows"]) == len(methods)
    costs = (out / "cost.md").read_text("utf-8")
    assert "| uce, race | 2.5 | 1.25 |" in costs
    assert "Not measured" not in costs

    count, table = len(drawn), (out / "compare.md").read_text("utf-8")
    comparison.main(out, tmp_path / "elsewhere", images=4)
    assert (len(drawn), (out / "compare.md").read_text("utf-8")) == (count, table)

    with pytest.raises(comparison.typer.BadParameter, match="has 4 images per prompt, not 5"):
        comparison.main(out, runs, images=5)


def test_an_adapter_costs_what_it_and_its_start_took():
    own, start = (
        read_adapter(CARDS / "adapters" / name)[0].training["seconds"]
        for name in ("testbed-gender-race", "testbed-race")
    )
    took = comparison.training_seconds(CARDS / "adapters" / "testbed-gender-race")
    assert took == pytest.approx(own + start)
    assert comparison.training_seconds(CARDS / "adapters" / "testbed-race") == start


def test_some_methods_of_some_goals(drawn, tmp_path):
    comparison.main(tmp_path / "out", tmp_path / "runs", images=4, only=[GOALS[1]], method=["uce"])
    assert drawn == [("base", "runs"), ("uce", GOALS[1])]
    assert not (tmp_path / "out" / GOALS[1]).exists()  # one row is no comparison
    assert "yet: this package, attribute-words" in (tmp_path / "out/cost.md").read_text("utf-8")


def test_the_testbeds_table_is_kept_with_the_command_that_made_it(tmp_path):
    measure = runpy.run_path(str(CARDS.parent / "examples" / "testbed" / "measure.py"))
    measure["keep"]([("bias, hue", "0.500", ".40 to .60")], 60, tmp_path)
    assert "| bias, hue | 0.500 | .40 to .60 |" in (tmp_path / "testbed.md").read_text("utf-8")
    kept = json.loads((tmp_path / "testbed.json").read_text("utf-8"))
    assert kept["command"] == f"python examples/testbed/measure.py --images 60 --out {tmp_path}"
    kept = (CARDS / "testbed" / "testbed.md").read_text("utf-8")
    assert all(f"| {' | '.join(row)} |" in kept for row in measure["classifiers"]())


def test_the_memory_of_a_step_is_what_lives_at_the_same_time():
    x = torch.zeros(1000, requires_grad=True)

    def double_square():
        y = x * 2  # 4,000 bytes, saved for the square's gradient
        z = y * y  # 4,000 bytes, dropped once it is summed up
        return z.sum()  # 4 bytes

    found = memory.peak(double_square)  # backward: y, its gradient and the two terms of it
    assert 8_000 <= found * 1e9 <= 16_100
    assert x.grad.eq(0).all()


def test_the_memory_table_shows_every_model_and_size():
    measured = json.loads((CARDS / "memory" / "memory.json").read_text("utf-8"))["models"]
    assert [*measured] == [*memory.MODELS]
    assert memory.table(measured) in (CARDS / "memory" / "memory.md").read_text("utf-8")
    for found in measured.values():
        for size in memory.SIZES:
            figures = found[f"{size} pixels"]
            assert figures["step, checkpointed"] < figures["step"] / 3
            assert figures["decoder, checkpointed"] < figures["decoder"] * 0.55
