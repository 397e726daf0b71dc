"""The command `diffusers-fair`."""

from diffusers_fair.cli import training, evaluation, publishing, environment  # noqa: I001 (order of the help)
from diffusers_fair.cli.app import app, main

__all__ = ["app", "environment", "evaluation", "main", "publishing", "training"]
