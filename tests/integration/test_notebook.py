"""The notebook of examples/quickstart runs from top to bottom, and shows progress."""

import io
import json
from contextlib import redirect_stdout
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pytest
from rich.console import Console

from diffusers_fair.evaluation.generate import progress_bar

NOTEBOOK = Path(__file__).parents[2] / "examples" / "quickstart" / "quickstart.ipynb"


def cells() -> list[str]:
    """The code of the notebook without the commands of IPython, which install packages."""
    book = json.loads(NOTEBOOK.read_text("utf-8"))
    assert not [cell for cell in book["cells"] if cell.get("outputs")]  # committed without
    sources = ["".join(x["source"]) for x in book["cells"] if x["cell_type"] == "code"]
    assert sources[0].startswith('%pip install -q "diffusers-fair[train]"')
    return [source for source in sources if not source.startswith("%")]


@pytest.mark.slow
def test_it_runs_from_top_to_bottom(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    mpl.use("agg")
    names: dict = {"__name__": "__main__"}
    try:
        for source in cells():
            exec(source.replace('"iterations": 8', '"iterations": 2'), names)
    finally:
        plt.close("all")
    assert len(names["losses"].losses) == 2
    before, after = (np.array(names[name][0], float) for name in ("before", "after"))
    assert (before != after).any()
    assert names["changed"].summary.images == 24
    assert names["changed"].reference is names["base"]
    assert Path("runs/notebook/report/report.html").is_file()


def test_progress_bars_need_no_widgets_in_a_notebook(monkeypatch):
    """The line is overwritten, as notebooks do it, and is free of colour codes."""
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    assert Console().is_jupyter
    with redirect_stdout(io.StringIO()) as out, progress_bar(2, "images") as advance:
        advance(2)
    *_, last = out.getvalue().split("\r\x1b[2K")
    assert "images" in last
    assert "2/2" in last
    assert "\x1b[0m" not in last


def test_progress_bars_elsewhere_are_on_stderr(capsys):
    with progress_bar(2, "images") as advance:
        advance(2)
    said = capsys.readouterr()
    assert said.out == ""
    assert "2/2" in said.err
