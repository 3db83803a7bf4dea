"""Length: a Micro gains as much over the dense model as a Nano does after as many tokens for each of its parameters.

    python experiments/paper/length.py            # what is missing of Nanos of 150 to 2,400 steps; 40 minutes
    python experiments/paper/length.py --table    # the table of what is committed

Figure 7's question for Nanos of six lengths, beside its Micros. Nanos of 1,200 and of 12,000 steps are those of
`../nano` and `../long`; from 2,400 steps on they read their text more than once, at 12,000 nearly nine times. Expected:
the share of the dense model's steps at which a Micro reaches its loss is within 0.05 of a Nano's after as many tokens a
parameter of the dense model, so that what the Micros of figure 7 lack is length alone. The paper: 0.25 of the steps for
a Mini of 29 M parameters after 16,400 M tokens, which is 565 a parameter (plot data of its authors' blog post).
Shares are means over the seeds that are kept, of most lengths one. As long as those of one length differ by more than a
Micro is away from the Nanos, the verdict is open.
"""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import micro
import nano
import numpy as np
from studies import CONFIRMED, CONTRADICTED, EXPERIMENT, FIRST_SEEDS, OPEN, Row, Said, Study, System

from mixture_of_tokens.reports.comparison import reached
from mixture_of_tokens.runs.run import Run
from mixture_of_tokens.utils.formatting import Summary, loss, markdown, ratio

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pictures import Curve, save_picture

LEVEL = 0.05
LONG = 12_000  # steps of the runs of `../long`, which that trains, with fewer evaluations


class Size(NamedTuple):
    """The dense model, the mixture and Token Choice of a size, and their lengths."""

    name: str
    systems: tuple[System, System, System]
    lengths: tuple[int, ...]


NANO = Size("Nano", (nano.DENSE, nano.BASE, System("TC-Nano/32E")), (150, 300, 600, 1200, 2400, LONG))
MICRO = Size("Micro", (micro.DENSE, micro.BEST_MIXTURE, micro.TOKEN_CHOICE), micro.LENGTHS)
MIXTURE = 1  # of the systems of a size
SEEDS = 3  # at most, from the first seed of a size


class Gain(NamedTuple):
    """A system's final loss, and what it needs to reach the dense model's, as shares; None where it never does."""

    loss: Summary
    steps: Summary | None
    flops: Summary | None


class Point(NamedTuple):
    """A length. Gains are those of the systems but the dense one; None for one without a run."""

    tokens: int
    per_parameter: float
    dense: Summary
    gains: list[Gain | None]


def points(size: Size) -> list[Point]:
    """Those lengths of which a dense run is kept."""
    found = []
    for steps in size.lengths:
        first = FIRST_SEEDS[size.name]
        dense, *others = [Row(system, steps, range(first, first + SEEDS)).runs for system in size.systems]
        over = Summary.of(run.facts.final_loss for run in dense.values())
        if over is not None:
            facts = next(iter(dense.values())).facts
            found.append(
                Point(facts.tokens, facts.tokens / facts.parameters, over, [gain(its, dense) for its in others])
            )
    return found


def gain(runs: Mapping[int, Run], dense: Mapping[int, Run]) -> Gain | None:
    losses = Summary.of(run.facts.final_loss for run in runs.values())
    at = [reached(run, dense[seed]) for seed, run in runs.items() if seed in dense]
    if losses is None:
        return None
    if None in at:
        return Gain(losses, None, None)
    known = [each for each in at if each]
    return Gain(losses, Summary.of(each.of_steps for each in known), Summary.of(each.of_flops for each in known))


def line(size: Size, number: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens a parameter, and the share of the steps of the system of this number, of which 0 is the dense one."""
    known = [(each.per_parameter, found.mean) for each in points(size) if (found := steps_of(each, number))]
    x, y = zip(*known, strict=True) if known else ((), ())
    return np.array(x), np.array(y)


def steps_of(point: Point, number: int) -> Summary | None:
    found = point.gains[number - 1]
    return None if found is None else found.steps


def says() -> Said | None:
    """Of the Micros that saw as many tokens a parameter as some Nano."""
    (x, of_nano), (at, of_micro) = line(NANO, MIXTURE), line(MICRO, MIXTURE)
    if not len(x) or len(at) < len(MICRO.lengths):
        return None
    inside = (at >= x[0]) & (at <= x[-1])
    if not inside.any():
        return None
    expected = np.interp(np.log(at), np.log(x), of_nano)
    away = np.abs(of_micro - expected)[inside].max()
    spreads = [found.greatest - found.least for each in points(MICRO) if (found := steps_of(each, MIXTURE))]
    told = f"shares of the steps differ by up to {away:.2f}, those of seeds of one Micro by up to {max(spreads):.2f}"
    return [told], CONFIRMED if away <= LEVEL else OPEN if away <= max(spreads) else CONTRADICTED


def table(_: object = ()) -> str:
    names = [system.name.replace("Nano/", "") for system in NANO.systems[1:]]
    lines = [["", "M tokens", "a parameter", "seeds", "dense loss"]]
    for name in names:
        lines[0] += [f"{name} loss", "steps", "FLOPs"]
    for size in (NANO, MICRO):
        for each in points(size):
            cells = [size.name, f"{each.tokens / 1e6:.1f}", f"{each.per_parameter:,.0f}", str(each.dense.seeds)]
            cells.append(loss(each.dense.mean))
            for found in each.gains:
                if found is None:
                    cells += ["", "", ""]
                else:
                    shares = ("never" if share is None else ratio(share.mean) for share in (found.steps, found.flops))
                    cells += [loss(found.loss.mean), *shares]
            lines.append(cells)
    return markdown(lines)


def draw(study: Study) -> None:
    curves = []
    for size in (NANO, MICRO):
        for number, system in enumerate(size.systems[1:], MIXTURE):
            x, y = line(size, number)
            curves.append(Curve(system.name, x, y[None]))
    panels = {"tokens a parameter of the dense model": curves}
    save_picture(panels, "share of the dense model's steps", EXPERIMENT.kept / f"{study.id}.svg", logarithmic=True)


STUDY = Study(
    id="length",
    claim="A Micro gains what a Nano does after as many tokens a parameter (ours)",
    paper="0.25 of the steps after 565 tokens a parameter (Mini)",
    rows=[Row(system, steps, (nano.SEED,)) for steps in NANO.lengths if steps != LONG for system in NANO.systems],
    says=says,
    table=table,
    draw=draw,
)

if __name__ == "__main__":
    STUDY.main(__doc__)
