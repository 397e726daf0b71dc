"""The settings of an evaluation, and what the judges perceived in each image."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from itertools import combinations
from math import isfinite
from typing import Any

import numpy as np

from diffusers_fair import metrics
from diffusers_fair.attributes import Attribute, People

_SAME_NOISE = ("prompts", "images_per_prompt", "steps", "guidance_scale", "seed", "size")
_DEFAULTS = {"people": "largest", "size": None}  # left out of report.json, as in older reports


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of an evaluation. Equal settings start each image from the same noise."""

    prompts: tuple[str, ...]
    attributes: tuple[Attribute, ...]
    images_per_prompt: int
    """Images per prompt; for images from a folder, the maximum over prompts."""
    steps: int | None = None
    """Scheduler steps. None for images from a folder, like `guidance_scale` and `seed`."""
    guidance_scale: float | None = None
    seed: int | None = None
    size: int | None = None
    """Width and height of the images in pixels; None for the pipeline's default."""
    people: People = "largest"
    """Which faces of an image count."""

    def json(self) -> dict[str, Any]:
        """Return the JSON object in report.json, without what has its default in `_DEFAULTS`."""
        root = asdict(self) | {"attributes": [a.json() for a in self.attributes]}
        return {k: v for k, v in root.items() if k not in _DEFAULTS or v != _DEFAULTS[k]}

    def check_same_noise(self, other: "Settings") -> None:
        """Check that images of two evaluations started from the same noise.

        Raises:
            ValueError: the noise or the sampling differs.
        """
        for name in _SAME_NOISE:
            reference, current = getattr(self, name), getattr(other, name)
            if reference != current:
                shown = "" if name == "prompts" else f" ({reference} instead of {current})"
                raise ValueError(
                    f"the reference was evaluated with other {name}{shown}: images can be "
                    f"compared only if {', '.join(_SAME_NOISE)} are the same"
                )

    def measured(self) -> tuple[Attribute, ...]:
        """Return the attributes, followed by the joint attribute of each combination of them."""
        return tuple(metrics.joint_attribute(group) for group in self.groups())

    def groups(self) -> list[tuple[Attribute, ...]]:
        """Return each attribute alone, then each pair of attributes, and so on."""
        sizes = range(1, len(self.attributes) + 1)
        return [group for size in sizes for group in combinations(self.attributes, size)]


@dataclass(frozen=True, kw_only=True, eq=False)
class Records:
    """What the judges perceived in each of n images, prompt by prompt."""

    prompt: np.ndarray
    """Index of the prompt, (n,)."""
    image: np.ndarray
    """Index of the image among those of its prompt, (n,)."""
    seed: np.ndarray | None = None
    """Seed of the image's generator, (n,); None for images from a folder."""
    file: np.ndarray | None = None
    """Path of the image, relative to its folder, (n,); None for generated images."""
    found: np.ndarray
    """Whether the image has a face, (n,) bool."""
    boxes: np.ndarray
    """Corners x0, y0, x1, y1 of the largest face in pixels, (n, 4); undefined without a face."""
    probabilities: Mapping[str, np.ndarray]
    """Attribute -> probabilities (n, classes); undefined for attributes of faces without a face."""
    scores: Mapping[str, np.ndarray]
    """Score -> (n,); NaN where it does not apply."""
    features: Mapping[str, np.ndarray]
    """Encoder -> unit-length features (n, d), for comparison with another report."""
    others_found: np.ndarray | None = None
    """With `people: all`, which of up to k further faces exist, (n, k) bool; otherwise None."""
    others_boxes: np.ndarray | None = None
    """Corners of the further faces, (n, k, 4), or None; undefined for faces that do not exist."""
    others_probabilities: Mapping[str, np.ndarray] = field(default_factory=dict)
    """Attribute of faces -> probabilities (n, k, classes) of the further faces."""

    @classmethod
    def concatenate(cls, parts: Sequence["Records"]) -> "Records":
        """Join the records of batches."""
        flat = [part.arrays() for part in parts]
        return cls.from_arrays(
            {name: _concatenated([p[name] for p in flat], name) for name in flat[0]}
        )

    def rows(self, chosen: np.ndarray) -> "Records":
        """Select images by a mask (n,) or by row indices."""
        return self.from_arrays({name: values[chosen] for name, values in self.arrays().items()})

    @property
    def faces(self) -> np.ndarray:
        """Number of counted faces in each image, (n,)."""
        others = 0 if self.others_found is None else self.others_found.sum(1)
        return self.found.astype(int) + others

    def counted(self, attributes: Sequence[Attribute]) -> tuple[np.ndarray, list[np.ndarray]]:
        """Select what counts for a joint attribute: prompts (m,), and classes (m,) per attribute.

        Every image counts or, if any attribute is of faces, every image with a face. With
        `people: all` every face counts, each paired with its whole image.
        """
        rows = np.arange(len(self.found))
        if any(a.of_faces for a in attributes):
            rows = np.flatnonzero(self.found)
        probabilities = [self.probabilities[a.name][rows] for a in attributes]
        if any(a.of_faces for a in attributes) and self.others_found is not None:
            image, place = self.others_found.nonzero()
            rows = np.concatenate([rows, image])
            for i, a in enumerate(attributes):
                whole = self.probabilities[a.name][image]
                more = self.others_probabilities[a.name][image, place] if a.of_faces else whole
                probabilities[i] = np.concatenate([probabilities[i], more])
        return self.prompt[rows], [p.argmax(-1) for p in probabilities]

    def arrays(self) -> dict[str, np.ndarray]:
        """Flatten to named arrays, such as {"found": (n,), "scores/clip_t": (n,)}, without None."""
        flat: dict[str, np.ndarray] = {}
        for name in (f.name for f in fields(self)):
            values = getattr(self, name)
            if isinstance(values, Mapping):
                flat |= {f"{name}/{key}": value for key, value in values.items()}
            elif values is not None:
                flat[name] = values
        return flat

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> "Records":
        """Read what `arrays` returned."""
        kinds = ("probabilities", "scores", "features", "others_probabilities")
        made: dict[str, Any] = {name: {} for name in kinds}
        for name, values in arrays.items():
            kind, _, key = name.partition("/")
            if key:
                made[kind][key] = values
            else:
                made[kind] = values
        return cls(**made)

    def lines(self, attributes: Sequence[Attribute] = ()) -> Iterator[dict[str, Any]]:
        """Yield one JSON object per image, without the features.

        Args:
            attributes: attributes of the evaluation. All others are treated as attributes of faces,
                whose probabilities are left out for images without a face.
        """
        whole = {a.name for a in attributes if not a.of_faces}
        for i, has_face in enumerate(self.found.tolist()):
            shown = {k: v for k, v in self.probabilities.items() if has_face or k in whole}
            yield {
                "prompt": int(self.prompt[i]),
                "image": int(self.image[i]),
                **({} if self.seed is None else {"seed": int(self.seed[i])}),
                **({} if self.file is None else {"file": str(self.file[i])}),
                "found": has_face,
                "box": self.boxes[i].tolist() if has_face else None,
                "probabilities": {k: v[i].tolist() for k, v in shown.items()} or None,
                **({} if self.others_found is None else {"others": self._others(i)}),
                "scores": {k: _json_float(v[i]) for k, v in self.scores.items()},
            }

    def _others(self, i: int) -> list[dict[str, Any]]:
        """Return the further faces of an image as JSON objects."""
        assert self.others_found is not None
        assert self.others_boxes is not None
        return [
            {
                "box": self.others_boxes[i, j].tolist(),
                "probabilities": {
                    k: v[i, j].tolist() for k, v in self.others_probabilities.items()
                },
            }
            for j in self.others_found[i].nonzero()[0]
        ]

    @classmethod
    def from_lines(
        cls, lines: Sequence[dict], attributes: Sequence[Attribute], features: Mapping
    ) -> "Records":
        """Read what `lines` wrote."""
        blank = {a.name: [0.0] * len(a.classes) for a in attributes}
        shown = [blank | (line["probabilities"] or {}) for line in lines]

        def column(name: str) -> np.ndarray | None:
            return np.array([line[name] for line in lines]) if name in lines[0] else None

        return cls(
            prompt=np.array([line["prompt"] for line in lines]),
            image=np.array([line["image"] for line in lines]),
            seed=column("seed"),
            file=column("file"),
            found=np.array([line["found"] for line in lines], bool),
            boxes=np.array([line["box"] or [0.0] * 4 for line in lines]),
            probabilities={a.name: np.array([p[a.name] for p in shown]) for a in attributes},
            scores={
                name: np.array([line["scores"][name] for line in lines], float)  # null -> NaN
                for name in lines[0]["scores"]
            },
            features=features,
            **(_other_faces(lines, attributes) if "others" in lines[0] else {}),
        )


def _other_faces(lines: Sequence[dict], attributes: Sequence[Attribute]) -> dict[str, Any]:
    """Read the further faces that `lines` wrote."""
    n, places = len(lines), max(len(line["others"]) for line in lines)
    of_faces = [a for a in attributes if a.of_faces]
    exists, boxes = np.zeros((n, places), bool), np.zeros((n, places, 4))
    probabilities = {a.name: np.zeros((n, places, len(a.classes))) for a in of_faces}
    for i, line in enumerate(lines):
        for j, face in enumerate(line["others"]):
            exists[i, j], boxes[i, j] = True, face["box"]
            for a in of_faces:
                probabilities[a.name][i, j] = face["probabilities"][a.name]
    return {
        "others_found": exists,
        "others_boxes": boxes,
        "others_probabilities": probabilities,
    }


def _concatenated(parts: Sequence[np.ndarray], name: str) -> np.ndarray:
    """Concatenate arrays; pad further faces to the largest number that any image has."""
    if name.startswith("others"):
        places = max(part.shape[1] for part in parts)
        padding = [[(0, 0), (0, places - p.shape[1])] + [(0, 0)] * (p.ndim - 2) for p in parts]
        parts = [np.pad(part, width) for part, width in zip(parts, padding, strict=True)]
    return np.concatenate(parts)


def _json_float(value: Any) -> float | None:
    """Round to six decimals; None for NaN."""
    return round(float(value), 6) if isfinite(value) else None
