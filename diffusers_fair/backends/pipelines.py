"""Base models: the text-to-image pipelines that are trained or evaluated."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from diffusers_fair.attributes import Attribute
from diffusers_fair.backends.errors import loading
from diffusers_fair.backends.needs import Need, pretrained
from diffusers_fair.config.backends import SHIPPED_BASES
from diffusers_fair.families import check_components
from diffusers_fair.families.stable_diffusion import STABLE_DIFFUSION

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class UsualEvaluation:
    """Default evaluation of a base model that ships with its judges."""

    attributes: Mapping[str, Attribute]
    """Name -> attribute that the judges classify; the first is measured by default."""
    words: Mapping[str, Sequence[str]]
    """Class -> words that name it in a prompt."""
    prompt_set: str
    """Name of the prompt set."""
    steps: int
    """Scheduler steps."""


@dataclass(frozen=True, kw_only=True)
class Base:
    """How to load and use a base model."""

    load: Callable[[str, str | None, str], Any]
    """Loads the pipeline; takes model, revision and dtype like `registry.load_base`."""
    needs: Callable[[str, str | None], list[Need]]
    """Lists the requirements of `load`, given model and revision."""
    usual_guidance: float
    """Usual guidance scale."""
    untouched_set: str
    """Prompt set of things and places without people that the model can generate."""
    device: str | None = None
    """The only device that the model runs on; None: any device."""
    usual_evaluation: Callable[[], UsualEvaluation] | None = None
    """Default evaluation; None if the base model needs a recipe to be evaluated."""


def _load(model: str, revision: str | None = None, dtype: str = "float32") -> Any:
    """Load a pipeline from a folder or the Hub.

    Stable Diffusion 1 ships with PNDM, which is replaced by the paper's sampler, DPM-Solver++ 2M
    (section 5.1).
    """
    from diffusers import DiffusionPipeline, DPMSolverMultistepScheduler, PNDMScheduler

    shipped = ", ".join(map(repr, SHIPPED_BASES))
    with loading(f"the base model '{model}'", f"{shipped}, a folder or a Hub id"):
        pipe = DiffusionPipeline.from_pretrained(
            model, revision=revision, torch_dtype=dtype_of(dtype), safety_checker=None
        )
    check_components(pipe)
    if isinstance(pipe.scheduler, PNDMScheduler):
        pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    return pipe


def dtype_of(name: str, *, gpu: bool = True) -> "torch.dtype":
    """Return the torch dtype; `auto` is bfloat16 if the GPU, or the CPU, is fast in it."""
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
