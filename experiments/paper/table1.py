"""Table 1: in bf16 alone, weights and optimizer too, Mixture of Tokens is better than Expert Choice.

    python experiments/paper/table1.py            # what is missing of 36 Nanos; some five hours of one core
    python experiments/paper/table1.py --table    # the table of what is committed

Nanos of 1,200 steps in mixed precision, with weights and optimizer in fp32, and in bf16 alone. The peak rate is swept
for each system and precision, on the tuning split with seed 1; the best has three more seeds, on the validation split.
Runs that diverge are counted (`mot sweep` notes them). Expected: no Mixture of Tokens does, and in bf16 alone it is
ahead of Expert Choice on every seed. The paper: Mixture of Tokens is better than Expert Choice in bf16 alone, three
seeds, rates tuned for each precision (caption of table 1; values not available).
"""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from studies import CONFIRMED, CONTRADICTED, EXPERIMENT, NOT_HERE, Study, System

from mixture_of_tokens import sweep
from mixture_of_tokens.formatting import Summary, loss, markdown, with_span
from mixture_of_tokens.training.sweep import Sweep

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import directory_of, read_csv, write_csv

NAMES = ("Transformer-Nano", "MoT-Nano/32E/8", "EC-Nano/32E")
MIXED, ALONE = "mixed", "bf16 alone"
PRECISIONS: dict[str, dict[str, Any]] = {MIXED: {"training": {"bf16": "true"}}, ALONE: {"model": {"dtype": "bfloat16"}}}
STEPS, RATES, SWEPT, SEEDS = 1200, (5e-3, 1e-2, 2e-2), 1, (2, 3, 4)
LOSSES = EXPERIMENT.kept / "table1.csv"


def make() -> None:
    """One precision and system after the other; what is in the file is not trained again."""
    for precision in PRECISIONS:
        for name in NAMES:
            _measure(name, precision, "tuning", RATES, (SWEPT,))
            best = best_rate(name, precision)
            if best is not None:
                _measure(name, precision, "validation", (best,), SEEDS)


def _measure(name: str, precision: str, split: Any, rates: tuple[float, ...], seeds: tuple[int, ...]) -> None:
    if rows_of(name, precision, split):
        return
    system = System(name, **PRECISIONS[precision])
    out = EXPERIMENT.trained / directory_of("table1", name, precision.replace(" ", "-"), split)
    options = replace(system.options(STEPS), evaluate_on=split)
    found = sweep(name, learning_rate=list(rates), seeds=list(seeds), out=out, options=options)
    assert isinstance(found, Sweep)
    rows: list[dict[str, Any]] = list(read_csv(LOSSES)) if LOSSES.is_file() else []
    for cell in found.cells:
        for run in cell.runs:
            row = {"name": name, "precision": precision, "split": split, "seed": run.seed}
            row |= {"learning_rate": cell.settings["--learning-rate"], "loss": "" if run.loss is None else run.loss}
            rows.append(row)
    write_csv(LOSSES, list(rows[0]), rows)


def rows_of(name: str, precision: str, split: str) -> list[dict[str, str]]:
    key = (name, precision, split)
    rows = read_csv(LOSSES) if LOSSES.is_file() else []
    return [row for row in rows if (row["name"], row["precision"], row["split"]) == key]


def best_rate(name: str, precision: str) -> float | None:
    """Of the sweep; None where all diverged, or none was made."""
    rows = [row for row in rows_of(name, precision, "tuning") if row["loss"]]
    return float(min(rows, key=lambda row: float(row["loss"]))["learning_rate"]) if rows else None


def loss_of(name: str, precision: str) -> Summary | None:
    """Over the seeds that did not diverge."""
    return Summary.of(float(row["loss"]) for row in rows_of(name, precision, "validation") if row["loss"])


def diverged(name: str, precision: str, split: str) -> str:
    rows = rows_of(name, precision, split)
    return f"{sum(not row['loss'] for row in rows)} of {len(rows)}" if rows else ""


def says() -> tuple[str, str] | None:
    runs = [rows_of(name, ALONE, "validation") for name in NAMES]
    if not all(runs):
        return None
    told = [f"{name} {each.mean:.3f}" if (each := loss_of(name, ALONE)) else f"{name} diverged" for name in NAMES]
    told.append(f"mixtures that diverged: {diverged(NAMES[1], ALONE, 'validation')}")
    _, mixture, choice = ({row["seed"]: row["loss"] for row in its} for its in runs)
    if not all(mixture.values()):
        return "; ".join(told), CONTRADICTED
    ahead = [not choice[seed] or float(mixture[seed]) < float(choice[seed]) for seed in mixture]
    return "; ".join(told), CONFIRMED if all(ahead) else NOT_HERE if any(ahead) else CONTRADICTED


def table_of(_: object = ()) -> str:
    lines = [["", "precision", "best rate", "loss", "diverged", "diverged in the sweep"]]
    for name in NAMES:
        for precision in PRECISIONS:
            rate, found = best_rate(name, precision), loss_of(name, precision)
            if rate is not None:
                counts = [diverged(name, precision, split) for split in ("validation", "tuning")]
                lines.append([name, precision, f"{rate:g}", with_span(found, loss) if found else "", *counts])
    return markdown(lines, left=2)


STUDY = Study(
    id="table1",
    claim="In bf16 alone, weights and optimizer too, better than Expert Choice",
    paper="so for three seeds, rates tuned for each precision; values not available",
    says=says,
    table=table_of,
    make=make,
)


if __name__ == "__main__":
    STUDY.main(__doc__)
