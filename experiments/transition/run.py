"""The jump at the switch to Token Choice, and what comes after it, three seeds (../LOG.md).

    python experiments/transition/run.py            # 2 hours of one core, as measured beside other runs
    python experiments/transition/run.py --table    # Markdown

The sources are the Mixtures of Tokens of `nano`, trained first where they are not in runs/ (15 minutes more). Each was
switched in seven ways, and trained on for 120 steps (`WAYS`); an eighth is Token Choice for all of the steps. The one
of granularity 1 was also switched to sigmoid gates, which there have the lower loss at the switch (`SIGMOID_WAYS`). It
goes on where it was stopped. Ways without options are of flags that `mot transition` had up to commit 8112891
(--calibrate scales, --anneal, --control): with that commit their runs can be made again.

Calibration by scales leaves 0.20 to 0.36 of the plain jump; distillation, which came later, none but of one seed. Token
Choice from scratch ends lower. Where it was annealed before, "in groups, before" and the plain jump are of the annealed
source. Losses are of the whole validation split at the end, and of the part that training is evaluated on before; means
over the seeds, from the least to the greatest.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from mixture_of_tokens import transition
from mixture_of_tokens.runs.records import Switch
from mixture_of_tokens.runs.run import Run, read_run
from mixture_of_tokens.utils.formatting import markdown

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import NANO, Experiment, directory_of, keep, script, spread, trained

NAMES = ("MoT-Nano/32E", "MoT-Nano/32E/8")
SEEDS = [1, 2, 3]


class Way(NamedTuple):
    label: str
    options: dict[str, Any] | None = None  # of `mot transition`


WAYS = {  # by what a run's name ends in
    "": Way("calibrated"),
    "plain": Way("plain", {"calibrate": "none"}),
    "distilled": Way("distilled", {"distil_steps": 2000}),
    "fresh": Way("calibrated, fresh optimizer"),
    "capacity": Way("calibrated, capacity 1.25"),
    "anneal": Way("calibrated, annealed before"),
    "router": Way("new router"),
    "scratch": Way("Token Choice from scratch"),
}
SIGMOID_WAYS = {
    "sigmoid": Way("distilled, sigmoid gates", {"scores": "sigmoid", "distil_steps": 2000}),
    "sigmoid-scratch": Way("from scratch, sigmoid gates"),
}


def ways_of(name: str) -> dict[str, Way]:
    return WAYS | (SIGMOID_WAYS if name == "MoT-Nano/32E" else {})


def switch_of(run: Run) -> Switch:
    assert run.switch is not None
    return run.switch


OF_A_SWITCH: dict[str, Callable[[Run], Any]] = {
    "in groups, before": lambda run: switch_of(run).source_in_groups,
    "at the switch": lambda run: switch_of(run).at_the_switch,
    "share of the plain jump": lambda run: switch_of(run).jump_left,
    "after a tenth": lambda run: run.stages.tenth_loss,
    "at the end": lambda run: run.stages.end_loss,
}


def make(sources: Experiment, experiment: Experiment, name: str, ways=None, seeds=SEEDS, options=NANO) -> None:
    """Train what is missing of one source's, seed by seed, and keep it."""
    runs = []
    for seed in seeds:
        source = trained(sources, name, seed, options)
        for end, way in (ways or ways_of(name)).items():
            if way.options is not None:
                out = experiment.trained / directory_of(source.name, end)
                transition(source, out=out, device=options.device, resume=True, **way.options)
                runs.append(read_run(out))
    keep(runs, experiment.kept)


def table(experiment: Experiment) -> str:
    rows = [["source", "way", *OF_A_SWITCH, "at the end, whole split"]]
    for name in NAMES:
        for end, way in ways_of(name).items():
            found = [read_run(experiment.kept / directory_of(name, f"seed{seed}", end)) for seed in SEEDS]
            switched = [run for run in found if run.switch is not None]
            cells = [spread(map(of, switched)) for of in OF_A_SWITCH.values()]
            rows.append([directory_of(name), way.label, *cells, spread(run.facts.final_loss for run in found)])
    return markdown(rows, left=2)


if __name__ == "__main__":
    experiment = Experiment.named("transition")
    sources = Experiment.named("nano")
    script(__doc__, lambda: [make(sources, experiment, name) for name in NAMES], lambda: table(experiment))
