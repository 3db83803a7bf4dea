"""Figure 6: Mixture of Tokens is on a par with the best sparse mixture of experts.

    python experiments/paper/fig6.py            # what is missing of nine runs of 1,500 steps; two hours of two cores
    python experiments/paper/fig6.py --table    # the table of what is committed

Every system has the dense model's FLOPs in its experts, and 32 times its parameters. Token Choice also with 8 of 256
narrow experts, and with sigmoid gates and biases in place of a balancing loss. Expected: the best Mixture of Tokens
ends level with the best of the others, by 0.01 nats. The paper: it matches the better of Expert Choice and Token
Choice (abstract; values not available).
"""

from micro import BEST_MIXTURE, DENSE, MIXTURES, SHORT, SPARSE, draw_curves, result_of, table_of
from studies import CONFIRMED, CONTRADICTED, NOT_HERE, OPEN, Row, Study

LEVEL = 0.01


def says() -> tuple[str, str] | None:
    best, dense = result_of(BEST_MIXTURE, SHORT), result_of(DENSE, SHORT)
    found = {system.label: result for system in SPARSE if (result := result_of(system, SHORT)) is not None}
    if best is None or dense is None or not found:
        return None
    label, sparse = min(found.items(), key=lambda item: item[1].loss.mean)
    measured = f"{BEST_MIXTURE.label} {best.loss.mean:.3f}; {label}, the best of {len(found)}, {sparse.loss.mean:.3f}"
    measured += f"; dense {dense.loss.mean:.3f}"
    if len(found) < len(SPARSE):
        return measured, OPEN
    if best.loss.mean <= sparse.loss.mean + LEVEL:
        return measured, CONFIRMED
    return measured, NOT_HERE if best.loss.mean < dense.loss.mean else CONTRADICTED


STUDY = Study(
    id="fig6",
    claim="On a par with the best sparse mixture of experts",
    paper="matches the better of Expert Choice and Token Choice; values not available",
    rows=[Row(system, SHORT) for system in (DENSE, MIXTURES[4], MIXTURES[8], *SPARSE)],
    says=says,
    table=table_of,
    draw=draw_curves,
)

if __name__ == "__main__":
    STUDY.main(__doc__)
