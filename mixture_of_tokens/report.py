"""Finished runs side by side."""

import json
from pathlib import Path


def report(*runs: Path) -> None:
    """Print the runs' losses side by side, the first one as the baseline.

    "reached" is the first evaluated step, and the seconds, at which a run's evaluation loss was no higher than what
    the baseline had at its end; evaluations during training are over one fixed part of the validation split.

    Args:
        runs: Run directories of `mot train`.
    """
    facts, evaluated = [], []
    for run in runs:
        if not (run / "run.json").is_file():
            raise ValueError(f"{run} is no finished run: it has no run.json")
        facts.append(json.loads((run / "run.json").read_text()))
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        evaluated.append([row for row in rows if "eval_loss" in row])
    if not facts:
        raise ValueError("name at least one run directory")
    if len({fact["corpus"]["hash"] for fact in facts}) > 1:
        raise ValueError("these runs saw different corpora, so their losses cannot be compared")
    target = evaluated[0][-1]["eval_loss"]
    columns = ("model", "loss", "vs first", "reached", "bits/byte", "parameters", "FLOPs/token", "s", "tokens/s")
    table = []
    for fact, rows in zip(facts, evaluated, strict=True):
        first = next((row for row in rows if row["eval_loss"] <= target), None)
        table.append(
            (
                fact["name"],
                f"{fact['final_loss']:.4f}",
                f"{fact['final_loss'] - facts[0]['final_loss']:+.4f}",
                "never" if first is None else f"{first['step']}, {first['seconds']:.0f} s",
                f"{fact['bits_per_byte']:.4f}",
                f"{fact['parameters']:,}",
                f"{fact['forward_flops_per_token']:,}",
                f"{fact['seconds']:.0f}",
                f"{fact['tokens'] / fact['seconds']:,.0f}",
            )
        )
    widths = [max(map(len, column)) for column in zip(columns, *table, strict=True)]
    for line in (columns, *table):
        name, *cells = (cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        print("  ".join([name.strip().ljust(widths[0]), *cells]))
