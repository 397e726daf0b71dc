"""The check for owners of a GPU: it runs on a CPU at small size, and a failing part fails alone."""

import functools
import json
from types import SimpleNamespace

import gpu_check
import pytest
import torch


def run(out, **options) -> tuple[int, dict, str]:
    """The exit code, and what was written."""
    try:
        gpu_check.main(out, device="cpu", small=True, **options)
        code = 0
    except gpu_check.typer.Exit as stop:
        code = stop.exit_code
    data = json.loads((out / "gpu_check.json").read_text())
    return code, data, (out / "gpu_check.md").read_text()


@pytest.mark.slow
def test_every_part_runs_at_small_size(tmp_path, monkeypatch):
    quick = functools.partialmethod(torch.nn.Module.compile, backend="eager")
    monkeypatch.setattr(torch.nn.Module, "compile", quick)
    code, data, text = run(tmp_path, only=None)
    parts = data["parts"]
    assert (code, [name for name in parts if "error" in parts[name]]) == (0, [])
    assert list(parts) == list(gpu_check.PARTS)
    assert all(
        parts["train/unet/bfloat16"][f"GB, {stage}"] > 0 for stage in gpu_check.STAGES.values()
    )
    assert parts["resume"]["relative difference of the parameters"] == 0
    assert parts["memory_budget"]["micro-batch"] == 2
    assert data["provenance"]["machine"]["device"] == "cpu"
    assert "| train/soft_tokens/float16 |" in text


@pytest.mark.slow
def test_a_failing_part_fails_alone(tmp_path, monkeypatch):
    def fail(check):
        raise RuntimeError("no kernel | image")

    parts = {"base": lambda check: {}, "bad": fail, "good": lambda check: {"seconds": 2}}
    monkeypatch.setattr(gpu_check, "PARTS", parts)
    code, data, text = run(tmp_path, only=None)
    assert code == 1
    assert data["parts"]["bad"]["error"] == "RuntimeError: no kernel | image"
    assert data["parts"]["good"]["seconds"] == 2
    assert "| bad | failed |" in text
    assert "RuntimeError: no kernel \\| image |" in text
    assert 'raise RuntimeError("no kernel | image")' in text


def test_a_gradient_of_nothing_fails(monkeypatch):
    class Trained:
        def iteration(self, step):
            return SimpleNamespace(skipped=0, gradient_norm=0.0)

    with pytest.raises(
        ArithmeticError, match="expected a finite gradient other than 0, got norm 0"
    ):
        gpu_check.iterate(Trained(), 0)


def test_an_unknown_part_is_refused(tmp_path):
    with pytest.raises(gpu_check.typer.BadParameter, match="expected parts of base, train/text"):
        gpu_check.main(tmp_path, only=["speed"])
