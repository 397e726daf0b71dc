"""The commands that describe and publish adapters."""

from pathlib import Path
from typing import Annotated, Any

import typer

from diffusers_fair import strict_json
from diffusers_fair.cli.app import app, console, say
from diffusers_fair.cli.options import AdapterRevision, read_folder


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
    for name, size in done.files.items():
        say(f"{size:>12,} bytes  {name}")
    for name in done.removed:
        say(f"     removed        {name}")
    if dry_run:
        say(f"dry run: nothing was pushed to {repo_id}")
    else:
        say(done.url or f"nothing to push: {repo_id} is up to date")


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
