"""A batch of prompts and noise -> the gradient of its loss in the adapter's parameters.

    prompts, noise -> the original model's images, without the adapter; cached on disk
                   -> images with the adapter -> faces -> class probabilities -> targets -> loss
                   -> d loss / d z_K -> replay -> gradients of the adapter's parameters

Algorithm 1 and sections 4.1 to 4.3 of the paper.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor

from diffusers_fair import distributed
from diffusers_fair.adapters.trainable import TrainableAdapter
from diffusers_fair.backends.registry import load_reference_faces
from diffusers_fair.config.schema import RunConfig
from diffusers_fair.diffusion.noise import initial_noise
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
from diffusers_fair.training.batches import Batch, Share
from diffusers_fair.training.kept_prompts import KeptPrompts
from diffusers_fair.training.original_images import OriginalImageCache, run_cache_key
from diffusers_fair.training.run_folder import claim_run_folder
from diffusers_fair.vision.judges import Judges

Statistics = TypeVar("Statistics")
Loss: TypeAlias = Callable[[Tensor, Originals], tuple[Tensor, Statistics]]
"""Images (n, 3, H, W) and judgements of the original ones -> the loss, and statistics."""
MEMORY_OPTIONS = ("split_guidance", "gradient_checkpointing")  # the cheaper one first


class NotFiniteError(ArithmeticError):
    """Images of an iteration are NaN or infinite: there is nothing to learn from them."""


class BatchGradient:
    """Adds the gradient of a batch's loss to the parameters of an adapter.

    Args:
        config: the recipe.
        pipe: the base model, with the adapter in it.
        adapter: what is trained.
        judges: face detector, classifiers and encoders.
    """

    def __init__(self, config: RunConfig, pipe: Any, adapter: TrainableAdapter, judges: Judges):
        self.config = config
        self.pipe = pipe
        self.adapter = adapter
        self.scheduler = BiasedGradientScheduler(
            pipe.scheduler, standardize=config.gradient.standardize
        )
        self.objective = _objective(config, judges, pipe.device)
        self.kept: KeptPrompts | None = None
        if config.prompts.keep is not None:
            self.kept = KeptPrompts(config, pipe, adapter, self.scheduler)
        self.micro_batch = config.train.micro_batch
        self.memory_options: list[str] = []
        for option in MEMORY_OPTIONS:
            if getattr(config.train, option):
                self.save_memory(option)

    def save_memory(self, option: str) -> None:
        """From now on, take less memory and more time, by one of `MEMORY_OPTIONS`."""
        if option == "gradient_checkpointing":
            denoiser = denoiser_of(self.pipe)
            denoiser.enable_gradient_checkpointing()
            denoiser.train()  # diffusers checkpoints in this mode only; there is no dropout in it
        self.memory_options.append(option)

    def backward(self, batch: Batch, number: int, *, use_cache: bool = True) -> BatchStatistics:
        """Add the gradient of this process's part of a batch's loss to the parameters.

        Args:
            batch: of all processes.
            number: of the iteration, which decides on the steps that are replayed.
            use_cache: whether judgements of original images are read from the disk and written.

        Returns:
            Statistics of the images of all processes.

        Raises:
            NotFiniteError: an image is NaN or infinite, in any process.
        """

        def loss(images: Tensor, originals: Originals) -> tuple[Tensor, BatchStatistics]:
            return self.objective(images, originals, batch.prompts, self.micro_batch)

        repeats = self.config.train.distinct_iterations is not None
        statistics = self._draw(batch, number, loss, use_cache=use_cache and repeats)
        if self.kept is None:
            return statistics
        size = len(batch.noise) // distributed.world_size()
        return replace(statistics, kept=self._keep(self.kept, number, size, use_cache))

    def _keep(self, kept: KeptPrompts, number: int, size: int, use_cache: bool) -> KeptStatistics:
        """Add the gradient of the kept prompts, so many images at a time."""
        statistics = KeptStatistics()
        if kept.options.images:
            batch, named_classes = kept.batch(number)
            mine = named_classes[distributed.shard(len(named_classes))]

            def loss(images: Tensor, originals: Originals) -> tuple[Tensor, KeptStatistics]:
                total, of_images = self.objective.kept_images(
                    images, originals, mine, self.micro_batch
                )
                return kept.options.weight * total, of_images

            statistics = self._draw(batch, number, loss, use_cache=use_cache)
        if kept.holds_embeddings:
            statistics = replace(statistics, embedding=kept.embedding_backward(number))
        if kept.options.prediction:
            split = "split_guidance" in self.memory_options
            prediction = kept.backward(number, self.micro_batch or size, split_guidance=split)
            statistics = replace(statistics, prediction=prediction)
        return statistics

    def _draw(
        self, batch: Batch, number: int, loss: Loss[Statistics], *, use_cache: bool
    ) -> Statistics:
        """Add the gradient of a loss on the images of a batch."""
        share = Share(batch, distributed.shard(len(batch.noise)))
        originals = self.originals(share, use_cache=use_cache)
        noise = self._noise(share)
        branches = self._encode(share)
        if self.config.gradient.method != "replay":
            z = self._unroll(branches, noise, batch.steps)
            v, statistics = self._loss(z.detach(), originals, loss)
            z.backward(v)
            return statistics
        trajectory = self._sample(branches, noise, batch.steps, keep=True)
        v, statistics = self._loss(trajectory.latents, originals, loss)
        for branch, gradients in self._replay(trajectory, branches, v, number, share).items():
            backward(branches[branch], gradients)  # each branch was encoded in a graph of its own
        return statistics

    def originals(self, share: Share, *, use_cache: bool = True) -> Originals:
        """Judge the original model's images.

        Args:
            share: which images.
            use_cache: whether judgements are read from the disk and written.
        """

        @torch.no_grad()
        def make() -> Originals:
            noise = self._noise(share)
            with self.adapter.off():
                branches = self._encode(share)
                z = self._sample(branches, noise, share.batch.steps, keep=False).latents
            images = decode(self.pipe, z, self.micro_batch).float()
            return self.objective.originals(images, self.micro_batch)

        if not use_cache:
            return make()
        return self.cache.get(share.cache_key(), make, self.pipe.device)

    @cached_property
    def cache(self) -> OriginalImageCache:
        """Cache of the original images' judgements; claims the run folder for it."""
        folder = claim_run_folder(self.config)
        return OriginalImageCache(folder.originals, run_cache_key(self.config))

    def _sample(self, branches: Branches, noise: Tensor, steps: int, *, keep: bool) -> Trajectory:
        return sample(
            self.pipe,
            self.scheduler,
            branches,
            noise,
            steps,
            self.config.sampling.guidance_scale,
            keep=keep,
            micro_batch=self.micro_batch,
        )

    def _loss(
        self, z: Tensor, originals: Originals, loss: Loss[Statistics]
    ) -> tuple[Tensor, Statistics]:
        """Gradient v of the loss in the final latents (n, c, h, w), and statistics."""
        with torch.no_grad():
            images = decode(self.pipe, z, self.micro_batch).float()
        if distributed.any_across(not images.isfinite().all()):
            raise NotFiniteError
        total, statistics = loss(images.requires_grad_(), originals)
        (gradient,) = torch.autograd.grad(total, images)  # (n, 3, H, W)
        return decode_backward(self.pipe, z, gradient, self.micro_batch), statistics

    def _replay(
        self,
        trajectory: Trajectory,
        branches: Branches,
        v: Tensor,
        number: int,
        share: Share,
    ) -> dict[str, dict[str, Tensor]]:
        """Add the gradient of the denoiser's parameters; return that of the conditioning."""
        weights = self.scheduler.gradient_weights()  # (K,), C_i a_i
        steps, inverse_probabilities = None, None
        if count := self.config.gradient.replay_steps:
            g = torch.Generator().manual_seed(1_000_003 * self.config.train.seed + number)
            drawn = sample_steps(len(weights), count, len(share.batch.noise), g)
            steps, inverse_probabilities = drawn
            steps = steps[share.images]
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

    def _unroll(self, branches: Branches, noise: Tensor, steps: int) -> Tensor:
        """(n, c, h, w), z_K with the graph of the recipe's gradient, to compare replay with."""
        scale = self.config.sampling.guidance_scale
        biased = self.config.gradient.method == "autograd"
        scheduler = self.scheduler if biased else self.scheduler.scheduler
        last = self.config.gradient.truncated_steps
        return unroll(self.pipe, scheduler, branches, noise, steps, scale, last=last)

    def _encode(self, share: Share) -> Branches:
        """Encode each image's prompt and, with guidance, the empty one."""
        family = family_of(self.pipe)
        cond = family.encode(self.pipe, share.prompts)  # a row for each prompt
        cond = repeat_interleave(cond, share.batch.images_per_prompt)
        cond = select(cond, slice(share.skipped, share.skipped + len(share.noise)))
        if "uncond" not in dict(family.guidance_branches(self.config.sampling.guidance_scale)):
            return {"cond": cond}
        return {"cond": cond, "uncond": family.unconditional(self.pipe)}

    def _noise(self, share: Share) -> Tensor:
        """(n, c, h, w), standard normal."""
        denoiser = denoiser_of(self.pipe)
        shape = family_of(self.pipe).noise_shape(self.pipe)
        return initial_noise(shape, share.noise, device=denoiser.device).to(denoiser.dtype)


def _objective(config: RunConfig, judges: Judges, device: torch.device) -> Objective:
    """Build what is minimised; reference faces are loaded only if they have a weight."""
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
