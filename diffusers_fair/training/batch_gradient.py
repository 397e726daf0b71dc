"""Computes the gradient of a batch's loss with respect to the adapter's parameters.

    prompts, noise -> original images, without the adapter -> judgements, which are cached
                   -> images with the adapter -> faces -> class probabilities -> targets -> loss
                   -> d loss / d z_K -> replay -> gradients of the adapter's parameters

Algorithm 1 and sections 4.1 to 4.3 of the paper.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor

from diffusers_fair import distributed
from diffusers_fair.adapters.trainable import TrainableAdapter
from diffusers_fair.backends.registry import load_reference_faces
from diffusers_fair.config.schema import MEMORY_OPTIONS, RunConfig
from diffusers_fair.diffusion.noise import initial_noise, noise_generators
from diffusers_fair.diffusion.replay import replay, sample_steps
from diffusers_fair.diffusion.sampling import Trajectory, decode, decode_backward, sample
from diffusers_fair.diffusion.scheduler import BiasedGradientScheduler
from diffusers_fair.diffusion.unrolled import unroll
from diffusers_fair.families import denoiser_of, family_of
from diffusers_fair.families.conditioning import (
    Branches,
    backward,
    repeat_interleave,
    select,
)
from diffusers_fair.objective.objective import Objective
from diffusers_fair.objective.originals import Originals
from diffusers_fair.objective.statistics import BatchStatistics, KeptStatistics
from diffusers_fair.training.batches import Batch, Shard
from diffusers_fair.training.kept_prompts import KeptPrompts
from diffusers_fair.training.original_images import OriginalImageCache, run_cache_key
from diffusers_fair.training.run_folder import claim_run_folder
from diffusers_fair.vision.judges import Judges

Statistics = TypeVar("Statistics")
Loss: TypeAlias = Callable[[Tensor, Originals], tuple[Tensor, Statistics]]
"""Images (n, 3, H, W) and judgements of the original images -> loss and statistics."""
_LOSS_SCALE = 1024.0  # for float16, whose smallest number is 6e-8; powers of two change no digit


class NonFiniteImagesError(ArithmeticError):
    """Images of an iteration are NaN or infinite."""


class BatchGradient:
    """Adds the gradient of a batch's loss to the parameters of an adapter.

    Args:
        config: the recipe.
        pipe: the base model with the adapter.
        adapter: the adapter in training.
        judges: face detector, classifiers and encoders.

    Raises:
        ValueError: `sampling.size` does not suit the base model.
    """

    def __init__(self, config: RunConfig, pipe: Any, adapter: TrainableAdapter, judges: Judges):
        self.config = config
        self.pipe = pipe
        self.adapter = adapter
        self.scheduler = BiasedGradientScheduler(
            pipe.scheduler, standardize=config.gradient.standardize
        )
        self.shape = family_of(pipe).noise_shape(pipe, config.sampling.size)  # (c, h, w)
        self.objective = _objective(config, judges, pipe.device)
        self.loss_scale = _LOSS_SCALE if denoiser_of(pipe).dtype == torch.float16 else 1.0
        self.kept: KeptPrompts | None = None
        if config.prompts.keep is not None:
            self.kept = KeptPrompts(config, pipe, adapter, self.scheduler)
        self.micro_batch = config.train.micro_batch
        self.memory_options: list[str] = []
        for option in MEMORY_OPTIONS:
            if getattr(config.train, option):
                self.save_memory(option)

    def save_memory(self, option: str) -> None:
        """Enable one of `MEMORY_OPTIONS`, which takes less memory and more time."""
        if option == "decoder_checkpointing":
            self.pipe.vae.enable_gradient_checkpointing()
        if option == "gradient_checkpointing":
            denoiser = denoiser_of(self.pipe)
            denoiser.enable_gradient_checkpointing()
            denoiser.train()  # diffusers only checkpoints in training mode; there is no dropout
        self.memory_options.append(option)

    def backward(self, batch: Batch, step: int, *, use_cache: bool = True) -> BatchStatistics:
        """Add the gradient of this process's part of a batch's loss to the parameters.

        Args:
            batch: batch of all processes.
            step: index of the iteration, which determines kept prompts and replayed steps.
            use_cache: whether to cache judgements of original images on disk.

        Returns:
            Statistics of the images of all processes.

        Raises:
            NonFiniteImagesError: an image is NaN or infinite, in any process.
        """

        def loss(images: Tensor, originals: Originals) -> tuple[Tensor, BatchStatistics]:
            return self.objective(images, originals, batch.prompts, self.micro_batch)

        repeats = self.config.train.distinct_iterations is not None
        with self._unscaled():
            statistics = self._images_backward(batch, step, loss, use_cache=use_cache and repeats)
            if self.kept is None:
                return statistics
            size = len(batch.noise) // distributed.world_size()
            return replace(statistics, kept=self._kept_backward(self.kept, step, size, use_cache))

    @contextmanager
    def _unscaled(self) -> Iterator[None]:
        """Divide by the loss scale, in float32, what the parameters get in a `with` block."""
        if self.loss_scale == 1:
            yield
            return
        hooks = [
            parameter.register_hook(lambda gradient: gradient / self.loss_scale)
            for parameter in self.adapter.parameters
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _kept_backward(
        self, kept: KeptPrompts, step: int, size: int, use_cache: bool
    ) -> KeptStatistics:
        """Add the gradient of the kept prompts; `size` is the default micro-batch."""
        statistics = KeptStatistics()
        if kept.options.images:
            batch, named_classes = kept.batch(step)
            local_classes = named_classes[distributed.shard(len(named_classes))]

            def loss(images: Tensor, originals: Originals) -> tuple[Tensor, KeptStatistics]:
                total, image_statistics = self.objective.kept_images(
                    images, originals, local_classes, self.micro_batch
                )
                return kept.options.weight * total, image_statistics

            statistics = self._images_backward(batch, step, loss, use_cache=use_cache)
        if kept.holds_embeddings:
            embedding = kept.embedding_backward(step, loss_scale=self.loss_scale)
            statistics = replace(statistics, embedding=embedding)
        if kept.options.prediction:
            split = "split_guidance" in self.memory_options
            prediction = kept.prediction_backward(
                step,
                self.micro_batch or size,
                split_guidance=split,
                loss_scale=self.loss_scale,
            )
            statistics = replace(statistics, prediction=prediction)
        return statistics

    def _images_backward(
        self, batch: Batch, step: int, loss: Loss[Statistics], *, use_cache: bool
    ) -> Statistics:
        """Generate the images of a batch, and add the gradient of a loss on them."""
        shard = Shard(batch, distributed.shard(len(batch.noise)))
        originals = self.originals(shard, use_cache=use_cache)
        noise, generators = self._noise(shard)
        branches = self._encode(shard)
        if self.config.gradient.method != "replay":
            z = self._unroll(branches, noise, generators, batch.steps)
            v, statistics = self._loss(z.detach(), originals, loss)
            z.backward(v)
            return statistics
        trajectory = self._sample(branches, noise, generators, batch.steps, keep=True)
        v, statistics = self._loss(trajectory.latents, originals, loss)
        for branch, gradients in self._replay(trajectory, branches, v, step, shard).items():
            backward(branches[branch], gradients)  # each branch has a graph of its own
        return statistics

    def originals(self, shard: Shard, *, use_cache: bool = True) -> Originals:
        """Generate and judge the original images.

        Args:
            shard: images of this process.
            use_cache: whether to cache the judgements on disk.
        """

        @torch.no_grad()
        def make() -> Originals:
            noise, generators = self._noise(shard)
            with self.adapter.disabled():
                branches = self._encode(shard)
                z = self._sample(branches, noise, generators, shard.batch.steps, keep=False).latents
            images = decode(self.pipe, z, self.micro_batch).float()
            return self.objective.originals(images, self.micro_batch)

        if not use_cache:
            return make()
        return self.cache.get(shard.cache_key(), make, self.pipe.device)

    @cached_property
    def cache(self) -> OriginalImageCache:
        """Cache of judgements of the original images. Claims the run folder."""
        folder = claim_run_folder(self.config)
        return OriginalImageCache(folder.originals, run_cache_key(self.config))

    def _sample(
        self,
        branches: Branches,
        noise: Tensor,
        generators: list[torch.Generator],
        steps: int,
        *,
        keep: bool,
    ) -> Trajectory:
        return sample(
            self.pipe,
            self.scheduler,
            branches,
            noise,
            steps,
            self.config.sampling.guidance_scale,
            generators=generators,
            keep=keep,
            micro_batch=self.micro_batch,
        )

    def _loss(
        self, z: Tensor, originals: Originals, loss: Loss[Statistics]
    ) -> tuple[Tensor, Statistics]:
        """Gradient v of the scaled loss on the final latents (n, c, h, w), and statistics."""
        with torch.no_grad():
            images = decode(self.pipe, z, self.micro_batch).float()
        if distributed.any_across(not images.isfinite().all()):
            raise NonFiniteImagesError
        total, statistics = loss(images.requires_grad_(), originals)
        (gradient,) = torch.autograd.grad(total, images)  # (n, 3, H, W)
        gradient = gradient * self.loss_scale
        return decode_backward(self.pipe, z, gradient, self.micro_batch), statistics

    def _replay(
        self,
        trajectory: Trajectory,
        branches: Branches,
        v: Tensor,
        step: int,
        shard: Shard,
    ) -> dict[str, dict[str, Tensor]]:
        """Add the gradient of the denoiser's parameters; return that of the conditioning."""
        weights = self.scheduler.gradient_weights()  # (K,), C_i a_i
        steps, inverse_probabilities = None, None
        if count := self.config.gradient.replay_steps:
            g = torch.Generator().manual_seed(1_000_003 * self.config.train.seed + step)
            steps, inverse_probabilities = sample_steps(
                len(weights), count, len(shard.batch.noise), g
            )
            steps = steps[shard.images]
        return replay(
            self.pipe,
            trajectory,
            branches,
            v,
            weights,
            steps=steps,
            inverse_probabilities=inverse_probabilities,
            micro_batch=self.micro_batch,
            split_guidance="split_guidance" in self.memory_options,
        )

    def _unroll(
        self, branches: Branches, noise: Tensor, generators: list[torch.Generator], steps: int
    ) -> Tensor:
        """(n, c, h, w), z_K with a graph for the recipe's gradient method, other than replay."""
        scale = self.config.sampling.guidance_scale
        biased = self.config.gradient.method == "autograd"
        scheduler = self.scheduler if biased else self.scheduler.scheduler
        last = self.config.gradient.truncated_steps
        return unroll(
            self.pipe, scheduler, branches, noise, steps, scale, generators=generators, last=last
        )

    def _encode(self, shard: Shard) -> Branches:
        """Encode each image's prompt and, with guidance, the empty prompt."""
        family = family_of(self.pipe)
        cond = family.encode(self.pipe, shard.prompts)  # a row for each prompt
        cond = repeat_interleave(cond, shard.batch.images_per_prompt)
        cond = select(cond, slice(shard.skipped, shard.skipped + len(shard.noise)))
        scale = self.config.sampling.guidance_scale
        if "uncond" not in dict(family.guidance_branches(self.pipe, scale)):
            return {"cond": cond}
        return {"cond": cond, "uncond": family.unconditional(self.pipe)}

    def _noise(self, shard: Shard) -> tuple[Tensor, list[torch.Generator]]:
        """(n, c, h, w), standard normal, and the generators of noise that the scheduler adds."""
        family, device = family_of(self.pipe), denoiser_of(self.pipe).device
        noise = initial_noise(self.shape, shard.noise, device=device)
        noise = noise.to(family.latents_dtype(self.pipe))
        return noise, noise_generators(self.shape, shard.noise)


def _objective(config: RunConfig, judges: Judges, device: torch.device) -> Objective:
    """Make the objective; reference faces are loaded only if their loss has a weight."""
    reference_faces = None
    if config.losses.face:
        reference_faces = load_reference_faces(config.models, judges.face_detector, device)
    return Objective(
        judges,
        config.attributes,
        config.losses,
        reference_faces,
        prompt_sets=config.prompts.sets,
    )
