"""All rival methods and our adapters on the testbed, in one table.

    python examples/reproduction/comparison.py --out model_cards/comparison

For each of three goals (one attribute, another, both jointly) every method of
`diffusers_fair.baselines` and the adapter of the shipped recipe draw the same unseen prompts from
the same noise, and the evaluation classifiers count. Adapters are those that experiments.py has put
below `--adapters`. Writes compare.html, compare.md and compare.json, where all are tested against
the base model; the same for each goal in a folder of its own, where the rivals are tested against
the adapter; and cost.md and cost.json: what a method takes beforehand and while it draws. Each
report is kept in `reports`, without page, pictures and features; what is there is not measured
again, so delete what has changed. Stopped, it goes on where it was.

It takes one to three hours on 2 cores: concept algebra evaluates the
U-Net up to fourteen times a step, and UCE draws up to 11,100 images before the first that counts.
What there is no time for can be left to another day: `--method` says which to measure now, and the
tables hold those that were asked for; cost.md names the others.
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
from experiments import OCCUPATIONS, controls, drawer

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
FOLDERS = {OURS: "ours"}  # method -> name of its folders, where it is another
RECIPES = ("testbed-gender", "testbed-race", "testbed-gender-race")
COUNTED = [world.GENDER, world.RACE]
COST = "cost.json"
TIMED, TURNS = 12, 3  # images of the drawing that is timed, and how often it is


def main(
    out: Annotated[Path, typer.Option(help="Folder for the tables and the page.")],
    runs: Annotated[Path, typer.Option(help="Folder for whole reports.")] = Path("runs/comparison"),
    adapters: Annotated[Path, typer.Option(help="Folder that holds RECIPE's adapter.")] = Path(
        "model_cards/adapters"
    ),
    images: Annotated[int, typer.Option(help="Of each prompt.")] = 10,
    only: Annotated[list[str] | None, typer.Option(help="Recipe; may be repeated.")] = None,
    method: Annotated[list[str] | None, typer.Option(help="Method; may be repeated.")] = None,
) -> None:
    """Measure what is not measured yet; write the tables."""
    first, kept = RunConfig.load(RECIPES[0]), out / "reports"

    @cache
    def base() -> Report:
        return measured(drawer(first), "base", first, runs / "base", images)

    plain = light(base, kept / "base", images)
    entries, costs = [Entry(label="base", report=plain, group="nothing")], {}
    for recipe in only or RECIPES:
        config = RunConfig.load(recipe)
        goal = " x ".join(section.name for section in config.attributes)
        rows = []
        for name in method or (OURS, *BASELINES):
            place = Path(recipe, FOLDERS.get(name, name))
            places = runs / place, kept / place
            report, cost = done(name, config, adapters / recipe, places, images, base)
            rows.append(Entry(label=f"{name}, {goal}", report=report, group=goal))
            costs[rows[-1].label] = cost
        if len(rows) > 1:
            save_comparison(compare(rows), out / recipe)
        entries += rows
    save_comparison(compare(entries, against="base"), out)
    write_costs(costs, out)


def done(
    method: str,
    config: RunConfig,
    adapter: Path,
    places: tuple[Path, Path],
    images: int,
    base: Callable[[], Report],
) -> tuple[Report, dict[str, Any]]:
    """The report of a method and its cost, to be found in the second place, made in the first."""
    made, kept = places
    if not (kept / COST).exists():
        pipe, seconds = applied(method, config, adapter)
        light(lambda: measured(pipe, method, config, made, images, base()), kept, images)
        cost = {"seconds before": seconds, "drawing, over the base": slowdown(pipe, config)}
        (kept / COST).write_text(json.dumps(cost | {"with": provenance()}, indent=1), "utf-8")
    return stored(kept, images), json.loads((kept / COST).read_text("utf-8"))


def light(make: Callable[[], Report], folder: Path, images: int) -> Report:
    """The report in a folder; if there is none, a new one without what is large."""
    if not (folder / FILE).exists():
        report = make()
        groups = {name: slim(group) for name, group in report.groups.items()}
        save_report(replace(slim(report), groups=groups, reference=None), folder)
        (folder / PAGE).unlink()
    return stored(folder, images)


def slim(seen: Any) -> Any:
    """A report or a group of it without what is large."""
    return replace(seen, records=replace(seen.records, features={}), samples={})


def stored(folder: Path, images: int) -> Report:
    """The report in a folder, which must be of that many images."""
    report = load_report(folder)
    there = report.settings.images_per_prompt
    if there != images:
        raise typer.BadParameter(
            f"'{folder}' is of {there} images of each prompt, not {images}: give another --out, or "
            "delete it"
        )
    return report


def applied(method: str, config: RunConfig, adapter: Path) -> tuple[Any, float]:
    """A pipeline that draws by a method, and the seconds of what goes before."""
    pipe = drawer(config)
    if method == OURS:
        load_fair_adapter(pipe, adapter)
        return pipe, training_seconds(adapter)
    start = time.perf_counter()
    return baseline(method).apply(pipe, task(config, pipe)), time.perf_counter() - start


def training_seconds(adapter: Path) -> float:
    """Of an adapter and of those that it started from, which are kept beside it."""
    info = read_adapter(adapter)[0]
    seconds = (info.training or {})["seconds"]
    if first := info.recipe["adapter"]["init_from"]:  # runs/RECIPE/adapter
        seconds += training_seconds(adapter.parent / Path(first).parent.name)
    return round(seconds, 1)  # as each is written


def task(config: RunConfig, pipe: Any) -> Task:
    """The task of a baseline: prompts, models and sampling of training."""
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
    """The report of a method, over unseen prompts."""
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
        groups=words_kept(),
        reference=reference,
        label=name,
        out=folder,
        model={
            "base": testbed.NAME,
            "dtype": str(pipe.dtype).removeprefix("torch."),
            "method": name,
        },
    )


def words_kept() -> tuple[PromptGroup, ...]:
    """Control prompts, the same for all methods and goals."""
    return controls(OCCUPATIONS, RunConfig.load(RECIPES[-1]))


def slowdown(pipe: Any, config: RunConfig) -> float:
    """Time to draw by a method over that of the base model, the median of some turns."""
    plain, ratios = drawer(config), []
    for _ in range(TURNS):
        start = time.perf_counter()
        draw(plain, config)
        between = time.perf_counter()
        draw(pipe, config)
        ratios.append((time.perf_counter() - between) / (between - start))
    return statistics.median(ratios)


def draw(pipe: Any, config: RunConfig) -> None:
    """A few images of one prompt."""
    section = config.evaluation
    prompts = prompt_set(OCCUPATIONS).prompts(section.split)[:1]
    options: dict[str, Any] = {"steps": section.steps, "guidance_scale": section.guidance_scale}
    for _ in generate(
        pipe, prompts, images_per_prompt=TIMED, seed=0, batch_size=TIMED, progress=False, **options
    ):
        pass


def write_costs(costs: dict[str, Any], out: Path) -> None:
    """cost.md and cost.json."""
    lines = [
        "# What the methods cost",
        "",
        "Seconds of what goes before the first image (training, and that of the adapter it started",
        "from, on the machines that did it; or what a rival works out), and the time to draw",
        f"{TIMED} images over that of the base model, the median of {TURNS} turns.",
        "",
        "| | seconds before | drawing, over the base |",
        "| --- | --- | --- |",
    ]
    for label, cost in costs.items():
        before, drawing = cost["seconds before"], cost["drawing, over the base"]
        lines.append(f"| {label} | {before:.1f} | {drawing:.2f} |")
    measured = {label.split(", ")[0] for label in costs}
    left = [name for name in (OURS, *BASELINES) if name not in measured]
    if left:
        lines += ["", f"Not measured yet: {', '.join(left)}."]
    (out / "cost.md").write_text("\n".join([*lines, ""]), "utf-8")
    (out / COST).write_text(json.dumps(costs, indent=1), "utf-8")


if __name__ == "__main__":
    typer.run(main)
