"""The command `diffusers-fair`."""

import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from diffusers_fair.training.stopping import TrainingStoppedError

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Train, measure, share and load fairness adapters for Hugging Face diffusers.",
)
console = Console()
classifier = typer.Typer(no_args_is_help=True, help="Classifiers of your own.")
app.add_typer(classifier, name="classifier")

Base = Annotated[str, typer.Option(help="`testbed`, a Hub id or a folder.")]
Adapter = Annotated[str | None, typer.Option(help="Adapter folder or Hub id.")]
DEMO_IMAGES = 2  # of each prompt that leaves nothing to change
RespectWords = Annotated[
    bool,
    typer.Option(
        "--respect-words",
        help="Disable the adapter for prompts that name a class it balances.",
    ),
]
Out = Annotated[Path, typer.Option(help="Folder to write to.")]


@app.command()
def demo(
    out: Out = Path("runs/demo"),
    images: Annotated[int, typer.Option(help="Of each prompt.")] = 20,
) -> None:
    """Train on the testbed, measure before and after, write the report: minutes on a laptop.

    It measures half of the test prompts, with fewer images than a full evaluation; the floor that
    is printed beside each bias is for that many.
    """
    from diffusers_fair.prompts import prompt_set
    from diffusers_fair.reports.report import require_free

    require_free(out / "report")
    folder = _train("testbed-demo", [f"output={out}"])
    texts = prompt_set("testbed-occupations").prompts("test")[::2]
    adapter = str(folder / "adapter")
    _evaluate("testbed", adapter, out / "report", texts, images=images, group_images=DEMO_IMAGES)


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(help="A YAML file or a shipped name.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[key=value]...", help="Replace recipe values.")
    ] = None,
) -> None:
    """Train an adapter by a recipe, or go on with a run that was stopped."""
    _train(recipe, overrides or [])


@app.command()
def doctor(
    recipe: Annotated[str, typer.Argument(help="A YAML file or a shipped name.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[key=value]...", help="Replace recipe values.")
    ] = None,
) -> None:
    """Say what a recipe needs, what is there and what is not; downloads nothing."""
    from diffusers_fair.config.schema import RunConfig
    from diffusers_fair.doctor import examine

    found = examine(RunConfig.load(recipe, overrides or []))
    for need, parts in found.items():
        state = "there  " if need.there else "missing"
        advice = "" if need.there else f"\n         {need.advice}"
        text = f"{state}  {need.what}  (for {', '.join(parts)}){advice}"
        console.print(text, markup=False, highlight=False, soft_wrap=True)
    size = sum(need.size for need in found) / 1e9
    console.print(f"weights that are there: {size:.1f} GB, as stored", highlight=False)
    gaps = [need for need in found if not need.there]
    if gaps:
        raise ValueError(f"'{recipe}' is missing {len(gaps)} of its needs, see above")


@classifier.command("train")
def classifier_train(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="IMAGEFOLDER_OR_PARQUET",
            help="A folder with a folder of pictures for each class; a parquet file, or a folder "
            "of them. The pictures should be squares, half as large again as the face.",
        ),
    ],
    out: Out,
    label: Annotated[str, typer.Option(help="Column of the labels in parquet files.")] = "label",
    size: Annotated[int, typer.Option(help="Side of the pictures, in pixels.")] = 224,
    epochs: Annotated[int, typer.Option(help="Times that every picture is seen.")] = 5,
    batch_size: Annotated[int, typer.Option(help="Pictures in one update.")] = 64,
    lr: Annotated[float, typer.Option(help="Learning rate at first.")] = 1e-3,
    held_out: Annotated[float, typer.Option(help="Share kept for measuring.")] = 0.1,
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 0,
    pretrained: Annotated[bool, typer.Option(help="Start from ImageNet's weights.")] = True,
) -> None:
    """Train a classifier of one attribute from labelled pictures of faces; say how good it is."""
    from rich.table import Table

    from diffusers_fair.training.classifier import Settings, read_images, train_classifier

    settings = Settings(
        size=size,
        epochs=epochs,
        batch_size=batch_size,
        lr=lr,
        held_out=held_out,
        seed=seed,
        pretrained=pretrained,
    )
    facts = train_classifier(read_images(source, label), out, settings)
    grid = Table("is, and is seen as", *facts["classes"])
    for name, row in zip(facts["classes"], facts["confusion"], strict=True):
        grid.add_row(name, *map(str, row))
    console.print(grid)
    held = facts["pictures"]["held out"]
    console.print(f"accuracy {facts['accuracy']:.3f} on {held} held-out pictures")
    console.print(f"classifier in {out}; in a recipe: checkpoint:{out}", highlight=False)


@app.command()
def evaluate(
    base: Base = "testbed",
    adapter: Adapter = None,
    baseline: Annotated[
        str | None,
        typer.Option(
            help="In place of an adapter a published method: attribute-words, "
            "ethical-intervention, debias-vl, uce, concept-algebra or fair-diffusion. What it "
            "works out beforehand it does with the training prompts and the training models."
        ),
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            help="Recipe whose evaluation.models look at the images, for a base other than the "
            "testbed; its evaluation section and prompts are what is left out below."
        ),
    ] = None,
    out: Out = Path("reports/evaluation"),
    attribute: Annotated[
        list[str] | None,
        typer.Option(help="What to count; may be repeated. Left out: what the adapter balances."),
    ] = None,
    prompts: Annotated[
        str | None,
        typer.Option(
            help="A packaged prompt set, or a text file with a prompt a line. Left out: the "
            "recipe's, or testbed-occupations."
        ),
    ] = None,
    split: Annotated[
        str | None, typer.Option(help="Of the prompt set. Left out: the recipe's, or test.")
    ] = None,
    images: Annotated[
        str | None,
        typer.Option(
            metavar="NUMBER_OR_DIR",
            help="How many of each prompt. Left out: the recipe's, or 60. Or a folder of pictures "
            "made by anything, to look at these: in it a folder for each prompt, named as the "
            "prompt or with a prompt.txt.",
        ),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="Of the scheduler. Left out: the recipe's, or 20.")
    ] = None,
    guidance_scale: Annotated[
        float | None, typer.Option(help="Left out: the recipe's, or the base's usual.")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Of the noise. Left out: the recipe's, or 0.")
    ] = None,
    reference: Annotated[
        Path | None,
        typer.Option(
            help="Report of the base model with the same prompts, seed and sampling and at least "
            "as many images; the base is not measured again. Groups that it lacks are generated."
        ),
    ] = None,
    groups: Annotated[
        bool,
        typer.Option(
            "--groups/--no-groups",
            help="Also measure whether images follow class words in a prompt, and whether prompts "
            "without people stay unchanged. Not for a folder of --images.",
        ),
    ] = True,
    group_images: Annotated[int, typer.Option(help="Images of each prompt of --groups.")] = 4,
    respect_words: RespectWords = False,
) -> None:
    """Measure a base model, and an adapter or a rival method against it, on unseen prompts.

    Stopped, it goes on where it was when the same command is given again. Several processes share
    the work: accelerate launch -m diffusers_fair evaluate ...
    """
    from diffusers_fair.prompts import prompt_set

    if group_images < 1:
        raise ValueError(
            f"--group-images must be 1 or more, got {group_images}: leave the groups out with "
            "--no-groups"
        )
    if images is not None and not images.lstrip("-").isdigit():
        if respect_words or {adapter, baseline, reference, prompts} != {None}:
            raise ValueError(
                f"the pictures in '{images}' are looked at as they are: leave out --adapter, "
                "--baseline, --reference, --prompts and --respect-words, or give a number of "
                "--images"
            )
        _audit(images, recipe, out, attribute)
        return
    asked = _asked(base, recipe)
    texts = [
        text
        for name in ([prompts] if prompts else asked.prompts)
        for text in prompt_set(name).prompts(split or asked.section.split)
    ]
    _evaluate(
        base,
        adapter,
        out,
        texts,
        baseline=baseline,
        recipe=recipe,
        attributes=attribute,
        images=None if images is None else int(images),
        steps=steps,
        guidance_scale=guidance_scale,
        seed=seed,
        reference=reference,
        group_images=group_images if groups else None,
        respect_words=respect_words,
    )


@app.command()
def compare(
    reports: Annotated[
        list[str],
        typer.Argument(
            metavar="[[GROUP/]LABEL=]REPORT...",
            help="Report folders of the same prompts and as many images; the best of each group "
            "is marked.",
        ),
    ],
    out: Out = Path("reports/comparison"),
    against: Annotated[
        str | None,
        typer.Option(help="Label of the one that all others are tested against; else the first."),
    ] = None,
) -> None:
    """Put reports side by side: a page, a table in markdown, and all figures in JSON."""
    from diffusers_fair.reports.comparison import compare as side_by_side

    side_by_side([_entry(word) for word in reports], against).save(out)
    console.print(f"comparison in {out}")


@app.command()
def generate(
    prompt: Annotated[list[str], typer.Argument(help="What to draw.")],
    base: Base = "testbed",
    adapter: Adapter = None,
    out: Out = Path("images"),
    images: Annotated[int, typer.Option(help="Of each prompt.")] = 4,
    steps: Annotated[int, typer.Option(help="Of the scheduler.")] = 20,
    guidance_scale: Annotated[
        float | None, typer.Option(help="Left out: the base's usual.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the noise.")] = 0,
    respect_words: RespectWords = False,
) -> None:
    """Draw images with or without an adapter."""
    from PIL import Image

    from diffusers_fair.backends.registry import usual_guidance
    from diffusers_fair.evaluation.generate import generate as draw

    pipe = _pipeline(base, adapter, respect_words)
    out.mkdir(parents=True, exist_ok=True)
    for batch in draw(
        pipe,
        prompt,
        images_per_prompt=images,
        steps=steps,
        guidance_scale=guidance_scale or usual_guidance(base),
        seed=seed,
        batch_size=min(24, images),
        progress=True,
    ):
        pictures = ((batch.images + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
        for picture, i, j in zip(pictures, batch.prompt, batch.image, strict=True):
            file = out / f"{_slug(prompt[int(i)])}-{int(j):03d}.png"
            Image.fromarray(picture).save(file)
    console.print(f"{len(prompt) * images} images in {out}")


@app.command()
def push(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Adapter folder.")],
    repo_id: Annotated[str, typer.Argument(help="`user-or-organisation/name`.")],
    private: Annotated[
        bool, typer.Option("--private", help="Make a new repository private.")
    ] = False,
    revision: Annotated[
        str | None, typer.Option(help="Branch, or refs/pr/N to add to a pull request.")
    ] = None,
    pull_request: Annotated[
        bool, typer.Option("--pull-request", help="Open one instead of committing.")
    ] = False,
    message: Annotated[str | None, typer.Option(help="Of the commit.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would go up, and ask nothing of the Hub.")
    ] = False,
    token: Annotated[
        str | None, typer.Option(help="Left out: HF_TOKEN, or that of `hf auth login`.")
    ] = None,
) -> None:
    """Publish an adapter folder on the Hub, with its card, samples and report, in one commit."""
    from diffusers_fair.publishing.hub import push_adapter

    done = push_adapter(
        folder,
        repo_id,
        private=private,
        revision=revision,
        create_pr=pull_request,
        message=message,
        token=token,
        dry_run=dry_run,
    )
    for name, size in done.files.items():
        _say(f"{size:>12,} bytes  {name}")
    for name in done.removed:
        _say(f"     removed        {name}")
    if dry_run:
        _say(f"nothing has been pushed; without --dry-run this goes to {repo_id}")
    else:
        _say(done.url or f"{repo_id} has all of it already: nothing to push")


def _say(text: str) -> None:
    """Print a line as it is."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


@app.command()
def inspect(
    adapter: Annotated[str, typer.Argument(metavar="DIR_OR_REPO", help="Folder or Hub id.")],
) -> None:
    """Say what an adapter is, without loading a model."""
    from dataclasses import asdict

    from diffusers_fair.adapters.io import read_adapter
    from diffusers_fair.loading import local_folder

    info, weights = read_adapter(local_folder(adapter))
    facts: dict[str, Any] = asdict(info)
    facts["parameters"] = sum(weight.numel() for weight in weights.values())
    console.print_json(json.dumps(facts))


@app.command()
def card(
    adapter: Annotated[Path, typer.Argument(metavar="DIR", help="Adapter folder.")],
    report: Annotated[
        Path | None,
        typer.Option(help="Folder of its report. Left out: what was noted of the last one."),
    ] = None,
) -> None:
    """Write the card of an adapter, its README.md, from what was measured."""
    from diffusers_fair.publishing.card import write_card

    console.print(f"card in {write_card(adapter, report)}", highlight=False)


@app.command()
def recipes() -> None:
    """List the shipped recipes."""
    from diffusers_fair.config.recipe import RECIPES
    from diffusers_fair.config.recipe import recipes as shipped

    for name in shipped():
        summary = (RECIPES / f"{name}.yaml").read_text("utf-8").splitlines()[0].lstrip("# ")
        console.print(f"{name}  [dim]{summary}[/dim]", highlight=False)


def main() -> None:
    """Run the command: exit code 0 done, 2 bad input (one sentence), 1 anything else.

    143 is a training that a SIGTERM stopped where it can be gone on from.
    """
    try:
        if app(standalone_mode=False):  # the code of an interruption
            sys.exit(1)
    except typer.Abort:
        sys.exit(1)
    except TrainingStoppedError as stop:
        sys.stderr.write(f"diffusers-fair: {stop}\n")
        sys.exit(stop.code)
    except Exception as error:
        if not isinstance(error, ValueError | ModuleNotFoundError) and not _is_usage(error):
            raise
        sys.stderr.write(f"diffusers-fair: {error}\n")
        sys.exit(2)


def _is_usage(error: Exception) -> bool:
    """Whether the command line itself was wrong."""
    from typer._click.exceptions import ClickException

    return isinstance(error, ClickException)


def _train(recipe: str, overrides: list[str]) -> Path:
    from diffusers_fair.config.schema import RunConfig
    from diffusers_fair.training.run_folder import claim_run_folder
    from diffusers_fair.training.trainer import FairnessFinetuner

    config = RunConfig.load(recipe, overrides)
    claim_run_folder(config)  # before any model is loaded
    folder = FairnessFinetuner(config).train()
    from diffusers_fair import distributed

    if distributed.is_main():
        console.print(f"adapter in {folder / 'adapter'}")
    return folder


def _pipeline(base: str, adapter: str | None, respect_words: bool) -> Any:
    from diffusers_fair.backends.registry import load_base
    from diffusers_fair.loading import load_fair_adapter

    _check_respect_words(respect_words, adapter)
    pipe = load_base(base)
    if adapter is not None:
        load_fair_adapter(pipe, adapter, respect_words=respect_words)
    return pipe


def _check_respect_words(respect_words: bool, adapter: str | None) -> None:
    if respect_words and adapter is None:
        raise ValueError("--respect-words is for an adapter: name one with --adapter")


def _evaluate(
    base: str,
    adapter: str | None,
    out: Path,
    texts: list[str],
    *,
    baseline: str | None = None,
    recipe: str | None = None,
    attributes: list[str] | None = None,
    images: int | None = None,
    steps: int | None = None,
    guidance_scale: float | None = None,
    seed: int | None = None,
    reference: Path | None = None,
    group_images: int | None = None,
    respect_words: bool = False,
) -> None:
    """Evaluate the base, then what changes it on the same noise; write reports, print the table."""
    from dataclasses import asdict, replace

    from diffusers_fair.backends.registry import load_base, load_judges
    from diffusers_fair.baselines import baseline as named
    from diffusers_fair.evaluation.evaluate import evaluate as measure
    from diffusers_fair.evaluation.evaluate import with_groups
    from diffusers_fair.loading import load_fair_adapter
    from diffusers_fair.reports.obedience import warning
    from diffusers_fair.reports.report import Report, require_free
    from diffusers_fair.reports.table import table

    require_free(out)
    if adapter is not None and baseline is not None:
        raise ValueError("an --adapter and a --baseline are measured one at a time: leave one out")
    alone = adapter is None and baseline is None
    if reference is not None and alone:
        raise ValueError(
            "a reference is what an adapter is compared with: name an --adapter or a --baseline"
        )
    _check_respect_words(respect_words, adapter)
    method: Any = None if baseline is None else named(baseline)
    asked = _asked(base, recipe)
    section = asked.section
    chosen = _attributes(attributes, adapter, asked.known, asked.usual)
    groups = () if group_images is None else _groups(asked, chosen, adapter, texts, group_images)
    pipe = load_base(base)
    model: dict[str, Any] = {"base": base, "recipe": recipe}
    options: dict[str, Any] = {
        "judges": load_judges(section.models, chosen, pipe.device, asked.people),
        "images_per_prompt": section.images_per_prompt if images is None else images,
        "steps": section.steps if steps is None else steps,
        "guidance_scale": guidance_scale or section.guidance_scale,
        "seed": section.seed if seed is None else seed,
    }
    if reference is None:
        folder = out if alone else out / "base"
        before = measure(pipe, texts, chosen, groups=groups, out=folder, model=model, **options)
    else:
        before = Report.load(reference).of(chosen, options["images_per_prompt"])
        same = {key: value for key, value in options.items() if key != "judges"}
        before.settings.check_same_noise(replace(before.settings, prompts=tuple(texts), **same))
        before = with_groups(before, pipe, groups, judges=options["judges"], out=out)
    if alone:
        _show(table(before), out)
        return
    if adapter is not None:
        respect: dict[str, Any] = {"respect_words": True} if respect_words else {}
        load_fair_adapter(pipe, adapter, **respect)
        model |= {"adapter": adapter, "adapter weights": _digest(adapter), **respect}
    else:
        pipe = method.apply(pipe, _task(asked, chosen, pipe.device, options))
        model |= {"baseline": baseline, "hyperparameters": asdict(method)}
    options |= {"reference": before, "label": baseline, "out": out}
    after = measure(pipe, texts, chosen, groups=groups, model=model, **options)
    _show(table(before, after), out, warning(after.shortfalls(before), after.label))


def _groups(
    asked: "_Asked", attributes: list[Any], adapter: str | None, texts: list[str], images: int
) -> Any:
    """Prompts that leave nothing to change, in words of training and in others.

    Words of training are those of the prompts that the adapter's recipe keeps; without an adapter,
    those that --recipe keeps.
    """
    from diffusers_fair.adapters.io import read_adapter
    from diffusers_fair.loading import local_folder
    from diffusers_fair.prompts.groups import evaluation_groups
    from diffusers_fair.prompts.training_words import kept_sets, mark_unseen
    from diffusers_fair.prompts.wording import attribute_sections, recipe_wording

    own, kept, balanced = list[Any](), asked.kept, {section["name"] for section in asked.sections}
    if adapter is not None:
        info = read_adapter(local_folder(adapter))[0]
        own, kept = attribute_sections(info.recipe), kept_sets(info.recipe)
        balanced = {attribute.name for attribute in info.attributes}
    wordings = []
    for attribute in attributes:
        is_trained = bool(own and kept) and attribute.name in balanced
        sections = own if is_trained else [*own, *asked.sections]
        wordings.append(recipe_wording(attribute, sections))
    made = evaluation_groups(texts, wordings, untouched=asked.untouched, images_per_prompt=images)
    return mark_unseen(made, kept, balanced)


def _audit(images: str, recipe: str | None, out: Path, attributes: list[str] | None) -> None:
    """Look at the pictures of a folder; write the report, print the table."""
    from diffusers_fair.backends.registry import load_judges
    from diffusers_fair.evaluation.evaluate import audit
    from diffusers_fair.reports.report import require_free
    from diffusers_fair.reports.table import table

    require_free(out)
    if recipe is None:
        raise ValueError(
            f"the pictures in '{images}' need models that look at them: name a recipe that has "
            "them with --recipe (for pictures by the testbed, one of its own)"
        )
    asked = _asked("", recipe)
    chosen = _attributes(attributes, None, asked.known, asked.usual)
    judges = load_judges(asked.section.models, chosen, people=asked.people)
    report = audit(images, chosen, judges=judges, out=out, model={"recipe": recipe})
    _show(table(report), out)


def _show(grid: Any, out: Path, warned: str = "") -> None:
    """Print a report's table and a warning, once however many processes there are."""
    from diffusers_fair import distributed

    if distributed.rank() == 0:
        console.print(grid)
        if warned:
            _say(f"Warning: {warned}")
        console.print(f"report in {out}")


def _digest(adapter: str) -> str:
    """Of an adapter's weights, which may change while its name stays."""
    from hashlib import sha256

    from diffusers_fair.loading import local_folder

    files = sorted(Path(local_folder(adapter)).glob("*.safetensors"))
    return sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


@dataclass(frozen=True)
class _Asked:
    """What an evaluation measures and how, unless the command says otherwise."""

    section: Any
    """A recipe's `evaluation`."""
    known: dict[str, Any]
    """Name -> attribute, of those that may be counted."""
    usual: list[str]
    """Of them, those that are."""
    prompts: list[str]
    """Names of prompt sets."""
    train: str
    """Their split for training."""
    models: Any
    """What looks at images in training."""
    sections: list[dict[str, Any]]
    """A recipe's attributes as JSON has them, with the words that ask for their classes."""
    untouched: str
    """Prompt set of prompts that show nobody."""
    people: Any = "largest"
    """Which faces of an image count."""
    kept: frozenset[str] = frozenset()
    """Names of the prompt sets that a recipe keeps by `prompts.keep`."""


def _asked(base: str, recipe: str | None) -> _Asked:
    """The recipe's, or the testbed's."""
    from diffusers_fair import testbed
    from diffusers_fair.backends.registry import untouched_set
    from diffusers_fair.config.models import ModelsSection
    from diffusers_fair.config.schema import EvaluationSection, RunConfig
    from diffusers_fair.prompts.training_words import kept_sets
    from diffusers_fair.testbed import world

    empty = untouched_set(base)
    if recipe is not None:
        config = RunConfig.load(recipe)
        known = {attribute.name: attribute for attribute in config.balanced()}
        root = config.model_dump(mode="json")
        told, kept = root["attributes"], kept_sets(root)
        sets, train = list(config.prompts.sets), config.prompts.train
        models, people = config.models, config.people
        return _Asked(
            config.evaluation, known, list(known), sets, train, models, told, empty, people, kept
        )
    if base != testbed.NAME:
        raise ValueError(
            f"'{base}' needs models that look at its images: name a recipe that has them with "
            "--recipe"
        )
    section = EvaluationSection(steps=20, guidance_scale=testbed.GUIDANCE)
    known = world.ATTRIBUTES
    told = [
        {"name": a.name, "words": {c: world.WORDS[c] for c in a.classes}} for a in known.values()
    ]
    sets = ["testbed-occupations"]
    return _Asked(section, known, list(known)[:1], sets, "train", ModelsSection(), told, empty)


def _task(asked: _Asked, attributes: list[Any], device: Any, options: dict[str, Any]) -> Any:
    """What a rival method is told."""
    from diffusers_fair.backends.registry import load_judges
    from diffusers_fair.baselines import Task
    from diffusers_fair.prompts import prompt_set
    from diffusers_fair.prompts.wording import recipe_wording

    return Task(
        wordings=[recipe_wording(attribute, asked.sections) for attribute in attributes],
        prompts=[p for name in asked.prompts for p in prompt_set(name).prompts(asked.train)],
        judges=lambda: load_judges(asked.models, attributes, device, asked.people),
        steps=options["steps"],
        guidance_scale=options["guidance_scale"],
        seed=options["seed"],
    )


def _attributes(
    names: list[str] | None, adapter: str | None, known: dict[str, Any], usual: list[str]
) -> list[Any]:
    """The attributes asked for; else the adapter's own; else the usual ones."""
    from diffusers_fair.adapters.io import read_adapter
    from diffusers_fair.loading import local_folder

    if names is None and adapter is not None:
        return list(read_adapter(local_folder(adapter))[0].attributes)
    unknown = [name for name in names or () if name not in known]
    if unknown:
        raise ValueError(f"unknown attribute '{unknown[0]}': expected one of {', '.join(known)}")
    return [known[name] for name in names or usual]


def _entry(word: str) -> Any:
    """A report to compare, named as in `group/ours=reports/ours`, or by its own label."""
    from diffusers_fair.reports.comparison import Entry
    from diffusers_fair.reports.report import Report

    name, found, folder = word.partition("=")
    if not found or Path(word).exists():  # a folder may have = in its name
        name, folder = "", word
    report = Report.load(folder)
    group, _, label = name.rpartition("/")
    return Entry(label=label or report.label, report=report, group=group)


def _slug(text: str) -> str:
    """A file name that tells the prompt."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:60] or "empty"
