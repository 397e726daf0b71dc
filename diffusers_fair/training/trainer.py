"""Fine-tuning for fairness: the loop around the method. The only file that knows accelerate.

    batch -> its gradient (gradient.py) -> AdamW -> moving average of the weights
          -> now and then: checkpoint, validation, best adapter

Several processes share the images of an iteration; what is random depends on the seed and the
number of the iteration alone, never on them nor on what was before.
"""

import math
import shutil
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from diffusers_fair import atomic, distributed, testbed
from diffusers_fair.adapters.io import (
    AdapterInfo,
    Lora,
    SoftTokens,
    base_fingerprint,
    read_adapter,
    write_adapter,
)
from diffusers_fair.adapters.trainable import TrainableAdapter
from diffusers_fair.backends.registry import load_base, load_judges
from diffusers_fair.config.recipe import OptimizerSection, RunConfig
from diffusers_fair.evaluation.evaluate import evaluate
from diffusers_fair.loading import local_folder
from diffusers_fair.prompts import prompt_set
from diffusers_fair.prompts.groups import vocabulary
from diffusers_fair.prompts.mixtures import prompt_mixture
from diffusers_fair.provenance import machine
from diffusers_fair.publishing.hub import Push, push_adapter
from diffusers_fair.reports.report import Report
from diffusers_fair.training import memory
from diffusers_fair.training.batch_gradient import MEMORY_OPTIONS, BatchGradient
from diffusers_fair.training.batches import Batch, draw_batch
from diffusers_fair.training.checkpoints import discard_after, load_checkpoint, save_checkpoint
from diffusers_fair.training.guards import (
    TERMINATED,
    Caution,
    NotFiniteError,
    Termination,
    TrainingStoppedError,
    Watch,
    room_on_disk,
)
from diffusers_fair.training.progress import Events, Figures, bar, tracker

PATIENCE = timedelta(days=1)  # for which processes wait for one another: one may validate


class FairnessFinetuner:
    """Trains an adapter by a recipe.

        finetuner = FairnessFinetuner.from_recipe("my-recipe.yaml", output="runs/mine")
        finetuner.train()
        finetuner.save_adapter("my-adapter")

    Args:
        config: the recipe.

    Raises:
        ModuleNotFoundError: a package that the recipe needs is missing; says how to install it.
        ValueError: a base model, prompts, judges or an adapter to start from that cannot be had.
    """

    def __init__(self, config: RunConfig):
        from diffusers.optimization import get_scheduler
        from diffusers.training_utils import EMAModel

        self.config = config
        self.accelerator = _accelerator(config)  # joins the processes, if there are several
        self.attributes = config.balanced()
        names = config.prompts.sets
        self.prompts = prompt_mixture(names, split=config.prompts.train, seed=config.train.seed)
        self.validation_prompts = [
            prompt
            for name in names
            for prompt in prompt_set(name).prompts(config.prompts.validation)
        ]
        self.pipe = load_base(config.base.model, config.base.revision, config.base.dtype)
        self.pipe.to(self.accelerator.device)
        self.fingerprint = base_fingerprint(self.pipe)
        self.judges = load_judges(config.models, self.attributes, self.pipe.device, config.people)
        self.adapter = TrainableAdapter(self.pipe, _components(config), config.train.seed)
        _tune(self.pipe, config)
        self.gradient = BatchGradient(config, self.pipe, self.adapter, self.judges)
        if config.adapter.init_from is not None:
            self._start_from(config.adapter.init_from)
        self.parameters = self.adapter.parameters
        self.optimizer = _optimizer(config.optimizer, self.adapter)
        self.schedule = get_scheduler(
            config.optimizer.schedule,
            self.optimizer,
            num_warmup_steps=config.optimizer.warmup,
            num_training_steps=config.train.iterations,
        )
        self.ema = EMAModel(self.parameters, decay=config.optimizer.ema_decay)
        self.caution = Caution(config.train.max_skipped)
        self.watch = Watch()
        self.done = 0  # iterations
        self.seconds = 0.0  # that they took
        self.best: float | None = None  # validation bias
        self.base_clip_t: float | None = None  # of the original model, when it is asked for

    @classmethod
    def from_recipe(cls, recipe: str | Path, **overrides: Any) -> "FairnessFinetuner":
        """Make one from a shipped recipe or a YAML file.

        Args:
            recipe: name or path.
            overrides: sections or values that replace the recipe's, as in `train={"seed": 1}`.

        Raises:
            ValueError: an unknown recipe or key, or a value that does not fit.
        """
        return cls(RunConfig.load(recipe, overrides))

    def train(self, *, progress: bool = True) -> Path:
        """Train to the end of the recipe, from the run folder's newest checkpoint if it has one.

        Args:
            progress: whether to show a bar with the running bias and losses.

        Returns:
            The run folder, with `adapter/` and `adapter-best/` in it.

        Raises:
            TrainingStoppedError: by a SIGTERM, a full disk or too many updates that were not
                finite; says how to go on.
            ValueError: the run folder holds another run; a memory budget that is too small; more
                processes than images.
        """
        folder = self.config.claim_output()
        with Termination() as termination, room_on_disk(folder):
            self._resume(folder)
            if self.config.train.memory_budget is not None and self.gradient.micro_batch is None:
                self._fit_memory(self.config.train.memory_budget)
            self._run(folder, progress and distributed.is_main(), termination)
            self.save_adapter(folder / "adapter")
        return folder

    def _run(self, folder: Path, progress: bool, termination: Termination) -> None:
        """Iterate to the end, and write down what comes of it."""
        total, events = self.config.train.iterations, Events(folder)
        with tracker(self.accelerator, self.done) as track, bar(self.done, total, progress) as show:

            def log(figures: Figures) -> None:
                if distributed.is_main():
                    events.write(figures, self.done)
                    track(figures, self.done)

            while self.done < total:
                start = time.perf_counter()
                figures = self.iteration(self.done)
                seconds = time.perf_counter() - start
                self.done, self.seconds = self.done + 1, self.seconds + seconds
                log(figures | {"seconds": round(seconds, 2)})
                show(figures)
                if distributed.is_main():
                    self.watch.look(figures)
                if self._due(self.config.train.validate_every):
                    log(self._validate(folder))
                stop = distributed.any_across(termination.asked)
                if stop or self._due(self.config.train.checkpoint_every):
                    self._save(folder, events)
                if stop and self.done < total:
                    raise TrainingStoppedError(
                        f"asked to stop after iteration {self.done} of {total}, which is saved in "
                        f"'{folder}': give the same command again to go on",
                        TERMINATED,
                    )

    def iteration(self, number: int) -> Figures:
        """One update of the adapter's parameters; everything random depends on seed and number.

        Returns:
            Those of `BatchGradient.backward`, the length of the `gradient`, and how many updates
            were `skipped` so far.
        """
        self.optimizer.zero_grad()
        try:
            figures = self.gradient.backward(draw_batch(self.config, self.prompts, number), number)
            norm = self._clip()
        except NotFiniteError:
            figures, norm = {}, float("nan")
        self.gradient.objective.steer(figures)
        self.caution.record(math.isfinite(norm))
        if not math.isfinite(norm):
            self.optimizer.zero_grad()  # nothing to step with
        for group in self.optimizer.param_groups:
            group["lr"] *= self.caution.factor
        self.optimizer.step()
        self.schedule.step()  # sets the learning rate anew
        self.ema.step(self.parameters)
        return figures | {"gradient": norm, "skipped": self.caution.skipped}

    def _clip(self) -> float:
        """Shorten the gradient of all processes if it is too long; its length before."""
        if distributed.world_size() > 1:
            distributed.all_reduce_sum([_gradient(parameter) for parameter in self.parameters])
        limit = self.config.optimizer.max_grad_norm or float("inf")
        return torch.nn.utils.clip_grad_norm_(self.parameters, limit).item()

    def _fit_memory(self, budget: float) -> None:
        """Choose the micro-batch by trying the first iteration with a few of its images.

        Where not even one fits, one memory option after the other is turned on.

        Raises:
            ValueError: the budget, in GB, is too small for one even so.
        """
        batch = draw_batch(self.config, self.prompts, 0)

        def measure(images: int) -> int:
            seeds = batch.seeds[: images * distributed.world_size()]
            few = Batch(batch.prompts[:1], seeds, batch.steps)
            self.gradient.micro_batch = images  # also of the kept images, however many there are
            self.gradient.backward(few, 0, banked=False)
            self.gradient.micro_batch = None
            self.optimizer.zero_grad()
            return distributed.max_across(memory.peak(self.pipe.device))

        images = len(batch.seeds) // distributed.world_size()
        left = [x for x in MEMORY_OPTIONS if x not in self.gradient.memory_options]
        same = ""
        while self.gradient.micro_batch is None:
            try:
                self.gradient.micro_batch = memory.fitting(measure, images, budget)
            except memory.BudgetError:
                if not left:
                    raise
                same += f" train.{left[0]}=true"
                self.gradient.save_memory(left.pop(0))
                memory.forget_peak(self.pipe.device)
        if distributed.is_main():
            found = self.gradient.micro_batch
            warnings.warn(
                f"{found} images at a time fit train.memory_budget, {budget:g} GB: the same as "
                f"train.micro_batch={found}{same}",
                stacklevel=3,
            )

    def _due(self, every: int | None) -> bool:
        if every is None:
            return False
        return self.done % every == 0 or self.done == self.config.train.iterations

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Put the moving average of the weights in place, for the time being."""
        self.ema.store(self.parameters)
        self.ema.copy_to(self.parameters)
        try:
            yield
        finally:
            self.ema.restore(self.parameters)

    def _validate(self, folder: Path) -> Figures:
        """Bias over the validation prompts by the judges of training; the best adapter is kept.

        One process does it; the others wait for it and learn nothing of it.
        """
        figures = self._validated(folder) if distributed.is_main() else {}
        distributed.barrier()
        return figures

    def _validated(self, folder: Path) -> Figures:
        with self.averaged():
            report = self._measure()
        _save_samples(report, folder / "samples" / f"step-{self.done:06d}.png")
        biases = {a.name: _mean_bias(report, a.name) for a in self.attributes}
        found = {f"validation/{name}": b for name, b in biases.items() if b is not None}
        clip_t, least = _clip_t(report), self._least_clip_t()
        self.watch.clip_t(clip_t, least)
        if found and clip_t >= least:
            mean = sum(found.values()) / len(found)
            if self.best is None or mean < self.best:
                self.best = mean
                self._write_adapter(folder / "adapter-best")
        return found | {"validation/clip_t": clip_t}

    def _least_clip_t(self) -> float:
        """CLIP-T of the original model on the validation prompts, less what may be lost."""
        if self.base_clip_t is None:
            with self.adapter.off():
                self.base_clip_t = _clip_t(self._measure())
        return self.base_clip_t - self.config.train.clip_t_drop

    def _measure(self) -> Report:
        return evaluate(
            self.pipe,
            self.validation_prompts,
            self.attributes,
            judges=self.judges,
            images_per_prompt=self.config.train.validation_images,
            steps=self.config.sampling.steps[1],
            guidance_scale=self.config.sampling.guidance_scale,
            seed=self.config.train.seed,
            groups=(),
            progress=False,
        )

    def save_adapter(self, folder: str | Path) -> Path:
        """Write the adapter folder: the moving average of the weights, and what they are.

        Of several processes the main one writes, and all return when it is there.

        Raises:
            ValueError: the folder holds something else.
        """
        if distributed.is_main():
            self._write_adapter(folder)
        distributed.barrier()
        return Path(folder)

    def push_to_hub(self, repo_id: str, **options: Any) -> Push | None:
        """Publish the adapter as it is now, with its card; of several processes the main one does.

        Args:
            repo_id: `user-or-organisation/name`.
            options: as `push_adapter` takes them: `private`, `revision`, `create_pr`, `message`,
                `token`, `dry_run`.

        Returns:
            What was pushed; None on other processes than the main one.

        Raises:
            ValueError: no token, or what the Hub refuses; and what has become of the repository.
        """
        with TemporaryDirectory() as folder:
            adapter = self.save_adapter(Path(folder) / "adapter")
            return push_adapter(adapter, repo_id, **options) if distributed.is_main() else None

    def _write_adapter(self, folder: str | Path) -> None:
        with self.averaged():
            weights = self.adapter.weights()
        info = AdapterInfo(
            base_model=self.config.base.model,
            base_revision=self.config.base.revision,
            fingerprint=self.fingerprint,
            components=self.adapter.components,
            attributes=tuple(self.attributes),
            words=vocabulary([section.wording() for section in self.config.attributes]),
            recipe=self.config.model_dump(mode="json", exclude={"output"}),
            training={
                "iterations": self.done,
                "seconds": round(self.seconds, 1),
                "processes": distributed.world_size(),
                "dtype": str(self.pipe.unet.dtype).removeprefix("torch."),
                "machine": machine(),
            },
        )
        write_adapter(folder, weights, info)

    def _start_from(self, adapter: str) -> None:
        """Take over the weights of an adapter.

        Raises:
            ValueError: it cannot be read, or is of another base or other components.
        """
        try:
            info, weights = read_adapter(local_folder(adapter))
        except ValueError as error:
            raise ValueError(
                f"adapter.init_from: {error}: train the recipe that makes it, or name another "
                "adapter of the same components"
            ) from error
        if info.fingerprint != self.fingerprint:
            raise ValueError(
                f"adapter.init_from: '{adapter}' was trained on '{info.base_model}', whose layers "
                f"differ from those of '{self.config.base.model}': name an adapter of this base"
            )
        if dict(info.components) != self.adapter.components:
            raise ValueError(
                f"adapter.init_from: expected the components {self.adapter.components}, as the "
                f"recipe has them, got {dict(info.components)} in '{adapter}': set "
                "adapter.components, adapter.rank and adapter.soft_tokens to those of the adapter"
            )
        self.adapter.load(weights)

    def _save(self, folder: Path, events: Events) -> None:
        """Write a checkpoint, and wait for it."""
        if distributed.is_main():
            events.settle()
            keep = self.config.train.keep
            save_checkpoint(folder / "checkpoints", self.done, self._state(), keep)
        distributed.barrier()

    def _state(self) -> dict[str, Any]:
        return {
            "parameters": [parameter.detach() for parameter in self.parameters],
            "ema": self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "caution": self.caution.state(),
            "steering": self.gradient.objective.steering_state(),
            "best": self.best,
            "base_clip_t": self.base_clip_t,
            "seconds": self.seconds,
            "micro_batch": self.gradient.micro_batch,
            "memory_options": self.gradient.memory_options,
        }

    def _resume(self, folder: Path) -> None:
        """Go on from the newest sound checkpoint of the run folder, and remove what came after."""
        state = load_checkpoint(folder / "checkpoints")
        if state is not None:
            self._take(state)
        distributed.barrier()  # all have read it
        if distributed.is_main():
            discard_after(folder / "checkpoints", self.done)
            Events(folder).cut(self.done)
            atomic.sweep(folder)
            atomic.sweep(folder / "originals")
            for left in folder.glob(".adapter*"):  # an adapter's folder that was not finished
                shutil.rmtree(left)

    def _take(self, state: dict[str, Any]) -> None:
        """Be where a checkpoint was."""
        with torch.no_grad():
            for parameter, saved in zip(self.parameters, state["parameters"], strict=True):
                parameter.copy_(saved)
        self.ema.load_state_dict(state["ema"])
        self.ema.to(self.pipe.device)
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.done, self.best = state["iteration"], state["best"]
        self.base_clip_t = state["base_clip_t"]
        if "caution" in state:  # not in checkpoints of the first version
            self.caution = Caution(**state["caution"])
            self.seconds, self.gradient.micro_batch = state["seconds"], state["micro_batch"]
        self.gradient.objective.take_steering(state.get("steering", {}))
        for option in state.get("memory_options", ()):
            if option not in self.gradient.memory_options:
                self.gradient.save_memory(option)


def _accelerator(config: RunConfig) -> Any:
    """Finds the device, joins the processes and knows the recipe's tracker."""
    from accelerate import Accelerator, InitProcessGroupKwargs

    return Accelerator(
        cpu=config.train.device == "cpu" or config.base.model == testbed.NAME,
        log_with=None if config.tracker == "none" else config.tracker,
        project_dir=Path(config.output) / "logs",
        kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)],
    )


def _tune(pipe: Any, config: RunConfig) -> None:
    """How the frozen parts are evaluated; what they give is the same but for rounding."""
    if config.train.channels_last:
        for part in (pipe.unet, pipe.vae):
            part.to(memory_format=torch.channels_last)
    if config.train.compile:
        pipe.unet.compile()


def _optimizer(options: OptimizerSection, adapter: TrainableAdapter) -> torch.optim.Optimizer:
    """AdamW, with its state in float32 or in 8 bits; one group for each learning rate.

    Raises:
        ModuleNotFoundError: bitsandbytes, for the latter, is not installed.
    """
    kind: Any = torch.optim.AdamW
    if options.name == "adamw8bit":
        try:
            from bitsandbytes.optim import AdamW8bit
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "optimizer.name 'adamw8bit' needs bitsandbytes: pip install bitsandbytes, or set "
                "it to 'adamw'",
                name=error.name,
            ) from error
        kind = AdamW8bit
    groups: dict[float, list[torch.nn.Parameter]] = {}
    for name, parameters in adapter.parts.items():
        lr = options.lr if name == "unet" else options.text_encoder_lr or options.lr
        groups.setdefault(lr, []).extend(parameters)
    return kind(
        [{"params": parameters, "lr": lr} for lr, parameters in groups.items()],
        weight_decay=options.weight_decay,
    )


def _gradient(parameter: torch.nn.Parameter) -> Tensor:
    """Its gradient; zeros, if nothing in this process depends on it."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad


def _components(config: RunConfig) -> dict[str, Lora | SoftTokens]:
    """What the adapter is made of; the layers' alpha is their rank, so nothing scales them."""
    asked = config.adapter
    layers = Lora(rank=asked.rank, alpha=asked.rank)
    tokens = SoftTokens(count=asked.soft_tokens)
    return {name: tokens if name == "soft_tokens" else layers for name in asked.components}


def _mean_bias(report: Report, attribute: str) -> float | None:
    """Distance from the target, which is the bias where the target is uniform."""
    estimate = report.summary.from_target(attribute)
    return None if estimate is None else estimate.mean


def _clip_t(report: Report) -> float:
    estimate = report.summary.scores["clip_t"]
    assert estimate is not None  # every image has one
    return estimate.mean


def _save_samples(report: Report, file: Path) -> None:
    """One row of images for each sampled prompt."""
    import numpy as np
    from PIL import Image

    file.parent.mkdir(parents=True, exist_ok=True)
    rows = [np.concatenate(list(images), axis=1) for images in report.samples.values()]
    Image.fromarray(np.concatenate(rows)).save(file)
