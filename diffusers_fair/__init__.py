"""Train, measure, share and load fairness adapters for Hugging Face diffusers.

Importing this package also adds three methods to diffusers' pipelines, and changes nothing else in
diffusers: `load_fair_adapter`, `unload_fair_adapter` and `set_fair_adapter_scale`.
"""

from importlib import import_module
from typing import Any

from diffusers_fair.attributes import Attribute
from diffusers_fair.loading import load_fair_adapter, set_fair_adapter_scale, unload_fair_adapter
from diffusers_fair.pipeline_methods import add_pipeline_methods
from diffusers_fair.version import __version__

__all__ = [  # noqa: RUF022 (in the order of use)
    "FairnessFinetuner",
    "TrainingCallback",
    "RunConfig",
    "Attribute",
    "BiasedGradientScheduler",
    "load_fair_adapter",
    "unload_fair_adapter",
    "set_fair_adapter_scale",
    "export_adapter",
    "evaluate",
    "testbed",
    "__version__",
]

_LAZY = {  # public name -> its module, which is imported on first use
    "FairnessFinetuner": "diffusers_fair.training.trainer",
    "TrainingCallback": "diffusers_fair.training.callbacks",
    "RunConfig": "diffusers_fair.config.schema",
    "BiasedGradientScheduler": "diffusers_fair.diffusion.scheduler",
    "evaluate": "diffusers_fair.evaluation.evaluate",
    "export_adapter": "diffusers_fair.publishing.export",
}


def __getattr__(name: str) -> Any:
    """Import a public name on first use."""
    if name == "testbed":
        return import_module("diffusers_fair.testbed")
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'diffusers_fair' has no attribute '{name}'")


add_pipeline_methods()
