"""Recipes: their keys (`schema`), how they are read (`recipe`), and error messages (`errors`)."""

try:
    import pydantic  # noqa: F401
    import yaml  # noqa: F401
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"recipes need '{error.name}', which comes with: pip install 'diffusers-fair[train]'",
        name=error.name,
    ) from error
