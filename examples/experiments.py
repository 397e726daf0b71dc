"""Every experiment of the paper on the testbed: train, measure on unseen prompts, one table.

    python examples/experiments.py --out model_cards
    python examples/experiments.py --only testbed-gender --out model_cards

Trains the adapters of the shipped recipes and measures each on prompts that its training never saw,
by classifiers that its training never saw, beside the base model on the same noise. Writes
experiments.md and experiments.json, and each report's figures and pictures below `--out`. Whatever
is there already is not done again: stop it and start it as you like. An experiment takes a quarter
of an hour to half an hour on 2 cores.
"""

import json
import platform
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from preview_card import preview

from diffusers_fair import FairnessFinetuner, RunConfig, testbed
from diffusers_fair.attributes import Attribute
from diffusers_fair.backends import load_base, load_judges
from diffusers_fair.card import write_card
from diffusers_fair.evaluation import Report, evaluate
from diffusers_fair.evaluation.report import FILE
from diffusers_fair.loading import load_fair_adapter
from diffusers_fair.prompts import prompt_set
from diffusers_fair.provenance import commit
from diffusers_fair.testbed import world

OCCUPATIONS = "testbed-occupations"
KEPT = ("report.json", "pairs.png")  # of a report folder, below --out
COLUMNS = ("gender", "race", "gender x race")


@dataclass(frozen=True)
class Experiment:
    """An adapter, and prompts to measure it on."""

    recipe: str
    prompts: str = OCCUPATIONS

    @property
    def name(self) -> str:
        """As in `testbed-gender-race-on-sports`."""
        return self.recipe if self.prompts == OCCUPATIONS else f"{self.recipe}-on-{self.prompts}"


EXPERIMENTS = [
    Experiment("testbed-gender"),
    Experiment("testbed-race"),
    Experiment("testbed-gender-race"),
    Experiment("testbed-gender-race-age"),
    Experiment("testbed-prefix"),
    Experiment("testbed-unet"),
    Experiment("testbed-text-encoder-unet"),
    Experiment("testbed-gender-race", "non-templated"),
    *(
        Experiment("testbed-multi-concept", prompts)
        for prompts in (OCCUPATIONS, "sports", "styles", "descriptors")
    ),
]


def main(
    out: Annotated[Path, typer.Option(help="Folder for the table and the reports' figures.")],
    runs: Annotated[Path, typer.Option(help="Folder for adapters and whole reports.")] = Path(
        "runs/experiments"
    ),
    only: Annotated[
        list[str] | None, typer.Option(help="Row of the table; may be repeated.")
    ] = None,
    images: Annotated[
        int | None, typer.Option(help="Of each prompt; left out, as many as the paper has.")
    ] = None,
) -> None:
    """Train and measure what is not there yet; write the table of what is."""
    for experiment in EXPERIMENTS:
        if not only or experiment.name in only:
            measured(experiment, runs, images)
    keep(runs, out)


def trained(recipe: str, runs: Path) -> Path:
    """The adapter of a recipe; a training that was stopped goes on."""
    folder = runs / recipe
    if not (folder / "adapter").exists():
        FairnessFinetuner.from_recipe(recipe, output=str(folder)).train()
    return folder / "adapter"


def measured(experiment: Experiment, runs: Path, images: int | None) -> Report:
    """The report of an adapter."""
    folder = runs / "reports" / experiment.name
    if (folder / FILE).exists():
        return Report.load(folder)
    config = RunConfig.load(experiment.recipe)
    attributes = counted(config)
    images = images or config.evaluation.images_per_prompt
    pipe = load_base(testbed.NAME, dtype=config.base.dtype)
    load_fair_adapter(pipe, trained(experiment.recipe, runs))
    reference = base(experiment.prompts, images, config, runs).of(attributes, images)
    return look(pipe, experiment.prompts, attributes, config, images, folder, reference)


def counted(config: RunConfig) -> list[Attribute]:
    """Everything that the world's classifiers can see, with the recipe's targets."""
    balanced = {section.name: section.attribute() for section in config.attributes}
    return [balanced.get(name, attribute) for name, attribute in world.ATTRIBUTES.items()]


def base(prompts: str, images: int, config: RunConfig, runs: Path) -> Report:
    """The base model's report with that many images or more."""
    folder = runs / "reports" / "base" / prompts
    if (folder / FILE).exists():
        report = Report.load(folder)
        if report.settings.images_per_prompt >= images:
            return report
        shutil.rmtree(folder)
    pipe = load_base(testbed.NAME, dtype=config.base.dtype)
    attributes = list(world.ATTRIBUTES.values())
    return look(pipe, prompts, attributes, config, images, folder)


def look(
    pipe: Any,
    prompts: str,
    attributes: list[Attribute],
    config: RunConfig,
    images: int,
    folder: Path,
    reference: Report | None = None,
) -> Report:
    """Draw and measure; what was stopped goes on."""
    section = config.evaluation
    return evaluate(
        pipe,
        prompt_set(prompts).prompts(section.split),
        attributes,
        judges=load_judges(section.models, attributes, pipe.device),
        images_per_prompt=images,
        steps=section.steps,
        guidance_scale=section.guidance_scale,
        seed=section.seed,
        reference=reference,
        out=folder,
        model={"base": testbed.NAME, "dtype": str(pipe.dtype).removeprefix("torch.")},
    )


# ---- what is written -----------------------------------------------------------------------------


def keep(runs: Path, out: Path) -> None:
    """Write the table of all reports that are there, and copy what is small of them."""
    rows, records = [], {}
    for experiment in EXPERIMENTS:
        folder = runs / "reports" / experiment.name
        if not (folder / FILE).exists():
            continue
        after, config = (
            Report.load(folder),
            RunConfig.load(runs / experiment.recipe / "recipe.yaml"),
        )
        images = after.settings.images_per_prompt
        before = base(experiment.prompts, images, config, runs)
        before = before.of(after.settings.attributes, images)
        rows += [row("base, same noise", before), row(f"**{experiment.name}**", after)]
        records[experiment.name] = {"base": before.summary, "adapter": after.summary}
        kept = out / experiment.name
        kept.mkdir(parents=True, exist_ok=True)
        for name in KEPT:
            shutil.copy(folder / name, kept / name)
        if experiment.prompts == OCCUPATIONS:
            keep_adapter(runs / experiment.recipe / "adapter", kept)
    origin = {
        "command": "python examples/experiments.py --out model_cards",
        "commit": commit(),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
    }
    (out / "experiments.md").write_text("\n".join(document(rows, origin)), "utf-8")
    record = json.dumps(origin | {"experiments": records}, indent=1)
    (out / "experiments.json").write_text(record, "utf-8")


def keep_adapter(adapter: Path, out: Path) -> None:
    """Copy an adapter beside its report, with its card and what the card looks like."""
    shutil.copytree(adapter, out / "adapter", dirs_exist_ok=True)
    write_card(out / "adapter", out)
    (out / "preview.html").write_text(preview(out / "adapter"), "utf-8")


def document(rows: list[list[str]], origin: Mapping[str, str]) -> list[str]:
    """Lines of experiments.md."""
    head = ["", "prompts x images", *(f"bias, {name}" for name in COLUMNS), "old"]
    head += ["faces", "context", "CLIP-T", "CLIP-I", "DINO"]
    return [
        "# The experiments, measured on the testbed",
        "",
        "Bias over unseen prompts by the evaluation classifiers: mean ± std over prompts, and (in",
        "brackets) the floor, which a generator exactly on target would score with as many images.",
        "The command of each row is in its report.json.",
        "",
        *(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)),
        "",
        *(f"- {name}: {value}" for name, value in origin.items()),
        "",
    ]


def row(name: str, report: Report) -> list[str]:
    """One line of the table."""
    summary, settings = report.summary, report.settings
    biases = [summary["bias"][column] for column in COLUMNS]
    old = summary["frequencies"]["age"]["old"]
    scores = [summary["scores"].get(key) for key in ("context", "clip_t", "clip_i", "dino")]
    return [
        name,
        f"{len(settings.prompts)} x {settings.images_per_prompt}",
        *(f"{b['mean']:.3f} ± {b['std']:.3f} ({b['floor']:.3f})" for b in biases),
        f"{old['mean']:.3f} ± {old['std']:.3f}",
        f"{summary['face_rate']['mean']:.3f}",
        *("-" if score is None else f"{score['mean']:.3f}" for score in scores),
    ]


if __name__ == "__main__":
    typer.run(main)
