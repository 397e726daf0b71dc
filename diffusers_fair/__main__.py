"""`python -m diffusers_fair` and the command `diffusers-fair`."""

import signal
import sys


def main() -> None:
    """Run the command line, or say what to install."""
    try:
        from diffusers_fair.cli import main as run
    except ModuleNotFoundError as error:
        sys.stderr.write(
            f"diffusers-fair: the command needs '{error.name}', which comes with: "
            "pip install 'diffusers-fair[train]'\n"
        )
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    try:
        run()
    finally:  # another Ctrl-C has nothing left to stop, but would print a traceback
        signal.signal(signal.SIGINT, lambda number, frame: None)


if __name__ == "__main__":
    main()
