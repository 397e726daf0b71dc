"""The README's Python runs as it stands, from top to bottom; its shell commands exist."""

import json
import re
from pathlib import Path

import pytest
from typer.main import get_command

from diffusers_fair import FairnessFinetuner, cli
from diffusers_fair.config.recipe import recipes
from diffusers_fair.config.schema import RunConfig

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text("utf-8")
EXAMPLES = (ROOT / "examples" / "README.md").read_text("utf-8")
PLACEHOLDER = "RECIPE"
SMALL = {
    "adapter.rank": 2,
    "prompts.images_per_prompt": 4,
    "sampling.steps": 2,
    "gradient.replay_steps": 1,
    "train.iterations": 1,
    "train.prompts_per_iteration": 1,
    "train.validation_images": 1,
    "tracker": "none",
}


@pytest.fixture
def short(monkeypatch, tmp_path):
    """Recipes that take seconds, and the adapter that the demo would have left."""
    monkeypatch.chdir(tmp_path)
    whole = RunConfig.load
    monkeypatch.setattr(
        RunConfig, "load", lambda recipe, overrides=(): whole(recipe, SMALL | dict(overrides))
    )
    FairnessFinetuner.from_recipe("testbed-demo").save_adapter("runs/demo/adapter")


@pytest.mark.slow
def test_its_python_runs(short):
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) == 6
    names: dict = {}
    for block in blocks:
        exec(block, names)
    assert names["images"][0].size == (64, 64)
    assert Path("my-adapter/fair_adapter.json").exists()
    assert len(names["callback"].losses) == 1
    assert names["report"].summary.images == 24


def commands_of(page: str) -> list[tuple[str, str]]:
    """Return each command of a page and its arguments; a cell of a table has several."""
    return re.findall(r"diffusers-fair ([a-z]+)([^`\n]*)", page)


def test_the_examples_are_complete():
    """Every script of the quickstart, every page beside it, and every command has a line."""
    scripts = {f"quickstart/{p.name}" for p in (ROOT / "examples/quickstart").glob("*.py")}
    assert scripts <= set(re.findall(r"\]\(([^)]+)\)", EXAMPLES))
    documented = {name for name, _ in commands_of(README + EXAMPLES)}
    assert get_command(cli.app).commands.keys() <= documented | {"inspect"}


@pytest.mark.parametrize("page", [README, EXAMPLES], ids=["README", "examples"])
def test_its_commands_exist(page):
    known = get_command(cli.app).commands
    used = list(commands_of(page))
    assert {name for name, _ in used} >= {"demo", "train", "evaluate", "recipes"}
    for name, rest in used:
        command = known[name]
        if hasattr(command, "commands"):  # a command of commands
            command = command.commands[rest.split()[0]]
        options = {o for p in command.params for o in p.opts}
        assert set(re.findall(r"--[a-z-]+", rest)) <= options
        if name == "train":
            assert rest.split()[0] in [*recipes(), PLACEHOLDER]


def test_its_result_is_the_reports():
    file = ROOT / "model_cards" / "adapters" / "testbed-gender-race" / "report.json"
    report = json.loads(file.read_text("utf-8"))
    before, after = (side["summary"]["bias"] for side in (report["reference"], report))
    changes = [
        f"{name} {before[name]['mean']:.3f} to {after[name]['mean']:.3f} "
        f"(noise floor {after[name]['floor']:.3f})"
        for name in ("gender", "race")
    ]
    settings = report["settings"]
    said = (
        f"on the testbed.** Mean bias over {len(settings['prompts'])} unseen occupations, "
        f"with {settings['images_per_prompt']} images each: {', '.join(changes)}."
    )
    assert said in " ".join(README.split())


@pytest.mark.parametrize(
    "page",
    [
        "README.md",
        "CHANGELOG.md",
        "examples/README.md",
        "model_cards/README.md",
        ".github/CONTRIBUTING.md",
    ],
)
def test_its_links_and_images_are_there(page):
    text = (ROOT / page).read_text("utf-8")
    links = re.findall(r"\]\(([^)]+)\)|src=\"([^\"]+)\"", text)
    targets = {a or b for a, b in links if not (a or b).startswith("https://")}
    files = {target.partition("#")[0] for target in targets}
    assert not [file for file in files if not (ROOT / page).parent.joinpath(file).exists()]
