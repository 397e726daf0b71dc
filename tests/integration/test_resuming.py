"""Evaluations that are stopped, killed and shared: nothing is repeated, the report is the same."""

import dataclasses
import json
import multiprocessing
import os
import signal
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
from judging import HUE, PROMPTS, QUICK, TONE, find_all, judges
from tiny import pipeline

from diffusers_fair.evaluation import batches
from diffusers_fair.evaluation.evaluate import evaluate
from diffusers_fair.evaluation.journal import Journal
from diffusers_fair.prompts.groups import KeptPrompt, PromptGroup
from diffusers_fair.reports.folder import load_report

ASKED = QUICK | {"images_per_prompt": 4, "batch_size": 2, "groups": ()}  # 6 batches


class Counting:
    """A face detector that counts the batches it looks at, and may stop everything."""

    def __init__(self, stop_after=None, how=None):
        self.looks, self.stop_after, self.how = 0, stop_after, how

    def __call__(self, images):
        if self.looks == self.stop_after:
            self.how()
        self.looks += 1
        return find_all(images)


def interrupt():
    raise KeyboardInterrupt


def judged(out, detector=find_all, pipe=None, **changes):
    return evaluate(
        pipe or pipeline(),
        changes.pop("prompts", PROMPTS),
        [HUE, TONE],
        judges=judges(face_detector=detector),
        out=out,
        **ASKED | changes,
    )


def without_origin(folder) -> dict:
    root = json.loads((Path(folder) / "report.json").read_text())
    del root["provenance"]
    return root


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Sums in one order; and processes that fork cannot use their parent's threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A report's folder that was made at one go."""
    folder = tmp_path_factory.mktemp("whole") / "report"
    judged(folder)
    return folder


def test_a_report_that_is_saved_is_that_which_is_returned(whole):
    report = judged(None)
    assert load_report(whole).summary == report.summary
    assert not (whole / ".partial").exists()
    names = {"report.json", "records.jsonl", "features.npz", "samples-000.png"}
    assert names <= {file.name for file in whole.iterdir()}


def test_stopped_and_started_again_it_repeats_nothing(whole, tmp_path):
    out = tmp_path / "report"
    for done in (2, 3):  # batches of a start
        detector = Counting(stop_after=done, how=interrupt)
        with pytest.raises(KeyboardInterrupt):
            judged(out, detector)
    state = json.loads((out / ".partial" / "state.json").read_text())
    last = Counting()
    judged(out, last)
    assert last.looks == 6 - 2 - 3
    for name in ("records.jsonl", "features.npz", "samples-001.png"):
        assert (out / name).read_bytes() == (whole / name).read_bytes()
    assert without_origin(out) == without_origin(whole)
    origin = json.loads((out / "report.json").read_text())["provenance"]
    assert origin == state["provenance"]  # of the first start


def test_an_evaluation_goes_on_on_another_device(whole, tmp_path, monkeypatch):
    """Its batches stay; a report or a journal that names its device is one of an older version."""
    out = tmp_path / "report"
    with pytest.raises(KeyboardInterrupt):
        judged(out, Counting(stop_after=2, how=interrupt))
    state = out / ".partial" / "state.json"
    root = json.loads(state.read_text())
    assert "device" not in root["asked"]
    state.write_text(json.dumps(root | {"asked": root["asked"] | {"device": "cuda:1"}}))
    monkeypatch.setattr(batches, "default_batch_size", lambda *_: 7)  # of the other device
    last = Counting()
    report = judged(out, last, batch_size=None)
    assert last.looks == 6 - 2
    assert (out / "records.jsonl").read_bytes() == (whole / "records.jsonl").read_bytes()
    file = out / "report.json"
    root = json.loads(file.read_text())
    root["provenance"]["model"]["device"] = "cuda:1"
    file.write_text(json.dumps(root))
    assert judged(out, batch_size=None).summary == report.summary


def test_another_dtype_is_another_evaluation(whole):
    with pytest.raises(ValueError, match="report' already holds another report"):
        judged(whole, pipe=pipeline(torch.bfloat16))


def test_a_finished_report_is_not_made_again(whole):
    detector = Counting()
    assert judged(whole, detector).summary == load_report(whole).summary
    assert detector.looks == 0
    for changes in ({"seed": 1}, {"model": {"adapter": "x"}}):
        with pytest.raises(ValueError, match="report' already holds another report"):
            judged(whole, **changes)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"seed": 1}, "settings"),
        ({"prompts": PROMPTS[:2]}, "settings"),
        ({"batch_size": 3}, "batch_size"),
        ({"model": {"adapter": "b", "base": "x"}}, "adapter, base"),
    ],
)
def test_other_settings_do_not_go_on(changes, named, tmp_path):
    first = {"model": {"adapter": "a"}}
    with pytest.raises(KeyboardInterrupt):
        judged(tmp_path / "r", Counting(stop_after=1, how=interrupt), **first)
    with pytest.raises(ValueError, match=rf"was stopped, with other {named}: start it with the sa"):
        judged(tmp_path / "r", **first | changes)


def test_another_reference_does_not_go_on(whole, tmp_path):
    base = load_report(whole)
    with pytest.raises(KeyboardInterrupt):
        judged(tmp_path / "r", Counting(stop_after=1, how=interrupt), reference=base)
    other = dataclasses.replace(base, provenance={"date": "yesterday"})
    with pytest.raises(ValueError, match="was stopped, with other reference: start it with the"):
        judged(tmp_path / "r", reference=other)
    report = judged(tmp_path / "r", reference=load_report(whole))
    assert report.summary.scores["dino"].mean == 1


def test_the_journal_keeps_everything_and_no_half_batch(tmp_path):
    report = judged(None)
    parts = report.records.rows(np.arange(3))
    journal = Journal.begin(tmp_path, {"a": (1, 2)}, {"date": "today"})
    samples = {(1, 0): report.samples[1][0]}
    journal[4] = type("Seen", (), {"records": parts, "samples": samples})()
    (tmp_path / "batch-000005.writing").write_bytes(b"half")
    again = Journal.begin(tmp_path, {"a": (1, 2)}, {"date": "tomorrow"})
    assert again.provenance == {"date": "today"}
    assert [i for i in range(9) if i in again] == [4]
    assert list(again[4].records.lines()) == list(parts.lines())
    for name, values in parts.arrays().items():
        np.testing.assert_array_equal(again[4].records.arrays()[name], values)
        assert again[4].records.arrays()[name].dtype == values.dtype
    np.testing.assert_array_equal(again[4].samples[1, 0], samples[1, 0])


def start(out, rank, count, port, detector, **changes):
    """One of several processes, as `accelerate launch` starts them."""

    def work():
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(count)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        judged(out, detector, **changes)
        Path(f"{out}-looks-{rank}").write_text(str(detector.looks))

    process = multiprocessing.get_context("fork").Process(target=work, daemon=True)
    process.start()
    return process


def ended(process):
    """Its exit code."""
    process.join(100)
    return process.exitcode


@pytest.fixture
def port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.mark.slow
def test_two_processes_share_groups_of_prompts(port, tmp_path):
    prompts = tuple(KeptPrompt(f"a red hat {i}", {"hue": "red"}) for i in range(5))
    changes = {"groups": [PromptGroup("named", prompts, 2)], "prompts": PROMPTS[:1]}
    alone = judged(None, **changes).groups["named"]
    out = tmp_path / "report"
    both = [start(out, rank, 2, port, Counting(), **changes) for rank in (0, 1)]
    assert [ended(process) for process in both] == [0, 0]
    looks = [int((tmp_path / f"report-looks-{rank}").read_text()) for rank in (0, 1)]
    assert looks == [1 + 3, 1 + 2]  # batches of two images: two neutral, five named
    assert list(load_report(out).groups["named"].records.lines()) == list(alone.records.lines())


@pytest.mark.slow
def test_killed_alone_and_finished_by_two_processes(whole, port, tmp_path):
    out = tmp_path / "report"
    killed = Counting(stop_after=3, how=lambda: os.kill(os.getpid(), signal.SIGKILL))
    assert ended(start(out, 0, 1, port, killed)) == -signal.SIGKILL  # after batches 0, 1, 2
    both = [start(out, rank, 2, port, Counting()) for rank in (0, 1)]
    assert [ended(process) for process in both] == [0, 0]
    looks = [int((tmp_path / f"report-looks-{rank}").read_text()) for rank in (0, 1)]
    assert looks == [1, 2]  # batch 4; 3 and 5
    assert without_origin(out)["prompts"] == without_origin(whole)["prompts"]
    assert without_origin(out)["summary"] == without_origin(whole)["summary"]
    assert (out / "samples-001.png").read_bytes() == (whole / "samples-001.png").read_bytes()
    assert not (out / ".partial").exists()
