"""What users do on a GPU, on the CPU first and then on the GPU that is not there.

A program, run in an environment of `pretend_cuda`: prints, as JSON, the figures of each scenario on
both devices, or its error, and how each planted fault and each rule ends.
"""

import json
import sys
import traceback
from collections.abc import Callable
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pretend_cuda
import pytest
import stand_ins
import torch
from diffusers.training_utils import EMAModel
from PIL import Image
from test_backends import LABELS, small, spots
from test_cli import run as command

from diffusers_fair import FairnessFinetuner, evaluate, testbed
from diffusers_fair.assess import EvaluationDefaults, baseline_task
from diffusers_fair.baselines import BASELINES
from diffusers_fair.config.schema import RunConfig
from diffusers_fair.evaluation.audit import audit
from diffusers_fair.evaluation.generate import generate
from diffusers_fair.reports.folder import load_report
from diffusers_fair.testbed.backend import load_evaluation_judges
from diffusers_fair.testbed.world import AGE, GENDER
from diffusers_fair.training import batch_gradient
from diffusers_fair.vision.images import to_arrays

Figures = dict[str, Any]
SCENARIOS: dict[str, Callable[[str, Path], Figures]] = {}
FAULTS: dict[str, Callable[[Path], Any]] = {}

SMALL = {
    "adapter": {"rank": 2},
    "prompts": {"images_per_prompt": 4, "keep": {"images": 2, "pairs": 3, "texts": 4}},
    "sampling": {"steps": 3},
    "gradient": {"replay_steps": 2},
    "train": {"iterations": 2, "prompts_per_iteration": 1, "validate_every": None},
    "tracker": "none",
}


def scenario(function: Callable[[str, Path], Figures]) -> Callable[[str, Path], Figures]:
    SCENARIOS[function.__name__] = function
    return function


def fault(function: Callable[[Path], Any]) -> Callable[[Path], Any]:
    FAULTS[function.__name__] = function
    return function


# ---- training ------------------------------------------------------------------------------------


def finetuner(device: str, folder: Path, *overrides: dict[str, Any], dtype: str = "float32") -> Any:
    """A small training of the testbed."""
    values: dict[str, Any] = {"base": {"dtype": dtype}, "output": str(folder)}
    for changes in (SMALL, *overrides, {"train": {"device": device}}):
        for key, value in changes.items():
            values[key] = values.get(key, {}) | value if isinstance(value, dict) else value
    made = FairnessFinetuner.from_recipe("testbed-gender", **values)
    assert made.pipe.unet.device.type == made.parameters[0].device.type == device
    return made


def iteration(trained: Any) -> Figures:
    """What one iteration measures, and where it leaves the parameters."""
    metrics = trained.iteration(0).metrics()
    assert metrics["skipped"] == 0
    assert {p.grad.device.type for p in trained.parameters} == {trained.pipe.unet.device.type}
    return metrics | {"parameters": [p.float().sum().item() for p in trained.parameters]}


def components(*names: str) -> dict[str, Any]:
    return {"adapter": {"rank": 2, "components": list(names)}}


@scenario
def text_encoder_with_face_loss_and_micro_batches(device, folder):
    changes = {"losses": {"face": 0.1}, "train": SMALL["train"] | {"micro_batch": 3}}
    return iteration(finetuner(device, folder, changes))


@scenario
def unet_with_memory_options(device, folder):
    options = {"split_guidance": True, "gradient_checkpointing": True, "channels_last": True}
    changes = components("unet") | {"train": SMALL["train"] | options}
    return iteration(finetuner(device, folder, changes))


@scenario
def soft_tokens(device, folder):
    return iteration(finetuner(device, folder, components("soft_tokens")))


@scenario
def autograd(device, folder):
    changes = {"gradient": {"method": "autograd", "replay_steps": None}}
    return iteration(finetuner(device, folder, changes))


@scenario
def bfloat16(device, folder):
    changes = components("text_encoder", "unet")
    return iteration(finetuner(device, folder, changes, dtype="bfloat16"))


@scenario
def save_and_resume(device, folder):
    """Also validates, and reads the cache of original images."""
    options = {"checkpoint_every": 1, "validate_every": 2, "validation_images": 1}
    changes = {"train": SMALL["train"] | options | {"distinct_iterations": 1}}
    with stopped_after_one_iteration():
        finetuner(device, folder, changes).train(progress=False)
    finetuner(device, folder, changes).train(progress=False)
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    return {"events": [{k: v for k, v in e.items() if k != "seconds"} for e in events]}


@contextmanager
def stopped_after_one_iteration():
    whole = FairnessFinetuner.iteration

    def stop(self, step):
        if step == 1:
            raise KeyboardInterrupt
        return whole(self, step)

    with pytest.MonkeyPatch.context() as patch, suppress(KeyboardInterrupt):
        patch.setattr(FairnessFinetuner, "iteration", stop)
        yield


@scenario
def recipe_for_stable_diffusion(device, folder):
    """The models of a recipe for Stable Diffusion 1.5, each a small one of the same kind."""
    folder.mkdir(parents=True)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        models = {
            "open_clip": stand_ins.open_clip_folder(folder / "open_clip"),
            "dinov2": stand_ins.dinov2_folder(folder / "dinov2"),
            "transformers": stand_ins.vit_folder(folder / "vit", LABELS),
            "checkpoint": stand_ins.checkpoint_folder(folder / "checkpoint", LABELS),
        }
        base = stand_ins.stable_diffusion(folder / "base")
        values = small(RunConfig.load("sd15-gender"), models, base)
    values["models.face_embedder"] = f"timm:{stand_ins.timm_folder(folder / 'timm')}"
    values["models.face_bank"] = str(stand_ins.picture_folder(folder / "real", spots(0, 1)))
    values |= {"output": str(folder / "run"), "train.device": device}
    with pytest.MonkeyPatch.context() as patch:
        stand_ins.retinaface(patch, folder / "torch")
        trained = FairnessFinetuner.from_recipe("sd15-gender", **values)
        assert trained.pipe.unet.device.type == device
        return iteration(trained)


# ---- use -----------------------------------------------------------------------------------------


def saved_adapter(folder: Path, *names: str) -> Path:
    """An adapter that changes the images, made on the CPU."""
    trained = finetuner("cpu", folder / "run", components(*names))
    with torch.no_grad():
        for i, parameter in enumerate(trained.parameters):
            g = torch.Generator().manual_seed(i)
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=g))
    trained.ema.step(trained.parameters)
    return trained.save_adapter(folder / "adapter")


def sample(pipe: Any) -> list[float]:
    """The mean of each image; diffusers' own generators are the CPU's."""
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    images = pipe(["a photo of a chef"] * 2, generator=generators, num_inference_steps=2).images
    return [float(sum(image.convert("L").tobytes())) for image in images]


def testbed_on(device: str) -> Any:
    pipe = testbed.pipeline().to(device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@scenario
def load_after_moving(device, folder):
    """Load into a pipeline on the GPU, scale, unload, load again; and move once it is loaded."""
    figures: Figures = {}
    for names in (("text_encoder", "unet"), ("soft_tokens",)):
        adapter = saved_adapter(folder / names[0], *names)
        pipe = testbed_on(device)
        steps = {
            "base": lambda: None,
            "loaded": lambda: pipe.load_fair_adapter(str(adapter)),  # noqa: B023
            "off": lambda: pipe.set_fair_adapter_scale(0),  # noqa: B023
            "unloaded": lambda: pipe.unload_fair_adapter(),  # noqa: B023
        }
        for name, step in steps.items():
            step()
            figures[f"{names[0]} {name}"] = sample(pipe)
        pipe = testbed_on("cpu")
        pipe.load_fair_adapter(str(adapter), respect_words=True)
        figures[f"{names[0]} moved"] = sample(pipe.to(device))
    return figures


@scenario
def generate_on_generator_of_the_device(device, folder):
    pipe = testbed_on(device)
    g = torch.Generator(device).manual_seed(0)
    image = pipe("a photo of a chef", generator=g, num_inference_steps=2).images[0]
    return {"image": float(sum(image.convert("L").tobytes()))}


def report_figures(report: Any) -> Figures:
    return json.loads(json.dumps(asdict(report.summary)))


@scenario
def evaluate_and_audit(device, folder):
    pipe, prompts = testbed_on(device), ["a photo of a chef", "a photo of a nurse"]
    judges = load_evaluation_judges(["gender", "age"], device)
    options = {"images_per_prompt": 3, "steps": 2, "guidance_scale": 3.0, "progress": False}
    report = evaluate(pipe, prompts, [GENDER, AGE], judges=judges, groups=(), **options)
    for batch in generate(pipe, prompts, seed=0, batch_size=4, **options):
        for image, i, j in zip(to_arrays(batch.images), batch.prompt, batch.image, strict=True):
            file = folder / "images" / prompts[int(i)] / f"{int(j)}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(file)
    audited = audit(folder / "images", [GENDER, AGE], judges=judges, progress=False)
    return {"evaluated": report_figures(report), "audited": report_figures(audited)}


def use_baseline(name: str) -> Callable[[str, Path], Figures]:
    def use(device: str, folder: Path) -> Figures:
        quick = {"concepts": 2, "images_per_prompt": 2, "iterations": 1} if name == "uce" else {}
        sampling = {"steps": 2, "guidance_scale": 3.0, "seed": 0}
        defaults = EvaluationDefaults.of("testbed", None)
        task = baseline_task([GENDER], defaults, torch.device(device), **sampling)
        pipe = BASELINES[name](**quick).apply(testbed_on(device), task)
        options = sampling | {"images_per_prompt": 2, "batch_size": 2, "progress": False}
        batch = next(iter(generate(pipe, ["a photo of a chef"], **options)))
        assert batch.images.device.type == device
        return {"images": batch.images.float().mean((1, 2, 3)).tolist()}

    return use


SCENARIOS |= {f"baseline_{name}": use_baseline(name) for name in BASELINES}


@scenario
def command_line(device, folder):
    """`generate` and `evaluate` with `--device`, an adapter, control prompts and a baseline."""
    folder.mkdir(parents=True)
    adapter = saved_adapter(folder, "text_encoder")
    prompts = folder / "prompts.txt"
    prompts.write_text("a photo of a chef\na photo of a nurse\n")
    sampling = ["--steps", "2", "--images", "2", "--device", device]

    def run(*words: Any) -> None:
        with pytest.MonkeyPatch.context() as patch:
            assert command(patch, *words) == 0

    run("generate", "a chef", "--adapter", adapter, "--out", folder / "images", *sampling)
    for name, change in {
        "report": ["--adapter", adapter, "--group-images", "1"],
        "baseline": ["--baseline", "ethical-intervention", "--no-groups"],
    }.items():
        run("evaluate", "--prompts", prompts, *sampling, *change, "--out", folder / name)
    files = sorted((folder / "images").rglob("*.png"))
    return {
        "images": [sum(Image.open(file).convert("L").tobytes()) for file in files],
        "adapter": report_figures(load_report(folder / "report")),
        "base": report_figures(load_report(folder / "report" / "base")),
        "baseline": report_figures(load_report(folder / "baseline")),
    }


# ---- planted faults ------------------------------------------------------------------------------


@fault
def forward(folder):
    trained = finetuner("cuda", folder)
    trained.pipe.unet.conv_in.to("cpu")
    iteration(trained)


@fault
def backward(folder):
    decode_backward = batch_gradient.decode_backward
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batch_gradient, "decode_backward", lambda *a: decode_backward(*a).cpu())
        iteration(finetuner("cuda", folder))


@fault
def optimizer(folder):
    trained = finetuner("cuda", folder)
    trained.iteration(0)
    for state in trained.optimizer.state.values():
        state["exp_avg"] = state["exp_avg"].cpu()
    trained.iteration(1)


@fault
def resume(folder):
    changes = {"train": SMALL["train"] | {"checkpoint_every": 1}}
    with stopped_after_one_iteration():
        finetuner("cuda", folder, changes).train(progress=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EMAModel, "to", lambda self, *device, **options: None)
        finetuner("cuda", folder, changes).train(progress=False)


@fault
def reference_faces(folder):
    load = batch_gradient.load_reference_faces
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batch_gradient, "load_reference_faces", lambda *a: load(*a[:2], "cpu"))
        iteration(finetuner("cuda", folder, {"losses": {"face": 0.1}}))


# ---- the rules themselves ------------------------------------------------------------------------

TWO_DEVICES = "Expected all tensors to be on the same device"
RULES: dict[str, str | None] = {  # g on the GPU, c on the CPU: what CUDA says, or None
    "g + c": TWO_DEVICES,
    "c + g.sum()": TWO_DEVICES,
    "g + c.sum()": None,
    "torch.where(g > 0, g, torch.tensor(0.0))": None,
    "torch.cat([g, c])": TWO_DEVICES,
    "torch.stack([g.sum(), c.sum()])": TWO_DEVICES,
    "g @ c.T": TWO_DEVICES,
    "torch.nn.functional.linear(g, c)": TWO_DEVICES,
    "g.index_select(0, torch.tensor([0]))": TWO_DEVICES,
    "g[torch.tensor([0])]": None,
    "g[c[:, 0] > 0]": None,
    "c[torch.tensor([0], device='cuda')]": "indices should be either on cpu",
    "c[torch.tensor(0, device='cuda')]": None,
    "g.clone().index_put_((torch.tensor([0]),), c[:1])": TWO_DEVICES,
    "g.clone().index_put_((torch.tensor([0]),), c.sum())": None,
    "g.clone().copy_(c)": None,
    "c.clone().copy_(g)": None,
    "g.clone().fill_(c.sum())": None,
    "g.numpy()": "can't convert cuda:0 device type tensor to numpy",
    "g.cpu().numpy()": None,
    "g.tolist()": None,
    "torch.equal(g, c)": TWO_DEVICES,
    "torch.randn(2, device='cuda', generator=torch.Generator())": "Expected a 'cuda' device type",
    "torch.randn(2, generator=torch.Generator('cuda'))": "Expected a 'cpu' device type",
    "torch.randn(2, device='cuda', generator=torch.Generator('cuda'))": None,
    "torch.randn(2, generator=torch.Generator())": None,
    "torch.ones(2, device='cuda:1')": "invalid device ordinal",
}


def rule(expression: str) -> dict[str, Any]:
    """How an expression ends: the error, or where the result is."""
    names = {"torch": torch, "g": torch.ones(2, 2, device="cuda"), "c": torch.ones(2, 2)}
    try:
        result = eval(expression, names)
    except (RuntimeError, TypeError) as error:
        return {"error": str(error)}
    return {"device": str(getattr(result, "device", None))}


# ---- the program ---------------------------------------------------------------------------------


def outcome(function: Callable[..., Any], *arguments: Any) -> Any:
    try:
        return function(*arguments)
    except (Exception, SystemExit) as error:
        return {"error": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()}


def main(folder: Path, *names: str) -> dict[str, Any]:
    """Run the scenarios of these names, or everything."""
    chosen = {name: SCENARIOS[name] for name in names or SCENARIOS}
    pretend_cuda.use_plain_kernels()
    cpu = {name: outcome(run, "cpu", folder / "cpu" / name) for name, run in chosen.items()}
    pretend_cuda.install()
    cuda = {name: outcome(run, "cuda", folder / "cuda" / name) for name, run in chosen.items()}
    faults = {} if names else {name: outcome(run, folder / name) for name, run in FAULTS.items()}
    return {"cpu": cpu, "cuda": cuda, "faults": faults, "rules": {r: rule(r) for r in RULES}}


if __name__ == "__main__":
    with redirect_stdout(sys.stderr):
        results = main(Path(sys.argv[1]), *sys.argv[2:])
    sys.stdout.write(json.dumps(results))
