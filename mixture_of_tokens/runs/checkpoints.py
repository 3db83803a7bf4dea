"""Checkpoints that are complete or absent: written under another name, hashed, flushed to the disk, renamed."""

import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mixture_of_tokens.disk import disk_errors, flush

MANIFEST = "manifest.json"
DIGEST = "digest"  # the field of a manifest that is a hash of its other fields


def digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def publish(beside: Path, final: Path) -> None:
    """Rename a directory to its final name once all of it is on the disk.

    Until then an earlier directory of that name stays complete, for a moment as NAME.replaced.
    """
    umask = os.umask(0)
    os.umask(umask)
    with disk_errors(final):
        for path in sorted(beside.rglob("*")):
            if path.is_file():
                path.chmod(0o666 & ~umask)  # safetensors makes files for their owner alone
            flush(path)
        flush(beside)
    before = _replaced(final)
    if replaces := final.exists():
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


def put_back(final: Path, of: str) -> None:
    """Rename back what `publish` was replacing when it was killed."""
    before = _replaced(final)
    if not final.exists() and is_described(before, of):
        before.rename(final)


def _replaced(final: Path) -> Path:
    return final.with_name(f"{final.name}.replaced")


def describe(checkpoint: Path, **facts: Any) -> None:
    """Write the manifest: the hash of every file, `facts`, and a digest of all this."""
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file())
    content = {"files": {path.relative_to(checkpoint).as_posix(): digest(path) for path in files}} | facts
    (checkpoint / MANIFEST).write_text(json.dumps(content | {DIGEST: _digest_of(content)}, indent=2))


def _digest_of(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _manifest(directory: Path) -> tuple[dict[str, Any] | None, str | None]:
    """The manifest of a directory, or what is wrong with it; neither where other software wrote it."""
    try:
        written = (directory / MANIFEST).read_bytes()
    except OSError:
        return None, None
    try:
        manifest = json.loads(written)
    except (ValueError, RecursionError):
        ours = b'"files"' in written or b'"digest"' in written
        return None, f"its {MANIFEST} cannot be read" if ours else None
    if not isinstance(manifest, dict):
        return None, None
    hashes = manifest.get("files")
    listed = isinstance(hashes, dict) and all(isinstance(each, str) for each in hashes.values())
    if not listed and DIGEST not in manifest:
        return None, None
    content = {key: value for key, value in manifest.items() if key != DIGEST}
    try:
        as_written = manifest.get(DIGEST) == _digest_of(content)
    except RecursionError:
        as_written = False
    if not listed or not as_written:
        return None, f"its {MANIFEST} is not what was written"
    return (manifest, None) if hashes else (None, f"its {MANIFEST} lists no files")


def is_described(directory: Path, of: str) -> bool:
    """Whether a directory's manifest has this value for the fact `of`."""
    manifest, _ = _manifest(directory)
    return manifest is not None and manifest.get("of") == of


def damage(directory: Path) -> str | None:
    """How a directory differs from its manifest; None where it does not, or has no manifest of ours."""
    manifest, problem = _manifest(directory)
    return problem if manifest is None else _changed_file(directory, manifest["files"])


def fault(checkpoint: Path) -> str | None:
    """Why a checkpoint cannot be resumed from; None for a valid one."""
    if not (checkpoint / MANIFEST).is_file():
        return f"it has no {MANIFEST}"
    manifest, problem = _manifest(checkpoint)
    if manifest is None:
        return problem or f"its {MANIFEST} cannot be read"
    return _changed_file(checkpoint, manifest["files"])


def _changed_file(directory: Path, hashes: dict[str, str]) -> str | None:
    for name, expected in hashes.items():
        try:
            if not (directory / name).is_file():
                return f"{name} is missing"
            if digest(directory / name) != expected:
                return f"{name} is not what was written"
        except OSError as error:
            return f"{name} cannot be read: {error.strerror}"
    return None


def _all(run: Path) -> Iterator[Path]:
    """Newest first."""
    found = ((re.fullmatch(r"checkpoint-(\d+)", path.name), path) for path in run.iterdir())
    numbered = [(int(match[1]), path) for match, path in found if match]
    yield from (path for _, path in sorted(numbered, reverse=True))


def newest(run: Path) -> Path | None:
    """The newest valid checkpoint of a run; reports on standard error which ones it skips, and why."""
    for checkpoint in _all(run):
        problem = fault(checkpoint) or _renamed(checkpoint)
        if problem is None:
            return checkpoint
        print(f"{checkpoint} is skipped: {problem}", file=sys.stderr)
    return None


def has_any(run: Path) -> bool:
    """Checkpoints, whole or not."""
    return next(_all(run), None) is not None


def _renamed(checkpoint: Path) -> str | None:
    """That a checkpoint is of another step than its name says."""
    step = facts_of(checkpoint).get("step")
    return None if checkpoint.name == f"checkpoint-{step}" else f"its {MANIFEST} is of step {step}"


def facts_of(checkpoint: Path) -> dict[str, Any]:
    """The manifest of a checkpoint in which `fault` finds nothing."""
    return json.loads((checkpoint / MANIFEST).read_bytes())


def keep_newest(run: Path, step: int, count: int | None) -> None:
    """Remove all but the newest `count` checkpoints; None keeps all.

    Later ones than `step`, where the run is now, go too: they were damaged, as it was not resumed from them.
    """
    if count is not None:
        damaged = [checkpoint for checkpoint in _all(run) if int(checkpoint.name.partition("-")[2]) > step]
        kept = [checkpoint for checkpoint in _all(run) if checkpoint not in damaged]
        for checkpoint in damaged + kept[max(1, count) :]:
            shutil.rmtree(checkpoint)
