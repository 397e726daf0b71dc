"""Spaces: what is written, what is refused, and what is pushed. Their app runs in tests/page."""

import ast
import re
import webbrowser
from pathlib import Path

import pytest
import yaml
from command import run
from test_hub import aim_at, contents, hub, waits  # noqa: F401 (fixtures)
from test_io import SOFT, adapter_info, embeds, weights

from diffusers_fair.adapters.folder import write_adapter
from diffusers_fair.cli import evaluation
from diffusers_fair.publishing.space import SPACE_FILES, write_space

ADAPTERS = Path(__file__).parents[2] / "model_cards" / "adapters"
GENDER, PREFIX = ADAPTERS / "testbed-gender", ADAPTERS / "testbed-prefix"


def unmeasured(folder: Path, **changes) -> Path:
    write_adapter(folder, weights(), adapter_info(**{"evaluation": None} | changes))
    return folder


def constants(app: Path) -> dict:
    """Name -> value of the literals at the top level of an app."""
    tree = ast.parse(app.read_text("utf-8"))
    values = {}
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
            values[ast.unparse(node.targets[0])] = node.value.value
    return values


def loading_call(app: Path) -> ast.Call:
    tree = ast.parse(app.read_text("utf-8"))
    calls = [x for x in ast.walk(tree) if isinstance(x, ast.Call)]
    return next(x for x in calls if ast.unparse(x.func) == "DiffusionPipeline.from_pretrained")


# ---- what is written -----------------------------------------------------------------------------


def test_a_space_has_what_it_needs(tmp_path):
    files = write_space(GENDER, tmp_path / "space")
    assert {*files} == {
        *SPACE_FILES,
        *(f"adapter/{name}" for name in ("evaluation.md", "fair_adapter.json")),
        "adapter/pytorch_lora_weights.safetensors",
    }
    weights_file = "pytorch_lora_weights.safetensors"
    assert files[f"adapter/{weights_file}"].read_bytes() == (GENDER / weights_file).read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["space"]
    _, front, page = files["README.md"].read_text("utf-8").split("---\n", 2)
    front = yaml.safe_load(front)
    assert front["sdk"] == "gradio"
    assert front["app_file"] == "app.py"
    assert front["title"] == "Fairness adapter: gender, for testbed"
    assert "suggested_hardware" not in front
    assert str(ADAPTERS) not in page
    assert "gradio>=" in files["requirements.txt"].read_text("utf-8")


def test_the_table_is_the_cards(tmp_path):
    files = write_space(GENDER, tmp_path / "space")
    card = (GENDER / "README.md").read_text("utf-8")
    table = files["adapter/evaluation.md"].read_text("utf-8")
    rows = [line for line in table.splitlines() if line.startswith("|")]
    assert len(rows) > 10
    assert all(row in card for row in rows)


def test_the_usual_sampling_is_that_of_the_evaluation(tmp_path):
    app = write_space(GENDER, tmp_path / "space")["app.py"].read_text("utf-8")
    assert "STEPS, GUIDANCE_SCALE = 12, 4.5" in app


def test_without_an_evaluation_the_bases_usual_sampling(tmp_path):
    files = write_space(unmeasured(tmp_path / "a"), tmp_path / "space")
    assert "STEPS, GUIDANCE_SCALE = 20, 4.5" in files["app.py"].read_text("utf-8")
    assert "Not evaluated yet" in files["adapter/evaluation.md"].read_text("utf-8")
    other = unmeasured(tmp_path / "b", base_model="org/model", base_revision="v1")
    files = write_space(other, tmp_path / "other")
    assert "family.usual(pipe).steps" in files["app.py"].read_text("utf-8")
    call = loading_call(files["app.py"])
    assert ast.literal_eval(call.args[0]) == "org/model"
    assert ast.literal_eval(call.keywords[0].value) == "v1"
    front = yaml.safe_load(files["README.md"].read_text("utf-8").split("---\n")[1])
    assert front["models"] == ["org/model"]
    assert front["suggested_hardware"] == "t4-small"


def test_the_size_is_that_of_the_evaluation(tmp_path):
    adapter = unmeasured(tmp_path / "a", recipe={"evaluation": {"size": 512}})
    app = write_space(adapter, tmp_path / "space")["app.py"].read_text("utf-8")
    assert "call_options(pipe, GUIDANCE_SCALE, size=512)" in app


def test_soft_tokens_are_switched(tmp_path):
    files = write_space(GENDER, tmp_path / "space", other=PREFIX)
    app = files["app.py"].read_text("utf-8")
    assert "('testbed-gender', FOLDER / 'adapter', True)" in app
    assert "('testbed-prefix', FOLDER / 'other', False)" in app
    assert "other/learned_embeds.safetensors" in files


def test_adapters_of_the_same_name_are_told_apart(tmp_path):
    one = unmeasured(tmp_path / "one" / "adapter")
    other = tmp_path / "other" / "adapter"
    info = adapter_info(evaluation=None, components=SOFT)
    write_adapter(other, embeds(), info)
    app = write_space(one, tmp_path / "space", other=other)["app.py"].read_text("utf-8")
    assert "'one/adapter'" in app
    assert "'other/adapter'" in app


def test_what_an_adapter_says_is_text_in_the_app(tmp_path):
    """An adapter may come from anybody."""
    evil = 'x"; \'\'\'""" + exit() #{{ 1 }}\\'
    adapter = unmeasured(tmp_path / "a", base_model=f"{tmp_path}/{evil}", base_revision=evil)
    app = write_space(adapter, tmp_path / "space")["app.py"]
    assert evil in constants(app)["TITLE"]
    call = loading_call(app)
    assert ast.literal_eval(call.args[0]) == f"{tmp_path}/{evil}"
    assert ast.literal_eval(call.keywords[0].value) == evil


# ---- what is refused -----------------------------------------------------------------------------


def refused(folder: Path, message: str, *args, **kwargs) -> None:
    before = contents(folder)
    with pytest.raises(ValueError, match=message):
        write_space(*args, **kwargs)
    assert contents(folder) == before
    assert not list(folder.glob(".space-*"))


def test_no_adapter(tmp_path):
    refused(tmp_path, "there is no adapter folder at", tmp_path / "none", tmp_path / "space")


def test_two_adapters_that_cannot_be_compared(tmp_path):
    other = unmeasured(tmp_path / "b", base_model="org/model")
    message = "expected two adapters for the same base model, got .* for 'testbed' and .*: write a"
    refused(tmp_path, message, GENDER, tmp_path / "space", other=other)
    message = "expected two different adapters, but .* have the same weights: leave out --other"
    refused(tmp_path, message, GENDER, tmp_path / "space", other=GENDER)


def test_a_damaged_evaluation(tmp_path):
    evaluation = {"steps": "exit()", "guidance_scale": 4.5}
    adapter = unmeasured(tmp_path / "a", evaluation=evaluation)
    message = "evaluation stored in the adapter is damaged: expected numbers .*'exit..'"
    refused(tmp_path, message, adapter, tmp_path / "space")
    adapter = unmeasured(tmp_path / "b", evaluation={"steps": 3, "guidance_scale": 4.5})
    message = "evaluation stored in the adapter cannot be shown .*write the card again"
    refused(tmp_path, message, adapter, tmp_path / "space")


def test_a_folder_with_something_else(tmp_path):
    files = write_space(GENDER, tmp_path / "space")
    write_space(GENDER, tmp_path / "space")  # the same again
    files["app.py"].write_text("# edited", "utf-8")
    message = r"already holds other files than this Space \('app.py'\): choose another folder"
    refused(tmp_path, message, GENDER, tmp_path / "space")
    (tmp_path / "file").touch()
    refused(tmp_path, "cannot be a folder", GENDER, tmp_path / "file")


def test_an_empty_folder_is_filled(tmp_path):
    (tmp_path / "space").mkdir()
    assert "app.py" in write_space(GENDER, tmp_path / "space")


# ---- pushing -------------------------------------------------------------------------------------


def test_pushed_in_one_commit(hub, tmp_path, monkeypatch, capsys):  # noqa: F811
    out = tmp_path / "space"
    assert run(monkeypatch, "space", GENDER, out, "--push", "org/show", "--private") == 0
    repo = hub.repos["spaces/org/show"]
    assert hub.files("spaces/org/show") == contents(out)
    assert repo.private
    assert len(repo.commits) == 2
    assert "/commit/" in capsys.readouterr().out
    assert run(monkeypatch, "space", GENDER, out, "--push", "org/show") == 0
    assert "nothing to push: org/show is up to date" in capsys.readouterr().out


def test_a_push_that_fails_leaves_no_space_on_the_hub(hub, tmp_path, monkeypatch, capsys):  # noqa: F811
    hub.fail("commit", 503, times=99)
    out = tmp_path / "space"
    assert run(monkeypatch, "space", GENDER, out, "--push", "org/show") == 2
    assert "nothing on the Hub was changed" in capsys.readouterr().err
    assert not hub.repos
    assert (out / "app.py").is_file()  # complete, to be pushed again


def test_a_space_of_somebody_else_is_left_alone(hub, tmp_path, monkeypatch, capsys):  # noqa: F811
    hub.publish("spaces/org/show", {"app.py": b"print()"})
    assert run(monkeypatch, "space", GENDER, tmp_path / "space", "--push", "org/show") == 2
    message = "holds something other than the Space of an adapter ('app.py')"
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--private"], "--private is for a Space on the Hub: add --push REPO"),
        (["--push", "show"], "expected a repository as 'user-or-organisation/name', got 'show'"),
        (["--push", "org/show", "--token", ""], "publishing needs a Hub token"),
    ],
)
def test_refused_before_anything_is_written(options, message, tmp_path, monkeypatch, capsys):
    out = tmp_path / "space"
    assert run(monkeypatch, "space", GENDER, out, *options) == 2
    assert message in capsys.readouterr().err
    assert not out.exists()


def test_a_base_that_the_hub_does_not_have(tmp_path, monkeypatch, capsys):
    adapter = unmeasured(tmp_path / "a", base_model="./models/mine")
    options = ["--push", "org/show", "--token", "hf_x"]
    assert run(monkeypatch, "space", adapter, tmp_path / "space", *options) == 2
    message = "a Space on the Hub cannot load the base model './models/mine' from this machine"
    assert message in capsys.readouterr().err
    assert not (tmp_path / "space").exists()


# ---- view ----------------------------------------------------------------------------------------


@pytest.fixture
def opened(monkeypatch):
    """URLs that were opened in the browser, on a machine with a display."""
    urls: list[str] = []
    monkeypatch.setattr(webbrowser, "open", lambda url: urls.append(url) or True)
    monkeypatch.setattr(evaluation, "has_display", lambda: True)
    return urls


@pytest.mark.parametrize("name", ["report.html", "compare.html"])
def test_view_opens_the_page(name, tmp_path, monkeypatch, capsys, opened):
    (tmp_path / name).touch()
    assert run(monkeypatch, "view", tmp_path) == 0
    assert opened == [(tmp_path / name).resolve().as_uri()]
    assert capsys.readouterr().out.strip() == str((tmp_path / name).resolve())


def test_view_only_prints_the_path(tmp_path, monkeypatch, capsys, opened):
    (tmp_path / "report.html").touch()
    assert run(monkeypatch, "view", tmp_path, "--no-open") == 0
    monkeypatch.setattr(evaluation, "has_display", lambda: False)
    assert run(monkeypatch, "view", tmp_path) == 0
    assert not opened
    assert capsys.readouterr().out.splitlines() == [str(tmp_path / "report.html")] * 2


def test_view_without_a_browser(tmp_path, monkeypatch, capsys, opened):
    (tmp_path / "report.html").touch()
    monkeypatch.setattr(webbrowser, "open", lambda url: False)
    assert run(monkeypatch, "view", tmp_path) == 0
    assert "no browser was found: open the file yourself" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("settings", "expected"),
    [({}, False), ({"DISPLAY": ":0"}, True), ({"WAYLAND_DISPLAY": "w"}, True)],
)
def test_a_display_is_known_by_its_variables(settings, expected, monkeypatch):
    monkeypatch.setattr("sys.platform", "linux")
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    assert evaluation.has_display() == expected


def test_view_of_nothing(tmp_path, monkeypatch, capsys, opened):
    assert run(monkeypatch, "view", tmp_path / "none") == 2
    message = "there is no page in .*none': expected a folder with report.html or compare.html"
    assert re.search(message, capsys.readouterr().err)
    assert not opened
