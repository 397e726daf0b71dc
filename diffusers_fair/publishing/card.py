"""Writes the model card of an adapter folder, README.md. Every number comes from a report.

A card depends only on `fair_adapter.json`, which holds the report's summary, and on the sample
sheets in `samples/`.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from diffusers_fair import atomic, strict_json
from diffusers_fair.adapters.folder import (
    README_FILE,
    REPORT_FILES,
    SAMPLES_FOLDER,
    Adapter,
    open_adapter,
    write_info,
)
from diffusers_fair.adapters.format import EMBEDS_FILE, AdapterInfo
from diffusers_fair.adapters.repository import REPOSITORY
from diffusers_fair.attributes import Attribute
from diffusers_fair.backends.registry import base as base_of
from diffusers_fair.config.backends import SHIPPED_BASES
from diffusers_fair.loading import MIRRORS
from diffusers_fair.paths import expand
from diffusers_fair.reports.estimate import DIGITS, GAP, Estimate, estimate_text
from diffusers_fair.reports.folder import FILE, FORMAT, GROUPS_SHEET, PAIRS
from diffusers_fair.reports.groups import GroupSummary, summaries_from_json
from diffusers_fair.reports.measures import attribute_measures, measures, shortfalls, warning
from diffusers_fair.reports.summary import SCORE_NAMES, BiasEstimate, Summary

TEMPLATE = Path(__file__).with_name("card.md.jinja")
_EXAMPLE = "a photo of the face of a teacher, a person"
_SHEETS = {  # sample sheets of a report folder -> their captions
    PAIRS: "The same noise, above without and below with the adapter",
    GROUPS_SHEET: "Control prompts: the same noise, above without and below with the adapter",
}
_SUMMARY = (  # the keys of a report's summary that fair_adapter.json keeps
    *("prompts", "images", "faces", "face_rate", "scores"),
    *("bias", "deviation", "corrected", "frequencies"),
)
_NOT_EVALUATED = {"prompts": 0, "images": 0, "faces": 0, "bias": {}, "scores": {}}
_CALL_OPTIONS = {"num_inference_steps": "steps", "guidance_scale": "guidance_scale"}
"""Argument of a pipeline's call -> setting of the evaluation."""
SETTINGS = ("images_per_prompt", "steps", "guidance_scale", "seed")
_LICENCES = {  # base model -> its licence, as the Hub names it; adapters have the same
    **dict.fromkeys(SHIPPED_BASES, "apache-2.0"),
    "CompVis/stable-diffusion-v1-4": "creativeml-openrail-m",
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "creativeml-openrail-m",
    "stabilityai/stable-diffusion-2": "openrail++",
    "stabilityai/stable-diffusion-2-base": "openrail++",
    "stabilityai/stable-diffusion-2-1": "openrail++",
    "stabilityai/stable-diffusion-2-1-base": "openrail++",
}


def write_card(folder: str | Path | Adapter, report: str | Path | None = None) -> Path:
    """Write the card of an adapter folder.

    Args:
        folder: adapter folder, or an open adapter.
        report: report folder. Its summary is stored in `fair_adapter.json`, and the report and its
            sample sheets are copied to the adapter folder. Default: the summary stored before.

    Returns:
        Path of the card, `README.md` in the folder.

    Raises:
        ValueError: the adapter or the report is missing, or the report has other attributes.
    """
    adapter = open_adapter(folder)
    folder, info = adapter.folder, adapter.info
    report = None if report is None else expand(report)
    if report is not None:
        info = replace(info, evaluation=_evaluation(report, info.attributes))
    text = _render(info, _images(folder, report))
    if report is not None:
        write_info(adapter, info)
        _copy(report, folder)
    atomic.write(folder / README_FILE, text.encode())
    return folder / README_FILE


def card_text(adapter: Adapter) -> str:
    """Return the card that `write_card` writes for an adapter without a new report."""
    return _render(adapter.info, _images(adapter.folder, None))


# ---- from the report -----------------------------------------------------------------------------


def _evaluation(report: Path, attributes: Sequence[Attribute]) -> dict[str, Any]:
    """Select the part of a report that `fair_adapter.json` keeps; `before` is the base model's.

    Raises:
        ValueError: the report cannot be read, or has other attributes.
    """
    if not (report / FILE).is_file():
        raise ValueError(f"there is no report in '{report}': expected a file {FILE}")
    try:
        root = strict_json.loads((report / FILE).read_text("utf-8"))
        if root["format"] != FORMAT:
            raise ValueError(f"its format version is {root['format']}, not {FORMAT}")
        evaluated = {a["name"]: a["classes"] for a in root["settings"]["attributes"]}
        evaluation = _kept(root)
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(
            f"the report in '{report}' is damaged or of another version: {error}"
        ) from error
    for attribute in attributes:
        if evaluated.get(attribute.name) != list(attribute.classes):
            raise ValueError(
                f"the adapter balances '{attribute.name}' with the classes "
                f"{list(attribute.classes)}, but the report evaluated {evaluated}: evaluate the "
                "adapter again"
            )
    return evaluation


def _kept(root: Mapping[str, Any]) -> dict[str, Any]:
    settings, origin = root["settings"], root["provenance"]
    reference = root.get("reference")
    groups = {"before": _groups(reference or {}), "after": _groups(root)}
    return {
        "date": origin["date"],
        "commit": origin.get("commit"),
        "example": settings["prompts"][0],
        **{name: settings[name] for name in SETTINGS},
        "confusion": root.get("confusion"),
        "before": reference and _summary(reference["summary"]),
        "after": _summary(root["summary"]),
        **({"groups": groups} if groups["after"] else {}),  # older reports have none
    }


def _groups(root: Mapping[str, Any]) -> dict[str, Any]:
    """Map groups of control prompts to their summaries."""
    return {name: asdict(summary) for name, summary in summaries_from_json(root).items()}


def _summary(summary: Mapping[str, Any]) -> dict[str, Any]:
    return {name: summary[name] for name in _SUMMARY if name in summary}


def _images(folder: Path, report: Path | None) -> list[str]:
    """List the file names of the images that the card shows."""
    names = {path.name for path in (folder / SAMPLES_FOLDER).glob("*.png")}
    if report is not None:
        names |= {name for name in _SHEETS if (report / name).is_file()}
    return sorted(names, key=lambda name: (name != PAIRS, name))


def _copy(report: Path, folder: Path) -> None:
    """Copy a report's files to the adapter folder, and its sheets to the samples."""
    for name in REPORT_FILES:
        if (report / name).is_file():
            atomic.write(folder / name, (report / name).read_bytes())
    for name in _SHEETS:
        if (report / name).is_file():
            (folder / SAMPLES_FOLDER).mkdir(exist_ok=True)
            atomic.write(folder / SAMPLES_FOLDER / name, (report / name).read_bytes())


# ---- the card ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Evaluation:
    """The evaluation in `fair_adapter.json`."""

    root: Mapping[str, Any]
    """Settings and provenance, as stored."""
    before: Summary
    """Summary of the base model; empty if it was not evaluated."""
    after: Summary
    groups_before: Mapping[str, GroupSummary]
    groups_after: Mapping[str, GroupSummary]

    @property
    def sides(self) -> tuple[Summary, Summary]:
        """The summaries without and with the adapter."""
        return self.before, self.after

    @classmethod
    def of(cls, info: AdapterInfo) -> "_Evaluation | None":
        root = info.evaluation
        if root is None:
            return None
        groups = root.get("groups") or {}
        before, after = (
            {name: GroupSummary.from_json(part) for name, part in groups.get(side, {}).items()}
            for side in ("before", "after")
        )
        return cls(
            root=root,
            before=Summary.from_json(root.get("before") or _NOT_EVALUATED),
            after=Summary.from_json(root["after"]),
            groups_before=before,
            groups_after=after,
        )


def _render(info: AdapterInfo, images: Sequence[str]) -> str:
    """Render the text of the card."""
    import jinja2

    names = _joined([_plain(attribute.name) for attribute in info.attributes])
    base = info.base_model.rpartition("/")[2]
    environment = jinja2.Environment(
        trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters |= {"plain": _plain, "code": strict_json.dumps}
    template = environment.from_string(TEMPLATE.read_text("utf-8"))
    try:
        evaluation = _Evaluation.of(info)
        body = template.render(
            info=info,
            names=names,
            base=base,
            on_hub=_on_hub(info.base_model),
            on_testbed=info.base_model in SHIPPED_BASES,
            code=base_of(info.base_model).code,
            licence=_licence(info.base_model),
            embeds=EMBEDS_FILE,
            shares=list(_shares(info, evaluation)),
            example=(info.evaluation or {}).get("example", _EXAMPLE),
            sampling=_sampling(info),
            images=images,
            sheets=_SHEETS,
            recipe=yaml.safe_dump(info.recipe, sort_keys=False, allow_unicode=True),
            **_measured(info, evaluation),
        )
        metadata = _metadata(info, evaluation).to_yaml()
    except (LookupError, TypeError, AttributeError, jinja2.TemplateError) as error:
        raise ValueError(
            f"the evaluation stored in the adapter cannot be shown ({error}): write the card again "
            "with --report"
        ) from error
    return str(ModelCard(f"---\n{metadata}\n---\n\n{body}"))


def _metadata(info: AdapterInfo, evaluation: _Evaluation | None) -> ModelCardData:
    """Build the metadata for the Hub, which accepts only Hub ids as base models."""
    base: dict[str, Any] = {}
    if _on_hub(info.base_model):
        base = {"base_model": info.base_model, "base_model_relation": "adapter"}
    kinds = ["lora"] * bool(info.lora) + ["textual-inversion"] * bool(info.soft_tokens)
    return ModelCardData(
        license=_licence(info.base_model),
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=["diffusers-fair", "fairness", "bias-mitigation", "stable-diffusion", *kinds],
        model_name=f"fairness adapter for {info.base_model.rpartition('/')[2]}",
        eval_results=list(_results(evaluation)) or None,
        **base,
    )


def _results(evaluation: _Evaluation | None) -> Iterator[EvalResult]:
    """Yield the adapter's metrics for the Hub."""
    if evaluation is None:
        return
    after = evaluation.after
    metrics: dict[str, Estimate | None] = {f"bias, {k}": bias for k, bias in after.bias.items()}
    metrics |= {SCORE_NAMES.get(name, name): score for name, score in after.scores.items()}
    for name, estimate in metrics.items():
        if estimate is not None:
            yield EvalResult(
                task_type="text-to-image",
                dataset_type="prompts",
                dataset_name=f"{after.prompts} prompts, {after.images} images",
                metric_type=name.partition(",")[0].lower(),
                metric_name=name,
                metric_value=round(estimate.mean, 4),
            )


def _on_hub(base: str) -> bool:
    return REPOSITORY.fullmatch(base) is not None


def _licence(base: str) -> str | None:
    return _LICENCES.get(MIRRORS.get(base, base))


# ---- its tables ----------------------------------------------------------------------------------


def _measured(info: AdapterInfo, evaluation: _Evaluation | None) -> dict[str, Any]:
    """Collect the template's values that come from an evaluation."""
    if evaluation is None:
        return {"evaluation": None}
    balanced = {attribute.name for attribute in info.attributes}
    targeted = {name: set(name.split(" x ")) <= balanced for name in evaluation.after.bias}
    short = shortfalls(evaluation.groups_before, evaluation.groups_after)
    return {
        "evaluation": evaluation,
        "biases": [row for name in targeted if targeted[name] for row in _biases(evaluation, name)],
        "other_biases": [
            row
            for name in targeted
            if not targeted[name]
            for row in _biases(evaluation, name, details=False)
        ],
        "uneven": any(side.deviation for side in evaluation.sides),
        "scores": list(_scores(evaluation)),
        "control": list(_control(evaluation)),
        "warning": _plain(warning(short, "The adapter")),
        "accuracies": dict(_accuracies(evaluation)),
    }


def _shares(info: AdapterInfo, evaluation: _Evaluation | None) -> Iterator[list[str]]:
    """Yield rows: attribute, class, target and, if measured, the frequencies before and after."""
    for attribute in info.attributes:
        for name, target in zip(attribute.classes, attribute.target, strict=True):
            measured = [
                estimate_text(_frequency(side, attribute.name, name))
                for side in (evaluation.sides if evaluation else ())
            ]
            yield [_plain(attribute.name), _plain(name), f"{target:.{DIGITS}f}", *measured]


def _frequency(summary: Summary, attribute: str, name: str) -> Estimate | None:
    frequencies = summary.frequencies.get(attribute)
    return frequencies.get(name) if frequencies else None


def _biases(evaluation: _Evaluation, name: str, *, details: bool = True) -> Iterator[list[str]]:
    """Yield rows on the bias of an attribute: metric, before, after, noise floor."""
    sides = evaluation.sides
    corrected = [side.corrected.get(name) for side in sides]
    bias = [side.bias.get(name) for side in sides]
    yield from _bias(f"bias, {_plain(name)}", bias, details)
    if details and corrected[1] is not None:
        yield ["— classifier errors corrected", *map(estimate_text, corrected), GAP]
    deviation = [side.deviation.get(name) for side in sides]
    yield from _bias(f"deviation from target, {_plain(name)}", deviation, details)


def _bias(head: str, biases: Sequence[BiasEstimate | None], details: bool) -> Iterator[list[str]]:
    if biases[1] is None:
        return
    yield [head, *map(estimate_text, biases), f"{biases[1].noise_floor:.{DIGITS}f}"]
    if details:
        without = [bias and bias.without_sampling_variance for bias in biases]
        yield ["— without sampling variance", *map(estimate_text, without), "0"]


def _scores(evaluation: _Evaluation) -> Iterator[list[str]]:
    """Yield rows on faces and quality: metric, before, after."""
    rates = [side.face_rate for side in evaluation.sides]
    yield ["images with a face", *map(estimate_text, rates)]
    for name in evaluation.after.scores:
        scores = [side.scores.get(name) for side in evaluation.sides]
        yield [_plain(SCORE_NAMES.get(name, name)), *map(estimate_text, scores)]


def _control(evaluation: _Evaluation) -> Iterator[list[str]]:
    """Yield rows on the control prompts: metric, before, after."""
    before, after = evaluation.groups_before, evaluation.groups_after
    for measure in [*measures([after]), *attribute_measures(after)]:
        cells = [estimate_text(measure.estimate(side)) for side in (before, after)]
        if measure.base is not None:
            cells[0] = f"{measure.base:.0f}"
        yield [_plain(measure.name), *cells]


def _sampling(info: AdapterInfo) -> str:
    """Format the sampling arguments of the evaluation for a pipeline call."""
    options = dict(base_of(info.base_model).call_options)
    if (root := info.evaluation) is not None:
        options |= {name: root[key] for name, key in _CALL_OPTIONS.items()}
    return "".join(f", {name}={value}" for name, value in options.items())


def _accuracies(evaluation: _Evaluation) -> Iterator[tuple[str, str]]:
    """Yield the attributes and the accuracy of their classifiers, averaged over classes."""
    for name, rows in (evaluation.root.get("confusion") or {}).items():
        shares = [row[i] / sum(row) for i, row in enumerate(rows)]
        yield _plain(name), f"{sum(shares) / len(shares):.1%}"


def _joined(names: Sequence[str]) -> str:
    """Join names in prose: `a`, `a and b`, `a, b and c`."""
    *first, last = names
    return f"{', '.join(first)} and {last}" if first else last


def _plain(text: str) -> str:
    """Escape text for one line of Markdown."""
    return re.sub(r"([\\`*_{}\[\]<>|#&~])", r"\\\1", " ".join(text.split()))
