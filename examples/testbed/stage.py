"""The training loop of all stages: resumable, seeded per step, with a moving average of weights."""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

SEED = 20261123


def generator(stage: str, step: int) -> torch.Generator:
    """Create the random generator of a step, so that a resumed run has the same random numbers."""
    return torch.Generator().manual_seed(hash_of(stage) * 1_000_003 + step + SEED)


def hash_of(text: str) -> int:
    """Hash a text to a small number. Unlike `hash`, it is the same in every process."""
    return int.from_bytes(text.encode(), "big") % 999_983


@dataclass(kw_only=True)
class Stage:
    """Name, length and hyperparameters of a training stage."""

    name: str
    steps: int
    lr: float
    work: Path
    """Folder of checkpoints; safe to delete once the weights are written."""
    warmup: int = 50
    weight_decay: float = 0.01
    ema: float = 0.99
    save_every: int = 100
    muon: Callable[[str], bool] = lambda name: False
    """Name of a matrix -> whether Muon trains it, with the same learning rate, instead of AdamW."""

    def train(
        self,
        model: nn.Module,
        loss_at: Callable[[torch.Generator], tuple[Tensor, dict]],
    ) -> nn.Module:
        """Minimise loss_at(generator) -> (loss, metrics to log).

        Returns the model with the averaged weights.
        """
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizers = self._optimizers(model)
        average = [p.detach().clone() for p in parameters]
        step = self._resume(parameters, average, optimizers)
        started, first = time.monotonic(), step
        model.train()
        while step < self.steps:
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = self.lr * self._schedule(step)
            loss, metrics = loss_at(generator(self.name, step))
            model.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            for optimizer in optimizers:
                optimizer.step()
            decay = min(self.ema, (1 + step) / (10 + step))
            torch._foreach_lerp_(average, [p.detach() for p in parameters], 1 - decay)
            step += 1
            if step % 20 == 0:
                per_step = (time.monotonic() - started) / (step - first)
                line = {"stage": self.name, "step": step, "loss": round(loss.item(), 5), **metrics}
                print(json.dumps({**line, "seconds per step": round(per_step, 3)}), flush=True)
            if step % self.save_every == 0 or step == self.steps:
                self._save(step, parameters, average, optimizers)
        with torch.no_grad():
            for p, a in zip(parameters, average, strict=True):
                p.copy_(a)
        return model.eval()

    def _optimizers(self, model: nn.Module) -> list[torch.optim.Optimizer]:
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        matrices = [p for name, p in named if p.ndim == 2 and self.muon(name)]
        others = [p for name, p in named if p.ndim != 2 or not self.muon(name)]
        found: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(others, self.lr, betas=(0.9, 0.99), weight_decay=self.weight_decay)
        ]
        if matrices:
            options = {"weight_decay": self.weight_decay, "adjust_lr_fn": "match_rms_adamw"}
            found.append(torch.optim.Muon(matrices, self.lr, **options))
        return found

    def _schedule(self, step: int) -> float:
        """Return the learning rate factor: linear warm-up, then cosine decay to 2 %."""
        progress = step / self.steps
        cosine = 0.5 * (1 + torch.cos(torch.tensor(torch.pi * progress)).item())
        return min(1.0, (step + 1) / self.warmup) * (0.02 + 0.98 * cosine)

    def _save(
        self,
        step: int,
        parameters: list,
        average: list,
        optimizers: list[torch.optim.Optimizer],
    ) -> None:
        self.work.mkdir(parents=True, exist_ok=True)
        state = {
            "step": step,
            "parameters": parameters,
            "average": average,
            "optimizers": [optimizer.state_dict() for optimizer in optimizers],
        }
        scratch = self.work / f"{self.name}.tmp"
        torch.save(state, scratch)
        scratch.replace(self.work / f"{self.name}.pt")

    def _resume(
        self, parameters: list, average: list, optimizers: list[torch.optim.Optimizer]
    ) -> int:
        file = self.work / f"{self.name}.pt"
        if not file.exists():
            return 0
        state = torch.load(file, weights_only=True)
        with torch.no_grad():
            for p, a, p0, a0 in zip(
                parameters, average, state["parameters"], state["average"], strict=True
            ):
                p.copy_(p0)
                a.copy_(a0)
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        return state["step"]


def save_half(model: nn.Module, file: Path, metadata: dict[str, str] | None = None) -> None:
    """Write the weights as float16 safetensors."""
    state = {name: value.half().contiguous() for name, value in model.state_dict().items()}
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(state, file, metadata)
