"""Figure 7: the dense model's final loss in a third of its steps and of its time, for four lengths of training.

    python experiments/paper/fig7.py            # what is missing of 1,500 to 12,000 steps; eight hours of two cores
    python experiments/paper/fig7.py --table    # the table of what is committed

The same systems for 12, 25, 49 and 98 million tokens, each with a schedule of its own length: one seed of all, three of
the shortest. The text has 75 million tokens, so only the longest runs see some of it twice. Expected at 49
million: at most 0.45 of the steps and 0.5 of the time, which is where the verdict looks. The paper: 33 % of the compute
for the best Base (caption of figure 7); the authors' Mini needs 25 % of 250,000 steps and 31 % of the time (plot data
of their blog post).
"""

import math

from micro import BEST_MIXTURE, DENSE, LENGTHS, SEEDS, SHORT, TOKEN_CHOICE, TOKENS, draw_curves, result_of, table_of
from studies import Row, Said, Study, verdict

SYSTEMS = (DENSE, BEST_MIXTURE, TOKEN_CHOICE)
RUNS = ((SHORT, SEEDS), *((steps, SEEDS[:1]) for steps in LENGTHS))  # the one seed has all lengths
ROWS = [Row(system, steps, seeds) for steps, seeds in RUNS for system in SYSTEMS]
AT, TARGET = LENGTHS[2], (0.45, 0.5)  # of the steps and of the time, at 49 million tokens


def says() -> Said | None:
    """Told are the shortest and the longest runs, and those that decide."""
    shown, of_steps, of_time = [], math.inf, math.inf
    for row in ROWS:
        if row.system != BEST_MIXTURE or (found := result_of(row)) is None:
            continue
        never = found.steps is None or found.time is None
        shares = "never" if never else f"{found.steps.mean:.2f} of the steps and {found.time.mean:.2f} of the time"
        seeds = f" ({len(row.seeds)} seeds)" if len(row.seeds) > 1 else ""
        if row.steps in (LENGTHS[0], AT, LENGTHS[-1]):
            shown.append(f"{shares} after {row.steps * TOKENS / 1e6:.0f} M tokens{seeds}")
        if row.steps == AT and not never:
            of_steps, of_time = found.steps.mean, found.time.mean
    if not shown:
        return None
    return shown, verdict(of_steps <= TARGET[0] and of_time <= TARGET[1], in_part=of_time < 1)


STUDY = Study(
    id="fig7",
    claim="The dense loss in a third of the steps and of the time",
    paper="0.33 of the compute (Base); 0.25 of the steps, 0.31 of the time (Mini)",
    rows=ROWS,
    says=says,
    table=table_of,
    draw=lambda study: draw_curves(study, LENGTHS[-1]),
)

if __name__ == "__main__":
    STUDY.main(__doc__)
