"""Run the paper's experiments on the testbed: train, evaluate on unseen prompts, write one table.

    python examples/reproduction/experiments.py --out model_cards
    python examples/reproduction/experiments.py --only testbed-gender --out model_cards

Trains the adapters of the shipped recipes, and evaluates each against the base model from the same
noise, with prompts and classifiers that its training never saw. Below `--out`, writes each adapter
with its card to `adapters`, and experiments.md and the report.json of other prompts to
`experiments`. The complete reports, with all images, are below `--runs`. Finished trainings and
reports in `--runs` are reused, so the same command resumes. An experiment takes minutes to hours on
2 cores; processes that `torchrun` starts share the images.
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
from diffusers_fair.prompts.groups import PER_ATTRIBUTE, PromptGroup
from diffusers_fair.publishing.card import write_card
from diffusers_fair.reports.estimate import GAP
from diffusers_fair.reports.folder import FILE, GROUPS_SHEET, PAIRS, load_report
from diffusers_fair.reports.markdown import markdown_table
from diffusers_fair.reports.report import Report
from diffusers_fair.reports.summary import Summary
from diffusers_fair.testbed import world

OCCUPATIONS = "testbed-occupations"
NAMED = 96  # prompts that name a class, per attribute: their share may fall by .03
COLUMNS = ("gender", "race", "gender x race")
PROBABILITIES = "target feedback (`steering`) from mean probabilities instead of counts"
OTHER_CODE = {  # recipe -> how its adapter was trained differently, apart from recipe keys
    "testbed-race": PROBABILITIES,
    "testbed-text-encoder-unet": PROBABILITIES,
    "testbed-gender-race-age": "a testbed-gender-race that was itself trained from scratch",
}


@dataclass(frozen=True)
class Experiment:
    """A recipe, and the prompts that its adapter is evaluated on."""

    recipe: str
    prompts: str = OCCUPATIONS
    images: int | None = None  # per prompt; None: as in the recipe

    @property
    def name(self) -> str:
        """Name, such as `testbed-gender-race-on-sports`."""
        return self.recipe if self.prompts == OCCUPATIONS else f"{self.recipe}-on-{self.prompts}"

    def kept(self, out: Path) -> Path:
        """Return the folder of report.json: the adapter's folder if its card shows that report."""
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
    out: Annotated[
        Path, typer.Option(help="Folder for adapters, the table and report.json files.")
    ],
    runs: Annotated[Path, typer.Option(help="Folder for trainings and complete reports.")] = Path(
        "runs/experiments"
    ),
    only: Annotated[
        list[str] | None, typer.Option(help="Experiment to run; may be repeated.")
    ] = None,
) -> None:
    """Run the experiments that are not finished yet, and write the table of all."""
    for experiment in EXPERIMENTS:
        if not only or experiment.name in only:
            report = measured(experiment, runs)
            if distributed.is_main():
                keep(report, experiment, runs, out)
    if distributed.is_main():
        write(out)


def trained(recipe: str, runs: Path) -> Path:
    """Return the adapter of a recipe; train it, and the one that it starts from, if needed."""
    folder = runs / recipe
    if not (folder / "adapter").exists():
        first = RunConfig.load(recipe).adapter.init_from  # runs/RECIPE/adapter
        start = first and str(trained(Path(first).parent.name, runs))
        overrides: dict[str, Any] = {"adapter": {"init_from": start}, "output": str(folder)}
        FairnessFinetuner.from_recipe(recipe, **overrides).train()
    return folder / "adapter"


def measured(experiment: Experiment, runs: Path) -> Path:
    """Return the report folder of an experiment; evaluate the adapter if needed."""
    folder = runs / "reports" / experiment.name
    if (folder / FILE).exists():
        return folder
    config = RunConfig.load(experiment.recipe)
    attributes = counted(config)
    images = experiment.images or config.evaluation.images_per_prompt
    adapter = trained(experiment.recipe, runs)
    reference = base(experiment.prompts, images, config, runs).select(attributes, images)
    groups = controls(experiment.prompts, config, NAMED)
    pipe = base_pipeline(config)
    judges = load_judges(config.evaluation.models, attributes, pipe.device)
    reference = with_groups(reference, pipe, groups, judges=judges, out=folder)
    load_fair_adapter(pipe, adapter)
    evaluate_pipeline(
        pipe, experiment.prompts, attributes, config, images, folder, reference, groups
    )
    return folder


def controls(
    prompts: str, config: RunConfig, per_attribute: int = PER_ATTRIBUTE
) -> tuple[PromptGroup, ...]:
    """Build the control prompts for an adapter of that recipe."""
    defaults = EvaluationDefaults.of_config(testbed.NAME, config)
    attributes = [section.attribute() for section in config.attributes]
    texts = defaults.prompts(prompts, None)
    return control_groups(texts, attributes, defaults, per_attribute=per_attribute)


def base_pipeline(config: RunConfig) -> Any:
    """Load the base model in the data type of the recipe."""
    return load_base(testbed.NAME, dtype=config.base.dtype)


def counted(config: RunConfig) -> list[Attribute]:
    """Return all attributes of the testbed, with the targets of the recipe."""
    balanced = {attribute.name: attribute for attribute in config.balanced()}
    return [balanced.get(name, attribute) for name, attribute in world.ATTRIBUTES.items()]


def base(prompts: str, images: int, config: RunConfig, runs: Path) -> Report:
    """Return the base model's report with at least that many images; evaluate it if needed."""
    folder = runs / "reports" / "base" / prompts
    if (folder / FILE).exists():
        report = load_report(folder)
        if report.settings.images_per_prompt >= images:
            return report
        distributed.barrier()  # all processes have read it
        if distributed.is_main():
            shutil.rmtree(folder)
        distributed.barrier()
    pipe = base_pipeline(config)
    attributes = list(world.ATTRIBUTES.values())
    return evaluate_pipeline(pipe, prompts, attributes, config, images, folder)


def evaluate_pipeline(
    pipe: Any,
    prompts: str,
    attributes: list[Attribute],
    config: RunConfig,
    images: int,
    folder: Path,
    reference: Report | None = None,
    groups: tuple[PromptGroup, ...] = (),
) -> Report:
    """Evaluate a pipeline with the settings of the recipe, or resume the evaluation."""
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


# ---- output --------------------------------------------------------------------------------------


def keep(report: Path, experiment: Experiment, runs: Path, out: Path) -> None:
    """Copy report.json and, for the usual prompts, the adapter with its card."""
    kept = experiment.kept(out)
    if experiment.prompts == OCCUPATIONS:
        keep_adapter(runs / experiment.recipe / "adapter", report, kept)
    else:
        copy_files(report, kept, (FILE,))


def keep_adapter(adapter: Path, report: Path, out: Path) -> None:
    """Copy an adapter with its card, report.json and the images that the card shows."""
    info, weights = read_adapter(adapter)
    half = {key: weight.half() for key, weight in weights.items()}
    write_adapter(out, half if is_equivalent(adapter, half, info) else weights, info)
    with TemporaryDirectory() as small:
        copy_files(report, Path(small), (FILE, PAIRS, GROUPS_SHEET))
        write_card(out, small)


def copy_files(source: Path, target: Path, names: tuple[str, ...]) -> None:
    """Copy the named files that exist: older reports have no groups."""
    target.mkdir(parents=True, exist_ok=True)
    for name in names:
        if (source / name).exists():
            shutil.copy(source / name, target / name)


def is_equivalent(adapter: Path, half: Weights, info: AdapterInfo) -> bool:
    """Whether float16 weights generate the same images, to within 1/255 per pixel."""
    images = []
    with TemporaryDirectory() as folder:
        write_adapter(Path(folder) / "half", half, info)
        for source in (adapter, Path(folder) / "half"):
            pipe = load_base(testbed.NAME)
            load_fair_adapter(pipe, source)
            images.append(
                pipe(
                    prompt_set(OCCUPATIONS).prompts("test")[:8],
                    generator=torch.Generator().manual_seed(0),
                    num_inference_steps=12,
                    guidance_scale=testbed.GUIDANCE,
                    output_type="np",
                ).images  # (8, 64, 64, 3) in [0, 1]
            )
    return bool(abs(images[0] - images[1]).max() <= 1 / 255)


def write(out: Path) -> None:
    """Write experiments.md from all stored reports."""
    (out / "experiments" / "experiments.md").write_text(table(out), "utf-8")


def table(out: Path) -> str:
    """Return the text of experiments.md, from the stored reports and adapters."""
    stored = [experiment for experiment in EXPERIMENTS if (experiment.kept(out) / FILE).exists()]
    reports = {e.name: json.loads((e.kept(out) / FILE).read_text("utf-8")) for e in stored}
    changed = {e.name: since(e.recipe, out / "adapters" / e.recipe) for e in stored}
    return "\n".join(document(reports, changed))


def since(recipe: str, adapter: Path) -> list[str]:
    """List settings (`key=value`) and code of an adapter's training that have changed since."""
    run = RunConfig(**read_adapter(adapter)[0].recipe, output=str(adapter))
    changes = run.differences(RunConfig.load(recipe))
    kept = [key for key in changes if key.startswith("prompts.keep")]
    then = [f"{key}={old}" for key, (old, _) in changes.items() if key not in ("tracker", *kept)]
    if kept and run.prompts.keep is None:
        then.append("neutral prompts only")
    else:
        then += [f"{key}={changes[key][0]}" for key in kept]
    return [*then, OTHER_CODE[recipe]] if recipe in OTHER_CODE else then


def document(reports: Mapping[str, dict[str, Any]], changed: Mapping[str, list[str]]) -> list[str]:
    """Return the lines of experiments.md, from reports and the settings that have changed since."""
    head = ["", "prompts x images", *(f"bias, {name}" for name in COLUMNS), "old"]
    head += ["faces", "context", "CLIP-T", "CLIP-I", "DINO", *aims.WORDS]
    rows, origins = [], []
    for name, report in reports.items():
        settings, origin = report["settings"], report["provenance"]
        size = f"{len(settings['prompts'])} x {settings['images_per_prompt']}"
        rows.append(["base model, same noise", size, *cells(report["reference"])])
        rows.append([f"**{name}**", size, *cells(report)])
        then = f", trained with {', '.join(changed[name])}" if changed[name] else ""
        origins.append(f"- {name}: `{origin['command']}`, commit {origin['commit']}{then}")
    return [
        "# Experiments on the testbed",
        "",
        "Bias on unseen prompts, measured by the evaluation classifiers: mean ± standard deviation over",
        "prompts and, in brackets, the noise floor: the expected bias of a generator exactly on target,",
        "with as many images. Named: share of images that show the class that the prompt names, with",
        "words of training (seen) and other words (unseen). Implied: the same for prompts that imply a",
        "class. Untouched: similarity to the base model's image for prompts that show nobody, and the",
        "mean change of a pixel.",
        "",
        *markdown_table(head, rows),
        "",
        "## Sources of the remaining bias",
        "",
        "If every prompt had the mean shares over all prompts, the bias would be that in the column",
        "`equal prompts`. Its excess over the noise floor is a lean that all prompts have in common; the",
        "rest of the bias comes from differences between prompts. The interval is the 95 % bootstrap",
        "interval over prompts.",
        "",
        *markdown_table(
            ["", "", "bias", "interval", "equal prompts", "noise floor"], parts(reports)
        ),
        "",
        "## Missed limits",
        "",
        "Metrics that miss their limits in examples/reproduction/aims.py. If the limit lies in the",
        "interval above, other prompts might have met it. The causes are known from trainings with other",
        "settings, whose reports are not stored.",
        "",
        *markdown_table(["", "", "value", "limit", "cause"], shortfalls(reports)),
        "",
        "## Origin",
        "",
        "`python examples/reproduction/experiments.py --out model_cards` runs all experiments. Each",
        "report.json records its command, machine and versions. Settings and code that have changed since",
        "an adapter was trained are listed here:",
        "",
        *origins,
        "",
    ]


def parts(reports: Mapping[str, dict[str, Any]]) -> Iterator[list[str]]:
    """Yield a row on the sources of the bias for each balanced attribute of each experiment."""
    for experiment in (e for e in EXPERIMENTS if e.name in reports):
        balanced = {section.name for section in RunConfig.load(experiment.recipe).attributes}
        for column in COLUMNS:
            if balanced.issuperset(column.split(" x ")):
                yield [experiment.name, column, *part(reports[experiment.name], column)]


def shortfalls(reports: Mapping[str, dict[str, Any]]) -> list[list[str]]:
    """List the metrics of all experiments that miss their limits."""
    return [row for name, report in reports.items() for row in aims.missed(name, report)]


def part(report: Mapping[str, Any], column: str) -> list[str]:
    """Return the bias, its interval, the bias if all prompts had equal shares, and the noise floor."""
    summary = Summary.from_json(report["summary"])
    bias, frequencies = summary.bias[column], summary.frequencies[column]
    assert bias is not None
    assert frequencies is not None
    shares = [share.mean for share in frequencies.values()]
    faces = [p["faces"] for p in report["prompts"] if p["attributes"][column]]
    equal = sum(metrics.noise_floor(n, shares) * faces.count(n) for n in set(faces)) / len(faces)
    interval = " to ".join(f"{end:.3f}" for end in bias.interval or ())
    return [f"{bias.mean:.3f}", interval, f"{equal:.3f}", f"{bias.noise_floor:.3f}"]


def cells(report: Mapping[str, Any]) -> list[str]:
    """Return the metrics of a report, or of its reference, in the order of the table."""
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
