"""Figure 6: Mixture of Tokens is on a par with the best sparse mixture of experts.

    python experiments/paper/fig6.py            # what is missing of 20 runs of 1,500 steps; eight hours of one core
    python experiments/paper/fig6.py --table    # the table of what is committed

Every system has the dense model's FLOPs in its experts, and 32 times its parameters. Expected: the best Mixture of
Tokens ends level with the best of Expert Choice and Token Choice, by 0.01 nats; Token Choice has the top 1 of 32 or 8
of 256 experts with a capacity of 1.25, or 8 of 256 with nothing dropped, at the default temperature. The paper: it
matches the better of Expert Choice and Token Choice (abstract; values not available). Beside these stand routings that
are younger: Token Choice with sigmoid gates and biases in place of a balancing loss, Expert Threshold and ReMoE. Peak
rates were swept (`micro.py --sweep`), but for /4 and for 8 of 256 experts with a capacity, which have the others' best.
The dense model, /8, Token Choice of one expert, Token Choice that drops nothing and the best of all have three seeds,
the others one. The verdict is of the seeds that /8 and another have. What serves one text alone: `alone.py`.
"""

from functools import partial

from micro import (
    BEST_MIXTURE,
    DENSE,
    DROPLESS,
    MIXTURES,
    SEEDS,
    SHORT,
    THE_PAPERS,
    TOKEN_CHOICE,
    YOUNGER,
    draw_curves,
    table_of,
)
from nano import against, signed
from studies import CONFIRMED, CONTRADICTED, NOT_HERE, Row, Study

LEVEL = 0.01
FIRST = SEEDS[0]
WITH_SEEDS = (DENSE, BEST_MIXTURE, TOKEN_CHOICE, DROPLESS, YOUNGER[0])
SYSTEMS = (DENSE, MIXTURES[4], BEST_MIXTURE, *THE_PAPERS, DROPLESS, *YOUNGER)
BASELINES = (*THE_PAPERS, DROPLESS)
ROWS = [Row(system, SHORT, SEEDS if system in WITH_SEEDS else (FIRST,)) for system in SYSTEMS]


def says() -> tuple[str, str] | None:
    rows = {row.system.label: row for row in ROWS}
    above = {system.label: against(rows[BEST_MIXTURE.label], rows[system.label]) for system in (DENSE, *BASELINES)}
    if None in above.values():
        return None
    over = {label: found.mean for label, found in above.items() if found}
    best = max((system.label for system in BASELINES), key=lambda label: over[label])
    told = f"{BEST_MIXTURE.label} over the best of Token and Expert Choice ({best}), seed by seed, {signed(over[best])}"
    if over[best] <= LEVEL:
        return told, CONFIRMED
    return told, NOT_HERE if over[DENSE.label] < 0 else CONTRADICTED


STUDY = Study(
    id="fig6",
    claim="On a par with the best sparse mixture of experts",
    paper="matches the better of Expert Choice and Token Choice; values not available",
    rows=ROWS,
    says=says,
    table=partial(table_of, lengths=False),
    draw=partial(draw_curves, since=0.5),  # ten curves begin as one
)

if __name__ == "__main__":
    STUDY.main(__doc__)
