"""Tokens of one's own, grouped as prepared text is; whole documents held out for validation; a count of documents that
meet themselves."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from mixture_of_tokens.data.blocks import Blocks, say_segments
from mixture_of_tokens.data.groups import collisions, deal
from mixture_of_tokens.utils.checks import LARGEST, check, check_sizes


def prepare_tokens(
    tokens: Any,
    ends: Sequence[int] | np.ndarray | Tensor | None = None,
    *,
    context: int = 64,
    group_size: int = 32,
    vocab_size: int | None = None,
    separate_documents: bool = False,
) -> Blocks:
    """Text that is tokens already, for `GroupedBatches`.

    Args:
        tokens: Documents, as in a list or from an iterator, each one-dimensional, of token ids; empty ones are left
            out. Or, with `ends`, one array of all of them, one after the other; a np.memmap stays on the disk. Arrays
            are numpy's, torch's or lists. Nothing is added: close each document with the token that ends a text.
        ends: (documents,), where each document ends in all tokens, so the last one is their number. It is this that
            keeps parts of one document out of one group.
        context: Tokens in a block.
        group_size: Documents are divided into segments such that groups of this size can be made of different ones;
            where there are such segments, a line on standard error says so.
        vocab_size: Of the model: ids must be below it.
        separate_documents: Documents of a row do not see each other; batches then have `position_ids`.

    Raises ValueError for what holds no token ids, for ids below 0 or beyond the vocabulary, and for sizes below 1.
    """
    check_sizes(context=context, group_size=group_size, **({} if vocab_size is None else {"vocab_size": vocab_size}))
    given, where = documents_of(tokens, ends)
    _check_ids(given, LARGEST + 1 if vocab_size is None else vocab_size)
    blocks = Blocks.of(given, where, context, group_size, separate=separate_documents)
    say_segments(["tokens"], group_size, blocks)
    return blocks


def documents_of(tokens: Any, ends: Any = None) -> tuple[np.ndarray, np.ndarray]:
    """All ids as one array, and where each document ends in it (documents,), int64, as `prepare_tokens` takes them."""
    given, lengths = _joined(tokens)
    if ends is None and lengths is None:
        raise ValueError("ends is missing: where each document ends in tokens; or give tokens as a list of documents")
    where = (np.cumsum(lengths or []) if ends is None else _ids("ends", ends)).astype(np.int64)
    if not len(where) or where[-1] != len(given) or (np.diff(where, prepend=0) <= 0).any():
        what = f"ends must rise to the number of tokens, {len(given)}: where each document ends"
        are_lengths = len(where) > 0 and where.sum() == len(given)
        raise ValueError(what + (". These look like lengths: give np.cumsum of them" if are_lengths else ""))
    return given, where


def _joined(tokens: Any) -> tuple[np.ndarray, list[int] | None]:
    """All ids as one array, and the lengths of the documents; None of what is one array already."""
    if isinstance(tokens, str | bytes | Mapping) or not isinstance(tokens, Iterable):
        raise ValueError(f"tokens takes documents of token ids, or one array of them, not {type(tokens).__name__}")
    if isinstance(tokens, Tensor) or (isinstance(tokens, np.ndarray) and tokens.dtype != object):
        return _ids("tokens", tokens), None
    documents = list(tokens)
    if documents and not getattr(documents[0], "ndim", isinstance(documents[0], Iterable)):  # a number
        return _ids("tokens", documents), None
    arrays = [_ids(f"tokens: document {number}", each) for number, each in enumerate(documents)]
    arrays = [array for array in arrays if len(array)]
    if not arrays:
        raise ValueError("tokens holds no document with a token")
    # Of signed and unsigned numbers numpy would make floats.
    wide = None if len({array.dtype for array in arrays}) == 1 else np.int64
    return np.concatenate(arrays, dtype=wide, casting="unsafe"), [len(array) for array in arrays]


def _ids(name: str, given: Any) -> np.ndarray:
    """Raises ValueError, naming it, for what is no one-dimensional array of whole numbers."""
    try:
        array = given.numpy(force=True) if isinstance(given, Tensor) else np.asarray(given)
    except (ValueError, TypeError, RuntimeError):  # lists of different lengths; bfloat16, which numpy lacks
        array = np.empty(())
    if array.ndim != 1 or not (np.issubdtype(array.dtype, np.integer) or not array.size):
        several = "; where each row is a document, give a list of the rows" if array.ndim > 1 else ""
        raise ValueError(f"{name} must be a one-dimensional array of integers{several}")
    return array if array.size else array.astype(np.int64)


def _check_ids(tokens: np.ndarray, count: int) -> None:
    """Raises ValueError for ids that are not 0 to `count` - 1; a file is read only where its type allows of such."""
    kind = np.iinfo(tokens.dtype)
    least, most = (tokens.min() if kind.min < 0 else 0), (tokens.max() if kind.max >= count else 0)
    if least < 0 or most >= count:
        raise ValueError(f"tokens has the id {least if least < 0 else most}; ids are 0 to {count - 1}")


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
    check_sizes(group_size=group_size)
    if rows is None:
        groups = deal(text, group_size)
    else:
        numbers = np.asarray(rows.cpu() if isinstance(rows, Tensor) else list(rows), dtype=np.int64)
        if len(numbers) and not 0 <= numbers.min() <= numbers.max() < len(text):
            raise ValueError(f"rows has {numbers.min()} to {numbers.max()}; blocks are 0 to {len(text) - 1}")
        groups = numbers[: len(numbers) // group_size * group_size].reshape(-1, group_size)
    return collisions(text.undivided, groups)
