"""Whether a Micro gains by an early switch, as a Nano does (../verdict): a quarter of the steps in groups.

    python experiments/paper/early.py            # what is missing; 25 minutes of one core for each 1,500 steps
    python experiments/paper/early.py --table    # the table

MoT-Micro/32E/4 trains in groups at a constant rate, after a warm-up of a tenth of that. It is then distilled, with as
many steps for a layer as the Nanos, and trains on as Token Choice of 4 of 128 experts, while the rate falls. Beside it
is that model from scratch, with as many steps in all, and the two best of figure 6. The rate of all, before the switch
and after it, is the best of three of those two (`micro.py --sweep`). Losses are of the whole validation text, each row
alone. What the distillation takes comes on top, in seconds of one thread that shared the machine.
Expected: below Token Choice from scratch on every seed.
"""

import sys
from pathlib import Path

from fig8 import TRANSITION
from micro import DROPLESS, SHORT, YOUNGER
from studies import EXPERIMENT, FIRST_SEEDS, SIZES, Row, System, trained, with_weights

from mixture_of_tokens import transition
from mixture_of_tokens.runs.run import read_run
from mixture_of_tokens.utils.formatting import loss, markdown

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import keep, script, signed

SHARE, DISTIL_STEPS, RATE = 0.25, 500, 8e-3
MIXTURE = System("MoT-Micro/32E/4", training={"lr_scheduler_type": "constant_with_warmup"}, title="constant rate")
FROM_SCRATCH = System("TC-Micro/32E/4", DROPLESS.model)
ROWS = [Row(FROM_SCRATCH, SHORT, (2, 3)), Row(FROM_SCRATCH, 2 * SHORT)]
RUNS = [(row.steps, seed) for row in ROWS for seed in row.seeds]


def in_groups(steps: int) -> int:
    return int(SHARE * steps)


def file_of(steps: int, seed: int) -> Path:
    return TRANSITION / f"{MIXTURE.directory(in_groups(steps), seed)}-switched.json"


def make() -> None:
    trained(ROWS)
    for steps, seed in RUNS:
        if not file_of(steps, seed).is_file():
            source = with_weights(MIXTURE, in_groups(steps), seed)
            out = EXPERIMENT.trained / file_of(steps, seed).stem
            how = {"schedule": "decay", "learning_rate": RATE, "distil_steps": DISTIL_STEPS}
            after = steps - in_groups(steps)
            transition(source, out=out, steps=after, device=SIZES["Micro"].device, resume=True, **how)
            keep([read_run(out)], TRANSITION, first_seed=FIRST_SEEDS["Micro"])


def table() -> str:
    """Of every run the loss, and how far it is above the mixture's that was switched."""
    others = (FROM_SCRATCH, DROPLESS, YOUNGER[0])
    lines = [
        ["steps", "seed", f"{MIXTURE.name}, switched after {SHARE:.0%}", "fit, s", *(each.label for each in others)]
    ]
    for steps, seed in RUNS:
        if not file_of(steps, seed).is_file():
            continue
        early = read_run(file_of(steps, seed))
        cells = [f"{steps:,}", str(seed), loss(early.facts.final_loss)]
        cells.append("" if early.switch is None else f"{early.switch.fit_seconds or 0:.0f}")
        for system in others:
            ends = [run.facts.final_loss for run in Row(system, steps, (seed,)).runs.values()]
            cells.append("".join(f"{loss(end)} ({signed(end - early.facts.final_loss)})" for end in ends))
        lines.append(cells)
    return markdown(lines, left=2)


if __name__ == "__main__":
    script(__doc__, make, table)
