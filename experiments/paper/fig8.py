"""Figure 8: transition tuning recovers from the switch to Token Choice.

    python experiments/paper/fig8.py            # what is missing of a Micro and its transitions; 90 minutes of one core
    python experiments/paper/fig8.py --table    # the table

Each source is trained on as Token Choice for a tenth of its steps: switched as in the paper (plain), and with what is
fitted at the switch. Beside it is Token Choice from scratch with as many steps and the default temperature, 1; for a
Micro these take about as long (`timings.csv`), without what the fit takes. The Nanos, three seeds, are those of
`../transition`, whose `run.py` makes them. The Micro, one seed, is figure 7's at 12 million tokens, switched by
distillation of 2,000 steps, and so with sigmoid gates. Fitted scales, and Token Choice from scratch, are of flags that
`mot transition` had up to commit 8112891 (--calibrate scales, --control scratch): their runs are kept, and not made
here. Expected: the loss jumps at the plain switch and is below the source's at the end, on every seed. The paper: a
spike at the switch, then recovery, for Medium and Base (caption of figure 8; values not available). The same question
with budgets of time is in `../verdict`.
"""

import sys
from collections.abc import Mapping
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

import micro
import numpy as np
from studies import DISTIL_STEPS, EXPERIMENT, FIRST_SEEDS, SIZES, Said, Study, verdict, with_weights

from mixture_of_tokens import transition
from mixture_of_tokens.runs.run import Run, read_run
from mixture_of_tokens.utils.formatting import markdown

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import Experiment, directory_of, keep, signed, spread
from pictures import curve_of, save_picture

PLAIN, SCRATCH, SIGMOID_SCRATCH = "plain", "scratch", "sigmoid-scratch"
DRAWN = 0.6  # of all steps, after which curves are drawn
# By what a run's name ends in: how it is called, and the options of `mot transition` for a Micro.
Ways = dict[str, tuple[str, Mapping[str, Any]]]
OF_NANOS: Ways = {PLAIN: ("plain switch", {}), "": ("fitted scales", {}), "distilled": ("distilled", {})}
SIGMOID: Ways = {"sigmoid": ("distilled, sigmoid gates", {"scores": "sigmoid", "distil_steps": DISTIL_STEPS})}
OF_MICROS: Ways = {
    PLAIN: ("plain switch", {"calibrate": "none"}),
    "distilled": ("distilled", {"distil_steps": DISTIL_STEPS}),
    **SIGMOID,
}
CONTROL: Ways = {SCRATCH: ("Token Choice from scratch", {})}
CONTROLS = CONTROL | {SIGMOID_SCRATCH: ("from scratch, sigmoid gates", {"scores": "sigmoid"})}


class Source(NamedTuple):
    """A Mixture of Tokens; runs of its transitions are kept as RUN-WAY."""

    name: str
    runs: tuple[str, ...]  # by seed
    ways: Ways

    def transitions(self, way: str) -> list[Run]:
        return [read_run(TRANSITION / directory_of(run, way)) for run in self.runs]


TRANSITION = Experiment.named("transition").kept
NANOS = [
    Source(name, tuple(directory_of(name, f"seed{seed}") for seed in (1, 2, 3)), ways)
    for name, ways in (("MoT-Nano/32E", OF_NANOS | SIGMOID), ("MoT-Nano/32E/8", OF_NANOS))
]
SYSTEM, SEED = micro.BEST_MIXTURE, FIRST_SEEDS["Micro"]
MICRO = Source(SYSTEM.name, (SYSTEM.directory(micro.SHORT, SEED),), OF_MICROS)
SOURCES = (*NANOS, MICRO)


def make() -> None:
    """The Micro's transitions that are not kept."""
    (name,) = MICRO.runs
    for way, (_, options) in OF_MICROS.items():
        out = EXPERIMENT.trained / f"{name}-{way}"
        if (TRANSITION / f"{out.name}.json").is_file():
            continue
        source = with_weights(SYSTEM, micro.SHORT, SEED)
        transition(source, out=out, device=SIZES["Micro"].device, resume=True, **options)
        keep([read_run(out)], TRANSITION, first_seed=SEED)


def stages_of(source: Source, way: str) -> list[list[float]]:
    """By seed: the loss in groups before, at the switch and at the end; on the part that is evaluated in training."""
    return [
        [run.switch.source_in_groups, run.switch.at_the_switch, run.stages.end_loss]
        for run in source.transitions(way)
        if run.switch is not None
    ]


def says() -> Said | None:
    """Told are the means over the seeds, as differences to the source in groups."""
    if not all((TRANSITION / f"{run}-{way}.json").is_file() for run in MICRO.runs for way in OF_MICROS | CONTROLS):
        return None
    told, recovered = [], True
    for source in SOURCES:
        stages = stages_of(source, PLAIN)
        before, at, end = np.mean(stages, axis=0)
        told.append(f"{source.name} {signed(at - before)}, {signed(end - before)}")
        recovered &= all(first < jumped and last < first for first, jumped, last in stages)
    return told, verdict(recovered, in_part=False)


def table_of(_: object = ()) -> str:
    rows = [["", "way", "in groups, before", "at the switch", "at the end", "Token Choice from scratch, at the end"]]
    for source in SOURCES:
        for way, (label, options) in source.ways.items():
            control = SIGMOID_SCRATCH if options.get("scores") == "sigmoid" else SCRATCH
            from_scratch = spread(run.curve[-1].loss for run in source.transitions(control))
            rows.append([source.name, label, *map(spread, zip(*stages_of(source, way), strict=True)), from_scratch])
    return markdown(rows, left=2)


def draw(study: Study) -> None:
    panels = {}
    for source in SOURCES:
        curves = panels[f"steps of {source.name}"] = []
        for way, (label, _) in (source.ways | (CONTROLS if SIGMOID.keys() <= source.ways.keys() else CONTROL)).items():
            runs = source.transitions(way)
            since = DRAWN * max(run.curve[-1].step for run in runs)
            curves.append(curve_of(label, runs, since, attrgetter("step")))
    save_picture(panels, "validation loss, nats a token", EXPERIMENT.kept / f"{study.id}.svg", apart=True)


STUDY = Study(
    id="fig8",
    claim="Transition tuning recovers from the switch",
    paper="a spike, then recovery (Medium, Base)",
    says=says,
    table=table_of,
    heading="over the source in groups, at the switch and after a tenth more steps",
    make=make,
    draw=draw,
)

if __name__ == "__main__":
    STUDY.main(__doc__)
