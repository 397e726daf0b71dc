"""The command `diffusers-fair`."""

import errno
import re
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperCommand, TyperGroup

from diffusers_fair import strict_json
from diffusers_fair.paths import expand, require_writable
from diffusers_fair.training.stopping import StoppedError, Terminated, exit_code, raise_on_sigterm

if TYPE_CHECKING:
    from diffusers_fair.assess import Assessment
    from diffusers_fair.reports.comparison import Entry
    from diffusers_fair.setup import Plan


class _Commands(TyperGroup):
    """Turns Ctrl-C and SIGTERM into one sentence on how to go on, and their exit codes."""

    def invoke(self, ctx: Any) -> Any:
        """Invoke the command."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as stop:
            number = signal.SIGTERM if isinstance(stop, Terminated) else signal.SIGINT
            message = str(stop) or "stopped"
            raise StoppedError(
                f"{message}: give the same command again to go on", exit_code(number)
            ) from stop


class _Resumable(TyperCommand):
    """A command that resumes what it finds in its folder `--out`."""

    def invoke(self, ctx: Any) -> Any:
        """Invoke the command."""
        with _resumable(Path(ctx.params["out"])):
            return super().invoke(ctx)


@contextmanager
def _resumable(folder: Path) -> Iterator[None]:
    """If the user stops the command, say where its work is."""
    try:
        yield
    except KeyboardInterrupt as stop:
        if not stop.args and folder.exists():
            stop.args = (f"stopped, with what was finished in '{folder}'",)
        raise


app = typer.Typer(
    cls=_Commands,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Train, evaluate, share and load fairness adapters for Hugging Face diffusers.",
)
console = Console(markup=False, highlight=False)  # what it prints is data
classifier = typer.Typer(no_args_is_help=True, help="Train a classifier of your own.")
app.add_typer(classifier, name="classifier")

Base = Annotated[
    str, typer.Option(help="`testbed`, a Hub id, a folder or a single .safetensors file.")
]
Adapter = Annotated[str | None, typer.Option(help="Adapter folder or Hub id.")]
DEMO_IMAGES = 2  # per control prompt
RespectWords = Annotated[
    bool,
    typer.Option(
        "--respect-words",
        help="Disable the adapter for prompts that name a class it balances.",
    ),
]
Device = Annotated[
    str,
    typer.Option(
        help="auto, cuda, cuda:N, mps or cpu. auto: the GPU of the process, else MPS, else the "
        "CPU; for the testbed the CPU.",
    ),
]
Dtype = Annotated[
    str | None,
    typer.Option(
        help="Data type of the base model: auto, float32, bfloat16 or float16. auto: bfloat16 if "
        "the device is fast in it, else float32. Default: the recipe's; without a recipe float32 "
        "for the testbed, and auto otherwise.",
    ),
]
Revision = Annotated[
    str | None,
    typer.Option(
        help="Commit, tag or branch of the base model on the Hub. Default: the recipe's, if it has "
        "the same base model."
    ),
]
AdapterRevision = Annotated[
    str | None, typer.Option(help="Commit, tag or branch of the adapter on the Hub.")
]
BatchSize = Annotated[
    int | None,
    typer.Option(
        min=1,
        metavar="INT",
        help="Images processed together. Default: 24 or, on a GPU, fewer if so many do not fit its "
        "memory.",
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


@app.command(cls=_Resumable)
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
        prompts=prompt_set("testbed-occupations").prompts("test")[::2],
        images_per_prompt=images,
        group_images=DEMO_IMAGES,
        device=device,
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
    from diffusers_fair.doctor import examine, notes

    config = RunConfig.load(recipe, overrides or [])
    found = examine(config)
    for need, parts in found.items():
        state = "ok     " if need.available else "missing"
        advice = "" if need.available else f"\n         {need.advice}"
        _say(f"{state}  {need.what}  (for {', '.join(parts)}){advice}")
    for note in notes(config):
        _say(note)
    size = sum(need.size for need in found) / 1e9
    _say(f"weights on this machine: {size:.1f} GB")
    gaps = [need for need in found if not need.available]
    if gaps:
        fetched = sum(need.source is not None for need in gaps)
        by_setup = f"; `diffusers-fair setup` fetches {fetched} of them" if fetched else ""
        raise ValueError(
            f"recipe '{recipe}': {len(gaps)} requirements are missing, see above{by_setup}"
        )


@app.command()
def setup(
    recipe: Annotated[str, typer.Argument(help="A YAML file, or the name of a shipped recipe.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="key=value", help="Recipe values to override; `recipes --keys` lists them."
        ),
    ] = None,
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
    for note in notes(config):
        _say(note)
    if planned.downloads or planned.trainings:
        _show_plan(planned)
        planned.check_disk()
        if not yes and not _confirm("Continue?"):
            _say("nothing was downloaded")
            raise typer.Exit(1)
        planned.run()
    doctor(recipe, overrides)
    _say(f"ready: diffusers-fair train {' '.join([recipe, *(overrides or [])])}")


def _show_plan(planned: "Plan") -> None:
    for download, keys in planned.downloads.items():
        size = _gigabytes(download.size)
        _say(f"download  {size}  {download.name}, {download.licence}  (for {', '.join(keys)})")
    _say(f"in all    {_gigabytes(planned.size)}")
    for x in planned.trainings:
        images = "an unknown number of" if x.images is None else f"{x.images:,}"
        _say(
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


@classifier.command("train", cls=_Resumable)
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

    from diffusers_fair.training.classifier import Settings, read_images, train_classifier

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
    _say(f"accuracy {facts['accuracy']:.3f} on {held} held-out images")
    _say(f"classifier in {out}; in a recipe: checkpoint:{out}")


@app.command(cls=_Resumable)
def evaluate(
    base: Annotated[
        str | None,
        typer.Option(
            help="`testbed`, a Hub id, a folder or a single .safetensors file. Default: the "
            "recipe's, or the testbed."
        ),
    ] = None,
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
        typer.Option(
            min=1, metavar="INT", help="Scheduler steps. Default: the recipe's number, or 20."
        ),
    ] = None,
    guidance_scale: Annotated[
        float | None,
        typer.Option(
            min=0,
            metavar="FLOAT",
            help="Guidance scale. Default: the recipe's, or 4.5 for the testbed.",
        ),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(
            min=0, metavar="INT", help="Random seed of the noise. Default: the recipe's seed, or 0."
        ),
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
    device: Device = "auto",
    dtype: Dtype = None,
    revision: Revision = None,
    adapter_revision: AdapterRevision = None,
    batch_size: BatchSize = None,
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
        ignored = {adapter, baseline, reference, prompts, dtype, revision, adapter_revision}
        if respect_words or ignored != {None}:
            raise ValueError(
                f"--images '{images}' is a folder of existing images: leave out --adapter, "
                "--baseline, --reference, --prompts, --dtype, --revision, --adapter-revision and "
                "--respect-words, or give a number of images"
            )
        report = assess_images(
            images,
            out=out,
            recipe=recipe,
            attributes=attribute,
            device=device,
            batch_size=batch_size,
        )
        _show(table(report), out)
        return
    base = _recipe_base(recipe) if base is None else base
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
        device=device,
        dtype=dtype,
        revision=revision,
        adapter_revision=adapter_revision,
        batch_size=batch_size,
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
    _say(f"comparison in {out}")


@app.command(cls=_Resumable)
def generate(
    prompt: Annotated[list[str], typer.Argument(help="Prompts.")],
    base: Base = "testbed",
    adapter: Adapter = None,
    out: Out = Path("images"),
    images: Annotated[int, typer.Option(min=1, metavar="INT", help="Images per prompt.")] = 4,
    steps: Annotated[int, typer.Option(min=1, metavar="INT", help="Scheduler steps.")] = 20,
    guidance_scale: Annotated[
        float | None,
        typer.Option(
            min=0,
            metavar="FLOAT",
            help="Guidance scale. Default: 4.5 for the testbed, 7.5 otherwise.",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, metavar="INT", help="Random seed of the noise.")] = 0,
    respect_words: RespectWords = False,
    device: Device = "auto",
    dtype: Dtype = None,
    revision: Revision = None,
    adapter_revision: AdapterRevision = None,
    batch_size: BatchSize = None,
) -> None:
    """Generate images with or without an adapter.

    File names tell the prompt, the seed and the adapter. Images that the folder already has from
    the same command are kept, and not generated again.
    """
    from diffusers_fair.backends.registry import usual_guidance
    from diffusers_fair.evaluation.checks import check_sampling
    from diffusers_fair.evaluation.generate import generate as sample
    from diffusers_fair.evaluation.image_files import file_stems, write_image
    from diffusers_fair.vision.images import to_arrays

    sampling: dict[str, Any] = {
        "images_per_prompt": images,
        "steps": steps,
        "guidance_scale": usual_guidance(base) if guidance_scale is None else guidance_scale,
        "seed": seed,
    }
    check_sampling(**sampling)
    require_writable(out)
    pipe, digest = _pipeline(
        base,
        adapter,
        respect_words,
        device,
        dtype,
        revision=revision,
        adapter_revision=adapter_revision,
    )
    settings = [base, digest, steps, sampling["guidance_scale"], respect_words, dtype, revision]
    stems = file_stems(prompt, seed=seed, adapter=adapter, settings=settings)
    files = {
        (i, j): out / f"{stem}-{j:03d}.png" for i, stem in enumerate(stems) for j in range(images)
    }
    existing = {place for place, file in files.items() if file.exists()}
    out.mkdir(parents=True, exist_ok=True)
    for batch in sample(
        pipe, prompt, batch_size=batch_size, skip=existing, progress=True, **sampling
    ):
        for image, i, j in zip(to_arrays(batch.images), batch.prompt, batch.image, strict=True):
            write_image(files[int(i), int(j)], image)
    before = f", {len(existing)} of them from before" if existing else ""
    _say(f"{len(files)} images in {out}{before}")


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
    """Print a line without wrapping."""
    console.print(text, soft_wrap=True)


@app.command()
def inspect(
    adapter: Annotated[
        str, typer.Argument(metavar="DIR_OR_REPO", help="Adapter folder or Hub id.")
    ],
    revision: Annotated[
        str | None, typer.Option(help="Commit, tag or branch of the adapter on the Hub.")
    ] = None,
) -> None:
    """Print an adapter's metadata and number of parameters, without loading a model."""
    from dataclasses import asdict

    from diffusers_fair.adapters.folder import read_adapter
    from diffusers_fair.backends.registry import check_revision
    from diffusers_fair.loading import local_folder

    check_revision(adapter, revision)
    info, weights = read_adapter(local_folder(adapter, revision))
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

    _say(f"card in {write_card(adapter, report)}")


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

    _say(
        "In the keys below, 0 stands for any position in a list, and NAME for a name you choose.\n"
    )
    for key in recipe_keys():
        heading = f"{key.path}:" if key.is_section else f"{key.path}  ({key.default})"
        _say(heading)
        _say(fill(key.documentation, 96, initial_indent="    ", subsequent_indent="    "))


def main() -> None:
    """Run the command line, and exit.

    Exit codes: 0 success; 2 invalid input, with a message of one sentence; 130 stopped by Ctrl-C
    and 143 by SIGTERM, with a message on how to go on; 1 any other error.
    """
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    try:
        with raise_on_sigterm():
            app(standalone_mode=False)
    except typer.Abort:
        sys.exit(1)
    except StoppedError as stop:
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
    from diffusers_fair.training.run_folder import check_run_folder
    from diffusers_fair.training.tracking import require_tracker
    from diffusers_fair.training.trainer import FairnessFinetuner

    config = RunConfig.load(recipe, overrides)
    require_tracker(config.tracker)
    check_run_folder(config)  # before any model is loaded
    with _resumable(expand(config.output)):
        folder = FairnessFinetuner(config).train()
    from diffusers_fair import distributed

    if distributed.is_main():
        _say(f"adapter in {folder / 'adapter'}")
    return folder


def _recipe_base(recipe: str | None) -> str:
    from diffusers_fair.config.schema import RunConfig

    return "testbed" if recipe is None else RunConfig.load(recipe).base.model


def _pipeline(
    base: str,
    adapter: str | None,
    respect_words: bool,
    device: str,
    dtype: str | None,
    *,
    revision: str | None,
    adapter_revision: str | None,
) -> tuple[Any, str | None]:
    """Load the pipeline; return it with the digest of its adapter, if it has one."""
    from diffusers_fair.assess import check_adapter_options
    from diffusers_fair.backends import registry
    from diffusers_fair.loading import load_fair_adapter, open_fair_adapter

    check_adapter_options(adapter, respect_words, adapter_revision)
    registry.check_revision(base, revision)
    chosen = registry.choose_base_device(base, device)
    dtype = registry.base(base).usual_dtype if dtype is None else dtype
    opened = None if adapter is None else open_fair_adapter(adapter, revision=adapter_revision)
    pipe = registry.load_base(base, revision, dtype, chosen)
    if opened is None:
        return pipe, None
    load_fair_adapter(pipe, opened, respect_words=respect_words)
    return pipe, opened.digest


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
        _say(f"report in {out}")


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
