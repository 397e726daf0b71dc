"""`env`, `--version`, completion and verbosity: what a user pastes, sees and can switch off."""

import getpass
import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from command import run
from packaging.requirements import Requirement

from diffusers_fair import environment, verbosity
from diffusers_fair.evaluation.generate import progress_bar
from diffusers_fair.training.progress import progress_bar as training_bar
from diffusers_fair.version import __version__

if sys.version_info >= (3, 11):
    import tomllib
else:  # pragma: no cover
    import tomli as tomllib

ROOT = Path(__file__).parents[2]


@pytest.fixture
def _restored():
    """Leave the package's logger as it was."""
    level, handlers = verbosity.logger.level, list(verbosity.logger.handlers)
    yield
    verbosity.logger.setLevel(level)
    verbosity.logger.handlers[:] = handlers


def test_env_has_the_version_of_every_dependency():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    needed = project["dependencies"] + project["optional-dependencies"]["train"]
    assert {Requirement(text).name for text in needed} <= set(environment.PACKAGES)


@pytest.mark.usefixtures("_restored")
def test_env_describes_this_machine(monkeypatch, capsys):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert run(monkeypatch, "env", "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["diffusers-fair"] == __version__
    assert facts["packages"]["torch"] == torch.__version__.partition("+")[0]
    assert facts["packages"]["xformers"] is None
    assert facts["devices"][-1] == {"device": "cpu"}
    assert facts["memory in GB"] > 0.1
    assert facts["variables"]["CUDA_VISIBLE_DEVICES"] == ""
    assert run(monkeypatch, "env") == 0
    lines = capsys.readouterr().out.splitlines()
    assert f"- package torch: {facts['packages']['torch']}" in lines
    assert "- package xformers: none" in lines
    assert "- device cpu: available" in lines
    assert all(line.startswith("- ") for line in lines)


def test_env_lists_every_gpu(monkeypatch):
    gpu = {"device": "cuda:1", "gpu": "H200", "driver": "580.1"}
    monkeypatch.setattr(environment, "_devices", lambda: [torch.device("cuda:1")])
    monkeypatch.setattr(environment, "describe_device", lambda device: dict(gpu))
    assert "- device cuda:1: gpu H200, driver 580.1" in environment.environment_text().splitlines()


def test_env_has_no_personal_paths():
    text = environment.environment_text() + environment.environment_text(as_json=True)
    assert str(ROOT) not in text
    assert str(Path.home()) not in text
    assert sys.prefix not in text
    assert not re.search(rf"[/\\]{re.escape(getpass.getuser())}\b", text)


@pytest.mark.slow
@pytest.mark.parametrize("words", [["env"], ["env", "--json"], ["train", "x"]])
def test_without_the_packages_of_the_command_line(words):
    """As after `pip install diffusers-fair`: typer and rich cannot be imported."""
    code = (
        "import sys\n"
        "sys.modules['typer'] = sys.modules['rich'] = None\n"
        "from diffusers_fair.__main__ import main\n"
        "main()"
    )
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
    if words == ["train", "x"]:
        assert done.returncode == 2
        assert "needs 'typer', which comes with: pip install 'diff" in done.stderr
    else:
        assert done.returncode == 0
        assert __version__ in done.stdout
        assert json.loads(done.stdout) if words[1:] else done.stdout.startswith("- ")


def test_version_and_short_help(monkeypatch, capsys):
    assert run(monkeypatch, "--version") == 0
    assert capsys.readouterr().out == f"diffusers-fair {__version__}\n"
    assert run(monkeypatch, "recipes", "-h") == 0
    assert "List the shipped recipes" in capsys.readouterr().out


@pytest.mark.slow
def test_the_shell_completes_commands():
    variables = {
        "_DIFFUSERS_FAIR_COMPLETE": "complete_bash",
        "COMP_WORDS": "diffusers-fair tr",
        "COMP_CWORD": "1",
    }
    code = "import sys; sys.argv = ['diffusers-fair']; from diffusers_fair.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | variables
    )
    assert done.stdout.split() == ["train"]


# ---- verbosity -----------------------------------------------------------------------------------


@pytest.mark.usefixtures("_restored")
@pytest.mark.parametrize(
    ("level", "shown"), [(logging.INFO, "note warning"), (logging.WARNING, "warning"), (40, "")]
)
def test_records_of_the_level_reach_stderr(level, shown, capsys):
    verbosity.log_to_stderr(level)
    verbosity.log_to_stderr(level)  # does not write twice
    logging.getLogger("diffusers_fair.some.module").info("note")
    logging.getLogger("diffusers_fair.some.module").warning("warning")
    names = {"note": "INFO", "warning": "WARNING"}
    assert capsys.readouterr().err == "".join(f"{names[m]}: {m}\n" for m in shown.split())


@pytest.mark.usefixtures("_restored")
def test_errors_only_hides_progress_bars(capsys):
    for level, is_shown in ((logging.WARNING, True), (logging.ERROR, False)):
        verbosity.logger.setLevel(level)
        with training_bar(0, 3, is_shown=True), progress_bar(3, "images"):
            pass
        printed = capsys.readouterr()
        assert ("training" in printed.out, "images" in printed.err) == (is_shown, is_shown)


@pytest.mark.usefixtures("_restored")
@pytest.mark.parametrize("option", ["--quiet", "--verbose"])
def test_only_verbose_has_the_traceback_of_bad_input(option, monkeypatch, capsys):
    assert run(monkeypatch, option, "doctor", "no-such-recipe") == 2
    err = capsys.readouterr().err
    assert ("Traceback" in err) == (option == "--verbose")
    assert "diffusers-fair: " in err.splitlines()[-1]


def test_quiet_and_verbose_exclude_each_other(monkeypatch, capsys):
    assert run(monkeypatch, "--quiet", "--verbose", "recipes") == 2
    assert "expected --quiet or --verbose, got both" in capsys.readouterr().err
