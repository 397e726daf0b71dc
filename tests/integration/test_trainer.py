"""The loop on the testbed, at a size that takes seconds."""

import errno
import json
import logging
import os
import re
import shutil
import signal
import sys
from pathlib import Path

import cost
import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

import diffusers_fair.training.batch_gradient as gradient_module
import diffusers_fair.training.trainer as trainer_module
import diffusers_fair.training.validation as validation_module
from diffusers_fair import FairnessFinetuner, TrainingCallback, atomic, export_adapter, testbed
from diffusers_fair.adapters.folder import read_adapter
from diffusers_fair.backends import registry
from diffusers_fair.config.recipe import recipes
from diffusers_fair.config.schema import MEMORY_OPTIONS, RunConfig
from diffusers_fair.diffusion.sampling import decode
from diffusers_fair.folder_lock import folder_lock
from diffusers_fair.objective.objective import Objective
from diffusers_fair.objective.statistics import BatchStatistics
from diffusers_fair.training import memory
from diffusers_fair.training.batches import Shard, sample_batch
from diffusers_fair.training.run_folder import RunFolder, claim_run_folder
from diffusers_fair.training.stopping import TrainingStoppedError
from diffusers_fair.training.tracking import Tracker

SMALL = {
    "base": {"dtype": "float32"},
    "attributes": [
        {"name": "gender", "classes": ["female", "male"], "threshold": 0.6, "steering": 0.5}
    ],
    "adapter": {"rank": 2},
    "prompts": {"images_per_prompt": 4, "keep": {"images": 2, "distinct": 4, "texts": 4}},
    "sampling": {"steps": 3},
    "gradient": {"replay_steps": 2},
    "train": {
        "iterations": 4,
        "prompts_per_iteration": 1,
        "checkpoint_every": 2,
        "validate_every": 4,
        "validation_images": 2,
    },
    "tracker": "none",
}
NEUTRAL = {"images_per_prompt": 4, "keep": None}  # prompts of training as published


def finetuner(folder, **overrides) -> FairnessFinetuner:
    return FairnessFinetuner.from_recipe(
        "testbed-gender", **SMALL | {"output": str(folder)} | overrides
    )


@pytest.mark.slow
def test_two_finetuners_in_one_process_have_their_own_devices(tmp_path, monkeypatch):
    """Whatever accelerate says, whose state is one per process; `meta` stands for a GPU."""
    choose = registry.choose_device
    devices = {"cuda": torch.device("meta")}
    monkeypatch.setattr(registry, "choose_device", lambda x: devices.get(x) or choose(x))
    AcceleratorState._reset_state(reset_partial_state=True)
    there = {"train": {"device": "cuda"}}
    for expected, options in {"cpu": {}, "meta": there}.items():
        trained = finetuner(tmp_path / expected, **options)
        judges = trained.judges
        places = [p.device.type for p in trained.parameters]
        places += [trained.pipe.device.type, judges.device.type, judges.clip.model.device.type]
        assert {*places, trained.device.type} == {expected}
        assert PartialState._shared_state == {}  # not ours to decide


class Recorder(TrainingCallback):
    """Notes what happened in which order, and counts the evaluations of the denoiser."""

    def __init__(self):
        self.steps, self.results, self.reports, self.events = [], [], [], []
        self.evaluations = 0.0

    def on_iteration(self, step, statistics):
        self.steps.append(statistics.metrics())
        self.events.append(("iteration", step))

    def on_validation(self, step, result, report):
        self.results.append(result)
        self.reports.append(report)
        self.events.append(("validation", step))

    def on_checkpoint(self, step, folder):
        assert (folder / "checkpoints" / f"step-{step:06d}").is_dir()
        self.events.append(("checkpoint", step))

    def count(self, module, inputs):
        """With both branches of the guidance; forward and backward are two evaluations."""
        self.evaluations += len(inputs[0]) / 2 * (2 if torch.is_grad_enabled() else 1)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run of four iterations, and its finetuner."""
    folder = tmp_path_factory.mktemp("runs") / "first"
    recorder = Recorder()
    trained = finetuner(folder, callbacks=[recorder], tracker="tensorboard")
    trained.pipe.unet.register_forward_pre_hook(recorder.count)
    trained.train(progress=False)
    return folder, trained


@pytest.mark.slow
def test_a_run_leaves_what_the_design_says(run):
    folder, _ = run
    names = {path.name for path in folder.iterdir()}
    assert {"recipe.yaml", "events.jsonl", "checkpoints", "adapter", "adapter-best"} <= names
    assert [path.name for path in (folder / "samples").iterdir()] == ["step-000004.png"]
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == [
        "step-000002",
        "step-000004",
    ]


@pytest.mark.slow
def test_every_iteration_is_recorded(run):
    folder, _ = run
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    steps = [event for event in events if "loss" in event]
    assert [event["iteration"] for event in steps] == [1, 2, 3, 4]
    for event in steps:
        assert event["loss"] == pytest.approx(event["alignment"] + event["semantics"], abs=1e-5)
    assert 0 <= events[-1]["validation/gender"] <= 1


@pytest.mark.slow
def test_callbacks_follow_the_training(run):
    folder, trained = run
    [recorder] = trained.callbacks
    order = ["iteration 1", "iteration 2", "checkpoint 2", "iteration 3", "iteration 4"]
    order += ["validation 4", "checkpoint 4"]
    assert [f"{kind} {step}" for kind, step in recorder.events] == order
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    assert [step["loss"] for step in recorder.steps] == [e["loss"] for e in events if "loss" in e]
    assert recorder.results[0].bias["gender"] == events[-1]["validation/gender"]
    assert recorder.reports[0].samples


@pytest.mark.slow
def test_tensorboard_gets_curves_and_samples(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logged = EventAccumulator(str(run[0] / "logs" / "run"))
    logged.Reload()
    assert [point.step for point in logged.Scalars("loss")] == [1, 2, 3, 4]
    assert [point.step for point in logged.Scalars("validation/gender")] == [4]
    [sample] = logged.Images("samples")
    height, width = np.asarray(Image.open(run[0] / "samples" / "step-000004.png")).shape[:2]
    assert (sample.step, sample.height, sample.width) == (4, height, width)


@pytest.mark.slow
def test_a_run_costs_what_its_recipe_tells(run):
    _, trained = run
    assert trained.callbacks[0].evaluations == cost.evaluations(trained.config)


@pytest.mark.slow
def test_the_adapter_says_what_it_is(run):
    info, weights = read_adapter(run[0] / "adapter")
    assert info.base_model == testbed.NAME
    assert [attribute.name for attribute in info.attributes] == ["gender"]
    assert info.recipe["sampling"]["steps"] == [3, 3]
    assert {"female", "woman", "women", "she"} <= {*info.words["gender"]["female"]}
    moved = [key for key, weight in weights.items() if ".lora_B" in key and weight.any()]
    assert len(moved) == 4 * 6  # every layer of the text encoder has learned something


@pytest.mark.slow
def test_same_recipe_and_seed_give_the_same_adapter(run, tmp_path):
    finetuner(tmp_path / "again").train(progress=False)
    first, again = (read_adapter(f / "adapter")[1] for f in (run[0], tmp_path / "again"))
    assert all(torch.equal(first[key], again[key]) for key in first)


@pytest.mark.slow
def test_another_seed_gives_another_adapter(run, tmp_path):
    other = finetuner(tmp_path / "other", **{"train": SMALL["train"] | {"seed": 1}})
    other.train(progress=False)
    first, second = (read_adapter(f / "adapter")[1] for f in (run[0], tmp_path / "other"))
    assert not all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.slow
def test_a_stopped_run_goes_on_to_the_same_adapter(run, tmp_path, monkeypatch):
    folder = tmp_path / "stopped"
    stopped = finetuner(folder)
    whole = FairnessFinetuner.iteration

    def stop(self, number):
        if number == 3:
            raise KeyboardInterrupt
        return whole(self, number)

    with monkeypatch.context() as patch:
        patch.setattr(FairnessFinetuner, "iteration", stop)
        with pytest.raises(KeyboardInterrupt):
            stopped.train(progress=False)
    assert not (folder / "adapter").exists()
    resumed = finetuner(folder)
    resumed.train(progress=False)
    first, again = (read_adapter(f / "adapter")[1] for f in (run[0], folder))
    assert all(torch.equal(first[key], again[key]) for key in first)
    targets = [each.gradient.objective.feedback["gender"].shifted() for each in (run[1], resumed)]
    assert torch.equal(*targets)


@pytest.mark.slow
def test_ctrl_c_saves_and_says_how_to_go_on(run, tmp_path, monkeypatch):
    folder = tmp_path / "stopped"
    whole = FairnessFinetuner.iteration

    def asked(self, step):
        if step == 2:  # between two checkpoints
            os.kill(os.getpid(), signal.SIGINT)
        return whole(self, step)

    with monkeypatch.context() as patch:
        patch.setattr(FairnessFinetuner, "iteration", asked)
        with pytest.raises(
            TrainingStoppedError, match=r"after iteration 3 of 4, .* give the same command again"
        ) as stop:
            finetuner(folder).train(progress=False)
    assert stop.value.code == 130
    newest = {path.name for path in (folder / "checkpoints").iterdir()}
    assert newest == {"step-000002", "step-000003"}
    finetuner(folder).train(progress=False)
    same_outcome(run[0], folder)


def learning_rates(trained) -> list[float]:
    return [group["lr"] for group in trained.optimizer.param_groups]


@pytest.mark.slow
def test_a_finished_run_goes_on_with_more_iterations(tmp_path):
    """With the learning rate of the longer schedule, and the best adapter of all validations."""
    folder = tmp_path / "run"
    options = {"optimizer": {"lr": 5e-5, "schedule": "cosine", "warmup": 0}, "prompts": NEUTRAL}
    train = SMALL["train"] | {"validate_every": 1}
    short = finetuner(folder, train=train | {"iterations": 1}, **options)
    short.train(progress=False)
    assert learning_rates(short) == [0.0]
    longer = finetuner(folder, train=train | {"iterations": 2}, **options)
    rates, update = [], longer.optimizer.step
    longer.optimizer.step = lambda: rates.append(learning_rates(longer)) or update()
    longer.train(progress=False)
    assert rates == [pytest.approx([2.5e-5])]  # half way along the cosine
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    assert [event["iteration"] for event in events] == [1, 1, 2, 2]
    biases = [event["validation/gender"] for event in events[1::2]]
    assert longer.validation.best_bias in biases
    assert longer.validation.best_bias <= biases[0] == short.validation.best_bias
    assert read_adapter(folder / "adapter")[0].training["iterations"] == 2
    assert RunConfig.load(folder / "recipe.yaml") == longer.config
    with pytest.raises(ValueError, match=r"train\.iterations is 2 there and 1 here"):
        short.train(progress=False)


@pytest.mark.slow
def test_what_refuses_to_start_leaves_no_folder(tmp_path):
    budget = SMALL["train"] | {"memory_budget": 0.01}
    refused = finetuner(tmp_path / "run", train=budget)
    with pytest.raises(ValueError, match=r"memory_budget is 0\.01 GB"):
        refused.train(progress=False)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_two_trainings_do_not_share_a_folder(run):
    folder, trained = run
    message = "first' is being written by another process"
    with folder_lock(folder), pytest.raises(ValueError, match=message):
        trained.train(progress=False)


@pytest.mark.slow
def test_a_full_disk_stops_the_run_which_goes_on_when_there_is_room(run, tmp_path, monkeypatch):
    folder = tmp_path / "full"
    sync = atomic.fsync

    def full(path):
        if "step-000004" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(path)

    with monkeypatch.context() as patch:
        patch.setattr(atomic, "fsync", full)
        with pytest.raises(
            TrainingStoppedError, match=r"no room on the disk for '.*full' \(No space left"
        ):
            finetuner(folder).train(progress=False)
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-000002"]
    finetuner(folder).train(progress=False)
    same_outcome(run[0], folder)


@pytest.mark.slow
def test_a_damaged_checkpoint_and_leftovers_are_no_hindrance(run, tmp_path, caplog):
    """Also a checkpoint of the first version, which knew less."""
    folder = tmp_path / "damaged"
    shutil.copytree(run[0], folder)
    old = torch.load(folder / "checkpoints" / "step-000002" / "state.pt", weights_only=True)
    for key in ("caution", "seconds", "micro_batch"):
        del old[key]
    torch.save(old | {"skipped": 0}, folder / "checkpoints" / "step-000002" / "state.pt")
    (folder / "checkpoints" / "step-000002" / "state.sha256").unlink()
    (folder / "checkpoints" / "step-000004" / "state.pt").write_bytes(b"PK")
    (folder / ".partial-1-recipe.yaml").touch()
    (folder / "checkpoints" / ".partial-1-step-000006").mkdir()
    (folder / ".adapter-best-0123abcd").mkdir()
    shutil.rmtree(folder / "adapter")
    finetuner(folder).train(progress=False)
    assert "step-000004' is damaged" in caplog.text
    same_outcome(run[0], folder)


def same_outcome(expected, folder):
    """The same files, adapters and events, except the tracker's; only the time is another."""
    names = [
        {p.relative_to(f).as_posix() for p in f.rglob("*") if "step-000003" not in p.parts}
        for f in (expected, folder)
    ]
    names = [{n for n in group if not n.startswith(("checkpoints/", "logs"))} for group in names]
    assert names[0] == names[1]
    for name in ("adapter", "adapter-best"):
        first, again = (read_adapter(f / name)[1] for f in (expected, folder))
        assert all(torch.equal(first[key], again[key]) for key in first)
    events = [
        [json.loads(line) for line in (f / "events.jsonl").read_text().splitlines()]
        for f in (expected, folder)
    ]
    for event in events[0] + events[1]:
        event.pop("seconds", None)
    assert events[0] == events[1]


@pytest.mark.slow
def test_killed_trainings_end_as_if_nothing_had_been(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "examples" / "reproduction")
    import kill_test

    train = kill_test.SMALL["train"] | {"iterations": 3, "checkpoint_every": 1}
    monkeypatch.setitem(kill_test.SMALL, "train", train | {"validate_every": None})
    found = kill_test.kill_test(2, 3, tmp_path)
    assert [kill["differs"] for kill in found["kills"]] == [[], []]
    assert not all(kill["finished"] for kill in found["kills"])


@pytest.mark.slow
def test_a_run_may_be_looked_into_before_it_is_trained(tmp_path):
    train = SMALL["train"] | {"iterations": 1, "distinct_iterations": 1, "validate_every": None}
    trainer = finetuner(tmp_path / "looked", train=train, prompts=NEUTRAL)
    figures = trainer.iteration(0).metrics()
    assert len(list((tmp_path / "looked" / "originals").iterdir())) == 1
    again = finetuner(tmp_path / "looked", train=train, prompts=NEUTRAL)
    again.train(progress=False)
    event = json.loads((tmp_path / "looked" / "events.jsonl").read_text())
    assert event["loss"] == figures["loss"]


@pytest.mark.slow
def test_an_adapter_is_trained_further(run, tmp_path):
    adapter = {"rank": 2, "init_from": str(run[0] / "adapter")}
    further = finetuner(tmp_path / "further", adapter=adapter)
    expected, weights = read_adapter(run[0] / "adapter")[1], further.adapter.weights()
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[key], expected[key]) for key in expected)
    further.save_adapter(tmp_path / "saved")  # the moving average starts there, too
    saved = read_adapter(tmp_path / "saved")[1]
    assert all(torch.equal(saved[key], expected[key]) for key in expected)


@pytest.mark.slow
def test_training_starts_from_a_file_of_another_program(run, tmp_path):
    (path,) = export_adapter(run[0] / "adapter", "kohya", tmp_path)
    adapter = {"rank": 2, "init_from": str(path)}
    weights = finetuner(tmp_path / "further", adapter=adapter).adapter.weights()
    expected = read_adapter(run[0] / "adapter")[1]
    assert all(torch.equal(weights[key], expected[key]) for key in expected)
    with safe_open(path, framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    layer = {f"lora_unet_extra.lora_{half}.weight": torch.ones(2, 2) for half in ("down", "up")}
    save_file(tensors | layer, path)
    with pytest.warns(UserWarning, match=r"init_from: 1 layers of '.*' are not used, as the"):
        finetuner(tmp_path / "more", adapter=adapter)
    with pytest.raises(ValueError, match=r"adapter.init_from: expected '.*set adapter.rank to the"):
        finetuner(tmp_path / "other", adapter=adapter | {"rank": 3})


@pytest.mark.slow
def test_an_adapter_of_other_components_or_another_base_is_refused(run, tmp_path, monkeypatch):
    adapter = {"rank": 3, "init_from": str(run[0] / "adapter")}
    with pytest.raises(
        ValueError,
        match=r"init_from: expected the components .*rank=3.*got .*rank=2.*set adapter.components",
    ):
        finetuner(tmp_path / "x", adapter=adapter)
    missing = r"init_from: there is no adapter folder at .*: train the recipe that writes it"
    with pytest.raises(ValueError, match=missing):
        finetuner(tmp_path / "x", adapter={"rank": 2, "init_from": str(tmp_path / "nowhere")})
    monkeypatch.setattr(trainer_module, "base_fingerprint", lambda pipe: "0" * 64)
    with pytest.raises(ValueError, match=r"was trained on 'testbed', whose layers differ"):
        finetuner(tmp_path / "x", adapter=adapter | {"rank": 2})


@pytest.mark.slow
def test_the_micro_batch_is_chosen_from_a_memory_budget_and_kept(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(memory, "peak", lambda device: len(taken) * 10**9)
    taken = []
    train = SMALL["train"] | {"iterations": 1, "validate_every": None, "memory_budget": 2.5}
    trainer = finetuner(tmp_path / "run", train=train)
    backward = trainer.gradient.backward

    def counted(batch, number, **options):
        if options:
            taken.append(len(batch.noise))
        return backward(batch, number, **options)

    monkeypatch.setattr(trainer.gradient, "backward", counted)
    caplog.set_level(logging.INFO)
    trainer.train(progress=False)
    assert re.search(r"2 images at a time fit .* 2\.5 GB: the same as", caplog.text)
    assert taken == [1, 2]  # 4 would take 2 + 2 * 1
    assert trainer.gradient.micro_batch == 2
    again = finetuner(tmp_path / "run", train=train)
    again.train(progress=False)  # measures nothing
    assert again.gradient.micro_batch == 2
    other = finetuner(tmp_path / "run", train=train | {"memory_budget": 3.5})
    other._resume(RunFolder(tmp_path / "run"))
    assert other.gradient.micro_batch is None  # to be chosen for the other budget
    with pytest.raises(ValueError, match=r"memory_budget chooses micro_batch, got both"):
        finetuner(tmp_path / "x", train=train | {"micro_batch": 2})


@pytest.mark.slow
def test_a_budget_without_room_for_one_image_turns_memory_options_on(tmp_path, monkeypatch, caplog):
    train = SMALL["train"] | {"iterations": 1, "validate_every": None, "memory_budget": 2.5}
    trainer = finetuner(tmp_path / "run", train=train)
    options = trainer.gradient.memory_options
    peak = lambda device: 10**9 * (2 if len(options) == 3 else 3)  # noqa: E731
    monkeypatch.setattr(memory, "peak", peak)
    told = [f"train.{option}=true" for option in MEMORY_OPTIONS]
    trainer.train(progress=False)
    assert caplog.messages[0].endswith(f"micro_batch=4 {' '.join(told)}")
    again = finetuner(tmp_path / "run", train=train)
    again.train(progress=False)  # measures nothing
    for one in (trainer, again):
        assert one.gradient.memory_options == list(MEMORY_OPTIONS)
        assert one.pipe.unet.is_gradient_checkpointing
        assert one.pipe.unet.training
        assert one.pipe.vae.decoder.gradient_checkpointing
    monkeypatch.setattr(memory, "peak", lambda device: 3 * 10**9)
    with pytest.raises(
        ValueError, match=r"memory_budget is 2\.5 GB, but one image at a time takes"
    ):
        finetuner(tmp_path / "other", train=train).train(progress=False)


@pytest.mark.slow
def test_the_scale_of_the_loss_changes_no_gradient(tmp_path):
    """Powers of two are exact in float32; in float16, small gradients would be 0 without it."""
    trainer, gradients = finetuner(tmp_path / "run"), []
    assert trainer.gradient.loss_scale == 1
    for scale in (1.0, 1024.0):
        trainer.gradient.loss_scale = scale
        trainer.optimizer.zero_grad()
        trainer.gradient.backward(sample_batch(trainer.config, trainer.prompts, 0), 0)
        gradients.append([p.grad for p in trainer.parameters])
    for plain, scaled in zip(*gradients, strict=True):
        torch.testing.assert_close(scaled, plain, rtol=1e-6, atol=0)
    assert finetuner(tmp_path / "half", base={"dtype": "float16"}).gradient.loss_scale == 1024


@pytest.mark.slow
def test_a_run_out_of_memory_says_what_to_set_and_goes_on_with_it(tmp_path, monkeypatch):
    replayed, sizes = gradient_module.replay, []

    def replay(*args, micro_batch, **options):
        if micro_batch != 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return replayed(*args, micro_batch=micro_batch, **options)

    def evaluated(*args, batch_size, **options):
        sizes.append(batch_size)
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(gradient_module, "replay", replay)
    monkeypatch.setattr(validation_module, "evaluate", evaluated)
    train = SMALL["train"] | {"iterations": 2, "checkpoint_every": 1, "validate_every": 2}
    message = r"^out of memory with train\.micro_batch null: set train\.micro_batch=2, .* to resume"
    with pytest.raises(TrainingStoppedError, match=message):
        finetuner(tmp_path / "run", train=train).train(progress=False)
    train |= {"micro_batch": 2, "decoder_checkpointing": True}
    message = r"^out of memory with train\.micro_batch 2: set train\.micro_batch=1, .* to resume"
    with pytest.raises(TrainingStoppedError, match=message):  # in the validation
        finetuner(tmp_path / "run", train=train).train(progress=False)
    assert sizes == [2]
    resumed = finetuner(tmp_path / "run", train=train | {"micro_batch": 1})
    resumed._resume(RunFolder(tmp_path / "run"))
    assert (resumed.step, resumed.gradient.micro_batch) == (1, 1)  # not the checkpoint's


def test_models_that_do_not_fit_are_said_to(tmp_path, monkeypatch):
    def load_judges(*args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(trainer_module, "load_judges", load_judges)
    message = r"the models do not fit in the GPU's memory: set base\.dtype=bfloat16"
    with pytest.raises(TrainingStoppedError, match=message):
        finetuner(tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize(
    "option", ["split_guidance", "gradient_checkpointing", "channels_last", "compile"]
)
def test_how_the_unet_is_evaluated_changes_no_gradient(tmp_path, monkeypatch, option):
    compiled = []

    def compile_without_a_compiler(module):
        compiled.append(module)
        module._compiled_call_impl = torch.compile(module._call_impl, backend="eager")

    monkeypatch.setattr(torch.nn.Module, "compile", compile_without_a_compiler)
    adapter = {"components": ["text_encoder", "unet"], "rank": 2}
    plain = finetuner(tmp_path / "plain", adapter=adapter)
    tuned = finetuner(tmp_path / "tuned", adapter=adapter, train=SMALL["train"] | {option: True})
    unet = tuned.pipe.unet
    assert unet.is_gradient_checkpointing == (option == "gradient_checkpointing")
    last = unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    assert last == (option == "channels_last")
    assert compiled == ([unet] if option == "compile" else [])
    for trainer in (plain, tuned):
        trainer.gradient.backward(sample_batch(trainer.config, trainer.prompts, 0), 0)
    for one, other in zip(plain.parameters, tuned.parameters, strict=True):
        if one.grad is not None:
            torch.testing.assert_close(
                other.grad, one.grad, rtol=1e-3, atol=1e-3 * one.grad.abs().max().item()
            )


def test_adamw_in_8_bits(tmp_path, monkeypatch):
    pytest.importorskip("bitsandbytes")
    trainer = finetuner(tmp_path / "small", optimizer={"name": "adamw8bit", "warmup": 0})
    before = [p.detach().clone() for p in trainer.parameters]
    trainer.iteration(0)
    assert any(not torch.equal(a, b) for a, b in zip(before, trainer.parameters, strict=True))
    kept = {
        x.dtype
        for s in trainer.optimizer.state.values()
        for x in s.values()
        if x is not None and hasattr(x, "dtype")
    }
    assert kept
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ModuleNotFoundError, match="needs bitsandbytes: pip install bitsandbytes"):
        finetuner(tmp_path / "small", optimizer={"name": "adamw8bit", "warmup": 0})


def test_a_gradient_that_is_not_finite_is_skipped_and_counted(tmp_path, monkeypatch):
    broken = finetuner(tmp_path / "broken")
    before = [parameter.detach().clone() for parameter in broken.parameters]

    def backward(batch, number):
        for parameter in broken.parameters:
            parameter.grad = torch.full_like(parameter, float("nan"))
        return BatchStatistics(losses={"loss": 1.0}, face_rate=1.0, attributes={})

    monkeypatch.setattr(broken.gradient, "backward", backward)
    figures = broken.iteration(0).metrics()
    assert figures["skipped"] == 1
    assert all(torch.equal(a, b) for a, b in zip(before, broken.parameters, strict=True))


@pytest.mark.slow
def test_images_that_are_not_finite_are_skipped_and_the_next_update_is_smaller(
    tmp_path, monkeypatch
):
    optimizer = {"warmup": 0, "schedule": "constant", "lr": 0.01}
    train = SMALL["train"] | {"max_skipped": 2}
    broken, sound = (
        finetuner(tmp_path / name, optimizer=optimizer, train=train) for name in ("a", "b")
    )
    before = [parameter.detach().clone() for parameter in broken.parameters]
    with monkeypatch.context() as patch:
        patch.setattr(
            gradient_module, "decode", lambda pipe, z, n: decode(pipe, z, n) * float("nan")
        )
        figures = broken.iteration(0).metrics()
        assert figures.keys() == {"gradient", "skipped"}
        assert figures["skipped"] == 1
        assert all(torch.equal(a, b) for a, b in zip(before, broken.parameters, strict=True))
    broken.iteration(1)
    sound.iteration(1)
    moved, whole = (
        torch.cat([(p - b).flatten() for p, b in zip(x.parameters, before, strict=True)])
        for x in (broken, sound)
    )
    torch.testing.assert_close(moved, 0.55 * whole)
    assert broken.optimizer.param_groups[0]["lr"] == 0.01
    with monkeypatch.context() as patch:
        patch.setattr(
            gradient_module, "decode", lambda pipe, z, n: decode(pipe, z, n) * float("nan")
        )
        broken.iteration(2)
        with pytest.raises(TrainingStoppedError, match="not finite in 2 iterations in a row"):
            broken.iteration(3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("components", "rates", "expected"),
    [
        (["text_encoder", "unet"], {}, {"text_encoder": 0.01, "unet": 0.01}),
        (
            ["unet", "text_encoder", "soft_tokens"],
            {"text_encoder_lr": 0.04},
            {"unet": 0.01, "text_encoder": 0.04, "soft_tokens": 0.04},
        ),
    ],
)
def test_each_part_moves_at_its_own_learning_rate(components, rates, expected, tmp_path):
    trained = finetuner(
        tmp_path,
        adapter={"rank": 2, "components": components},
        optimizer={"warmup": 0, "schedule": "constant", "lr": 0.01} | rates,
    )
    before = {
        name: [p.detach().clone() for p in part] for name, part in trained.adapter.parts.items()
    }
    trained.iteration(0)
    longest = {
        name: max((p - b).abs().max().item() for p, b in zip(part, before[name], strict=True))
        for name, part in trained.adapter.parts.items()
    }
    assert longest == pytest.approx(expected, rel=1e-3)  # AdamW's first step has its length
    assert len(trained.optimizer.param_groups) == len(set(expected.values()))


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in recipes() if name.startswith("testbed-")])
def test_every_recipe_of_the_testbed_trains_one_iteration(name, tmp_path):
    trainer = FairnessFinetuner.from_recipe(
        name,
        **{key: SMALL[key] for key in ("gradient", "tracker")},
        prompts={"images_per_prompt": 2},
        adapter={"init_from": None},  # another recipe's adapter, which is not there
        sampling={"steps": 2},
        optimizer={"warmup": 0},
        train={"prompts_per_iteration": 2, "validate_every": None},
        output=str(tmp_path / name),
    )
    before = [p.detach().clone() for p in trainer.parameters]
    figures = trainer.iteration(0).metrics()
    assert figures["gradient"] > 0
    assert figures.keys() >= {f"bias/{attribute.name}" for attribute in trainer.attributes}
    assert any(not torch.equal(a, b) for a, b in zip(before, trainer.parameters, strict=True))


METHODS = {
    "replay": {},
    "autograd": {"method": "autograd"},
    "naive": {"method": "naive"},
    "truncated": {"method": "truncated", "truncated_steps": 1},
}


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """Gradient method -> figures, gradient and parameters after one iteration on two prompts."""
    folder, found = tmp_path_factory.mktemp("methods"), {}
    for method, section in METHODS.items():
        trainer = finetuner(
            folder / method,
            prompts={"images_per_prompt": 2, "keep": None},
            sampling={"steps": 2},
            gradient={"replay_steps": None} | section,
            train=SMALL["train"] | {"prompts_per_iteration": 2},
        )
        figures = trainer.iteration(0).metrics()
        gradient = torch.cat([p.grad.flatten() for p in trainer.parameters])
        weights = torch.cat([p.detach().flatten() for p in trainer.parameters])
        found[method] = figures, gradient, weights
    return found


@pytest.mark.slow
def test_replay_and_autograd_give_the_same_update(compared):
    (_, expected, weights), (_, gradient, others) = compared["autograd"], compared["replay"]
    assert (gradient - expected).norm() <= 1e-4 * expected.norm()
    assert (weights - others).norm() <= 1e-3 * weights.norm()


@pytest.mark.slow
def test_every_method_trains_on_the_same_images(compared):
    losses = [{k: v for k, v in found[0].items() if k != "gradient"} for found in compared.values()]
    assert losses == [losses[0]] * len(METHODS)


@pytest.mark.parametrize("method", ["naive", "truncated"])
@pytest.mark.slow
def test_other_methods_give_another_gradient(compared, method):
    _, expected, _ = compared["replay"]
    assert (compared[method][1] - expected).norm() > 0.05 * expected.norm()


@pytest.mark.slow
def test_micro_batches_change_nothing(compared, tmp_path):
    train = SMALL["train"] | {"prompts_per_iteration": 2, "micro_batch": 3}
    settings = {"prompts": {"images_per_prompt": 2, "keep": None}, "sampling": {"steps": 2}}
    settings["gradient"] = {"replay_steps": None}
    trainer = finetuner(tmp_path / "parts", **settings, train=train)
    figures = trainer.iteration(0).metrics()
    gradient = torch.cat([p.grad.flatten() for p in trainer.parameters])
    expected, whole, _ = compared["replay"]
    assert (gradient - whole).norm() <= 1e-5 * whole.norm()
    assert figures == pytest.approx(expected, abs=1e-5)


@pytest.mark.slow
def test_batches_come_again_and_the_originals_from_the_disk(tmp_path, monkeypatch):
    train = SMALL["train"] | {"distinct_iterations": 2, "validate_every": None}
    folders = [tmp_path / "whole", tmp_path / "emptied"]
    drawn = []
    make = Objective.originals
    monkeypatch.setattr(Objective, "originals", lambda *args: drawn.append(1) or make(*args))
    for folder in folders:
        trainer = finetuner(folder, train=train, prompts=NEUTRAL)
        claim_run_folder(trainer.config)
        for number in range(4):
            if folder == folders[1]:
                shutil.rmtree(folder / "originals", ignore_errors=True)
            trainer.iteration(number)
        trainer.save_adapter(folder / "adapter")
    assert len(drawn) == 2 + 4
    assert len(list((folders[0] / "originals").iterdir())) == 2
    first, again = (read_adapter(folder / "adapter")[1] for folder in folders)
    assert all(torch.equal(first[key], again[key]) for key in first)
    batches = [sample_batch(trainer.config, trainer.prompts, number) for number in range(4)]
    assert batches[:2] == batches[2:]
    assert batches[0] != batches[1]


@pytest.mark.slow
@pytest.mark.parametrize("images", [4, 3])
def test_antithetic_noise_comes_in_pairs_of_one_prompt(tmp_path, images):
    trainer = finetuner(
        tmp_path / "pairs",
        prompts={"images_per_prompt": images},
        sampling={"steps": 3, "antithetic": True},
        train=SMALL["train"] | {"prompts_per_iteration": 2},
    )
    batch = sample_batch(trainer.config, trainer.prompts, 0)
    noise = trainer.gradient._noise(Shard(batch, slice(0, 2 * images)))
    for of_prompt in noise.split(images):
        sums = (of_prompt[: images // 2 * 2 : 2] + of_prompt[1::2]).abs().sum()
        assert sums == 0
        assert not torch.equal(of_prompt[0], of_prompt[2])
    assert len(set(batch.noise)) == 2 * images
    assert all(noise.sign == 1 for noise in batch.noise[::images])


def test_every_prompt_comes_once_before_any_comes_again(tmp_path):
    trainer = finetuner(tmp_path / "prompts")
    (prompts,) = trainer.prompts.prompts
    count = len(prompts)
    drawn = [trainer.prompts.prompt(place) for place in range(2 * count)]
    assert sorted(drawn[:count]) == sorted(prompts) == sorted(drawn[count:])
    assert drawn[:count] != drawn[count:]


def test_test_prompts_are_never_trained_on(tmp_path):
    from diffusers_fair.prompts import prompt_set

    trainer = finetuner(tmp_path / "unseen")
    unseen = set(prompt_set("testbed-occupations").prompts("test"))
    assert len(unseen) == 50
    assert not unseen & {*trainer.prompts.prompts[0], *trainer.validation_prompts}


@pytest.mark.slow
def test_an_output_folder_with_another_run_is_refused(run):
    other = RunConfig.load(
        "testbed-gender", SMALL | {"output": str(run[0]), "optimizer": {"lr": 0.5}}
    )
    with pytest.raises(ValueError, match=r"holds another run \(optimizer.lr is .* there and 0.5"):
        FairnessFinetuner(other).train(progress=False)


def test_a_split_without_prompts_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"'non-templated' has no train"):
        finetuner(tmp_path / "x", prompts={"sets": ["non-templated"]})


def test_sets_are_mixed_by_their_weights(tmp_path):
    sets = {"testbed-occupations": 3, "sports": 1}
    trainer = finetuner(tmp_path / "mixed", prompts=SMALL["prompts"] | {"sets": sets})
    drawn = [trainer.prompts.prompt(place) for place in range(40)]
    assert sum("playing" in prompt or "sport" in prompt for prompt in drawn) == 10
    assert len(trainer.validation_prompts) == 20


@pytest.mark.slow
def test_an_adapter_that_costs_clip_t_is_not_the_best(tmp_path, caplog):
    trainer = finetuner(tmp_path / "floor")
    trainer.validation.base_clip_t = 2.0  # more than any
    trainer._validate(RunFolder(tmp_path / "floor"), Tracker(trainer.accelerator))
    assert re.search(r"CLIP-T fell to .*, below 1\.990", caplog.text)
    assert trainer.validation.best_bias is None
    assert not (tmp_path / "floor" / "adapter-best").exists()
    trainer.validation.base_clip_t = -1.0
    trainer._validate(RunFolder(tmp_path / "floor"), Tracker(trainer.accelerator))
    assert trainer.validation.best_bias is not None
    assert (tmp_path / "floor" / "adapter-best").exists()
