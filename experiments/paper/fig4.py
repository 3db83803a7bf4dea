"""Figure 4: more experts, lower loss; a learned router beats a uniform one.

    python experiments/paper/fig4.py            # what is missing of five runs of 1,500 steps; an hour of two cores
    python experiments/paper/fig4.py --table    # the table of what is committed

Groups of 8, 32 and 64 with as many experts of the dense model's width, so 8, 32 and 64 times the parameters of a sparse
block at the same FLOPs. A batch has 64 rows, so 64 is the most. Expected: each lowers the loss, and mixing with equal
weights gains next to nothing over the dense model. The paper's end losses are not available to us, only that 8, 32 and
128 experts each lower the loss (others' description of the figure).
"""

from micro import DENSE, EXPERTS, SHORT, UNIFORM, draw_curves, result_of, table_of
from studies import CONFIRMED, CONTRADICTED, NOT_HERE, Row, Study


def says() -> tuple[str, str] | None:
    found = [result_of(system, SHORT) for system in (DENSE, *EXPERTS.values(), UNIFORM)]
    if None in found:
        return None
    dense, *losses, uniform = [each.loss.mean for each in found if each is not None]
    measured = f"8, 32, 64: {', '.join(f'{loss:.3f}' for loss in losses)}; uniform {uniform:.3f}; dense {dense:.3f}"
    if [dense, *losses] == sorted([dense, *losses], reverse=True) and uniform > losses[1]:
        return measured, CONFIRMED
    return measured, NOT_HERE if losses[-1] < dense and uniform > losses[1] else CONTRADICTED


STUDY = Study(
    id="fig4",
    claim="More experts, lower loss; a learned router beats a uniform one",
    paper="8, 32, 128 experts: each lower; values not available",
    rows=[Row(system, SHORT) for system in (DENSE, *EXPERTS.values(), UNIFORM)],
    says=says,
    table=table_of,
    draw=draw_curves,
)

if __name__ == "__main__":
    STUDY.main(__doc__)
