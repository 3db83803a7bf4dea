"""Tokens of one's own: whole documents held out for validation, and a count of documents that meet themselves."""

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from mixture_of_tokens.data.groups import Blocks, count_of_one_document, deal, documents_of, prepare_tokens
from mixture_of_tokens.utils.checks import check


def split_tokens(
    tokens: Any,
    ends: Sequence[int] | np.ndarray | Tensor | None = None,
    *,
    share: float = 0.1,
    context: int = 64,
    group_size: int = 32,
    vocab_size: int | None = None,
) -> tuple[Blocks, Blocks]:
    """Text for training and text held out for validation, of tokens and `ends` as `prepare_tokens` takes them.

    Whole documents are held out, chosen by a hash of their tokens: the same ones each time, and equal documents
    together. Documents that are merely alike are not found; `prepare_text` leaves them out.

    Args:
        share: Of all tokens, about so many are held out. Others are as in `prepare_tokens`.

    Raises ValueError as `prepare_tokens` does, and where there are no two different documents.
    """
    check("share", share, float)
    if not 0 < share < 1:
        raise ValueError(f"share must be between 0 and 1, not {share}")
    given, where = documents_of(tokens, ends)
    documents = np.split(given, where[:-1])
    alike: dict[bytes, list[int]] = {}
    for number, document in enumerate(documents):
        alike.setdefault(hashlib.sha256(document.astype("<i8").tobytes()).digest(), []).append(number)
    if len(alike) < 2:
        raise ValueError("there are no two different documents to split: of a single long one give parts as documents")
    left, held_out = share * len(given), set()
    for digest in sorted(alike)[:-1]:  # one is left to train on
        held_out.update(alike[digest])
        left -= sum(len(documents[number]) for number in alike[digest])
        if left <= 0:
            break
    how: dict[str, Any] = {"context": context, "group_size": group_size, "vocab_size": vocab_size}
    parts = ([d for i, d in enumerate(documents) if (i in held_out) == out] for out in (False, True))
    trained, validation = (prepare_tokens(part, **how) for part in parts)
    return trained, validation


def count_collisions(text: Blocks, *, group_size: int, rows: Iterable[int] | np.ndarray | Tensor | None = None) -> int:
    """How many rows are in a group with a row of the same document, and so can be shown its future.

    Where documents were divided into segments, as there are too few of them, these count as the one document they are.

    Args:
        text: As `prepare_tokens` or `prepare_text` returns it.
        group_size: Consecutive rows that are mixed.
        rows: Numbers of blocks in an order of your own, such as `torch.randperm(len(text))`; those after the last whole
            group are left out. By default all, in the order of `GroupedBatches`, where there are none but of divided
            documents.

    Raises ValueError for numbers of no block, and for less text than two groups.
    """
    check("group_size", group_size, int)
    if rows is None:
        groups = deal(text, group_size)
    else:
        numbers = np.asarray(rows.cpu() if isinstance(rows, Tensor) else list(rows), dtype=np.int64)
        if len(numbers) and not 0 <= numbers.min() <= numbers.max() < len(text):
            raise ValueError(f"rows has {numbers.min()} to {numbers.max()}; blocks are 0 to {len(text) - 1}")
        groups = numbers[: len(numbers) // group_size * group_size].reshape(-1, group_size)
    return count_of_one_document(text, groups)
