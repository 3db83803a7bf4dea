"""Checkpoints that are complete or absent: written under another name, hashed, flushed to the disk, renamed."""

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


def digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(file: Path, text: str) -> None:
    """Write a file in one step: a crash leaves the old text or the new one, never a part."""
    beside = file.with_name(f"{file.name}.partial")
    beside.write_text(text)
    _flush(beside)
    beside.replace(file)


@contextmanager
def plain_errors(final: Path) -> Iterator[None]:
    """Raise as OSError what torch.save, safetensors and tokenizers raise on a full disk."""
    try:
        yield
    except Exception as error:  # tokenizers raises Exception itself
        if not isinstance(error, RuntimeError | SafetensorError) and type(error) is not Exception:
            raise
        raise OSError(f"{final} could not be written: {error}") from error


def publish(beside: Path, final: Path) -> None:
    """Rename a directory to its final name once all of it is on the disk.

    Until then an earlier directory of that name stays complete, for a moment as NAME.replaced.
    """
    umask = os.umask(0)
    os.umask(umask)
    for path in sorted(beside.rglob("*")):
        if path.is_file():
            path.chmod(0o666 & ~umask)  # safetensors makes files for their owner alone
        _flush(path)
    _flush(beside)
    before = final.with_name(f"{final.name}.replaced")
    if final.exists():
        shutil.rmtree(before, ignore_errors=True)
        final.rename(before)
    try:
        beside.rename(final)
    except BaseException:
        if before.exists() and not final.exists():
            before.rename(final)
        raise
    _flush(final.parent)
    shutil.rmtree(before, ignore_errors=True)


def describe(checkpoint: Path, **facts: Any) -> None:
    """Write the manifest: the hash of every file, and `facts`."""
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file())
    hashes = {path.relative_to(checkpoint).as_posix(): digest(path) for path in files}
    (checkpoint / MANIFEST).write_text(json.dumps({"files": hashes} | facts, indent=2))


def _hashes(directory: Path) -> dict[str, str] | None:
    """The hashes in the manifest; None where `describe` did not write it."""
    try:
        manifest = json.loads((directory / MANIFEST).read_text())
    except (OSError, ValueError):
        return None
    hashes = manifest.get("files") if isinstance(manifest, dict) else None
    return hashes if isinstance(hashes, dict) and all(isinstance(each, str) for each in hashes.values()) else None


def is_described(directory: Path, of: str) -> bool:
    """Whether a directory's manifest has this value for the fact `of`."""
    return _hashes(directory) is not None and facts_of(directory).get("of") == of


def damage(directory: Path) -> str | None:
    """How a directory differs from its manifest; None where it does not, or has no manifest of ours."""
    return None if _hashes(directory) is None else fault(directory)


def fault(checkpoint: Path) -> str | None:
    """Why a checkpoint cannot be resumed from; None for a valid one."""
    if not (checkpoint / MANIFEST).is_file():
        return f"it has no {MANIFEST}"
    if (hashes := _hashes(checkpoint)) is None:
        return f"its {MANIFEST} cannot be read"
    for name, expected in hashes.items():
        if not (checkpoint / name).is_file():
            return f"{name} is missing"
        if digest(checkpoint / name) != expected:
            return f"{name} is not what was written"
    return None


def _all(run: Path) -> Iterator[Path]:
    """Newest first."""
    found = ((re.fullmatch(r"checkpoint-(\d+)", path.name), path) for path in run.iterdir())
    numbered = [(int(match[1]), path) for match, path in found if match]
    yield from (path for _, path in sorted(numbered, reverse=True))


def newest(run: Path) -> Path | None:
    """The newest valid checkpoint of a run; reports on standard error which ones it skips, and why."""
    for checkpoint in _all(run):
        problem = fault(checkpoint)
        if problem is None:
            return checkpoint
        print(f"{checkpoint} is skipped: {problem}", file=sys.stderr)
    return None


def facts_of(checkpoint: Path) -> dict[str, Any]:
    return json.loads((checkpoint / MANIFEST).read_text())


def keep_newest(run: Path, step: int, count: int | None) -> None:
    """Remove all but the newest `count` checkpoints; None keeps all.

    Checkpoints above `step`, where the run is now, are damaged ones that it was not resumed from: they go too.
    """
    if count is not None:
        damaged = [checkpoint for checkpoint in _all(run) if int(checkpoint.name.partition("-")[2]) > step]
        kept = [checkpoint for checkpoint in _all(run) if checkpoint not in damaged]
        for checkpoint in damaged + kept[max(1, count) :]:
            shutil.rmtree(checkpoint)
