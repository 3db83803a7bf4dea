"""One writer at a time: a lock that dies with its process."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from filelock import Timeout

from mixture_of_tokens.utils.files import held
from mixture_of_tokens.utils.process import is_main

LOCK = ".lock"
PATIENCE = 10.0  # seconds that loader workers of a killed process may still hold its lock


@contextmanager
def owned(directory: Path, *, patience: float = PATIENCE) -> Iterator[None]:
    """Be the only run that writes to a directory, which is made if need be, until the end of the block.

    Nothing is left of a new directory to which nothing was written. Of the processes of torchrun the first one owns it.

    Raises ValueError while another process owns it, and where there can be no such directory.
    """
    if not is_main():
        yield
        return
    missing = [path for path in (directory, *directory.parents) if not path.exists()]
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{directory} cannot be made a directory: {error.strerror}; name another with --out") from None
    try:
        with _exclusive(directory / LOCK, str(directory), patience):
            for left in directory.glob("*.[jy]*.*.partial"):  # of records, which a killed owner was writing
                left.unlink()
            yield
    finally:
        with suppress(OSError):  # something stands there by now
            for path in missing:
                path.rmdir()


@contextmanager
def owned_file(file: Path, *, patience: float = PATIENCE) -> Iterator[None]:
    """The same for a file, which need not be there."""
    with _exclusive(file.with_name(f".{file.name}{LOCK}"), str(file), patience):
        yield


@contextmanager
def _exclusive(lock: Path, what: str, patience: float) -> Iterator[None]:
    waiting = f"mot: another process writes to {what}: waiting for {patience:.0f} s at most"
    with ExitStack() as stack:
        try:
            stack.enter_context(held(lock, waiting, patience=patience))
        except Timeout:
            said = f"{what} is being written by another process: wait for it, or name another --out"
            raise ValueError(said) from None
        except OSError as error:
            raise ValueError(f"{what} cannot be written: {error.strerror}; name another --out") from None
        yield
