"""A browser for the pages."""

import os
import shutil
from pathlib import Path

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


@pytest.fixture(scope="module")
def browser():
    api = pytest.importorskip("playwright.sync_api")
    with api.sync_playwright() as driver:
        found = next(filter(None, map(shutil.which, NAMES)), driver.chromium.executable_path)
        if not Path(found).exists():
            leave = pytest.fail if "CI" in os.environ else pytest.skip
            leave(f"no browser: install one of {', '.join(NAMES)}, or `playwright install`")
        opened = driver.chromium.launch(executable_path=found)
        yield opened
        opened.close()
