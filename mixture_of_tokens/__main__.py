"""The command `mot`, and `python -m mixture_of_tokens` for launchers such as torchrun."""

import os
import sys

from mixture_of_tokens.utils.cpu import keep_large_blocks, spin_briefly
from mixture_of_tokens.utils.process import leave_processes, missing_package


def main() -> None:
    """Run the command line. Without the packages of the extra `train`: one line on standard error, exit status 2.

    ^C while the command line itself is imported is answered as later on.
    """
    spin_briefly()  # before anything loads torch
    keep_large_blocks()  # here alone: to the program of a library's caller it would do so for good
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed, as by a daemon
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
    if not sys.stderr.isatty():  # a log file needs fewer lines of a progress bar than a screen
        os.environ.setdefault("TQDM_MININTERVAL", "30")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # without a network it would tell of every retry
    try:
        from mixture_of_tokens.commands import cli

        try:
            cli.main()
        finally:
            leave_processes()
    except KeyboardInterrupt:
        print("mot: stopped", file=sys.stderr)
        sys.exit(130)
    except ModuleNotFoundError as error:
        if (package := missing_package(error)) is None:
            raise
        ask = 'pip install "mixture-of-tokens[train]"'
        print(f"mot: error: {package} is not installed; the command line comes with {ask}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
