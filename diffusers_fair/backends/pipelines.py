"""Base models: the text-to-image pipelines that are trained or evaluated."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusers_fair.attributes import Attribute
from diffusers_fair.backends.errors import loading
from diffusers_fair.backends.needs import Need, file, pretrained
from diffusers_fair.config.backends import SHIPPED_BASES
from diffusers_fair.families import check_components
from diffusers_fair.families.base import Usual
from diffusers_fair.families.stable_diffusion import STABLE_DIFFUSION
from diffusers_fair.paths import expand

if TYPE_CHECKING:
    import torch


_SINGLE_FILE = ".safetensors"


@dataclass(frozen=True, kw_only=True)
class UsualEvaluation:
    """Default evaluation of a base model that ships with its judges."""

    attributes: Mapping[str, Attribute]
    """Name -> attribute that the judges classify; the first is measured by default."""
    words: Mapping[str, Sequence[str]]
    """Class -> words that name it in a prompt."""
    prompt_set: str
    """Name of the prompt set."""


@dataclass(frozen=True, kw_only=True)
class Base:
    """How to load and use a base model."""

    load: "Callable[[str, str | None, torch.dtype], Any]"
    """Loads the pipeline on the CPU, given model, revision and data type."""
    needs: Callable[[str, str | None], list[Need]]
    """Lists the requirements of `load`, given model and revision."""
    usual_sampling: Usual | None = None
    """Usual guidance scale and steps; None for those of the pipeline's family."""
    untouched_set: str
    """Prompt set of things and places without people that the model can generate."""
    usual_device: str = "auto"
    """Device that is used if none is named."""
    usual_dtype: str = "auto"
    """Data type that is used if none is named."""
    code: str = ""
    """Python expression that creates the pipeline of a base that ships with the package."""
    call_options: Mapping[str, Any] = field(default_factory=dict)
    """Arguments that every call of this pipeline needs."""
    usual_evaluation: Callable[[], UsualEvaluation] | None = None
    """Default evaluation; None if the base model needs a recipe to be evaluated."""


def _load(model: str, revision: str | None, dtype: "torch.dtype") -> Any:
    """Load a pipeline of any class from a folder, a single file or the Hub.

    Stable Diffusion 1 ships with PNDM, which is replaced by the paper's sampler, DPM-Solver++ 2M
    (section 5.1).
    """
    from diffusers import DiffusionPipeline, DPMSolverMultistepScheduler, PNDMScheduler

    shipped = ", ".join(map(repr, SHIPPED_BASES))
    advice = f"{shipped}, a folder, a {_SINGLE_FILE} file or a Hub id"
    if _is_single_file(model):
        advice += " (the configuration of a single file is downloaded from the Hub once)"
    with loading(f"the base model '{model}'", advice):
        if _is_single_file(model):
            pipe = _pipeline_class(Path(model)).from_single_file(model, torch_dtype=dtype)
        else:
            pipe = DiffusionPipeline.from_pretrained(
                model, revision=revision, torch_dtype=dtype, safety_checker=None
            )
    check_components(pipe)
    if isinstance(pipe.scheduler, PNDMScheduler):
        pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    return pipe


def _is_single_file(model: str) -> bool:
    return str(model).endswith(_SINGLE_FILE)


def _pipeline_class(path: Path) -> Any:
    """Find the class of the pipeline in a single file by the names and shapes of its weights."""
    import diffusers
    import torch
    from diffusers.loaders.single_file_utils import fetch_diffusers_config
    from safetensors import safe_open

    with safe_open(path, "pt") as weights:
        shapes = {
            name: torch.empty(weights.get_slice(name).get_shape(), device="meta")
            for name in weights.keys()  # noqa: SIM118 (not a mapping)
        }
    config = diffusers.DiffusionPipeline.load_config(**fetch_diffusers_config(shapes))
    return getattr(diffusers, config["_class_name"])


def _needs(model: str, revision: str | None = None) -> list[Need]:
    if _is_single_file(model):
        advice = "there is no such file: name another one, a folder or a Hub id"
        return [file(expand(model), advice)]
    return [pretrained(model, revision, STABLE_DIFFUSION.components)]


pretrained_base = Base(
    load=_load,
    needs=_needs,
    untouched_set="untouched",
)
