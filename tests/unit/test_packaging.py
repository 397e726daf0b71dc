"""What the package index and package managers read: metadata, README, citation, release files."""

import ast
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from packaging.specifiers import SpecifierSet

from diffusers_fair.version import __version__

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
PROJECT = PYPROJECT["project"]
README = (ROOT / "README.md").read_text("utf-8")
REPOSITORY = "https://example.com/org/name"
PYTHONS = ["3.10", "3.11", "3.12", "3.13"]


@pytest.fixture(scope="module")
def hook():
    pytest.importorskip("hatchling", reason="the build hook needs hatchling")
    return runpy.run_path(str(ROOT / ".ci" / "metadata.py"))


def relative_targets(text: str) -> list[str]:
    found = re.findall(r"\]\(([^)]+)\)|src=\"([^\"]+)\"", text)
    return [a or b for a, b in found if not (a or b).startswith(("https://", "#"))]


@pytest.mark.parametrize("repository", ["", REPOSITORY])
def test_the_readme_stands_alone(hook, repository):
    assert relative_targets(README)
    text = hook["stand_alone"](README, repository, "v1.2.3")
    assert not relative_targets(text)
    assert "https://arxiv.org/abs/2311.07604" in text
    assert text.count("```") == README.count("```")
    assert ("<img" in text) == bool(repository)


def test_links_point_into_the_repository_at_the_tag(hook):
    text = (
        'see [a](b/c.md) and [d](https://e.f)\n\n<img src="g.png" width="1"\n alt="h">\n\n*i*\n\n'
    )
    assert hook["stand_alone"](text, REPOSITORY, "v1") == (
        f"see [a]({REPOSITORY}/blob/v1/b/c.md) and [d](https://e.f)\n\n"
        f'<img src="{REPOSITORY}/raw/v1/g.png" width="1"\n alt="h">\n\n*i*\n\n'
    )
    assert hook["stand_alone"](text, "", "v1") == "see a and [d](https://e.f)\n\n"


def test_the_project_has_addresses(hook):
    assert list(hook["project_urls"]("")) == ["Paper"]
    urls = hook["project_urls"](REPOSITORY)
    assert set(urls) == {"Repository", "Documentation", "Issues", "Changelog", "Paper"}
    assert all(url.startswith("https://") for url in urls.values())


def test_the_supported_pythons_are_the_tested_ones():
    prefix = "Programming Language :: Python :: 3."
    classifiers = [c for c in PROJECT["classifiers"] if c.startswith(prefix)]
    assert [c.rpartition(" ")[2] for c in classifiers] == PYTHONS
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text("utf-8"))
    assert workflow["jobs"]["test"]["strategy"]["matrix"]["python"] == PYTHONS
    supported = SpecifierSet(PROJECT["requires-python"])
    assert all(version in supported for version in PYTHONS)
    assert "3.9" not in supported


def test_the_source_has_the_syntax_of_the_oldest_python():
    for file in (ROOT / "diffusers_fair").rglob("*.py"):
        ast.parse(file.read_text("utf-8"), str(file), feature_version=(3, 10))


def test_the_licence_files_exist_beside_what_they_cover():
    assert [file for file in PROJECT["license-files"] if not (ROOT / file).is_file()] == []
    notices = {p.parent.name for p in (ROOT / "diffusers_fair").rglob("NOTICE")}
    assert notices == {"weights", "tokenizer"}
    assert len(PROJECT["license-files"]) == 1 + len(notices)
    assert (ROOT / "diffusers_fair" / "py.typed").is_file()


def test_the_citation_names_the_version_and_the_paper_as_the_readme_does():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    assert str(citation["version"]) == __version__
    paper = citation["preferred-citation"]
    authors = [f"{a['family-names']}, {a['given-names']}" for a in paper["authors"]]
    assert f"author    = {{{' and '.join(authors)}}}" in README
    assert f"{{{paper['title']}}}" in README
    assert f"{{{paper['year']}}}" in README
    assert paper["url"] in README


def test_the_changelog_has_the_version():
    text = (ROOT / "CHANGELOG.md").read_text("utf-8")
    sections = re.findall(r"^## \[([^\]]+)\]", text, re.MULTILINE)
    assert sections[0] == "Unreleased"
    assert __version__ in sections
    kinds = set(re.findall(r"^### (.+)$", text, re.MULTILINE))
    assert kinds <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


@pytest.mark.parametrize("file", sorted(ROOT.glob(".github/**/*.y*ml")), ids=lambda p: p.name)
def test_the_files_for_github_are_yaml(file):
    assert isinstance(yaml.safe_load(file.read_text("utf-8")), dict)


def test_both_templates_for_reports_ask_for_the_environment():
    for name in ("ISSUE_TEMPLATE/bug_report.yml", "pull_request_template.md"):
        assert "`diffusers-fair env`" in (ROOT / ".github" / name).read_text("utf-8")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("CHANGELOG.md", "# Changelog\n", "has no dated section [0.1.0]: add it"),
        ("CITATION.cff", "version: 9.9.9\n", "has another version than 0.1.0: change it"),
        ("pyproject.toml", 'repository = ""\n', "has no repository address: set it"),
    ],
)
@pytest.mark.skipif(sys.platform == "win32", reason="a shell script")
def test_a_release_is_refused(name, text, message, tmp_path):
    files = {
        ".ci/release": (ROOT / ".ci" / "release").read_text("utf-8"),
        "diffusers_fair/version.py": '__version__ = "0.1.0"\n',
        "CHANGELOG.md": "## [0.1.0] - 2026-01-01\n",
        "CITATION.cff": "version: 0.1.0\n",
        "pyproject.toml": f'repository = "{REPOSITORY}"\n',
    }
    for path, content in (files | {name: text}).items():
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text(content)
    words = ["bash", str(tmp_path / ".ci" / "release"), "--upload"]
    done = subprocess.run(
        words, capture_output=True, text=True, env=os.environ | {"PYTHON": sys.executable}
    )
    assert done.returncode == 2
    assert done.stderr == f"no release: {name} {message}\n"
