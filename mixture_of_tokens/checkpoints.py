"""Checkpoints that are whole or not there: written beside, described by a manifest, flushed to the disk, renamed."""

import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

MANIFEST = "manifest.json"


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(file: Path, text: str) -> None:
    """All of the text under its name, or what was there before."""
    beside = file.with_name(f"{file.name}.partial")
    beside.write_text(text)
    _flush(beside)
    beside.replace(file)


@contextmanager
def plain_errors(final: Path) -> Iterator[None]:
    """What torch.save and safetensors raise on a full disk, as the OSError that it is."""
    try:
        yield
    except (RuntimeError, SafetensorError) as error:
        raise OSError(f"{final} could not be written: {error}") from error


def publish(beside: Path, final: Path) -> None:
    """Give a directory that was written beside its final name, when all of it is on the disk."""
    umask = os.umask(0)
    os.umask(umask)
    for path in sorted(beside.rglob("*")):
        if path.is_file():
            path.chmod(0o666 & ~umask)  # safetensors makes files for their owner alone
        _flush(path)
    _flush(beside)
    if final.exists():
        shutil.rmtree(final)
    beside.rename(final)
    _flush(final.parent)


def describe(checkpoint: Path, **facts: Any) -> None:
    """Write the manifest: the hash of every file, and `facts`."""
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file())
    hashes = {path.relative_to(checkpoint).as_posix(): _digest(path) for path in files}
    (checkpoint / MANIFEST).write_text(json.dumps({"files": hashes} | facts, indent=2))


def fault(checkpoint: Path) -> str | None:
    """Why a checkpoint cannot be resumed from; None for a whole one."""
    try:
        hashes = json.loads((checkpoint / MANIFEST).read_text())["files"]
    except FileNotFoundError:
        return f"it has no {MANIFEST}"
    except (ValueError, KeyError):
        return f"its {MANIFEST} cannot be read"
    for name, expected in hashes.items():
        if not (checkpoint / name).is_file():
            return f"{name} is missing"
        if _digest(checkpoint / name) != expected:
            return f"{name} is not what was written"
    return None


def _all(run: Path) -> Iterator[Path]:
    """Newest first."""
    found = ((re.fullmatch(r"checkpoint-(\d+)", path.name), path) for path in run.iterdir())
    numbered = [(int(match[1]), path) for match, path in found if match]
    yield from (path for _, path in sorted(numbered, reverse=True))


def newest(run: Path) -> Path | None:
    """The newest whole checkpoint of a run; says on standard error which ones it passes over, and why."""
    for checkpoint in _all(run):
        problem = fault(checkpoint)
        if problem is None:
            return checkpoint
        print(f"{checkpoint} is passed over: {problem}", file=sys.stderr)
    return None


def facts_of(checkpoint: Path) -> dict[str, Any]:
    return json.loads((checkpoint / MANIFEST).read_text())


def keep_newest(run: Path, count: int | None) -> None:
    """Remove all but the newest `count` checkpoints; None keeps all."""
    if count is not None:
        for checkpoint in list(_all(run))[max(1, count) :]:
            shutil.rmtree(checkpoint)
