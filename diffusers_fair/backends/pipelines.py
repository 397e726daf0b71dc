"""The text-to-image pipeline that is aligned or measured."""

from typing import TYPE_CHECKING, Any

from diffusers_fair import testbed
from diffusers_fair.backends.errors import loading
from diffusers_fair.backends.needs import Need, pretrained

if TYPE_CHECKING:
    import torch

PARTS = ("unet", "text_encoder", "vae")


UNTOUCHED_SETS = ("untouched", "testbed-untouched")
"""Prompt sets of things and places without people; the second is the testbed's."""


def load_base(model: str, revision: str | None = None, dtype: str = "float32") -> Any:
    """Load a text-to-image pipeline.

    A PNDM scheduler, which Stable Diffusion 1 ships with, gives way to DPM-Solver++ 2M, by which
    the paper samples (section 5.1).

    Args:
        model: `testbed`, a folder or a Hub id.
        revision: commit, tag or branch on the Hub.
        dtype: what it computes in: float32, bfloat16, float16, or auto: bfloat16 where that is
            fast, else float32.

    Raises:
        ValueError: there is no such model, or it cannot be reached.
    """
    import torch

    if model == testbed.NAME:
        pipe = testbed.pipeline()
        for part in PARTS:  # `pipe.to` would warn of layers to keep in float32: there are none
            torch.nn.Module.to(getattr(pipe, part), _precision(dtype, gpu=False))
        return pipe
    from diffusers import DiffusionPipeline, DPMSolverMultistepScheduler, PNDMScheduler

    with loading(f"the base model '{model}'", f"'{testbed.NAME}', a folder or a Hub id"):
        pipe = DiffusionPipeline.from_pretrained(
            model, revision=revision, torch_dtype=_precision(dtype), safety_checker=None
        )
    if isinstance(pipe.scheduler, PNDMScheduler):
        pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    return pipe


def _precision(dtype: str, *, gpu: bool = True) -> "torch.dtype":
    """The torch dtype of that name; of `auto`, the one that suits the GPU, or the processor."""
    import torch

    if dtype != "auto":
        return getattr(torch, dtype)
    if gpu and torch.cuda.is_available():
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = torch.cpu.get_capabilities().get("amx_bf16", False)  # avx512_bf16 alone is slower
    return torch.bfloat16 if fast else torch.float32


def usual_guidance(model: str) -> float:
    """The guidance scale that a base model is usually sampled with."""
    return testbed.GUIDANCE if model == testbed.NAME else 7.5  # section 5.1


def untouched_set(model: str) -> str:
    """The prompt set of things and places without people that a base model can draw."""
    return UNTOUCHED_SETS[model == testbed.NAME]


def needs(model: str, revision: str | None = None) -> list[Need]:
    """What `load_base` needs."""
    return [] if model == testbed.NAME else [pretrained(model, revision, PARTS)]
