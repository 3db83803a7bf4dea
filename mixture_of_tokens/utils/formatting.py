"""Results as text: the base class of what commands return, and the format of numbers, ranges and tables."""

import json
import math
import pickle
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self


class Result:
    """Base of the dataclasses that commands return. The command line prints `str`, and with --json `to_json`."""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)  # pyright: ignore[reportArgumentType]

    def to_json(self) -> str:
        return json.dumps(finite(self.as_dict()), indent=2, allow_nan=False)


def finite(value: Any) -> Any:
    """With None in place of every number that is not finite, which JSON does not have."""
    if isinstance(value, dict):
        return {key: finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@dataclass(frozen=True)
class Summary:
    """Mean and range of a number over seeds or rounds."""

    mean: float
    least: float
    greatest: float
    seeds: int

    @classmethod
    def over(cls, values: Iterable[float]) -> Self:
        known = list(values)
        return cls(sum(known) / len(known), min(known), max(known), len(known))

    @classmethod
    def of(cls, values: Iterable[float | None]) -> Self | None:
        """Of the values that are not None; None if there are none."""
        known = [value for value in values if value is not None]
        return cls.over(known) if known else None


def loss(value: float) -> str:
    return f"{value:.3f}"


def ratio(value: float) -> str:
    return f"{value:.2f}"


def difference(value: float) -> str:
    return f"{value:+.3f}".replace("-", "\N{MINUS SIGN}")


def duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s" if seconds < 20 else f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


def few_of(names: Iterable[object], most: int = 3) -> str:
    """So many names, and how many more there are."""
    words = list(map(str, names))
    return ", ".join(words if len(words) <= most else [*words[: most - 1], f"{len(words) - most + 1} more"])


def listing(numbers: Iterable[object]) -> str:
    """Numbers as a message lists them: so many, and how many more there are."""
    return few_of(numbers, 24)


def short(number: float) -> str:
    """Three digits and an SI prefix, such as 221 k."""
    for letter, power in (("E", 1e18), ("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= 0.9995 * power:
            return f"{number / power:.3g} {letter}"
    return f"{number:.3g}"


def enumerated(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def span(summary: Summary, shown=ratio) -> str:
    """The least and the greatest value; empty if both are written alike."""
    least, greatest = shown(summary.least), shown(summary.greatest)
    return "" if least == greatest else f"{least} to {greatest}"


def with_span(summary: Summary, shown=ratio) -> str:
    """The mean, with the span in brackets if there is one."""
    between = span(summary, shown)
    return f"{shown(summary.mean)} ({between})" if between else shown(summary.mean)


def aligned(rows: Sequence[Sequence[str]], *, left: int = 1) -> str:
    """Rows of a table as lines: the first `left` columns at the left, the others at the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for cells in rows:
        sides = zip(cells, widths, range(len(cells)), strict=True)
        line = "  ".join(cell.ljust(width) if i < left else cell.rjust(width) for cell, width, i in sides)
        lines.append(line.rstrip())
    return "\n".join(lines)


def markdown(rows: Sequence[Sequence[object]], *, left: int = 1) -> str:
    """Rows as a Markdown table; the first row is its header. None is an empty cell."""
    head, *body = rows
    rule = ["---" if i < left else "---:" for i in range(len(head))]
    texts = (["" if cell is None else str(cell) for cell in cells] for cells in (head, rule, *body))
    return "\n".join(f"| {' | '.join(cells)} |" for cells in texts)


def in_words(error: Exception) -> str:
    return str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"


def unreadable(error: BaseException) -> str:
    """Why a file could not be read. What unpicklers say is left out: torch advises to trust the file."""
    refused = isinstance(error, pickle.UnpicklingError)
    return "it holds what no training writes" if refused else f"{type(error).__name__}: {first_line(error)}"
