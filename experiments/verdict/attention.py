"""Why some runs of fresh.py end 0.05 to 0.07 above others of their system: which block looks far.

    python experiments/verdict/attention.py           # of the runs that fresh.py has trained here; a minute
    python experiments/verdict/attention.py --seeds   # first trains short runs of more seeds; 40 minutes of one thread
    python experiments/verdict/attention.py --table   # Markdown, as in docs/conversion.md

A block of a Nano has one head. attention.csv has, of each run, the share of each block's attention that goes to the
token before, from position LATER on, and losses over BLOCKS blocks spread over the validation text, of mixtures served
alone: in all, of the first FIRST targets of a block, and of its second half. Expected of runs that end higher: their
last block, which looks far in the others, attends to the token before.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fresh import DROPLESS, OPTIONS, System, best_rate
from torch import Tensor
from torch.nn import functional as F

from mixture_of_tokens import train
from mixture_of_tokens.data.groups import Blocks
from mixture_of_tokens.formatting import loss, markdown
from mixture_of_tokens.runs.loading import load_model
from mixture_of_tokens.runs.run import read

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import Experiment, asked, directory_of, read_csv, write_csv

FILE = Path(__file__).with_suffix(".csv").name
BLOCKS, FIRST, LATER = 1024, 4, 20
# Runs of the first steps of a budget, as before an early switch.
SHORT_STEPS, SHORT_SEEDS = 600, range(4, 12)
SHORT = (System("Transformer-Nano"), System("TC-Nano/32E/4", DROPLESS), System("MoT-Nano/32E/4"))


def to_the_token_before(attention_BHTT: Tensor) -> float:
    """The mean share, over rows, heads and positions from LATER on."""
    return float(attention_BHTT.diagonal(-1, -2, -1)[..., LATER - 1 :].mean())


@torch.inference_mode()
def looked(run: Path, text: Blocks) -> dict[str, Any]:
    """A row of attention.csv."""
    model = load_model(str(run), device="cpu", alone=read(run).config.model_config.mixes_examples)
    model.set_attn_implementation("eager")  # others do not return it
    batch = text.batch(np.linspace(0, len(text) - 1, BLOCKS).astype(int))
    out = model(batch["input_ids"], output_attentions=True, use_cache=False)
    losses_BT = F.cross_entropy(out.logits.transpose(1, 2), batch["shift_labels"], reduction="none")
    parts = {"loss": losses_BT, "first": losses_BT[:, :FIRST], "second_half": losses_BT[:, text.context // 2 :]}
    row = {"run": run.name} | {name: float(part.mean()) for name, part in parts.items()}
    return row | {f"block_{n}": to_the_token_before(a) for n, a in enumerate(out.attentions, start=1)}


def short_runs(experiment: Experiment) -> None:
    """Train them, at the constant rate of the whole budget."""
    for seed in SHORT_SEEDS:
        for system in SHORT:
            out = experiment.trained / directory_of(system.name, SHORT_STEPS, f"seed{seed}")
            schedule = {"lr_scheduler_type": "constant_with_warmup"}
            options = replace(OPTIONS, steps=SHORT_STEPS, model=dict(system.model), training=schedule)
            rate = best_rate(system, experiment.kept)
            train(system.name, out=out, seed=seed, learning_rate=rate, options=options, resume=True)


def make(experiment: Experiment) -> None:
    """Add rows of the runs that the file does not have: those of fresh.py after a switch, and short ones."""
    file, text = experiment.kept / FILE, None
    short = {path for system in SHORT for path in experiment.trained.glob(directory_of(system.name, SHORT_STEPS, "*"))}
    for directory in sorted(short.union(experiment.trained.glob("*-fresh-*"))):
        rows: list[dict[str, Any]] = list(read_csv(file))
        unusable = directory.name.endswith("-served") or not (directory / "model").is_dir()
        if unusable or directory.name in {row["run"] for row in rows}:
            continue
        config = read(directory).config
        if directory in short or not config.model_config.mixes_examples:
            text = text or config.prepare().validation
            rows.append(looked(directory, text))
            write_csv(file, list(rows[-1]), sorted(rows, key=lambda row: row["run"]))


def tables(kept: Path) -> list[str]:
    """Of runs of the whole budget, and of each system's short ones"""
    rows = sorted(read_csv(kept / FILE), key=lambda row: float(row["loss"]))
    kinds = ["-fresh-", *(f"{directory_of(system.name, SHORT_STEPS)}-" for system in SHORT)]
    by_kind = ([row for row in rows if kind in row["run"]] for kind in kinds)
    return [lines_of(own) for own in by_kind if own]


def lines_of(rows: Sequence[Mapping[str, str]]) -> str:
    blocks = [column for column in rows[0] if column.startswith("block_")]
    lines = [["run", "loss", f"targets 1 to {FIRST}", "second half", *(name.replace("_", " ") for name in blocks)]]
    for row in rows:
        losses = (loss(float(row[column])) for column in ("loss", "first", "second_half"))
        lines.append([row["run"], *losses, *(f"{float(row[column]):.2f}" for column in blocks)])
    return markdown(lines)


def main() -> None:
    given = asked(__doc__, seeds="train short runs first", table="print the table, and stop")
    experiment = Experiment.named("verdict")
    if given.seeds:
        short_runs(experiment)
    if not given.table:
        make(experiment)
    print(*tables(experiment.kept), sep="\n\n")


if __name__ == "__main__":
    main()
