"""The app of a Space in a browser: a prompt is typed, and images appear beside each other."""

import io
import os
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffusers_fair.publishing.space import write_space

ROOT = Path(__file__).parents[2]
ADAPTERS = ROOT / "model_cards" / "adapters"
PROMPT = "a photo of the face of a nurse, a person"
TIMEOUT = 300_000  # milliseconds; on a busy machine, an image takes seconds
OFFLINE = {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_SSR_MODE": "False", "HF_HUB_OFFLINE": "1"}


@contextmanager
def served(folder: Path, log: Path):
    """Run `python app.py` in a Space; yield its URL."""
    pytest.importorskip("gradio", reason="the app of a Space needs gradio")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    env = os.environ | OFFLINE | {"GRADIO_SERVER_PORT": port, "PYTHONPATH": str(ROOT)}
    with log.open("w") as out:
        app = subprocess.Popen(
            [sys.executable, "app.py"], cwd=folder, env=env, stdout=out, stderr=out
        )
        try:
            url = f"http://127.0.0.1:{port}/"
            wait_for(url, app, log)
            yield url
        finally:
            app.terminate()
            app.wait()


def wait_for(url: str, app: subprocess.Popen, log: Path) -> None:
    for _ in range(600):
        assert app.poll() is None, log.read_text()
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except OSError:
            time.sleep(0.2)
    pytest.fail(f"the app does not answer: {log.read_text()}")


@contextmanager
def opened(browser, url: str):
    """Open the page without the requests that leave this machine, such as for fonts."""
    view = browser.new_page(viewport={"width": 1280, "height": 1000})
    view.set_default_timeout(TIMEOUT)
    view.route("**/*", lambda x: x.continue_() if x.request.url.startswith(url) else x.abort())
    view.goto(url)
    yield view
    view.close()


def generate(view, columns: int, seed: int, images: int = 1) -> list[list[np.ndarray]]:
    """Press the button; return the images of each column. Equal images have equal URLs."""
    shown = view.locator("img[src*='gradio_api/file=']")
    old = {image.get_attribute("src") for image in shown.all()}
    view.get_by_label("number input for Seed").fill(str(seed))
    view.get_by_label("number input for Images").fill(str(images))
    view.get_by_role("button", name="Generate").click()
    deadline = time.monotonic() + TIMEOUT / 1000
    while time.monotonic() < deadline:
        sources = [image.get_attribute("src") for image in shown.all()]
        if len(sources) == columns * images and old.isdisjoint(sources):
            pixels = [read_image(source) for source in sources]
            return [pixels[i * images : (i + 1) * images] for i in range(columns)]
        time.sleep(0.2)
    pytest.fail(f"expected {columns * images} new images, got {sources}")


def read_image(url: str) -> np.ndarray:
    with urllib.request.urlopen(url, timeout=60) as answer:
        return np.array(Image.open(io.BytesIO(answer.read())).convert("RGB"), float)


def differ(one: np.ndarray, other: np.ndarray) -> bool:
    return bool(np.abs(one - other).mean() > 1)  # of 255; the browser's format loses less


@pytest.mark.slow
def test_images_without_and_with_an_adapter(browser, tmp_path):
    write_space(ADAPTERS / "testbed-gender", tmp_path / "space")
    with served(tmp_path / "space", tmp_path / "log") as url, opened(browser, url) as view:
        view.get_by_label("Prompt").fill(PROMPT)
        before, after = generate(view, columns=2, seed=3, images=2)
        assert all(map(differ, before, after))
        assert differ(*before)  # another seed
        assert view.get_by_role("columnheader", name="noise floor").is_visible()
        assert view.get_by_role("cell", name="0.669 ± 0.271 [0.593, 0.741]").is_visible()
        screenshot(view, "one")

        view.get_by_label("number input for Scale of the adapter").fill("0")
        without, unscaled = generate(view, columns=2, seed=5)
        assert not any(map(differ, without, unscaled))

        view.get_by_label("Prompt").fill(" ")
        view.get_by_role("button", name="Generate").click()
        view.get_by_text("Type a prompt.").wait_for()


@pytest.mark.slow
def test_two_adapters_of_which_one_can_only_be_switched(browser, tmp_path):
    one, other = ADAPTERS / "testbed-gender", ADAPTERS / "testbed-prefix"
    write_space(one, tmp_path / "space", other=other)
    with served(tmp_path / "space", tmp_path / "log") as url, opened(browser, url) as view:
        view.get_by_label("Prompt").fill(PROMPT)
        columns = generate(view, columns=3, seed=3)
        assert all(differ(a[0], b[0]) for a, b in combinations(columns, 2))
        screenshot(view, "two")
        view.get_by_label("Use testbed-prefix").uncheck()
        before, _, unused = generate(view, columns=3, seed=4)
        assert not differ(before[0], unused[0])


def screenshot(view, name: str) -> None:
    """Take a picture of the whole page, to look at, if a folder for it is given."""
    if folder := os.environ.get("SCREENSHOTS"):
        view.screenshot(path=Path(folder) / f"space-{name}.png", full_page=True)
