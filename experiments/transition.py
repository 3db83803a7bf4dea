"""The jump at the switch to Token Choice and what comes after it, of the runs in experiments/transition.

    python experiments/transition.py experiments/transition    # a Markdown table, in a second

Each run there was made from one of `experiments/nano` (whose weights are not committed: `mot compare` makes them) by

    mot transition SOURCE                      calibrated
    mot transition SOURCE --calibrate none     -plain: weights as they are
    mot transition SOURCE --optimizer fresh    -fresh: Adam's moments from nothing
    mot transition SOURCE --capacity 1.25      -capacity: tokens are dropped in training, as in the paper
    mot transition SOURCE --anneal 0.1         -anneal: half of the steps in groups, while the temperature falls
    mot transition SOURCE --control router     -router: a new router
    mot transition SOURCE --control scratch    -scratch: Token Choice for all of the steps

Where it was annealed before, "in groups, before" and the plain jump are of the annealed source. Losses are of the whole
validation split at the end, and of the part that training is evaluated on before; means over the seeds and, in
brackets, from the least to the greatest.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

KINDS = {
    "transition": "calibrated",
    "plain": "plain",
    "fresh": "calibrated, fresh optimizer",
    "capacity": "calibrated, capacity 1.25",
    "anneal": "calibrated, annealed before",
    "router": "new router",
    "scratch": "Token Choice from scratch",
}


def read(run: Path) -> dict[str, Any]:
    facts = json.loads((run / "run.json").read_text())
    found = {"final": facts["final_loss"], "steps": facts["steps"]}
    if (run / "switch.json").is_file():
        switch = json.loads((run / "switch.json").read_text())
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        tenth = switch["step"] + (facts["steps"] - switch["step"]) // 10
        found |= switch
        found["tenth"] = next(row["eval_loss"] for row in rows if row["step"] >= tenth and "eval_loss" in row)
        found["end"] = [row["eval_loss"] for row in rows if "eval_loss" in row][-1]
        found["jump"] = switch["at_the_switch"] - switch["source_in_groups"]
        found["share"] = found["jump"] / (switch["plain_switch"] - switch["source_in_groups"])
    return found


def cell(values: list[float]) -> str:
    mean = sum(values) / len(values)
    return f"{mean:.3f}" + (f" ({min(values):.3f} to {max(values):.3f})" if len(values) > 1 else "")


def main() -> None:
    directory = Path(sys.argv[1])
    runs: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for run in sorted(directory.iterdir()):
        if (run / "run.json").is_file():
            source, _, rest = run.name.partition("-seed")
            runs.setdefault((source, KINDS[rest.partition("-")[2] or "transition"]), []).append(read(run))
    columns: dict[str, Callable[[dict[str, Any]], float]] = {
        "in groups, before": lambda run: run["source_in_groups"],
        "at the switch": lambda run: run["at_the_switch"],
        "share of the plain jump": lambda run: run["share"],
        "after a tenth": lambda run: run["tenth"],
        "at the end": lambda run: run["end"],
        "at the end, whole split": lambda run: run["final"],
    }
    print("| source | way | " + " | ".join(columns) + " |")
    print("| --- | --- |" + " ---: |" * len(columns))
    for (source, kind), found in sorted(
        runs.items(), key=lambda item: (item[0][0], [*KINDS.values()].index(item[0][1]))
    ):
        cells = []
        for what, of in columns.items():
            known = kind != KINDS["scratch"] or what == "at the end, whole split"
            cells.append(cell([of(run) for run in found]) if known else "")
        print(f"| {source} | {kind} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
