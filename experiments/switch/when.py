"""When to switch: how much of the time of a training is best spent in groups (docs/conversion.md).

    python experiments/switch/when.py            # what is missing; some three hours of one core
    python experiments/switch/when.py --table    # Markdown

A training may take the time of BUDGET steps of the dense Nano. For a share of it MoT-Nano/32E/8 trains in groups, at a
constant rate after its warm-up. It is then switched to 8 of 256 experts a token, which takes time too, and trains on as
that, while the rate falls to a tenth. With share 1 the rate falls in groups, and nothing follows the switch; with share
0 the sparse model trains from scratch, at the better of two rates. KEPT trains in groups for all of the time and is not
switched: it is served alone, a token by as many experts as the others have. Steps are those that fit into the time, at
the times of a step in STEP.

The text is the source of the installed packages, of which nothing is read twice. Losses are of its tuning split,
each row alone; one seed, 0, which no result uses. when.csv has a row each.
"""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from mixture_of_tokens import train, transition
from mixture_of_tokens.convert.transition import Transitioned
from mixture_of_tokens.formatting import loss, markdown
from mixture_of_tokens.runs.run import read
from mixture_of_tokens.training.options import Options

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import Experiment, directory_of, loss_alone, once, read_csv, script

MIXTURE, SPARSE, SEED = "MoT-Nano/32E/8", "TC-Nano/32E/8", 0
BUDGET = 6000  # steps of the dense model
STEP = {MIXTURE: 1.65, SPARSE: 1.95}  # of a dense step's time, before the balancing loss became cheaper (../LOG.md)
DISTIL_STEPS, DISTILLING = 500, 300  # a layer, and the time of that in dense steps: 25 s on two idle cores
KEPT = "kept"
SHARES = (1.0, 0.5, 0.0, 0.75, 0.25, KEPT, 0.9, 0.1)  # in the order in which they are measured
OPTIONS = Options(device="cpu", evaluate_on="tuning", data=["packages"])
CONSTANT = {"lr_scheduler_type": "constant_with_warmup"}
# Of the sparse model from scratch: nothing dropped, as after a switch, and the better of two rates (../LOG.md).
DROPLESS, RATE = {"capacity_factor": "null"}, 0.01


class Steps(NamedTuple):
    before: int
    after: int


def steps_of(share: float | str) -> Steps:
    """In groups, and after the switch."""
    if isinstance(share, str):
        return Steps(round(BUDGET / STEP[MIXTURE]), 0)
    if share == 0:
        return Steps(0, round(BUDGET / STEP[SPARSE]))
    before = share * BUDGET if share < 1 else BUDGET - DISTILLING
    left = max(0.0, BUDGET - DISTILLING - before)
    return Steps(round(before / STEP[MIXTURE]), round(left / STEP[SPARSE]))


def loss_of(experiment: Experiment, share: float | str) -> float:
    steps = steps_of(share)
    if not steps.before:
        out = experiment.trained / directory_of(SPARSE, "when", BUDGET)
        options = replace(OPTIONS, steps=steps.after, model=DROPLESS)
        train(SPARSE, out=out, seed=SEED, learning_rate=RATE, options=options, resume=True)
        return read(out).facts.final_loss
    out = experiment.trained / directory_of(MIXTURE, "when", BUDGET, share)
    options = replace(OPTIONS, steps=steps.before, training=CONSTANT if steps.after else {})
    train(MIXTURE, out=out, seed=SEED, options=options, resume=True)
    if share == KEPT:
        return loss_alone(out, "tuning")
    asked_for: dict[str, Any] = {"steps": steps.after, "schedule": "decay" if steps.after else "own"}
    made = transition(out, distil_steps=DISTIL_STEPS, device="cpu", resume=True, **asked_for)
    assert isinstance(made, Transitioned)
    return made.final_loss


def measured(experiment: Experiment, share: float | str) -> list[dict[str, object]]:
    return [{"loss": loss_of(experiment, share)}]


def make(experiment: Experiment) -> None:
    for share in SHARES:
        key, steps = {"budget": BUDGET, "share": share}, steps_of(share)
        settings = {"seed": SEED, "steps": steps.before, "after": steps.after}
        once(experiment.kept / "when.csv", key, measured, experiment, share, settings=settings)


def table(kept: Path) -> str:
    rows = [["time in groups", "steps in groups", "steps after the switch", "loss, alone"]]
    found = {row["share"]: row for row in read_csv(kept / "when.csv") if row["budget"] == str(BUDGET)}
    for share in sorted(found.keys() - {KEPT}, key=float) + [KEPT] * (KEPT in found):
        steps = (f"{int(found[share][key]):,}" for key in ("steps", "after"))
        title = "all, and not switched" if share == KEPT else f"{float(share):.0%}"
        rows.append([title, *steps, loss(float(found[share]["loss"]))])
    return markdown(rows, left=1)


if __name__ == "__main__":
    experiment = Experiment.named("switch")
    script(__doc__, lambda: make(experiment), lambda: table(experiment.kept))
