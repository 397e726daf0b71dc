"""AdamW for the adapter's parameters, and protection against non-finite updates."""

from dataclasses import asdict, dataclass
from typing import Any

import torch

from diffusers_fair import distributed
from diffusers_fair.adapters.trainable import TrainableAdapter
from diffusers_fair.config.schema import OptimizerSection
from diffusers_fair.families import family_of
from diffusers_fair.training.stopping import TrainingStoppedError

_RECOVERY = 1.1  # factor by which the learning rate recovers in each finite update


@dataclass
class NonFiniteGuard:
    """Skips non-finite updates, lowers the learning rate after each, stops after too many."""

    limit: int
    """Number of successive skipped updates after which training stops."""
    skipped: int = 0
    """Number of skipped updates in total."""
    in_a_row: int = 0
    factor: float = 1.0
    """Factor of the learning rate, which each skipped update halves and finite ones restore."""

    def record(self, is_finite: bool) -> None:
        """Record whether an update was finite.

        Raises:
            TrainingStoppedError: too many in a row were not.
        """
        if is_finite:
            self.in_a_row, self.factor = 0, min(1.0, self.factor * _RECOVERY)
            return
        self.skipped, self.in_a_row = self.skipped + 1, self.in_a_row + 1
        self.factor /= 2
        if self.in_a_row >= self.limit:
            raise TrainingStoppedError(
                f"images or gradients were not finite in {self.in_a_row} iterations in a row "
                "(train.max_skipped): train again with base.dtype float32 or bfloat16 if it is "
                "float16, a lower optimizer.lr or optimizer.max_grad_norm, or from an earlier "
                "adapter (adapter.init_from)"
            )

    def state_dict(self) -> dict[str, float]:
        """Return the state for a checkpoint."""
        return asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state of a checkpoint."""
        for name, value in state.items():
            setattr(self, name, value)


def make_optimizer(options: OptimizerSection, adapter: TrainableAdapter) -> torch.optim.Optimizer:
    """Make AdamW with 32-bit or 8-bit state, and one parameter group per learning rate.

    Raises:
        ModuleNotFoundError: bitsandbytes, which 8-bit state needs, is not installed.
    """
    denoiser = family_of(adapter.pipe).denoiser
    rates: dict[float, list[torch.nn.Parameter]] = {}
    for name, parameters in adapter.parts.items():
        lr = options.lr if name == denoiser else options.text_encoder_lr or options.lr
        rates.setdefault(lr, []).extend(parameters)
    groups = [{"params": parameters, "lr": lr} for lr, parameters in rates.items()]
    return _optimizer_class(options.name)(groups, weight_decay=options.weight_decay)


def _optimizer_class(name: str) -> Any:
    if name == "adamw":
        return torch.optim.AdamW
    try:
        from bitsandbytes.optim import AdamW8bit
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "optimizer.name 'adamw8bit' needs bitsandbytes: pip install bitsandbytes, or set "
            "it to 'adamw'",
            name=error.name,
        ) from error
    return AdamW8bit


def clip_gradient(parameters: list[torch.nn.Parameter], max_norm: float | None) -> float:
    """Sum the gradient over the processes, clip its norm, and return the norm before clipping."""
    if distributed.world_size() > 1:
        for parameter in parameters:
            if parameter.grad is None:  # the loss of this process does not depend on it
                parameter.grad = torch.zeros_like(parameter)
        distributed.all_reduce_sum([p.grad for p in parameters if p.grad is not None])
    return torch.nn.utils.clip_grad_norm_(parameters, max_norm or float("inf")).item()
