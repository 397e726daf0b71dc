"""The benchmark's small parts run, and its tables say what was measured."""

import benchmark
import pytest

from diffusers_fair import FairnessFinetuner

ORIGIN = {"command": "benchmark.py", "commit": "abc", "versions": {"torch": "2"}, "machine": {}}


def result(**figures):
    return figures | {"with": ORIGIN}


def test_jobs_have_names_of_their_own_and_arguments_that_fit():
    jobs = [job for part in benchmark.PARTS for job in benchmark.jobs(part)]
    assert len({name for name, _, _ in jobs}) == len(jobs) == 11 + 4 + 18 + 1 + 1 + 16 + 1 + 1
    for _, function, arguments in jobs:
        required = {
            name
            for name in function.__annotations__
            if name != "return" and name not in (function.__kwdefaults__ or {})
        }
        assert required <= {*arguments} <= {*function.__annotations__}


def test_an_unknown_part_is_refused(tmp_path):
    with pytest.raises(benchmark.typer.BadParameter, match="expected parts of iteration, steps"):
        benchmark.main(tmp_path, ["targets", "speed"])


@pytest.mark.slow
def test_targets_are_timed_once_and_kept(tmp_path, monkeypatch):
    job = ("targets/24/2", benchmark.targets, {"n": 24, "classes": 2})
    monkeypatch.setattr(benchmark, "jobs", lambda part: [job] if part == "targets" else [])
    benchmark.main(tmp_path, ["targets"])
    file = tmp_path / "benchmark.json"
    first = file.read_text()
    benchmark.main(tmp_path, ["targets"])
    assert file.read_text() == first
    assert '"threads": ' in first
    assert "| 24 |" in (tmp_path / "benchmark.md").read_text()
    benchmark.main(tmp_path, ["targets/24/2"], turns=2)
    assert benchmark.json.loads(file.read_text())["targets/24/2"]["turns"] == 2


def test_of_several_turns_the_least_counts():
    first = benchmark._quicker(None, {"seconds": 3.0})
    second = benchmark._quicker(first, {"seconds": 2.0})
    assert benchmark._quicker(second, {"seconds": 4.0}) == {"seconds": 2.0, "turns": 3}


def test_peak_memory_counts_what_was_taken_meanwhile():
    with benchmark.measured() as figures:
        taken = benchmark.torch.ones(64 * 2**20)  # float32: 256 MB
        del taken
    assert 250 < figures["megabytes"] < 320
    assert figures["seconds"] > 0


def test_iterations_are_told_against_the_published_way():
    done = {
        "published": result(seconds=400.0, megabytes=1000.0, turns=2),
        "replay": result(seconds=100.0, megabytes=250.0, turns=1),
    }
    assert benchmark.iteration_rows(done)[2] == ["replay", "1", "100", "4.00 x", "250", "0.25"]


def test_bias_against_time_is_read_off_the_mean_curve():
    def curve(*points):
        return result(curve=[{"seconds": s, "bias": b} for s, b in points])

    done = {
        "published/0": curve((10, 0.6), (20, 0.3)),
        "published/1": curve((10, 0.6), (20, 0.1)),
        "fast/0": curve((4, 0.4), (8, 0.15)),
        "none/0": curve((4, 0.6), (8, 0.5)),
    }
    rows = benchmark.bias_rows(done)
    assert rows[0][-2:] == ["seconds until bias 0.200", "relative to published"]
    ends = [["20", "1.00"], ["7", "0.36"], ["not reached", "-"]]  # 7.2: between 4 and 8
    assert [row[-2:] for row in rows[1:]] == ends


def test_a_bias_that_the_first_point_has_is_reached_there():
    curve = [{"seconds": 5.0, "bias": 0.1}, {"seconds": 9.0, "bias": 0.05}]
    assert benchmark.seconds_until(0.2, curve) == 5.0


def test_the_largest_number_of_steps_is_not_measured_twice():
    found = {
        "steps/published/5": result(megabytes=10.0),
        "iteration/published": result(seconds=1.0, megabytes=20.0, turns=1),
    }
    lines = benchmark.document(found)
    assert "|  | K = 5 | K = 20 |" in lines
    assert "| published | 10 | 20 |" in lines


def test_the_document_holds_a_table_for_each_part_that_is_done():
    found = {
        "targets/24/2": result(seconds=0.001),
        "targets/24/4": result(seconds=0.002),
        "steps/published/5": result(megabytes=10.0),
        "drawing": result(compared={"1 of 10": {"error": 0.4, "cosine": 0.9}}),
        "processes": result(one=100.0, two=170.0, gain=1.71),
        "evaluation": result(images_per_second=5.0),
        "adapter": result(loading_seconds=0.1, loaded=1.05, fused=1.0),
    }
    text = "\n".join(benchmark.document(found))
    assert "| 24 | 1.0 | 2.0 |" in text
    assert "| published | 10 |" in text
    assert "| 1 of 10 | 0.40 | 0.900 |" in text
    assert "| 100 | 170 | 1.71 |" in text
    assert "| 5.0 | 10.0 min |" in text
    assert "- `benchmark.py`, commit abc, torch 2" in text
    assert "One iteration" not in text


@pytest.mark.slow
def test_a_warm_bank_holds_the_originals_of_every_iteration(tmp_path, monkeypatch):
    finetuner = FairnessFinetuner.from_recipe(
        "testbed-gender",
        base={"dtype": "float32"},
        prompts={"images_per_prompt": 2, "keep": None},
        sampling={"steps": 2},
        gradient={"replay_steps": 1},
        train={"prompts_per_iteration": 1, "distinct_iterations": 3},
        tracker="none",
        output=str(tmp_path / "run"),
    )
    benchmark.fill(finetuner)
    assert len([*(tmp_path / "run" / "originals").iterdir()]) == 3
    monkeypatch.setattr(finetuner.adapter, "disabled", None)  # how an original would be drawn
    for number in range(4):
        assert finetuner.iteration(number).batch.face_rate > 0
