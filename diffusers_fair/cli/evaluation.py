"""The commands that generate and evaluate images."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from diffusers_fair.cli.app import Resumable, app, say, show, show_assessment
from diffusers_fair.cli.options import (
    Adapter,
    AdapterRevision,
    Base,
    BatchSize,
    Device,
    Dtype,
    Out,
    RespectWords,
    Revision,
    number_or_folder,
    read_folder,
)
from diffusers_fair.paths import expand, require_writable

if TYPE_CHECKING:
    from diffusers_fair.reports.comparison import Entry


@app.command(cls=Resumable)
def evaluate(
    base: Annotated[
        str | None,
        typer.Option(
            help="`testbed`, `testbed-flux`, a Hub id, a folder or a single .safetensors file. "
            "Default: the recipe's, or testbed."
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
            help="Recipe whose evaluation.models judge the images; required unless the base is a "
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
            parser=number_or_folder,
            metavar="NUMBER_OR_DIR",
            help="Images per prompt; default: the recipe's number, or 60. Or a folder of existing "
            "images to evaluate, with a subfolder for each prompt. The prompt is the text of the "
            "subfolder's prompt.txt, or else its name.",
        ),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="INT", help="Scheduler steps. Default: the recipe's, or the testbed's."
        ),
    ] = None,
    guidance_scale: Annotated[
        float | None,
        typer.Option(
            min=0,
            metavar="FLOAT",
            help="Guidance scale. Default: the recipe's, or the testbed's.",
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
            parser=read_folder,
            metavar="DIRECTORY",
            help="Existing report of the base model, to be used instead of evaluating it again. It "
            "must have the same prompts, seed, steps and guidance scale, and at least as many "
            "images. Only missing control prompts are added.",
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
        unused = {
            "--base": base,
            "--adapter": adapter,
            "--baseline": baseline,
            "--prompts": prompts,
            "--split": split,
            "--steps": steps,
            "--guidance-scale": guidance_scale,
            "--seed": seed,
            "--reference": reference,
            "--respect-words": respect_words or None,
            "--dtype": dtype,
            "--revision": revision,
            "--adapter-revision": adapter_revision,
        }
        if given := [option for option, value in unused.items() if value is not None]:
            raise ValueError(
                f"--images '{images}' is a folder of existing images: leave out "
                f"{', '.join(given)}, or give a number of images"
            )
        report = assess_images(
            images,
            out=out,
            recipe=recipe,
            attributes=attribute,
            device=device,
            batch_size=batch_size,
        )
        show(table(report), out)
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
    show_assessment(assessment, out)


def _recipe_base(recipe: str | None) -> str:
    from diffusers_fair.config.schema import RunConfig

    return "testbed" if recipe is None else RunConfig.load(recipe).base.model


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
    say(f"comparison in {out}")


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


@app.command(cls=Resumable)
def generate(
    prompt: Annotated[list[str], typer.Argument(help="Prompts.")],
    base: Base = "testbed",
    adapter: Adapter = None,
    out: Out = Path("images"),
    images: Annotated[int, typer.Option(min=1, metavar="INT", help="Images per prompt.")] = 4,
    steps: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="INT", help="Scheduler steps. Default: usual for the base model."
        ),
    ] = None,
    guidance_scale: Annotated[
        float | None,
        typer.Option(
            min=0, metavar="FLOAT", help="Guidance scale. Default: usual for the base model."
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
    from diffusers_fair.backends.registry import usual_sampling
    from diffusers_fair.evaluation.generate import generate as sample
    from diffusers_fair.evaluation.image_files import file_stems, write_image
    from diffusers_fair.vision.images import to_arrays

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
    usual = usual_sampling(base, pipe)
    sampling: dict[str, Any] = {
        "images_per_prompt": images,
        "steps": usual.steps if steps is None else steps,
        "guidance_scale": usual.guidance_scale if guidance_scale is None else guidance_scale,
        "seed": seed,
    }
    computed = str(pipe.dtype)  # auto differs between devices
    chosen = (sampling["steps"], sampling["guidance_scale"])
    settings = [base, digest, *chosen, respect_words, computed, revision]
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
            if (int(i), int(j)) not in existing:
                write_image(files[int(i), int(j)], image)
    before = f", {len(existing)} of them from before" if existing else ""
    say(f"{len(files)} images in {out}{before}")


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
    from diffusers_fair.adapters.repository import open_fair_adapter
    from diffusers_fair.assess import check_adapter_options
    from diffusers_fair.backends import registry
    from diffusers_fair.loading import load_fair_adapter

    check_adapter_options(adapter, respect_words, adapter_revision)
    chosen = registry.choose_base_device(base, device)
    dtype = registry.base(base).usual_dtype if dtype is None else dtype
    opened = None if adapter is None else open_fair_adapter(adapter, revision=adapter_revision)
    pipe = registry.load_base(base, revision, dtype, chosen)
    if opened is None:
        return pipe, None
    load_fair_adapter(pipe, opened, respect_words=respect_words)
    return pipe, opened.digest
