"""The README's picture: loss against steps and against time, of a comparison's runs.

    python experiments/curves.py experiments/nano    # curves.svg from compare.json, in a second

Means over the seeds, in a band from the least to the greatest; evaluations during training, without the first sixth.
Greys and colours can be read on white and on black.
"""

import json
import sys
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from mixture_of_tokens.reports.figures import DASHES

COLORS = ("#808890", "#2f81d6", "#d9632a", "#2a9d6f", "#a45bb0", "#b08a00")
GREY = "#858585"
STYLE = dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), GREY)
STYLE |= {"svg.fonttype": "none", "svg.hashsalt": "", "font.size": 10, "axes.spines.top": False}


def draw(written: dict) -> Figure:
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, key, label in zip(panels, ("step", "seconds"), ("steps", "training time, s"), strict=True):
        for i, model in enumerate(written["models"]):
            curves = [
                [point for point in run["curve"] if 6 * point["step"] >= written["steps"]] for run in model["runs"]
            ]
            losses = np.array([[point["loss"] for point in curve] for curve in curves])
            x = np.mean([[point[key] for point in curve] for curve in curves], axis=0)
            axes.fill_between(x, losses.min(0), losses.max(0), color=COLORS[i], alpha=0.25, linewidth=0)
            axes.plot(x, losses.mean(0), color=COLORS[i], linestyle=DASHES[i], linewidth=1.8, label=model["label"])
        last = np.mean([run["curve"][-1]["loss"] for run in written["models"][0]["runs"]])
        axes.axhline(last, color=GREY, linewidth=0.9, linestyle=(0, (1, 2)))
        axes.set_xlabel(label)
        axes.spines.right.set_visible(False)
    panels[0].set_ylabel(f"{written['evaluated_on']} loss, nats a token")
    panels[0].legend(frameon=False)
    return figure


def main() -> None:
    directory = Path(sys.argv[1])
    written = json.loads((directory / "compare.json").read_text())
    with matplotlib.rc_context(STYLE):
        draw(written).savefig(directory / "curves.svg", transparent=True, metadata={"Date": None})


if __name__ == "__main__":
    main()
