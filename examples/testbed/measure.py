"""Measure a base model of the testbed: bias, prompt following, faces and cost.

python examples/testbed/measure.py --base testbed --out model_cards/testbed
python examples/testbed/measure.py --base testbed-flux --out model_cards/testbed
"""

import json
import platform
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from PIL import Image
from rich.console import Console
from rich.table import Table

from diffusers_fair import testbed
from diffusers_fair.backends import registry
from diffusers_fair.evaluation.evaluate import evaluate
from diffusers_fair.evaluation.generate import generate
from diffusers_fair.prompts import prompt_set
from diffusers_fair.provenance import commit
from diffusers_fair.reports.estimate import Estimate
from diffusers_fair.testbed import judges as shipped
from diffusers_fair.testbed import world
from diffusers_fair.testbed.backend import load_evaluation_judges
from diffusers_fair.vision.faces import face_chips
from diffusers_fair.vision.images import to_arrays
from diffusers_fair.vision.judges import Judges

SEED = 0
GRID = [
    world.NEUTRAL.format("senator"),
    world.NEUTRAL.format("cardiologist"),
    world.NEUTRAL.format("fence erector"),
    world.explicit("chef", "old", "Indian", "female"),
    world.explicit("violinist", "young", "Black", "male"),
    "an oil painting of a farmer",
    "a pencil sketch of a judge",
    "a photo of two people, teachers",
    "a photo of a library without anybody",
]
Row = tuple[str, str, str]
"""Metric, measured value, expected range."""


def main(
    base: Annotated[str, typer.Option(help="`testbed` or `testbed-flux`.")] = testbed.NAME,
    images: Annotated[int, typer.Option(help="Images per test prompt.")] = 60,
    out: Annotated[
        Path | None, typer.Option(help="Folder to write BASE.md, .json and .png to.")
    ] = None,
) -> None:
    """Measure a base model and the judges of the testbed."""
    pipe, seconds = timed(lambda: registry.load_base(base))
    judges, more = timed(lambda: load_evaluation_judges(list(world.ATTRIBUTES)))
    table = [
        *cost(pipe, seconds + more),
        *bias(pipe, judges, images),
        *obedience(pipe, judges),
        *scenes(pipe, judges),
        *classifiers(),
    ]
    show(table, base, images)
    if out is not None:
        keep(table, base, images, out)
        grid(pipe).save(out / f"{base}.png")


def sampling(base: str) -> dict[str, Any]:
    """Return the usual steps and guidance scale of a base model of the testbed."""
    usual = registry.base(base).usual_sampling
    assert usual is not None
    return vars(usual)


def timed(make: Callable[[], Any]) -> tuple[Any, float]:
    """Return the result of `make`, and the seconds it took."""
    start = time.perf_counter()
    return make(), time.perf_counter() - start


def cost(pipe: Any, seconds: float) -> list[Row]:
    """Measure the size of the weights, the loading time and the generation time."""
    size = sum(f.stat().st_size for f in testbed.WEIGHTS.rglob("*") if f.is_file()) / 1e6
    prompts = prompt_set("testbed-occupations").prompts("test")[:24]
    _, generation = timed(lambda: generate_images(pipe, prompts, 1))
    return [
        ("weights of both base models and judges, MB", f"{size:.1f}", "<= 36"),
        ("loading pipeline and judges, s", f"{seconds:.1f}", "<= 3"),
        ("24 images, usual steps, s", f"{generation:.1f}", "<= 8"),
    ]


def bias(pipe: Any, judges: Judges, images: int) -> list[Row]:
    """Measure bias, faces and context over the test occupations with the neutral template."""
    prompts = prompt_set("testbed-occupations").prompts("test")
    report = evaluate(
        pipe,
        prompts,
        [world.GENDER, world.RACE],
        judges=judges,
        images_per_prompt=images,
        **sampling(pipe.config._name_or_path),
        seed=SEED,
        groups=(),
    )
    found = report.summary
    wanted = {"gender": ".60 to .75", "race": ".35 to .50"}
    rows = [
        (f"bias, {name}", bias.mean_and_std, wanted.get(name, ".18 to .25"))
        for name, bias in found.bias.items()
        if bias
    ]
    return [
        *rows,
        ("context family recognised", mean(found.scores["context"]), ">= .85"),
        ("face found in drawn portraits", mean(found.face_rate), ">= .97"),
        ("CLIP-T", mean(found.scores["clip_t"]), ""),
    ]


def mean(estimate: Estimate | None) -> str:
    """Format the mean for a table."""
    return "-" if estimate is None else f"{estimate.mean:.3f}"


def obedience(pipe: Any, judges: Judges, occupations: int = 20) -> list[Row]:
    """Measure how often images show the class that the prompt names, per attribute."""
    rows = []
    for name, attribute in world.ATTRIBUTES.items():
        texts = prompt_set("testbed-occupations").test[:occupations]
        pairs = [(text, c) for c in attribute.classes for text in texts]
        images = generate_images(pipe, [world.explicit(*pair) for pair in pairs], 2)
        faces = judges.face_detector(images)
        classifier = judges.classifiers[name]
        seen = classifier(face_chips(images, faces, classifier.size)).argmax(1)
        wanted = torch.tensor([classifier.classes.index(c) for _, c in pairs for _ in range(2)])
        right = ((seen == wanted) & faces.is_face).float().mean().item()
        rows.append((f"words obeyed, {name}", f"{right:.3f}", ">= .90"))
    return rows


def scenes(pipe: Any, judges: Judges) -> list[Row]:
    """Measure how often a face is found in generated empty scenes, which should have none."""
    places = [facts["place"] for facts in world.families().values()]
    images = generate_images(pipe, [f"a photo of {place} without anybody" for place in places], 8)
    rate = judges.face_detector(images).is_face.float().mean().item()
    return [("face found in drawn empty scenes", f"{rate:.3f}", "<= .03")]


def classifiers() -> list[Row]:
    """Return the judges' held-out metrics, as measured when they were trained."""
    wanted = {"gender": ">= .97", "race": ">= .95", "age": ">= .94"}
    accuracy = shipped.metadata("evaluation_classifiers")["accuracy"]["sharp"]
    seen = shipped.metadata("detector")["held_out"]
    return [
        *((f"evaluation classifier, {n}", f"{accuracy[n]:.3f}", wanted[n]) for n in wanted),
        ("face found in real portraits", f"{seen['portrait']['sharp']['found']:.3f}", ">= .97"),
        ("face found in real empty scenes", f"{seen['empty']['sharp']['found']:.3f}", "<= .03"),
    ]


@torch.no_grad()
def generate_images(pipe: Any, prompts: Sequence[str], images: int) -> torch.Tensor:
    """Generate images (prompts * images, 3, 64, 64) in [-1, 1], prompt by prompt."""
    batches = generate(
        pipe,
        prompts,
        images_per_prompt=images,
        **sampling(pipe.config._name_or_path),
        seed=SEED,
        batch_size=24,
        progress=False,
    )
    return torch.cat([batch.images for batch in batches])


def show(table: Sequence[Row], base: str, images: int) -> None:
    """Print the rows."""
    grid = Table("", "measured", "wanted", title=f"{base}, 50 test prompts x {images} images")
    for row in table:
        grid.add_row(*row)
    Console().print(grid)


def keep(table: Sequence[Row], base: str, images: int, out: Path) -> None:
    """Write BASE.md and BASE.json, with their provenance."""
    with_what = {
        "command": f"python examples/testbed/measure.py --base {base} --images {images} --out {out}",
        "commit": commit(),
        "seed": SEED,
        **sampling(base),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "versions": {
            "python": sys.version.split()[0],
            "torch": torch.__version__,
            "numpy": np.__version__,
        },
    }
    out.mkdir(parents=True, exist_ok=True)
    lines = [f"# The base model `{base}`, measured", "", "| | measured | wanted |", "|---|---|---|"]
    lines += [f"| {what} | {figure} | {wanted} |" for what, figure, wanted in table]
    lines += ["", *(f"- {name}: {value}" for name, value in with_what.items()), ""]
    (out / f"{base}.md").write_text("\n".join(lines), "utf-8")
    record = with_what | {"figures": {what: figure for what, figure, _ in table}}
    (out / f"{base}.json").write_text(json.dumps(record, indent=1), "utf-8")


def grid(pipe: Any) -> Image.Image:
    """Generate a grid of example images, eight per prompt, enlarged twice."""
    rows = generate_images(pipe, GRID, 8).view(len(GRID), 8, 3, testbed.SIZE, testbed.SIZE)
    pixels = to_arrays(rows).transpose(0, 2, 1, 3, 4)  # (rows, h, 8, w, 3)
    flat = pixels.reshape(len(GRID) * testbed.SIZE, 8 * testbed.SIZE, 3)
    image = Image.fromarray(flat)
    return image.resize((2 * image.width, 2 * image.height), Image.Resampling.BICUBIC)


if __name__ == "__main__":
    typer.run(main)
