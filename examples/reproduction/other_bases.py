"""Evaluate an adapter on base models that it was not trained on, and write one table.

    python examples/testbed/make_variants.py
    python examples/reproduction/other_bases.py --out model_cards

By default, the first base is the adapter's own, for comparison. Bias and quality are measured on each base
without and with the adapter, from the same noise, with the settings of the adapter's recipe. The
same command resumes a stopped evaluation from the reports in `--runs`.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from diffusers_fair import RunConfig, testbed
from diffusers_fair.adapters.repository import open_fair_adapter
from diffusers_fair.backends.registry import load_base, load_judges
from diffusers_fair.evaluation.evaluate import evaluate
from diffusers_fair.loading import load_fair_adapter
from diffusers_fair.prompts import prompt_set
from diffusers_fair.provenance import provenance
from diffusers_fair.reports.estimate import estimate_text
from diffusers_fair.reports.markdown import markdown_table
from diffusers_fair.reports.report import Report
from diffusers_fair.reports.summary import Summary

ROOT = Path(__file__).parents[2]
VARIANTS = ROOT / "examples" / "testbed" / "work" / "variants"
BASES = [testbed.NAME, str(VARIANTS / "perturbed"), str(VARIANTS / "finetuned")]
HEAD = ["base model", "metric", "without", "with the adapter", "noise floor"]


def main(
    out: Annotated[Path, typer.Option(help="Folder for other_bases.md and other_bases.json.")],
    recipe: Annotated[str, typer.Option(help="Recipe of the adapter.")] = "testbed-gender",
    adapter: Annotated[
        str | None, typer.Option(help="Adapter. Default: that of the recipe in model_cards.")
    ] = None,
    base: Annotated[
        list[str] | None, typer.Option(help="Base model; may be repeated. Default: the variants.")
    ] = None,
    images: Annotated[
        int | None, typer.Option(help="Images per prompt. Default: the recipe's.")
    ] = None,
    runs: Annotated[Path, typer.Option(help="Folder for complete reports.")] = Path(
        "runs/other_bases"
    ),
) -> None:
    """Evaluate the adapter on each base model, and write the table."""
    config = RunConfig.load(recipe)
    adapter = adapter or str(ROOT / "model_cards" / "adapters" / recipe)
    reports = {
        name: measured(model, adapter, config, images, runs / name)
        for model in base or BASES
        for name in [Path(model).name]
    }
    keep(reports, recipe, config.base.model, out)


def measured(
    base: str, adapter: str, config: RunConfig, images: int | None, folder: Path
) -> tuple[Report, Report]:
    """Evaluate a base model without and with the adapter."""
    section = config.evaluation
    pipe = load_base(base, dtype=config.base.dtype)
    attributes = [attribute.attribute() for attribute in config.attributes]
    options: dict[str, Any] = {
        "judges": load_judges(section.models, attributes, pipe.device, config.people),
        "images_per_prompt": images or section.images_per_prompt,
        "steps": section.steps,
        "guidance_scale": section.guidance_scale,
        "seed": section.seed,
        "groups": (),
    }
    texts = [t for name in config.prompts.sets for t in prompt_set(name).prompts(section.split)]
    opened = open_fair_adapter(adapter)
    model = {"base": base}
    before = evaluate(pipe, texts, attributes, out=folder / "base", model=model, **options)
    load_fair_adapter(pipe, opened, other_base=True)
    model = {"base": base, "adapter weights": opened.digest}
    after = evaluate(
        pipe, texts, attributes, reference=before, out=folder / "adapter", model=model, **options
    )
    return before, after


def rows(name: str, before: Summary, after: Summary) -> Iterator[list[str]]:
    """Yield the rows of a base model, as in HEAD."""
    for attribute, bias in after.bias.items():
        floor = "" if bias is None else f"{bias.noise_floor:.3f}"
        sides = (before.bias[attribute], bias)
        yield [name, f"bias, {attribute}", *map(estimate_text, sides), floor]
    rates = (before.face_rate, after.face_rate)
    yield [name, "images with a face", *map(estimate_text, rates), ""]
    for score in ("context", "clip_t"):
        if score in before.scores:
            sides = (before.scores[score], after.scores[score])
            yield [name, {"clip_t": "CLIP-T"}.get(score, score), *map(estimate_text, sides), ""]


def keep(
    reports: dict[str, tuple[Report, Report]], recipe: str, trained_on: str, out: Path
) -> None:
    """Write other_bases.md and other_bases.json."""
    table = [
        row
        for name, (before, after) in reports.items()
        for row in rows(name, before.summary, after.summary)
    ]
    settings = next(iter(reports.values()))[0].settings
    out.mkdir(parents=True, exist_ok=True)
    text = "\n".join(document(table, recipe, trained_on, settings))
    (out / "other_bases.md").write_text(text, "utf-8")
    data = {
        "recipe": recipe,
        "trained_on": trained_on,
        "bases": {
            name: {"without": before.summary.json(), "with": after.summary.json()}
            for name, (before, after) in reports.items()
        },
        "images_per_prompt": settings.images_per_prompt,
        "provenance": provenance(),
    }
    (out / "other_bases.json").write_text(json.dumps(data, indent=1), "utf-8")


def document(table: Sequence[list[str]], recipe: str, trained_on: str, settings: Any) -> list[str]:
    """Return the lines of other_bases.md."""
    return [
        f"# The adapter of {recipe} on other base models",
        "",
        f"{len(settings.prompts)} prompts x {settings.images_per_prompt} images, without and with "
        "the adapter from the same noise. Mean ± std over prompts [95 % bootstrap interval of the "
        f"mean]. The adapter was trained on {trained_on}.",
        "",
        *markdown_table(HEAD, table),
        "",
    ]


if __name__ == "__main__":
    typer.run(main)
