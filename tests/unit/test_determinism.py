"""Deterministic algorithms are on within a training, and only there."""

import os

import torch

from diffusers_fair.training.determinism import deterministic_algorithms


def settings() -> tuple:
    cudnn = torch.backends.cudnn
    return torch.get_deterministic_debug_mode(), cudnn.benchmark, cudnn.deterministic


def test_deterministic_algorithms_are_used_and_put_back(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    before = settings()
    with deterministic_algorithms(False):
        assert settings() == before
    assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ
    with deterministic_algorithms(True):
        assert settings() == (1, False, True)  # 1: operations without such an algorithm warn
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert settings() == before
