"""Adds the functions of `loading.py` to diffusers' pipelines as methods."""

import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

from diffusers_fair.loading import load_fair_adapter, set_fair_adapter_scale, unload_fair_adapter

_PIPELINES = "diffusers.pipelines.pipeline_utils"


def add_pipeline_methods() -> None:
    """Add the methods once diffusers' pipelines are imported, without the slow import itself."""
    if _PIPELINES in sys.modules:
        _add_methods(sys.modules[_PIPELINES])
    else:
        sys.meta_path.insert(0, _PipelineFinder())


def _add_methods(module: ModuleType) -> None:
    for function in (load_fair_adapter, unload_fair_adapter, set_fair_adapter_scale):
        setattr(module.DiffusionPipeline, function.__name__, function)


class _PipelineFinder(MetaPathFinder):
    """Import hook that adds the methods when diffusers' pipelines are imported."""

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:
        """Find the module with the other finders, and wrap its loader."""
        if fullname != _PIPELINES:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        assert spec is not None
        assert spec.loader is not None
        execute = spec.loader.exec_module

        def execute_and_add(module: ModuleType) -> None:
            execute(module)
            _add_methods(module)

        spec.loader.exec_module = execute_and_add  # type: ignore[method-assign]
        return spec
