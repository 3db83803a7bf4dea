"""Figure 6's question of what serves one text alone: Micros, their loss and the time of their training.

    python experiments/paper/alone.py            # five minutes of one core a seed, 25 more if its run is not in runs/
    python experiments/paper/alone.py --table    # the table

The mixture is served by as many of its experts as the granularity, 8 of 256, so at the FLOPs of a dense feed-forward
(alone.csv), and is switched to Token Choice as in figure 8. Beside it are the sparse models of figure 6, and those of
figure 8 with as many steps as the switched ones. Time is steps times the time of a step (`micro.py --time`), as a
number of dense steps; what is fitted at a switch comes on top, in seconds of one thread that shared the machine.
Expected: the mixture alone, at most 0.01 above the best sparse model, at equal time.
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import fig6
import fig8
from micro import BEST_MIXTURE, DENSE, DROPLESS, SEEDS, SHORT, YOUNGER, share_of_step
from nano import losses_of, signed
from studies import EXPERIMENT, System, with_weights

from mixture_of_tokens.runs.run import read_run
from mixture_of_tokens.settings.names import parse_name
from mixture_of_tokens.utils.formatting import Summary, markdown, with_span

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import loss_alone, once, read_csv, script, spread

SIGMOID = YOUNGER[0]


class Served(NamedTuple):
    """losses: by seed; steps: of each system, of which the time is known or not; fit: seconds; in_groups: losses."""

    label: str
    losses: Mapping[int, float]
    steps: Sequence[tuple[System, int]]
    fit: float | None = None
    in_groups: Sequence[float] = ()

    @property
    def mean(self) -> float:
        return sum(self.losses.values()) / len(self.losses)

    @property
    def time(self) -> float | None:
        """Of the steps, as a number of dense ones."""
        times = [(share_of_step(system), steps) for system, steps in self.steps]
        known = [share * steps for share, steps in times if share is not None]
        return sum(known) if len(known) == len(times) else None


def measured(seed: int) -> list[dict[str, float]]:
    """Of the mixture served alone, over the whole validation text, with the same run's loss in groups."""
    run = with_weights(BEST_MIXTURE, SHORT, seed)
    return [{"in_groups": read_run(run).facts.final_loss, "alone": loss_alone(run, "validation")}]


def make(file: Path) -> None:
    for seed in SEEDS:
        once(file, {"seed": seed}, measured, seed)


def served(file: Path) -> list[Served]:
    """The least loss first."""
    label = f"{BEST_MIXTURE.label}, alone by {parse_name(BEST_MIXTURE.name).granularity} of its experts"
    rows = read_csv(file)
    alone = {int(row["seed"]): float(row["alone"]) for row in rows}
    in_groups = [float(row["in_groups"]) for row in rows]
    found = [Served(label, alone, [(BEST_MIXTURE, SHORT)], in_groups=in_groups)]
    for row in fig6.ROWS:
        if row.runs and parse_name(row.system.name).routing.private:
            found.append(Served(row.system.label, losses_of(row), [(row.system, SHORT)]))
    for way, (label, options) in (fig8.OF_MICROS | fig8.CONTROLS).items():
        run = read_run(fig8.TRANSITION / f"{fig8.MICRO.runs[0]}-{way}.json")
        sparse, its = SIGMOID if options.get("scores") == "sigmoid" else DROPLESS, {run.seed: run.facts.final_loss}
        if run.switch is None:
            found.append(Served(sparse.label, its, [(sparse, run.facts.steps)]))
        else:
            steps = [(BEST_MIXTURE, run.switch.step), (sparse, run.config.steps)]
            found.append(Served(f"{BEST_MIXTURE.label}, {label}", its, steps, run.switch.fit_seconds))
    return sorted(found, key=lambda each: each.mean)


def table(file: Path) -> str:
    rows = served(file)
    alone = next(each.losses for each in rows if each.in_groups)
    columns = [
        "seeds",
        "in groups",
        "alone",
        "over the mixture alone",
        "steps",
        f"time, in steps of {DENSE.label}",
        "fit, s",
    ]
    lines = [["", *columns]]
    for each in rows:
        over = Summary.of(value - alone[seed] for seed, value in each.losses.items() if seed in alone)
        steps = " + ".join(f"{steps:,}" for _, steps in each.steps)
        cells = [each.label, str(len(each.losses)), spread(each.in_groups), spread(each.losses.values())]
        fewer = f" on {over.seeds} of {len(each.losses)}" if over and over.seeds < len(each.losses) else ""
        cells += ["" if over is None or each.losses is alone else f"{with_span(over, signed)}{fewer}", steps]
        cells += ["" if each.time is None else f"{each.time:,.0f}", "" if each.fit is None else f"{each.fit:.0f}"]
        lines.append(cells)
    return markdown(lines)


if __name__ == "__main__":
    file = EXPERIMENT.kept / "alone.csv"
    script(__doc__, lambda: make(file), lambda: table(file))
