"""Dataclasses that are read from files, with every field of its type. Files carry a format number."""

import json
import typing
from dataclasses import MISSING, asdict, fields
from functools import cache
from pathlib import Path
from reprlib import repr  # of a part of what is long or nested
from typing import Any, Self

from pydantic import TypeAdapter, ValidationError

from mixture_of_tokens.utils.files import write_text

FORMAT = 1


def check_format(number: Any, file: Path) -> None:
    """Raises ValueError for a format that this version does not read."""
    if type(number) is not int or number != FORMAT:
        has = "no format" if number is None else f"format {number!r}"
        raise ValueError(f"{file} has {has}, and this version reads format {FORMAT}")


class Record:
    """A dataclass that is read from a file. `check` is for what the types of its fields do not say."""

    @classmethod
    def of(cls, written: Any, file: Path) -> Self:
        """Raises ValueError for missing, unknown or wrongly typed fields."""
        if not isinstance(written, dict):
            raise ValueError(f"{file} holds no fields")
        kind: Any = cls
        hints, known = typing.get_type_hints(cls), {field.name: field for field in fields(kind)}
        for name in written:
            if name not in known:
                raise ValueError(f"{file} has an unknown field, {name!r}")
        for name, field in known.items():
            if name not in written and field.default is MISSING:
                raise ValueError(f"{file} lacks the field {name!r}")
        for name, value in written.items():
            if not is_a(value, hints[name]):
                raise ValueError(f"{file}: {name} cannot be {repr(value)}")
        made = cls(**written)
        made.check(file)
        return made

    def check(self, file: Path) -> None:
        """Raises ValueError, naming the file, for values of the right types that cannot be."""


class JsonFile(Record):
    """A record that is a file of its own, as JSON."""

    @classmethod
    def read(cls, file: Path) -> Self:
        """Raises ValueError, naming the file, for what is no such record."""
        return cls.of(without_format(as_fields(file), file), file)

    def write(self, file: Path) -> None:
        written: Any = self
        write_text(file, json.dumps({"format": FORMAT} | asdict(written), indent=2) + "\n")


def without_format(written: Any, file: Path) -> Any:
    """The fields of a file. Raises ValueError for another format."""
    if not isinstance(written, dict):
        return written
    check_format(written.get("format"), file)
    return {name: value for name, value in written.items() if name != "format"}


def as_fields(file: Path) -> Any:
    """The content of a JSON file. Raises ValueError, naming the file, where it cannot be read."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from None


def is_a(value: Any, hint: Any) -> bool:
    """Whether a value of a file is of this type, with all that is in it."""
    try:
        _adapter(hint).validate_python(value, strict=True)
    except ValidationError:
        return False
    return True


_adapter = cache(TypeAdapter)
