"""Figure 5: more mixtures, lower loss.

    python experiments/paper/fig5.py            # what is missing of three Nanos and three Micros; two hours of one core
    python experiments/paper/fig5.py --table    # the table of what is committed

Groups of 32 with 1 to 16 times as many experts of a 1st to a 16th of the width: the same parameters, and the FLOPs of
router and mixing grow. Expected: each step of the granularity lowers the loss. The paper's end losses are not available
to us, only that 1, 8, 16 and 32 mixtures each lower the loss (others' description of the figure). One seed; the
verdict is of the Nanos, as Micros say little with one (see `nano.py`).
"""

import micro
from nano import draw_curves, losses_of, row, table_of
from studies import CONFIRMED, CONTRADICTED, NOT_HERE, Row, Study, System

from mixture_of_tokens.formatting import Summary

MIXTURES = {k: System(f"MoT-Nano/32E/{k}".removesuffix("/1")) for k in (1, 2, 4, 8, 16)}
ROWS = [row(system) for system in MIXTURES.values()]
MICROS = [Row(system, micro.SHORT) for system in micro.MIXTURES.values()]


def says() -> tuple[str, str] | None:
    found = [Summary.of(losses_of(each).values()) for each in ROWS]
    losses = [each.mean for each in found if each is not None]
    if len(losses) < len(found):
        return None
    numbers = ", ".join(f"/{k}" for k in MIXTURES)
    measured = f"Nano, one seed, {numbers}: {', '.join(f'{loss:.3f}' for loss in losses)}"
    if losses == sorted(losses, reverse=True):
        return measured, CONFIRMED
    return measured, NOT_HERE if losses[-1] < losses[0] else CONTRADICTED


STUDY = Study(
    id="fig5",
    claim="More mixtures, lower loss",
    paper="/1, /8, /16, /32: each lower; values not available",
    rows=[*ROWS, *MICROS],
    says=says,
    table=table_of,
    draw=draw_curves,
)

if __name__ == "__main__":
    STUDY.main(__doc__)
