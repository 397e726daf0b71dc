"""The text-to-image pipeline that is trained or evaluated."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from diffusers_fair.attributes import Attribute
from diffusers_fair.backends.errors import loading
from diffusers_fair.backends.needs import Need, pretrained
from diffusers_fair.config.backends import SHIPPED_BASES
from diffusers_fair.families.stable_diffusion import STABLE_DIFFUSION

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class UsualEvaluation:
    """How a base model that ships with its judges is evaluated without a recipe."""

    attributes: Mapping[str, Attribute]
    """Name -> attribute that its judges classify; the first is the usual one."""
    words: Mapping[str, Sequence[str]]
    """Class -> words that ask for it in a prompt."""
    prompt_set: str
    """Name of the prompt set."""
    steps: int
    """Scheduler steps."""


@dataclass(frozen=True, kw_only=True)
class Base:
    """How a base model is loaded and used."""

    load: Callable[[str, str | None, str], Any]
    """Model, revision and dtype, as `registry.load_base` takes them -> pipeline."""
    needs: Callable[[str, str | None], list[Need]]
    """Model and revision -> what `load` needs."""
    usual_guidance: float
    """The guidance scale that it is usually sampled with."""
    untouched_set: str
    """The prompt set of things and places without people that it can generate."""
    device: str | None = None
    """The only device that it runs on; None: any."""
    usual_evaluation: Callable[[], UsualEvaluation] | None = None
    """How it is evaluated without a recipe; None: it needs one."""


def _load(model: str, revision: str | None = None, dtype: str = "float32") -> Any:
    """Load a pipeline from a folder or the Hub.

    DPM-Solver++ 2M, the paper's sampler (section 5.1), replaces the PNDM scheduler that Stable
    Diffusion 1 ships with.
    """
    from diffusers import DiffusionPipeline, DPMSolverMultistepScheduler, PNDMScheduler

    shipped = ", ".join(map(repr, SHIPPED_BASES))
    with loading(f"the base model '{model}'", f"{shipped}, a folder or a Hub id"):
        pipe = DiffusionPipeline.from_pretrained(
            model, revision=revision, torch_dtype=dtype_of(dtype), safety_checker=None
        )
    if isinstance(pipe.scheduler, PNDMScheduler):
        pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    return pipe


def dtype_of(name: str, *, gpu: bool = True) -> "torch.dtype":
    """The torch dtype of that name; `auto` is the fast one of the GPU, or of the processor."""
    import torch

    if name != "auto":
        return getattr(torch, name)
    if gpu and torch.cuda.is_available():
        is_fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        is_fast = torch.cpu.get_capabilities().get("amx_bf16", False)  # avx512_bf16 alone is slower
    return torch.bfloat16 if is_fast else torch.float32


def _needs(model: str, revision: str | None = None) -> list[Need]:
    return [pretrained(model, revision, STABLE_DIFFUSION.components)]


pretrained_base = Base(
    load=_load,
    needs=_needs,
    usual_guidance=STABLE_DIFFUSION.guidance_scale,
    untouched_set="untouched",
)
