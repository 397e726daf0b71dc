"""Every experiment of the paper on the testbed: train, measure on unseen prompts, one table.

    python examples/reproduction/experiments.py --out model_cards
    python examples/reproduction/experiments.py --only testbed-gender --out model_cards

Trains the adapters of the shipped recipes and measures each on prompts that its training never saw,
by classifiers that its training never saw, beside the base model on the same noise. Writes,
below `--out`, each adapter with its card to `adapters`, and experiments.md and the figures of the
reports on other prompts to `experiments`; all images are in the reports below `--runs`. What is in `--runs` already is not done again: stop it and start it as
you like. An experiment takes minutes to hours on 2 cores, by its prompts and the machine; processes
that `torchrun` starts share the pictures.
"""

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import aims
import torch
import typer

from diffusers_fair import FairnessFinetuner, RunConfig, distributed, metrics, testbed
from diffusers_fair.adapters.folder import read_adapter, write_adapter
from diffusers_fair.adapters.format import AdapterInfo
from diffusers_fair.adapters.tensors import Weights
from diffusers_fair.assess import EvaluationDefaults, control_groups
from diffusers_fair.attributes import Attribute
from diffusers_fair.backends.registry import load_base, load_judges
from diffusers_fair.evaluation.evaluate import evaluate
from diffusers_fair.evaluation.groups import with_groups
from diffusers_fair.loading import load_fair_adapter
from diffusers_fair.prompts import prompt_set
from diffusers_fair.prompts.groups import PromptGroup
from diffusers_fair.publishing.card import write_card
from diffusers_fair.reports.estimate import GAP
from diffusers_fair.reports.folder import FILE, GROUPS_SHEET, PAIRS, load_report
from diffusers_fair.reports.markdown import markdown_table
from diffusers_fair.reports.report import Report
from diffusers_fair.reports.summary import Summary
from diffusers_fair.testbed import world

OCCUPATIONS = "testbed-occupations"
COLUMNS = ("gender", "race", "gender x race")
PROBABILITIES = "steering by mean probabilities, not by counts"
THEN = {  # what adapters were trained with that no recipe tells
    "testbed-race": PROBABILITIES,
    "testbed-text-encoder-unet": PROBABILITIES,
    "testbed-gender-race-age": "a testbed-gender-race that itself started from nothing",
}


@dataclass(frozen=True)
class Experiment:
    """An adapter, and prompts to measure it on."""

    recipe: str
    prompts: str = OCCUPATIONS
    images: int | None = None  # of each prompt; left out, as the recipe has it

    @property
    def name(self) -> str:
        """As in `testbed-gender-race-on-sports`."""
        return self.recipe if self.prompts == OCCUPATIONS else f"{self.recipe}-on-{self.prompts}"

    def kept(self, out: Path) -> Path:
        """The folder of its report.json: the adapter's own, if it is what the card shows."""
        return out / ("adapters" if self.prompts == OCCUPATIONS else "experiments") / self.name


EXPERIMENTS = [
    Experiment("testbed-gender"),
    Experiment("testbed-race"),
    Experiment("testbed-gender-race"),
    Experiment("testbed-gender-race-age"),
    Experiment("testbed-prefix"),
    Experiment("testbed-unet"),
    Experiment("testbed-text-encoder-unet"),
    Experiment("testbed-gender-race", "non-templated", 60),
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
) -> None:
    """Train and measure what is not there yet; write the table of what is."""
    for experiment in EXPERIMENTS:
        if not only or experiment.name in only:
            report = measured(experiment, runs)
            if distributed.rank() == 0:
                keep(report, experiment, runs, out)
    if distributed.rank() == 0:
        write(out)


def trained(recipe: str, runs: Path) -> Path:
    """The adapter of a recipe, after the one it starts from; what was stopped goes on."""
    folder = runs / recipe
    if not (folder / "adapter").exists():
        first = RunConfig.load(recipe).adapter.init_from  # runs/RECIPE/adapter
        start = first and str(trained(Path(first).parent.name, runs))
        overrides: dict[str, Any] = {"adapter": {"init_from": start}, "output": str(folder)}
        FairnessFinetuner.from_recipe(recipe, **overrides).train()
    return folder / "adapter"


def measured(experiment: Experiment, runs: Path) -> Path:
    """The folder of an adapter's report."""
    folder = runs / "reports" / experiment.name
    if (folder / FILE).exists():
        return folder
    config = RunConfig.load(experiment.recipe)
    attributes = counted(config)
    images = experiment.images or config.evaluation.images_per_prompt
    adapter = trained(experiment.recipe, runs)
    reference = base(experiment.prompts, images, config, runs).select(attributes, images)
    groups = controls(experiment.prompts, config)
    pipe = drawer(config)
    judges = load_judges(config.evaluation.models, attributes, pipe.device)
    reference = with_groups(reference, pipe, groups, judges=judges, out=folder)
    load_fair_adapter(pipe, adapter)
    look(pipe, experiment.prompts, attributes, config, images, folder, reference, groups)
    return folder


def controls(prompts: str, config: RunConfig) -> tuple[PromptGroup, ...]:
    """The control prompts of an adapter of that recipe."""
    defaults = EvaluationDefaults.of_config(testbed.NAME, config)
    attributes = [section.attribute() for section in config.attributes]
    return control_groups(defaults.prompts(prompts, None), attributes, defaults)


def drawer(config: RunConfig) -> Any:
    """The base model, in the precision that the recipe has."""
    return load_base(testbed.NAME, dtype=config.base.dtype)


def counted(config: RunConfig) -> list[Attribute]:
    """Everything that the world's classifiers can see, with the recipe's targets."""
    balanced = {attribute.name: attribute for attribute in config.balanced()}
    return [balanced.get(name, attribute) for name, attribute in world.ATTRIBUTES.items()]


def base(prompts: str, images: int, config: RunConfig, runs: Path) -> Report:
    """The base model's report with that many images or more."""
    folder = runs / "reports" / "base" / prompts
    if (folder / FILE).exists():
        report = load_report(folder)
        if report.settings.images_per_prompt >= images:
            return report
        distributed.barrier()  # all have read it
        if distributed.rank() == 0:
            shutil.rmtree(folder)
        distributed.barrier()
    pipe = drawer(config)
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
    groups: tuple[PromptGroup, ...] = (),
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
        groups=groups,
        reference=reference,
        out=folder,
        model={"base": testbed.NAME, "dtype": str(pipe.dtype).removeprefix("torch.")},
    )


# ---- what is written -----------------------------------------------------------------------------


def keep(report: Path, experiment: Experiment, runs: Path, out: Path) -> None:
    """Copy a report's figures; of one on the usual prompts, with its adapter and the card."""
    kept = experiment.kept(out)
    if experiment.prompts == OCCUPATIONS:
        keep_adapter(runs / experiment.recipe / "adapter", report, kept)
    else:
        copy_files(report, kept, (FILE,))


def keep_adapter(adapter: Path, report: Path, out: Path) -> None:
    """Copy an adapter, with its card, the report's figures and the images that the card shows."""
    info, weights = read_adapter(adapter)
    half = {key: weight.half() for key, weight in weights.items()}
    write_adapter(out, half if alike(adapter, half, info) else weights, info)
    with TemporaryDirectory() as small:
        copy_files(report, Path(small), (FILE, PAIRS, GROUPS_SHEET))
        write_card(out, small)


def copy_files(source: Path, target: Path, names: tuple[str, ...]) -> None:
    """Copy those of the named files that there are: older reports have no groups."""
    target.mkdir(parents=True, exist_ok=True)
    for name in names:
        if (source / name).exists():
            shutil.copy(source / name, target / name)


def alike(adapter: Path, half: Weights, info: AdapterInfo) -> bool:
    """Whether half the digits draw the same pictures, to one step of 255."""
    pictures = []
    with TemporaryDirectory() as folder:
        write_adapter(Path(folder) / "half", half, info)
        for source in (adapter, Path(folder) / "half"):
            pipe = load_base(testbed.NAME)
            load_fair_adapter(pipe, source)
            pictures.append(
                pipe(
                    prompt_set(OCCUPATIONS).prompts("test")[:8],
                    generator=torch.Generator().manual_seed(0),
                    num_inference_steps=12,
                    guidance_scale=testbed.GUIDANCE,
                    output_type="np",
                ).images  # (8, 64, 64, 3) in [0, 1]
            )
    return bool(abs(pictures[0] - pictures[1]).max() <= 1 / 255)


def write(out: Path) -> None:
    """experiments.md, of all reports that are kept."""
    (out / "experiments" / "experiments.md").write_text(table(out), "utf-8")


def table(out: Path) -> str:
    """What experiments.md has to say, by the reports and adapters beside it."""
    there = [experiment for experiment in EXPERIMENTS if (experiment.kept(out) / FILE).exists()]
    found = {e.name: json.loads((e.kept(out) / FILE).read_text("utf-8")) for e in there}
    changed = {e.name: since(e.recipe, out / "adapters" / e.recipe) for e in there}
    return "\n".join(document(found, changed))


def since(recipe: str, adapter: Path) -> list[str]:
    """What an adapter was trained with and is no more: of its recipe, as `key=value`, and the code."""
    run = RunConfig(**read_adapter(adapter)[0].recipe, output=str(adapter))
    found = run.differences(RunConfig.load(recipe))
    kept = [key for key in found if key.startswith("prompts.keep")]
    then = [f"{key}={old}" for key, (old, _) in found.items() if key not in ("tracker", *kept)]
    if kept and run.prompts.keep is None:
        then.append("neutral prompts alone")
    else:
        then += [f"{key}={found[key][0]}" for key in kept]
    return [*then, THEN[recipe]] if recipe in THEN else then


def document(found: Mapping[str, dict[str, Any]], changed: Mapping[str, list[str]]) -> list[str]:
    """Lines of experiments.md, from reports and what each recipe had when it was trained."""
    head = ["", "prompts x images", *(f"bias, {name}" for name in COLUMNS), "old"]
    head += ["faces", "context", "CLIP-T", "CLIP-I", "DINO", *aims.WORDS]
    rows, origins = [], []
    for name, report in found.items():
        settings, origin = report["settings"], report["provenance"]
        size = f"{len(settings['prompts'])} x {settings['images_per_prompt']}"
        rows.append(["base, same noise", size, *cells(report["reference"])])
        rows.append([f"**{name}**", size, *cells(report)])
        then = f", trained with {', '.join(changed[name])}" if changed[name] else ""
        origins.append(f"- {name}: `{origin['command']}`, commit {origin['commit']}{then}")
    return [
        "# The experiments, measured on the testbed",
        "",
        "Bias over unseen prompts by the evaluation classifiers: mean ± std over prompts, and (in",
        "brackets) the floor, which a generator exactly on target would score with as many images.",
        "Named: share of images that show what words in the prompt ask for, words of training (seen)",
        "and others (unseen); implied: the same where no class is named; untouched: likeness of images",
        "that show nobody to the base's, and the mean change of their pixels.",
        "",
        *markdown_table(head, rows),
        "",
        "What the bias of each balanced attribute consists of. Had every prompt the mean shares over",
        "all prompts, it would be `prompts alike`: what that has above the floor is a lean which the",
        "prompts have in common, and what the bias has above it are differences between prompts. The",
        "interval (95 %) is over prompts.",
        "",
        *markdown_table(["", "", "bias", "interval", "prompts alike", "floor"], parts(found)),
        "",
        "What falls short of what examples/reproduction/aims.py asks for. Where that lies in the interval above, other",
        "prompts might have met it. The reasons are what trainings with other settings, whose reports are",
        "not kept, have shown:",
        "",
        *markdown_table(["", "", "found", "asked", "what stops it"], shortfalls(found)),
        "",
        "`python examples/reproduction/experiments.py --out model_cards` makes them all; how each was made, on",
        "which machine and by which versions, is in its report.json. What a recipe, or the code, had",
        "when an adapter was trained and has no more is named:",
        "",
        *origins,
        "",
    ]


def parts(found: Mapping[str, dict[str, Any]]) -> Iterator[list[str]]:
    """What the bias of every balanced attribute consists of, row by row."""
    for experiment in (e for e in EXPERIMENTS if e.name in found):
        balanced = {section.name for section in RunConfig.load(experiment.recipe).attributes}
        for column in COLUMNS:
            if balanced.issuperset(column.split(" x ")):
                yield [experiment.name, column, *part(found[experiment.name], column)]


def shortfalls(found: Mapping[str, dict[str, Any]]) -> list[list[str]]:
    """What every experiment misses of its aims, row by row."""
    return [row for name, report in found.items() for row in aims.missed(name, report)]


def part(report: Mapping[str, Any], column: str) -> list[str]:
    """Bias, its interval, what it would be were all prompts alike, and floor."""
    summary = Summary.from_json(report["summary"])
    bias, frequencies = summary.bias[column], summary.frequencies[column]
    assert bias is not None
    assert frequencies is not None
    shares = [share.mean for share in frequencies.values()]
    faces = [p["faces"] for p in report["prompts"] if p["attributes"][column]]
    alike = sum(metrics.noise_floor(n, shares) * faces.count(n) for n in set(faces)) / len(faces)
    interval = " to ".join(f"{end:.3f}" for end in bias.interval or ())
    return [f"{bias.mean:.3f}", interval, f"{alike:.3f}", f"{bias.noise_floor:.3f}"]


def cells(report: Mapping[str, Any]) -> list[str]:
    """A report's figures, or its reference's, in the table's order."""
    summary = Summary.from_json(report["summary"])
    words = aims.kept_words(report)
    scores = [summary.scores.get(key) for key in ("context", "clip_t", "clip_i", "dino")]
    return [
        *(f"{b.mean_and_std} ({b.noise_floor:.3f})" for b in map(summary.bias.get, COLUMNS) if b),
        aims.old(summary).mean_and_std,
        f"{aims.face_rate(summary).mean:.3f}",
        *(GAP if score is None else f"{score.mean:.3f}" for score in scores),
        *(f"{words[name]:.3f}" if name in words else GAP for name in aims.WORDS),
    ]


if __name__ == "__main__":
    typer.run(main)
