"""The README's table: how early models reach each other's final losses, in several comparisons.

    python experiments/reached.py experiments/nano experiments/prose    # Markdown from compare.json, in a second

A row is a comparison and a target, its first model or its last one; a cell the share of the target's steps after
which a model is at the target's last loss (mean over the seeds, from the least to the greatest), and the mean share
of its time.
"""

import json
import sys
from pathlib import Path
from typing import Any

from mixture_of_tokens.formatting import loss, ratio, with_spread
from mixture_of_tokens.reports.prose import seeds_of


def table(comparisons: dict[str, dict[str, Any]]) -> str:
    labels = list(dict.fromkeys(model["label"] for written in comparisons.values() for model in written["models"]))
    rows = [["", "", *labels], ["---", "---", *["---:"] * len(labels)]]
    for name, written in comparisons.items():
        models = {model["label"]: model for model in written["models"]}
        first, *_, last = models
        losses = [with_spread(models[label]["final_loss"], loss) if label in models else "" for label in labels]
        rows.append([f"{name}, {written['steps']:,} steps, {seeds_of(written)}", "loss", *losses])
        for target in (first, last):
            cells = [share(models[label], target, written) if label in models else "" for label in labels]
            rows.append(["", f"reaches {target}'s in", *cells])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def share(model: dict[str, Any], target: str, written: dict[str, Any]) -> str:
    if model["label"] == target:
        return "1"
    found = model["reached"][target]
    if found["of_steps"] is None:
        return "never"
    on = found["of_steps"]["seeds"]
    some = f" on {on} of {len(written['seeds'])}" if on < len(written["seeds"]) else ""
    return f"{with_spread(found['of_steps'])}, time {ratio(found['of_time']['mean'])}{some}"


if __name__ == "__main__":
    directories = map(Path, sys.argv[1:])
    print(table({path.name: json.loads((path / "compare.json").read_text()) for path in directories}))
