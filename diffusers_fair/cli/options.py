"""Options that several commands have."""

import re
from pathlib import Path
from typing import Annotated

import typer

from diffusers_fair.paths import expand

Recipe = Annotated[str, typer.Argument(help="A YAML file, or the name of a shipped recipe.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="key=value", help="Recipe values to override; `recipes --keys` lists them."
    ),
]
Base = Annotated[
    str,
    typer.Option(
        help="`testbed`, `testbed-flux`, a Hub id, a folder or a single .safetensors file."
    ),
]
Adapter = Annotated[str | None, typer.Option(help="Adapter folder or Hub id.")]
RespectWords = Annotated[
    bool,
    typer.Option(
        "--respect-words",
        help="Disable the adapter for prompts that name a class it balances.",
    ),
]
Device = Annotated[
    str,
    typer.Option(
        help="auto, cuda, cuda:N, mps or cpu. auto: the GPU of the process, else MPS, else the "
        "CPU; for the testbeds the CPU.",
    ),
]
Dtype = Annotated[
    str | None,
    typer.Option(
        help="Data type of the base model: auto, float32, bfloat16 or float16. auto: bfloat16 if "
        "the device is fast in it, else float32. Default: the recipe's; without a recipe float32 "
        "for the testbeds, and auto otherwise.",
    ),
]
Revision = Annotated[
    str | None,
    typer.Option(
        help="Commit, tag or branch of the base model on the Hub. Default: the recipe's, if it has "
        "the same base model."
    ),
]
AdapterRevision = Annotated[
    str | None, typer.Option(help="Commit, tag or branch of the adapter on the Hub.")
]
BatchSize = Annotated[
    int | None,
    typer.Option(
        min=1,
        metavar="INT",
        help="Images processed together. Default: 24 or, on a GPU, fewer if so many do not fit its "
        "memory.",
    ),
]


def read_folder(text: str) -> Path:
    """Read the path of a folder."""
    if not text:  # would be the current folder
        raise typer.BadParameter("expected a folder, got an empty text")
    return expand(text)


def number_or_folder(text: str) -> int | Path:
    """Read a number of images, or the path of a folder of images."""
    if re.fullmatch("[0-9]+", text) and int(text) > 0:
        return int(text)
    if text and (path := expand(text)).is_dir():
        return path
    raise typer.BadParameter(
        f"expected a number of images, 1 or more, or a folder of images, got '{text}'"
    )


Out = Annotated[
    Path, typer.Option(parser=read_folder, metavar="DIRECTORY", help="Folder to write to.")
]
