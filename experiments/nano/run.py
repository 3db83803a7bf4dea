"""Four systems at equal steps, three seeds: what the README and docs/results.md say of steps, FLOPs and time.

    python experiments/nano/run.py            # half an hour on two cores of an AMD EPYC; goes on where it was stopped
    python experiments/nano/run.py --table    # who reaches whose loss, and when, of nano, prose and long: Markdown
    python experiments/nano/run.py --draw     # curves.svg, the README's picture

1,200 steps of 8,192 tokens of the standard library's source (of Python 3.11.7, for the text that is committed).
MoT-Nano/32E/8 is at the dense model's final loss in 0.57 of its steps, 0.89 of its FLOPs and 0.90 of its time, and
Token Choice in 0.57, 0.62 and 0.74; `mot report experiments/nano` prints all numbers.

The picture: loss against steps and against time, means over the seeds in a band from the least to the greatest;
evaluations during training, without the first sixth. Greys and colours can be read on white and on black.
"""

import sys
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from mixture_of_tokens.reports.comparison import Comparison
from mixture_of_tokens.reports.figures import DASHES
from mixture_of_tokens.training.options import Options

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import Experiment, asked, compared, comparison_of, reached_table

NAMES = ("Transformer-Nano", "MoT-Nano/32E", "MoT-Nano/32E/8", "TC-Nano/32E")
SEEDS = [1, 2, 3]
OPTIONS = Options(steps=1200, device="cpu")

COLORS = ("#808890", "#2f81d6", "#d9632a", "#2a9d6f", "#a45bb0", "#b08a00")
GREY = "#858585"
STYLE = dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), GREY)
STYLE |= {"svg.fonttype": "none", "svg.hashsalt": "", "font.size": 10, "axes.spines.top": False}


def picture(found: Comparison) -> Figure:
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, key, label in zip(panels, ("step", "seconds"), ("steps", "training time, s"), strict=True):
        for i, model in enumerate(found.models):
            curves = [[point for point in run.curve if 6 * point.step >= found.steps] for run in model.runs]
            losses = np.array([[point.loss for point in curve] for curve in curves])
            x = np.mean([[getattr(point, key) for point in curve] for curve in curves], axis=0)
            axes.fill_between(x, losses.min(0), losses.max(0), color=COLORS[i], alpha=0.25, linewidth=0)
            axes.plot(x, losses.mean(0), color=COLORS[i], linestyle=DASHES[i], linewidth=1.8, label=model.label)
        last = np.mean([run.curve[-1].loss for run in found.models[0].runs])
        axes.axhline(last, color=GREY, linewidth=0.9, linestyle=(0, (1, 2)))
        axes.set_xlabel(label)
        axes.spines.right.set_visible(False)
    panels[0].set_ylabel(f"{found.evaluated_on} loss, nats a token")
    panels[0].legend(frameon=False)
    return figure


def draw(experiment: Experiment) -> None:
    with matplotlib.rc_context(STYLE):
        figure = picture(comparison_of(experiment))
        figure.savefig(experiment.kept / "curves.svg", transparent=True, metadata={"Date": None})


def main() -> None:
    given = asked(__doc__, table="print the table, and stop", draw="draw the curves, and stop")
    experiment = Experiment.named("nano")
    if not (given.table or given.draw):
        compared(experiment, NAMES, SEEDS, OPTIONS)
    if not given.table:
        draw(experiment)
    if not given.draw:
        print(reached_table())


if __name__ == "__main__":
    main()
