"""Files and folders that are whole on the disk or not there, errors that name what was written, and locks."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from mixture_of_tokens.utils.formatting import first_line
from mixture_of_tokens.utils.progress import LOGGER
from mixture_of_tokens.utils.wording import nearest

OF_THE_DISK = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EIO)


@contextmanager
def opened(path: Path) -> Iterator[int]:
    """A file or folder as the system has it open for reading."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def flush(path: Path) -> None:
    """To the disk."""
    with opened(path) as descriptor:
        os.fsync(descriptor)


def write_text(file: Path, text: str) -> None:
    """Write a file in one step: a crash leaves the old text or the new one, never a part.

    What a link leads to is written, and the link stays. Raises OSError, naming the file, where it cannot be written.
    """
    file = file.resolve() if file.is_symlink() else file
    beside = file.with_name(f"{file.name}.{os.getpid()}.partial")  # another process may write the same file
    try:
        beside.write_text(text, encoding="utf-8")
        flush(beside)
        beside.replace(file)
    except OSError as error:
        raise OSError(f"{file} could not be written: {error.strerror or error}") from error
    finally:
        with suppress(OSError):
            beside.unlink(missing_ok=True)


def publish(beside: Path, final: Path) -> None:
    """Rename a directory, or a file, to its final name once all of it is on the disk.

    Until then an earlier directory of that name stays complete, for a moment as NAME.replaced.
    """
    umask = os.umask(0)
    os.umask(umask)
    with disk_errors(final):
        for path in (*sorted(beside.rglob("*")), beside):
            if path.is_file():
                path.chmod(0o666 & ~umask)  # safetensors makes files for their owner alone
            flush(path)
    before = replaced(final)
    if replaces := final.is_dir():  # a file is replaced as it is renamed
        shutil.rmtree(before, ignore_errors=True)
        final.rename(before)
    try:
        beside.rename(final)
    except BaseException:
        if replaces and not final.exists():
            before.rename(final)
        raise
    flush(final.parent)
    if replaces:
        shutil.rmtree(before, ignore_errors=True)


@contextmanager
def published(beside: Path, final: Path) -> Iterator[None]:
    """`publish` what the block has written to `beside`; nothing is left there where it fails, or was killed before."""
    shutil.rmtree(beside, ignore_errors=True)
    try:
        yield
        publish(beside, final)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def replaced(final: Path) -> Path:
    """Where `publish` keeps what it replaces."""
    return final.with_name(f"{final.name}.replaced")


def naming(error: OSError, path: Path) -> OSError:
    """The error itself if it names a file, as errors of opening do, or else one like it that names `path`."""
    if error.filename is not None:
        return error
    if error.errno is None:
        return OSError(f"{path}: {first_line(error)}")
    return OSError(error.errno, error.strerror, str(path))


@contextmanager
def held(path: Path, waiting: str, *, patience: float = -1) -> Iterator[None]:
    """Hold a lock, which dies with its process, until the end of the block.

    Args:
        waiting: said on standard error where another process holds it.
        patience: seconds to wait for that one, by default without end. Raises Timeout after them.
    """
    lock = FileLock(path)
    with suppress(Timeout):
        lock.acquire(timeout=0)
    if not lock.is_locked:
        LOGGER.warning(waiting)
        lock.acquire(timeout=patience)
    try:
        yield
    finally:
        # Before the release, or it could be another's. Who waits on a removed file is made to begin again by filelock.
        with suppress(OSError):  # where an open file cannot be removed, filelock does it at the release
            path.unlink()
        lock.release()


@contextmanager
def disk_errors(final: Path) -> Iterator[None]:
    """Name what was written where a disk is full or fails: such an error of the system names no file."""
    try:
        yield
    except OSError as error:
        if error.errno not in OF_THE_DISK:
            raise
        raise OSError(f"{final} could not be written: {error.strerror}") from error


@contextmanager
def plain_errors(final: Path) -> Iterator[None]:
    """Raise as OSError what torch.save, safetensors and tokenizers raise on a full disk; `disk_errors` included.

    numpy's error of an incomplete write is an OSError without a number, and gets the name.
    """
    try:
        with disk_errors(final):
            yield
    except Exception as error:  # tokenizers raises Exception itself
        if isinstance(error, OSError) and error.errno is None and not str(error).startswith(str(final)):
            raise OSError(f"{final} could not be written: {error}") from error
        if not isinstance(error, RuntimeError | SafetensorError) and type(error) is not Exception:
            raise
        why = str(error)
        if "enforce fail" in why or "PytorchStreamWriter" in why:  # torch.save names a line of its own source
            said = error.__cause__ or error.__context__
            why = said.strerror if isinstance(said, OSError) and said.strerror else os.strerror(errno.ENOSPC)
        raise OSError(f"{final} could not be written: {why}") from error


def no_directory(path: str | Path) -> str:
    """'there is no such directory', with the nearest name of those beside it."""
    path = Path(path)
    try:
        beside = [str(path.parent / each.name) for each in path.parent.iterdir() if each.is_dir()]
    except OSError:
        beside = []
    return f"there is no such directory{nearest(str(path), beside)}"
