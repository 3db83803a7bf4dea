"""Curves as inline SVG for a page with a light and a dark theme.

Text and axes take the page's text colour (currentColor), series the page's --series-0, --series-1, ...; matplotlib
knows neither: it draws with stand-in colours, which are then replaced. A series also has its own dashes and marker.
"""

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any
from xml.etree import ElementTree

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

SERIES = 6  # after which colours, dashes and markers repeat
DASHES = ("-", (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (6, 1.5, 1.5, 1.5)), (0, (3, 1)), (0, (8, 1, 1, 1, 1, 1)))
MARKERS = ("o", "s", "^", "D", "v", "P")
TEXT = "#00ff01"
PANEL = (4.7, 3.1)  # inches; an SVG's unit is a point, so this is about a phone's width
SWATCH = (0.5, 0.18)
STYLE: Any = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 11,
    "axes.labelsize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "axes.grid": True,
    "grid.alpha": 0.15,
    "grid.linewidth": 0.8,
    "lines.linewidth": 1.8,
    "lines.markersize": 4.5,
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), TEXT),
    "grid.color": TEXT,
}


@dataclass(frozen=True)
class Line:
    """A curve of the series with this number, and the band around it."""

    series: int
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    label: str = ""  # at its right end
    alpha: float = 1.0


def panel(
    lines: Sequence[Line],
    *,
    label: str,
    x_label: str,
    y_label: str,
    y_range: tuple[float, float],
    x_range: tuple[float, float | None] = (0, None),
    level: float | None = None,
    points: Sequence[tuple[int, float, float]] = (),
    switches: Sequence[tuple[int, float]] = (),
) -> str:
    """A figure with one set of axes.

    Args:
        label: What it shows, for those who do not see it.
        level: The y of a dotted line; points: (series, x, y) of rings.
        switches: (series, x) of vertical lines.
    """

    def draw(axes: Axes) -> None:
        for line in lines:
            style = _style(line.series)
            if line.low is not None and line.high is not None:
                axes.fill_between(line.x, line.low, line.high, color=style["color"], alpha=0.18, linewidth=0)
            # By distance along the line, not by points: a switched run is evaluated more often after the switch.
            marked = (0.04 * (line.series % SERIES), 0.25) if len(line.x) > 1 else None
            axes.plot(line.x, line.y, alpha=line.alpha, markevery=marked, **style)
        if level is not None:
            axes.axhline(level, color=TEXT, linewidth=0.9, linestyle=(0, (1, 2)))
        for series, x, y in points:
            ring = {"markeredgecolor": _style(series)["color"], "markerfacecolor": "none", "markeredgewidth": 1.8}
            axes.plot([x], [y], "o", markersize=10, **ring)
        for series, x in switches:
            axes.axvline(x, color=_style(series)["color"], linewidth=1.2, linestyle=(0, (4, 2)))
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        axes.set_ylim(*y_range)
        axes.set_xlim(*x_range)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        _label_ends(axes, [line for line in lines if line.label])

    return _svg(draw, PANEL, label)


@cache
def swatch(series: int) -> str:
    """A piece of the series' line, for a legend."""

    def draw(axes: Axes) -> None:
        axes.plot([0, 1, 2], [0, 0, 0], markevery=[1], **_style(series))
        axes.set_axis_off()

    return _svg(draw, SWATCH, None)


def _style(series: int) -> dict:
    number = series % SERIES
    return {"color": _stand_in(number), "linestyle": DASHES[number], "marker": MARKERS[number]}


def _stand_in(number: int) -> str:
    return f"#00ff{16 + number:02x}"


def _label_ends(axes: Axes, lines: Sequence[Line]) -> None:
    """The lines' labels beside their right ends, moved apart where they would cover each other."""
    low, high = axes.get_ylim()
    apart = (high - low) * 0.075
    place = low + 0.04 * (high - low) - apart  # clear of the axis
    for line in sorted(lines, key=lambda line: line.y[-1]):
        place = max(place + apart, line.y[-1])
        color = _style(line.series)["color"]
        axes.annotate(
            line.label,
            (line.x[-1], place),
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            fontsize=10,
            color=color,
            annotation_clip=False,
        )


def _svg(draw: Callable[[Axes], None], size: tuple[float, float], label: str | None) -> str:
    """What is drawn, without namespaces: HTML needs none."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure.add_subplot())
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    text = file.getvalue().replace(TEXT, "currentColor")
    for number in range(SERIES):
        text = text.replace(_stand_in(number), f"var(--series-{number})")
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", text, flags=re.DOTALL)  # would style the page
    root = ElementTree.fromstring(re.sub(r">\s+<", "><", text))
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        element.attrib = {key.rpartition("}")[2]: value for key, value in element.attrib.items()}
        if element.tag == "g":
            element.attrib.pop("id", None)  # ids that all figures share
        if element.tag == "text":  # in the page's font
            element.set("style", re.sub(r"font(-family)?: ?[^;]*;?", _font_size, element.get("style", "")))
    for key in ("width", "height", "version"):
        root.attrib.pop(key, None)
    root.attrib |= {"role": "img", "aria-label": label} if label else {"aria-hidden": "true"}
    return ElementTree.tostring(root, encoding="unicode", method="html")


def _font_size(match: re.Match) -> str:
    size = re.search(r"[\d.]+px", match[0])
    return f"font-size: {size[0]};" if size else ""
