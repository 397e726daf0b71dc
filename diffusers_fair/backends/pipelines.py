"""The text-to-image pipeline that is trained or evaluated."""

from typing import TYPE_CHECKING, Any

from diffusers_fair import testbed
from diffusers_fair.backends.errors import loading
from diffusers_fair.backends.needs import Need, pretrained
from diffusers_fair.families.stable_diffusion import STABLE_DIFFUSION

if TYPE_CHECKING:
    import torch

UNTOUCHED_SETS = ("untouched", "testbed-untouched")
"""Prompt sets of things and places without people; the second is for the testbed."""


def load_base(model: str, revision: str | None = None, dtype: str = "float32") -> Any:
    """Load a text-to-image pipeline.

    A PNDM scheduler, which Stable Diffusion 1 ships with, is replaced by DPM-Solver++ 2M, the
    paper's sampler (section 5.1).

    Args:
        model: `testbed`, a folder or a Hub id.
        revision: commit, tag or branch on the Hub.
        dtype: float32, bfloat16, float16, or auto: bfloat16 where that is fast, else float32.

    Raises:
        ValueError: the model does not exist or cannot be reached.
    """
    import torch

    if model == testbed.NAME:
        pipe = testbed.pipeline()
        for name in STABLE_DIFFUSION.components:  # `pipe.to` warns of layers to keep in float32
            torch.nn.Module.to(getattr(pipe, name), _precision(dtype, gpu=False))
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
    """The torch dtype of that name; for `auto`, the one that suits the GPU or the CPU."""
    import torch

    if dtype != "auto":
        return getattr(torch, dtype)
    if gpu and torch.cuda.is_available():
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = torch.cpu.get_capabilities().get("amx_bf16", False)  # avx512_bf16 alone is slower
    return torch.bfloat16 if fast else torch.float32


def usual_guidance(model: str) -> float:
    """Return the usual guidance scale of a base model."""
    return testbed.GUIDANCE if model == testbed.NAME else STABLE_DIFFUSION.guidance_scale


def untouched_set(model: str) -> str:
    """Return the prompt set of things and places without people that suits a base model."""
    return UNTOUCHED_SETS[model == testbed.NAME]


def needs(model: str, revision: str | None = None) -> list[Need]:
    """List what `load_base` needs."""
    if model == testbed.NAME:
        return []
    return [pretrained(model, revision, STABLE_DIFFUSION.components)]
