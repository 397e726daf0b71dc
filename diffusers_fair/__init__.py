"""Train, measure, share and load fairness adapters for Hugging Face diffusers.

Importing it also gives diffusers' pipelines three methods, and touches nothing else of diffusers:
`load_fair_adapter`, `unload_fair_adapter` and `set_fair_adapter_scale`.
"""

import sys
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

from diffusers_fair.attributes import Attribute
from diffusers_fair.loading import (
    load_fair_adapter,
    set_fair_adapter_scale,
    unload_fair_adapter,
)

__version__ = "0.1.0"
__all__ = [  # noqa: RUF022 (as a reader meets them)
    "FairnessFinetuner",
    "RunConfig",
    "Attribute",
    "BiasedGradientScheduler",
    "load_fair_adapter",
    "unload_fair_adapter",
    "set_fair_adapter_scale",
    "evaluate",
    "testbed",
]

_LAZY = {  # public name -> the module that it is imported from when first used
    "FairnessFinetuner": "diffusers_fair.trainer",
    "RunConfig": "diffusers_fair.config",
    "BiasedGradientScheduler": "diffusers_fair.scheduler",
    "evaluate": "diffusers_fair.evaluation",
}


def __getattr__(name: str) -> Any:
    """Import what is asked for, and not before."""
    if name == "testbed":
        return import_module("diffusers_fair.testbed")
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'diffusers_fair' has no attribute '{name}'")


def _add_methods(module: ModuleType) -> None:
    """Make the functions of `loading.py` methods of diffusers' pipelines."""
    for function in (load_fair_adapter, unload_fair_adapter, set_fair_adapter_scale):
        setattr(module.DiffusionPipeline, function.__name__, function)


class _WhenPipelinesAreImported(MetaPathFinder):
    """Adds the methods as soon as diffusers imports its pipelines, which takes it seconds."""

    module = "diffusers.pipelines.pipeline_utils"

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:
        """Let the usual finders find the module, and add the methods once it has been run."""
        if fullname != self.module:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        assert spec is not None
        assert spec.loader is not None
        run = spec.loader.exec_module

        def run_and_add(module: ModuleType) -> None:
            run(module)
            _add_methods(module)

        spec.loader.exec_module = run_and_add  # type: ignore[method-assign]
        return spec


if _WhenPipelinesAreImported.module in sys.modules:
    _add_methods(sys.modules[_WhenPipelinesAreImported.module])
else:
    sys.meta_path.insert(0, _WhenPipelinesAreImported())
