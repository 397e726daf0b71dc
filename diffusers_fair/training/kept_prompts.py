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
from diffusers_fair.backends.registry import UNTOUCHED_SETS, untouched_set
from diffusers_fair.config.schema import KeepSection, RunConfig
from diffusers_fair.diffusion.replay import backward_step, leaf, trains
from diffusers_fair.diffusion.sampling import (
    combine,
    denoise,
    guidance,
    guided_unet,
    initial_noise,
    predict,
)
from diffusers_fair.diffusion.scheduler import BiasedGradientScheduler
from diffusers_fair.families.stable_diffusion import encode_prompts
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
    """(c, h, w), latents as the U-Net takes them."""
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
        batch = Batch(tuple(prompt.text for prompt in chosen), tuple(seeds), steps)
        return batch, [prompt.asks for prompt in chosen]

    def embedding_backward(self, number: int) -> float:
        """Add this process's part of the gradient of L_embedding; L_embedding of all processes."""
        count = self.options.texts
        chosen = [self.prompts.prompt(number * count + i) for i in range(count)]
        texts = [kept.text for kept in chosen[distributed.shard(count)]]
        empty = list(dict.fromkeys(kept.negative for kept in chosen))  # every process has all
        with torch.no_grad(), self.adapter.off():
            before = torch.cat([self._encode_texts(texts), self._encode_texts(empty, prefix=False)])
        after = torch.cat([self._encode_texts(texts), self._encode_texts(empty, prefix=False)])
        change = (after - before).float().square().sum(2) / before.float().square().sum(2)  # (m, L)
        own, shared = change.mean(1).split([len(texts), len(empty)])
        loss = (own.sum() + shared.sum() / distributed.world_size()) / (count + len(empty))
        (self.options.embedding * loss).backward()
        return torch.cat(distributed.gather(loss[None])).sum().item()

    def backward(self, number: int, size: int, *, split_guidance: bool = False) -> float:
        """Add this process's part of the gradient to the parameters; L_keep of all processes.

        Args:
            number: of the iteration, which decides on prompts, noise and steps.
            size: pairs that the U-Net sees at a time.
            split_guidance: whether the guidance branches are evaluated one after the other.
        """
        pairs = self._pairs(number)
        mine = pairs[distributed.shard(len(pairs))]
        embeddings = self._encode(mine)  # (n, L, d) of each branch
        leaves = [leaf(x) for x in embeddings]
        total = torch.zeros(1)
        for rows in torch.arange(len(mine)).split(size):
            part = [mine[i] for i in rows.tolist()]
            own = [x[rows] for x in leaves]
            total += self._backward(part, own, len(pairs), split_guidance)
        for x, gathered in zip(embeddings, leaves, strict=True):
            if gathered.grad is not None:
                x.backward(gathered.grad.to(x.dtype))  # once through the text encoder
        return torch.cat(distributed.gather(total)).sum().item()

    def _backward(
        self, pairs: list[KeptStep], embeddings: list[Tensor], count: int, split: bool
    ) -> float:
        """Back-propagate the part of some of `count` pairs to the embeddings; their L_keep."""
        unet, device = self.pipe.unet, self.pipe.device
        branches = guidance(self.config.sampling.guidance_scale, *embeddings)
        inputs = torch.stack([pair.scaled for pair in pairs]).to(device)  # (m, c, h, w)
        timesteps = torch.stack([pair.timestep for pair in pairs]).to(device)  # (m,)
        wanted = torch.stack([pair.output for pair in pairs]).to(device)
        with torch.no_grad():
            outputs = [predict(unet, inputs, timesteps, x.to(inputs.dtype)) for x, _ in branches]
            guided = combine(outputs, self.config.sampling.guidance_scale)
            residual = (guided - wanted).float()
        gradient = residual * (2 * self.options.prediction / (count * wanted[0].numel()))
        trainable = [branch for branch in branches if branch[0].requires_grad or trains(unet)]
        for group in [[branch] for branch in trainable] if split else [trainable]:
            backward_step(unet, inputs, timesteps, group, gradient)
        return residual.square().mean((1, 2, 3)).sum().item() / count

    def _encode(self, pairs: list[KeptStep]) -> list[Tensor]:
        """Of the prompts and, with guidance, of the negative ones: (n, L, d)."""
        cond = self._encode_texts([pair.prompt.text for pair in pairs])
        if self.config.sampling.guidance_scale == 1:
            return [cond]
        return [cond, self._encode_texts([pair.prompt.negative for pair in pairs], prefix=False)]

    def _encode_texts(self, texts: list[str], *, prefix: bool = True) -> Tensor:
        """(n, L, d), each text through the text encoder once."""
        different = list(dict.fromkeys(texts))
        rows = torch.tensor([different.index(text) for text in texts])
        return encode_prompts(self.pipe, different, prefix=prefix)[rows]

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
        unet, scale = self.pipe.unet, self.config.sampling.guidance_scale
        shape = (unet.config.in_channels, unet.config.sample_size, unet.config.sample_size)
        seeds = [self._seed(iteration) + 1 + i for i in range(count)]
        noise = initial_noise(shape, seeds, device=unet.device).to(unet.dtype)
        with self.adapter.off():
            cond = encode_prompts(self.pipe, [kept.text for kept in new])
            uncond = encode_prompts(self.pipe, [kept.negative for kept in new], prefix=False)
            guided = guided_unet(unet, cond, uncond, count, scale)

            def evaluate(_: int, scaled: Tensor, t: Tensor) -> Tensor:
                output = guided(scaled, t)
                rows = zip(new, scaled, output, strict=True)
                found.extend(KeptStep(kept, x.cpu(), t.cpu(), y.cpu()) for kept, x, y in rows)
                return output

            denoise(evaluate, self.scheduler, noise, self.config.sampling.steps[1])
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
    if name in UNTOUCHED_SETS:
        return untouched_prompts(name, "train")
    try:
        texts = prompt_set(name).prompts("train")
    except ValueError as error:
        raise ValueError(
            f"prompts.keep.sets names '{name}': expected {NAMED}, {IMPLIED}, "
            f"{', '.join(UNTOUCHED_SETS)}, a packaged prompt set or a file ({error})"
        ) from None
    words = vocabulary(wordings)
    return tuple(KeptPrompt(text, requested_classes(text, words)) for text in texts)
