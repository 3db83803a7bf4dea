"""Finished runs side by side."""

import json
from pathlib import Path


def report(*runs: Path) -> None:
    """Print the runs' losses side by side, the first one as the baseline.

    Args:
        runs: Run directories of `mot train`.
    """
    facts = []
    for run in runs:
        if not (run / "run.json").is_file():
            raise ValueError(f"{run} is no finished run: it has no run.json")
        facts.append(json.loads((run / "run.json").read_text()))
    if not facts:
        raise ValueError("name at least one run directory")
    if len({fact["corpus"]["hash"] for fact in facts}) > 1:
        raise ValueError("these runs saw different corpora, so their losses cannot be compared")
    columns = ("model", "loss", "vs first", "bits/byte", "parameters", "FLOPs/token", "s", "tokens/s")
    rows = [
        (
            fact["name"],
            f"{fact['final_loss']:.4f}",
            f"{fact['final_loss'] - facts[0]['final_loss']:+.4f}",
            f"{fact['bits_per_byte']:.4f}",
            f"{fact['parameters']:,}",
            f"{fact['forward_flops_per_token']:,}",
            f"{fact['seconds']:.0f}",
            f"{fact['tokens'] / fact['seconds']:,.0f}",
        )
        for fact in facts
    ]
    widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
    for row in (columns, *rows):
        name, *cells = (cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        print("  ".join([name.strip().ljust(widths[0]), *cells]))
