"""The command `diffusers-fair`."""

import errno
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from diffusers_fair import strict_json
from diffusers_fair.paths import expand, require_writable
from diffusers_fair.training.stopping import TrainingStoppedError

if TYPE_CHECKING:
    from diffusers_fair.assess import Assessment
    from diffusers_fair.reports.comparison import Entry

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Train, evaluate, share and load fairness adapters for Hugging Face diffusers.",
)
console = Console()
classifier = typer.Typer(no_args_is_help=True, help="Train a classifier of your own.")
app.add_typer(classifier, name="classifier")

Base = Annotated[str, typer.Option(help="`testbed`, a Hub id or a folder.")]
Adapter = Annotated[str | None, typer.Option(help="Adapter folder or Hub id.")]
DEMO_IMAGES = 2  # per control prompt
RespectWords = Annotated[
    bool,
    typer.Option(
        "--respect-words",
        help="Disable the adapter for prompts that name a class it balances.",
    ),
]


def _folder(text: str) -> Path:
    if not text:
        raise typer.BadParameter("expected a folder, got an empty text")
    return expand(text)


def _number_or_folder(text: str) -> int | Path:
    if re.fullmatch("[0-9]+", text) and int(text) > 0:
        return int(text)
    if (folder := expand(text)).is_dir():
        return folder
    raise typer.BadParameter(
        f"expected a number of images, 1 or more, or a folder of images, got '{text}'"
    )


Out = Annotated[Path, typer.Option(parser=_folder, metavar="DIRECTORY", help="Folder to write to.")]


@app.command()
def demo(
    out: Out = Path("runs/demo"),
    images: Annotated[int, typer.Option(min=1, help="Images per prompt.")] = 20,
) -> None:
    """Train on the testbed, evaluate before and after, and write a report: minutes on a laptop.

    Evaluates half of the test prompts, with fewer images than a full evaluation. The noise floor
    printed below each bias is for that number of images.
    """
    from diffusers_fair.assess import assess
    from diffusers_fair.prompts import prompt_set
    from diffusers_fair.reports.folder import require_free

    require_free(out / "report")
    folder = _train("testbed-demo", [f"output={out}"])
    assessment = assess(
        "testbed",
        adapter=str(folder / "adapter"),
        out=out / "report",
        prompts=prompt_set("testbed-occupations").prompts("test")[::2],
        images_per_prompt=images,
        group_images=DEMO_IMAGES,
    )
    _show_assessment(assessment, out / "report")


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(help="A YAML file, or the name of a shipped recipe.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="key=value", help="Recipe values to override; `recipes --keys` lists them."
        ),
    ] = None,
) -> None:
    """Train an adapter from a recipe, or resume a run that was stopped."""
    _train(recipe, overrides or [])


@app.command()
def doctor(
    recipe: Annotated[str, typer.Argument(help="A YAML file, or the name of a shipped recipe.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="key=value", help="Recipe values to override; `recipes --keys` lists them."
        ),
    ] = None,
) -> None:
    """List what a recipe requires, and what of it is missing; downloads nothing."""
    from diffusers_fair.config.schema import RunConfig
    from diffusers_fair.doctor import examine

    found = examine(RunConfig.load(recipe, overrides or []))
    for need, parts in found.items():
        state = "ok     " if need.available else "missing"
        advice = "" if need.available else f"\n         {need.advice}"
        text = f"{state}  {need.what}  (for {', '.join(parts)}){advice}"
        console.print(text, markup=False, highlight=False, soft_wrap=True)
    size = sum(need.size for need in found) / 1e9
    console.print(f"weights on this machine: {size:.1f} GB", highlight=False)
    gaps = [need for need in found if not need.available]
    if gaps:
        raise ValueError(f"recipe '{recipe}': {len(gaps)} requirements are missing, see above")


@classifier.command("train")
def classifier_train(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="IMAGEFOLDER_OR_PARQUET",
            help="A folder with a subfolder of images for each class, a parquet file, or a folder "
            "of parquet files. The images should be square, 1.5 times as wide as the face.",
        ),
    ],
    out: Out,
    label: Annotated[str, typer.Option(help="Label column of parquet files.")] = "label",
    size: Annotated[int, typer.Option(help="Side of the images, in pixels.")] = 224,
    epochs: Annotated[int, typer.Option(help="Number of epochs.")] = 5,
    batch_size: Annotated[int, typer.Option(help="Images per update.")] = 64,
    lr: Annotated[float, typer.Option(help="Initial learning rate.")] = 1e-3,
    held_out: Annotated[
        float, typer.Option(help="Fraction of the images held out to measure the accuracy.")
    ] = 0.1,
    seed: Annotated[int, typer.Option(help="Random seed.")] = 0,
    pretrained: Annotated[bool, typer.Option(help="Start from ImageNet weights.")] = True,
) -> None:
    """Train a classifier of one attribute on labelled images of faces, and print its accuracy."""
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
    grid = Table("true class, classified as", *facts["classes"])
    for name, row in zip(facts["classes"], facts["confusion"], strict=True):
        grid.add_row(name, *map(str, row))
    console.print(grid)
    held = facts["pictures"]["held out"]
    console.print(f"accuracy {facts['accuracy']:.3f} on {held} held-out images")
    console.print(f"classifier in {out}; in a recipe: checkpoint:{out}", highlight=False)


@app.command()
def evaluate(
    base: Base = "testbed",
    adapter: Adapter = None,
    baseline: Annotated[
        str | None,
        typer.Option(
            help="Evaluate a published method instead of an adapter: attribute-words, "
            "ethical-intervention, debias-vl, uce, concept-algebra or fair-diffusion. If it has to "
            "be fitted, that uses the training prompts and the training models."
        ),
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            help="Recipe whose evaluation.models judge the images; required unless the base is the "
            "testbed. It also gives the defaults of the options below."
        ),
    ] = None,
    out: Out = Path("reports/evaluation"),
    attribute: Annotated[
        list[str] | None,
        typer.Option(
            help="Attribute to measure; may be repeated. Default: those that the adapter balances."
        ),
    ] = None,
    prompts: Annotated[
        str | None,
        typer.Option(
            help="A packaged prompt set, or a text file with one prompt per line. Default: the "
            "recipe's prompt sets, or testbed-occupations."
        ),
    ] = None,
    split: Annotated[
        str | None,
        typer.Option(help="Split of the prompt set. Default: the recipe's split, or test."),
    ] = None,
    images: Annotated[
        Any | None,
        typer.Option(
            parser=_number_or_folder,
            metavar="NUMBER_OR_DIR",
            help="Images per prompt; default: the recipe's number, or 60. Or a folder of existing "
            "images to evaluate, with a subfolder for each prompt. The prompt is the text of the "
            "subfolder's prompt.txt, or else its name.",
        ),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(min=1, help="Scheduler steps. Default: the recipe's number, or 20."),
    ] = None,
    guidance_scale: Annotated[
        float | None,
        typer.Option(min=0, help="Guidance scale. Default: the recipe's, or 4.5 for the testbed."),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(min=0, help="Random seed of the noise. Default: the recipe's seed, or 0."),
    ] = None,
    reference: Annotated[
        Path | None,
        typer.Option(
            help="Existing report of the base model, to be used instead of evaluating it again. It "
            "must have the same prompts, seed, steps and guidance scale, and at least as many "
            "images. Only missing control prompts are added."
        ),
    ] = None,
    groups: Annotated[
        bool,
        typer.Option(
            "--groups/--no-groups",
            help="Also evaluate control prompts: whether images show the class that a prompt "
            "names, and whether prompts without people stay unchanged. Not available for a folder "
            "of --images.",
        ),
    ] = True,
    group_images: Annotated[int, typer.Option(help="Images per control prompt.")] = 4,
    respect_words: RespectWords = False,
) -> None:
    """Evaluate a base model, and an adapter or a baseline against it, on unseen prompts.

    Run the same command again to resume an evaluation that was stopped. To share the work among
    several processes: accelerate launch -m diffusers_fair evaluate ...
    """
    from diffusers_fair.assess import EvaluationDefaults, assess, assess_images
    from diffusers_fair.reports.table import table

    if group_images < 1:
        raise ValueError(
            f"--group-images must be 1 or more, got {group_images}: to skip the control prompts, "
            "use --no-groups"
        )
    if isinstance(images, Path):
        if respect_words or {adapter, baseline, reference, prompts} != {None}:
            raise ValueError(
                f"--images '{images}' is a folder of existing images: leave out --adapter, "
                "--baseline, --reference, --prompts and --respect-words, or give a number of "
                "images"
            )
        report = assess_images(images, out=out, recipe=recipe, attributes=attribute)
        _show(table(report), out)
        return
    assessment = assess(
        base,
        out=out,
        adapter=adapter,
        baseline=baseline,
        recipe=recipe,
        prompts=EvaluationDefaults.of(base, recipe).prompts(prompts, split),
        attributes=attribute,
        images_per_prompt=images,
        steps=steps,
        guidance_scale=guidance_scale,
        seed=seed,
        reference=reference,
        group_images=group_images if groups else None,
        respect_words=respect_words,
    )
    _show_assessment(assessment, out)


@app.command()
def compare(
    reports: Annotated[
        list[str],
        typer.Argument(
            metavar="[[GROUP/]LABEL=]REPORT...",
            help="Report folders with the same prompts and equal numbers of images. The best value "
            "of each group is marked.",
        ),
    ],
    out: Out = Path("reports/comparison"),
    against: Annotated[
        str | None,
        typer.Option(
            help="Label of the report that all others are tested against. Default: the first."
        ),
    ] = None,
) -> None:
    """Compare reports side by side: an HTML page, a Markdown table, and all metrics in JSON."""
    from diffusers_fair.reports.comparison import compare as side_by_side
    from diffusers_fair.reports.folder import save_comparison

    save_comparison(side_by_side([_entry(word) for word in reports], against), out)
    console.print(f"comparison in {out}")


@app.command()
def generate(
    prompt: Annotated[list[str], typer.Argument(help="Prompts.")],
    base: Base = "testbed",
    adapter: Adapter = None,
    out: Out = Path("images"),
    images: Annotated[int, typer.Option(min=1, help="Images per prompt.")] = 4,
    steps: Annotated[int, typer.Option(min=1, help="Scheduler steps.")] = 20,
    guidance_scale: Annotated[
        float | None,
        typer.Option(min=0, help="Guidance scale. Default: 4.5 for the testbed, 7.5 otherwise."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Random seed of the noise.")] = 0,
    respect_words: RespectWords = False,
) -> None:
    """Generate images with or without an adapter."""
    from PIL import Image

    from diffusers_fair.backends.registry import usual_guidance
    from diffusers_fair.evaluation.checks import check_sampling
    from diffusers_fair.evaluation.generate import generate as sample
    from diffusers_fair.vision.images import to_arrays

    sampling: dict[str, Any] = {
        "images_per_prompt": images,
        "steps": steps,
        "guidance_scale": usual_guidance(base) if guidance_scale is None else guidance_scale,
        "seed": seed,
    }
    check_sampling(**sampling)
    require_writable(out)
    pipe = _pipeline(base, adapter, respect_words)
    out.mkdir(parents=True, exist_ok=True)
    for batch in sample(pipe, prompt, batch_size=min(24, images), progress=True, **sampling):
        for image, i, j in zip(to_arrays(batch.images), batch.prompt, batch.image, strict=True):
            file = out / f"{_slug(prompt[int(i)])}-{int(j):03d}.png"
            Image.fromarray(image).save(file)
    console.print(f"{len(prompt) * images} images in {out}")


@app.command()
def push(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Adapter folder.")],
    repo_id: Annotated[str, typer.Argument(help="`user-or-organisation/name`.")],
    private: Annotated[
        bool, typer.Option("--private", help="If the repository is new, make it private.")
    ] = False,
    revision: Annotated[
        str | None, typer.Option(help="Branch to commit to, or refs/pr/N to add to a pull request.")
    ] = None,
    pull_request: Annotated[
        bool, typer.Option("--pull-request", help="Open a pull request instead of committing.")
    ] = False,
    message: Annotated[str | None, typer.Option(help="Commit message.")] = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="List what would be uploaded; do not contact the Hub."),
    ] = False,
    token: Annotated[
        str | None,
        typer.Option(help="Access token. Default: HF_TOKEN, or the token of `hf auth login`."),
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
        _say(f"dry run: nothing was pushed to {repo_id}")
    else:
        _say(done.url or f"nothing to push: {repo_id} is up to date")


def _say(text: str) -> None:
    """Print a line without wrapping or markup."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


@app.command()
def inspect(
    adapter: Annotated[
        str, typer.Argument(metavar="DIR_OR_REPO", help="Adapter folder or Hub id.")
    ],
) -> None:
    """Print an adapter's metadata and number of parameters, without loading a model."""
    from dataclasses import asdict

    from diffusers_fair.adapters.folder import read_adapter
    from diffusers_fair.loading import local_folder

    info, weights = read_adapter(local_folder(adapter))
    facts: dict[str, Any] = asdict(info)
    facts["parameters"] = sum(weight.numel() for weight in weights.values())
    console.print_json(strict_json.dumps(facts))


@app.command()
def card(
    adapter: Annotated[Path, typer.Argument(metavar="DIR", help="Adapter folder.")],
    report: Annotated[
        Path | None,
        typer.Option(help="Report folder. Default: the summary stored with the adapter."),
    ] = None,
) -> None:
    """Write the model card of an adapter, README.md in its folder, from its evaluation report."""
    from diffusers_fair.publishing.card import write_card

    console.print(f"card in {write_card(adapter, report)}", highlight=False)


@app.command()
def recipes(
    keys: Annotated[
        bool, typer.Option("--keys", help="List all recipe keys instead, with their defaults.")
    ] = False,
) -> None:
    """List the shipped recipes, or all recipe keys with their documentation."""
    if keys:
        _show_recipe_keys()
        return
    from diffusers_fair.config.recipe import RECIPES
    from diffusers_fair.config.recipe import recipes as shipped

    for name in shipped():
        summary = (RECIPES / f"{name}.yaml").read_text("utf-8").splitlines()[0].lstrip("# ")
        console.print(f"{name}  [dim]{summary}[/dim]", highlight=False)


def _show_recipe_keys() -> None:
    from textwrap import fill

    from diffusers_fair.config.keys import recipe_keys

    _say(
        "In the keys below, 0 stands for any position in a list, and NAME for a name you choose.\n"
    )
    for key in recipe_keys():
        heading = f"{key.path}:" if key.is_section else f"{key.path}  ({key.default})"
        _say(heading)
        _say(fill(key.documentation, 96, initial_indent="    ", subsequent_indent="    "))


def main() -> None:
    """Run the command line, and exit.

    Exit codes: 0 success; 2 invalid input, with a message of one sentence; 143 training stopped by
    SIGTERM, which can be resumed; 1 any other error.
    """
    try:
        if app(standalone_mode=False):  # interrupted
            sys.exit(1)
    except typer.Abort:
        sys.exit(1)
    except TrainingStoppedError as stop:
        sys.stderr.write(f"diffusers-fair: {stop}\n")
        sys.exit(stop.code)
    except Exception as error:
        sentence = _sentence(error)
        if sentence is None:
            raise
        if sentence:  # empty after the help that a command without arguments prints
            sys.stderr.write(f"diffusers-fair: {sentence}\n")
        sys.exit(2)


def _sentence(error: Exception) -> str | None:
    """Describe an error that is due to the user's input; None for any other error."""
    from typer._click.exceptions import ClickException

    if isinstance(error, ClickException):
        return error.format_message()  # names the option
    if isinstance(error, ValueError | ModuleNotFoundError):
        return str(error)
    if isinstance(error, OSError) and (error.filename or error.errno == errno.ENOSPC):
        where = f"'{error.filename}'" if error.filename else "a file"
        return f"cannot read or write {where}: {error.strerror}; choose another path, or mend it"
    return None


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
        raise ValueError("--respect-words needs an adapter: name one with --adapter")


def _show_assessment(assessment: "Assessment", out: Path) -> None:
    from diffusers_fair.reports.table import table

    _show(table(assessment.base, assessment.changed), out, assessment.warning)


def _show(grid: Any, out: Path, warning: str = "") -> None:
    """Print a report's table and a warning, from the main process."""
    from diffusers_fair import distributed

    if distributed.is_main():
        console.print(grid)
        if warning:
            _say(f"Warning: {warning}")
        console.print(f"report in {out}")


def _entry(word: str) -> "Entry":
    """Load a report to compare from `[[GROUP/]LABEL=]REPORT`; without LABEL, its own label."""
    from diffusers_fair.reports.comparison import Entry
    from diffusers_fair.reports.folder import load_report

    name, separator, folder = word.partition("=")
    if not separator or expand(word).exists():  # a folder may have = in its name
        name, folder = "", word
    report = load_report(folder)
    group, _, label = name.rpartition("/")
    return Entry(label=label or report.label, report=report, group=group)


def _slug(text: str) -> str:
    """Turn a prompt into a file name."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:60] or "empty"
