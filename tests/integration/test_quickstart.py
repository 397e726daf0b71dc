"""The scripts of examples/quickstart run as they stand."""

import runpy
from pathlib import Path

import pytest

from diffusers_fair.adapters.folder import read_adapter
from diffusers_fair.reports.folder import load_report

SCRIPTS = Path(__file__).parents[2] / "examples" / "quickstart"
LEFT = {  # script -> what it leaves in runs/quickstart
    "load_adapter": "loaded.png",
    "balance_attribute": "lighting/run/adapter",
    "audit_folder": "audit/report.html",
    "publish": "published/README.md",
}


@pytest.mark.slow
@pytest.mark.parametrize("script", sorted(path.stem for path in SCRIPTS.glob("*.py")))
def test_a_script_leaves_what_it_says(script, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(SCRIPTS / f"{script}.py"), run_name="__main__")
    left = Path("runs/quickstart", LEFT[script])
    assert left.exists()
    assert str(left) in capsys.readouterr().out
    if script == "balance_attribute":
        assert [a.name for a in read_adapter(left)[0].attributes] == ["lighting"]
    if script == "audit_folder":
        assert load_report(left.parent).summary.images == 36
