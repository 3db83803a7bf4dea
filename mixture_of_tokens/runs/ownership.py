"""One writer at a time: a lock that dies with its process."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

LOCK = ".lock"
PATIENCE = 10.0  # seconds that loader workers of a killed process may still hold its lock


@contextmanager
def owned(directory: Path, *, patience: float = PATIENCE) -> Iterator[None]:
    """Be the only process that writes to a directory, which is made if need be, until the end of the block.

    Nothing is left of a new directory to which nothing was written.

    Raises ValueError while another process owns it.
    """
    missing = [path for path in (directory, *directory.parents) if not path.exists()]
    directory.mkdir(parents=True, exist_ok=True)
    with _exclusive(directory / LOCK, str(directory), patience):
        try:
            yield
        finally:
            if missing and {path.name for path in directory.iterdir()} <= {LOCK}:
                (directory / LOCK).unlink(missing_ok=True)
                with suppress(OSError):  # something else stands in a parent by now
                    for path in missing:
                        path.rmdir()


@contextmanager
def owned_file(file: Path, *, patience: float = PATIENCE) -> Iterator[None]:
    """The same for a file, which need not be there."""
    lock = file.with_name(f".{file.name}{LOCK}")
    with _exclusive(lock, str(file), patience):
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


@contextmanager
def _exclusive(lock: Path, what: str, patience: float) -> Iterator[None]:
    held = FileLock(lock)
    try:
        held.acquire(timeout=patience)
    except Timeout:
        raise ValueError(f"{what} is being written by another process: wait for it, or name another --out") from None
    try:
        yield
    finally:
        held.release()
