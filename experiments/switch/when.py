"""When to switch: how much of the time of a training is best spent in groups (docs/results/conversion.md).

    python experiments/switch/when.py            # what is missing; some four hours of one core
    python experiments/switch/when.py --table    # Markdown

A training may take the time of BUDGET steps of the dense Nano, as in ../verdict/fresh.py, whose times of a step and of
distillation these are. For a share of it MoT-Nano/32E/4 trains in groups, at a constant rate after its warm-up. It is
then switched to 4 of 128 experts a token, which takes time too, and trains on as that, while the rate falls from
RATE_AFTER, at a tenth of the time the best of three (../verdict/fresh-rates.csv). With share 0 the sparse model trains
from scratch, at RATE_FROM_SCRATCH, the best of three too. KEPT trains in groups for all of the time, in which the rate
falls, and is not switched: it is served alone, a token by as many experts as the others have.

The text is the source of the installed packages, of which nothing is read twice. Losses are of its tuning split,
each row alone; the seeds are those of no result. when.csv has a row each.
"""

import itertools
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from mixture_of_tokens import train, transition
from mixture_of_tokens.conversion.transition import Transitioned
from mixture_of_tokens.runs.run import read_run
from mixture_of_tokens.settings.options import Options
from mixture_of_tokens.utils.formatting import loss, markdown

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import Experiment, directory_of, loss_alone, once, read_csv, script, steps_of_early_switch

MIXTURE, SPARSE, SEEDS = "MoT-Nano/32E/4", "TC-Nano/32E/4", (0, 4)
BUDGET = 7000  # steps of the dense model
KEPT = "kept"
SHARES = (0.1, 0.25, 0.05, 0.5, 0.0, 0.75, 0.9, KEPT)  # in the order in which they are measured
DISTIL_STEPS, TIMED_STEPS = 500, 2000  # for a layer, here and where it was timed
OPTIONS = Options(device="cpu", evaluate_on="tuning", data=["packages"])
CONSTANT = {"lr_scheduler_type": "constant_with_warmup"}
DROPLESS, RATE_FROM_SCRATCH, RATE_AFTER = {"capacity_factor": "null"}, 0.005, 0.01


class Times(NamedTuple):
    """Of a step in groups, of one after the switch, and of DISTIL_STEPS of distillation, in dense steps."""

    before: float
    after: float
    distilling: float

    @classmethod
    def of(cls, experiments: Path) -> "Times":
        rows = {row["system"]: row for row in read_csv(experiments / "verdict" / "fresh-timings.csv")}
        mixture, sparse = rows[f"{MIXTURE}, switched"], rows[f"{SPARSE}, capacity_factor null"]
        before, after = (float(row["share_of_dense"]) for row in (mixture, sparse))
        return cls(before, after, float(mixture["distil_steps_of_dense"]) * DISTIL_STEPS / TIMED_STEPS)


class Steps(NamedTuple):
    before: int
    after: int


def steps_of(share: float | str, times: Times) -> Steps:
    """In groups, and after the switch."""
    if isinstance(share, str):
        return Steps(int(BUDGET / times.before), 0)
    if share == 0:
        return Steps(0, int(BUDGET / times.after))
    how = {"before": times.before, "after": times.after, "fit": times.distilling}
    return Steps(*steps_of_early_switch(BUDGET, share, **how))


def loss_of(experiment: Experiment, share: float | str, seed: int, steps: Steps) -> float:
    if not steps.before:
        out = experiment.trained / directory_of(SPARSE, "when", BUDGET, f"seed{seed}")
        options = replace(OPTIONS, steps=steps.after, model=DROPLESS)
        train(SPARSE, out=out, seed=seed, learning_rate=RATE_FROM_SCRATCH, options=options, resume=True)
        return read_run(out).facts.final_loss
    out = experiment.trained / directory_of(MIXTURE, "when", BUDGET, share, f"seed{seed}")
    options = replace(OPTIONS, steps=steps.before, training=CONSTANT if steps.after else {})
    train(MIXTURE, out=out, seed=seed, options=options, resume=True)
    if share == KEPT:
        return loss_alone(out, "tuning")
    later: dict[str, Any] = {"schedule": "decay", "learning_rate": RATE_AFTER, "distil_steps": DISTIL_STEPS}
    made = transition(out, steps=steps.after, device="cpu", resume=True, **later)
    assert isinstance(made, Transitioned)
    return made.final_loss


def measured(experiment: Experiment, share: float | str, seed: int, steps: Steps) -> list[dict[str, object]]:
    return [{"loss": loss_of(experiment, share, seed, steps)}]


def make(experiment: Experiment) -> None:
    times = Times.of(experiment.kept.parent)
    for seed, share in itertools.product(SEEDS, SHARES):
        key, steps = {"budget": BUDGET, "share": share, "seed": seed}, steps_of(share, times)
        settings = {"steps": steps.before, "after": steps.after}
        once(experiment.kept / "when.csv", key, measured, experiment, share, seed, steps, settings=settings)


def table(kept: Path) -> str:
    found = {(row["share"], row["seed"]): row for row in read_csv(kept / "when.csv")}
    shares = {share for share, _ in found}
    lines = [["time in groups", "steps in groups", "steps after the switch", *(f"loss, seed {seed}" for seed in SEEDS)]]
    for share in sorted(shares - {KEPT}, key=float) + [KEPT] * (KEPT in shares):
        own: list[Mapping[str, str]] = [found.get((share, str(seed)), {}) for seed in SEEDS]
        first = next(filter(None, own))
        steps = (f"{int(first[key]):,}" for key in ("steps", "after"))
        title = "all, and not switched" if share == KEPT else f"{float(share):.0%}"
        lines.append([title, *steps, *(loss(float(row["loss"])) if row else "" for row in own)])
    return markdown(lines, left=1)


if __name__ == "__main__":
    experiment = Experiment.named("switch")
    script(__doc__, lambda: make(experiment), lambda: table(experiment.kept))
