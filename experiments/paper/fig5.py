"""Figure 5: more mixtures, lower loss.

    python experiments/paper/fig5.py            # what is missing of six runs of 1,500 steps; 70 minutes of two cores
    python experiments/paper/fig5.py --table    # the table of what is committed

Granularity 1 to 16 in groups of 32: the same parameters and the same FLOPs in the experts, cut into more and narrower
ones. Expected: each doubling lowers the loss. The paper's end losses are
not available to us, only that each of 1, 8, 16 and 32 is below the one before it (others' description of the figure).
"""

from micro import DENSE, MIXTURES, SHORT, draw_curves, result_of, table_of
from studies import CONFIRMED, CONTRADICTED, NOT_HERE, Row, Study


def says() -> tuple[str, str] | None:
    found = [result_of(system, SHORT) for system in MIXTURES.values()]
    if None in found:
        return None
    losses = [each.loss.mean for each in found if each is not None]
    measured = "/1 to /16: " + ", ".join(f"{loss:.3f}" for loss in losses)
    if losses == sorted(losses, reverse=True):
        return measured, CONFIRMED
    return measured, NOT_HERE if losses[-1] < losses[0] else CONTRADICTED


STUDY = Study(
    id="fig5",
    claim="More mixtures, lower loss",
    paper="/1, /8, /16, /32: each lower; values not available",
    rows=[Row(system, SHORT) for system in (DENSE, *MIXTURES.values())],
    says=says,
    table=table_of,
    draw=draw_curves,
)

if __name__ == "__main__":
    STUDY.main(__doc__)
