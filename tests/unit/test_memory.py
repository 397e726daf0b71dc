"""The memory that training takes: what is measured, what is chosen, and what is advised."""

import logging
import sys
from types import SimpleNamespace

import pytest
import tiny
import torch
from together import together
from torch.autograd.graph import saved_tensors_hooks

from diffusers_fair import distributed
from diffusers_fair.config.schema import MEMORY_OPTIONS, RunConfig
from diffusers_fair.diffusion.noise import Noise
from diffusers_fair.diffusion.sampling import decode_backward
from diffusers_fair.training import memory
from diffusers_fair.training.batches import Batch
from diffusers_fair.training.stopping import TrainingStoppedError

GB = 10**9
GPU = torch.device("cuda", 0)
BATCH = Batch(("a doctor",), tuple(map(Noise, range(8))), 4)


class Gpu:
    """The figures of a GPU with a context of half a GB, as torch gives them."""

    def __init__(self, monkeypatch, total: float, others: float = 0):
        self.total, self.others = total, others
        self.reserved = self.most = 2.0
        cuda = {
            "mem_get_info": lambda device: (int(self.free * GB), int(self.total * GB)),
            "memory_reserved": lambda device: int(self.reserved * GB),
            "max_memory_reserved": lambda device: int(self.most * GB),
            "reset_peak_memory_stats": lambda device: setattr(self, "most", self.reserved),
            "empty_cache": lambda: setattr(self, "reserved", 2.0),
        }
        for name, function in cuda.items():
            monkeypatch.setattr(torch.cuda, name, function)

    @property
    def free(self) -> float:
        return self.total - self.others - 0.5 - self.reserved

    def allocate(self, gigabytes: float) -> None:
        """Take so much memory for a moment."""
        if gigabytes > self.free:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        self.reserved += gigabytes
        self.most = max(self.most, self.reserved)


class Gradient:
    """Stands for a `BatchGradient` whose images take 2 GB each, and less with each option."""

    def __init__(self, gpu: Gpu | None = None, device=GPU, config=None):
        self.pipe = SimpleNamespace(device=device)
        self.adapter = SimpleNamespace(parameters=[])
        self.micro_batch, self.memory_options, self.gpu = None, [], gpu
        self.config = config
        self.save_memory = self.memory_options.append

    def backward(self, batch, step, *, use_cache):
        assert len(batch.noise) == self.micro_batch
        self.gpu.allocate(self.micro_batch * (2 - 0.5 * len(self.memory_options)))


# ---- figures -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("others", "context"), [(0, 0.5), (0.2, 0.7), (30, 1)])
def test_memory_of_a_gpu_counts_what_is_reserved_and_the_context(monkeypatch, others, context):
    gpu = Gpu(monkeypatch, 80, others)
    gpu.most = 7
    assert memory.peak(GPU) == pytest.approx((7 + context) * GB)
    margin = 4  # 5 %
    assert memory.capacity(GPU) == pytest.approx((2 + context + gpu.free - margin) * GB)
    assert memory.capacity(torch.device("cpu")) is None


def test_memory_of_mps_is_what_its_driver_has_allocated(monkeypatch):
    monkeypatch.setattr(torch.mps, "driver_allocated_memory", lambda: 3 * GB)
    monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda: 12 * GB)
    mps = torch.device("mps")
    assert (memory.peak(mps), memory.capacity(mps)) == (3 * GB, 11.4 * GB)


# ---- choosing the micro-batch --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("total", "micro_batch", "options"),
    [
        (24, 8, 0),
        (16, 4, 0),  # eight would take 16 GB
        (8, 2, 0),
        (4.9, 1, 1),  # two GB of models, half of the context, half of the margin
        (4.4, 1, 2),
        (3.8, 1, 3),
    ],
)
def test_what_fits_a_gpu_is_chosen(monkeypatch, caplog, total, micro_batch, options):
    caplog.set_level(logging.INFO)
    gradient = Gradient(Gpu(monkeypatch, total))
    memory.choose_micro_batch(gradient, BATCH, "auto")
    assert gradient.micro_batch == micro_batch
    assert gradient.memory_options == list(MEMORY_OPTIONS[:options])
    enabled = "".join(f" train.{option}=true" for option in MEMORY_OPTIONS[:options])
    (record,) = caplog.records
    assert "at a time fit train.memory_budget" in record.message
    assert record.message.endswith(f"train.micro_batch={micro_batch}{enabled}")
    assert record.levelno == (logging.WARNING if options else logging.INFO)


def test_without_room_for_one_image_auto_is_refused(monkeypatch):
    message = r"memory_budget is 2\.9 GB, but one image at a time takes 3\.00: raise it, or choose"
    with pytest.raises(ValueError, match=message):
        memory.choose_micro_batch(Gradient(Gpu(monkeypatch, 3.4)), BATCH, "auto")
    message = "but one image at a time takes more than there is: raise it, or choose"
    with pytest.raises(ValueError, match=message):
        memory.choose_micro_batch(Gradient(Gpu(monkeypatch, 2.9)), BATCH, "auto")


def test_a_budget_above_what_the_gpu_has_is_said_and_reduced(monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    gradient = Gradient(Gpu(monkeypatch, 8))
    memory.choose_micro_batch(gradient, BATCH, 40)
    reduced, chosen = caplog.messages
    assert reduced.startswith(
        "train.memory_budget is 40 GB, but only 7.5 GB of the GPU are usable: they are"
    )
    assert chosen.startswith("2 images at a time fit train.memory_budget, 7.5 GB")
    assert gradient.micro_batch == 2


def test_auto_is_no_budget_on_the_cpu():
    gradient = Gradient(device=torch.device("cpu"))
    memory.choose_micro_batch(gradient, BATCH, "auto")
    assert (gradient.micro_batch, gradient.memory_options) == (None, [])


class Uneven(Gradient):
    """Runs out of memory in the second process alone, which leaves the first one waiting."""

    def backward(self, batch, step, *, use_cache):
        if self.is_second and len(batch.noise) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        distributed.barrier()


def chosen_by_one_of_two() -> int | None:
    gradient = Uneven(device=torch.device("cpu"))
    gradient.is_second = distributed.rank() == 1
    memory.choose_micro_batch(gradient, BATCH, 1000)
    return gradient.micro_batch


def test_one_process_without_memory_decides_for_all():
    assert together(2, chosen_by_one_of_two) == [1, 1]


@pytest.mark.parametrize(
    ("budget", "most", "fits", "tried"),
    [
        (100, 24, 24, [1, 2, 4, 8, 16, 24]),
        (100, 1, 1, [1]),
        (9.5, 24, 4, [1, 2, 4]),  # 8 would need 10, and is not tried
        (6, 24, 4, [1, 2, 4]),
        (3, 24, 1, [1, 2]),
    ],
)
def test_the_largest_fitting_micro_batch_is_found_by_doubling(budget, most, fits, tried):
    """Two GB, and one for each image."""
    sizes = []
    measure = lambda n: sizes.append(n) or (2 + n) * GB  # noqa: E731
    assert memory._largest_fitting(measure, most, budget) == fits
    assert sizes == tried


def test_a_budget_that_is_too_small_for_one_image_is_refused():
    with pytest.raises(
        ValueError, match=r"memory_budget is 2 GB, but one image at a time takes 3\.00: raise it"
    ):
        memory._largest_fitting(lambda n: (2 + n) * GB, 8, 2)


@pytest.mark.slow
def test_the_peak_is_the_maximum_of_the_memory_taken():
    before = memory.peak(torch.device("cpu"))
    torch.ones(before // 4 + 2**26).sum()  # float32: more than there was in all
    assert memory.peak(torch.device("cpu")) >= before + 2**27


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux forgets")
def test_the_peak_can_be_reset():
    cpu = torch.device("cpu")
    torch.ones(memory.peak(cpu) // 4 + 2**26).sum()
    before = memory.peak(cpu)
    memory.reset_peak(cpu)
    assert memory.peak(cpu) <= before - 2**27


# ---- running out of memory -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."),
        RuntimeError("MPS backend out of memory (MPS allocated: 8.00 GB)"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
def test_errors_of_devices_without_memory_are_explained(error):
    with (
        pytest.raises(TrainingStoppedError, match="set this to that"),
        memory.explain_out_of_memory(lambda: "set this to that"),
    ):
        raise error


def test_other_errors_pass():
    with pytest.raises(RuntimeError, match="sizes"), memory.explain_out_of_memory(str):
        raise RuntimeError("sizes do not match")


RESUME = ", and give the same command again to resume from the last checkpoint"


@pytest.mark.parametrize(
    ("overrides", "micro_batch", "options", "expected"),
    [
        (
            [],
            None,
            [],
            "with train.micro_batch null: set train.micro_batch=12, then "
            "train.decoder_checkpointing=true, then train.split_guidance=true, then "
            "train.gradient_checkpointing=true" + RESUME,
        ),
        (
            ["train.memory_budget=8"],
            5,
            MEMORY_OPTIONS[:2],
            "with train.micro_batch 5: set train.micro_batch=2 train.memory_budget=null, then "
            "train.gradient_checkpointing=true" + RESUME,
        ),
        (
            ["base.dtype=float32"],
            1,
            MEMORY_OPTIONS,
            "with train.micro_batch 1 and all memory options: start another run, in a new output "
            "folder, with a smaller models.clip or base.dtype=bfloat16 (now float32)",
        ),
    ],
)
def test_the_advice_names_the_keys_and_their_values(overrides, micro_batch, options, expected):
    gradient = Gradient(config=RunConfig.load("sd15-gender", overrides))
    gradient.micro_batch, gradient.memory_options = micro_batch, list(options)
    assert memory.how_to_save_memory(gradient) == f"out of memory {expected}"


def test_a_checkpointed_decoder_keeps_less_for_the_same_gradient():
    pipe, kept, gradients = tiny.pipeline(), [0, 0], []
    z, v = torch.randn(2, *tiny.LATENT), torch.randn(2, 3, 16, 16)

    for run in range(2):
        if run:
            pipe.vae.enable_gradient_checkpointing()

        def keep(x, run=run):
            kept[run] += x.nbytes
            return x

        with saved_tensors_hooks(keep, lambda x: x):
            gradients.append(decode_backward(pipe, z, v))
    assert torch.equal(*gradients)
    assert kept[1] < kept[0] / 2
