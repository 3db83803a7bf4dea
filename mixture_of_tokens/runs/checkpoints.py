"""Checkpoints that are complete or absent: complete means that every file is as its manifest says."""

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mixture_of_tokens.utils import manifest
from mixture_of_tokens.utils.formatting import unreadable
from mixture_of_tokens.utils.progress import say


def _all(run: Path) -> Iterator[Path]:
    """Newest first."""
    found = ((re.fullmatch(r"checkpoint-(\d+)", path.name), path) for path in run.iterdir())
    numbered = [(int(match[1]), path) for match, path in found if match]
    yield from (path for _, path in sorted(numbered, reverse=True))


def newest(run: Path) -> Path | None:
    """The newest valid checkpoint of a run; reports on standard error which ones it skips, and why.

    Raises OSError where one cannot be read: it may be whole, and going on from an earlier one would remove it.
    """
    for checkpoint in _all(run):
        problem = manifest.fault(checkpoint) or _renamed(checkpoint)
        if problem is None:
            return checkpoint
        say(f"{checkpoint} is skipped: {problem}")
    return None


def has_any(run: Path) -> bool:
    """Checkpoints, whole or not."""
    return next(_all(run), None) is not None


def at(run: Path, step: int) -> Path:
    """The checkpoint of a run after so many steps, or where it would be."""
    return run / f"checkpoint-{step}"


def _renamed(checkpoint: Path) -> str | None:
    """That a checkpoint is of another step than its name says."""
    step = manifest.read(checkpoint).get("step")
    return None if checkpoint.name == f"checkpoint-{step}" else f"{manifest.NAME} is of step {step}"


def keep_newest(run: Path, step: int, count: int | None) -> None:
    """Remove all but the newest `count` checkpoints; None keeps all.

    Later ones than `step`, where the run is now, go too: they were damaged, as it was not resumed from them.
    """
    if count is not None:
        damaged = [checkpoint for checkpoint in _all(run) if int(checkpoint.name.partition("-")[2]) > step]
        kept = [checkpoint for checkpoint in _all(run) if checkpoint not in damaged]
        for checkpoint in damaged + kept[max(1, count) :]:
            shutil.rmtree(checkpoint)


@contextmanager
def reading(file: Path) -> Iterator[None]:
    """Raise as ValueError, naming the file, whatever its reader raises for what no training has written."""
    try:
        yield
    except Exception as error:  # of torch, pickle, safetensors and json, and what their content makes others raise
        raise ValueError(f"{file} cannot be read: {unreadable(error)}") from error
