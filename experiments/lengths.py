"""The README's table: how early models reach each other's final losses, by the length of training.

    python experiments/lengths.py experiments/nano experiments/long    # Markdown from compare.json, in a second

A row is a comparison and a target, its first model or its last one; a cell the share of the target's steps, then of its
time, after which a model is at the target's last loss: the mean over the seeds, and from the least to the greatest.
"""

import json
import sys
from pathlib import Path
from typing import Any

from mixture_of_tokens.words import loss, seeds_of, with_spread


def table(comparisons: list[dict[str, Any]]) -> str:
    labels = [model["label"] for model in comparisons[0]["models"]]
    rows = [["steps", "", *labels], ["---:", "---", *["---:"] * len(labels)]]
    for written in comparisons:
        models = {model["label"]: model for model in written["models"]}
        if list(models) != labels:
            raise SystemExit(
                f"comparisons of the same models in the same order are needed, got {labels}, {list(models)}"
            )
        losses = [with_spread(model["final_loss"], loss) for model in models.values()]
        rows.append([f"{written['steps']:,}, {seeds_of(written)}", "loss", *losses])
        for target in (labels[0], labels[-1]):
            cells = ["1" if label == target else share(models[label], target, written) for label in labels]
            rows.append(["", f"reaches {target}'s in", *cells])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def share(model: dict[str, Any], target: str, written: dict[str, Any]) -> str:
    found = model["reached"][target]
    if found["of_steps"] is None:
        return "never"
    on = found["of_steps"]["seeds"]
    some = f" on {on} of {len(written['seeds'])}" if on < len(written["seeds"]) else ""
    return f"{with_spread(found['of_steps'])} steps, {with_spread(found['of_time'])} time{some}"


if __name__ == "__main__":
    print(table([json.loads((Path(directory) / "compare.json").read_text()) for directory in sys.argv[1:]]))
