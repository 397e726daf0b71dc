"""The card of an adapter folder, its README.md: figures come from a report, none is typed.

A card is a function of `fair_adapter.json` and of the pictures in `samples/`: the report's summary
goes into the one, its picture of pairs into the other.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from diffusers_fair import atomic, testbed
from diffusers_fair.adapters.folder import (
    README_FILE,
    REPORT_FILES,
    SAMPLES_FOLDER,
    Adapter,
    open_adapter,
    write_info,
)
from diffusers_fair.adapters.format import EMBEDS_FILE, AdapterInfo
from diffusers_fair.attributes import Attribute
from diffusers_fair.loading import MIRRORS, REPOSITORY
from diffusers_fair.reports.groups import GroupSummary, summaries_from_json
from diffusers_fair.reports.obedience import by_attribute, measures, shortfalls, warning
from diffusers_fair.reports.report import FILE, FORMAT, GAP, GROUPS_SHEET, PAIRS, SCORE_NAMES

TEMPLATE = Path(__file__).with_name("card.md.jinja")
EXAMPLE = "a photo of the face of a teacher, a person"
SHEETS = {  # pictures of a report folder -> what they show
    PAIRS: "The same noise, above without and below with the adapter",
    GROUPS_SHEET: "Prompts that leave nothing to change: the same noise, above without and below "
    "with the adapter",
}
SUMMARY = (  # what is kept of a report's summary
    *("prompts", "images", "faces", "face_rate", "scores"),
    *("bias", "deviation", "corrected", "frequencies"),
)
SETTINGS = ("images_per_prompt", "steps", "guidance_scale", "seed")
LICENCES = {  # base model -> its licence, as the Hub calls it; it holds for adapters too
    testbed.NAME: "apache-2.0",
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
        folder: the adapter's, or the open adapter.
        report: folder of its report; the summary is noted in `fair_adapter.json`, and report and
            pictures are copied beside it. Left out: what was noted there before, if anything.

    Returns:
        The card, `README.md` in the folder.

    Raises:
        ValueError: no adapter, no report, a report of something else than the adapter balances.
    """
    adapter = open_adapter(folder)
    folder, info = adapter.folder, adapter.info
    if report is not None:
        info = replace(info, evaluation=_evaluation(Path(report), info.attributes))
    text = _render(info, _pictures(folder, report))
    if report is not None:
        write_info(adapter, info)
        _copy(Path(report), folder)
    atomic.write(folder / README_FILE, text.encode())
    return folder / README_FILE


# ---- from the report -----------------------------------------------------------------------------


def _evaluation(report: Path, attributes: Sequence[Attribute]) -> dict[str, Any]:
    """What `fair_adapter.json` keeps of a report; `before` is the base model's, of the same noise.

    Raises:
        ValueError: no report that can be read, or one that looked at other attributes.
    """
    if not (report / FILE).is_file():
        raise ValueError(f"there is no report in '{report}': expected a file {FILE}")
    try:
        root = json.loads((report / FILE).read_text("utf-8"))
        if root["format"] != FORMAT:
            raise ValueError(f"its format version is {root['format']}, not {FORMAT}")
        looked = {a["name"]: a["classes"] for a in root["settings"]["attributes"]}
        evaluation = _kept(root)
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(
            f"the report in '{report}' is damaged or of another version: {error}"
        ) from error
    for attribute in attributes:
        if looked.get(attribute.name) != list(attribute.classes):
            raise ValueError(
                f"the adapter balances '{attribute.name}' with the classes "
                f"{list(attribute.classes)}, and the report looked at {looked}: evaluate it again"
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
    """Group -> summary of its prompts, which leave nothing to change."""
    return {name: asdict(summary) for name, summary in summaries_from_json(root).items()}


def _summary(summary: Mapping[str, Any]) -> dict[str, Any]:
    return {name: summary[name] for name in SUMMARY if name in summary}


def _pictures(folder: Path, report: str | Path | None) -> list[str]:
    """Names of the pictures that the card shows."""
    names = {path.name for path in (folder / SAMPLES_FOLDER).glob("*.png")}
    if report is not None:
        names |= {name for name in SHEETS if (Path(report) / name).is_file()}
    return sorted(names, key=lambda name: (name != PAIRS, name))


def _copy(report: Path, folder: Path) -> None:
    """Put a report's files beside the adapter, and its sheets among the samples."""
    for name in REPORT_FILES:
        if (report / name).is_file():
            atomic.write(folder / name, (report / name).read_bytes())
    for name in SHEETS:
        if (report / name).is_file():
            (folder / SAMPLES_FOLDER).mkdir(exist_ok=True)
            atomic.write(folder / SAMPLES_FOLDER / name, (report / name).read_bytes())


# ---- the card ------------------------------------------------------------------------------------


def _render(info: AdapterInfo, pictures: Sequence[str]) -> str:
    """The text of the card."""
    import jinja2

    names = _joined([_plain(attribute.name) for attribute in info.attributes])
    base = info.base_model.rpartition("/")[2]
    environment = jinja2.Environment(
        trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters |= {"plain": _plain, "code": json.dumps}
    template = environment.from_string(TEMPLATE.read_text("utf-8"))
    try:
        body = template.render(
            info=info,
            names=names,
            base=base,
            on_hub=_on_hub(info.base_model),
            on_testbed=info.base_model == testbed.NAME,
            licence=_licence(info.base_model),
            embeds=EMBEDS_FILE,
            evaluation=info.evaluation,
            example=(info.evaluation or {}).get("example", EXAMPLE),
            sampling=_sampling(info),
            shares=list(_shares(info)),
            biases=list(_biases(info)),
            uneven=any(side.get("deviation") for side in _sides(info)),
            scores=list(_scores(info)),
            kept=list(_kept_rows(info)),
            warning=_plain(warning(shortfalls(*_kept_sides(info)), "The adapter")),
            right=dict(_right(info)),
            pictures=pictures,
            sheets=SHEETS,
            recipe=yaml.safe_dump(info.recipe, sort_keys=False, allow_unicode=True),
        )
        metadata = _metadata(info).to_yaml()
    except (LookupError, TypeError, AttributeError, jinja2.TemplateError) as error:
        raise ValueError(
            f"what the adapter says of its evaluation cannot be shown ({error}): write the card "
            "with its report"
        ) from error
    return str(ModelCard(f"---\n{metadata}\n---\n\n{body}"))


def _metadata(info: AdapterInfo) -> ModelCardData:
    """What the Hub reads: it accepts only ids of its own as base models."""
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
        eval_results=list(_results(info)) or None,
        **base,
    )


def _results(info: AdapterInfo) -> Iterator[EvalResult]:
    """The figures of the adapter, one by one."""
    if info.evaluation is None:
        return
    after = info.evaluation["after"]
    biases = {f"bias, {name}": figure for name, figure in after["bias"].items()}
    scores = {SCORE_NAMES.get(name, name): figure for name, figure in after["scores"].items()}
    for name, figure in (biases | scores).items():
        if figure is not None:
            yield EvalResult(
                task_type="text-to-image",
                dataset_type="prompts",
                dataset_name=f"{after['prompts']} prompts, {after['images']} images",
                metric_type=name.partition(",")[0].lower(),
                metric_name=name,
                metric_value=round(figure["mean"], 4),
            )


def _on_hub(base: str) -> bool:
    return REPOSITORY.fullmatch(base) is not None


def _licence(base: str) -> str | None:
    return LICENCES.get(MIRRORS.get(base, base))


# ---- what its tables hold ------------------------------------------------------------------------


def _sides(info: AdapterInfo) -> list[Mapping[str, Any]]:
    """Summaries before and after; an empty one for what was not measured."""
    found = info.evaluation or {}
    return [found.get("before") or {}, found.get("after") or {}]


def _shares(info: AdapterInfo) -> Iterator[list[str]]:
    """Attribute, class, target, and how often it was perceived before and after."""
    for attribute in info.attributes:
        for name, target in zip(attribute.classes, attribute.target, strict=True):
            seen = [(s.get("frequencies", {}).get(attribute.name) or {}) for s in _sides(info)]
            shown = [_share(classes.get(name)) for classes in seen]
            yield [_plain(attribute.name), _plain(name), f"{target:.3f}", *shown]


def _biases(info: AdapterInfo) -> Iterator[tuple[bool, list[str]]]:
    """Whether it is asked for; figure, before, after, floor: what it balances comes first."""
    asked = {attribute.name for attribute in info.attributes}
    after = _sides(info)[1].get("bias", {})
    for name in sorted(after, key=lambda name: not set(name.split(" x ")) <= asked):
        wanted = set(name.split(" x ")) <= asked
        for kind, head in (("bias", "bias"), ("deviation", "off target")):
            figures = [side.get(kind, {}).get(name) for side in _sides(info)]
            if figures[1] is not None:
                floor = f"{figures[1]['floor']:.3f}"
                yield wanted, [f"{head}, {_plain(name)}", *map(_cell, figures), floor]
                without = [figure and figure["without_scatter"] for figure in figures]
                if wanted:
                    yield True, ["— scatter removed", *map(_cell, without), "0"]
                corrected = [side.get("corrected", {}).get(name) for side in _sides(info)]
                if wanted and kind == "bias" and corrected[1] is not None:
                    yield True, ["— classifier's errors corrected", *map(_cell, corrected), GAP]


def _scores(info: AdapterInfo) -> Iterator[list[str]]:
    """Figure, before and after: faces and quality."""
    sides = _sides(info)
    yield ["images with a face", *(_cell(side.get("face_rate")) for side in sides)]
    for name in sides[1].get("scores", {}):
        cells = [_cell(side.get("scores", {}).get(name)) for side in sides]
        yield [_plain(SCORE_NAMES.get(name, name)), *cells]


def _kept_sides(info: AdapterInfo) -> list[dict[str, GroupSummary]]:
    """Summaries before and after of prompts that leave nothing to change."""
    found = (info.evaluation or {}).get("groups") or {}
    return [
        {name: GroupSummary.from_json(root) for name, root in found.get(side, {}).items()}
        for side in ("before", "after")
    ]


def _kept_rows(info: AdapterInfo) -> Iterator[list[str]]:
    """Figure, before and after: what prompts ask for, and what shows nobody."""
    before, after = _kept_sides(info)
    for measure in [*measures([after]), *by_attribute(after)]:
        figures = [measure.of(side) for side in (before, after)]
        cells = [_cell(None if figure is None else asdict(figure)) for figure in figures]
        if measure.base is not None:
            cells[0] = f"{measure.base:.0f}"
        yield [_plain(measure.name), *cells]


def _sampling(info: AdapterInfo) -> str:
    """Arguments of a call that samples as the evaluation did."""
    found = info.evaluation
    if found is None:
        return ""
    return f", num_inference_steps={found['steps']}, guidance_scale={found['guidance_scale']}"


def _right(info: AdapterInfo) -> Iterator[tuple[str, str]]:
    """Attribute -> how often its classifier is right, the mean over classes."""
    for name, rows in ((info.evaluation or {}).get("confusion") or {}).items():
        shares = [row[i] / sum(row) for i, row in enumerate(rows)]
        yield _plain(name), f"{sum(shares) / len(shares):.1%}"


def _cell(figure: Mapping[str, Any] | None) -> str:
    """As `0.671 ± 0.281 [0.592, 0.744]`; a dash for a gap."""
    if figure is None:
        return GAP
    spread = f" ± {figure['std']:.3f}" if "std" in figure else ""
    ends = figure.get("interval")
    return f"{figure['mean']:.3f}{spread}" + (f" [{ends[0]:.3f}, {ends[1]:.3f}]" if ends else "")


def _share(figure: Mapping[str, float] | None) -> str:
    return GAP if figure is None else f"{figure['mean']:.3f} ± {figure['std']:.3f}"


def _joined(names: Sequence[str]) -> str:
    """As `a`, `a and b`, `a, b and c`."""
    *first, last = names
    return f"{', '.join(first)} and {last}" if first else last


def _plain(text: str) -> str:
    """Text that markdown shows as it is, on one line."""
    return re.sub(r"([\\`*_{}\[\]<>|#&~])", r"\\\1", " ".join(text.split()))
