"""Why some runs of fresh.py end 0.05 to 0.07 above others of their system: which block looks far.

    python experiments/verdict/attention.py           # of the runs that fresh.py has trained here; a minute
    python experiments/verdict/attention.py --table   # Markdown, as in ../LOG.md

A block of a Nano has one head. attention.csv has, of each run, the share of each block's attention that goes to the
token before, from position LATER on, and losses over BLOCKS blocks of the validation text: in all, of the first FIRST
targets of a block, and of its second half. Mixtures are there after their switch. Expected of runs that end higher:
their last block, which looks far in the others, attends to the token before.
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from mixture_of_tokens.data.groups import Blocks
from mixture_of_tokens.runs.loading import load_model
from mixture_of_tokens.runs.run import read_run
from mixture_of_tokens.utils.formatting import loss, markdown

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import Experiment, read_csv, script, write_csv

FILE = Path(__file__).with_suffix(".csv").name
BLOCKS, FIRST, LATER = 1024, 4, 20


def to_the_token_before(attention_BHTT: Tensor) -> float:
    """The mean share, over rows, heads and positions from LATER on."""
    return float(attention_BHTT.diagonal(-1, -2, -1)[..., LATER - 1 :].mean())


@torch.inference_mode()
def looked(run: Path, text: Blocks) -> dict[str, Any]:
    """A row of attention.csv."""
    model = load_model(str(run), device="cpu")
    model.set_attn_implementation("eager")  # others do not return it
    batch = text.batch(np.linspace(0, len(text) - 1, BLOCKS).astype(int))
    out = model(batch["input_ids"], output_attentions=True, use_cache=False)
    losses_BT = F.cross_entropy(out.logits.transpose(1, 2), batch["shift_labels"], reduction="none")
    parts = {"loss": losses_BT, "first": losses_BT[:, :FIRST], "second_half": losses_BT[:, text.context // 2 :]}
    row = {"run": run.name} | {name: float(part.mean()) for name, part in parts.items()}
    return row | {f"block_{n}": to_the_token_before(a) for n, a in enumerate(out.attentions, start=1)}


def make(experiment: Experiment) -> None:
    """Add rows of the runs that the file does not have."""
    file, text = experiment.kept / FILE, None
    for directory in sorted(experiment.trained.glob("*-fresh-*")):
        rows: list[dict[str, Any]] = list(read_csv(file))
        unusable = directory.name.endswith("-served") or not (directory / "model").is_dir()
        unusable |= directory.with_name(f"{directory.name}-on").is_dir()  # which is the same, trained on
        if unusable or directory.name in {row["run"] for row in rows}:
            continue
        config = read_run(directory).config
        if not config.model_config.shares_batch:
            text = text or config.prepare().validation
            rows.append(looked(directory, text))
            write_csv(file, list(rows[-1]), sorted(rows, key=lambda row: row["run"]))


def table(kept: Path) -> str:
    rows = sorted(read_csv(kept / FILE), key=lambda row: float(row["loss"]))
    blocks = [column for column in rows[0] if column.startswith("block_")]
    lines = [["run", "loss", f"targets 1 to {FIRST}", "second half", *(name.replace("_", " ") for name in blocks)]]
    for row in rows:
        losses = (loss(float(row[column])) for column in ("loss", "first", "second_half"))
        lines.append([row["run"], *losses, *(f"{float(row[column]):.2f}" for column in blocks)])
    return markdown(lines)


if __name__ == "__main__":
    experiment = Experiment.named("verdict")
    script(__doc__, lambda: make(experiment), lambda: table(experiment.kept))
