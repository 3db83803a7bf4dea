"""Figure 8: transition tuning recovers from the switch to Token Choice.

    python experiments/paper/fig8.py            # the picture and the table, of the runs of ../transition; seconds
    python experiments/paper/fig8.py --table    # the table

The runs are Nanos, three seeds: 1,200 steps as Mixture of Tokens, then 120 as Token Choice, switched as in the paper
(plain) and with fitted scales; Token Choice from scratch has all 1,320. `../transition/run.py` makes what is missing.
Expected: the loss jumps at the plain switch and is below the source's at the end, on every seed. The paper: a spike at
the switch, then recovery, for Medium and Base (caption of figure 8; values not available). The distilled switch, which
does not jump, is in `../switch`, the same question at equal time in `../verdict`.
"""

import sys
from pathlib import Path

import numpy as np
from studies import CONFIRMED, CONTRADICTED, EXPERIMENT, Study

from mixture_of_tokens.formatting import markdown
from mixture_of_tokens.runs.run import Run, read

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import Curve, Experiment, directory_of, save_picture, spread

NAMES, SEEDS = ("MoT-Nano/32E", "MoT-Nano/32E/8"), (1, 2, 3)
WAYS = {"plain": "plain switch", "": "fitted scales"}
FIRST_DRAWN = 700
TRANSITION = Experiment.named("transition").kept


def runs_of(name: str, way: str) -> list[Run]:
    return [read(TRANSITION / directory_of(name, f"seed{seed}", *filter(None, [way]))) for seed in SEEDS]


def stages_of(name: str, way: str) -> list[list[float]]:
    """By seed: the loss in groups before, at the switch and at the end; on the part that is evaluated in training."""
    return [
        [run.switch.source_in_groups, run.switch.at_the_switch, run.stages.end_loss]
        for run in runs_of(name, way)
        if run.switch is not None
    ]


def from_scratch(name: str) -> list[float]:
    return [run.curve[-1].loss for run in runs_of(name, "scratch")]


def says() -> tuple[str, str]:
    told, recovered = [], True
    for name in NAMES:
        stages = stages_of(name, "plain")
        before, at, end = np.mean(stages, axis=0)
        told.append(f"{name}: {before:.3f} in groups, {at:.3f} at the switch, {end:.3f} after a tenth more steps")
        recovered &= all(first < jumped and last < first for first, jumped, last in stages)
    return "; ".join(told), CONFIRMED if recovered else CONTRADICTED


def table_of(_: object = ()) -> str:
    rows = [["", "way", "in groups, before", "at the switch", "at the end", "Token Choice from scratch, at the end"]]
    for name in NAMES:
        for way, label in WAYS.items():
            stages = zip(*stages_of(name, way), strict=True)
            rows.append([name, label, *map(spread, stages), spread(from_scratch(name))])
    return markdown(rows, left=2)


def draw(study: Study) -> None:
    panels = {}
    for name in NAMES:
        curves = panels[f"steps of {name}"] = []
        for way, label in {**WAYS, "scratch": "Token Choice from scratch"}.items():
            points = [[point for point in run.curve if point.step >= FIRST_DRAWN] for run in runs_of(name, way)]
            losses = np.array([[point.loss for point in each] for each in points])
            curves.append(Curve(label, np.array([point.step for point in points[0]]), losses))
    save_picture(panels, "validation loss, nats a token", EXPERIMENT.kept / f"{study.id}.svg")


STUDY = Study(
    id="fig8",
    claim="Transition tuning recovers from the switch",
    paper="a spike, then recovery (Medium, Base); values not available",
    says=says,
    table=table_of,
    draw=draw,
)

if __name__ == "__main__":
    STUDY.main(__doc__)
