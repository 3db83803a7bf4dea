"""What a group that is not full costs: loss by real rows a group, for four ways to treat the rows that are missing.

    python experiments/partial_groups/run.py            # what it takes was not recorded; the runs of nano come first
    python experiments/partial_groups/run.py --table    # Markdown, of docs/results/alone.md

    companions  each expert's typical companions stand for the missing rows: what the library does
    zeros       rows of zeros stand for them, each with e^0 in the softmax's sum: the library before it is calibrated
    scaled      softmax over the n real rows, output scaled by n / G: a group filled up with copies of its rows
    softmax     the same, output as it is: a group of n

Of the Mixtures of Tokens of `nano`, and of one with normalized mixtures; those that are not in runs/ are trained first,
in the time that nano takes for them. Companions are measured as `mot train` does it. Losses are over some 100,000
tokens of the validation text, the same in every cell. Each run's are kept beside the runs before they go to losses.csv,
so the same command goes on where it was stopped.

A row alone is better than a full group, by 0.058 nats (/32E) and 0.048 (/32E/8), on every seed.
"""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from mixture_of_tokens.data.groups import grouped_order, training_groups
from mixture_of_tokens.evaluation.losses import cross_entropy
from mixture_of_tokens.layers.mixture import MixtureOfTokens
from mixture_of_tokens.models.companions import calibrate_companions
from mixture_of_tokens.runs.loading import load_model, text_of
from mixture_of_tokens.runs.run import read_run
from mixture_of_tokens.utils.formatting import markdown

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import NANO, Experiment, read_csv, script, spread, trained, write_csv

NAMES = ("MoT-Nano/32E", "MoT-Nano/32E/8")
SEEDS = (1, 2, 3)
NORMALIZED = replace(NANO, model={"normalize_mixture": "true"})  # of the first name and seed
TOKENS = 100_000
COLUMNS = ("name", "normalize_mixture", "seed", "treatment", "rows", "loss")


class Treated(nn.Module):
    """The layer in groups of n rows."""

    def __init__(self, layer: MixtureOfTokens, n: int):
        super().__init__()
        self.layer, self.n = layer, n

    def forward(self, x: Tensor, token_mask: Tensor | None = None) -> Tensor:
        return self.layer(x, token_mask)


class Zeros(Treated):
    def forward(self, x: Tensor, token_mask: Tensor | None = None) -> Tensor:
        return self.layer(F.pad(x, (0, 0, 0, 0, 0, self.layer.group_size - len(x))))[: len(x)]


class Softmax(Treated):
    def forward(self, x: Tensor, token_mask: Tensor | None = None) -> Tensor:
        before, self.layer.group_size = self.layer.group_size, self.n
        try:
            return self.layer(x, token_mask)
        finally:
            self.layer.group_size = before


class Scaled(Softmax):
    def forward(self, x: Tensor, token_mask: Tensor | None = None) -> Tensor:
        return super().forward(x, token_mask) * self.n / self.layer.group_size


TREATMENTS = {"companions": Treated, "zeros": Zeros, "scaled": Scaled, "softmax": Softmax}


@torch.no_grad()
def losses(run: Path, most: int = TOKENS) -> list[dict[str, object]]:
    """Rows of losses.csv, over about so many tokens."""
    model, prepared, facts = load_model(str(run)).cpu(), text_of(str(run)), read_run(run).facts
    text = prepared.validation
    calibrate_companions(model, training_groups(prepared.train, model.config.group_size))
    blocks = [block for block in model.model.layers if isinstance(block.mlp, MixtureOfTokens)]
    layers = [block.mlp for block in blocks]
    group_size = model.config.group_size
    groups = grouped_order(text, group_size)[: max(1, most // (group_size * text.context))]
    found = []
    sizes = [2**power for power in range(group_size.bit_length())]
    cells = [(n, treatment) for n in sizes for treatment in TREATMENTS if n < group_size or treatment == "companions"]
    for n, treatment in tqdm(cells, desc=str(run)):
        for block, layer in zip(blocks, layers, strict=True):
            block.mlp = TREATMENTS[treatment](layer, n)
        nats, tokens = 0.0, 0
        for rows in groups.reshape(-1, n):
            group_nats, count = cross_entropy(model, text.batch(np.asarray(rows)))
            nats, tokens = nats + group_nats, tokens + count
        values = (facts.name, model.config.normalize_mixture, facts.seed, treatment, n, nats / tokens)
        found.append(dict(zip(COLUMNS, values, strict=True)))
    return found


def make(sources: Experiment, experiment: Experiment) -> None:
    """Train the runs that are missing, and measure those that have not been."""
    runs = [trained(sources, name, seed, NANO) for name in NAMES for seed in SEEDS]
    runs.append(trained(experiment, NAMES[0], SEEDS[0], NORMALIZED))
    experiment.trained.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, str]] = []
    for run in runs:
        measured = experiment.trained / f"{run.parent.name}-{run.name}.csv"
        if not measured.is_file():
            write_csv(measured, COLUMNS, losses(run))
        rows += read_csv(measured)
    write_csv(experiment.kept / "losses.csv", COLUMNS, rows)


def table(kept: Path) -> str:
    """Means over the seeds and, in brackets where there are several, from the least to the greatest."""
    found = read_csv(kept / "losses.csv")
    sizes = sorted({int(row["rows"]) for row in found})
    of: dict[tuple[str, ...], list[float]] = {}
    for row in found:
        key = (row["name"], row["normalize_mixture"], row["treatment"], row["rows"])
        of.setdefault(key, []).append(float(row["loss"]))
    rows = [["model", "normalized", "missing rows", *map(str, sizes)]]
    for name, normalized, treatment in dict.fromkeys(key[:3] for key in of):
        cells = []
        for n in sizes:
            none_missing = n == sizes[-1]  # where all treatments are the same
            cells.append(spread(of[name, normalized, "companions" if none_missing else treatment, str(n)]))
        rows.append([name, "yes" if normalized == "True" else "no", treatment, *cells])
    return markdown(rows, left=3)


if __name__ == "__main__":
    experiment = Experiment.named("partial_groups")
    script(__doc__, lambda: make(Experiment.named("nano"), experiment), lambda: table(experiment.kept))
