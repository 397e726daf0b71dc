"""The commands that describe and publish adapters."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from diffusers_fair import strict_json
from diffusers_fair.cli.app import app, console, say
from diffusers_fair.cli.options import AdapterRevision, read_folder

if TYPE_CHECKING:
    from diffusers_fair.publishing.hub import Push


@app.command()
def push(
    folder: Annotated[
        Path, typer.Argument(parser=read_folder, metavar="DIR", help="Adapter folder.")
    ],
    repo_id: Annotated[str, typer.Argument(help="`user-or-organisation/name`.")],
    private: Annotated[
        bool, typer.Option("--private", help="If the repository is new, make it private.")
    ] = False,
    revision: Annotated[
        str | None, typer.Option(help="Branch to commit to, or refs/pr/N to add to a pull request.")
    ] = None,
    pull_request: Annotated[
        bool, typer.Option("--pull-request", help="Open a pull request instead of committing.")
    ] = False,
    message: Annotated[str | None, typer.Option(help="Commit message.")] = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="List what would be uploaded; do not contact the Hub."),
    ] = False,
    export_to: Annotated[
        list[str] | None,
        typer.Option(
            "--export",
            metavar="PROGRAM",
            help="Also publish the adapter for this program: comfyui, a1111, kohya or invokeai. "
            "May be repeated.",
        ),
    ] = None,
    token: Annotated[
        str | None,
        typer.Option(help="Access token. Default: HF_TOKEN, or the token of `hf auth login`."),
    ] = None,
) -> None:
    """Publish an adapter folder on the Hub, with its card, samples and report, in one commit."""
    from diffusers_fair.publishing.hub import push_adapter

    done = push_adapter(
        folder,
        repo_id,
        private=private,
        revision=revision,
        create_pr=pull_request,
        message=message,
        token=token,
        dry_run=dry_run,
        export=export_to or (),
    )
    _show_push(done)
    if dry_run:
        say(f"dry run: nothing was pushed to {repo_id}")
    else:
        _show_url(done)


def _show_push(push: "Push") -> None:
    """Print the files of a push and its URL."""
    for name, size in push.files.items():
        say(f"{size:>12,} bytes  {name}")
    for name in push.removed:
        say(f"     removed        {name}")


def _show_url(push: "Push") -> None:
    say(push.url or f"nothing to push: {push.repo_id} is up to date")


@app.command()
def export(
    adapter: Annotated[
        str, typer.Argument(metavar="DIR_OR_REPO", help="Adapter folder or Hub id.")
    ],
    to: Annotated[str, typer.Option(metavar="PROGRAM", help="comfyui, a1111, kohya or invokeai.")],
    out: Annotated[
        Path,
        typer.Option(
            parser=read_folder,
            metavar="FILE_OR_DIRECTORY",
            help="Folder to write to, or a new .safetensors file.",
        ),
    ] = Path(),
    revision: AdapterRevision = None,
) -> None:
    """Write an adapter as files that another program reads, such as ComfyUI."""
    from diffusers_fair.backends.registry import check_revision
    from diffusers_fair.publishing.export import export_adapter

    check_revision(adapter, revision)
    for file, usage in export_adapter(adapter, to, out, revision=revision).items():
        say(f"{file}: {usage}")


@app.command()
def inspect(
    adapter: Annotated[
        str, typer.Argument(metavar="DIR_OR_REPO", help="Adapter folder or Hub id.")
    ],
    revision: AdapterRevision = None,
) -> None:
    """Print an adapter's metadata and number of parameters, without loading a model."""
    from dataclasses import asdict

    from diffusers_fair.adapters.folder import read_adapter
    from diffusers_fair.adapters.repository import local_folder
    from diffusers_fair.backends.registry import check_revision

    check_revision(adapter, revision)
    info, weights = read_adapter(local_folder(adapter, revision))
    facts: dict[str, Any] = asdict(info)
    facts["parameters"] = sum(weight.numel() for weight in weights.values())
    console.print_json(strict_json.dumps(facts))


@app.command()
def card(
    adapter: Annotated[
        Path, typer.Argument(parser=read_folder, metavar="DIR", help="Adapter folder.")
    ],
    report: Annotated[
        Path | None,
        typer.Option(
            parser=read_folder,
            metavar="DIRECTORY",
            help="Report folder. Default: the summary stored with the adapter.",
        ),
    ] = None,
) -> None:
    """Write the model card of an adapter, README.md in its folder, from its evaluation report."""
    from diffusers_fair.publishing.card import write_card

    say(f"card in {write_card(adapter, report)}")


@app.command()
def space(
    adapter: Annotated[
        str, typer.Argument(metavar="DIR_OR_REPO", help="Adapter folder or Hub id.")
    ],
    out: Annotated[
        Path,
        typer.Argument(parser=read_folder, metavar="OUT", help="Folder to write the Space to."),
    ],
    other: Annotated[
        str | None,
        typer.Option(help="Adapter folder or Hub id to show beside it; for the same base model."),
    ] = None,
    push: Annotated[
        str | None,
        typer.Option(
            metavar="REPO", help="Push the Space to the Hub: `user-or-organisation/name`."
        ),
    ] = None,
    private: Annotated[
        bool, typer.Option("--private", help="If the Space is new on the Hub, make it private.")
    ] = False,
    token: Annotated[
        str | None,
        typer.Option(help="Access token. Default: HF_TOKEN, or the token of `hf auth login`."),
    ] = None,
) -> None:
    """Write a Gradio Space: images from the same noise without and with the adapter, and its table.

    The Space needs gradio, which its requirements.txt lists; run it with `python app.py`.
    """
    from diffusers_fair.publishing.hub import check_push, push_space
    from diffusers_fair.publishing.space import check_base_on_hub, write_space

    if private and push is None:
        raise ValueError("--private is for a Space on the Hub: add --push REPO")
    if push is not None:
        check_push(push, token)
        check_base_on_hub(adapter)
    files = write_space(adapter, out, other=other)
    say(f"Space in {out}: pip install -r requirements.txt, then python app.py, in this folder")
    if push is not None:
        done = push_space(files, push, private=private, token=token)
        _show_push(done)
        _show_url(done)
