"""Figure 6's question of what serves one text alone: Micros, their loss and the time of their training.

    python experiments/paper/alone.py            # five minutes of one core, 25 more if the run is not in runs/
    python experiments/paper/alone.py --table    # the table

The mixture is served by as many of its experts as the granularity, 8 of 256, so at the FLOPs of a dense feed-forward
(alone.csv), and is switched to Token Choice as in figure 8. Beside it are the sparse models of figure 6, and those of
figure 8 with as many steps as the switched ones. One seed, which all have. Time is steps times the time of a step
(`micro.py --time`), as a number of dense steps; what is fitted at a switch comes on top, in seconds of one thread that
shared the machine. Expected: the best of the mixture is at or below the best sparse model that took no longer.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import fig6
import fig8
from micro import BEST_MIXTURE, DENSE, DROPLESS, SHORT, YOUNGER, share_of_step
from studies import EXPERIMENT, FIRST_SEEDS, System, check_text, kept_in_csv, run_of

from mixture_of_tokens import train
from mixture_of_tokens.formatting import loss, markdown
from mixture_of_tokens.model.names import parse_name
from mixture_of_tokens.runs.run import read

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import loss_alone, read_csv, write_csv

SEED = FIRST_SEEDS["Micro"]
SIGMOID = YOUNGER[0]


class Served(NamedTuple):
    """steps: of each system, of which the time is known or not; fit: seconds."""

    label: str
    loss: float
    steps: Sequence[tuple[System, int]]
    fit: float | None = None

    @property
    def time(self) -> float | None:
        """Of the steps, as a number of dense ones."""
        times = [(share_of_step(system), steps) for system, steps in self.steps]
        known = [share * steps for share, steps in times if share is not None]
        return sum(known) if len(known) == len(times) else None


def make(file: Path) -> None:
    """Of the mixture served alone, over the whole validation text."""
    if file.is_file():
        return
    check_text("Micro")
    run = EXPERIMENT.trained / BEST_MIXTURE.directory(SHORT, SEED)
    train(BEST_MIXTURE.name, out=run, seed=SEED, options=BEST_MIXTURE.options(SHORT), resume=True)
    row = {
        "system": BEST_MIXTURE.label,
        "seed": SEED,
        "steps": SHORT,
        "experts": parse_name(BEST_MIXTURE.name).granularity,
    }
    row |= {"loss": loss_alone(run, "validation")}
    write_csv(file, list(row), [row])


def served(file: Path) -> list[Served]:
    """The least loss first."""
    (alone,) = read_csv(file)
    label = f"{BEST_MIXTURE.label}, alone by {alone['experts']} of its experts"
    found = [Served(label, float(alone["loss"]), [(BEST_MIXTURE, SHORT)])]
    for row in fig6.ROWS:
        run = run_of(row.system, SHORT, SEED)
        if run is not None and parse_name(row.system.name).routing.private:
            found.append(Served(row.system.label, run.facts.final_loss, [(row.system, SHORT)]))
    for way, (label, options) in (fig8.OF_MICROS | fig8.CONTROLS).items():
        run = read(fig8.TRANSITION / f"{fig8.MICRO.runs[0]}-{way}.json")
        sparse = SIGMOID if options.get("scores") == "sigmoid" else DROPLESS
        if run.switch is None:
            found.append(Served(sparse.label, run.facts.final_loss, [(sparse, run.facts.steps)]))
        else:
            steps = [(BEST_MIXTURE, run.switch.step), (sparse, run.config.steps)]
            found.append(Served(f"{BEST_MIXTURE.label}, {label}", run.facts.final_loss, steps, run.switch.fit_seconds))
    return sorted(found, key=lambda each: each.loss)


def table(file: Path) -> str:
    lines = [["", "loss", "steps", f"time, in steps of {DENSE.label}", "fit, s"]]
    for each in served(file):
        steps = " + ".join(f"{steps:,}" for _, steps in each.steps)
        time = "" if each.time is None else f"{each.time:,.0f}"
        lines.append([each.label, loss(each.loss), steps, time, "" if each.fit is None else f"{each.fit:.0f}"])
    return markdown(lines)


if __name__ == "__main__":
    kept_in_csv(__doc__, "alone.csv", make, table)
