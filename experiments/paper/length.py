"""Length: a Micro gains as much over the dense model as a Nano does after as many tokens for each of its parameters.

    python experiments/paper/length.py            # what is missing of Nanos of 150 to 2,400 steps; 40 minutes
    python experiments/paper/length.py --table    # the table of what is committed

Figure 7's question for Nanos of six lengths, beside its Micros. Nanos of 1,200 and of 12,000 steps are those of
`../nano` and `../long`; from 2,400 steps on they read their text more than once, at 12,000 nearly nine times. Expected:
the share of the dense model's steps at which a Micro reaches its loss is within 0.05 of a Nano's after as many tokens a
parameter of the dense model, so that what the Micros of figure 7 lack is length alone. The paper: 0.25 of the steps for
a Mini of 29 M parameters after 16,400 M tokens, which is 565 a parameter (plot data of its authors' blog post).
"""

import sys
from pathlib import Path
from typing import NamedTuple

import micro
import nano
import numpy as np
from studies import CONFIRMED, CONTRADICTED, EXPERIMENT, FIRST_SEEDS, Row, Study, System, run_of

from mixture_of_tokens.formatting import loss, markdown, ratio
from mixture_of_tokens.reports.comparison import reached
from mixture_of_tokens.runs.run import Run

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import Curve, save_picture

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


class Gain(NamedTuple):
    """A system's final loss, and what it needs to reach the dense model's, as shares; None where it never does."""

    loss: float
    steps: float | None
    flops: float | None


class Point(NamedTuple):
    """A length. Gains are those of the systems but the dense one; None for one without a run."""

    tokens: int
    per_parameter: float
    dense: float
    gains: list[Gain | None]


def points(size: Size) -> list[Point]:
    """Those lengths of which a dense run is kept."""
    found = []
    for steps in size.lengths:
        dense, *others = [run_of(system, steps, FIRST_SEEDS[size.name]) for system in size.systems]
        if dense is not None:
            gains = [None if run is None else gain(run, dense) for run in others]
            facts = dense.facts
            found.append(Point(facts.tokens, facts.tokens / facts.parameters, facts.final_loss, gains))
    return found


def gain(run: Run, dense: Run) -> Gain:
    at = reached(run, dense)
    return Gain(run.facts.final_loss, *((None, None) if at is None else (at.of_steps, at.of_flops)))


def line(size: Size, number: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens a parameter, and the share of the steps of the system of this number, of which 0 is the dense one."""
    gains = [(each.per_parameter, each.gains[number - 1]) for each in points(size)]
    known = [(at, gain.steps) for at, gain in gains if gain is not None and gain.steps is not None]
    x, y = zip(*known, strict=True) if known else ((), ())
    return np.array(x), np.array(y)


def says() -> tuple[str, str] | None:
    (x, of_nano), (at, of_micro) = line(NANO, MIXTURE), line(MICRO, MIXTURE)
    if not len(x) or not len(at):
        return None
    expected = np.interp(np.log(at), np.log(x), of_nano)
    told = [
        f"{tokens:.0f} tokens a parameter: Micro {share:.2f}, Nano {nano_share:.2f}"
        for tokens, share, nano_share in zip(at, of_micro, expected, strict=True)
    ]
    told.append(f"Nano {of_nano[0]:.2f} after {x[0]:.0f}, {of_nano[-1]:.2f} after {x[-1]:,.0f}")
    as_claimed = np.all(np.abs(of_micro - expected) <= LEVEL)
    return "; ".join(told), CONFIRMED if as_claimed else CONTRADICTED


def table(_: object = ()) -> str:
    names = [system.name.replace("Nano/", "") for system in NANO.systems[1:]]
    lines = [["", "M tokens", "a parameter", "dense loss"]]
    for name in names:
        lines[0] += [f"{name} loss", "steps", "FLOPs"]
    for size in (NANO, MICRO):
        for each in points(size):
            cells = [size.name, f"{each.tokens / 1e6:.1f}", f"{each.per_parameter:,.0f}", loss(each.dense)]
            for found in each.gains:
                if found is None:
                    cells += ["", "", ""]
                else:
                    shares = ("never" if share is None else ratio(share) for share in (found.steps, found.flops))
                    cells += [loss(found.loss), *shares]
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
