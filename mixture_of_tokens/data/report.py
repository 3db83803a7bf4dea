"""How a corpus was prepared, and whether the blocks of every group come from different documents."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from mixture_of_tokens.data.blocks import Blocks
from mixture_of_tokens.data.groups import deal, meetings
from mixture_of_tokens.data.prepare import SPLITS, prepare_text
from mixture_of_tokens.utils.formatting import Result, aligned

TITLES = {"segments": "segments of long documents that count as documents"}
EPOCHS = 3  # epochs of training order that are searched for collisions


@dataclass(frozen=True)
class DataReport(Result):
    """What is in a prepared corpus: numbers by split, and facts about the corpus."""

    splits: dict[str, dict[str, Any]]
    whole: dict[str, Any]

    def as_dict(self) -> dict[str, Any]:
        return {"splits": self.splits, **self.whole}

    def __str__(self) -> str:
        rows: list[tuple[str, ...]] = [("", *SPLITS)]
        for key in self.splits["train"]:
            rows.append((key, *(_shown(self.splits[name][key]) for name in SPLITS)))
        facts = [
            f"{title_of(key)}: {', '.join(value) if isinstance(value, list) else _shown(value)}"
            for key, value in self.whole.items()
        ]
        return "\n".join([aligned(rows), "", *facts])


def data_report(
    *data: str,
    field: str,
    max_bytes: int | None,
    tokenizer: str | None,
    vocab_size: int | None,
    context: int,
    group_size: int,
    near_duplicates: Literal["drop", "keep"],
) -> DataReport:
    """As the function of `commands/data_report.py`, which explains its arguments."""
    prepared = prepare_text(
        [*data] or None,
        field=field,
        max_bytes=max_bytes,
        vocab_size=vocab_size,
        context=context,
        tokenizer=tokenizer,
        group_size=group_size,
        keep_near_duplicates=near_duplicates == "keep",
    )
    splits = {name: _facts(getattr(prepared, name), prepared.facts[name], group_size) for name in SPLITS}
    whole = {key: value for key, value in prepared.facts.items() if key not in SPLITS}
    return DataReport(splits, whole | {"cache": str(prepared.directory)})


def title_of(fact: str) -> str:
    """What a fact of a corpus is called where people read it."""
    return TITLES.get(fact, fact.replace("_", " "))


def _shown(value: Any) -> str:
    return f"{value:,.2f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def _facts(blocks: Blocks, counts: dict[str, int], group_size: int) -> dict[str, Any]:
    of_document = np.zeros(1, dtype=np.int64)
    if len(blocks):
        first, last = blocks.documents(np.arange(len(blocks)))
        changes = np.zeros(len(blocks.ends) + 1, dtype=np.int64)
        np.add.at(changes, first, 1)
        np.add.at(changes, last + 1, -1)
        of_document = np.cumsum(changes)[:-1]
    rows = found = divided = 0
    for order in _orders(blocks, group_size):
        met = meetings(blocks, order)
        rows, found, divided = rows + int((order >= 0).sum()), found + met[0], divided + met[1]
    return counts | {
        "bytes per token": round(counts["bytes"] / max(1, counts["tokens"]), 3),
        "blocks": len(blocks),
        "blocks per document, median": float(np.median(of_document)),
        "blocks per document, most": int(of_document.max()),
        "groups": len(blocks) // group_size,
        "collisions": found,
        "rows beside another part of their document": round(divided / max(1, rows), 3),
        "tokens between the two, at least": blocks.apart(group_size) if divided else 0,
    }


def _orders(blocks: Blocks, group_size: int) -> Iterator[np.ndarray]:
    """Groups as in some epochs of training, and as in an evaluation."""
    for epoch in range(EPOCHS) if len(blocks) >= 2 * group_size else ():
        yield deal(blocks, group_size, epoch=epoch)
    if blocks.total:
        rows = min(group_size, blocks.total)  # a larger group would only have more empty places
        yield deal(blocks, rows, everything=True)
