"""Fine-tuning for fairness: the loop around the method. The only file that knows accelerate.

One iteration (Algorithm 1 and sections 4.1 to 4.3 of the paper):

    prompts, noise -> the original model's images, without the adapter; kept in the bank
                   -> images with the adapter -> faces -> class probabilities -> targets -> loss
                   -> d loss / d z_K -> replay -> gradients of the adapter's parameters
"""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffusers_fair.adapters.io import (
    AdapterInfo,
    Lora,
    SoftTokens,
    base_fingerprint,
    write_adapter,
)
from diffusers_fair.adapters.trainable import TrainableAdapter
from diffusers_fair.backends import load_base, load_judges, load_real_faces
from diffusers_fair.bank import OriginalsBank
from diffusers_fair.batches import Batch, draw_batch
from diffusers_fair.checkpoints import load_checkpoint, save_checkpoint
from diffusers_fair.conditioning import encode_prompts
from diffusers_fair.config import RunConfig
from diffusers_fair.evaluation import Judges, Report, evaluate
from diffusers_fair.objective import Aim, LossWeights, Objective, Originals
from diffusers_fair.prompts import prompt_set
from diffusers_fair.prompts.mixtures import prompt_mixture
from diffusers_fair.replay import draw_steps, replay
from diffusers_fair.sampling import (
    Trajectory,
    decode,
    decode_backward,
    initial_noise,
    sample,
)
from diffusers_fair.scheduler import BiasedGradientScheduler
from diffusers_fair.unrolled import unroll

Figures = dict[str, float]


class FairnessFinetuner:
    """Trains an adapter by a recipe.

        finetuner = FairnessFinetuner.from_recipe("my-recipe.yaml", output="runs/mine")
        finetuner.train()
        finetuner.save_adapter("my-adapter")

    Args:
        config: the recipe.

    Raises:
        ValueError: a base model, prompts or judges that cannot be had.
    """

    def __init__(self, config: RunConfig):
        from diffusers.optimization import get_scheduler
        from diffusers.training_utils import EMAModel

        self.config = config
        self.attributes = [section.attribute() for section in config.attributes]
        names = config.prompts.sets
        self.prompts = prompt_mixture(names, split=config.prompts.train, seed=config.train.seed)
        self.validation_prompts = [
            prompt
            for name in names
            for prompt in prompt_set(name).prompts(config.prompts.validation)
        ]
        self.pipe = load_base(config.base.model, config.base.revision, config.base.dtype)
        self.fingerprint = base_fingerprint(self.pipe)
        self.scheduler = BiasedGradientScheduler(
            self.pipe.scheduler, standardize=config.gradient.standardize
        )
        self.judges = load_judges(config.models, self.attributes, self.pipe.device)
        self.objective = _objective(config, self.judges, self.pipe.device)
        self.bank = OriginalsBank(Path(config.output) / "originals", _about_originals(config))
        self.adapter = TrainableAdapter(self.pipe, _components(config), config.train.seed)
        self.parameters = self.adapter.parameters
        options = config.optimizer
        self.optimizer = torch.optim.AdamW(
            self.parameters, options.lr, weight_decay=options.weight_decay
        )
        self.schedule = get_scheduler(
            options.schedule,
            self.optimizer,
            num_warmup_steps=options.warmup,
            num_training_steps=config.train.iterations,
        )
        self.ema = EMAModel(self.parameters, decay=options.ema_decay)
        self.done = 0  # iterations
        self.skipped = 0  # of them, for a gradient that was not finite
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
            ValueError: the run folder holds another run.
        """
        folder = self.config.claim_output()
        self._resume(folder)
        total = self.config.train.iterations
        with _tracker(self.config, folder) as log, _bar(self.done, total, progress) as advance:
            while self.done < total:
                start = time.perf_counter()
                figures = self.iteration(self.done)
                self.done += 1
                log(figures | {"seconds": round(time.perf_counter() - start, 2)}, self.done)
                advance(figures)
                if self._due(self.config.train.validate_every):
                    log(self._validate(folder), self.done)
                if self._due(self.config.train.checkpoint_every):
                    save_checkpoint(
                        folder / "checkpoints", self.done, self._state(), self.config.train.keep
                    )
        self.save_adapter(folder / "adapter")
        return folder

    def iteration(self, number: int) -> Figures:
        """One update of the adapter's parameters; everything random depends on seed and number.

        Returns:
            Means over the images: `loss`, `alignment`, `semantics`, `face` if it has a weight, and
            `faces`, the share with one; over the prompts: `bias/NAME`; the length of the gradient.
        """
        self.optimizer.zero_grad()
        figures = self._backward(draw_batch(self.config, self.prompts, number), number)
        limit = self.config.optimizer.max_grad_norm or float("inf")
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, limit)
        if not norm.isfinite():
            self.skipped += 1
            self.optimizer.zero_grad(set_to_none=True)  # nothing to step with
        self.optimizer.step()
        self.schedule.step()
        self.ema.step(self.parameters)
        return figures | {"gradient": norm.item(), "skipped": self.skipped}

    def _backward(self, batch: Batch, number: int) -> Figures:
        """Add the gradient of the loss of a batch to the adapter's parameters."""
        noise = self._noise(batch)
        originals = self._originals(batch, noise)
        cond, uncond = self._encode(batch)
        if self.config.gradient.method != "replay":
            z = self._unroll(cond, uncond, noise, batch.steps)
            v, figures = self._loss(z.detach(), originals, len(batch.prompts))
            z.backward(v)
            return figures
        trajectory = self._sample(cond, uncond, noise, batch.steps, keep=True)
        v, figures = self._loss(trajectory.latents, originals, len(batch.prompts))
        gradients = self._replay(trajectory, cond, uncond, v, number)
        for embeddings, gradient in zip((cond, uncond), gradients, strict=True):
            if embeddings is not None and gradient is not None:
                embeddings.backward(gradient.to(embeddings.dtype))  # once through the text encoder
        return figures

    def _originals(self, batch: Batch, noise: Tensor) -> Originals:
        """What the judges see in the original model's images, from the bank if it is there."""

        @torch.no_grad()
        def make() -> Originals:
            with self.adapter.off():
                cond, uncond = self._encode(batch)
                z = self._sample(cond, uncond, noise, batch.steps, keep=False).latents
            micro_batch = self.config.train.micro_batch
            return self.objective.originals(decode(self.pipe.vae, z, micro_batch).float())

        if self.config.train.distinct_iterations is None:
            return make()
        return self.bank.get(asdict(batch), make, noise.device)

    def _sample(
        self, cond: Tensor, uncond: Tensor | None, noise: Tensor, steps: int, *, keep: bool
    ) -> Trajectory:
        return sample(
            self.pipe.unet,
            self.scheduler,
            cond,
            uncond,
            noise,
            steps,
            self.config.sampling.guidance_scale,
            keep=keep,
            micro_batch=self.config.train.micro_batch,
        )

    def _loss(self, z: Tensor, originals: Originals, prompts: int) -> tuple[Tensor, Figures]:
        """The gradient v of the loss on the final latents (n, c, h, w), and figures."""
        vae, micro_batch = self.pipe.vae, self.config.train.micro_batch
        with torch.no_grad():
            images = decode(vae, z, micro_batch).float()
        loss, figures = self.objective(images.requires_grad_(), originals, prompts)
        (gradient,) = torch.autograd.grad(loss, images)  # (n, 3, H, W)
        return decode_backward(vae, z, gradient, micro_batch), figures

    def _replay(
        self, trajectory: Trajectory, cond: Tensor, uncond: Tensor | None, v: Tensor, number: int
    ) -> tuple[Tensor | None, Tensor | None]:
        """Gradients of the embeddings; those of the U-Net's parameters are added to them."""
        weights = self.scheduler.gradient_weights()  # (K,), C_i a_i
        g = torch.Generator().manual_seed(1_000_003 * self.config.train.seed + number)
        count = self.config.gradient.replay_steps
        steps, chances = draw_steps(len(weights), count, g) if count else (None, None)
        return replay(
            self.pipe.unet,
            trajectory,
            cond,
            uncond,
            v,
            weights,
            steps=steps,
            weights=chances,
            micro_batch=self.config.train.micro_batch,
        )

    def _unroll(self, cond: Tensor, uncond: Tensor | None, noise: Tensor, steps: int) -> Tensor:
        """(n, c, h, w), z_K with the graph of the recipe's gradient, to compare replay with."""
        unet, scale = self.pipe.unet, self.config.sampling.guidance_scale
        biased = self.config.gradient.method == "autograd"
        scheduler = self.scheduler if biased else self.scheduler.scheduler
        last = self.config.gradient.truncated_steps
        return unroll(unet, scheduler, cond, uncond, noise, steps, scale, last=last)

    def _encode(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """Embeddings of each image's prompt (n, L, d) and, with guidance, of the empty one."""
        guided = self.config.sampling.guidance_scale > 1
        uncond = encode_prompts(self.pipe, [""], prefix=False) if guided else None  # (1, L, d)
        cond = encode_prompts(self.pipe, batch.prompts)  # (P, L, d)
        return cond.repeat_interleave(batch.images_per_prompt, dim=0), uncond

    def _noise(self, batch: Batch) -> Tensor:
        """(n, c, h, w), standard normal."""
        unet = self.pipe.unet
        shape = (unet.config.in_channels, unet.config.sample_size, unet.config.sample_size)
        return initial_noise(shape, batch.seeds, device=unet.device).to(unet.dtype)

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
        """Bias over the validation prompts by the judges of training; the best adapter is kept."""
        with self.averaged():
            report = self._measure()
        _save_samples(report, folder / "samples" / f"step-{self.done:06d}.png")
        biases = {a.name: _mean_bias(report, a.name) for a in self.attributes}
        found = {f"validation/{name}": b for name, b in biases.items() if b is not None}
        clip_t = report.summary["scores"]["clip_t"]["mean"]
        if found and clip_t >= self._least_clip_t():
            mean = sum(found.values()) / len(found)
            if self.best is None or mean < self.best:
                self.best = mean
                self.save_adapter(folder / "adapter-best")
        return found | {"validation/clip_t": clip_t}

    def _least_clip_t(self) -> float:
        """CLIP-T of the original model on the validation prompts, less what may be lost."""
        if self.base_clip_t is None:
            with self.adapter.off():
                self.base_clip_t = self._measure().summary["scores"]["clip_t"]["mean"]
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
            progress=False,
        )

    def save_adapter(self, folder: str | Path) -> Path:
        """Write the adapter folder: the moving average of the weights, and what they are.

        Raises:
            ValueError: the folder holds something else.
        """
        with self.averaged():
            weights = self.adapter.weights()
        info = AdapterInfo(
            base_model=self.config.base.model,
            base_revision=self.config.base.revision,
            fingerprint=self.fingerprint,
            components=self.adapter.components,
            attributes=tuple(self.attributes),
            recipe=self.config.model_dump(mode="json", exclude={"output"}),
        )
        write_adapter(folder, weights, info)
        return Path(folder)

    def _state(self) -> dict[str, Any]:
        return {
            "parameters": [parameter.detach() for parameter in self.parameters],
            "ema": self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "skipped": self.skipped,
            "best": self.best,
            "base_clip_t": self.base_clip_t,
        }

    def _resume(self, folder: Path) -> None:
        """Go on from the newest checkpoint of the run folder, if there is one."""
        state = load_checkpoint(folder / "checkpoints")
        if state is None:
            return
        with torch.no_grad():
            for parameter, saved in zip(self.parameters, state["parameters"], strict=True):
                parameter.copy_(saved)
        self.ema.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.done, self.skipped, self.best = state["iteration"], state["skipped"], state["best"]
        self.base_clip_t = state["base_clip_t"]


def _components(config: RunConfig) -> dict[str, Lora | SoftTokens]:
    """What the adapter is made of; the layers' alpha is their rank, so nothing scales them."""
    asked = config.adapter
    layers = Lora(rank=asked.rank, alpha=asked.rank)
    tokens = SoftTokens(count=asked.soft_tokens)
    return {name: tokens if name == "soft_tokens" else layers for name in asked.components}


def _objective(config: RunConfig, judges: Judges, device: torch.device) -> Objective:
    """What is minimised; real faces are loaded only if they have a weight."""
    real_faces = None
    if config.losses.face:
        real_faces = load_real_faces(config.models, judges.face_detector, device)
    weights = LossWeights(semantics=config.losses.semantics, face=config.losses.face)
    return Objective(judges, _aims(config), weights, real_faces)


def _about_originals(config: RunConfig) -> Any:
    """What the original images, and what is seen in them, depend on beside the batch."""
    told = config.model_dump(mode="json", include={"base", "attributes", "models", "sampling"})
    return told | {"face": config.losses.face > 0}


def _aims(config: RunConfig) -> list[Aim]:
    return [
        Aim(
            attribute=section.attribute(),
            threshold=section.threshold,
            cost=section.cost,
            semantics_changed=section.semantics_changed,
            semantics_face=section.semantics_face,
        )
        for section in config.attributes
    ]


def _mean_bias(report: Report, attribute: str) -> float | None:
    figure = report.summary["bias"][attribute]
    return None if figure is None else figure["mean"]


def _save_samples(report: Report, file: Path) -> None:
    """One row of images for each sampled prompt."""
    import numpy as np
    from PIL import Image

    file.parent.mkdir(parents=True, exist_ok=True)
    rows = [np.concatenate(list(images), axis=1) for images in report.samples.values()]
    Image.fromarray(np.concatenate(rows)).save(file)


@contextmanager
def _tracker(config: RunConfig, folder: Path) -> Iterator[Any]:
    """Function (figures, iteration) that writes events.jsonl and the recipe's tracker."""
    from accelerate import Accelerator

    named = None if config.tracker == "none" else config.tracker
    accelerator = Accelerator(log_with=named, project_dir=folder / "logs", cpu=True)
    accelerator.init_trackers("run")

    def log(figures: Figures, iteration: int) -> None:
        with (folder / "events.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"iteration": iteration, **figures}) + "\n")
        accelerator.log(figures, step=iteration)

    try:
        yield log
    finally:
        accelerator.end_training()


@contextmanager
def _bar(done: int, total: int, shown: bool) -> Iterator[Any]:
    """Function (figures) that moves a progress bar on; figures shown are running means."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    running: Figures = {}

    def advance(figures: Figures) -> None:
        for name, value in figures.items():
            running[name] = 0.9 * running.get(name, value) + 0.1 * value
        shown_names = [n for n in running if n.startswith("bias/")] + ["alignment", "semantics"]
        text = "  ".join(f"{n.removeprefix('bias/')} {running[n]:.2f}" for n in shown_names)
        bar.update(task, advance=1, description=text)

    columns = (
        TextColumn("training"),
        BarColumn(20),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, disable=not shown) as bar:
        task = bar.add_task("", completed=done, total=total)
        yield advance
