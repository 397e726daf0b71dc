"""What was asked for, and what was seen in each image."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from itertools import combinations
from math import isfinite
from typing import Any

import numpy as np

from diffusers_fair import metrics
from diffusers_fair.attributes import Attribute, People

SAME_NOISE = ("prompts", "images_per_prompt", "steps", "guidance_scale", "seed")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What was asked for; reports with the same settings have the same noise, image by image."""

    prompts: tuple[str, ...]
    attributes: tuple[Attribute, ...]
    images_per_prompt: int
    """Of images from a folder, as many as the prompt has that has most."""
    steps: int | None = None
    """None, like the next two, for images that were not drawn here."""
    guidance_scale: float | None = None
    seed: int | None = None
    people: People = "largest"
    """Which faces of an image count."""

    def json(self) -> dict[str, Any]:
        """As files have them: what older ones lack only where it is not the usual."""
        found = asdict(self) | {"attributes": [a.json() for a in self.attributes]}
        return {k: v for k, v in found.items() if k != "people" or v != "largest"}

    def check_same_noise(self, other: "Settings") -> None:
        """Check that images of the two can be compared one by one.

        Raises:
            ValueError: they were drawn from other noise, or otherwise.
        """
        for name in SAME_NOISE:
            there, here = getattr(self, name), getattr(other, name)
            if there != here:
                shown = "" if name == "prompts" else f" ({there} there, {here} here)"
                raise ValueError(
                    f"the reference was made with other {name}{shown}: images can be compared only "
                    f"if {', '.join(SAME_NOISE)} are the same"
                )

    def measured(self) -> tuple[Attribute, ...]:
        """The attributes, and the joint of each combination of several."""
        return tuple(metrics.joint_attribute(group) for group in self.groups())

    def groups(self) -> list[tuple[Attribute, ...]]:
        """Each attribute alone, then every two of them, and so on."""
        sizes = range(1, len(self.attributes) + 1)
        return [group for size in sizes for group in combinations(self.attributes, size)]


@dataclass(frozen=True, kw_only=True, eq=False)
class Records:
    """What was seen in each of n images, prompt by prompt."""

    prompt: np.ndarray
    """Index of the prompt, (n,)."""
    image: np.ndarray
    """Index of the image among those of its prompt, (n,)."""
    seed: np.ndarray | None = None
    """Seed of the image's generator, (n,); None for images that were not drawn here."""
    file: np.ndarray | None = None
    """Where the image was read from, below the folder, (n,); None for images that were drawn."""
    found: np.ndarray
    """Whether there is a face, (n,) bool."""
    boxes: np.ndarray
    """Its corners x0, y0, x1, y1 in pixels, (n, 4); without meaning where not found."""
    probabilities: Mapping[str, np.ndarray]
    """Attribute -> probabilities (n, classes); of faces, without meaning where not found."""
    scores: Mapping[str, np.ndarray]
    """Score -> (n,); NaN where it does not apply."""
    features: Mapping[str, np.ndarray]
    """Encoder -> unit-length features (n, d), for comparison with another report."""
    others_found: np.ndarray | None = None
    """Where every face counts: whether there is one more, (n, k) bool; else None, as the next."""
    others_boxes: np.ndarray | None = None
    """Its corners in pixels, (n, k, 4); without meaning where not found."""
    others_probabilities: Mapping[str, np.ndarray] = field(default_factory=dict)
    """Attribute of faces -> its probabilities (n, k, classes); without meaning where not found."""

    @classmethod
    def concatenate(cls, parts: Sequence["Records"]) -> "Records":
        """One after the other."""
        flat = [part.arrays() for part in parts]
        return cls.from_arrays(
            {name: _concatenated([p[name] for p in flat], name) for name in flat[0]}
        )

    def rows(self, chosen: np.ndarray) -> "Records":
        """Those of some images: a mask (n,), or row numbers."""
        return self.from_arrays({name: values[chosen] for name, values in self.arrays().items()})

    @property
    def faces(self) -> np.ndarray:
        """(n,) number of faces that count in each image."""
        others = 0 if self.others_found is None else self.others_found.sum(1)
        return self.found.astype(int) + others

    def counted(self, attributes: Sequence[Attribute]) -> tuple[np.ndarray, list[np.ndarray]]:
        """What counts for attributes together: prompts (m,), and of each attribute classes (m,).

        These are all images or, if any of the attributes is of faces, those with a face; where
        every face counts, each face with its whole image.
        """
        rows = np.arange(len(self.found))
        if any(a.of_faces for a in attributes):
            rows = np.flatnonzero(self.found)
        seen = [self.probabilities[a.name][rows] for a in attributes]
        if any(a.of_faces for a in attributes) and self.others_found is not None:
            image, place = self.others_found.nonzero()
            rows = np.concatenate([rows, image])
            for i, a in enumerate(attributes):
                whole = self.probabilities[a.name][image]
                more = self.others_probabilities[a.name][image, place] if a.of_faces else whole
                seen[i] = np.concatenate([seen[i], more])
        return self.prompt[rows], [p.argmax(-1) for p in seen]

    def arrays(self) -> dict[str, np.ndarray]:
        """All of it, as in {"found": (n,), "scores/clip_t": (n,)}; what is None is left out."""
        found: dict[str, np.ndarray] = {}
        for name in (f.name for f in fields(self)):
            values = getattr(self, name)
            if isinstance(values, Mapping):
                found |= {f"{name}/{key}": value for key, value in values.items()}
            elif values is not None:
                found[name] = values
        return found

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> "Records":
        """The records that `arrays` gave."""
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
        """One JSON object per image, without the features.

        Args:
            attributes: what was looked at; of those that are missing, only faces count.
        """
        whole = {a.name for a in attributes if not a.of_faces}
        for i, found in enumerate(self.found.tolist()):
            shown = {k: v for k, v in self.probabilities.items() if found or k in whole}
            yield {
                "prompt": int(self.prompt[i]),
                "image": int(self.image[i]),
                **({} if self.seed is None else {"seed": int(self.seed[i])}),
                **({} if self.file is None else {"file": str(self.file[i])}),
                "found": found,
                "box": self.boxes[i].tolist() if found else None,
                "probabilities": {k: v[i].tolist() for k, v in shown.items()} or None,
                **({} if self.others_found is None else {"others": self._others(i)}),
                "scores": {k: number(v[i]) for k, v in self.scores.items()},
            }

    def _others(self, i: int) -> list[dict[str, Any]]:
        """The further faces of an image, as JSON has them."""
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
        """The records that `lines` wrote."""
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
    """The further faces that `lines` wrote."""
    n, most = len(lines), max(len(line["others"]) for line in lines)
    of_faces = [a for a in attributes if a.of_faces]
    found, boxes = np.zeros((n, most), bool), np.zeros((n, most, 4))
    probabilities = {a.name: np.zeros((n, most, len(a.classes))) for a in of_faces}
    for i, line in enumerate(lines):
        for j, face in enumerate(line["others"]):
            found[i, j], boxes[i, j] = True, face["box"]
            for a in of_faces:
                probabilities[a.name][i, j] = face["probabilities"][a.name]
    return {
        "others_found": found,
        "others_boxes": boxes,
        "others_probabilities": probabilities,
    }


def _concatenated(parts: Sequence[np.ndarray], name: str) -> np.ndarray:
    """One after the other; of further faces as many places as the image has that has most."""
    if name.startswith("others"):
        most = max(part.shape[1] for part in parts)
        room = [[(0, 0), (0, most - p.shape[1])] + [(0, 0)] * (p.ndim - 2) for p in parts]
        parts = [np.pad(part, gap) for part, gap in zip(parts, room, strict=True)]
    return np.concatenate(parts)


def number(value: Any) -> float | None:
    """For JSON: six decimals, None for NaN."""
    return round(float(value), 6) if isfinite(value) else None
