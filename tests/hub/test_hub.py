"""Publishing, with the Hub's own client against a Hub on this machine."""

import os
import subprocess
import sys
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hub_server import ATTRIBUTES, KINDS, File, HubServer, Repository
from huggingface_hub import HfApi, constants
from huggingface_hub.utils import close_session, disable_progress_bars, enable_progress_bars
from test_io import adapter_info, embeds, weights

from diffusers_fair import FairnessFinetuner, RunConfig, cli, testbed
from diffusers_fair.adapters.folder import read_adapter, write_adapter
from diffusers_fair.adapters.format import SoftTokens
from diffusers_fair.adapters.repository import local_folder
from diffusers_fair.publishing.hub import push_adapter

CARD = "---\nlibrary_name: diffusers\n---\n# Adapter\n"
PICTURE = b"\x89PNG\r\n\x1a\n"
BOTH = {**adapter_info().components, "soft_tokens": SoftTokens(count=2)}
OWN = "diffusers_fair"


def adapter_folder(folder: Path, tensors=None, **info) -> Path:
    """An adapter with its card, a sample and a report."""
    write_adapter(folder, tensors or weights(), adapter_info(**info))
    (folder / "README.md").write_text(CARD)
    (folder / "samples").mkdir()
    (folder / "samples" / "pairs.png").write_bytes(PICTURE + b"pairs")
    (folder / "report.json").write_text("{}")
    return folder


@pytest.fixture
def folder(tmp_path):
    return adapter_folder(tmp_path / "adapter")


def aim_at(patch: pytest.MonkeyPatch, url: str, cache: Path, token: str | None) -> None:
    """What HF_ENDPOINT, HF_HOME, HF_TOKEN and HF_HUB_DISABLE_XET do where they are set early."""
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    patch.setattr(constants, "ENDPOINT", url)
    patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    patch.setattr(constants, "HF_HUB_CACHE", str(cache))
    patch.setattr(constants, "HF_TOKEN_PATH", str(cache / "token"))
    patch.setattr(constants, "HF_HUB_OFFLINE", False)
    patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        patch.delenv(name, raising=False)
    if token is not None:
        patch.setenv("HF_TOKEN", token)


@pytest.fixture
def waits(monkeypatch):
    """The client's waits between its tries: written down, not waited."""
    waits: list[float] = []
    for module in ("utils._http", "file_download"):
        sleeper = SimpleNamespace(sleep=waits.append)
        monkeypatch.setattr(f"huggingface_hub.{module}.time", sleeper)
    return waits


@pytest.fixture
def hub(monkeypatch, tmp_path, waits):
    disable_progress_bars()
    with HubServer() as server:
        aim_at(monkeypatch, server.url, tmp_path / "cache", server.TOKEN)
        yield server
        close_session()
    enable_progress_bars()


def contents(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


# ---- what a push does ----------------------------------------------------------------------------


def test_everything_goes_up_in_one_commit(hub, folder):
    done = push_adapter(folder, "org/fair", message="First")
    repo = hub.repos["org/fair"]
    assert hub.files("org/fair") == contents(folder)
    assert list(repo.messages.values()) == ["initial commit", "First"]
    assert done.url == f"{hub.url}/org/fair/commit/{repo.refs['main']}"
    assert done.files == {name: len(data) for name, data in contents(folder).items()}
    assert not repo.private
    assert set(hub.large.values()) == {
        data for name, data in contents(folder).items() if name.endswith((".safetensors", ".png"))
    }
    assert not hub.strangers  # the token stays with the Hub
    assert hub.routes().count("commit") == 1


def test_the_same_again_makes_no_commit(hub, folder):
    push_adapter(folder, "org/fair")
    before = hub.state()
    hub.asked.clear()
    again = push_adapter(folder, "org/fair")
    assert again.url is None
    assert hub.state() == before
    assert hub.routes() == ["model_info"]


def test_only_what_changed_goes_up_and_what_is_gone_goes_away(hub, folder, tmp_path):
    tensors = weights(torch.float16) | embeds()
    whole = adapter_folder(tmp_path / "whole", tensors, components=BOTH)
    push_adapter(whole, "org/fair")
    hub.repos["org/fair"].commits[hub.repos["org/fair"].refs["main"]]["NOTES.md"] = File(b"mine")
    (folder / "samples" / "pairs.png").rename(folder / "samples" / "others.png")
    hub.asked.clear()
    done = push_adapter(folder, "org/fair")
    assert done.removed == ("learned_embeds.safetensors", "samples/pairs.png")
    assert hub.files("org/fair") == contents(folder) | {"NOTES.md": b"mine"}
    assert hub.routes().count("upload") == 1  # the weights; the picture was there by another name
    assert read_adapter(local_folder("org/fair"))[0].components == adapter_info().components


def test_private(hub, folder):
    push_adapter(folder, "org/fair", private=True)
    assert hub.repos["org/fair"].private
    push_adapter(folder, "org/fair", private=True)


def test_a_branch_is_made_from_main(hub, folder):
    push_adapter(folder, "org/fair")
    (folder / "report.json").write_text('{"images": 3}')
    push_adapter(folder, "org/fair", revision="v1/big")
    assert hub.files("org/fair", "v1/big") == contents(folder)
    assert hub.files("org/fair")["report.json"] == b"{}"
    push_adapter(folder, "org/new", revision="v1")
    assert hub.files("org/new", "v1") == contents(folder)
    assert hub.files("org/new") == {}


def test_a_pull_request_and_more_of_it(hub, folder):
    push_adapter(folder, "org/fair")
    (folder / "report.json").write_text('{"images": 3}')
    hub.TOKEN, writer = hub.READER, hub.TOKEN  # to ask is allowed to who may only read
    done = push_adapter(folder, "org/fair", create_pr=True, token=hub.READER)
    hub.TOKEN = writer
    assert done.url == f"{hub.url}/org/fair/discussions/1"
    assert hub.files("org/fair", "refs/pr/1") == contents(folder)
    assert hub.files("org/fair")["report.json"] == b"{}"
    (folder / "report.json").write_text('{"images": 4}')
    push_adapter(folder, "org/fair", revision="refs/pr/1")
    assert hub.files("org/fair", "refs/pr/1") == contents(folder)


def test_a_dry_run_asks_nothing_of_the_hub(hub, folder):
    done = push_adapter(folder, "org/fair", dry_run=True)
    assert done.files == {name: len(data) for name, data in contents(folder).items()}
    assert done.url is None
    assert not hub.asked


def test_only_what_belongs_to_an_adapter_goes_up(hub, folder):
    for name in (".env", "checkpoint.bin", "samples/notes.txt"):
        (folder / name).write_text("not for the world")
    push_adapter(folder, "org/fair")
    assert set(hub.files("org/fair")) == {
        *("README.md", "fair_adapter.json", "pytorch_lora_weights.safetensors"),
        *("report.json", "samples/pairs.png"),
    }


def test_a_card_is_written_if_there_is_none(hub, tmp_path):
    folder = adapter_folder(tmp_path / "bare", evaluation=None)
    (folder / "README.md").unlink()
    before = contents(folder)
    planned = push_adapter(folder, "org/fair", dry_run=True)
    assert contents(folder) == before  # a dry run writes nothing
    done = push_adapter(folder, "org/fair")
    assert planned.files == done.files == {n: len(data) for n, data in contents(folder).items()}
    assert "library_name: diffusers" in (folder / "README.md").read_text("utf-8")
    assert hub.files("org/fair") == contents(folder)


def test_exports_go_up_beside_the_adapter(hub, folder):
    before = contents(folder)
    planned = push_adapter(folder, "org/fair", dry_run=True, export=["comfyui", "kohya"])
    assert contents(folder) == before
    done = push_adapter(folder, "org/fair", export=["comfyui", "kohya"])
    files = contents(folder)
    exports = sorted(files.keys() - before.keys())
    assert [name.split("/")[:2] for name in exports] == [
        ["exports", "comfyui"],
        ["exports", "kohya"],
    ]
    assert planned.files == done.files == {name: len(data) for name, data in files.items()}
    assert hub.files("org/fair") == files
    assert push_adapter(folder, "org/fair").url is None  # they stay
    (folder / exports[0]).unlink()
    assert push_adapter(folder, "org/fair").removed == (exports[0],)


# ---- what it refuses -----------------------------------------------------------------------------


def refused(hub, message, folder, repo_id="org/fair", **options) -> str:
    before = hub.state()
    with pytest.raises(ValueError, match=message) as caught:
        push_adapter(folder, repo_id, **options)
    assert hub.state() == before
    assert "\n" not in str(caught.value)
    assert hub.TOKEN not in str(caught.value)
    return str(caught.value)


def foreign(hub, private=False, **files):
    repo = Repository(private=private)
    tree = {".gitattributes": ATTRIBUTES} | {n.replace("_", "."): d for n, d in files.items()}
    repo.commit("main", {name: File(data) for name, data in tree.items()}, "theirs")
    hub.repos["org/fair"] = repo


@pytest.mark.parametrize("name", ["fair", "a/b/c", "org/", "../x", "org/a--b"])
def test_a_name_that_cannot_be(hub, folder, name):
    refused(hub, "user-or-organisation/name|Repo id must|Cannot have", folder, name)
    assert not hub.asked


def test_a_folder_that_is_no_adapter(hub, folder, tmp_path):
    refused(hub, "there is no adapter folder at", tmp_path / "nowhere")
    path = folder / "pytorch_lora_weights.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    refused(hub, "truncated or damaged", folder)
    assert not hub.asked


@pytest.mark.parametrize("name", ["samples/secret.png", "report.html", "samples"])
def test_links_are_not_followed(hub, folder, tmp_path, name):
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "secret.png").write_text("secret")
    if name == "samples":
        (folder / "samples" / "pairs.png").unlink()
        (folder / "samples").rmdir()
    (folder / name).symlink_to(tmp_path / "outside" / ("" if name == "samples" else "secret.png"))
    refused(hub, "link", folder)
    assert not hub.asked


@pytest.mark.parametrize("link", ["exports", "exports/kohya", "exports/kohya/x.safetensors"])
def test_links_to_exports_are_not_followed(hub, folder, tmp_path, link):
    (outside := tmp_path / "outside" / "kohya").mkdir(parents=True)
    (outside / "x.safetensors").write_text("secret")
    (folder / link).parent.mkdir(parents=True, exist_ok=True)
    (folder / link).symlink_to(
        {"exports": outside.parent, "kohya": outside}.get(
            Path(link).name, outside / "x.safetensors"
        )
    )
    refused(hub, "link", folder)
    assert not hub.asked


def test_a_program_that_does_not_exist(hub, folder):
    before = contents(folder)
    refused(hub, "expected one of the programs comfyui", folder, export=["midjourney"])
    assert contents(folder) == before
    assert not hub.asked


def test_no_token(hub, folder, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    refused(hub, "needs a Hub token with write access: run `hf auth login`", folder)


def test_a_token_that_nobody_knows(hub, folder):
    refused(hub, "does not accept the token.*; nothing on the Hub was changed", folder, token="x")


def test_a_token_that_may_not_write(hub, folder):
    refused(hub, "may not write there.*; nothing on the Hub", folder, token=hub.READER)
    refused(hub, "may not write there.*; nothing on the Hub", folder, "others/fair")
    foreign(hub)
    refused(hub, "may not write there.*; nothing on the Hub", folder, token=hub.READER)


def test_a_repository_that_cannot_be_read(hub, folder):
    foreign(hub, private=True)
    refused(hub, "the repository exists but the token may not read it", folder, token=hub.READER)


def test_a_repository_with_something_else(hub, folder):
    foreign(hub, model_bin=b"weights", README_md=b"# A model")
    refused(hub, "'org/fair' holds something other than an adapter .'model.bin'", folder)
    foreign(hub, README_md=b"# Begun on the website", LICENSE=b"")
    push_adapter(folder, "org/fair")


def test_private_into_a_public_repository(hub, folder):
    foreign(hub)
    refused(hub, "already exists and is public", folder, private=True)


def test_pull_requests_that_cannot_be(hub, folder):
    refused(hub, "no repository 'org/fair' to open a pull request in", folder, create_pr=True)
    message = "a pull request goes to main: leave out the revision 'v1'"
    refused(hub, message, folder, create_pr=True, revision="v1")
    foreign(hub)
    refused(hub, "'org/fair' has no 'refs/pr/7'", folder, revision="refs/pr/7")


def test_a_card_whose_metadata_the_hub_refuses(hub, folder):
    (folder / "README.md").write_text("---\n- a list\n---\n")
    refused(hub, "Invalid metadata in README.md. - it is no mapping; nothing on the Hub", folder)


def test_somebody_else_commits_meanwhile(hub, folder):
    push_adapter(folder, "org/fair")
    (folder / "report.json").write_text('{"images": 3}')
    repo = hub.repos["org/fair"]
    hub.fail("preupload", lambda: repo.commit("main", {"theirs": File(b"")}, "Theirs"))
    with pytest.raises(ValueError, match="somebody else has changed it in the meantime"):
        push_adapter(folder, "org/fair")
    assert hub.files("org/fair") == {"theirs": b""}


def test_somebody_else_makes_the_repository_meanwhile(hub, folder):
    """It is not taken for one's own and deleted."""
    hub.fail("create", lambda: foreign(hub))
    with pytest.raises(ValueError, match="the repository exists but the token may not read it"):
        push_adapter(folder, "org/fair")
    assert hub.repos["org/fair"].messages.popitem()[1] == "theirs"


def test_too_many_requests(hub, folder, waits):
    hub.fail("preupload", 429, times=99)
    refused(hub, "too many requests: push again in a few minutes; nothing on the Hub", folder)
    assert waits == [1, 2, 4, 8, 8]


def test_offline(hub, folder, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    refused(hub, "HF_HUB_OFFLINE is set; nothing on the Hub was changed", folder)


def test_no_network(hub, folder, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    refused(
        hub, "connection to the Hub failed .*ConnectError.*; nothing on the Hub was changed", folder
    )


# ---- faults at every call ------------------------------------------------------------------------

SCENES = {  # what is there before, how it is pushed, the branch that then holds it
    "new repository": (False, {}, "main"),
    "an adapter's repository": (True, {}, "main"),
    "new branch": (True, {"revision": "v1"}, "v1"),
    "pull request": (True, {"create_pr": True}, "refs/pr/1"),
}
FAULTS = [
    *((status, 1) for status in (401, 403, 404, 409, 429, 500)),
    *((kind, 1) for kind in KINDS),
    *((kind, 99) for kind in (429, 503, "reset", "lost", "garbage")),
]


@pytest.fixture
def begin(hub, folder, scene):
    """Put there what was there before, and nothing else; how to push, and where it goes."""
    there, options, branch = SCENES[scene]
    if there:
        (folder / "report.json").write_text('{"images": "before"}')
        push_adapter(folder, "org/fair")
        (folder / "report.json").write_text("{}")
    repos, large = hub.repos, hub.large

    def begin() -> tuple[dict, str]:
        hub.repos, hub.large = deepcopy(repos), dict(large)
        hub.faults.clear()
        hub.asked.clear()
        return options, branch

    return begin


def outcome(hub, folder, options, branch) -> str:
    """Push; `done` if all of it is there, `unchanged` or `unknown` if that is what it says."""
    before, problem = hub.state(), ""
    try:
        push_adapter(folder, "org/fair", **options)
    except ValueError as error:
        problem = str(error)
    assert "\n" not in problem
    if problem.endswith("; nothing on the Hub was changed"):
        assert hub.state() == before
        return "unchanged"
    if problem:
        assert problem.endswith("was created is not known: check the Hub, or push again")
        return "unknown"
    assert hub.files("org/fair", branch) == contents(folder)
    return "done"


def calls(hub, folder, begin) -> list[tuple[str, int]]:
    """Every call of a push that nothing disturbs: its route, and how many of it came before."""
    assert outcome(hub, folder, *begin()) == "done"
    asked = hub.routes()
    return [(route, asked[:i].count(route)) for i, route in enumerate(asked)]


@pytest.mark.slow
@pytest.mark.parametrize("scene", SCENES)
@pytest.mark.parametrize(("kind", "times"), FAULTS)
def test_a_fault_at_every_call(hub, folder, begin, kind, times):
    """The push is complete, or the Hub is as it was; and the push says which."""
    for route, skip in calls(hub, folder, begin):
        options, branch = begin()
        hub.fail(route, kind, times=times, skip=skip)
        found = outcome(hub, folder, options, branch)
        if times == 1:  # one fault is not enough to lose sight
            assert found in ("done", "unchanged"), route
        if kind == "slow" or (kind == "lost" and route == "commit"):
            assert found == "done"
        if route in RETRIED and times == 1 and kind in (429, 500, "reset", "lost"):
            assert found == "done"
        if route in RETRIED and times == 99 and kind in (429, 503, "reset"):
            assert found == "unchanged"


RETRIED = {"preupload", "batch", "upload", "verify"}  # by the client


@pytest.mark.parametrize("scene", SCENES)
def test_the_network_goes_away_at_every_call(hub, folder, begin):
    found = []
    for i in range(len(calls(hub, folder, begin))):
        options, branch = begin()
        hub.fail("any", "reset", times=999, skip=i)
        found.append(outcome(hub, folder, options, branch))
    assert found[0] == "unchanged"
    assert found[-1] == "unknown"


@pytest.mark.parametrize("is_committed", [False, True])
def test_ctrl_c_says_what_became_of_the_push(is_committed, hub, folder, monkeypatch):
    commit = HfApi.create_commit

    def interrupt(*args, **options):
        if is_committed:
            commit(*args, **options)
        raise KeyboardInterrupt

    monkeypatch.setattr(HfApi, "create_commit", interrupt)
    outcome = (
        "stopped: 'org/fair' was pushed all the same: http.*/commit/"
        if is_committed
        else "stopped: 'org/fair' was not pushed: nothing on the Hub was changed"
    )
    with pytest.raises(KeyboardInterrupt, match=outcome):
        push_adapter(folder, "org/fair")
    assert bool(hub.repos) == is_committed
    assert "create" in hub.routes()


# ---- and back ------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "times"), [*FAULTS, ("cut", 99)])
def test_a_fault_at_every_call_of_a_download(hub, folder, tmp_path, monkeypatch, kind, times):
    """The adapter is read as it was pushed, or one sentence says why not."""
    push_adapter(folder, "org/fair")
    hub.asked.clear()
    local_folder("org/fair")
    plain = hub.routes()
    for i, route in enumerate(plain):
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / f"cache{i}"))
        hub.fail(route, kind, times=times, skip=plain[:i].count(route))
        problem = ""
        try:
            got = local_folder("org/fair")
        except ValueError as error:
            problem = str(error)
        assert not problem or "no adapter folder at 'org/fair', and" in problem
        if kind == "slow" or not problem:
            assert read_adapter(got)[0] == read_adapter(folder)[0]
            name = "pytorch_lora_weights.safetensors"
            assert (got / name).read_bytes() == (folder / name).read_bytes()
        hub.faults.clear()
    assert not hub.strangers


def test_a_download_cut_short_goes_on_where_it_was(hub, folder):
    push_adapter(folder, "org/fair")
    hub.fail("download", "cut")
    name = "pytorch_lora_weights.safetensors"
    assert (local_folder("org/fair") / name).read_bytes() == (folder / name).read_bytes()
    assert hub.routes().count("download") == 2


def test_a_private_repository_is_read_with_a_token(hub, folder, monkeypatch):
    push_adapter(folder, "org/fair", private=True)
    (folder / "report.json").write_text('{"images": 3}')
    push_adapter(folder, "org/fair", revision="v1")
    monkeypatch.delenv("HF_TOKEN")
    for token in (None, False, hub.READER):
        with pytest.raises(ValueError, match=r"no repository on the Hub that you may read .*token"):
            local_folder("org/fair", token=token)
    with pytest.raises(ValueError, match="'org/fair', and the Hub answered with an error"):
        local_folder("org/fair", token="unknown")
    here = [local_folder("org/fair", revision, hub.TOKEN) for revision in ("v1", None)]
    assert [path.name for path in here] == [hub.repos["org/fair"].refs[r] for r in ("v1", "main")]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.asked.clear()
    assert local_folder("org/fair") == here[1]
    assert not hub.asked
    assert not hub.strangers


# ---- the command ---------------------------------------------------------------------------------


def command(monkeypatch, *words) -> int:
    """Type the words; the exit code."""
    monkeypatch.setattr("sys.argv", ["diffusers-fair", *map(str, words)])
    try:
        cli.main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def test_the_command(hub, folder, monkeypatch, capsys):
    assert command(monkeypatch, "push", folder, "org/fair", "--dry-run") == 0
    said = capsys.readouterr().out
    size = (folder / "pytorch_lora_weights.safetensors").stat().st_size
    assert f"{size:,} bytes  pytorch_lora_weights.safetensors" in said
    assert "dry run: nothing was pushed to org/" in said
    assert not hub.asked

    words = ["push", folder, "org/fair", "--private", "--message", "Mine", "--token", hub.TOKEN]
    monkeypatch.delenv("HF_TOKEN")
    assert command(monkeypatch, *words) == 0
    repo = hub.repos["org/fair"]
    said = capsys.readouterr()
    assert f"{hub.url}/org/fair/commit/{repo.refs['main']}" in said.out
    assert repo.private
    assert "Mine" in repo.messages.values()
    assert command(monkeypatch, *words) == 0
    assert "nothing to push: org/fair is up to date" in capsys.readouterr().out

    (folder / "samples" / "pairs.png").rename(folder / "samples" / "others.png")
    assert command(monkeypatch, *words, "--pull-request") == 0
    shown = capsys.readouterr().out
    assert "removed        samples/pairs.png" in shown
    assert f"{hub.url}/org/fair/discussions/1" in shown
    assert command(monkeypatch, *words, "--revision", "v2") == 0
    assert hub.files("org/fair", "v2") == contents(folder)
    assert hub.TOKEN not in said.out + said.err + shown


def test_the_command_says_why_not(hub, folder, monkeypatch, capsys):
    hub.fail("commit", 503)
    assert command(monkeypatch, "push", folder, "org/fair") == 2
    said = capsys.readouterr().err
    assert said.startswith(
        "diffusers-fair: 'org/fair' was not pushed: the Hub has an internal error"
    )
    assert said.endswith("; nothing on the Hub was changed\n")
    assert not hub.repos


# ---- from training to another machine ------------------------------------------------------------

TINY = {
    "adapter.rank": 2,
    "prompts.images_per_prompt": 4,
    "sampling.steps": 2,
    "gradient.replay_steps": 1,
    "train.iterations": 1,
    "train.prompts_per_iteration": 1,
    "train.validation_images": 1,
    "tracker": "none",
}
PROMPT = "a photo of the face of a senator, a person"
THERE = f"""
import sys, numpy, torch, diffusers_fair
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("org/testbed")
pipe.load_fair_adapter("org/fair")
noise = torch.Generator().manual_seed(0)
images = pipe("{PROMPT}", num_inference_steps=2, generator=noise, output_type="np").images
numpy.save(sys.argv[1], images)
"""


def python(hub, home: Path, *words: object) -> str:
    """Another machine: its own process, its own empty cache; the Hub's client as it comes."""
    given = {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_TOKEN": hub.TOKEN}
    given |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_OFFLINE": "0"}
    words = (sys.executable, *map(str, words))
    done = subprocess.run(words, capture_output=True, text=True, env=os.environ | given)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_from_training_to_the_readmes_three_lines_on_another_machine(hub, tmp_path):
    recipe = RunConfig.load("testbed-gender", TINY | {"output": str(tmp_path / "run")})
    finetuner = FairnessFinetuner(recipe)
    folder = finetuner.train(progress=False) / "adapter"

    assert hub.TOKEN not in python(hub, tmp_path / "a", "-m", OWN, "push", folder, "org/fair")
    assert hub.files("org/fair") == contents(folder)

    testbed.pipeline().save_pretrained(tmp_path / "base")
    api = HfApi(token=hub.TOKEN)
    api.create_repo("org/testbed")
    api.upload_folder(repo_id="org/testbed", folder_path=tmp_path / "base")
    python(hub, tmp_path / "b", "-c", THERE, tmp_path / "there.npy")

    here = testbed.pipeline()
    here.load_fair_adapter(folder)
    noise = torch.Generator().manual_seed(0)
    images = here(PROMPT, num_inference_steps=2, generator=noise, output_type="np").images
    assert (images == np.load(tmp_path / "there.npy")).all()
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not any(hub.TOKEN.encode() in path.read_bytes() for path in files)

    done = finetuner.push_to_hub("org/again", private=True, token=hub.TOKEN)
    assert done.url is not None
    assert hub.repos["org/again"].private
    assert "library_name: diffusers" in hub.files("org/again")["README.md"].decode()
    read_adapter(local_folder("org/again"))
