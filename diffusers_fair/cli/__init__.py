"""The command `diffusers-fair`."""

from diffusers_fair.cli import training, evaluation, publishing  # noqa: I001 (order of the help)
from diffusers_fair.cli.app import app, main

__all__ = ["app", "evaluation", "main", "publishing", "training"]
