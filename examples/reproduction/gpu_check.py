"""Check the package on your GPU at the real size of Stable Diffusion 1.5, without any download.

    python examples/reproduction/gpu_check.py --out gpu-check

An estimate: less than 8 minutes, 16 GB of GPU memory and 3 GB of disk for a while. The base model has the
configurations of Stable Diffusion 1.5 and random weights, so its images are noise; the judges are
small: a MobileNet, and the testbed's encoders. What is checked is that everything runs on the GPU,
and in how much time and memory:

    base            the model is made and written as a folder of diffusers
    train           one iteration for each component in bfloat16 and float16: seconds, and the memory
                    of each stage
    resume          a training that was stopped and resumed, against one that was not
    load            the trained adapter in a pipeline on the GPU, and removed again
    evaluate        images generated and judged
    memory_budget   the memory that `train.memory_budget` measured, against that of an iteration
    channels_last   an iteration with `train.channels_last`
    compile         an iteration with `train.compile`, after one that compiles

A part that fails does not stop the others. Writes gpu_check.json and gpu_check.md; the exit code is
1 if a part failed. Please open an issue with both files: they hold the figures, the command, the
versions, the names of your GPU and system, and errors with paths of your machine; nothing else.
`--only PART` repeats some parts.

`--device cpu --small` runs the same on a narrow model, in a minute and without a GPU.
"""

import gc
import json
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any
from unittest.mock import patch

import torch
import typer

from diffusers_fair import FairnessFinetuner, evaluate, load_fair_adapter
from diffusers_fair.backends import trained_classifier
from diffusers_fair.backends.registry import load_base, load_judges
from diffusers_fair.config.schema import RunConfig
from diffusers_fair.devices import choose_device
from diffusers_fair.provenance import provenance
from diffusers_fair.training import memory
from diffusers_fair.training.batch_gradient import BatchGradient
from diffusers_fair.training.batches import Batch, sample_batch

COMPONENTS = ("text_encoder", "unet", "soft_tokens")
DTYPES = ("bfloat16", "float16")
STAGES = {  # methods of `BatchGradient` -> what they do
    "originals": "original images",
    "_sample": "sampling",
    "_loss": "decoding, judges and their gradient",
    "_replay": "replay",
}
SEED = 0
PROMPTS = ["a photo of the face of a chef, a person", "a photo of the face of a nurse, a person"]
CLASSES = ["female", "male"]
GB = 1e9  # bytes
STABLE_DIFFUSION_1: dict[str, dict[str, Any]] = {
    "unet": {"sample_size": 64, "cross_attention_dim": 768},
    "vae": {
        **{"sample_size": 512, "block_out_channels": (128, 256, 512, 512)},
        **{"layers_per_block": 2},
    },
    "text_encoder": {
        **{"hidden_size": 768, "intermediate_size": 3072},
        **{"num_attention_heads": 12, "num_hidden_layers": 12},
    },
}
SMALL: dict[str, dict[str, Any]] = {
    "unet": {
        **{"sample_size": 8, "cross_attention_dim": 32, "block_out_channels": (16, 16, 32, 32)},
        **{"layers_per_block": 1, "attention_head_dim": 4, "norm_num_groups": 8},
    },
    "vae": {
        **{"sample_size": 64, "block_out_channels": (8, 8, 16, 16)},
        **{"layers_per_block": 1, "norm_num_groups": 4},
    },
    "text_encoder": {
        **{"hidden_size": 32, "intermediate_size": 64},
        **{"num_attention_heads": 4, "num_hidden_layers": 2},
    },
}


@dataclass
class Check:
    """What the parts share."""

    device: torch.device
    small: bool
    folder: Path
    """A temporary folder."""
    figures: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Part -> its figures, or its error."""

    @property
    def count(self) -> int:
        """Number of steps, and of images per iteration."""
        return 2 if self.small else 4

    @property
    def base(self) -> Path:
        return self.folder / "base"

    @property
    def classifier(self) -> Path:
        return self.folder / "classifier"

    @property
    def adapter(self) -> Path:
        """The adapter that the part `resume` trains."""
        return self.folder / "resumed" / "adapter"


def main(
    out: Annotated[Path, typer.Option(help="Folder to write gpu_check.json and .md to.")],
    device: Annotated[str, typer.Option(help="auto, cuda, cuda:N, mps or cpu.")] = "auto",
    small: Annotated[bool, typer.Option("--small", help="Check a narrow model instead.")] = False,
    only: Annotated[list[str] | None, typer.Option(help="Part; may be repeated.")] = None,
) -> None:
    """Run the parts and write their figures."""
    chosen = {"base", *(only or PARTS)}
    if unknown := chosen - PARTS.keys():
        raise typer.BadParameter(f"expected parts of {', '.join(PARTS)}, got {min(unknown)}")
    out.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        check = Check(choose_device(device), small, Path(folder))
        for name in [name for name in PARTS if name in chosen]:
            check.figures[name] = result(PARTS[name], check)
            write(check, out)
            print(name, check.figures[name].get("error", "ok"), flush=True)
    failed = [name for name, figures in check.figures.items() if "error" in figures]
    print(f"{len(failed)} of {len(check.figures)} parts failed; see {out / 'gpu_check.md'}")
    if failed:
        raise typer.Exit(1)


def result(part: Callable[[Check], dict[str, Any]], check: Check) -> dict[str, Any]:
    """Return the figures of a part and how long it took, or its error."""
    start = time.perf_counter()
    try:
        figures = part(check)
    except Exception as error:
        traceback.clear_frames(error.__traceback__)  # they hold tensors
        figures = {"error": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()}
    _free(check.device)
    return figures | {"part took": round(time.perf_counter() - start, 1)}


# ---- the base model ------------------------------------------------------------------------------


def make_base(check: Check) -> dict[str, Any]:
    """Write a pipeline in the layout of Stable Diffusion 1.5, and a classifier."""
    from diffusers import (
        AutoencoderKL,
        PNDMScheduler,
        StableDiffusionPipeline,
        UNet2DConditionModel,
    )
    from transformers import CLIPTextConfig, CLIPTextModel

    from diffusers_fair.testbed.models import NOISE
    from diffusers_fair.testbed.tokenizer import tokenizer

    torch.manual_seed(SEED)
    tokens = deepcopy(tokenizer())  # CLIP's
    scheduler = PNDMScheduler(**NOISE, skip_prk_steps=True, set_alpha_to_one=False)
    sizes = SMALL if check.small else STABLE_DIFFUSION_1
    with check.device:  # quicker than on the CPU
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            **sizes["vae"],
        )
        unet = UNet2DConditionModel(**sizes["unet"])  # its default blocks are those of version 1
        text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokens),
                bos_token_id=len(tokens) - 2,
                eos_token_id=len(tokens) - 1,
                pad_token_id=len(tokens) - 1,
                **sizes["text_encoder"],
            )
        )
    models = {"vae": vae.half(), "unet": unet.half(), "text_encoder": text_encoder.half()}
    StableDiffusionPipeline(
        **models,
        tokenizer=tokens,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(check.base)
    classifier = trained_classifier.mobilenet(len(CLASSES))
    trained_classifier.write(check.classifier, classifier, {"classes": CLASSES, "size": 224})
    return {f"millions of parameters, {name}": _millions(x) for name, x in models.items()}


def _millions(model: torch.nn.Module) -> float:
    return round(sum(p.numel() for p in model.parameters()) / 1e6, 1)


# ---- training ------------------------------------------------------------------------------------


def config(check: Check, folder: str, **overrides: Any) -> RunConfig:
    """Return a short training for whole images, as random ones have no faces."""
    classifier = f"checkpoint:{check.classifier}"
    judges = {"face_detector": "none", "classifiers": classifier}  # the encoders are the testbed's
    train = {
        **{"iterations": 2, "checkpoint_every": 1, "validate_every": None},
        **{"micro_batch": check.count // 2, "device": str(check.device), "seed": SEED},
    }
    values = {
        "base": {"model": str(check.base), "dtype": "bfloat16"},
        "attributes": [{"name": "gender", "classes": CLASSES, "region": "image"}],
        "prompts": {"sets": ["occupations"], "images_per_prompt": check.count},
        "models": judges,
        "evaluation": {"models": judges},
        "sampling": {"steps": check.count},
        "output": str(check.folder / folder),
        **overrides,
    }
    return RunConfig.model_validate(values | {"train": train | overrides.get("train", {})})


def start(recipe: RunConfig) -> FairnessFinetuner:
    """Load a training, and change the adapter, so that there is a loss: a new one changes nothing."""
    finetuner = FairnessFinetuner(recipe)
    with torch.no_grad():
        for parameter in finetuner.parameters:
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(SEED))
            parameter.add_(0.05 * noise.to(parameter))
    return finetuner


def train(check: Check, component: str, dtype: str) -> dict[str, Any]:
    """Train for two iterations; the second is timed, as the first one chooses kernels."""
    finetuner = start(
        config(
            check,
            f"{component}-{dtype}",
            base={"model": str(check.base), "dtype": dtype},
            adapter={"components": [component]},
        )
    )
    figures: dict[str, Any] = {"GB, models": _gigabytes(check.device)}
    with stages(check.device) as found:
        figures["gradient norm"] = round(iterate(finetuner, 0), 3)
    figures |= {f"GB, {stage}": found[method] for method, stage in STAGES.items()}
    return figures | {"seconds": seconds(finetuner, 1)}


def iterate(finetuner: FairnessFinetuner, step: int) -> float:
    """Make an update, and return the norm of its gradient.

    Raises:
        ArithmeticError: there is nothing to learn from.
    """
    statistics = finetuner.iteration(step)
    if statistics.skipped or not statistics.gradient_norm > 0:
        raise ArithmeticError(
            f"expected a finite gradient other than 0, got norm {statistics.gradient_norm}, and "
            f"{statistics.skipped} updates were skipped"
        )
    return statistics.gradient_norm


def seconds(finetuner: FairnessFinetuner, step: int) -> float:
    """Return how long an update takes."""
    start = time.perf_counter()
    iterate(finetuner, step)
    _synchronize(finetuner.parameters[0].device)
    return round(time.perf_counter() - start, 2)


@contextmanager
def stages(device: torch.device) -> Iterator[dict[str, float]]:
    """Measure the peak memory of each stage of an iteration; the dictionary is filled on the way.

    A stage within another one belongs to that one.
    """
    found: dict[str, float] = {}
    active: list[str] = []

    def measured(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **options: Any) -> Any:
            if active:
                return method(*args, **options)
            active.append(name)
            memory.reset_peak(device)
            try:
                return method(*args, **options)
            finally:
                active.pop()
                found[name] = max(found.get(name, 0.0), _gigabytes(device))

        return run

    with ExitStack() as stack:
        for name in STAGES:
            method = measured(name, getattr(BatchGradient, name))
            stack.enter_context(patch.object(BatchGradient, name, method))
        yield found


def resume(check: Check) -> dict[str, Any]:
    """Compare a training that was stopped after an iteration with one that was not."""
    whole = start(config(check, "whole"))
    whole.train(progress=False)
    update = FairnessFinetuner.iteration

    def stop(self: FairnessFinetuner, step: int) -> Any:
        if step == 1:
            raise KeyboardInterrupt
        return update(self, step)

    with patch.object(FairnessFinetuner, "iteration", stop), suppress(KeyboardInterrupt):
        start(config(check, "resumed")).train(progress=False)
    resumed = start(config(check, "resumed"))
    resumed.train(progress=False)
    expected, parameters = (
        torch.cat([p.detach().flatten().float() for p in x.parameters]) for x in (whole, resumed)
    )
    difference = ((parameters - expected).norm() / expected.norm()).item()
    if not difference < 0.01:  # GPUs add in any order
        raise ArithmeticError(f"the parameters differ from an uninterrupted run's: {difference}")
    return {"relative difference of the parameters": difference}


def memory_budget(check: Check) -> dict[str, Any]:
    """Compare the memory that the choice of the micro-batch measured with that of an iteration."""
    options = {"micro_batch": None, "memory_budget": _budget(check.device)}
    finetuner = start(config(check, "budget", train=options))
    measure, found = memory._measure, dict[int, float]()

    def spy(gradient: BatchGradient, batch: Batch, images: int) -> int:
        used = measure(gradient, batch, images)
        found[images] = used / GB
        return used

    with patch.object(memory, "_measure", spy):
        batch = sample_batch(finetuner.config, finetuner.prompts, 0)
        memory.choose_micro_batch(finetuner.gradient, batch, options["memory_budget"])
    memory.reset_peak(check.device)
    iterate(finetuner, 0)
    size = finetuner.gradient.micro_batch
    assert size is not None
    return {
        "GB, budget": round(options["memory_budget"], 1),
        "micro-batch": size,
        "memory options": ", ".join(finetuner.gradient.memory_options) or "none",
        "GB, predicted": round(found[size], 2),
        "GB, an iteration": _gigabytes(check.device),
    }


def channels_last(check: Check) -> dict[str, Any]:
    """Time an iteration with `train.channels_last`, to be compared with training in bfloat16."""
    finetuner = start(config(check, "channels", train={"channels_last": True}))
    return {"seconds, first": seconds(finetuner, 0), "seconds": seconds(finetuner, 1)}


def compiled(check: Check) -> dict[str, Any]:
    """Time an iteration with `train.compile`, to be compared with training in bfloat16."""
    try:
        finetuner = start(config(check, "compiled", train={"compile": True}))
        return {"seconds, first": seconds(finetuner, 0), "seconds": seconds(finetuner, 1)}
    finally:
        torch._dynamo.reset()


# ---- use -----------------------------------------------------------------------------------------


def load(check: Check) -> dict[str, Any]:
    """Generate with the adapter of `resume`, without it, and once it is removed."""
    pipe = load_base(str(check.base), None, "bfloat16", check.device)
    before = generate(pipe, check.count)
    start = time.perf_counter()
    load_fair_adapter(pipe, check.adapter)
    figures = {"seconds to load": round(time.perf_counter() - start, 2)}
    figures["change of the images"] = (generate(pipe, check.count) - before).abs().mean().item()
    pipe.unload_fair_adapter()
    left = (generate(pipe, check.count) - before).abs().mean().item()
    if left > 1 / 255:
        raise ArithmeticError(f"images differ by {left} on average once the adapter is removed")
    return figures | {"change once it is removed": left}


def generate(pipe: Any, steps: int) -> torch.Tensor:
    """(n, 3, h, w) in [0, 1], on the CPU."""
    pipe.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(SEED + i) for i in range(len(PROMPTS))]
    options = {"num_inference_steps": steps, "output_type": "pt"}
    return pipe(PROMPTS, generator=generators, **options).images.float().cpu()


def evaluation(check: Check) -> dict[str, Any]:
    """Generate and judge images."""
    recipe = config(check, "evaluation")
    pipe, attributes = load_base(str(check.base), None, "bfloat16", check.device), recipe.balanced()
    judges = load_judges(recipe.evaluation.models, attributes, check.device)
    start = time.perf_counter()
    report = evaluate(
        pipe,
        PROMPTS,
        attributes,
        judges=judges,
        images_per_prompt=2,
        steps=check.count,
        groups=(),
        progress=False,
    )
    took = time.perf_counter() - start
    bias = report.summary.bias["gender"]
    return {
        "seconds per image": round(took / report.summary.images, 2),
        "bias": None if bias is None else bias.mean,
    }


# ---- memory --------------------------------------------------------------------------------------


def _gigabytes(device: torch.device) -> float:
    return round(memory.peak(device) / GB, 2)


def _budget(device: torch.device) -> float:
    """All memory of the device in GB; on the CPU, more than is needed."""
    if device.type != "cuda":
        return 64.0
    return torch.cuda.get_device_properties(device).total_memory / GB


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


# ---- results -------------------------------------------------------------------------------------


PARTS: dict[str, Callable[[Check], dict[str, Any]]] = {
    "base": make_base,
    **{
        f"train/{component}/{dtype}": partial(train, component=component, dtype=dtype)
        for dtype in DTYPES
        for component in COMPONENTS
    },
    "resume": resume,
    "load": load,
    "evaluate": evaluation,
    "memory_budget": memory_budget,
    "channels_last": channels_last,
    "compile": compiled,
}


def write(check: Check, out: Path) -> None:
    """Write all figures so far."""
    facts = {"seed": SEED, "small": check.small, "provenance": provenance(check.device)}
    data = json.dumps(facts | {"parts": check.figures}, indent=1)
    (out / "gpu_check.json").write_text(data + "\n", "utf-8")
    (out / "gpu_check.md").write_text("\n".join(document(facts, check.figures)) + "\n", "utf-8")


def document(facts: dict[str, Any], parts: dict[str, dict[str, Any]]) -> Iterator[str]:
    """Yield the lines of the markdown file."""
    origin = facts["provenance"]
    machine = {**origin["machine"], **origin["versions"]}
    yield "# GPU check"
    yield ""
    yield f"`{origin['command']}`, commit {origin['commit']}, seed {facts['seed']}, {origin['date']}"
    yield ""
    yield ", ".join(f"{name} {value}" for name, value in machine.items())
    yield ""
    training = {name: x for name, x in parts.items() if name.startswith("train/")}
    done = [x for x in training.values() if "error" not in x]
    if done:
        yield from table(
            ["training", *done[0]], [[n, *x.values()] for n, x in training.items() if x in done]
        )
    rows = [
        [name, "failed" if "error" in x else "ok", x["part took"], _sentence(x)]
        for name, x in parts.items()
    ]
    yield from table(["part", "", "seconds", "figures"], rows)
    for name, figures in parts.items():
        if "error" in figures:
            yield from (f"## {name} failed", "", "```", *figures["trace"].splitlines(), "```", "")


def _sentence(figures: dict[str, Any]) -> str:
    if "error" in figures:
        return figures["error"].splitlines()[0].replace("|", "\\|")
    return "; ".join(f"{name}: {x}" for name, x in figures.items() if name != "part took")


def table(head: list[str], rows: list[list[Any]]) -> Iterator[str]:
    """Yield a markdown table, and an empty line."""
    for row in (head, ["---"] * len(head), *rows):
        yield f"| {' | '.join(map(str, row))} |"
    yield ""


if __name__ == "__main__":
    typer.run(main)
