"""`python -m diffusers_fair` and the command `diffusers-fair`."""

import signal
import sys


def main() -> None:
    """Run the command line, or say what to install."""
    try:
        from diffusers_fair.cli import main as run
    except ModuleNotFoundError as error:
        _run_without(error.name)
        return
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    try:
        run()
    finally:  # another Ctrl-C has nothing left to stop, but would print a traceback
        signal.signal(signal.SIGINT, lambda number, frame: None)


def _run_without(package: str | None) -> None:
    """Run `env`, for a bug report, without the packages of the command line."""
    if sys.argv[1:2] != ["env"]:
        sys.stderr.write(
            f"diffusers-fair: the command needs '{package}', which comes with: "
            "pip install 'diffusers-fair[train]'\n"
        )
        sys.exit(2)
    from diffusers_fair.environment import environment_text

    sys.stdout.write(environment_text("--json" in sys.argv[2:]) + "\n")


if __name__ == "__main__":
    main()
