"""Kept prompts: prompts whose words determine who is shown, or that show nobody.

Three losses preserve their images. `KeptImages` generates and judges some of the images. The second
loss, much cheaper, preserves the denoiser's predictions:

    L_keep = mean over kept prompts c, steps i of |eps(z_i, t_i, c) - eps_0(z_i, t_i, c)|^2

eps is the guided prediction with the adapter, eps_0 without it. z_i are latents on a sampling
trajectory of the original model, so nothing is sampled with the adapter, decoded or judged. Summed
over the steps and weighted by their noise, it would be the Kullback-Leibler divergence between the
two models' images of the prompt. Each iteration samples trajectories for a few prompts, which stay
in a pool for some iterations. Pairs of prompt and step are sampled from the pool.

The third loss, cheaper still, preserves the prompt embeddings e, token by token:

    L_embedding = mean over kept prompts, tokens of |e - e_0|^2 / |e_0|^2
"""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from diffusers_fair import distributed
from diffusers_fair.adapters.trainable import TrainableAdapter
from diffusers_fair.backends.registry import untouched_set, untouched_sets
from diffusers_fair.config.schema import KeepSection, RunConfig
from diffusers_fair.diffusion.noise import Noise, initial_noise, noise_generators
from diffusers_fair.diffusion.replay import backward_step, trainable_branches
from diffusers_fair.diffusion.sampling import (
    denoise,
    guided_prediction,
    shape_of,
    weighted_branches,
)
from diffusers_fair.diffusion.scheduler import BiasedGradientScheduler
from diffusers_fair.families import denoiser_of, encode_negatives, family_of
from diffusers_fair.families.conditioning import (
    Branches,
    Conditioning,
    backward,
    cast,
    concatenate,
    expand,
    gradients,
    leaves,
    select,
)
from diffusers_fair.prompts import prompt_set
from diffusers_fair.prompts.groups import (
    IMPLIED,
    NAMED,
    KeptPrompt,
    implied_prompts,
    named_prompts,
    requested_classes,
    untouched_prompts,
    vocabulary,
)
from diffusers_fair.prompts.mixtures import PromptMixture, counts_per_cycle
from diffusers_fair.prompts.wording import Wording
from diffusers_fair.training.batches import Batch

_NAMED_PROMPTS = 240  # minimum number of named prompts per attribute
_SALT = 0x5EED  # separates the random streams of kept prompts from those of other prompts


@dataclass(frozen=True)
class _KeptStep:
    """A sampling step of the original model for a kept prompt."""

    prompt: KeptPrompt
    scaled: Tensor
    """(c, h, w), input of the denoiser."""
    timestep: Tensor
    """()."""
    output: Tensor
    """(c, h, w), the original model's guided prediction."""


class KeptPrompts:
    """The kept prompts of a recipe: batches to generate, and gradients of the two cheap losses.

    Args:
        config: a recipe with `prompts.keep`.
        pipe: the base model with the adapter.
        adapter: the adapter in training.
        scheduler: scheduler of training.
    """

    def __init__(
        self,
        config: RunConfig,
        pipe: Any,
        adapter: TrainableAdapter,
        scheduler: BiasedGradientScheduler,
    ):
        assert config.prompts.keep is not None
        self.config = config
        self.options: KeepSection = config.prompts.keep
        self.pipe = pipe
        self.adapter = adapter
        self.scheduler = scheduler
        self.prompts = kept_prompts(config)
        self.image_prompts = replace(self.prompts, prompts=_without_negatives(self.prompts.prompts))
        self.pool: deque[list[_KeptStep]] = deque(maxlen=self.options.pool)
        self.last_step = -1  # last iteration whose trajectories are in the pool
        self._check_processes()

    def _check_processes(self) -> None:
        """Check that there are enough items for every process."""
        counts = {
            "images": self.options.images,
            "texts": self.options.texts * self.holds_embeddings,
            "pairs": self.options.pairs * bool(self.options.prediction),
        }
        for key, count in counts.items():
            if 0 < count < distributed.world_size():
                raise ValueError(
                    f"prompts.keep.{key} is {count}, which cannot be shared by "
                    f"{distributed.world_size()} processes: raise it, or start fewer"
                )

    @property
    def holds_embeddings(self) -> bool:
        """Whether the embedding loss is used."""
        return bool(self.options.embedding) and self.config.embeddings_stay

    def batch(self, step: int) -> tuple[Batch, list[Mapping[str, str]]]:
        """Return the kept images of an iteration, and the classes that each of them should show.

        They repeat after `distinct` images, whose judged originals are then in the cache.
        """
        count = self.options.images
        step %= max(1, self.options.distinct // count)
        chosen = [self.image_prompts.prompt(step * count + i) for i in range(count)]
        seeds = [self._seed(step) + 500 + i for i in range(count)]
        steps = self.config.sampling.steps[1]
        batch = Batch(tuple(prompt.text for prompt in chosen), tuple(map(Noise, seeds)), steps)
        return batch, [prompt.expected_classes for prompt in chosen]

    def embedding_backward(self, step: int, *, loss_scale: float = 1.0) -> float:
        """Add this process's part of the gradient of L_embedding; return all of L_embedding.

        Args:
            step: index of the iteration, which determines the prompts.
            loss_scale: factor of the gradient.
        """
        count = self.options.texts
        chosen = [self.prompts.prompt(step * count + i) for i in range(count)]
        texts = [kept.text for kept in chosen[distributed.shard(count)]]
        negatives = list(dict.fromkeys(kept.negative for kept in chosen))  # in every process
        with torch.no_grad(), self.adapter.disabled():
            before = self._encode_both(texts, negatives)
        change = _relative_change(before, self._encode_both(texts, negatives))  # (m,)
        local, common = change.split([len(texts), len(negatives)])
        loss = (local.sum() + common.sum() / distributed.world_size()) / (count + len(negatives))
        (loss_scale * self.options.embedding * loss).backward()
        return torch.cat(distributed.gather(loss[None])).sum().item()

    def prediction_backward(
        self,
        step: int,
        micro_batch: int,
        *,
        split_guidance: bool = False,
        loss_scale: float = 1.0,
    ) -> float:
        """Add this process's part of the gradient of L_keep; return all of L_keep.

        Args:
            step: index of the iteration, which determines prompts, noise and sampling steps.
            micro_batch: pairs per evaluation of the denoiser.
            split_guidance: whether to evaluate the guidance branches one after the other.
            loss_scale: factor of the gradient.
        """
        pairs = self._pairs(step)
        local_pairs = pairs[distributed.shard(len(pairs))]
        encoded = self._encode(local_pairs)
        collected = {branch: leaves(conditioning) for branch, conditioning in encoded.items()}
        total = torch.zeros(1)
        for rows in torch.arange(len(local_pairs)).split(micro_batch):
            part = [local_pairs[i] for i in rows.tolist()]
            branches = {branch: select(leaf, rows) for branch, leaf in collected.items()}
            total += self._pairs_backward(part, branches, len(pairs), split_guidance, loss_scale)
        for branch, conditioning in encoded.items():
            backward(conditioning, gradients(collected[branch]))  # once through the text encoder
        return torch.cat(distributed.gather(total)).sum().item()

    def _pairs_backward(
        self, pairs: list[_KeptStep], branches: Branches, count: int, split: bool, loss_scale: float
    ) -> float:
        """Back-propagate the part of L_keep of some of `count` pairs, and return this part."""
        device, scale = self.pipe.device, self.config.sampling.guidance_scale
        inputs = torch.stack([pair.scaled for pair in pairs]).to(device)  # (m, c, h, w)
        timesteps = torch.stack([pair.timestep for pair in pairs]).to(device)  # (m,)
        original = torch.stack([pair.output for pair in pairs]).to(device)
        residual = (self._predict(inputs, timesteps, branches) - original).float()
        weight = loss_scale * 2 * self.options.prediction / (count * original[0].numel())
        gradient = residual * weight
        shape = shape_of(inputs)
        for group in trainable_branches(self.pipe, branches, shape, scale, split=split):
            rows = [(expand(conditioning, len(pairs)), share) for conditioning, share in group]
            backward_step(self.pipe, inputs, timesteps, rows, gradient, scale)
        return residual.square().mean((1, 2, 3)).sum().item() / count

    @torch.no_grad()
    def _predict(self, inputs: Tensor, timesteps: Tensor, branches: Branches) -> Tensor:
        """Compute the guided prediction (m, c, h, w), one branch at a time."""
        family, scale = family_of(self.pipe), self.config.sampling.guidance_scale
        outputs = [
            family.predict(
                denoiser_of(self.pipe), inputs, timesteps, cast(expand(c, len(inputs)), inputs)
            )
            for c, _ in weighted_branches(self.pipe, branches, shape_of(inputs), scale)
        ]
        return family.combine(outputs, scale)

    def _encode(self, pairs: list[_KeptStep]) -> Branches:
        """Encode the prompts and, with guidance, the negative prompts."""
        cond = self._encode_texts([pair.prompt.text for pair in pairs])
        scale = self.config.sampling.guidance_scale
        if "uncond" not in dict(family_of(self.pipe).guidance_branches(self.pipe, scale)):
            return {"cond": cond}
        negatives = [pair.prompt.negative for pair in pairs]
        return {"cond": cond, "uncond": encode_negatives(self.pipe, negatives)}

    def _encode_both(self, texts: list[str], negatives: list[str]) -> Conditioning:
        """Encode prompts, followed by negative prompts."""
        return concatenate([self._encode_texts(texts), self._encode_texts(negatives, prefix=False)])

    def _encode_texts(self, texts: list[str], *, prefix: bool = True) -> Conditioning:
        """Encode texts; duplicates are encoded once."""
        distinct = list(dict.fromkeys(texts))
        rows = torch.tensor([distinct.index(text) for text in texts])
        return select(family_of(self.pipe).encode(self.pipe, distinct, prefix=prefix), rows)

    def _pairs(self, step: int) -> list[_KeptStep]:
        """Add missing trajectories to the pool, and sample pairs from it.

        When training has resumed, the trajectories of earlier iterations are missing, too.
        """
        first = max(self.last_step + 1, step + 1 - self.options.pool)
        for iteration in range(first, step + 1):
            self.pool.append(self._original_steps(iteration))
        self.last_step = step
        g = torch.Generator().manual_seed(self._seed(step))
        pairs = [pair for trajectory in self.pool for pair in trajectory]
        chosen = torch.randint(len(pairs), (self.options.pairs,), generator=g)
        return [pairs[i] for i in chosen.tolist()]

    @torch.no_grad()
    def _original_steps(self, step: int) -> list[_KeptStep]:
        """Sample with the original model for the new prompts of an iteration; return its steps."""
        count, pairs = self.options.new_prompts, list[_KeptStep]()
        new = [self.prompts.prompt(step * count + i) for i in range(count)]
        family, device = family_of(self.pipe), denoiser_of(self.pipe).device
        starts = [Noise(self._seed(step) + 1 + i) for i in range(count)]
        shape = family.noise_shape(self.pipe, self.config.sampling.size)
        noise = initial_noise(shape, starts, device=device)
        with self.adapter.disabled():
            branches = {
                "cond": family.encode(self.pipe, [kept.text for kept in new]),
                "uncond": encode_negatives(self.pipe, [kept.negative for kept in new]),
            }
            scale = self.config.sampling.guidance_scale
            guided = guided_prediction(self.pipe, branches, noise.shape, scale)

            def evaluate(_: int, scaled: Tensor, t: Tensor) -> Tensor:
                output = guided(scaled, t)
                rows = zip(new, scaled, output, strict=True)
                pairs.extend(_KeptStep(kept, x.cpu(), t.cpu(), y.cpu()) for kept, x, y in rows)
                return output

            steps = self.config.sampling.steps[1]
            noise = noise.to(family.latents_dtype(self.pipe))
            generators = noise_generators(shape, starts)
            denoise(self.pipe, evaluate, self.scheduler, noise, steps, generators)
        return pairs

    def _seed(self, step: int) -> int:
        return (1_000_003 * self.config.train.seed + step) * 1_009 + _SALT


def kept_prompts(config: RunConfig) -> PromptMixture[KeptPrompt]:
    """Return the endless sequence of a recipe's kept prompts, mixed by the weights of their sets.

    Raises:
        ValueError: an unknown set, or one without prompts.
    """
    assert config.prompts.keep is not None
    sets = config.prompts.keep.sets or _default_sets(config)
    pools = tuple(_kept_set(name, config) for name in sets)
    return PromptMixture(pools, counts_per_cycle(list(sets.values())), config.train.seed)


def _default_sets(config: RunConfig) -> dict[str, float]:
    """Return the default sets; implied prompts only if there are any for the attributes."""
    wordings = [section.wording() for section in config.attributes]
    implied = {IMPLIED: 1.0} if implied_prompts(wordings) else {}
    return {NAMED: 2.0, **implied, untouched_set(config.base.model): 1.0}


def _relative_change(before: Conditioning, after: Conditioning) -> Tensor:
    """|e - e_0|^2 / |e_0|^2 of each prompt (m,), the mean over its tokens and tensors."""
    changes = []
    for name, old in before.items():
        change = (after[name] - old).float().square().sum(-1) / old.float().square().sum(-1)
        changes.append(change.view(len(old), -1).mean(1))  # (m, L), or (m,) if pooled -> (m,)
    return torch.stack(changes).mean(0)


def _without_negatives(
    pools: tuple[tuple[KeptPrompt, ...], ...],
) -> tuple[tuple[KeptPrompt, ...], ...]:
    return tuple(tuple(kept for kept in pool if not kept.negative) for pool in pools)


def _kept_set(name: str, config: RunConfig) -> tuple[KeptPrompt, ...]:
    wordings = [section.wording() for section in config.attributes]
    if name == NAMED:
        split = config.prompts.train
        neutral = [p for s in config.prompts.sets for p in prompt_set(s).prompts(split)]
        return named_prompts(neutral, wordings, max(len(neutral), _NAMED_PROMPTS))
    if name != IMPLIED:
        return _other_set(name, wordings)
    implied = implied_prompts(wordings)
    if not implied:
        raise ValueError(
            "prompts.keep.sets names 'implied', but there are no such prompts for "
            f"{', '.join(section.name for section in config.attributes)}: leave it out"
        )
    return implied


def _other_set(name: str, wordings: Sequence[Wording]) -> tuple[KeptPrompt, ...]:
    """Return prompts that show nobody, or those of any other set with the classes they name."""
    if name in untouched_sets():
        return untouched_prompts(name, "train")
    try:
        texts = prompt_set(name).prompts("train")
    except ValueError as error:
        raise ValueError(
            f"prompts.keep.sets names '{name}': expected {NAMED}, {IMPLIED}, "
            f"{', '.join(untouched_sets())}, a packaged prompt set or a file ({error})"
        ) from None
    words = vocabulary(wordings)
    return tuple(KeptPrompt(text, requested_classes(text, words)) for text in texts)
