"""manifest.json: facts about a folder, the size and SHA-256 of every other file in it, and a SHA-256 of all this."""

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mixture_of_tokens.utils.files import naming

NAME, OWN = "manifest.json", "sha256"  # the field that is a hash of the others
# Two places by which ours are known, of which a flipped bit leaves one: other software has files of that name too.
OURS = re.compile(rb'^  ("files": \{\s+".*": \{\s+"bytes"|"sha256": "[0-9a-f]{64}"$)', re.MULTILINE)


def hash_of_file(path: Path, progress: Callable[[int], Any] = int) -> str:
    """The SHA-256 of a file's content. progress: called with the number of bytes read. Raises OSError with the name."""
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while part := file.read(2**20):
                digest.update(part)
                progress(len(part))
    except OSError as error:
        raise naming(error, path) from error
    return digest.hexdigest()


def write(folder: Path, hash_of: Callable[[Path], str] = hash_of_file, **facts: Any) -> None:
    """Of all that is in the folder now."""
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path != folder / NAME:
            files[path.relative_to(folder).as_posix()] = {"bytes": path.stat().st_size, "sha256": hash_of(path)}
    content = facts | {"files": files}
    (folder / NAME).write_text(json.dumps(content | {OWN: _hash_of(content)}, indent=2))


def read(folder: Path) -> dict[str, Any]:
    """The facts, and `files`. Raises ValueError, saying why, where they are not those that were written."""
    if not (folder / NAME).is_file():
        raise ValueError(f"{NAME} is missing")
    try:
        content = json.loads((folder / NAME).read_bytes())
        if content.pop(OWN) == _hash_of(content):
            return content
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError):  # it is no JSON, or another's
        pass
    raise ValueError(f"{NAME} is not what was written")


def is_of(folder: Path, what: str) -> bool:
    """Whether a folder's manifest is there and has this as the fact `of`."""
    try:
        return read(folder).get("of") == what
    except ValueError:
        return False


def fault(folder: Path, hash_of: Callable[[Path], str] = hash_of_file) -> str | None:
    """What is missing or damaged; None where every file is as it was written. Raises OSError if one cannot be read."""
    try:
        files = read(folder)["files"]
    except ValueError as error:
        return str(error)
    for name, written in files.items():
        try:
            size = (folder / name).stat().st_size
            if size != written["bytes"]:
                return f"{name} is not what was written: it has {size} bytes, not {written['bytes']}"
            if hash_of(folder / name) != written["sha256"]:
                return f"{name} is not what was written"
        except FileNotFoundError:
            return f"{name} is missing"
    return None if files else f"{NAME} lists no files"


def damage(folder: Path) -> str | None:
    """`fault` where there is a manifest of ours, or one that nobody can read; None for folders of other software."""
    path = folder / NAME
    if not path.is_file():
        return None
    content = path.read_bytes()
    if OURS.search(content):
        return fault(folder)
    try:
        json.loads(content)
    except (ValueError, RecursionError):
        return fault(folder)
    return None


def _hash_of(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
