"""Results as text: what commands return, and numbers, ranges and tables, for the terminal and for the page."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self


class Result:
    """What a command returns, a dataclass: `str` is what the command line prints, `to_json` what --json prints."""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)  # pyright: ignore[reportArgumentType]

    def to_json(self) -> str:
        return json.dumps(self.as_dict(), indent=2)


@dataclass(frozen=True)
class Summary:
    """Over seeds or rounds."""

    mean: float
    least: float
    greatest: float
    seeds: int

    @classmethod
    def of(cls, values: Iterable[float | None]) -> Self | None:
        """Of those that have a value; None if none has."""
        known = [value for value in values if value is not None]
        return cls(sum(known) / len(known), min(known), max(known), len(known)) if known else None


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


def short(number: float) -> str:
    """As in 221 k, with the letters of the International System."""
    for letter, power in (("E", 1e18), ("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= 0.9995 * power:
            return f"{number / power:.3g} {letter}"
    return f"{number:.3g}"


def listed(words: list[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def span(summary: Summary, shown=ratio) -> str:
    """The least and the greatest, if there is more than one."""
    return f"{shown(summary.least)} to {shown(summary.greatest)}" if summary.seeds > 1 else ""


def with_span(summary: Summary, shown=ratio) -> str:
    return f"{shown(summary.mean)} ({span(summary, shown)})" if summary.seeds > 1 else shown(summary.mean)


def aligned(rows: Sequence[Sequence[str]], *, left: int = 1) -> str:
    """Rows of a table as lines: the first `left` columns at the left, the others at the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for cells in rows:
        sides = zip(cells, widths, range(len(cells)), strict=True)
        line = "  ".join(cell.ljust(width) if i < left else cell.rjust(width) for cell, width, i in sides)
        lines.append(line.rstrip())
    return "\n".join(lines)


def markdown(rows: Sequence[Sequence[str]], *, left: int = 1) -> str:
    """The same as a table of Markdown, whose first row is the head."""
    head, *body = rows
    rule = ["---" if i < left else "---:" for i in range(len(head))]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, rule, *body))
