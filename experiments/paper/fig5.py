"""Figure 5: more mixtures, lower loss.

    python experiments/paper/fig5.py            # what is missing of five Nanos and five Micros; two hours of one core
    python experiments/paper/fig5.py --table    # the table of what is committed

Groups of 32 with 1 to 16 times as many experts of a 1st to a 16th of the width: the same parameters, and the FLOPs of
router and mixing grow. Expected: each step of the granularity lowers the loss. The paper's end losses are not available
to us, only that 1, 8, 16 and 32 mixtures each lower the loss (others' description of the figure). One seed, of which a
Micro's says less (see `nano.py`).
"""

import micro
from nano import draw_curves, losses_of, row, table_of
from studies import Row, Said, Study, System, verdict

GRANULARITIES = (1, 2, 4, 8, 16)


def name_of(size: str, granularity: int) -> str:
    return f"MoT-{size}/32E/{granularity}".removesuffix("/1")


ROWS = {
    "Nano": [row(System(name_of("Nano", granularity))) for granularity in GRANULARITIES],
    "Micro": [Row(System(name_of("Micro", granularity)), micro.SHORT) for granularity in GRANULARITIES],
}


def says() -> Said | None:
    told, ordered, lower = [], [], []
    for size, rows in ROWS.items():
        if not all(row.complete for row in rows):
            return None
        losses = [next(iter(losses_of(row).values())) for row in rows]
        told.append(f"{size} {', '.join(f'{loss:.3f}' for loss in losses)}")
        ordered.append(losses == sorted(losses, reverse=True))
        lower.append(losses[-1] < losses[0])
    return told, verdict(all(ordered), in_part=all(lower))


STUDY = Study(
    id="fig5",
    claim="More mixtures, lower loss",
    paper="/1, /8, /16, /32: each lower",
    heading=f"{', '.join(f'/{granularity}' for granularity in GRANULARITIES)}, one seed",
    rows=[row for rows in ROWS.values() for row in rows],
    says=says,
    table=table_of,
    draw=draw_curves,
)

if __name__ == "__main__":
    STUDY.main(__doc__)
