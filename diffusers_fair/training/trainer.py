"""The training loop of fairness fine-tuning. The only module that uses accelerate, for trackers.

    batch -> gradient (batch_gradient) -> AdamW -> moving average of the weights
          -> at intervals: validation, best adapter, checkpoint

Several processes share the images of an iteration. All random numbers depend only on the seed and
the iteration, neither on the number of processes nor on earlier iterations.
"""

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from diffusers_fair import distributed
from diffusers_fair.adapters.folder import write_adapter
from diffusers_fair.adapters.trainable import TrainableAdapter
from diffusers_fair.backends.registry import choose_base_device, load_base, load_judges
from diffusers_fair.config.schema import RunConfig
from diffusers_fair.families import denoiser_of
from diffusers_fair.families.fingerprint import base_fingerprint
from diffusers_fair.folder_lock import folder_lock
from diffusers_fair.paths import expand
from diffusers_fair.prompts import prompt_set
from diffusers_fair.prompts.mixtures import prompt_mixture
from diffusers_fair.provenance import machine
from diffusers_fair.publishing.hub import Push, push_adapter
from diffusers_fair.training.adapter_folder import (
    adapter_components,
    adapter_info,
    load_initial_adapter,
)
from diffusers_fair.training.batch_gradient import BatchGradient, NonFiniteImagesError
from diffusers_fair.training.batches import sample_batch
from diffusers_fair.training.callbacks import TrainingCallback
from diffusers_fair.training.checkpoints import load_checkpoint, save_checkpoint
from diffusers_fair.training.determinism import deterministic_algorithms
from diffusers_fair.training.memory import (
    MODELS_DO_NOT_FIT,
    choose_micro_batch,
    explain_out_of_memory,
    how_to_save_memory,
)
from diffusers_fair.training.monitor import TrainingMonitor
from diffusers_fair.training.optimizer import NonFiniteGuard, clip_gradient, make_optimizer
from diffusers_fair.training.progress import IterationStatistics, progress_bar
from diffusers_fair.training.run_folder import RunFolder, check_run_folder, claim_run_folder
from diffusers_fair.training.stopping import (
    SignalHandler,
    TrainingStoppedError,
    exit_code,
    explain_full_disk,
)
from diffusers_fair.training.tracking import Tracker, require_tracker, tracking
from diffusers_fair.training.validation import Validation, save_samples


class FairnessFinetuner:
    """Trains an adapter as a recipe describes.

        finetuner = FairnessFinetuner.from_recipe("my-recipe.yaml", output="runs/mine")
        finetuner.train()
        finetuner.save_adapter("my-adapter")

    Args:
        config: the recipe.
        callbacks: code that follows the training; see `TrainingCallback`.

    Raises:
        ModuleNotFoundError: a package that the recipe needs is not installed.
        TrainingStoppedError: the models do not fit in the GPU's memory.
        ValueError: the base model, prompts, judges or initial adapter cannot be loaded.
    """

    @explain_out_of_memory(lambda: MODELS_DO_NOT_FIT)
    def __init__(self, config: RunConfig, callbacks: Sequence[TrainingCallback] = ()):
        from diffusers.optimization import get_scheduler
        from diffusers.training_utils import EMAModel

        require_tracker(config.tracker)
        self.config = config
        self.callbacks = callbacks
        distributed.connect()  # before accelerate, which would connect the GPUs only
        self.accelerator = _accelerator(config)
        self.device = choose_base_device(config.base.model, config.train.device)
        self.attributes = config.balanced()
        sets, seed = config.prompts.sets, config.train.seed
        self.prompts = prompt_mixture(sets, split=config.prompts.train, seed=seed)
        self.validation_prompts = [
            prompt
            for name in sets
            for prompt in prompt_set(name).prompts(config.prompts.validation)
        ]
        base = config.base
        self.pipe = load_base(base.model, base.revision, base.dtype, self.device)
        self.fingerprint = base_fingerprint(self.pipe)
        self.judges = load_judges(config.models, self.attributes, self.device, config.people)
        self.adapter = TrainableAdapter(self.pipe, adapter_components(config), seed)
        _tune(self.pipe, config)
        self.gradient = BatchGradient(config, self.pipe, self.adapter, self.judges)
        load_initial_adapter(config, self.adapter, self.fingerprint)
        self.parameters = self.adapter.parameters
        self.optimizer = make_optimizer(config.optimizer, self.adapter)
        self.schedule = get_scheduler(
            config.optimizer.schedule,
            self.optimizer,
            num_warmup_steps=config.optimizer.warmup,
            num_training_steps=config.train.iterations,
        )
        self.ema = EMAModel(self.parameters, decay=config.optimizer.ema_decay)
        self.guard = NonFiniteGuard(config.train.max_skipped)
        self.monitor = TrainingMonitor()
        self.validation = Validation(self.gradient, self.validation_prompts)
        self.step = 0  # number of updates made
        self.seconds = 0.0  # duration of these updates

    @classmethod
    def from_recipe(
        cls, recipe: str | Path, *, callbacks: Sequence[TrainingCallback] = (), **overrides: Any
    ) -> "FairnessFinetuner":
        """Create a finetuner from a shipped recipe or a YAML file.

        Args:
            recipe: name or path.
            callbacks: code that follows the training; see `TrainingCallback`.
            overrides: sections or values that replace the recipe's, as in `train={"seed": 1}`.

        Raises:
            ValueError: an unknown recipe or key, or an invalid value.
        """
        return cls(RunConfig.load(recipe, overrides), callbacks)

    def train(self, *, progress: bool = True) -> Path:
        """Train to the end, resuming from the newest checkpoint in the run folder if there is one.

        Args:
            progress: whether to show a progress bar with the running bias and losses.

        Returns:
            The run folder, with `adapter/` and `adapter-best/` in it.

        Raises:
            TrainingStoppedError: stopped by Ctrl-C, a SIGTERM, a full disk, a GPU without memory or
                too many non-finite updates; the message says how to resume.
            ValueError: the run folder holds another run, or another process is training in it; the
                memory budget is too small; there are more processes than images.
        """
        path = expand(self.config.output)
        with (
            folder_lock(path),
            SignalHandler() as signals,
            explain_full_disk(path),
            deterministic_algorithms(self.config.train.deterministic),
        ):
            folder = check_run_folder(self.config)
            batch = sample_batch(self.config, self.prompts, 0)
            distributed.shard(len(batch.noise))  # refuses more processes than images
            self._resume(folder)
            budget = self.config.train.memory_budget
            if budget is not None and self.gradient.micro_batch is None:
                choose_micro_batch(self.gradient, batch, budget)
            claim_run_folder(self.config)  # after all that may refuse to start
            with explain_out_of_memory(lambda: how_to_save_memory(self.gradient)):
                self._loop(folder, progress and distributed.is_main(), signals)
            self.save_adapter(folder.adapter)
        return path

    def _loop(self, folder: RunFolder, show_progress: bool, signals: SignalHandler) -> None:
        total = self.config.train.iterations
        with (
            tracking(self.accelerator, self.config, self.step) as tracker,
            progress_bar(self.step, total, show_progress) as advance,
        ):

            def log(metrics: dict[str, float]) -> None:
                if distributed.is_main():
                    folder.events.write(metrics, self.step)
                    tracker.log(metrics, self.step)

            while self.step < total:
                start = time.perf_counter()
                statistics = self.iteration(self.step)
                seconds = time.perf_counter() - start
                self.step, self.seconds = self.step + 1, self.seconds + seconds
                log(statistics.metrics() | {"seconds": round(seconds, 2)})
                advance(statistics)
                if distributed.is_main():
                    self._follow(statistics)
                if self._is_due(self.config.train.validate_every):
                    log(self._validate(folder, tracker))
                received = distributed.max_across(signals.received)
                if received or self._is_due(self.config.train.checkpoint_every):
                    self._save_checkpoint(folder)
                if received and self.step < total:
                    raise TrainingStoppedError(
                        f"stopped after iteration {self.step} of {total}, which is saved in "
                        f"'{folder.path}': give the same command again to resume",
                        exit_code(received),
                    )

    def _follow(self, statistics: IterationStatistics) -> None:
        """Pass the statistics of an iteration on to the monitor and the callbacks."""
        if statistics.batch is not None:
            self.monitor.check_batch(statistics.batch)
        for callback in self.callbacks:
            callback.on_iteration(self.step, statistics)

    def iteration(self, step: int) -> IterationStatistics:
        """Update the adapter's parameters once.

        Args:
            step: number of earlier updates; with the seed it determines all random numbers.
        """
        self.optimizer.zero_grad()
        try:
            batch = self.gradient.backward(sample_batch(self.config, self.prompts, step), step)
            norm = self._clip()
        except NonFiniteImagesError:
            batch, norm = None, float("nan")
        if batch is not None:
            self.gradient.objective.update_targets(batch)
        self.guard.record(math.isfinite(norm))
        if not math.isfinite(norm):
            self.optimizer.zero_grad()  # leaves the parameters as they are
        for group in self.optimizer.param_groups:
            group["lr"] *= self.guard.factor
        self.optimizer.step()
        self.schedule.step()  # recomputes the learning rate
        self.ema.step(self.parameters)
        return IterationStatistics(batch=batch, gradient_norm=norm, skipped=self.guard.skipped)

    def _clip(self) -> float:
        return clip_gradient(self.parameters, self.config.optimizer.max_grad_norm)

    def _is_due(self, every: int | None) -> bool:
        if every is None:
            return False
        return self.step % every == 0 or self.step == self.config.train.iterations

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Replace the weights by their moving average within a `with` block."""
        self.ema.store(self.parameters)
        self.ema.copy_to(self.parameters)
        try:
            yield
        finally:
            self.ema.restore(self.parameters)

    def _validate(self, folder: RunFolder, tracker: Tracker) -> dict[str, float]:
        """Validate in the main process, keep the best adapter, and return the metrics.

        The other processes wait, and return nothing.
        """
        metrics = self._validate_here(folder, tracker) if distributed.is_main() else {}
        distributed.barrier()
        return metrics

    def _validate_here(self, folder: RunFolder, tracker: Tracker) -> dict[str, float]:
        with self.averaged():
            report = self.validation.measure()
        tracker.log_samples(save_samples(report, folder.samples(self.step)), self.step)
        result = self.validation.judge(report)
        self.monitor.check_clip_t(result.clip_t, result.minimum_clip_t)
        if result.is_best:
            self._write_adapter(folder.best_adapter)
        for callback in self.callbacks:
            callback.on_validation(self.step, result, report)
        return result.metrics()

    def save_adapter(self, folder: str | Path) -> Path:
        """Write the adapter folder: the moving average of the weights, and their description.

        The main process writes; all processes return once it has.

        Raises:
            ValueError: the folder holds something else.
        """
        if distributed.is_main():
            self._write_adapter(folder)
        distributed.barrier()
        return expand(folder)

    def push_to_hub(self, repo_id: str, **options: Any) -> Push | None:
        """Publish the current adapter with its model card, from the main process.

        Args:
            repo_id: `user-or-organisation/name`.
            options: options of `push_adapter`: `private`, `revision`, `create_pr`, `message`,
                `token`, `dry_run`.

        Returns:
            What was pushed; None in processes other than the main one.

        Raises:
            ValueError: no token, or the Hub refuses; the message gives the repository's state.
        """
        with TemporaryDirectory() as folder:
            adapter = self.save_adapter(Path(folder) / "adapter")
            return push_adapter(adapter, repo_id, **options) if distributed.is_main() else None

    def _write_adapter(self, folder: str | Path) -> None:
        with self.averaged():
            weights = self.adapter.weights()
        training = {
            "iterations": self.step,
            "seconds": round(self.seconds, 1),
            "processes": distributed.world_size(),
            "dtype": str(denoiser_of(self.pipe).dtype).removeprefix("torch."),
            "machine": machine(self.device),
        }
        info = adapter_info(self.config, self.adapter, self.attributes, self.fingerprint, training)
        write_adapter(folder, weights, info)

    def _save_checkpoint(self, folder: RunFolder) -> None:
        if distributed.is_main():
            folder.events.sync()
            keep = self.config.train.keep
            save_checkpoint(folder.checkpoints, self.step, self.state_dict(), keep)
            for callback in self.callbacks:
                callback.on_checkpoint(self.step, folder.path)
        distributed.barrier()

    def _resume(self, folder: RunFolder) -> None:
        """Resume from the newest intact checkpoint, and remove what was written after it."""
        state = load_checkpoint(folder.checkpoints)
        if state is not None:
            self.load_state_dict(state)
        distributed.barrier()  # all processes have read it
        if distributed.is_main():
            folder.discard_after(self.step)

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint. Its keys are part of the file format."""
        return {
            "parameters": [parameter.detach() for parameter in self.parameters],
            "ema": self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "caution": self.guard.state_dict(),
            "steering": self.gradient.objective.state_dict(),
            "best": self.validation.best_bias,
            "base_clip_t": self.validation.base_clip_t,
            "seconds": self.seconds,
            "micro_batch": self.gradient.micro_batch,
            "memory_budget": self.config.train.memory_budget,
            "memory_options": self.gradient.memory_options,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state of a checkpoint, which also contains `iteration`."""
        with torch.no_grad():
            for parameter, saved in zip(self.parameters, state["parameters"], strict=True):
                parameter.copy_(saved)
        self.ema.load_state_dict(state["ema"])
        self.ema.to(self.device)
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        rates = zip(self.schedule.base_lrs, self.schedule.lr_lambdas, strict=True)
        for group, (lr, factor) in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = lr * factor(self.schedule.last_epoch)  # train.iterations may have grown
        self.step = state["iteration"]
        self.validation.best_bias = state["best"]
        self.validation.base_clip_t = state["base_clip_t"]
        if "caution" in state:  # missing in checkpoints of the first version
            self.guard.load_state_dict(state["caution"])
            self.seconds = state["seconds"]
            budget = self.config.train.memory_budget
            is_same = state.get("memory_budget", budget) == budget  # else it is chosen anew
            chosen = state["micro_batch"] if is_same else None
            self.gradient.micro_batch = self.config.train.micro_batch or chosen
        self.gradient.objective.load_state_dict(state.get("steering", {}))
        for option in state.get("memory_options", ()):
            if option not in self.gradient.memory_options:
                self.gradient.save_memory(option)


def _accelerator(config: RunConfig) -> Any:
    """Make the accelerator, which logs to the recipe's tracker; None without a tracker.

    Its device is not used: accelerate has one for the whole process, whatever trains in it.
    """
    if config.tracker == "none":
        return None
    from accelerate import Accelerator

    return Accelerator(log_with=config.tracker, project_dir=expand(config.output) / "logs")


def _tune(pipe: Any, config: RunConfig) -> None:
    """Speed up the frozen parts; results are the same up to rounding."""
    if config.train.channels_last:
        for part in (denoiser_of(pipe), pipe.vae):
            part.to(memory_format=torch.channels_last)
    if config.train.compile:
        denoiser_of(pipe).compile()
