"""A batch of prompts and noise -> the gradient of its loss in the adapter's parameters.

    prompts, noise -> the original model's images, without the adapter; kept in the bank
                   -> images with the adapter -> faces -> class probabilities -> targets -> loss
                   -> d loss / d z_K -> replay -> gradients of the adapter's parameters

Algorithm 1 and sections 4.1 to 4.3 of the paper.
"""

from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from diffusers_fair import distributed
from diffusers_fair.adapters.trainable import TrainableAdapter
from diffusers_fair.backends.registry import load_real_faces
from diffusers_fair.config.recipe import RunConfig
from diffusers_fair.diffusion.noise import initial_noise
from diffusers_fair.diffusion.replay import draw_steps, replay
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
from diffusers_fair.objective.objective import Aim, LossWeights, Objective, Originals
from diffusers_fair.training.batches import Batch, Share
from diffusers_fair.training.guards import NotFiniteError
from diffusers_fair.training.kept_prompts import KeptPrompts
from diffusers_fair.training.original_images import OriginalsBank
from diffusers_fair.training.progress import Figures
from diffusers_fair.vision.judges import Judges

Loss = Callable[[Tensor, Originals], tuple[Tensor, Figures]]
"""Images (n, 3, H, W) and what was seen in the original ones -> the loss, and figures."""
MEMORY_OPTIONS = ("split_guidance", "gradient_checkpointing")  # the cheaper one first


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

    def backward(self, batch: Batch, number: int, *, banked: bool = True) -> Figures:
        """Add the gradient of this process's part of a batch's loss to the parameters.

        Args:
            batch: of all processes.
            number: of the iteration, which decides on the steps that are replayed.
            banked: whether what is seen in the originals may come from the bank, and go there.

        Returns:
            Means over the images: `loss`, `alignment`, `semantics`, `face` if it has a weight, and
            `faces`, the share with one; over the prompts: `bias/NAME`; over the faces, or the
            whole images: `share/NAME/CLASS`, that of each class. Of the kept prompts: `keep/loss`
            and `keep/obeyed` of their images, `keep/embedding`, `keep/prediction`.

        Raises:
            NotFiniteError: an image is NaN or infinite, in any process.
        """

        def loss(images: Tensor, originals: Originals) -> tuple[Tensor, Figures]:
            return self.objective(images, originals, batch.prompts, self.micro_batch)

        again = banked and self.config.train.distinct_iterations is not None
        figures = self._draw(batch, number, loss, banked=again)
        if self.kept is not None:
            figures |= self._keep(
                self.kept, number, len(batch.noise) // distributed.world_size(), banked
            )
        return figures

    def _keep(self, kept: KeptPrompts, number: int, size: int, banked: bool) -> Figures:
        """The gradient and the figures of the kept prompts, so many images at a time."""
        figures: Figures = {}
        if kept.options.images:
            batch, asked = kept.batch(number)
            mine = asked[distributed.shard(len(asked))]

            def loss(images: Tensor, originals: Originals) -> tuple[Tensor, Figures]:
                total, found = self.objective.keep(images, originals, mine, self.micro_batch)
                return kept.options.weight * total, found

            figures |= self._draw(batch, number, loss, banked=banked)
        if kept.holds_embeddings:
            figures["keep/embedding"] = kept.embedding_backward(number)
        if kept.options.prediction:
            split = "split_guidance" in self.memory_options
            found = kept.backward(number, self.micro_batch or size, split_guidance=split)
            figures["keep/prediction"] = found
        return figures

    def _draw(self, batch: Batch, number: int, loss: Loss, *, banked: bool) -> Figures:
        """The gradient and the figures of a loss on the images of a batch."""
        share = Share(batch, distributed.shard(len(batch.noise)))
        originals = self.originals(share, banked=banked)
        noise = self._noise(share)
        branches = self._encode(share)
        if self.config.gradient.method != "replay":
            z = self._unroll(branches, noise, batch.steps)
            v, figures = self._loss(z.detach(), originals, loss)
            z.backward(v)
            return figures
        trajectory = self._sample(branches, noise, batch.steps, keep=True)
        v, figures = self._loss(trajectory.latents, originals, loss)
        for branch, gradients in self._replay(trajectory, branches, v, number, share).items():
            backward(branches[branch], gradients)  # each branch was encoded in a graph of its own
        return figures

    def originals(self, share: Share, *, banked: bool = True) -> Originals:
        """What the judges see in the original model's images.

        Args:
            share: which images.
            banked: whether it may come from the bank, and goes there.
        """

        @torch.no_grad()
        def make() -> Originals:
            noise = self._noise(share)
            with self.adapter.off():
                branches = self._encode(share)
                z = self._sample(branches, noise, share.batch.steps, keep=False).latents
            images = decode(self.pipe, z, self.micro_batch).float()
            return self.objective.originals(images, self.micro_batch)

        if not banked:
            return make()
        return self.bank.get(share.cache_key(), make, self.pipe.device)

    @cached_property
    def bank(self) -> OriginalsBank:
        """Of what was seen in original images; the run folder is claimed for it."""
        folder = self.config.claim_output()
        return OriginalsBank(folder / "originals", _about_originals(self.config))

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

    def _loss(self, z: Tensor, originals: Originals, loss: Loss) -> tuple[Tensor, Figures]:
        """The gradient v of the loss on the final latents (n, c, h, w), and figures."""
        with torch.no_grad():
            images = decode(self.pipe, z, self.micro_batch).float()
        if distributed.any_across(not images.isfinite().all()):
            raise NotFiniteError
        total, figures = loss(images.requires_grad_(), originals)
        (gradient,) = torch.autograd.grad(total, images)  # (n, 3, H, W)
        return decode_backward(self.pipe, z, gradient, self.micro_batch), figures

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
            drawn = draw_steps(len(weights), count, len(share.batch.noise), g)
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
    """What is minimised; real faces are loaded only if they have a weight."""
    real_faces = None
    if config.losses.face:
        real_faces = load_real_faces(config.models, judges.face_detector, device)
    weights = LossWeights(semantics=config.losses.semantics, face=config.losses.face)
    return Objective(judges, _aims(config), weights, real_faces)


def _aims(config: RunConfig) -> list[Aim]:
    return [
        Aim(
            attribute=attribute,
            threshold=section.threshold,
            cost=section.cost,
            steering=section.steering,
            semantics_changed=section.semantics_changed,
            semantics_face=section.semantics_face,
        )
        for section, attribute in zip(config.attributes, config.balanced(), strict=True)
    ]


def _about_originals(config: RunConfig) -> Any:
    """What the original images, and what is seen in them, depend on beside the batch."""
    told = config.model_dump(
        mode="json",
        include={"base", "attributes", "models", "sampling"},
        exclude={"attributes": {"__all__": {"words", "nouns", "steering", "targets", "region"}}},
    )
    whole = [section.name for section in config.attributes if section.region == "image"]
    told |= {"face": config.losses.face > 0} | ({"whole": whole} if whole else {})
    return told | ({"people": config.people} if config.people != "largest" else {})
