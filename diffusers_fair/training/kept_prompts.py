"""Kept prompts: those whose words settle who is to be seen, or that show nobody.

They are trained on beside the others, in two ways. Some of their images are drawn and judged, as
`KeptImages` has it. And, for next to nothing, what the adapter predicts for them is held to
what the original model predicts:

    L_keep = mean over kept prompts c, steps i of |eps(z_i, t_i, c) - eps_0(z_i, t_i, c)|^2

eps is the guided prediction with the adapter, eps_0 without it, z_i are latents on the original
model's own way from noise to image: nothing is drawn with the adapter, decoded or judged. Summed
over the steps, and weighted by their noise, it would be the Kullback-Leibler divergence between the
two models' images of the prompt. The ways of a few prompts are drawn in each iteration and stay in
a pool for a while; pairs of prompt and step are taken from it.

Cheaper still, their embeddings e, of which no token should move from the original e_0:

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
from diffusers_fair.diffusion.noise import Noise, initial_noise
from diffusers_fair.diffusion.replay import backward_step, trainable_branches
from diffusers_fair.diffusion.sampling import denoise, guided_prediction, weighted_branches
from diffusers_fair.diffusion.scheduler import BiasedGradientScheduler
from diffusers_fair.families import denoiser_of, family_of
from diffusers_fair.families.conditioning import (
    Branches,
    Conditioning,
    backward,
    cast,
    concatenate,
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

NAMED_PROMPTS = 240  # of an attribute alone, at least
SALT = 0x5EED  # keeps the noise and the pairs of kept prompts apart from those of the others


@dataclass(frozen=True)
class KeptStep:
    """A step on the original model's way to the image of a kept prompt."""

    prompt: KeptPrompt
    scaled: Tensor
    """(c, h, w), latents as the denoiser takes them."""
    timestep: Tensor
    """()."""
    output: Tensor
    """(c, h, w), the original model's guided prediction."""


class KeptPrompts:
    """The kept prompts of a recipe: batches of them to draw, and the gradient of L_keep.

    Args:
        config: a recipe with `prompts.keep`.
        pipe: the base model, with the adapter in it.
        adapter: what is trained.
        scheduler: of training's sampling.
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
        self.drawn = replace(self.prompts, prompts=_without_negatives(self.prompts.prompts))
        self.pool: deque[list[KeptStep]] = deque(maxlen=self.options.pool)
        self.last = -1  # iteration that the pool is of
        self._check_processes()

    def _check_processes(self) -> None:
        """Every process needs a part of whatever is shared."""
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
        """Whether the embeddings of kept prompts are held to the original ones."""
        return bool(self.options.embedding) and self.config.embeddings_stay

    def batch(self, number: int) -> tuple[Batch, list[Mapping[str, str]]]:
        """The kept images that an iteration draws, and what each of them is asked to show.

        They come again after `distinct` images: their originals are then in the cache.
        """
        count = self.options.images
        number %= max(1, self.options.distinct // count)
        chosen = [self.drawn.prompt(number * count + i) for i in range(count)]
        seeds = [self._seed(number) + 500 + i for i in range(count)]
        steps = self.config.sampling.steps[1]
        batch = Batch(tuple(prompt.text for prompt in chosen), tuple(map(Noise, seeds)), steps)
        return batch, [prompt.asks for prompt in chosen]

    def embedding_backward(self, number: int) -> float:
        """Add this process's part of the gradient of L_embedding; L_embedding of all processes."""
        count = self.options.texts
        chosen = [self.prompts.prompt(number * count + i) for i in range(count)]
        texts = [kept.text for kept in chosen[distributed.shard(count)]]
        empty = list(dict.fromkeys(kept.negative for kept in chosen))  # every process has all
        with torch.no_grad(), self.adapter.off():
            before = self._encode_both(texts, empty)
        change = _relative_change(before, self._encode_both(texts, empty))  # (m,)
        own, shared = change.split([len(texts), len(empty)])
        loss = (own.sum() + shared.sum() / distributed.world_size()) / (count + len(empty))
        (self.options.embedding * loss).backward()
        return torch.cat(distributed.gather(loss[None])).sum().item()

    def backward(self, number: int, size: int, *, split_guidance: bool = False) -> float:
        """Add this process's part of the gradient to the parameters; L_keep of all processes.

        Args:
            number: of the iteration, which decides on prompts, noise and steps.
            size: pairs per evaluation of the denoiser.
            split_guidance: whether the guidance branches are evaluated one after the other.
        """
        pairs = self._pairs(number)
        mine = pairs[distributed.shard(len(pairs))]
        encoded = self._encode(mine)
        collected = {branch: leaves(conditioning) for branch, conditioning in encoded.items()}
        total = torch.zeros(1)
        for rows in torch.arange(len(mine)).split(size):
            part = [mine[i] for i in rows.tolist()]
            branches = {branch: select(leaf, rows) for branch, leaf in collected.items()}
            total += self._backward(part, branches, len(pairs), split_guidance)
        for branch, conditioning in encoded.items():
            backward(conditioning, gradients(collected[branch]))  # once through the text encoder
        return torch.cat(distributed.gather(total)).sum().item()

    def _backward(
        self, pairs: list[KeptStep], branches: Branches, count: int, split: bool
    ) -> float:
        """Back-propagate the part of some of `count` pairs to the conditioning; their L_keep."""
        device, scale = self.pipe.device, self.config.sampling.guidance_scale
        inputs = torch.stack([pair.scaled for pair in pairs]).to(device)  # (m, c, h, w)
        timesteps = torch.stack([pair.timestep for pair in pairs]).to(device)  # (m,)
        wanted = torch.stack([pair.output for pair in pairs]).to(device)
        residual = (self._predict(inputs, timesteps, branches) - wanted).float()
        gradient = residual * (2 * self.options.prediction / (count * wanted[0].numel()))
        for group in trainable_branches(self.pipe, branches, scale, split=split):
            backward_step(self.pipe, inputs, timesteps, group, gradient)
        return residual.square().mean((1, 2, 3)).sum().item() / count

    @torch.no_grad()
    def _predict(self, inputs: Tensor, timesteps: Tensor, branches: Branches) -> Tensor:
        """The guided prediction (m, c, h, w), one branch at a time."""
        family, scale = family_of(self.pipe), self.config.sampling.guidance_scale
        outputs = [
            family.predict(denoiser_of(self.pipe), inputs, timesteps, cast(c, inputs))
            for c, _ in weighted_branches(family, branches, scale)
        ]
        return family.combine(outputs, scale)

    def _encode(self, pairs: list[KeptStep]) -> Branches:
        """Encode the prompts and, with guidance, the negative prompts."""
        cond = self._encode_texts([pair.prompt.text for pair in pairs])
        scale = self.config.sampling.guidance_scale
        if "uncond" not in dict(family_of(self.pipe).guidance_branches(scale)):
            return {"cond": cond}
        negatives = [pair.prompt.negative for pair in pairs]
        return {"cond": cond, "uncond": self._encode_texts(negatives, prefix=False)}

    def _encode_both(self, texts: list[str], negatives: list[str]) -> Conditioning:
        """Encode prompts, and behind them negative prompts."""
        return concatenate([self._encode_texts(texts), self._encode_texts(negatives, prefix=False)])

    def _encode_texts(self, texts: list[str], *, prefix: bool = True) -> Conditioning:
        """Encode texts, each different one once."""
        different = list(dict.fromkeys(texts))
        rows = torch.tensor([different.index(text) for text in texts])
        return select(family_of(self.pipe).encode(self.pipe, different, prefix=prefix), rows)

    def _pairs(self, number: int) -> list[KeptStep]:
        """Some of the pool's steps; the pool is as if all iterations up to this had been made."""
        first = max(self.last + 1, number + 1 - self.options.pool)
        for iteration in range(first, number + 1):
            self.pool.append(self._way(iteration))
        self.last = number
        g = torch.Generator().manual_seed(self._seed(number))
        steps = [step for way in self.pool for step in way]
        chosen = torch.randint(len(steps), (self.options.pairs,), generator=g)
        return [steps[i] for i in chosen.tolist()]

    @torch.no_grad()
    def _way(self, iteration: int) -> list[KeptStep]:
        """The original model's way from noise to image, for this iteration's new prompts."""
        count, found = self.options.new_prompts, list[KeptStep]()
        new = [self.prompts.prompt(iteration * count + i) for i in range(count)]
        family, denoiser = family_of(self.pipe), denoiser_of(self.pipe)
        starts = [Noise(self._seed(iteration) + 1 + i) for i in range(count)]
        noise = initial_noise(family.noise_shape(self.pipe), starts, device=denoiser.device)
        with self.adapter.off():
            branches = {
                "cond": family.encode(self.pipe, [kept.text for kept in new]),
                "uncond": family.encode(self.pipe, [kept.negative for kept in new], prefix=False),
            }
            scale = self.config.sampling.guidance_scale
            guided = guided_prediction(self.pipe, branches, count, scale)

            def evaluate(_: int, scaled: Tensor, t: Tensor) -> Tensor:
                output = guided(scaled, t)
                rows = zip(new, scaled, output, strict=True)
                found.extend(KeptStep(kept, x.cpu(), t.cpu(), y.cpu()) for kept, x, y in rows)
                return output

            steps = self.config.sampling.steps[1]
            denoise(evaluate, self.scheduler, noise.to(denoiser.dtype), steps)
        return found

    def _seed(self, number: int) -> int:
        return (1_000_003 * self.config.train.seed + number) * 1_009 + SALT


def kept_prompts(config: RunConfig) -> PromptMixture[KeptPrompt]:
    """The kept prompts of a recipe, without end, its sets in the shares of their weights.

    Raises:
        ValueError: an unknown set, or one without prompts.
    """
    assert config.prompts.keep is not None
    sets = config.prompts.keep.sets or usual_sets(config)
    pools = tuple(_kept_set(name, config) for name in sets)
    return PromptMixture(pools, counts_per_cycle(list(sets.values())), config.train.seed)


def usual_sets(config: RunConfig) -> dict[str, float]:
    """The sets of a recipe that names none: implied prompts only where there are any."""
    wordings = [section.wording() for section in config.attributes]
    implied = {IMPLIED: 1.0} if implied_prompts(wordings) else {}
    return {NAMED: 2.0, **implied, untouched_set(config.base.model): 1.0}


def _relative_change(before: Conditioning, after: Conditioning) -> Tensor:
    """|e - e_0|^2 / |e_0|^2 of each prompt (m,), the mean over its tokens and tensors."""
    changes = []
    for name, old in before.items():
        change = (after[name] - old).float().square().sum(-1) / old.float().square().sum(-1)
        changes.append(change.flatten(1).mean(1))  # (m, L) -> (m,)
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
        return named_prompts(neutral, wordings, max(len(neutral), NAMED_PROMPTS))
    if name != IMPLIED:
        return _packaged_or_own(name, wordings)
    found = implied_prompts(wordings)
    if not found:
        raise ValueError(
            "prompts.keep.sets names 'implied', and there are no such prompts for "
            f"{', '.join(section.name for section in config.attributes)}: leave it out"
        )
    return found


def _packaged_or_own(name: str, wordings: Sequence[Wording]) -> tuple[KeptPrompt, ...]:
    """Prompts that show nobody, or prompts of one's own and what they ask for."""
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
