"""Reproduce the paper's Figure 1 on the testbed: gradients of the sampling process compared.

    python examples/reproduction/figure1.py --out model_cards/figure1

Left panel: loss of trainings of the text encoder's adapter with the exact gradient of all steps, with
that of the last step only, and with the biased gradient for each standardisation. All start from
the same weights and use the same prompt and noise. (The paper trains a soft prompt towards one fixed
image instead; here it is the loss of adapter training.) Right panel: norm of each time step's
contribution to the gradient, with a random matrix R for the gradient of the loss (section 4.2).

Writes figure1.png and figure1.json. Run the same command again to resume. Each core runs one process
with one thread, so the numbers do not depend on the number of cores. Takes about 15 minutes on 2
cores.
"""

import hashlib
import json
import multiprocessing
import os
import platform
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import numpy as np
import torch
import typer
from matplotlib import pyplot
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from diffusers_fair import BiasedGradientScheduler, FairnessFinetuner, testbed
from diffusers_fair.adapters.lora import add_lora
from diffusers_fair.diffusion.noise import Noise, initial_noise
from diffusers_fair.diffusion.replay import replay
from diffusers_fair.diffusion.sampling import denoise, guided_prediction, sample
from diffusers_fair.families.stable_diffusion import EMBEDDINGS, token_embeddings
from diffusers_fair.provenance import commit
from diffusers_fair.testbed import world

RECIPE = "testbed-gender"
PROMPT = world.NEUTRAL.format("registered nurse")
GRADIENTS: dict[str, dict[str, Any]] = {  # curve -> `gradient` section of the recipe
    "naive": {"method": "naive"},
    "truncated": {"method": "truncated", "truncated_steps": 1},
    "biased, none": {"standardize": "none"},
    "biased, paper": {"standardize": "paper"},
    "biased, exact": {"standardize": "exact"},
}
BIASED = [name for name in GRADIENTS if name.startswith("biased")]
SETTINGS: dict[str, Any] = {
    **{"recipe": RECIPE, "prompt": PROMPT, "gradients": GRADIENTS},
    **{"images": 12, "steps": 8},  # per iteration
    **{"rank": 16, "lr": 2e-3},  # less than the recipe's: one prompt alone is soon balanced
    **{"runs": 20, "shares_steps": 20, "deviation_of_R": 0.01, "shares_seed": 1000},
}
LOOKS = {  # colours of Okabe and Ito; dashes and markers also distinguish the curves in grey
    "naive": ("exact gradient (naive)", {"color": "#D55E00", "ls": "-", "marker": "o"}),
    "truncated": ("exact, last step only", {"color": "#999999", "ls": "-.", "marker": "v"}),
    "biased, none": ("biased, not standardised", {"color": "#CC79A7", "ls": ":", "marker": "s"}),
    "biased, paper": ("biased, paper's C", {"color": "#0072B2", "ls": "--", "marker": "^"}),
    "biased, exact": ("biased, exact C", {"color": "#009E73", "ls": "-", "marker": "D"}),
}
CRITERION = "mean loss over the last third of the iterations"


def main(
    out: Annotated[Path, typer.Option(help="Folder to write figure1.png and figure1.json to.")],
    iterations: Annotated[int, typer.Option(help="Iterations per training.")] = 18,
    seeds: Annotated[int, typer.Option(help="Trainings per gradient, each with its own seed.")] = 3,
) -> None:
    """Train, measure, and write the figure and its numbers."""
    out.mkdir(parents=True, exist_ok=True)
    file = out / "figure1.json"
    results = resume(file, SETTINGS | {"iterations": iterations, "weights": digest()})
    for job, found in finished(missing(results, seeds), iterations):
        if job == ("shares",):
            results["shares"] = found
        else:
            name, seed = job
            results["curves"][name][seed] = found
        write(file, results)
        print(*job, f"{found['cpu_seconds']:.0f} s", flush=True)
    require_same_start(results, seeds)
    results = {"with": origin(iterations, seeds)} | results
    results["summary"] = summary(results, seeds)
    write(file, results)
    draw(results, seeds).savefig(out / "figure1.png", dpi=150)
    print(json.dumps(results["summary"], indent=1))


# ---- jobs ----------------------------------------------------------------------------------------


def missing(results: dict[str, Any], seeds: int) -> list[tuple[str, ...]]:
    """Return the missing jobs: (gradient, seed), or ("shares",) for the contributions of steps."""
    jobs = [(name, str(seed)) for seed in range(seeds) for name in GRADIENTS]
    todo: list[tuple[str, ...]] = [
        (name, seed) for name, seed in jobs if seed not in results["curves"][name]
    ]
    return todo if results["shares"] else [("shares",), *todo]


def finished(jobs: list[tuple[str, ...]], iterations: int) -> Iterator[tuple[tuple, dict]]:
    """Yield each job with its result, in the order in which they finish."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(cores(), mp_context=spawn) as pool:
        running = {pool.submit(do, job, iterations): job for job in jobs}
        for done in as_completed(running):
            yield running[done], done.result()


def cores() -> int:
    return len(os.sched_getaffinity(0))


def do(job: tuple[str, ...], iterations: int) -> dict[str, Any]:
    """Run one job in its own process."""
    torch.set_num_threads(1)
    start = time.process_time()
    found = shares() if job == ("shares",) else {"loss": curve(job[0], int(job[1]), iterations)}
    return found | {"cpu_seconds": round(time.process_time() - start, 1)}


def curve(name: str, seed: int, iterations: int) -> list[float]:
    """Return the loss of each iteration; the training data depend only on the seed."""
    with TemporaryDirectory() as folder:
        prompts = Path(folder) / "prompt.txt"
        prompts.write_text(PROMPT, encoding="utf-8")
        trainer = FairnessFinetuner.from_recipe(
            RECIPE,
            base={"dtype": "float32"},  # the exact gradient needs it
            prompts={
                **{"sets": [str(prompts)], "images_per_prompt": SETTINGS["images"]},
                "keep": None,  # as published
            },
            sampling={"steps": SETTINGS["steps"]},
            gradient={"replay_steps": None} | GRADIENTS[name],
            adapter={"components": ["text_encoder"], "rank": SETTINGS["rank"]},
            optimizer={"lr": SETTINGS["lr"], "schedule": "cosine", "warmup": 0},
            train={
                **{"iterations": iterations, "prompts_per_iteration": 1, "seed": seed},
                "distinct_iterations": None,  # no cache: its folder is temporary
            },
            output=folder,
        )
    return [trainer.iteration(step).batch.losses["loss"] for step in range(iterations)]


def shares() -> dict[str, Any]:
    """Compute the norm of each step's contribution to the gradient, for random noises and matrices R.

    Equation 9 is a sum over steps, R A_t B_t d epsilon_t / d theta; theta are the adapter's
    parameters. B_t is the identity in a biased gradient, and A_t is C_i a_i.
    """
    pipe = testbed.pipeline()
    parameters = add_lora(pipe, "text_encoder", SETTINGS["rank"])
    texts = [token_embeddings(pipe, [text]) for text in (PROMPT, "")]  # (1, L, d) each
    runs, steps = SETTINGS["runs"], SETTINGS["shares_steps"]
    branches = {
        branch: {EMBEDDINGS: text.detach().repeat(runs, 1, 1).requires_grad_()}
        for branch, text in zip(("cond", "uncond"), texts, strict=True)
    }
    noise = initial_noise((4, 16, 16), [Noise(seed) for seed in range(runs)])
    g = torch.Generator().manual_seed(SETTINGS["shares_seed"])
    r = SETTINGS["deviation_of_R"] * torch.randn(noise.shape, generator=g)  # (n, c, h, w)

    guided = guided_prediction(pipe, branches, noise.shape, testbed.GUIDANCE)
    outputs: list[Tensor] = []

    def evaluate(step: int, scaled: Tensor, t: Tensor) -> Tensor:
        outputs.append(checkpoint(guided, scaled, t, use_reentrant=False))
        return outputs[-1]

    z = denoise(pipe, evaluate, pipe.scheduler, noise, steps)
    coupled = torch.autograd.grad(z, outputs, r)  # R A_t B_t, through all later steps
    trajectory = sample(pipe, pipe.scheduler, branches, noise, steps, testbed.GUIDANCE)

    def lengths(step: int, gradient: Tensor) -> Tensor:
        """Return norms (n,) of the parameters' gradients, given that of one step's guided prediction."""
        alone = torch.full((len(gradient), 1), step)
        replayed = replay(pipe, trajectory, branches, gradient, torch.ones(steps), steps=alone)
        embeddings = [replayed[branch][EMBEDDINGS] for branch in branches]
        found = []
        for one in zip(*(e.split(1) for e in embeddings), strict=True):
            gradients = torch.autograd.grad(texts, parameters, one, retain_graph=True)
            found.append(torch.cat([x.flatten() for x in gradients]).norm())
        return torch.stack(found)

    bare = torch.stack([lengths(i, r) for i in range(steps)])  # (K, n), |R d epsilon / d theta|
    found = {"naive": torch.stack([lengths(i, coupled[i]) for i in range(steps)])}
    for name in BIASED:
        scheduler = BiasedGradientScheduler(pipe.scheduler, GRADIENTS[name]["standardize"])
        scheduler.set_timesteps(steps)
        found[name] = bare * scheduler.gradient_weights().abs()[:, None]  # times C_i a_i
    return {
        "timesteps": trajectory.timesteps.tolist(),
        "lengths": {
            name: [[float(f"{x:.5g}") for x in row] for row in f] for name, f in found.items()
        },
    }


# ---- output --------------------------------------------------------------------------------------


def resume(file: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Return the results of a run that was stopped, or empty ones."""
    if not file.exists():
        return {"settings": settings, "curves": {name: {} for name in GRADIENTS}, "shares": None}
    found = json.loads(file.read_text(encoding="utf-8"))
    if found["settings"] != settings:
        raise SystemExit(f"'{file}' was made with other settings: choose another --out")
    return {key: found[key] for key in ("settings", "curves", "shares")}


def digest() -> str:
    """Hash the testbed's weights."""
    found = hashlib.sha256()
    for file in sorted(testbed.WEIGHTS.glob("*.safetensors")):
        found.update(file.read_bytes())
    return found.hexdigest()[:16]


def write(file: Path, results: dict[str, Any]) -> None:
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(results, indent=1), encoding="utf-8")
    partial.replace(file)


def origin(iterations: int, seeds: int) -> dict[str, Any]:
    return {
        "command": f"python examples/reproduction/figure1.py --iterations {iterations} --seeds {seeds}",
        "commit": commit(),
        "seeds": list(range(seeds)),
        "machine": f"{platform.machine()}, {cores()} processes of 1 thread",
        "versions": {
            "python": sys.version.split()[0],
            "torch": torch.__version__,
            "numpy": np.__version__,
        },
    }


def losses(results: dict[str, Any], name: str, seeds: int) -> np.ndarray:
    """(seeds, iterations)."""
    return np.array([results["curves"][name][str(seed)]["loss"] for seed in range(seeds)])


def require_same_start(results: dict[str, Any], seeds: int) -> None:
    """Check that all trainings start from the same loss, as untrained adapters have no effect."""
    for seed in range(seeds):
        starts = {losses(results, name, seeds)[seed, 0] for name in GRADIENTS}
        if max(starts) - min(starts) > 1e-4:
            raise SystemExit(
                f"the trainings of seed {seed} start from different losses, {sorted(starts)}: the "
                "package was changed while they ran. Delete figure1.json and run again"
            )


def summary(results: dict[str, Any], seeds: int) -> dict[str, Any]:
    """Compare the standardisations by loss, and the contributions of steps by norm."""
    third = -(-results["settings"]["iterations"] // 3)
    last = {name: losses(results, name, seeds)[:, -third:].mean(1) for name in GRADIENTS}
    ranks = sorted(BIASED, key=lambda name: last[name].mean())
    gap = last[ranks[1]] - last[ranks[0]]  # (seeds,), paired: the same data
    length = {name: np.array(rows).mean(1) for name, rows in results["shares"]["lengths"].items()}
    return {
        "criterion": CRITERION,
        "loss": {name: round(float(values.mean()), 4) for name, values in last.items()},
        "loss by seed": {name: values.round(4).tolist() for name, values in last.items()},
        "best of all": min(GRADIENTS, key=lambda name: last[name].mean()),
        "best standardisation": ranks[0],
        "next standardisation": ranks[1],
        "gap to the next": round(float(gap.mean()), 4),
        "standard error of the gap": (
            round(float(gap.std(ddof=1) / seeds**0.5), 4) if seeds > 1 else None
        ),
        "length of the first step's share over the last's": {
            name: float(f"{mean[0] / mean[-1]:.4g}") for name, mean in length.items()
        },
        "first step, exact over not standardised": float(
            f"{length['naive'][0] / length['biased, none'][0]:.4g}"
        ),
    }


def draw(results: dict[str, Any], seeds: int) -> Any:
    """Draw both panels."""
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 5.2), layout="constrained")
    draw_curves(left, results, seeds)
    draw_shares(right, results)
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    for axes in (left, right):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def draw_curves(axes: Any, results: dict[str, Any], seeds: int) -> None:
    comparison = results["summary"]
    for name, (label, look) in LOOKS.items():
        values = losses(results, name, seeds)
        x = np.arange(1, values.shape[1] + 1)
        axes.plot(x, values.mean(0), label=label, lw=1.8, ms=4, **look)
        axes.fill_between(x, values.min(0), values.max(0), color=look["color"], alpha=0.1, lw=0)
    best, after = (LOOKS[comparison[f"{rank} standardisation"]][0] for rank in ("best", "next"))
    error = comparison["standard error of the gap"]
    spread = "one seed" if error is None else f"± {error:.3f}, {seeds} seeds"
    axes.set_title(
        f"Loss in training, mean and range of {seeds} seed{'s' * (seeds > 1)}\n"
        f"lowest standardisation over the last third: {best}\n"
        f"(by {comparison['gap to the next']:.3f} from {after}; {spread})",
        fontsize=10,
    )
    axes.set_xlabel("iteration")
    axes.set_ylabel("loss (alignment + semantics)")
    axes.xaxis.get_major_locator().set_params(integer=True)


def draw_shares(axes: Any, results: dict[str, Any]) -> None:
    timesteps = results["shares"]["timesteps"]
    for name, rows in results["shares"]["lengths"].items():
        values, look = np.array(rows), LOOKS[name][1]  # (K, runs)
        mean = values.mean(1)
        half = 1.645 * values.std(1, ddof=1) / values.shape[1] ** 0.5
        axes.plot(timesteps, mean, lw=1.8, ms=4, **look)
        low = np.maximum(mean - half, values.min(1))
        axes.fill_between(timesteps, low, mean + half, color=look["color"], alpha=0.2, lw=0)
    axes.set_yscale("log")
    ratio = results["summary"]["first step, exact over not standardised"]
    axes.set_title(
        "Length of each step's share of the gradient\n"
        f"mean and 90 % interval of {results['settings']['runs']} random R and noises\n"
        f"(at the first step, coupling makes it {ratio:.3g} times as long)",
        fontsize=10,
    )
    axes.set_xlabel("time step t (sampling goes from right to left)")
    axes.set_ylabel("length, by the adapter's parameters")


if __name__ == "__main__":
    typer.run(main)
