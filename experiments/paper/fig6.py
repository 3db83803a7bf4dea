"""Figure 6: Mixture of Tokens is on a par with the best sparse mixture of experts.

    python experiments/paper/fig6.py            # what is missing of nine runs of 1,500 steps; three hours of one core
    python experiments/paper/fig6.py --table    # the table of what is committed

Every system has the dense model's FLOPs in its experts, and 32 times its parameters. Expected: the best Mixture of
Tokens ends level with the better of Expert Choice and Token Choice, top 1 of 32 or 8 of 256 experts, by 0.01 nats. The
paper: it matches the better of Expert Choice and Token Choice (abstract; values not available). Beside these stand
routings that are younger: Token Choice with sigmoid gates and biases in place of a balancing loss, Expert Threshold and
ReMoE. Peak rates were swept for the dense model, /8 and Token Choice; the others have the same.
"""

from functools import partial

from micro import BEST_MIXTURE, DENSE, MIXTURES, SHORT, THE_PAPERS, YOUNGER, draw_curves, result_of, table_of
from studies import CONFIRMED, CONTRADICTED, NOT_HERE, Row, Study

LEVEL = 0.01


def says() -> tuple[str, str] | None:
    best, dense, *others = [result_of(Row(system, SHORT)) for system in (BEST_MIXTURE, DENSE, *THE_PAPERS, *YOUNGER)]
    losses = {
        system.label: each.loss.mean for system, each in zip((*THE_PAPERS, *YOUNGER), others, strict=True) if each
    }
    if best is None or dense is None or not losses:
        return None
    told = [f"{BEST_MIXTURE.label} {best.loss.mean:.3f}", *(f"{label} {loss:.3f}" for label, loss in losses.items())]
    measured = "; ".join([*told, f"dense {dense.loss.mean:.3f}"])
    sparse = min((losses[system.label] for system in THE_PAPERS if system.label in losses), default=dense.loss.mean)
    if best.loss.mean <= sparse + LEVEL:
        return measured, CONFIRMED
    return measured, NOT_HERE if best.loss.mean < dense.loss.mean else CONTRADICTED


STUDY = Study(
    id="fig6",
    claim="On a par with the best sparse mixture of experts",
    paper="matches the better of Expert Choice and Token Choice; values not available",
    rows=[Row(system, SHORT) for system in (DENSE, MIXTURES[4], MIXTURES[8], *THE_PAPERS, *YOUNGER)],
    says=says,
    table=partial(table_of, lengths=False),
    draw=draw_curves,
)

if __name__ == "__main__":
    STUDY.main(__doc__)
