"""Benchmark the method on this machine: time, memory, and bias against time.

    python examples/reproduction/benchmark.py --out model_cards/benchmarks/MACHINE
    python examples/reproduction/benchmark.py --out OUT --only iteration --only targets

Each job runs in its own process with all cores; jobs marked * run two at a time, with one core each:

    iteration   one iteration on a U-Net of Stable Diffusion 1.5's own configuration with random
                weights, 32 x 32 latents, 20 steps: the published implementation against replay
    steps       peak memory of an iteration with fewer steps
    bias *      bias on the testbed against wall-clock time, for the same methods and other step
                weights, three seeds each
    drawing     error of the gradient of a few sampled steps against that of all steps
    processes   iterations per hour on the testbed, for one and for two single-core processes
    targets     time to compute the targets of N images
    evaluation  images generated and judged per second
    adapter     time to load an adapter and to generate with it

Writes benchmark.md and benchmark.json. Jobs that are in benchmark.json are skipped, so the same
command resumes a run. Delete the file to start over, or repeat the measurements with `--turns 2`. Run
nothing else at the same time. Takes about three hours and 8 GB on 2 cores, most of it for `iteration` and
`bias`.
"""

import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from diffusers_fair.config.recipe import RECIPES
from diffusers_fair.provenance import provenance
from diffusers_fair.training import memory

Job = tuple[str, Callable[..., dict[str, Any]], dict[str, Any]]  # name, function, its arguments

STEPS, DRAWN = 20, 4
LATENTS = (1, 4, 32, 32)
TOKENS = (1, 77, 768)
GUIDANCE = 7.5
SEEDS = 3
LAUNCH = RECIPES / "launch" / "one-machine.yaml"
TRAINING = {  # settings of each training on the testbed, at a constant learning rate
    **{"prompts_per_iteration": 1, "distinct_iterations": 24},
    **{"validate_every": 12, "validation_images": 12},
}
FAST = f"replay of {DRAWN} steps, warm bank"
WAYS: dict[str, dict[str, Any]] = {  # ways to compute an iteration -> arguments of `iteration`
    "published": {"unrolled": True, "original": True},
    "replay, cold bank": {"original": True},
    "replay, warm bank": {},
    FAST: {"drawn": DRAWN},
}
SAVINGS: dict[str, dict[str, bool]] = {  # options that save memory -> arguments of `iteration`
    "": {},
    ", guidance split": {"split": True},
    ", blocks checkpointed": {"checkpointing": True},
}
COMPARED = ("published", FAST)  # compared in `steps`
TRAININGS: dict[str, dict[str, Any]] = {  # the same ways on the testbed, with 10 steps
    "published": {
        "gradient": {"method": "autograd", "replay_steps": None},
        "bank": "none",
        "iterations": 24,
    },
    "replay, cold bank": {"gradient": {"replay_steps": None}, "bank": "cold", "iterations": 24},
    "replay, warm bank": {"gradient": {"replay_steps": None}, "bank": "warm", "iterations": 24},
    "replay of 1 step, warm bank": {
        "gradient": {"replay_steps": 1},
        "bank": "warm",
        "iterations": 36,  # more, because sampled steps make the gradient noisier
    },
    "the same, weights as the paper's": {
        "gradient": {"replay_steps": 1, "standardize": "paper"},
        "bank": "warm",
        "iterations": 36,
    },
    "the same, weights as the sampler's": {
        "gradient": {"replay_steps": 1, "standardize": "none"},
        "bank": "warm",
        "iterations": 36,
    },
}
AT_A_TIME = {"bias": 2}  # part -> number of simultaneous jobs
PARTS = ("iteration", "steps", "bias", "drawing", "processes", "targets", "evaluation", "adapter")


def main(
    out: Annotated[Path, typer.Option(help="Folder to write benchmark.md and benchmark.json to.")],
    only: Annotated[
        list[str] | None, typer.Option(help="Part or job to run; may be repeated.")
    ] = None,
    turns: Annotated[int, typer.Option(help="Repetitions per job; the fastest counts.")] = 1,
) -> None:
    """Run the missing jobs and write the tables of all results."""
    chosen = {part: [*_chosen(jobs(part), only)] for part in PARTS}
    for name in only or ():
        if not any([*_chosen(jobs(part), [name])] for part in PARTS):
            raise typer.BadParameter(f"expected parts of {', '.join(PARTS)}, got {name}")
    out.mkdir(parents=True, exist_ok=True)
    file = out / "benchmark.json"
    found = json.loads(file.read_text("utf-8")) if file.exists() else {}
    for turn in range(turns):
        for part, wanted in chosen.items():
            todo = [job for job in wanted if _turns(found, job[0]) <= turn]
            for name, result in results(todo, part) if todo else ():
                found[name] = _quicker(found.get(name), result)
                file.write_text(json.dumps(found, indent=1), "utf-8")
                print(name, result, flush=True)
    (out / "benchmark.md").write_text("\n".join(document(found)), "utf-8")


def _chosen(candidates: Iterator[Job], only: list[str] | None) -> Iterator[Job]:
    for job in candidates:
        if not only or any(job[0] == name or job[0].startswith(f"{name}/") for name in only):
            yield job


def _turns(found: dict[str, Any], name: str) -> int:
    return found[name]["turns"] if name in found else 0


def _quicker(old: dict[str, Any] | None, new: dict[str, Any]) -> dict[str, Any]:
    """Return the faster result, as other load on the machine can only add time."""
    if old is None:
        return new | {"turns": 1}
    return min(new, old, key=lambda result: result.get("seconds", 0)) | {"turns": old["turns"] + 1}


def jobs(part: str) -> Iterator[Job]:
    """Yield the jobs of a part in order."""
    if part == "iteration":
        for way, does in WAYS.items():
            for saving, how in SAVINGS.items():
                if not ("unrolled" in does and "split" in how):
                    yield f"iteration/{way}{saving}", iteration, {**does, **how, "steps": STEPS}
    if part == "steps":
        for steps in (STEPS // 4, STEPS // 2):  # STEPS itself is in `iteration`
            for way in COMPARED:
                yield f"steps/{way}/{steps}", iteration, WAYS[way] | {"steps": steps}
    if part == "bias":
        for seed in range(SEEDS):
            for way, settings in TRAININGS.items():
                yield f"bias/{way}/{seed}", training, {**settings, "seed": seed}
    if part == "drawing":
        yield "drawing", drawing, {}
    if part == "processes":
        yield "processes", processes, {}
    if part == "targets":
        for images in (24, 64, 128, 256):
            for classes in (2, 4, 8, 16):
                yield f"targets/{images}/{classes}", targets, {"n": images, "classes": classes}
    if part == "evaluation":
        yield "evaluation", evaluation, {}
    if part == "adapter":
        yield "adapter", adapter, {}


def results(todo: list[Job], part: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield names and results in order; a fresh process for each job keeps them independent."""
    workers = AT_A_TIME.get(part, 1)
    threads = max(1, torch.get_num_threads() // workers)
    spawn = multiprocessing.get_context("spawn")
    with spawn.Pool(workers, torch.set_num_threads, (threads,), maxtasksperchild=1) as pool:
        pending = [(name, pool.apply_async(recorded, job)) for name, *job in todo]
        for name, result in pending:
            yield name, result.get()


def recorded(function: Callable[..., dict[str, Any]], arguments: dict[str, Any]) -> dict[str, Any]:
    """Run a job; return its result and provenance."""
    return function(**arguments) | {"with": provenance()}


# ---- an iteration at Stable Diffusion 1.5's size -------------------------------------------------


def iteration(
    *,
    steps: int,
    checkpointing: bool = False,
    split: bool = False,
    unrolled: bool = False,
    original: bool = False,
    drawn: int | None = None,
) -> dict[str, Any]:
    """Measure time and peak memory of the U-Net in an iteration with one image.

    Args:
        steps: K.
        checkpointing: whether to use gradient checkpointing in the U-Net.
        split: whether replay evaluates the guidance branches one after the other.
        unrolled: whether to use Algorithm 1 by autograd, checkpointed at each step, instead of replay.
        original: whether to generate the original image, too.
        drawn: number of steps that replay samples for the gradient pass; None is all.
    """
    pipe, scheduler = stable_diffusion()
    if checkpointing:
        pipe.unet.enable_gradient_checkpointing()
        pipe.unet.train()  # diffusers checkpoints in training mode only; the U-Net has no dropout
    g = torch.Generator().manual_seed(0)
    noise, v = (torch.randn(LATENTS, generator=g) for _ in range(2))  # v = d loss / d z_K
    branches = {
        branch: {"encoder_hidden_states": torch.randn(TOKENS, generator=g).requires_grad_()}
        for branch in ("cond", "uncond")
    }
    with measured() as measurements:
        if original:
            generate(pipe, scheduler, branches, noise, steps, keep=False)
        if unrolled:
            published(pipe, scheduler, branches, noise, steps, GUIDANCE).backward(v)
        else:
            trajectory = generate(pipe, scheduler, branches, noise, steps, keep=True)
            replayed(pipe, scheduler, trajectory, branches, v, drawn, split)
    return measurements


def stable_diffusion() -> tuple[Any, Any]:
    """Return a pipeline of only a frozen, random U-Net of Stable Diffusion 1.5's size, and its
    scheduler."""
    from diffusers import DPMSolverMultistepScheduler, UNet2DConditionModel

    from diffusers_fair import BiasedGradientScheduler

    torch.manual_seed(0)
    unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768).requires_grad_(False)
    scheduler = DPMSolverMultistepScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"
    )
    pipe = SimpleNamespace(unet=unet, text_encoder=None, tokenizer=None, vae=None)
    return pipe, BiasedGradientScheduler(scheduler, standardize="exact")


def generate(
    pipe: Any, scheduler: Any, branches: Any, noise: Tensor, steps: int, keep: bool
) -> Any:
    """Generate an image without gradients."""
    from diffusers_fair.diffusion.sampling import sample

    return sample(pipe, scheduler, branches, noise, steps, GUIDANCE, keep=keep)


def published(
    pipe: Any,
    scheduler: Any,
    branches: Any,
    noise: Tensor,
    steps: int,
    scale: float,
    **options: Any,
) -> Tensor:
    """Sample to get the targets, then again with the graph of Algorithm 1, as published."""
    from diffusers_fair.diffusion.sampling import sample
    from diffusers_fair.diffusion.unrolled import unroll

    sample(pipe, scheduler, branches, noise, steps, scale, keep=False)
    return unroll(pipe, scheduler, branches, noise, steps, scale, **options)


def replayed(
    pipe: Any,
    scheduler: Any,
    trajectory: Any,
    branches: Any,
    v: Tensor,
    drawn: int | None,
    split: bool,
) -> None:
    """Run the gradient pass of replay."""
    from diffusers_fair.diffusion.replay import replay, sample_steps

    weights = scheduler.gradient_weights()
    g = torch.Generator().manual_seed(0)
    steps, factors = sample_steps(len(weights), drawn, len(v), g) if drawn else (None, None)
    options = {"steps": steps, "inverse_probabilities": factors, "split_guidance": split}
    replay(pipe, trajectory, branches, v, weights, **options)


@contextmanager
def measured() -> Iterator[dict[str, Any]]:
    """Measure seconds, and the increase of peak resident memory in MB (Linux)."""
    cpu = torch.device("cpu")
    memory.reset_peak(cpu)
    before, start, measurements = memory.peak(cpu), time.perf_counter(), {}
    yield measurements
    measurements["seconds"] = time.perf_counter() - start
    measurements["megabytes"] = (memory.peak(cpu) - before) / 2**20


# ---- bias against time ---------------------------------------------------------------------------


class NoCache:
    """Original-image cache that stores nothing: every original is generated when it is needed."""

    def get(self, batch: Any, make: Callable[[], Any], device: torch.device) -> Any:
        """Generate the originals of a batch."""
        return make()


def training(*, gradient: dict[str, Any], bank: str, iterations: int, seed: int) -> dict[str, Any]:
    """Measure validation bias on the testbed against training time without validation.

    Args:
        gradient: `gradient` section of the recipe.
        bank: cache of original images: `none`, `cold` (empty at first) or `warm` (filled).
        iterations: number of iterations.
        seed: random seed.
    """
    from diffusers_fair import FairnessFinetuner
    from diffusers_fair.training import batch_gradient

    length = {"iterations": iterations, "checkpoint_every": iterations, "seed": seed}
    with TemporaryDirectory() as folder:
        finetuner = FairnessFinetuner.from_recipe(
            "testbed-gender",
            prompts={"keep": None},  # as published
            gradient=gradient,
            optimizer={"schedule": "constant"},
            train=TRAINING | length,
            tracker="none",
            output=f"{folder}/run",
        )
        finetuner.validation.base_clip_t = 0.0  # accept every adapter; skips validating the base
        if bank == "none":
            finetuner.gradient.cache = NoCache()
            batch_gradient.unroll = published  # only in the process of this job
        if bank == "warm":
            fill(finetuner)
        events = (finetuner.train(progress=False) / "events.jsonl").read_text("utf-8")
    seconds, curve = 0.0, []
    for event in map(json.loads, events.splitlines()):
        seconds += event.get("seconds", 0.0)
        if "validation/gender" in event:
            curve.append({"seconds": seconds, "bias": event["validation/gender"]})
    return {"curve": curve}


def fill(finetuner: Any) -> None:
    """Fill the cache with the originals of all iterations."""
    from diffusers_fair.training.batches import Shard, sample_batch

    for number in range(finetuner.config.train.distinct_iterations):
        batch = sample_batch(finetuner.config, finetuner.prompts, number)
        finetuner.gradient.originals(Shard(batch, slice(0, len(batch.noise))))


# ---- sampled steps ------------------------------------------------------------------------------


def drawing() -> dict[str, Any]:
    """Compare the gradient of k of 10 steps, and of another batch, with that of all steps.

    Returns the mean norm of the difference relative to the full gradient, and the mean cosine
    similarity with it.
    """
    (whole,), others = gradients(None, 0), {"another batch": gradients(None, 1)}
    others |= {f"{count} of 10": gradients(count, 0, turns=6) for count in (1, 2, 4)}
    compared = {
        name: {
            "error": statistics.mean(((x - whole).norm() / whole.norm()).item() for x in found),
            "cosine": statistics.mean(
                torch.cosine_similarity(x, whole, dim=0).item() for x in found
            ),
        }
        for name, found in others.items()
    }
    return {"compared": compared}


def gradients(drawn: int | None, number: int, turns: int = 1) -> list[Tensor]:
    """Return the gradients of a batch of 12 testbed images, one per turn, before training."""
    from diffusers_fair import FairnessFinetuner
    from diffusers_fair.training.batches import sample_batch

    finetuner = FairnessFinetuner.from_recipe(
        "testbed-gender",
        prompts={"keep": None},
        gradient={"replay_steps": drawn},
        train=TRAINING,
        tracker="none",
    )
    batch, found = sample_batch(finetuner.config, finetuner.prompts, number), []
    for turn in range(turns):
        finetuner.optimizer.zero_grad()
        finetuner.gradient.backward(batch, turn, use_cache=False)
        parts = [p.grad.flatten() for p in finetuner.parameters if p.grad is not None]
        found.append(torch.cat(parts))
    return found


# ---- several processes ---------------------------------------------------------------------------


def processes() -> dict[str, Any]:
    """Measure iterations per hour of one and of two single-core processes on the same batch."""
    turns = [{count: iterations_per_hour(count) for count in (1, 2)} for _ in range(3)]
    return {
        "one": statistics.median(turn[1] for turn in turns),
        "two": statistics.median(turn[2] for turn in turns),
        "gain": statistics.median(turn[2] / turn[1] for turn in turns),
    }


def iterations_per_hour(count: int) -> float:
    """Measure `accelerate launch` with that many processes, without the first iteration."""
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(LAUNCH)]
    with TemporaryDirectory() as folder:
        recipe = ["testbed-gender", "train.iterations=5", "tracker=none", f"output={folder}/run"]
        subprocess.run(
            [*launcher, f"--num_processes={count}", "-m", "diffusers_fair", "train", *recipe],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            check=True,
        )
        lines = Path(folder, "run", "events.jsonl").read_text("utf-8").splitlines()
    seconds = [event["seconds"] for event in map(json.loads, lines) if "seconds" in event]
    return 3600 / statistics.median(seconds[1:])


# ---- small parts ---------------------------------------------------------------------------------


def targets(*, n: int, classes: int) -> dict[str, Any]:
    """Measure the seconds to compute the targets of n images, as the median of five calls."""
    from diffusers_fair.objective.targets import expected_targets

    p = torch.rand(n, classes, generator=torch.Generator().manual_seed(0)).softmax(1)
    share = torch.full((classes,), 1 / classes)
    return {"seconds": median(lambda: expected_targets(p, share), 5)}


def evaluation() -> dict[str, Any]:
    """Measure how many testbed images are generated and judged per second."""
    from diffusers_fair import evaluate, testbed
    from diffusers_fair.backends.registry import load_judges
    from diffusers_fair.config.models import EvaluationModelsSection
    from diffusers_fair.prompts import prompt_set
    from diffusers_fair.testbed import world

    pipe, attributes = testbed.pipeline(), list(world.ATTRIBUTES.values())
    judges = load_judges(EvaluationModelsSection(), attributes, pipe.device)
    prompts = prompt_set("testbed-occupations").prompts("test")[:5]
    start = time.perf_counter()
    evaluate(pipe, prompts, attributes, judges=judges, steps=20, groups=(), progress=False)
    return {"images_per_second": 300 / (time.perf_counter() - start)}


def adapter() -> dict[str, Any]:
    """Measure the seconds to load an adapter of rank 50, and generation time relative to the base."""
    from diffusers_fair import FairnessFinetuner, testbed
    from diffusers_fair.testbed import world

    prompt = [world.NEUTRAL.format("chef")] * 24
    pipe = testbed.pipeline()

    def generate_images() -> None:
        g = [torch.Generator().manual_seed(i) for i in range(24)]
        pipe(prompt, num_inference_steps=10, generator=g, output_type="latent")

    pipe.set_progress_bar_config(disable=True)
    with TemporaryDirectory() as folder:
        finetuner = FairnessFinetuner.from_recipe("testbed-gender", adapter={"rank": 50})
        finetuner.save_adapter(folder)
        start = time.perf_counter()
        pipe.load_fair_adapter(folder)
        loading = time.perf_counter() - start
    ratios = {"loaded": [], "fused": []}
    for _ in range(5):  # alternating, because the machine's speed drifts
        pipe.set_fair_adapter_scale(0.0)
        pipe.disable_lora()
        plain = median(generate_images, 1)
        pipe.enable_lora()
        pipe.set_fair_adapter_scale(1.0)
        ratios["loaded"].append(median(generate_images, 1) / plain)
        pipe.fuse_lora(components=["text_encoder", "unet"])
        ratios["fused"].append(median(generate_images, 1) / plain)
        pipe.unfuse_lora(components=["text_encoder", "unet"])
    return {"loading_seconds": loading} | {k: statistics.median(v) for k, v in ratios.items()}


def median(function: Callable[[], Any], times: int) -> float:
    """Measure the seconds of a call, as the median of several."""
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


# ---- output --------------------------------------------------------------------------------------


def document(found: dict[str, Any]) -> list[str]:
    """Return the lines of benchmark.md."""
    from diffusers_fair.reports.markdown import markdown_table

    lines = ["# Benchmark", "", "Compare only within a table: times depend on the machine.", ""]
    tables = {
        "iteration": (
            f"One iteration, Stable Diffusion 1.5's U-Net with random weights, {STEPS} steps",
            iteration_rows,
        ),
        "steps": ("Peak memory of an iteration against the number of steps, MB", steps_rows),
        "bias": ("Bias on the testbed against time", bias_rows),
        "drawing": (
            "Error of the gradient of a few sampled steps, for a batch of 12 images",
            drawing_rows,
        ),
        "processes": ("Iterations of testbed-gender per hour", processes_rows),
        "targets": ("Time to compute the targets of a batch, milliseconds", targets_rows),
        "evaluation": ("Evaluation", evaluation_rows),
        "adapter": ("Loading and using an adapter of rank 50", adapter_rows),
    }
    found = found | {
        f"steps/{way}/{STEPS}": found[f"iteration/{way}"]
        for way in COMPARED
        if f"iteration/{way}" in found and any(name.startswith("steps/") for name in found)
    }
    for part, (title, rows) in tables.items():
        done = {
            name.removeprefix(f"{part}/"): result
            for name, result in found.items()
            if name.split("/")[0] == part
        }
        if done:
            head, *body = rows(done)
            lines += [f"## {title}", "", *markdown_table(head, body), "", *origins(done), ""]
    return lines


def origins(done: dict[str, Any]) -> list[str]:
    """List the provenance of results, each once."""
    lines = set()
    for result in done.values():
        origin = result["with"]
        words = [f"`{origin['command']}`", f"commit {origin['commit']}"]
        words += [f"{name} {value}" for name, value in origin["versions"].items()]
        words += [f"{name} {value}" for name, value in origin["machine"].items()]
        lines.add(", ".join(words))
    return [f"- {line}" for line in sorted(lines)]


def iteration_rows(done: dict[str, Any]) -> list[list[str]]:
    head = ["", "repetitions", "seconds, minimum", "speed-up over published"]
    head += ["peak memory without weights, MB", "relative to published"]
    first = done["published"]
    return [head] + [
        [
            way,
            f"{result['turns']}",
            f"{result['seconds']:.0f}",
            f"{first['seconds'] / result['seconds']:.2f} x",
            f"{result['megabytes']:.0f}",
            f"{result['megabytes'] / first['megabytes']:.2f}",
        ]
        for way, result in done.items()
    ]


def steps_rows(done: dict[str, Any]) -> list[list[str]]:
    """Return peak memory in MB, with ways in rows and numbers of steps in columns."""
    ways: dict[str, dict[str, str]] = {}
    for name, result in done.items():
        way, steps = name.split("/")
        ways.setdefault(way, {})[f"K = {steps}"] = f"{result['megabytes']:.0f}"
    return [["", *next(iter(ways.values()))]] + [[way, *row.values()] for way, row in ways.items()]


def bias_rows(done: dict[str, Any]) -> list[list[str]]:
    """Return time, final bias, and time to the first way's final bias, for each way."""
    runs: dict[str, list[list[dict[str, float]]]] = {}
    for name, result in done.items():
        runs.setdefault(name.split("/")[0], []).append(result["curve"])
    means = {
        way: [
            {key: statistics.mean(point[key] for point in points) for key in points[0]}
            for points in zip(*curves, strict=True)
        ]
        for way, curves in runs.items()
    }
    last = next(iter(means.values()))[-1]
    head = ["", "seeds", "seconds", "mean final bias"]
    rows = [[*head, f"seconds until bias {last['bias']:.3f}", "relative to published"]]
    for way, curve in means.items():
        seconds = seconds_until(last["bias"], curve)
        cells = [f"{len(runs[way])}", f"{curve[-1]['seconds']:.0f}", f"{curve[-1]['bias']:.3f}"]
        if seconds is None:
            rows.append([way, *cells, "not reached", "-"])
        else:
            rows.append([way, *cells, f"{seconds:.0f}", f"{seconds / last['seconds']:.2f}"])
    return rows


def seconds_until(bias: float, curve: list[dict[str, float]]) -> float | None:
    """Return the time at which a curve first reaches a bias, interpolated; None if never."""
    before = None
    for point in curve:
        if point["bias"] <= bias:
            if before is None:
                return point["seconds"]
            share = (before["bias"] - bias) / (before["bias"] - point["bias"])
            return before["seconds"] + share * (point["seconds"] - before["seconds"])
        before = point
    return None


def drawing_rows(done: dict[str, Any]) -> list[list[str]]:
    """Return the error of each gradient against that of all steps."""
    head = ["sampled steps per image", "relative error", "cosine similarity"]
    return [head] + [
        [name, f"{result['error']:.2f}", f"{result['cosine']:.3f}"]
        for name, result in done["drawing"]["compared"].items()
    ]


def processes_rows(done: dict[str, Any]) -> list[list[str]]:
    result = done["processes"]
    head = ["one process, one core", "two processes, two cores", "ratio, median of repetitions"]
    return [head, [f"{result['one']:.0f}", f"{result['two']:.0f}", f"{result['gain']:.2f}"]]


def targets_rows(done: dict[str, Any]) -> list[list[str]]:
    """Return milliseconds, with numbers of images in rows and of classes in columns."""
    sizes: dict[str, dict[str, str]] = {}
    for name, result in done.items():
        images, classes = name.split("/")
        sizes.setdefault(images, {})[f"{classes} classes"] = f"{1000 * result['seconds']:.1f}"
    head = ["images", *next(iter(sizes.values()))]
    return [head] + [[images, *row.values()] for images, row in sizes.items()]


def evaluation_rows(done: dict[str, Any]) -> list[list[str]]:
    rate = done["evaluation"]["images_per_second"]
    return [
        ["images per second", "50 prompts x 60 images"],
        [f"{rate:.1f}", f"{50 / rate:.1f} min"],
    ]


def adapter_rows(done: dict[str, Any]) -> list[list[str]]:
    result = done["adapter"]
    head = ["loading, seconds", "generation time relative to base", "the same, fused"]
    cells = [f"{result[key]:.3f}" for key in ("loading_seconds", "loaded", "fused")]
    return [head, cells]


if __name__ == "__main__":
    typer.run(main)
