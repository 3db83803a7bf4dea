"""What a group that is not full costs: loss by real rows a group, for three ways to treat the rows that are missing.

    python experiments/partial_groups.py experiments/nano/MoT-Nano-32E-seed* > experiments/partial_groups.csv
    python experiments/partial_groups.py --table experiments/partial_groups.csv    # Markdown

    scaled    softmax over the n real rows, output scaled by n / G: what the library does, and what a group filled up
              with copies of its rows gives
    softmax   softmax over the n real rows, output as it is: a group of n
    zeros     the missing rows are zeros that take part: each takes e^0 of the softmax's sum

The runs need their model/. Losses are over some 100,000 tokens of the validation text, the same in every cell.
"""

import csv
import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from mixture_of_tokens.data import grouped_order
from mixture_of_tokens.evaluate import cross_entropy
from mixture_of_tokens.layers import MixtureOfTokens
from mixture_of_tokens.loading import load_model, text_of

TOKENS = 100_000
COLUMNS = ("name", "normalize_mixture", "seed", "treatment", "rows", "loss")


class AsGroupsOf(nn.Module):
    """The layer for groups of n rows, without a scale."""

    def __init__(self, layer: MixtureOfTokens, n: int):
        super().__init__()
        self.layer, self.n = layer, n

    def forward(self, x: Tensor, token_mask: Tensor | None = None) -> Tensor:
        before, self.layer.group_size = self.layer.group_size, self.n
        try:
            return self.layer(x, token_mask)
        finally:
            self.layer.group_size = before


class WithZeros(AsGroupsOf):
    """The layer over n rows and zeros that are not masked."""

    def forward(self, x: Tensor, token_mask: Tensor | None = None) -> Tensor:
        return self.layer(F.pad(x, (0, 0, 0, 0, 0, self.layer.group_size - len(x))))[: len(x)]


TREATMENTS: dict[str, Callable[[MixtureOfTokens, int], nn.Module]] = {
    "scaled": lambda layer, n: layer,
    "softmax": AsGroupsOf,
    "zeros": WithZeros,
}


@torch.no_grad()
def losses(run: Path) -> list[dict]:
    model, text = load_model(str(run)), text_of(str(run)).validation
    blocks = [block for block in model.model.layers if isinstance(block.mlp, MixtureOfTokens)]
    layers = [block.mlp for block in blocks]
    group_size = model.config.group_size
    groups = grouped_order(text, group_size)[: TOKENS // (group_size * text.context)]
    found = []
    sizes = [2**power for power in range(group_size.bit_length())]
    cells = [(n, treatment) for n in sizes for treatment in TREATMENTS if n < group_size or treatment == "scaled"]
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
            kept = "scaled" if n == sizes[-1] else treatment
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
