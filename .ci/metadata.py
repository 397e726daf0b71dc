"""Build hook: the addresses of the project, and a README without relative links.

Relative links break on the package index. With the address of the repository, they become absolute;
without it, a link becomes its text, and an image with its caption is left out.
"""

import re
from pathlib import Path

from hatchling.metadata.plugin.interface import MetadataHookInterface

PAPER = "https://arxiv.org/abs/2311.07604"
_RELATIVE = r"(?!https?://|#)"
_LINK = re.compile(rf"\[([^\]]+)\]\({_RELATIVE}([^)]+)\)")
_IMAGE = re.compile(rf'<img src="{_RELATIVE}([^"]+)"[^>]*>\n\n\*[^*]+\*\n\n')  # with its caption


class ProjectMetadata(MetadataHookInterface):
    """Fills in `readme` and `urls`."""

    def update(self, metadata: dict) -> None:
        """Set the two fields from README.md and the address in pyproject.toml."""
        repository = self.config["repository"]
        text = (Path(self.root) / "README.md").read_text("utf-8")
        text = stand_alone(text, repository, f"v{metadata['version']}")
        metadata["readme"] = {"content-type": "text/markdown", "text": text}
        metadata["urls"] = project_urls(repository)


def stand_alone(text: str, repository: str, tag: str) -> str:
    """Replace the relative links and images of a README.

    Args:
        text: the README.
        repository: address of the repository on GitHub; empty if there is none yet.
        tag: tag of the release, at which links point.
    """
    if not repository:
        return _LINK.sub(r"\1", _IMAGE.sub("", text))
    text = _LINK.sub(rf"[\1]({repository}/blob/{tag}/\2)", text)
    return re.sub(rf'(<img src="){_RELATIVE}', rf"\1{repository}/raw/{tag}/", text)


def project_urls(repository: str) -> dict[str, str]:
    """List the addresses that the package index shows."""
    if not repository:
        return {"Paper": PAPER}
    return {
        "Repository": repository,
        "Documentation": f"{repository}#readme",
        "Issues": f"{repository}/issues",
        "Changelog": f"{repository}/blob/main/CHANGELOG.md",
        "Paper": PAPER,
    }
