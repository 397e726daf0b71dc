"""The command that describes the environment."""

from typing import Annotated

import typer

from diffusers_fair.cli.app import app, say


@app.command()
def env(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a list.")] = False,
) -> None:
    """Print the versions and devices that a bug report needs; loads no model."""
    from diffusers_fair.environment import environment_text

    say(environment_text(as_json))
