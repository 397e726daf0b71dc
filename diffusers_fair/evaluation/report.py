"""What was measured: per-image records, the figures that follow from them, folder, table, pictures.

Figures are functions of the records (`prompt_figures`, `summary_figures`); a report that was loaded
gives the same ones without generating anything again.
"""

import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from diffusers_fair.attributes import Attribute
from diffusers_fair.evaluation import metrics

if TYPE_CHECKING:
    from PIL.Image import Image
    from rich.table import Table

FORMAT = 1
FILE, RECORDS, FEATURES = "report.json", "records.jsonl", "features.npz"
SAMPLE_PROMPTS, SAMPLE_IMAGES = 6, 8  # pictures that are kept to look at
SCORE_NAMES = {"clip_t": "CLIP-T", "clip_i": "CLIP-I", "dino": "DINO"}
GAP = "-"  # in the table, where there is no figure
PAIR_HEIGHT = 96  # least height in pixels of an image in pairs.png
CAPTION, CAPTION_WIDTH = 18, 480  # height and least width of a line of text, pixels


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What was asked for; reports with the same settings have the same noise, image by image."""

    prompts: tuple[str, ...]
    attributes: tuple[Attribute, ...]
    images_per_prompt: int
    steps: int
    guidance_scale: float
    seed: int

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
    seed: np.ndarray
    """Seed of the image's generator, (n,)."""
    found: np.ndarray
    """Whether there is a face, (n,) bool."""
    boxes: np.ndarray
    """Its corners x0, y0, x1, y1 in pixels, (n, 4); without meaning where not found."""
    probabilities: Mapping[str, np.ndarray]
    """Attribute -> probabilities (n, classes); without meaning where not found."""
    scores: Mapping[str, np.ndarray]
    """Score -> (n,); NaN where it does not apply."""
    features: Mapping[str, np.ndarray]
    """Encoder -> unit-length features (n, d), for comparison with another report."""

    @classmethod
    def concatenate(cls, parts: Sequence["Records"]) -> "Records":
        """One after the other."""

        def joined(name: str) -> Any:
            values = [getattr(part, name) for part in parts]
            if not isinstance(values[0], Mapping):
                return np.concatenate(values)
            return {key: np.concatenate([value[key] for value in values]) for key in values[0]}

        return cls(**{name: joined(name) for name in cls.__dataclass_fields__})

    def rows(self, chosen: np.ndarray) -> "Records":
        """Those of some images: a mask (n,), or row numbers."""

        def part(values: Any) -> Any:
            if not isinstance(values, Mapping):
                return values[chosen]
            return {key: value[chosen] for key, value in values.items()}

        return type(self)(**{name: part(getattr(self, name)) for name in self.__dataclass_fields__})

    def lines(self) -> Iterator[dict[str, Any]]:
        """One JSON object per image, without the features."""
        for i, found in enumerate(self.found.tolist()):
            yield {
                "prompt": int(self.prompt[i]),
                "image": int(self.image[i]),
                "seed": int(self.seed[i]),
                "found": found,
                "box": self.boxes[i].tolist() if found else None,
                "probabilities": {k: v[i].tolist() for k, v in self.probabilities.items()}
                if found
                else None,
                "scores": {k: _number(v[i]) for k, v in self.scores.items()},
            }

    @classmethod
    def from_lines(
        cls, lines: Sequence[dict], attributes: Sequence[Attribute], features: Mapping
    ) -> "Records":
        """The records that `lines` wrote."""
        blank = {a.name: [0.0] * len(a.classes) for a in attributes}
        shown = [line["probabilities"] or blank for line in lines]
        return cls(
            prompt=np.array([line["prompt"] for line in lines]),
            image=np.array([line["image"] for line in lines]),
            seed=np.array([line["seed"] for line in lines]),
            found=np.array([line["found"] for line in lines], bool),
            boxes=np.array([line["box"] or [0.0] * 4 for line in lines]),
            probabilities={a.name: np.array([p[a.name] for p in shown]) for a in attributes},
            scores={
                name: np.array([line["scores"][name] for line in lines], float)  # null -> NaN
                for name in lines[0]["scores"]
            },
            features=features,
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Report:
    """An evaluation: what was asked for, what was seen, and the figures that follow."""

    label: str
    """What was evaluated, as a column head."""
    settings: Settings
    records: Records
    samples: Mapping[int, np.ndarray] = field(repr=False)
    """Prompt -> its first images, (m, h, w, 3) uint8; of a few prompts."""
    provenance: Mapping[str, Any] = field(repr=False)
    """Command, versions, machine, time."""
    reference: "Report | None" = field(default=None, repr=False)
    """The base model's report that CLIP-I and DINO compare with; not saved."""

    @cached_property
    def summary(self) -> dict[str, Any]:
        """`summary_figures` of the records."""
        return summary_figures(self.settings, self.records)

    @cached_property
    def prompts(self) -> list[dict[str, Any]]:
        """`prompt_figures` of the records."""
        return prompt_figures(self.settings, self.records)

    def of(self, attributes: Sequence[Attribute], images_per_prompt: int | None = None) -> "Report":
        """The same images, counted by other attributes or against other targets.

        Args:
            attributes: of those that were looked at.
            images_per_prompt: how many of the images, the first; left out, all.

        Raises:
            ValueError: an attribute that was not looked at, or that has other classes; more images
                than there are.
        """
        looked = {a.name: a.classes for a in self.settings.attributes}
        for attribute in attributes:
            if looked.get(attribute.name) != attribute.classes:
                raise ValueError(
                    f"the report looked at {looked}, not at '{attribute.name}' with classes "
                    f"{attribute.classes}: evaluate again with that attribute"
                )
        there = self.settings.images_per_prompt
        count = there if images_per_prompt is None else images_per_prompt
        if count > there:
            raise ValueError(f"the report has {there} images of each prompt, not {count}")
        settings = replace(self.settings, attributes=tuple(attributes), images_per_prompt=count)
        return replace(
            self, settings=settings, records=self.records.rows(self.records.image < count)
        )

    def save(self, folder: str | Path) -> None:
        """Write report.json, records.jsonl, features.npz and pictures; all of it or nothing.

        Args:
            folder: made if need be; may hold other things, but no report.

        Raises:
            ValueError: the folder holds a report, or is a file.
        """
        folder = require_free(folder)
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".report-") as partial:
            self._write(Path(partial))
            folder.mkdir(exist_ok=True)
            for file in sorted(Path(partial).iterdir(), key=lambda f: f.name == FILE):
                os.replace(file, folder / file.name)  # report.json last: it marks a whole report

    def _write(self, folder: Path) -> None:
        from PIL import Image

        (folder / FILE).write_text(json.dumps(self._json(), indent=1, ensure_ascii=False), "utf-8")
        lines = (json.dumps(line) + "\n" for line in self.records.lines())
        (folder / RECORDS).write_text("".join(lines), "utf-8")
        np.savez(folder / FEATURES, **self.records.features)  # type: ignore[arg-type]
        for i, images in self.samples.items():
            Image.fromarray(np.concatenate(list(images), axis=1)).save(folder / _strip_name(i))
        if self.reference is not None:
            pairs_picture(self.reference, self).save(folder / "pairs.png")

    def _json(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "label": self.label,
            "settings": asdict(self.settings),
            "summary": self.summary,
            "prompts": self.prompts,
            "samples": {str(i): len(images) for i, images in self.samples.items()},
            "provenance": self.provenance,
        }

    @classmethod
    def load(cls, folder: str | Path) -> "Report":
        """Read a folder that `save` wrote.

        Raises:
            ValueError: no report there, one of another format version, or an incomplete one.
        """
        folder = Path(folder)
        if not (folder / FILE).is_file():
            raise ValueError(f"there is no report in '{folder}': expected a file {FILE}")
        try:
            root = json.loads((folder / FILE).read_text("utf-8"))
            if root["format"] == FORMAT:
                return cls._from_folder(folder, root)
        except Exception as error:  # whatever a damaged file may cause
            raise ValueError(
                f"the report in '{folder}' is damaged or incomplete ({type(error).__name__}: "
                f"{error}): evaluate again"
            ) from error
        raise ValueError(
            f"the report in '{folder}' has format version {root['format']}, this version of "
            f"diffusers-fair reads {FORMAT}: update it, or evaluate again"
        )

    @classmethod
    def _from_folder(cls, folder: Path, root: dict[str, Any]) -> "Report":
        from PIL import Image

        asked = root["settings"]
        attributes = tuple(Attribute(**attribute) for attribute in asked.pop("attributes"))
        prompts = tuple(asked.pop("prompts"))
        settings = Settings(prompts=prompts, attributes=attributes, **asked)
        lines = [json.loads(x) for x in (folder / RECORDS).read_text("utf-8").splitlines()]
        expected = len(prompts) * settings.images_per_prompt
        if len(lines) != expected:
            raise ValueError(f"expected {expected} records, got {len(lines)}")
        with np.load(folder / FEATURES, allow_pickle=False) as stored:
            features = dict(stored)
        samples = {
            int(i): np.stack(np.split(np.array(Image.open(folder / _strip_name(int(i)))), n, 1))
            for i, n in root["samples"].items()
        }
        return cls(
            label=root["label"],
            settings=settings,
            records=Records.from_lines(lines, attributes, features),
            samples=samples,
            provenance=root["provenance"],
        )


def require_free(folder: str | Path) -> Path:
    """Return the folder if a report can be saved there; to be asked before hours are spent.

    Raises:
        ValueError: the folder holds a report, or is a file.
    """
    folder = Path(folder)
    if (folder / FILE).exists():
        raise ValueError(f"'{folder}' holds a report already: choose another folder")
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"'{folder}' is a file: expected a folder to write the report to")
    return folder


def counts_by_prompt(settings: Settings, records: Records) -> dict[str, np.ndarray]:
    """Attribute (and joint) -> how often each class was perceived, (prompts, classes)."""
    found, attributes = records.found, settings.attributes
    seen = {a.name: records.probabilities[a.name][found].argmax(-1) for a in attributes}
    counts = {}
    for group, measured in zip(settings.groups(), settings.measured(), strict=True):
        labels = metrics.joint_labels(
            [seen[a.name] for a in group], [len(a.classes) for a in group]
        )  # (faces,)
        counts[measured.name] = metrics.class_counts(
            labels, records.prompt[found], len(settings.prompts), len(measured.classes)
        )
    return counts


def prompt_figures(settings: Settings, records: Records) -> list[dict[str, Any]]:
    """Per prompt: images, faces, frequencies, bias and floor per attribute, mean scores.

    A figure that cannot be had, such as the bias of a prompt without faces, is None.
    """
    counts = counts_by_prompt(settings, records)
    figures = []
    for i, prompt in enumerate(settings.prompts):
        mine = records.prompt == i
        figures.append(
            {
                "prompt": prompt,
                "images": int(mine.sum()),
                "faces": int(records.found[mine].sum()),
                "attributes": {
                    a.name: _prompt_bias(a, counts[a.name][i]) for a in settings.measured()
                },
                "scores": {k: _mean_of_finite(v[mine]) for k, v in records.scores.items()},
            }
        )
    return figures


def summary_figures(settings: Settings, records: Records) -> dict[str, Any]:
    """Over prompts: face rate, bias per attribute and joint, scores; each with its interval.

    Means are over the prompts that have the figure, whose number is given; a figure that no prompt
    has is None. "deviation" is from the target, given where that is not uniform.
    """
    counts = counts_by_prompt(settings, records)
    prompts = len(settings.prompts)
    biases, deviations = {}, {}
    for a in settings.measured():
        biases[a.name] = _bias_over_prompts(counts[a.name], a.target, None)
        if _uneven(a):
            deviations[a.name] = _bias_over_prompts(counts[a.name], a.target, a.target)
    rows = [records.prompt == i for i in range(prompts)]
    per_prompt = {
        name: [_mean_of_finite(values[mine]) for mine in rows]
        for name, values in {"face_rate": records.found, **records.scores}.items()
    }
    spreads = {name: _spread([v for v in vs if v is not None]) for name, vs in per_prompt.items()}
    return {
        "prompts": prompts,
        "images": len(records.found),
        "faces": int(records.found.sum()),
        "prompts_without_faces": [
            p
            for i, p in enumerate(settings.prompts)
            if not records.found[records.prompt == i].any()
        ],
        "face_rate": spreads.pop("face_rate"),
        "bias": biases,
        "deviation": deviations,
        "frequencies": {a.name: _class_spreads(a, counts[a.name]) for a in settings.measured()},
        "scores": spreads,
    }


def _prompt_bias(attribute: Attribute, counts: np.ndarray) -> dict[str, Any] | None:
    """Frequencies, bias and floor of one prompt, counts (classes,); None without a face."""
    n = int(counts.sum())
    if n == 0:
        return None
    shares, target = metrics.frequencies(counts), attribute.target
    return {
        "frequencies": dict(zip(attribute.classes, map(_number, shares), strict=True)),
        "bias": _number(metrics.bias(shares)),
        "floor": _number(metrics.floor(n, target)),
        **({"deviation": _number(metrics.deviation(shares, target))} if _uneven(attribute) else {}),
    }


def _bias_over_prompts(counts: np.ndarray, target, centre) -> dict[str, Any] | None:
    """Bias (or deviation from a centre) over prompts, from counts (P, K); None without a face."""
    seen = counts[counts.sum(-1) > 0]
    spread = _spread(metrics.deviation(metrics.frequencies(seen), centre))
    if spread is None:
        return None
    images, prompts = np.unique(seen.sum(-1), return_counts=True)
    floors = [metrics.floor(int(n), target, centre) for n in images]
    moments = metrics.scatter_moments(seen, centre)
    without = None
    if len(moments):
        interval = metrics.bootstrap_interval(moments, metrics.without_scatter)
        without = {"mean": _number(metrics.without_scatter(moments)), "interval": _pair(interval)}
    return {
        **spread,
        "floor": _number(np.average(floors, weights=prompts)),
        "faces_per_prompt": _number(seen.sum(-1).mean()),
        "without_scatter": without,
    }


def _uneven(attribute: Attribute) -> bool:
    """Whether the target is not uniform, so that the deviation from it is not the bias."""
    return max(attribute.target) - min(attribute.target) > 1e-9


def _class_spreads(attribute: Attribute, counts: np.ndarray) -> dict[str, Any] | None:
    """Class -> mean and std of its frequency over prompts with faces; None without any."""
    seen = counts[counts.sum(-1) > 0]
    if not len(seen):
        return None
    shares = metrics.frequencies(seen)
    return {
        name: {"mean": _number(column.mean()), "std": _number(column.std())}
        for name, column in zip(attribute.classes, shares.T, strict=True)
    }


def _spread(values: Sequence[float] | np.ndarray) -> dict[str, Any] | None:
    """Mean, std (of these prompts, not an estimate for others), interval and number of values."""
    values = np.asarray(values, float)
    if not len(values):
        return None
    return {
        "mean": _number(values.mean()),
        "std": _number(values.std()),
        "interval": _pair(metrics.bootstrap_interval(values)),
        "prompts": len(values),
    }


def _mean_of_finite(values: np.ndarray) -> float | None:
    values = values[np.isfinite(values)]
    return _number(values.mean()) if len(values) else None


def _number(value: Any) -> float | None:
    """For JSON: six decimals, None for NaN."""
    return round(float(value), 6) if np.isfinite(value) else None


def _pair(interval: tuple[float, float] | None) -> list[float | None] | None:
    return None if interval is None else [_number(end) for end in interval]


def _strip_name(prompt: int) -> str:
    return f"samples-{prompt:03d}.png"


def sampled(prompts: int) -> list[int]:
    """The few prompts whose pictures are kept: evenly spread, the same for every report."""
    chosen = np.linspace(0, prompts - 1, min(prompts, SAMPLE_PROMPTS))
    return [int(i) for i in chosen.round()]


def pairs_picture(base: Report, adapter: Report) -> "Image":
    """Same noise, base above and adapter below, for the prompts that both kept pictures of.

    Args:
        base: report of the base model.
        adapter: report with the same settings.
    """
    from PIL import Image, ImageDraw

    blocks = []
    for i in sorted(base.samples.keys() & adapter.samples.keys()):
        rows = [np.concatenate(list(r.samples[i]), axis=1) for r in (base, adapter)]
        block = np.concatenate(rows)
        zoom = max(1, -(-PAIR_HEIGHT * 2 // block.shape[0]))
        blocks.append((i, block.repeat(zoom, 0).repeat(zoom, 1)))
    width = max(CAPTION_WIDTH, *(block.shape[1] for _, block in blocks))
    height = CAPTION + sum(CAPTION + len(block) for _, block in blocks)
    picture = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(picture)
    draw.text((4, 3), f"same noise; above: {base.label}; below: {adapter.label}", fill="black")
    top = CAPTION
    for i, block in blocks:
        draw.text((4, top + 3), base.settings.prompts[i], fill="black")
        picture.paste(Image.fromarray(block), (0, top + CAPTION))
        top += CAPTION + len(block)
    return picture


def table(before: Report, after: Report | None = None) -> "Table":
    """The headline of one report, or of two side by side; at most 100 columns wide.

    Args:
        before: usually the base model's.
        after: usually with the adapter.

    Returns:
        A rich table, for `rich.print` or a console.
    """
    try:
        from rich.table import Table
    except ModuleNotFoundError:
        raise ModuleNotFoundError("tables need rich: pip install 'diffusers-fair[train]'") from None
    reports = [before] if after is None else [before, after]
    asked = reports[-1].settings
    grid = Table(
        title=f"{len(asked.prompts)} prompts x {asked.images_per_prompt} images",
        caption="mean ± std over prompts [95 % bootstrap interval of the mean, over prompts]\n"
        "floor: what a generator exactly on target would score with as many images",
        title_justify="left",
        caption_justify="left",
    )
    grid.add_column("")
    for report in reports:
        grid.add_column(report.label, min_width=31)  # of "-0.123 ± 0.123 [-0.123, 0.123]"
    for row in _rows([report.summary for report in reports]):
        grid.add_row(*row)
    return grid


def _rows(summaries: Sequence[dict[str, Any]]) -> Iterator[list[str]]:
    """Head of a row and what it shows of each summary."""
    for kind, head in (("bias", "bias"), ("deviation", "off target")):
        for name in _names(summaries, kind):
            figures = [s[kind].get(name) for s in summaries]
            yield [f"{head}, {name}", *map(_cell, figures)]
            yield ["  floor", *(GAP if f is None else f"{f['floor']:.3f}" for f in figures)]
            yield ["  scatter removed", *(_cell(f and f["without_scatter"]) for f in figures)]
    yield ["images with a face", *(_cell(s["face_rate"]) for s in summaries)]
    for name in _names(summaries[::-1], "scores"):
        yield [SCORE_NAMES.get(name, name), *(_cell(s["scores"].get(name)) for s in summaries)]
    if any(s["prompts_without_faces"] for s in summaries):
        yield [
            "prompts without any face",
            *(str(len(s["prompts_without_faces"])) for s in summaries),
        ]


def _names(summaries: Sequence[dict[str, Any]], kind: str) -> list[str]:
    """What any of the summaries has a figure of, in order."""
    return list(dict.fromkeys(name for summary in summaries for name in summary[kind]))


def _cell(figure: Mapping[str, Any] | None) -> str:
    """As `0.671 ± 0.281 [0.592, 0.744]`; a dash for a gap."""
    if figure is None:
        return GAP
    spread = f" ± {figure['std']:.3f}" if "std" in figure else ""
    low_high = figure["interval"]
    interval = f" [{low_high[0]:.3f}, {low_high[1]:.3f}]" if low_high else ""
    return f"{figure['mean']:.3f}{spread}{interval}"
