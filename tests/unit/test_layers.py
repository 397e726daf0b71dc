"""The package's layers, and who must not know whom: read off the source."""

import ast
import json
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

import diffusers_fair

ROOT = Path(diffusers_fair.__file__).parent
OWN = ROOT.name

LAYERS = (  # rooms; imports go to the same layer or down, never in a circle
    (
        "attributes",
        "atomic",
        "config",
        "console",
        "devices",
        "distributed",
        "environment",
        "folder_lock",
        "metrics",
        "paths",
        "prompts",
        "provenance",
        "strict_json",
        "verbosity",
        "version",
    ),
    ("families", "vision", "adapters", "reports"),
    ("diffusion", "objective", "loading", "evaluation", "baselines", "backends", "testbed"),
    ("pipeline_methods",),
    ("training", "publishing", "assess", "doctor", "setup"),
    ("cli", "__main__"),
)
CORE = {  # what `pip install diffusers-fair` brings
    *("torch", "diffusers", "transformers", "peft", "huggingface_hub", "safetensors"),
    *("numpy", "PIL", "yaml"),  # which they require
}


def modules() -> dict[str, Path]:
    """Name below the package -> file; the package itself is ''."""
    paths = {path.relative_to(ROOT).with_suffix(""): path for path in sorted(ROOT.rglob("*.py"))}
    return {
        ".".join(name.parts).removesuffix("__init__").rstrip("."): path
        for name, path in paths.items()
    }


MODULES = modules()


def targets(node: ast.AST, module: str) -> list[str]:
    """Full dotted names that an import statement imports, of submodules rather than of names."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if not isinstance(node, ast.ImportFrom):
        return []
    assert node.level == 0, f"{module}: imports are absolute"
    assert node.module is not None
    names = []
    for alias in node.names:
        full = f"{node.module}.{alias.name}"
        names.append(full if full.removeprefix(f"{OWN}.") in MODULES else node.module)
        facade = node.module == OWN and names[-1] == OWN
        assert not facade, f"{module}: import {alias.name} from its module, not from the package"
    return names


@cache
def imports(module: str) -> frozenset[str]:
    """Everything a module imports, wherever in it."""
    tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
    return frozenset(name for node in ast.walk(tree) for name in targets(node, module))


def top_level_imports(module: str) -> set[str]:
    """What importing a module imports: not in functions, not for type checkers only."""
    found, todo = set(), [ast.parse(MODULES[module].read_text(encoding="utf-8"))]
    while todo:
        node = todo.pop()
        found |= set(targets(node, module))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            todo += node.orelse
        else:
            todo += ast.iter_child_nodes(node)
    return found


def own(names) -> set[str]:
    """Those of the package's own modules, below the package."""
    return {name.removeprefix(f"{OWN}.") for name in names if name.startswith(f"{OWN}.")}


def reach(module: str) -> set[str]:
    """Full names of what a module imports, itself or through the package's own modules."""
    seen, todo = set(), [module]
    while todo:
        for name in imports(todo.pop()) - seen:
            seen.add(name)
            todo += own([name])
    return seen


def room(module: str) -> str:
    return module.partition(".")[0]


def layer(module: str) -> int:
    found = [i for i, rooms in enumerate(LAYERS) if room(module) in rooms]
    assert len(found) == 1, f"{room(module)} must be in one layer: add it to LAYERS"
    return found[0]


def arrows() -> dict[str, set[str]]:
    """Room -> the rooms that its modules import from, anywhere in them."""
    found: dict[str, set[str]] = {}
    for module in BELOW:
        others = {room(name) for name in own(imports(module))} - {room(module)}
        found.setdefault(room(module), set()).update(others)
    return found


def inside(module: str, *places: str) -> bool:
    return any(module == place or module.startswith(f"{place}.") for place in places)


BELOW = [module for module in MODULES if module]
TRAINING = ("training", "diffusion.replay", "objective.losses")


def test_no_circles():
    todo = arrows()
    while leaves := {name for name, others in todo.items() if not others & todo.keys()}:
        todo = {name: others for name, others in todo.items() if name not in leaves}
    assert not todo


def test_no_circles_between_modules():
    todo = {module: own(imports(module)) - {module} for module in BELOW}
    while leaves := {name for name, others in todo.items() if not others & todo.keys()}:
        todo = {name: others for name, others in todo.items() if name not in leaves}
    assert not todo


@pytest.mark.parametrize("module", BELOW)
def test_imports_go_down(module):
    up = {name for name in own(imports(module)) if layer(name) > layer(module)}
    assert not up, f"{module} (layer {layer(module)}) imports {up}"


@pytest.mark.parametrize("module", BELOW)
def test_optional_packages_are_imported_in_functions(module):
    """Except by the recipe, which is nothing without them, and by what nobody below imports."""
    if inside(module, "config") or layer(module) >= layer("training"):
        return
    packages = {name.partition(".")[0] for name in top_level_imports(module)}
    assert packages <= CORE | {OWN} | set(sys.stdlib_module_names)


@pytest.mark.parametrize("module", [m for m in BELOW if inside(m, "evaluation", "baselines")])
def test_the_judge_does_not_know_the_contestant(module):
    assert not {name for name in own(reach(module)) if inside(name, *TRAINING)}


@pytest.mark.parametrize("module", [m for m in BELOW if inside(m, "loading", "adapters")])
def test_loading_knows_nothing_of_training(module):
    reached = reach(module)
    assert not {name for name in own(reached) if inside(name, "vision", "config", "training")}
    assert {name.partition(".")[0] for name in reached} <= CORE | {OWN} | set(
        sys.stdlib_module_names
    )


def test_export_needs_the_core_installation_only():
    packages = {name.partition(".")[0] for name in reach("publishing.export")}
    assert packages <= CORE | {OWN} | set(sys.stdlib_module_names)


@pytest.mark.parametrize("module", [m for m in BELOW if m != "training.trainer"])
def test_only_the_trainer_knows_accelerate(module):
    assert "accelerate" not in {name.partition(".")[0] for name in imports(module)}


@pytest.mark.parametrize("module", [m for m in MODULES if m != "strict_json"])
def test_json_is_read_and_written_by_the_standard(module):
    """Python's own module writes NaN, which other programs cannot read."""
    text = MODULES[module].read_text(encoding="utf-8")
    assert not re.findall(r"\bjson\.(?:dump|load)s?\(|from json import (?:dump|load)", text)


@pytest.mark.parametrize(
    "module", [m for m in MODULES if not inside(m, "testbed", "prompts", "recipes")]
)
def test_attributes_are_data(module):
    text = MODULES[module].read_text(encoding="utf-8")
    words = re.findall(r"(?<![a-z])(?:gender|race|age)s?(?![a-z])", text, re.IGNORECASE)
    assert not words


@pytest.mark.parametrize(
    "module", [m for m in MODULES if not inside(m, "families", "testbed", "config")]
)
def test_only_families_know_how_a_pipeline_is_built(module):
    """Config has the names of components as values of recipe keys."""
    text = MODULES[module].read_text(encoding="utf-8")
    names = "unet|text_encoder|encode_prompt|encoder_hidden_states|77"
    assert not re.findall(rf"\b(?:{names})\b", text)


# ---- import diffusers_fair -----------------------------------------------------------------------


def run(code: str) -> dict:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_import_is_light():
    result = run(
        "import json, sys, time, diffusers\n"
        "before, start = set(sys.modules), time.perf_counter()\n"
        "import diffusers_fair\n"
        "seconds = time.perf_counter() - start\n"
        "print(json.dumps({'seconds': seconds, 'new': sorted(set(sys.modules) - before)}))"
    )
    new = {name for name in result["new"] if name.partition(".")[0] not in sys.stdlib_module_names}
    assert {name for name in new if inside(name, OWN)} == {
        OWN,
        *(
            f"{OWN}.{name}"
            for name in (
                "atomic",
                "attributes",
                "loading",
                "paths",
                "pipeline_methods",
                "adapters",
                "families",
                "prompts",
                "strict_json",
                "version",
            )
        ),
        *(f"{OWN}.prompts.{name}" for name in ("groups", "lexicon", "wording")),
        *(
            f"{OWN}.families.{name}"
            for name in (
                "aura_flow",
                "base",
                "conditioning",
                "fingerprint",
                "flux",
                "flux2_klein",
                "gemma",
                "lumina2",
                "sana",
                "stable_diffusion",
                "stable_diffusion_3",
                "stable_diffusion_xl",
                "z_image",
            )
        ),
        *(
            f"{OWN}.adapters.{name}"
            for name in (
                "folder",
                "format",
                "json_schema",
                "layers",
                "prefix",
                "prompt_encoder",
                "repository",
                "soft_tokens",
                "tensors",
                "word_switch",
            )
        ),
    }
    assert {name.partition(".")[0] for name in new} <= {OWN, "safetensors"}
    assert result["seconds"] < 1  # measured: 0.01


@pytest.mark.slow
@pytest.mark.parametrize(
    "code",
    [
        "import diffusers_fair; from diffusers import DiffusionPipeline",
        "from diffusers import DiffusionPipeline; import diffusers_fair",
    ],
)
def test_pipelines_get_the_methods(code):
    names = ["load_fair_adapter", "unload_fair_adapter", "set_fair_adapter_scale"]
    result = run(
        f"import json, sys; {code}\n"
        f"same = [getattr(DiffusionPipeline, n) is getattr(diffusers_fair, n) for n in {names}]\n"
        "hooks = [type(finder).__name__ for finder in sys.meta_path]\n"
        "print(json.dumps({'same': same, 'hooks': hooks}))"
    )
    assert result["same"] == [True] * 3
    assert "_PipelineFinder" not in result["hooks"]


@pytest.mark.parametrize("name", diffusers_fair.__all__)
def test_public_names(name):
    assert getattr(diffusers_fair, name).__doc__


def test_unknown_name():
    with pytest.raises(AttributeError, match="has no attribute 'load_unfair_adapter'"):
        _ = diffusers_fair.load_unfair_adapter


# ---- devices -------------------------------------------------------------------------------------


def test_float64_stays_on_the_cpu():
    """MPS has no float64: what may be on a device is moved to the CPU first."""
    only_on_the_cpu = {"diffusion.scheduler", "objective.targets", "objective.target_feedback"}
    for name, path in MODULES.items():
        source = path.read_text()
        moved = re.sub(r"\.cpu\(\)\.double\(\)", "", source)
        assert ".double()" not in moved or name in only_on_the_cpu, name
        assert not re.search(r"float64,[^\n]*device=|device=[^\n]*float64", source), name


def test_random_state_is_saved_on_named_devices():
    """By default, torch starts every GPU of the machine to save its state."""
    for name, path in MODULES.items():
        assert "fork_rng()" not in path.read_text(), name
