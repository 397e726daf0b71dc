"""Runs the command line in this process."""

from diffusers_fair import cli


def run(monkeypatch, *words) -> int:
    """Type the words; return the exit code."""
    monkeypatch.setattr("sys.argv", ["diffusers-fair", *map(str, words)])
    try:
        cli.main()
    except SystemExit as stop:
        return stop.code or 0
    return 0
