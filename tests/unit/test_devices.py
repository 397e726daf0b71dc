"""Which device a name stands for, what suits it, and what fits it; the GPUs are made up."""

import os
import re
from types import SimpleNamespace

import pytest
import torch
from judging import HUE, PROMPTS, QUICK, judges
from tiny import pipeline
from together import together
from torch.utils import collect_env

from diffusers_fair import assess as assess_module
from diffusers_fair import cli, distributed
from diffusers_fair.backends import registry
from diffusers_fair.config.schema import RunConfig
from diffusers_fair.devices import choose_device, choose_dtype
from diffusers_fair.evaluation.batch_size import default_batch_size
from diffusers_fair.evaluation.evaluate import evaluate
from diffusers_fair.evaluation.generate import generate
from diffusers_fair.provenance import provenance

GB = 10**9


@pytest.fixture(autouse=True)
def bare(monkeypatch):
    """No GPU, and no launcher."""
    for name in ("LOCAL_RANK", "ACCELERATE_USE_CPU"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)


@pytest.fixture
def gpus(monkeypatch):
    """Two GPUs; the list of those that were made current."""
    current = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: current.append(str(device)))
    return current


@pytest.fixture
def mps(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)


def test_auto_without_a_gpu():
    assert choose_device() == torch.device("cpu")


def test_auto_takes_mps_before_the_cpu(mps):
    assert choose_device() == choose_device("mps") == torch.device("mps")
    assert choose_device("cpu") == torch.device("cpu")


def test_auto_takes_a_gpu_before_mps(gpus, mps):
    assert choose_device() == choose_device("cuda") == torch.device("cuda:0")
    assert choose_device("cuda:1") == torch.device("cuda:1")
    assert gpus == []  # the current GPU of a single process is its own business


@pytest.mark.parametrize(("rank", "expected"), [("0", "cuda:0"), ("1", "cuda:1"), ("3", "cuda:1")])
def test_each_process_of_a_launch_takes_its_own_gpu(rank, expected, gpus, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", rank)
    assert str(choose_device()) == str(choose_device("cuda")) == expected
    assert gpus == [expected] * 2
    assert str(choose_device("cuda:0")) == "cuda:0"


def test_a_launch_for_the_cpu_stays_there(gpus, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert choose_device() == torch.device("cpu")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gpu", "expected a device, auto, cuda, cuda:N, mps or cpu, got 'gpu'"),
        ("cuda:x", "expected a device, auto, .* got 'cuda:x'"),
        ("", "expected a device, auto, .* got ''"),
        ("cuda", "device 'cuda' is not available: torch .* finds no GPU; install a build of torch"),
        ("cuda:1", "device 'cuda:1' is not available: torch .* finds no GPU"),
        ("mps", "device 'mps' is not available: torch .* finds no Apple GPU; choose auto or cpu"),
    ],
)
def test_devices_that_are_not_there(name, message):
    with pytest.raises(ValueError, match=message):
        choose_device(name)


def test_a_gpu_too_many(gpus):
    with pytest.raises(
        ValueError, match=r"'cuda:2' is not available: torch finds 2 GPUs, cuda:0 to"
    ):
        choose_device("cuda:2")


@pytest.mark.parametrize(
    ("device", "capability", "expected"),
    [
        ("cuda:0", (8, 0), torch.bfloat16),
        ("cuda:1", (7, 5), torch.float32),
        ("mps", None, torch.float32),
    ],
)
def test_the_dtype_that_suits_the_device(device, capability, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda asked: capability)
    assert choose_dtype("auto", torch.device(device)) == expected
    assert choose_dtype("float16", torch.device(device)) == torch.float16


def test_an_unknown_dtype():
    with pytest.raises(ValueError, match=r"expected a data type, auto, .*, got 'half'"):
        choose_dtype("half", torch.device("cpu"))


# ---- recipes and commands ------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["auto", "cuda", "cuda:3", "mps", "cpu"])
def test_recipes_take_the_same_names(name):
    assert RunConfig.load("testbed-gender", [f"train.device={name}"]).train.device == name


def test_a_recipe_with_another_name():
    with pytest.raises(ValueError, match=r"train.device: expected a device, auto, .* got 'gpu'"):
        RunConfig.load("testbed-gender", ["train.device=gpu"])


def test_the_device_of_a_run_may_change():
    here, there = (RunConfig.load("testbed-gender", [f"train.device={d}"]) for d in ("cpu", "cuda"))
    assert here.differences(there) == {}


def test_the_testbed_takes_a_gpu_only_when_asked(gpus):
    assert str(registry.choose_base_device("testbed")) == "cpu"
    assert str(registry.choose_base_device("testbed", "cuda:1")) == "cuda:1"
    assert str(registry.choose_base_device("org/model")) == "cuda:0"


class LoadedError(Exception):
    """Carries what a model would be loaded with."""


def loaded(monkeypatch, *words) -> tuple:
    """What a command would load its base with: model, revision, dtype, device."""

    def load(model, revision, dtype, device):
        raise LoadedError(model, revision, dtype, str(device))

    for module in (registry, assess_module):
        monkeypatch.setattr(module, "load_base", load)
    monkeypatch.setattr("sys.argv", ["diffusers-fair", *map(str, words)])
    with pytest.raises(LoadedError) as error:
        cli.main()
    return error.value.args


def recipe(folder, **base) -> str:
    file = folder / "mine.yaml"
    file.write_text(RunConfig.load("testbed-gender", {"base": base}).to_yaml())
    return str(file)


def test_generate_loads_what_is_asked(gpus, monkeypatch):
    words = ["generate", "a chef", "--base", "org/model"]
    assert loaded(monkeypatch, *words) == ("org/model", None, "auto", "cuda:0")
    assert loaded(monkeypatch, "generate", "a chef") == ("testbed", None, "float32", "cpu")
    words += ["--device", "cuda:1", "--dtype", "float16", "--revision", "v1"]
    assert loaded(monkeypatch, *words) == ("org/model", "v1", "float16", "cuda:1")


def test_evaluate_loads_the_base_of_the_recipe(gpus, monkeypatch, tmp_path):
    given = {"model": "org/model", "revision": "v1", "dtype": "bfloat16"}
    words = ["evaluate", "--recipe", recipe(tmp_path, **given), "--out", tmp_path / "report"]
    assert loaded(monkeypatch, *words) == ("org/model", "v1", "bfloat16", "cuda:0")
    other = [*words, "--base", "org/other"]  # a revision is one of its own model
    assert loaded(monkeypatch, *other) == ("org/other", None, "bfloat16", "cuda:0")
    words += ["--revision", "v2", "--dtype", "auto", "--device", "cpu"]
    assert loaded(monkeypatch, *words) == ("org/model", "v2", "auto", "cpu")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["generate", "x", "--device", "gpu"], "expected a device, auto, .* got 'gpu'"),
        (["generate", "x", "--device", "cuda"], "device 'cuda' is not available"),
        (["evaluate", "--device", "cuda"], "device 'cuda' is not available"),
        (
            ["evaluate", "--images", ".", "--recipe", "testbed-gender", "--device", "mps"],
            "'mps' is",
        ),
        (["classifier", "train", "FOLDER", "--out", "x", "--device", "mps"], "'mps' is not avail"),
        (["generate", "x", "--dtype", "half"], "expected a data type, auto, .* got 'half'"),
        (["classifier", "train", "FOLDER", "--out", "x", "--dtype", "int8"], "got 'int8'"),
        (
            ["generate", "x", "--revision", "v1"],
            "'v1' is for a repository on the Hub, but 'testbed'",
        ),
        (["evaluate", "--revision", "v1"], "'v1' is for a repository on the Hub, but 'testbed'"),
        (["train", "testbed-gender", "base.revision=v1", "output=x"], "'v1' is for a repository"),
        (
            ["generate", "x", "--adapter-revision", "v1"],
            "--adapter-revision needs an adapter: name",
        ),
        (["evaluate", "--adapter", ".", "--adapter-revision", "v1"], "on the Hub, but '.' is none"),
        (
            ["inspect", ".", "--revision", "v1"],
            "on the Hub, but '.' is none: leave the revision out",
        ),
        (["generate", "x", "--batch-size", "0"], "--batch-size|greater than or equal to 1"),
    ],
)
def test_options_that_will_not_do(words, message, monkeypatch, capsys, tmp_path):
    for name in ("a", "b"):
        (tmp_path / "faces" / name).mkdir(parents=True)
        for i in range(2):
            (tmp_path / "faces" / name / f"{i}.png").touch()
    words = [str(tmp_path / "faces") if word == "FOLDER" else word for word in words]
    monkeypatch.setattr("sys.argv", ["diffusers-fair", *words])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1
    assert re.search(message, said)
    assert [path.name for path in tmp_path.iterdir()] == ["faces"]  # nothing is left behind


# ---- images and judges ---------------------------------------------------------------------------


def test_images_move_to_the_judges():
    def look(images):
        raise LoadedError(images.device.type)

    options = QUICK | {"images_per_prompt": 1, "groups": (), "progress": False}
    for device, expected in (("meta", "meta"), (None, "cpu")):
        found = judges(face_detector=look, device=device)
        with pytest.raises(LoadedError, match=expected):
            evaluate(pipeline(), PROMPTS, [HUE], judges=found, **options)


def memory(monkeypatch, per_image: float, total: float):
    """A GPU whose memory is measured as these numbers of bytes."""
    made_up = {
        "memory_allocated": lambda device: 2 * GB,
        "memory_reserved": lambda device: 3 * GB,
        "max_memory_allocated": lambda device: 2 * GB + int(per_image),
        "mem_get_info": lambda device: (int(total) - 3 * GB, int(total)),
        "reset_peak_memory_stats": lambda device: None,
    }
    for name, function in made_up.items():
        monkeypatch.setattr(torch.cuda, name, function)


@pytest.mark.parametrize(
    ("per_image", "total", "expected"),
    [(1.2 * GB, 80 * GB, 24), (1.2 * GB, 24 * GB, 12), (1.2 * GB, 8 * GB, 4), (9 * GB, 8 * GB, 1)],
)
def test_a_batch_fits_the_gpu(per_image, total, expected, monkeypatch):
    memory(monkeypatch, per_image, total)
    processed = []
    size = default_batch_size(torch.device("cuda:0"), lambda: processed.append(1))
    assert (size, len(processed)) == (expected, 1)


def test_no_image_is_spent_where_memory_is_not_measured():
    sizes = [default_batch_size(torch.device(d), lambda: 1 / 0) for d in ("cpu", "mps")]
    assert sizes == [24, 4]


def test_images_are_generated_in_batches_that_fit(monkeypatch):
    memory(monkeypatch, 4 * GB, 24 * GB)  # 4 of them
    pipe = pipeline()
    monkeypatch.setattr(type(pipe), "_execution_device", torch.device("cuda:0"), raising=False)
    monkeypatch.setattr("diffusers_fair.evaluation.generate.generate_batch", lambda *a, **_: a[2])
    options = {"images_per_prompt": 3, "steps": 2, "guidance_scale": 1.0, "seed": 0}
    batches = list(generate(pipe, ["a", "b"], **options, progress=False))
    assert [len(pairs) for pairs in batches] == [4, 2]


# ---- provenance ----------------------------------------------------------------------------------


def test_provenance_names_the_gpu(monkeypatch):
    properties = SimpleNamespace(name="NVIDIA X", total_memory=24 * GB)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(collect_env, "get_nvidia_driver_version", lambda run: "550.54")
    machine = provenance("cuda:1")["machine"]
    assert (machine["device"], machine["gpu"], machine["gpu memory in GB"]) == (
        "cuda:1",
        "NVIDIA X",
        24.0,
    )
    assert machine["driver"] == "550.54"
    assert provenance()["machine"]["device"] == "cpu"


# ---- processes -----------------------------------------------------------------------------------


def summed() -> list[float]:
    rank = int(os.environ["RANK"])
    tensors = [torch.full((2,), 1.0 + rank), torch.ones(())]
    distributed.all_reduce_sum(tensors)
    return [*tensors[0].tolist(), tensors[1].item()]


def test_values_travel_through_the_cpu():
    assert together(2, summed) == [[3.0, 3.0, 2.0]] * 2
