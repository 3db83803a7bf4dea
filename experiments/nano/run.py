"""Four systems at equal steps, three seeds: what docs/results/systems.md says of steps, FLOPs and time.

    python experiments/nano/run.py            # half an hour on two cores of an AMD EPYC; goes on where it was stopped
    python experiments/nano/run.py --table    # who reaches whose loss, and when, of nano, prose and long: Markdown
    python experiments/nano/run.py --draw     # curves.svg, the picture of docs/results/systems.md

1,200 steps of 8,192 tokens of the standard library's source (of Python 3.11.7, for the text that is committed).
MoT-Nano/32E/8 is at the dense model's final loss in 0.57 of its steps and 0.89 of its FLOPs, and Token Choice in 0.57
and 0.62; `mot report experiments/nano` prints all numbers.

The picture: loss against steps and against time, of evaluations during training, without the first sixth.
"""

import sys
from operator import attrgetter
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import NANO, Experiment, compared, comparison_of, reached_table, script
from pictures import curve_of, save_picture

NAMES = ("Transformer-Nano", "MoT-Nano/32E", "MoT-Nano/32E/8", "TC-Nano/32E")
SEEDS = [1, 2, 3]
OPTIONS = NANO


def draw(experiment: Experiment) -> None:
    found = comparison_of(experiment)
    panels = {
        label: [curve_of(model.label, model.runs, found.steps / 6, x) for model in found.models]
        for label, x in (("steps", attrgetter("step")), ("training time, s", attrgetter("seconds")))
    }
    level = float(np.mean([run.curve[-1].loss for run in found.models[0].runs]))
    save_picture(panels, f"{found.evaluated_on} loss, nats a token", experiment.kept / "curves.svg", level)


def make(experiment: Experiment) -> None:
    compared(experiment, NAMES, SEEDS, OPTIONS)
    draw(experiment)


if __name__ == "__main__":
    experiment = Experiment.named("nano")
    draws = ("draw curves.svg of what is committed", lambda: draw(experiment))
    script(__doc__, lambda: make(experiment), reached_table, draw=draws)
