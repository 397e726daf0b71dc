"""The commands that train, and those that prepare a training."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from diffusers_fair.cli.app import Resumable, app, console, resumable, say, show_assessment
from diffusers_fair.cli.options import Device, Out, Overrides, Recipe
from diffusers_fair.paths import expand
from diffusers_fair.training.stopping import StoppedError

if TYPE_CHECKING:
    from diffusers_fair.setup import Plan

classifier = typer.Typer(no_args_is_help=True, help="Train a classifier of your own.")
app.add_typer(classifier, name="classifier")

DEMO_IMAGES = 2  # per control prompt


@app.command(cls=Resumable)
def demo(
    out: Out = Path("runs/demo"),
    images: Annotated[int, typer.Option(min=1, metavar="INT", help="Images per prompt.")] = 20,
    device: Device = "auto",
) -> None:
    """Train on the testbed, evaluate before and after, and write a report: minutes on a laptop.

    Evaluates half of the test prompts, with fewer images than a full evaluation. The noise floor
    printed below each bias is for that number of images.
    """
    from diffusers_fair.assess import assess
    from diffusers_fair.prompts import prompt_set
    from diffusers_fair.reports.folder import require_free

    require_free(out / "report")
    folder = _train("testbed-demo", [f"output={out}", f"train.device={device}"])
    assessment = assess(
        "testbed",
        adapter=str(folder / "adapter"),
        out=out / "report",
        recipe="testbed-demo",
        prompts=prompt_set("testbed-occupations").prompts("test")[::2],
        images_per_prompt=images,
        group_images=DEMO_IMAGES,
        device=device,
    )
    show_assessment(assessment, out / "report")


@app.command()
def train(
    recipe: Recipe,
    overrides: Overrides = None,
) -> None:
    """Train an adapter from a recipe, or resume a run that was stopped."""
    _train(recipe, overrides or [])


def _train(recipe: str, overrides: list[str]) -> Path:
    from diffusers_fair.config.schema import RunConfig
    from diffusers_fair.training.run_folder import check_run_folder
    from diffusers_fair.training.tracking import require_tracker
    from diffusers_fair.training.trainer import FairnessFinetuner

    config = RunConfig.load(recipe, overrides)
    require_tracker(config.tracker)
    check_run_folder(config)  # before any model is loaded
    with resumable(expand(config.output)):
        folder = FairnessFinetuner(config).train()
    from diffusers_fair import distributed

    if distributed.is_main():
        say(f"adapter in {folder / 'adapter'}")
    return folder


@app.command()
def doctor(
    recipe: Recipe,
    overrides: Overrides = None,
) -> None:
    """List what a recipe requires, and what of it is missing; downloads nothing."""
    from diffusers_fair.config.schema import RunConfig
    from diffusers_fair.doctor import examine, notes

    config = RunConfig.load(recipe, overrides or [])
    found = examine(config)
    for need, parts in found.items():
        state = "ok     " if need.available else "missing"
        advice = "" if need.available else f"\n         {need.advice}"
        say(f"{state}  {need.what}  (for {', '.join(parts)}){advice}")
    for note in notes(config):
        say(note)
    size = sum(need.size for need in found) / 1e9
    say(f"weights on this machine: {size:.1f} GB")
    gaps = [need for need in found if not need.available]
    if gaps:
        fetched = sum(need.source is not None for need in gaps)
        by_setup = f"; `diffusers-fair setup` fetches {fetched} of them" if fetched else ""
        raise ValueError(
            f"recipe '{recipe}': {len(gaps)} requirements are missing, see above{by_setup}"
        )


@app.command()
def setup(
    recipe: Recipe,
    overrides: Overrides = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask before downloading.")] = False,
) -> None:
    """Download the models that a recipe requires, and train its classifiers on public data.

    First lists the downloads, with size and licence, and the trainings, with an estimate of their
    duration. Run the same command again to continue a setup that was stopped.
    """
    from diffusers_fair.config.schema import RunConfig
    from diffusers_fair.doctor import notes
    from diffusers_fair.setup import plan

    config = RunConfig.load(recipe, overrides or [])
    planned = plan(config)
    if planned.downloads or planned.trainings:
        for note in notes(config):
            say(note)
        _show_plan(planned)
        planned.check_disk()
        if not yes and not _confirm("Continue?"):
            raise StoppedError("nothing was downloaded")
        planned.run()
    doctor(recipe, overrides)
    say(f"ready: diffusers-fair train {shlex.join([recipe, *(overrides or [])])}")


def _show_plan(planned: "Plan") -> None:
    for download, keys in planned.downloads.items():
        size = _gigabytes(download.size)
        say(f"download  {size}  {download.name}, {download.licence}  (for {', '.join(keys)})")
    say(f"in all    {_gigabytes(planned.size)}")
    for x in planned.trainings:
        images = "an unknown number of" if x.images is None else f"{x.images:,}"
        say(
            f"train     classifier '{x.training.folder}' on {images} images of {x.training.data}, "
            f"{_duration(x.seconds)}"
        )


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:7.3f} GB"


def _duration(seconds: float | None) -> str:
    """Express an estimate in minutes."""
    if seconds is None:
        return "for an unknown time"
    return f"about {max(1, round(seconds / 60))} min on this machine (an estimate)"


def _confirm(question: str) -> bool:
    """Ask for permission on the terminal."""
    try:
        return typer.confirm(question)
    except typer.Abort:
        raise ValueError(
            "setup asks before it downloads, but got no answer: answer y, or use --yes"
        ) from None


@classifier.command("train", cls=Resumable)
def classifier_train(
    source: Annotated[
        str,
        typer.Argument(
            metavar="IMAGES",
            help="A folder with a subfolder of images for each class, a parquet file, a folder of "
            "parquet files, or a data set of parquet files on the Hub: hf:ORG/NAME, "
            "hf:ORG/NAME/CONFIG or hf:ORG/NAME/CONFIG/SPLIT (default: the only configuration, and "
            "its split train). The images should be square, 1.5 times as wide as the face.",
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
    device: Annotated[
        str,
        typer.Option(
            help="auto, cuda, cuda:N, mps or cpu. auto: the GPU of the process, else MPS, else the "
            "CPU.",
        ),
    ] = "auto",
    dtype: Annotated[
        str,
        typer.Option(
            help="Data type of the computation, not of the weights: auto, float32, bfloat16 or "
            "float16. auto: bfloat16 if the device is fast in it, else float32.",
        ),
    ] = "float32",
) -> None:
    """Train a classifier of one attribute on labelled images of faces, and print its accuracy."""
    from rich.table import Table

    from diffusers_fair.training.classifier import Settings, train_classifier
    from diffusers_fair.training.labelled_images import read_images

    settings = Settings(
        size=size,
        epochs=epochs,
        batch_size=batch_size,
        lr=lr,
        held_out=held_out,
        seed=seed,
        pretrained=pretrained,
        dtype=dtype,
    )
    facts = train_classifier(read_images(source, label), out, settings, device)
    grid = Table("true class, classified as", *facts["classes"])
    for name, row in zip(facts["classes"], facts["confusion"], strict=True):
        grid.add_row(name, *map(str, row))
    console.print(grid)
    held = facts["pictures"]["held out"]
    say(f"accuracy {facts['accuracy']:.3f} on {held} held-out images")
    say(f"classifier in {out}; in a recipe: checkpoint:{out}")


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
    from rich.text import Text

    from diffusers_fair.config.recipe import RECIPES
    from diffusers_fair.config.recipe import recipes as shipped

    for name in shipped():
        summary = (RECIPES / f"{name}.yaml").read_text("utf-8").splitlines()[0].lstrip("# ")
        console.print(Text.assemble(name, "  ", (summary, "dim")), soft_wrap=True)


def _show_recipe_keys() -> None:
    from textwrap import fill

    from diffusers_fair.config.keys import recipe_keys

    say("In the keys below, 0 stands for any position in a list, and NAME for a name you choose.\n")
    for key in recipe_keys():
        heading = f"{key.path}:" if key.is_section else f"{key.path}  ({key.default})"
        say(heading)
        say(fill(key.documentation, 96, initial_indent="    ", subsequent_indent="    "))
