"""What a group that is not full costs: loss by real rows a group, for four ways to treat the rows that are missing.

    python experiments/partial_groups.py experiments/nano/MoT-Nano-32E-seed* > experiments/partial_groups.csv
    python experiments/partial_groups.py --table experiments/partial_groups.csv    # Markdown

    companions  each expert's typical companions stand for the missing rows: what the library does
    zeros       rows of zeros stand for them, each with e^0 in the softmax's sum: the library before it is calibrated
    scaled      softmax over the n real rows, output scaled by n / G: a group filled up with copies of its rows
    softmax     the same, output as it is: a group of n

The runs need their model/; companions are measured as `mot train` does it. Losses are over some 100,000 tokens of the
validation text, the same in every cell.
"""

import csv
import json
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from mixture_of_tokens.data.groups import grouped_order, training_groups
from mixture_of_tokens.inference.evaluate import cross_entropy
from mixture_of_tokens.layers import MixtureOfTokens
from mixture_of_tokens.model.companions import calibrate_companions
from mixture_of_tokens.runs.loading import load_model, text_of

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
def losses(run: Path) -> list[dict]:
    model, prepared = load_model(str(run)), text_of(str(run))
    text = prepared.validation
    calibrate_companions(model, training_groups(prepared.train, model.config.group_size))
    blocks = [block for block in model.model.layers if isinstance(block.mlp, MixtureOfTokens)]
    layers = [block.mlp for block in blocks]
    group_size = model.config.group_size
    groups = grouped_order(text, group_size)[: TOKENS // (group_size * text.context)]
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
        facts = {key: value for key, value in json.loads((run / "run.json").read_text()).items() if key in COLUMNS}
        facts |= {"normalize_mixture": model.config.normalize_mixture, "treatment": treatment, "rows": n}
        found.append(facts | {"loss": nats / tokens})
    return found


def table(rows: list[dict[str, str]]) -> str:
    """Means over the seeds and, in brackets where there are several, from the least to the greatest."""
    sizes = sorted({int(row["rows"]) for row in rows})
    lines = [["model", "normalized", "missing rows", *map(str, sizes)], ["---"] * 3 + ["---:"] * len(sizes)]
    for name, normalized, treatment in dict.fromkeys(
        (row["name"], row["normalize_mixture"], row["treatment"]) for row in rows
    ):
        cells = []
        for n in sizes:
            kept = "companions" if n == sizes[-1] else treatment
            found = [
                float(row["loss"])
                for row in rows
                if (row["name"], row["normalize_mixture"], row["treatment"], int(row["rows"]))
                == (name, normalized, kept, n)
            ]
            between = f" ({min(found):.3f} to {max(found):.3f})" if len(found) > 1 else ""
            cells.append(f"{np.mean(found):.3f}{between}")
        lines.append([name, "yes" if normalized == "True" else "no", treatment, *cells])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> None:
    if sys.argv[1] == "--table":
        with Path(sys.argv[2]).open() as file:
            print(table(list(csv.DictReader(file))))
        return
    writer = csv.DictWriter(sys.stdout, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for run in sys.argv[1:]:
        writer.writerows(losses(Path(run)))
        sys.stdout.flush()


if __name__ == "__main__":
    main()
