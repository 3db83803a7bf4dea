"""Numbers, ranges and aligned tables as text, for the terminal and for the page."""

from collections.abc import Sequence

Summary = dict[str, float]


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


def spread(summary: Summary, shown=ratio) -> str:
    """The least and the greatest, if there is more than one."""
    return f"{shown(summary['least'])} to {shown(summary['greatest'])}" if summary["seeds"] > 1 else ""


def with_spread(summary: Summary, shown=ratio) -> str:
    return f"{shown(summary['mean'])} ({spread(summary, shown)})" if spread(summary, shown) else shown(summary["mean"])


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Rows of a table as lines: the first column at the left, the others at the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for name, *cells in rows:
        right = (cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True))
        lines.append("  ".join([name.ljust(widths[0]), *right]))
    return "\n".join(lines)
