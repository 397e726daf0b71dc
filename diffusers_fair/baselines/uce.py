"""Unified concept editing: edits the cross-attention's keys and values in closed form.

Gandikota, Orgad, Belinkov, Materzynska, Bau: Unified concept editing in diffusion models, WACV
2024. The projections of a prompt's tokens move along the attributes' directions until the perceived
attributes in the prompt's images match the target.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffusers_fair import metrics
from diffusers_fair.baselines.base import Baseline, ChangedPipeline, Task, require
from diffusers_fair.evaluation.generate import generate
from diffusers_fair.families import family_of
from diffusers_fair.families.stable_diffusion import EMBEDDINGS, cross_attention
from diffusers_fair.prompts.wording import Term, Wording, subject_start, with_terms
from diffusers_fair.vision.judges import Judges


@dataclass(frozen=True)
class UCE(Baseline):
    """Alternates between counting perceived classes and editing the U-Net's cross-attention."""

    concepts: int = 37
    """Number of edited prompts, evenly spaced among the prompts of the task."""
    images_per_prompt: int = 10
    """Images per edited prompt in which the perceived classes are counted."""
    iterations: int = 30
    """Maximum number of edits."""
    tolerance: float = 0.05
    """A prompt is no longer edited when all its class shares are this close to the target."""
    step: float = 0.5
    """Step size: movement of a prompt per unit of difference between target and counted share; 1
    overshoots on the testbed."""
    edit_scale: float = 1.0
    """Weight of the edited prompts in the least-squares problem."""
    preserve_scale: float = 1.0
    """Weight of the preserved prompts: the empty prompt, and the neutral phrase with each word."""
    regularization: float = 0.5
    """lambda: weight of staying near the original weights."""
    phrase: str = "a photo of the face of a person"
    """Neutral prompt that is preserved with each of the words."""

    def check(self, pipe: Any) -> None:
        """Require keys and values that are computed from the prompt alone."""
        works = bool(cross_attention(pipe))
        require(works, "uce", "edits the keys and values of cross-attention", pipe)

    def apply(self, pipe: Any, task: Task) -> ChangedPipeline:
        """Edit the weights; `restore` restores the original weights bit for bit.

        Raises:
            ValueError: the weights are offloaded layer by layer; or as for `check`.
        """
        self.check(pipe)
        layers = cross_attention(pipe)
        if any(layer.weight.is_meta for layer in layers):
            raise ValueError(
                "uce edits the U-Net's weights, but they are offloaded layer by layer: call "
                "pipe.remove_all_hooks() first"
            )
        old = [layer.weight.detach().clone() for layer in layers]
        prompts = _spaced(task.prompts, self.concepts)
        judges = task.judges()
        concepts = [shifts(pipe, prompt, task.wordings) for prompt in prompts]
        kept = _kept(pipe, self.phrase, task.wordings)  # (r, d)
        moves = np.zeros((len(prompts), sum(len(w.attribute.classes) for w in task.wordings)))
        changed = ChangedPipeline(pipe, restore=lambda: _set(layers, old))
        try:
            for _ in range(self.iterations):
                shares = _class_shares(pipe, prompts, task, judges, self.images_per_prompt)
                gaps = _open_gaps(shares, task.wordings, self.tolerance)  # (P, K)
                if not gaps.any():
                    break
                moves += self.step * gaps
                edit = self._edit(concepts, moves, kept)
                _set(layers, [(weight.cpu().double() @ edit).to(weight) for weight in old])
        except BaseException:
            changed.restore()
            raise
        return changed

    def _edit(self, concepts: Sequence[tuple[Tensor, Tensor]], moves: np.ndarray, kept: Tensor):
        c = torch.cat([tokens for tokens, _ in concepts])  # (m, d)
        wanted = torch.cat(
            [
                tokens + torch.einsum("k,ktd->td", torch.from_numpy(move).to(tokens), words)
                for (tokens, words), move in zip(concepts, moves, strict=True)
            ]
        )  # (m, d): c_i + sum over k of alpha_k a_k
        scales = self.edit_scale, self.preserve_scale, self.regularization
        return _closed_form(c, wanted, kept, *scales)


def _closed_form(
    concepts: Tensor,
    wanted: Tensor,
    kept: Tensor,
    edit_scale: float,
    preserve_scale: float,
    regularization: float,
) -> Tensor:
    """Return E such that W_old E are the edited weights of every layer: the paper's closed form.

    W minimises sum |W c - W_old c*|^2 + sum |W r - W_old r|^2 + lambda |W - W_old|^2 over edited
    tokens c and preserved tokens r. Every target is W_old times a vector, so all layers share

        E = (sum c* c^T + sum r r^T + lambda I) (sum c c^T + sum r r^T + lambda I)^-1

    Args:
        concepts: c of m tokens, (m, d).
        wanted: c* of the same tokens, (m, d).
        kept: r, (r, d).
        edit_scale: weight of the first sum.
        preserve_scale: weight of the second sum.
        regularization: lambda.

    Returns:
        (d, d).
    """
    same = preserve_scale * kept.T @ kept + regularization * torch.eye(kept.shape[1]).to(kept)
    left = edit_scale * wanted.T @ concepts + same
    right = edit_scale * concepts.T @ concepts + same
    return torch.linalg.solve(right.T, left.T).T


def shifts(pipe: Any, prompt: str, wordings: Sequence[Wording]) -> tuple[Tensor, Tensor]:
    """Return a prompt's tokens from its subject on, (t, d), and those with class words, (K, t, d).

    A word before the subject shifts the tokens, so they are aligned here. A class with several
    words gets the mean of their tokens.
    """
    neutral = _ids(pipe, prompt)
    start = len(_ids(pipe, prompt[: subject_start(prompt)])) - 1  # without its end token
    classes = [[t for t in w.terms if t.label == k] for w in wordings for k in range(_classes(w))]
    worded = [[with_terms(prompt, [term]) for term in terms] for terms in classes]
    moved = [[len(_ids(pipe, text)) - len(neutral) for text in texts] for texts in worded]
    length = pipe.tokenizer.model_max_length - start - max(map(max, moved))
    tokens = _embed(pipe, [prompt])[0, start : start + length]
    means = []
    for texts, offsets in zip(worded, moved, strict=True):
        rows = zip(_embed(pipe, texts), offsets, strict=True)
        parts = [row[start + offset : start + offset + length] for row, offset in rows]
        means.append(torch.stack(parts).mean(0))
    return tokens, torch.stack(means)


def _class_shares(
    pipe: Any, prompts: Sequence[str], task: Task, judges: Judges, images: int
) -> np.ndarray:
    """Return the shares of perceived classes, (P, K), attributes side by side; NaN without any."""
    counts = [np.zeros((len(prompts), _classes(wording))) for wording in task.wordings]
    for batch in generate(
        pipe,
        prompts,
        images_per_prompt=images,
        steps=task.steps,
        guidance_scale=task.guidance_scale,
        seed=task.seed,
        size=task.size,
        progress=False,
    ):
        shown = judges.on_device(batch.images)
        faces = judges.faces(shown)
        images_with_face, found = faces.image_index[faces.is_face], faces[faces.is_face]
        for wording, count in zip(task.wordings, counts, strict=True):
            attribute = wording.attribute
            rows = images_with_face
            if not attribute.of_faces:
                rows = torch.arange(len(shown)).to(images_with_face)
            if not len(rows):
                continue
            labels = judges.probabilities(attribute, shown[rows], found).argmax(1)
            prompt = batch.prompt[rows.cpu().numpy()]
            count += metrics.class_counts(labels.cpu().numpy(), prompt, *count.shape)
    with np.errstate(invalid="ignore"):
        return np.hstack([count / count.sum(1, keepdims=True) for count in counts])


def _open_gaps(shares: np.ndarray, wordings: Sequence[Wording], tolerance: float) -> np.ndarray:
    """Return target minus share, (P, K); 0 for an attribute within tolerance or without counts."""
    gaps, start = np.zeros_like(shares), 0
    for wording in wordings:
        columns = slice(start, start := start + _classes(wording))
        gap = np.nan_to_num(np.array(wording.attribute.target) - shares[:, columns])
        gaps[:, columns] = gap * (np.abs(gap).max(1, keepdims=True) > tolerance)
    return gaps


def _kept(pipe: Any, phrase: str, wordings: Sequence[Wording]) -> Tensor:
    """Return the preserved tokens, (r, d)."""
    terms: list[Term] = [term for wording in wordings for term in wording.terms]
    return _embed(pipe, ["", *(with_terms(phrase, [term]) for term in terms)]).flatten(0, 1)


def _embed(pipe: Any, texts: list[str]) -> Tensor:
    """Return embeddings (n, L, d) in float64 on the CPU; not every other device has float64."""
    return family_of(pipe).encode(pipe, texts)[EMBEDDINGS].cpu().double()


def _ids(pipe: Any, text: str) -> list[int]:
    """Return the token ids, including the start and end tokens."""
    return pipe.tokenizer(text).input_ids


def _classes(wording: Wording) -> int:
    return len(wording.attribute.classes)


def _spaced(prompts: Sequence[str], count: int) -> list[str]:
    """Choose at most `count` of the prompts, evenly spaced."""
    rows = np.linspace(0, len(prompts) - 1, min(count, len(prompts))).round().astype(int)
    return [prompts[row] for row in rows]


def _set(layers: Sequence[Any], weights: Sequence[Tensor]) -> None:
    with torch.no_grad():
        for layer, weight in zip(layers, weights, strict=True):
            layer.weight.copy_(weight)
