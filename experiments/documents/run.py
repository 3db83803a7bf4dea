"""Documents of a row that see each other, and that do not (`--separate-documents`): loss and time of a step at Nano.

    python experiments/documents/run.py           # twelve runs, and the time of a step; 45 minutes of one core
    python experiments/documents/run.py --table   # prints the table

400 steps of 8,192 tokens of the standard library's source, in rows of 64 tokens, of which `rows` says how many hold
parts of several documents. Each model is scored over all of the validation text both ways, however it was trained.
Steps are timed in turns, forward, backward and AdamW.
"""

import itertools
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

from mixture_of_tokens import train
from mixture_of_tokens.data.groups import grouped_order
from mixture_of_tokens.evaluation.losses import evaluate_blocks
from mixture_of_tokens.runs import provenance
from mixture_of_tokens.runs.loading import load_model, text_of
from mixture_of_tokens.settings.options import Options
from mixture_of_tokens.utils.formatting import markdown

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import Experiment, _step_of, directory_of, once, read_csv, script

EXPERIMENT = Experiment.named("documents")
RUNS, TIMES = EXPERIMENT.kept / "runs.csv", EXPERIMENT.kept / "timings.csv"
NAMES, SEEDS, STEPS = ("Transformer-Nano", "MoT-Nano/32E/8"), (1, 2, 3), 400
WAYS = {"together": False, "apart": True}
ROWS, GROUP, ROUNDS, TIMED = 128, 32, 9, 5  # of a step, and of a group; turns, and steps in each


def _run(name: str, way: str, seed: int) -> list[dict[str, object]]:
    options = Options(steps=STEPS, device="cpu", separate_documents=WAYS[way])
    run = train(name, out=_place(name, way, seed), seed=seed, options=options, resume=True)
    model, text = load_model(str(run.directory), device="cpu"), text_of(str(run.directory)).validation
    how = {"group_size": GROUP, "batch_size": ROWS}
    losses = {
        f"loss_{other}": round(evaluate_blocks(model, replace(text, separate=separate), **how)["loss"], 4)
        for other, separate in WAYS.items()
    }
    positions = replace(text, separate=True).batch(np.arange(len(text)))["position_ids"]
    several = float((positions[:, 1:] == 0).any(1).float().mean())
    facts = run.facts
    return [losses | {"rows": round(several, 3), "corpus": facts.corpus["hash"], "commit": facts.commit}]


def _place(name: str, way: str, seed: int = SEEDS[0]) -> Path:
    return EXPERIMENT.trained / directory_of(name, way, f"seed{seed}")


def _timed(name: str) -> list[dict[str, object]]:
    model, steps = load_model(str(_place(name, "together")), device="cpu"), {}
    text = text_of(str(_place(name, "together"))).train
    order = np.split(grouped_order(text, GROUP).ravel()[: 8 * ROWS], 8)
    for way, separate in WAYS.items():
        own = replace(text, separate=separate)
        steps[way] = _step_of(model, [own.batch(part) for part in order], False, False)
    spent: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(1 + ROUNDS):
        for way, step in steps.items():
            since = time.perf_counter()
            for _ in range(TIMED):
                step()
            spent[way].append((time.perf_counter() - since) / TIMED)
    ratios = np.array(spent["apart"][1:]) / np.array(spent["together"][1:])
    shares = {"ratio": np.median(ratios), "low": ratios.min(), "high": ratios.max()}
    milliseconds = {way: round(1e3 * float(np.median(own[1:])), 1) for way, own in spent.items()}
    return [milliseconds | {key: round(float(share), 3) for key, share in shares.items()} | provenance.hardware("cpu")]


def make() -> None:
    for seed, name, way in itertools.product(SEEDS, NAMES, WAYS):
        once(RUNS, {"name": name, "trained": way, "seed": seed}, _run, name, way, seed, settings={"steps": STEPS})
    for name in NAMES:
        once(TIMES, {"name": name}, _timed, name)


def table() -> str:
    rows = [["", "trained", "seed", "scored together", "scored apart", "time of a step, apart over together"]]
    ratios = {row["name"]: f"{float(row['ratio']):.2f} ({row['low']} to {row['high']})" for row in read_csv(TIMES)}
    for row in read_csv(RUNS):
        losses = [f"{float(row[f'loss_{way}']):.4f}" for way in WAYS]
        ratio = ratios.get(row["name"], "") * ((row["trained"], row["seed"]) == ("apart", "1"))
        rows.append([row["name"], row["trained"], row["seed"], *losses, ratio])
    return markdown(rows, left=2)


if __name__ == "__main__":
    script(__doc__, make, table)
