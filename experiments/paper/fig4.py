"""Figure 4: more experts, lower loss; a learned router beats a uniform one.

    python experiments/paper/fig4.py            # what is missing of six Nanos and six Micros; two hours of one core
    python experiments/paper/fig4.py --table    # the table of what is committed

Groups of 8, 32 and 64 with as many experts of the dense model's width, so as many times the parameters of a sparse
block at the same FLOPs. Documents are cut shorter for groups of 64, and other ones are held out, so these losses are of
another text and stand beside a dense model of that text. Expected: each lowers the loss under the dense model's by
more, and mixing with equal weights gains next to nothing. The paper's end losses are not available to us, only that 8,
32 and 128 experts each lower the loss (others' description of the figure). One seed, of which a Micro's says less (see
`nano.py`).
"""

import micro
from nano import against, draw_curves, row, signed, table_of
from studies import Row, Said, Study, System, verdict

LEARNED = (8, 32, 64)  # numbers of experts
SIZES = ("Nano", "Micro")
COMMON = 32  # up to this size of groups models share a text


def row_of(name: str, **model: str) -> Row:
    system = System(name, model)
    return row(system) if "-Nano" in name else Row(system, micro.SHORT)


def dense(size: str, experts: int = COMMON) -> Row:
    return row_of(f"Transformer-{size}", **({} if experts <= COMMON else {"group_size": str(experts)}))


def learned(size: str, experts: int) -> Row:
    return row_of(f"MoT-{size}/{experts}E")


def uniform(size: str) -> Row:
    return row_of(f"Uniform-{size}/{COMMON}E")


def rows_of(size: str) -> list[Row]:
    of_one_text = [dense(size), *(learned(size, experts) for experts in LEARNED if experts <= COMMON)]
    others = [each(size, experts) for experts in LEARNED if experts > COMMON for each in (dense, learned)]
    return [*of_one_text, uniform(size), *others]


ROWS = [row for size in SIZES for row in rows_of(size)]


def says() -> Said | None:
    if not all(row.complete for row in ROWS):
        return None
    told, ordered, right = [], [], []
    for size in SIZES:
        above = {experts: _above_dense(learned(size, experts), dense(size, experts)) for experts in LEARNED}
        even = _above_dense(uniform(size), dense(size))
        told.append(f"{size} {', '.join(map(signed, above.values()))}, uniform weights {signed(even)}")
        losses = [0.0, *above.values()]
        ordered.append(losses == sorted(losses, reverse=True) and even > above[COMMON])
        right.append(above[COMMON] < 0 and even > above[COMMON])
    return told, verdict(all(ordered), in_part=all(right))


def _above_dense(its: Row, dense: Row) -> float:
    found = against(its, dense)
    assert found is not None
    return found.mean


STUDY = Study(
    id="fig4",
    claim="More experts, lower loss; a learned router beats a uniform one",
    paper="8, 32, 128 experts: each lower",
    heading=f"over the dense model, with {', '.join(map(str, LEARNED))} experts, one seed",
    rows=ROWS,
    says=says,
    table=table_of,
    draw=draw_curves,
)

if __name__ == "__main__":
    STUDY.main(__doc__)
