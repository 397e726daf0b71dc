"""The command `diffusers-fair`."""

import json
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

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
Out = Annotated[Path, typer.Option(help="Folder to write to.")]
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
        metavar="INTEGER",
        help="Images processed together. Default: 24 or, on a GPU, fewer if so many do not fit its "
        "memory.",
    ),
]


@app.command()
def demo(
    out: Out = Path("runs/demo"),
    images: Annotated[int, typer.Option(help="Images per prompt.")] = 20,
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
    console.print(f"accuracy {facts['accuracy']:.3f} on {held} held-out images")
    console.print(f"classifier in {out}; in a recipe: checkpoint:{out}", highlight=False)


@app.command()
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
        str | None,
        typer.Option(
            metavar="NUMBER_OR_DIR",
            help="Images per prompt; default: the recipe's number, or 60. Or a folder of existing "
            "images to evaluate, with a subfolder for each prompt. The prompt is the text of the "
            "subfolder's prompt.txt, or else its name.",
        ),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="Scheduler steps. Default: the recipe's number, or 20.")
    ] = None,
    guidance_scale: Annotated[
        float | None,
        typer.Option(help="Guidance scale. Default: the recipe's, or 4.5 for the testbed."),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Random seed of the noise. Default: the recipe's seed, or 0.")
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
    if images is not None and not images.lstrip("-").isdigit():
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
        images_per_prompt=None if images is None else int(images),
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
    console.print(f"comparison in {out}")


@app.command()
def generate(
    prompt: Annotated[list[str], typer.Argument(help="Prompts.")],
    base: Base = "testbed",
    adapter: Adapter = None,
    out: Out = Path("images"),
    images: Annotated[int, typer.Option(help="Images per prompt.")] = 4,
    steps: Annotated[int, typer.Option(help="Scheduler steps.")] = 20,
    guidance_scale: Annotated[
        float | None,
        typer.Option(help="Guidance scale. Default: 4.5 for the testbed, 7.5 otherwise."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Random seed of the noise.")] = 0,
    respect_words: RespectWords = False,
    device: Device = "auto",
    dtype: Dtype = None,
    revision: Revision = None,
    adapter_revision: AdapterRevision = None,
    batch_size: BatchSize = None,
) -> None:
    """Generate images with or without an adapter."""
    from PIL import Image

    from diffusers_fair.backends.registry import usual_guidance
    from diffusers_fair.evaluation.generate import generate as sample
    from diffusers_fair.vision.images import to_arrays

    pipe = _pipeline(
        base,
        adapter,
        respect_words,
        device,
        dtype,
        revision=revision,
        adapter_revision=adapter_revision,
    )
    out.mkdir(parents=True, exist_ok=True)
    for batch in sample(
        pipe,
        prompt,
        images_per_prompt=images,
        steps=steps,
        guidance_scale=guidance_scale or usual_guidance(base),
        seed=seed,
        batch_size=batch_size,
        progress=True,
    ):
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
    console.print_json(json.dumps(facts))


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
        if not isinstance(error, ValueError | ModuleNotFoundError) and not _is_usage_error(error):
            raise
        sys.stderr.write(f"diffusers-fair: {error}\n")
        sys.exit(2)


def _is_usage_error(error: Exception) -> bool:
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
) -> Any:
    from diffusers_fair.assess import check_adapter_options
    from diffusers_fair.backends import registry
    from diffusers_fair.loading import load_fair_adapter

    check_adapter_options(adapter, respect_words, adapter_revision)
    registry.check_revision(base, revision)
    chosen = registry.choose_base_device(base, device)
    dtype = registry.base(base).usual_dtype if dtype is None else dtype
    pipe = registry.load_base(base, revision, dtype, chosen)
    if adapter is not None:
        load_fair_adapter(pipe, adapter, revision=adapter_revision, respect_words=respect_words)
    return pipe


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
    if not separator or Path(word).exists():  # a folder may have = in its name
        name, folder = "", word
    report = load_report(folder)
    group, _, label = name.rpartition("/")
    return Entry(label=label or report.label, report=report, group=group)


def _slug(text: str) -> str:
    """Turn a prompt into a file name."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:60] or "empty"
