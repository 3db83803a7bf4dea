"""Figure 6: Mixture of Tokens is on a par with the best sparse mixture of experts.

    python experiments/paper/fig6.py            # what is missing of 23 runs of 1,500 steps; eight hours of one core
    python experiments/paper/fig6.py --table    # the table of what is committed

Every system has the dense model's FLOPs in its experts, and 32 times its parameters. Expected: the best Mixture of
Tokens ends level with the best of Expert Choice and Token Choice, by 0.01 nats. Token Choice has the top 1 of 32 or 8
of 256 experts, with a capacity of 1.25 or without one, at temperatures of 0.25 and 1, the default. The paper: it
matches the better of Expert Choice and Token Choice (abstract; values not available), which drop tokens beyond a
capacity: level with those alone is parity in part. Beside these stand routings that are younger: Token Choice with
sigmoid gates and biases in place of a balancing loss, Expert Threshold and ReMoE. Peak rates were swept
(`micro.py --sweep`), but for /4 and for 8 of 256 experts with a capacity, which have the others' best.
The dense model, /8, Token Choice of one expert, Token Choice that drops nothing and the best of all have three seeds,
Token Choice of one expert at temperature 1 two, the others one. The verdict is of the means over all seeds
that there are.
What serves one text alone: `alone.py`.
"""

from dataclasses import replace
from functools import partial

from micro import (
    BEST_MIXTURE,
    DENSE,
    DROPLESS,
    MIXTURES,
    OTHER_TOKEN_CHOICES,
    SEEDS,
    SHORT,
    THE_PAPERS,
    TOKEN_CHOICE,
    YOUNGER,
    draw_curves,
    table_of,
)
from nano import losses_of, signed
from studies import Row, Said, Study, verdict

from mixture_of_tokens.utils.formatting import Summary

LEVEL = 0.01
WITH_SEEDS = (DENSE, BEST_MIXTURE, TOKEN_CHOICE, DROPLESS, YOUNGER[0])
BASELINES = (*THE_PAPERS, *OTHER_TOKEN_CHOICES, DROPLESS)
WITH_CAPACITY = [system for system in BASELINES if "capacity_factor" not in system.model]
SYSTEMS = (DENSE, MIXTURES[4], BEST_MIXTURE, *BASELINES, *YOUNGER)
WITH_TWO = OTHER_TOKEN_CHOICES[:1]
ROWS = [
    Row(system, SHORT, SEEDS[: 3 if system in WITH_SEEDS else 2 if system in WITH_TWO else 1]) for system in SYSTEMS
]


def says() -> Said | None:
    rows = {row.system.label: row for row in ROWS}
    mean = {label: Summary.of(losses_of(row).values()) for label, row in rows.items()}
    mixture, bases = mean[BEST_MIXTURE.label], {system.label: mean[system.label] for system in BASELINES}
    if mixture is None or None in bases.values():
        return None
    over = {label: mixture.mean - base.mean for label, base in bases.items() if base}
    seeds = {label: "one seed" if base.seeds == 1 else f"{base.seeds} seeds" for label, base in bases.items() if base}
    best, capped = (
        max((system.label for system in systems), key=lambda label: over[label])
        for systems in (BASELINES, WITH_CAPACITY)
    )
    told = [
        f"{signed(over[label])} over the best of {what} ({label}, {seeds[label]})"
        for label, what in ((best, "Token and Expert Choice"), (capped, "those with a capacity"))
    ]
    return [f"{BEST_MIXTURE.label} {told[0]}", told[1]], verdict(over[best] <= LEVEL, in_part=over[capped] <= LEVEL)


def draw(study: Study) -> None:
    """The curves, which begin as one, without those of another temperature alone: there are ten others."""
    rows = [row for row in study.rows if row.system not in OTHER_TOKEN_CHOICES]
    draw_curves(replace(study, rows=rows), since=0.5)


STUDY = Study(
    id="fig6",
    claim="On a par with the best sparse mixture of experts",
    paper="matches the better of Expert Choice and Token Choice",
    rows=ROWS,
    says=says,
    table=partial(table_of, lengths=False),
    draw=draw,
)

if __name__ == "__main__":
    STUDY.main(__doc__)
