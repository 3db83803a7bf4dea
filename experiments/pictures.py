"""Pictures of losses, with colours that can be read on white and on black."""

import itertools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from mixture_of_tokens.reports.figures import DASHES
from mixture_of_tokens.runs.run import Point, Run

# By how labels begin: of those that begin alike, the first one of a picture.
KINDS = {"Transformer-|dense": "#808890", "TC-|Token Choice": "#2a9d6f", r"MoT-\S*32E/8\b|Mixture": "#2f81d6"}
COLORS = ("#d9632a", "#a45bb0", "#b08a00", "#c2407a", "#2b9aa8", "#8c6d4f", "#7f8f2a", "#6a6fd0", "#c97b8e")
BESIDE = 5  # curves, above which their names stand beside a picture
GREY = "#767676"
STYLE = dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), GREY)
STYLE |= {"svg.fonttype": "none", "svg.hashsalt": "", "font.size": 10, "axes.spines.top": False}
STYLE |= {"axes.spines.right": False}


class Curve(NamedTuple):
    """Losses at x: one row of them a seed."""

    label: str
    x: np.ndarray
    losses: np.ndarray


def curve_of(label: str, runs: Iterable[Run], since: float, x: Callable[[Point], float]) -> Curve:
    """The evaluations of runs from this step on; x is their mean."""
    points = [[point for point in run.curve if point.step >= since] for run in runs]
    losses = np.array([[point.loss for point in each] for each in points])
    return Curve(label, np.mean([[x(point) for point in each] for each in points], axis=0), losses)


def save_picture(
    panels: Mapping[str, Sequence[Curve]],
    y_label: str,
    file: Path,
    level: float | None = None,
    logarithmic: bool = False,
    apart: bool = False,
    legend: int = 0,
    marked: Mapping[str, float] | None = None,
) -> None:
    """Panels by the label of their x; means over the seeds in a band from the least to the greatest.

    Args:
        level: the loss of a dotted line.
        logarithmic: whether x is.
        apart: whether each panel has a range of its own.
        legend: the number of the panel that it is in, where it is in one.
        marked: x of vertical lines, by what they say.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9, 3.6), layout="constrained")
        axes = figure.subplots(1, len(panels), sharey=not apart, squeeze=False)[0]
        colors = colors_of(dict.fromkeys(curve.label for curves in panels.values() for curve in curves))
        dashes_of = dict(zip(colors, itertools.cycle(DASHES), strict=False))
        for panel, (x_label, curves) in zip(axes, panels.items(), strict=True):
            for label, x, losses in curves:
                color, dashes = colors[label], dashes_of[label]
                panel.fill_between(x, losses.min(0), losses.max(0), color=color, alpha=0.25, linewidth=0)
                panel.plot(x, losses.mean(0), color=color, linestyle=dashes, linewidth=1.8, label=label)
            if level is not None:
                panel.axhline(level, color=GREY, linewidth=0.9, linestyle=(0, (1, 2)))
            for words, x in (marked or {}).items():
                panel.axvline(x, color=GREY, linewidth=0.9, linestyle=(0, (1, 2)))
                where = panel.get_xaxis_transform()  # x as the data, y as a share of the axis
                panel.text(x, 0.02, f" {words}", transform=where, color=GREY, fontsize=9)
            panel.set_xlabel(x_label)
            panel.set_xscale("log" if logarithmic else "linear")
        axes[0].set_ylabel(y_label)
        if len(colors) > BESIDE:
            lines = {
                line.get_label(): line for panel in axes for line in panel.get_lines() if line.get_label() in colors
            }
            figure.legend(list(lines.values()), list(lines), loc="outside right upper", frameon=False)
        else:
            axes[legend].legend(frameon=False)
        figure.savefig(file, transparent=True, metadata={"Date": None})


def colors_of(labels: Iterable[str]) -> dict[str, str]:
    colors: dict[str, str] = {}
    others = itertools.cycle(COLORS)
    for label in labels:
        own = next((color for kind, color in KINDS.items() if re.match(kind, label)), None)
        colors[label] = next(others) if own is None or own in colors.values() else own
    return colors
