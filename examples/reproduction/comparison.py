"""Compare all published baselines and our adapters on the testbed.

    python examples/reproduction/comparison.py --out model_cards/comparison

There are three goals: balance gender, race, or both jointly. For each goal, every method of
`diffusers_fair.baselines` and the adapter of the shipped recipe generate images for the same unseen
prompts from the same noise, and the evaluation classifiers judge them. The adapters are those that
experiments.py wrote to `--adapters`.

Writes compare.html, compare.md and compare.json, in which all methods are tested against the base
model; the same files for each goal in a subfolder, in which the baselines are tested against the
adapter; and cost.md and cost.json, the time of each method before and during generation. Reports
are stored in `reports`, without page, images and features. Stored reports are not measured again:
delete those that are out of date. Run the same command again to resume.

Takes one to three hours on 2 cores: concept algebra evaluates the U-Net up to fourteen times per
step, and UCE generates up to 11,100 images to be fitted. With `--method`, only those methods are
measured and in the tables; cost.md lists the others.
"""

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from experiments import OCCUPATIONS, base_pipeline, controls

from diffusers_fair import RunConfig, evaluate, load_fair_adapter, testbed
from diffusers_fair.adapters.folder import read_adapter
from diffusers_fair.assess import EvaluationDefaults, baseline_task
from diffusers_fair.backends.registry import load_judges
from diffusers_fair.baselines import BASELINES, Task, baseline
from diffusers_fair.evaluation.generate import generate
from diffusers_fair.prompts import prompt_set
from diffusers_fair.prompts.groups import PromptGroup
from diffusers_fair.provenance import provenance
from diffusers_fair.reports.comparison import Entry, compare
from diffusers_fair.reports.folder import (
    FILE,
    PAGE,
    load_report,
    save_comparison,
    save_report,
)
from diffusers_fair.reports.report import Report
from diffusers_fair.testbed import world

OURS = "this package"
FOLDERS = {OURS: "ours"}  # method -> name of its folder, if that is not the method's name
RECIPES = ("testbed-gender", "testbed-race", "testbed-gender-race")
COUNTED = [world.GENDER, world.RACE]
COST = "cost.json"
TIMED, TURNS = 12, 3  # number of images whose generation is timed, and of repetitions


def main(
    out: Annotated[Path, typer.Option(help="Folder to write the tables and pages to.")],
    runs: Annotated[Path, typer.Option(help="Folder for complete reports.")] = Path(
        "runs/comparison"
    ),
    adapters: Annotated[Path, typer.Option(help="Folder of the adapters, by recipe.")] = Path(
        "model_cards/adapters"
    ),
    images: Annotated[int, typer.Option(help="Images per prompt.")] = 10,
    only: Annotated[
        list[str] | None, typer.Option(help="Recipe to compare; may be repeated.")
    ] = None,
    method: Annotated[
        list[str] | None, typer.Option(help="Method to measure; may be repeated.")
    ] = None,
) -> None:
    """Measure the methods that have no report yet, and write the tables."""
    first, kept = RunConfig.load(RECIPES[0]), out / "reports"

    @cache
    def base() -> Report:
        return measured(base_pipeline(first), "base", first, runs / "base", images)

    plain = light(base, kept / "base", images)
    entries, costs = [Entry(label="base", report=plain, group="nothing")], {}
    for recipe in only or RECIPES:
        config = RunConfig.load(recipe)
        goal = " x ".join(section.name for section in config.attributes)
        rows = []
        for name in method or (OURS, *BASELINES):
            folder = Path(recipe, FOLDERS.get(name, name))
            folders = runs / folder, kept / folder
            report, cost = report_and_cost(name, config, adapters / recipe, folders, images, base)
            rows.append(Entry(label=f"{name}, {goal}", report=report, group=goal))
            costs[rows[-1].label] = cost
        if len(rows) > 1:
            save_comparison(compare(rows), out / recipe)
        entries += rows
    save_comparison(compare(entries, against="base"), out)
    write_costs(costs, out)


def report_and_cost(
    method: str,
    config: RunConfig,
    adapter: Path,
    folders: tuple[Path, Path],
    images: int,
    base: Callable[[], Report],
) -> tuple[Report, dict[str, Any]]:
    """Load the report of a method and its cost, or measure them.

    `folders` are those of the complete report and of the stored one.
    """
    complete, kept = folders
    if not (kept / COST).exists():
        pipe, seconds = applied(method, config, adapter)
        light(lambda: measured(pipe, method, config, complete, images, base()), kept, images)
        cost = {"seconds before": seconds, "drawing, over the base": slowdown(pipe, config)}
        (kept / COST).write_text(json.dumps(cost | {"with": provenance()}, indent=1), "utf-8")
    return stored(kept, images), json.loads((kept / COST).read_text("utf-8"))


def light(make: Callable[[], Report], folder: Path, images: int) -> Report:
    """Load the report in a folder; if there is none, make one and save it without large arrays."""
    if not (folder / FILE).exists():
        report = make()
        groups = {name: slim(group) for name, group in report.groups.items()}
        save_report(replace(slim(report), groups=groups, reference=None), folder)
        (folder / PAGE).unlink()
    return stored(folder, images)


def slim(report: Any) -> Any:
    """Remove the large arrays from a report or a group."""
    return replace(report, records=replace(report.records, features={}), samples={})


def stored(folder: Path, images: int) -> Report:
    """Load the report in a folder, and check its number of images."""
    report = load_report(folder)
    stored_images = report.settings.images_per_prompt
    if stored_images != images:
        raise typer.BadParameter(
            f"'{folder}' has {stored_images} images per prompt, not {images}: give another --out, "
            "or delete the folder"
        )
    return report


def applied(method: str, config: RunConfig, adapter: Path) -> tuple[Any, float]:
    """Return a pipeline with a method applied, and the seconds that training or fitting took."""
    pipe = base_pipeline(config)
    if method == OURS:
        load_fair_adapter(pipe, adapter)
        return pipe, training_seconds(adapter)
    start = time.perf_counter()
    return baseline(method).apply(pipe, task(config, pipe)), time.perf_counter() - start


def training_seconds(adapter: Path) -> float:
    """Return the training time of an adapter, including the adapters that it started from."""
    info = read_adapter(adapter)[0]
    seconds = (info.training or {})["seconds"]
    if first := info.recipe["adapter"]["init_from"]:  # runs/RECIPE/adapter
        seconds += training_seconds(adapter.parent / Path(first).parent.name)
    return round(seconds, 1)  # the precision of fair_adapter.json


def task(config: RunConfig, pipe: Any) -> Task:
    """Build the task of a baseline: prompts, models and sampling of training."""
    return baseline_task(
        config.balanced(),
        EvaluationDefaults.of_config(testbed.NAME, config),
        pipe.device,
        steps=config.sampling.steps[1],
        guidance_scale=config.sampling.guidance_scale,
        seed=config.evaluation.seed,
    )


def measured(
    pipe: Any,
    name: str,
    config: RunConfig,
    folder: Path,
    images: int,
    reference: Report | None = None,
) -> Report:
    """Evaluate a method on unseen prompts."""
    section = config.evaluation
    return evaluate(
        pipe,
        prompt_set(OCCUPATIONS).prompts(section.split),
        COUNTED,
        judges=load_judges(section.models, COUNTED, torch.device("cpu")),
        images_per_prompt=images,
        steps=section.steps,
        guidance_scale=section.guidance_scale,
        seed=section.seed,
        groups=control_prompts(),
        reference=reference,
        label=name,
        out=folder,
        model={
            "base": testbed.NAME,
            "dtype": str(pipe.dtype).removeprefix("torch."),
            "method": name,
        },
    )


def control_prompts() -> tuple[PromptGroup, ...]:
    """Return the control prompts, which are the same for all methods and goals."""
    return controls(OCCUPATIONS, RunConfig.load(RECIPES[-1]))


def slowdown(pipe: Any, config: RunConfig) -> float:
    """Return the generation time relative to the base model's, as the median of some repetitions."""
    plain, ratios = base_pipeline(config), []
    for _ in range(TURNS):
        start = time.perf_counter()
        generate_images(plain, config)
        between = time.perf_counter()
        generate_images(pipe, config)
        ratios.append((time.perf_counter() - between) / (between - start))
    return statistics.median(ratios)


def generate_images(pipe: Any, config: RunConfig) -> None:
    """Generate a few images of one prompt."""
    section = config.evaluation
    prompts = prompt_set(OCCUPATIONS).prompts(section.split)[:1]
    options: dict[str, Any] = {"steps": section.steps, "guidance_scale": section.guidance_scale}
    for _ in generate(
        pipe, prompts, images_per_prompt=TIMED, seed=0, batch_size=TIMED, progress=False, **options
    ):
        pass


def write_costs(costs: dict[str, Any], out: Path) -> None:
    """Write cost.md and cost.json."""
    lines = [
        "# What the methods cost",
        "",
        "Preparation: seconds to train an adapter, including the adapter that it started from, or to",
        "fit a baseline; trainings ran on different machines. Generation: time to generate",
        f"{TIMED} images relative to the base model, median of {TURNS} repetitions.",
        "",
        "| | preparation, seconds | generation, relative to base model |",
        "| --- | --- | --- |",
    ]
    for label, cost in costs.items():
        before, ratio = cost["seconds before"], cost["drawing, over the base"]
        lines.append(f"| {label} | {before:.1f} | {ratio:.2f} |")
    measured = {label.split(", ")[0] for label in costs}
    missing = [name for name in (OURS, *BASELINES) if name not in measured]
    if missing:
        lines += ["", f"Not measured yet: {', '.join(missing)}."]
    (out / "cost.md").write_text("\n".join([*lines, ""]), "utf-8")
    (out / COST).write_text(json.dumps(costs, indent=1), "utf-8")


if __name__ == "__main__":
    typer.run(main)
