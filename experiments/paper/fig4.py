"""Figure 4: more experts, lower loss; a learned router beats a uniform one.

    python experiments/paper/fig4.py            # what is missing of two Nanos; twenty minutes of one core
    python experiments/paper/fig4.py --table    # the table of what is committed

Groups of 8 and of 32 with as many experts of the dense model's width, so 8 and 32 times the parameters of a sparse
block at the same FLOPs. Larger groups are missing: documents are cut shorter for them, and other ones are held out, so
that their losses are of another text. Expected: each lowers the loss, and mixing with equal weights gains next to
nothing over the dense model. The paper's end losses are not available to us, only that 8, 32 and 128 experts each lower
the loss (others' description of the figure). One seed.
"""

from nano import DENSE, draw_curves, losses_of, row, table_of
from studies import CONFIRMED, CONTRADICTED, NOT_HERE, Study, System

from mixture_of_tokens.formatting import Summary

EXPERTS = {group: System(f"MoT-Nano/{group}E") for group in (8, 32)}
UNIFORM = System("Uniform-Nano/32E")
ROWS = [row(system) for system in (DENSE, *EXPERTS.values(), UNIFORM)]


def says() -> tuple[str, str] | None:
    found = [Summary.of(losses_of(each).values()) for each in ROWS]
    means = [each.mean for each in found if each is not None]
    if len(means) < len(found):
        return None
    dense, *losses, uniform = means
    learned = losses[list(EXPERTS).index(32)]
    numbers = ", ".join(map(str, EXPERTS))
    measured = f"Nano, one seed, {numbers} experts: {', '.join(f'{loss:.3f}' for loss in losses)}; "
    measured += f"uniform weights {uniform:.3f}; dense {dense:.3f}"
    if [dense, *losses] == sorted([dense, *losses], reverse=True) and uniform > learned:
        return measured, CONFIRMED
    return measured, NOT_HERE if losses[-1] < dense and uniform > learned else CONTRADICTED


STUDY = Study(
    id="fig4",
    claim="More experts, lower loss; a learned router beats a uniform one",
    paper="8, 32, 128 experts: each lower; values not available",
    rows=ROWS,
    says=says,
    table=table_of,
    draw=draw_curves,
)

if __name__ == "__main__":
    STUDY.main(__doc__)
