"""Documents -> one file of their text -> training, tuning and validation documents that are fit for grouping.

No document may be in a group twice, so none may have more than a share of its split. If there are many documents,
longer ones are cut. If there are too few, or cutting would leave too little text, nothing is cut, and far-apart
segments of a document count as documents (`blocks.segmented`).
"""

import hashlib
import math
import os
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from mixture_of_tokens.data.duplicates import unlike
from mixture_of_tokens.data.files import Document
from mixture_of_tokens.utils.files import opened

SPLITS = ("train", "tuning", "validation")
VALIDATION, TUNING = 0.1, 0.05  # of the documents; with few documents, of each document
HELD_OUT = 10**7  # about the most bytes: a split is evaluated in full, and a tenth of a large corpus would take minutes
FEW = 20  # with fewer documents, each is divided among the splits
HUGE = 2.5  # so is a document this many times as long as the validation split is to be


@dataclass(frozen=True)
class Splits:
    """By split: offset and length (documents, 2), int64, of its documents in the text file, and which ones are cut.

    bytes: of all documents before they were cut, duplicates left out.
    """

    places: dict[str, np.ndarray]
    cut: dict[str, np.ndarray]
    duplicates: int
    bytes: int


def spool(
    documents: Iterable[Document], file: Path, max_bytes: int | None, progress: Callable[[int], Any]
) -> tuple[np.ndarray, np.ndarray]:
    """Write the text of all documents, or its first `max_bytes`, to a file.

    Returns each document's offset and length in the file (documents, 2), int64, and hash (documents,), uint64.
    """
    lengths, digests, total, most = array("q"), array("Q"), 0, math.inf if max_bytes is None else max_bytes
    with file.open("wb") as out:
        for document in documents:
            digest, length = hashlib.sha256(), 0
            for part in document:
                out.write(part)
                digest.update(part)
                length += len(part)
                progress(len(part))
                if total + length > most:
                    break
            if max_bytes is not None and total + length > max_bytes:
                out.flush()
                with opened(file) as written:
                    length = _character(written, max_bytes) - total
            if length:
                lengths.append(length)
                digests.append(int.from_bytes(digest.digest()[:8]))
            total += length
            if total + 4 > most:  # no room for any character
                break
    length = np.array(lengths, dtype=np.int64)
    return np.stack([np.cumsum(length) - length, length], axis=1), np.array(digests, dtype=np.uint64)


def split(
    file: Path,
    places: np.ndarray,
    digests: np.ndarray,
    *,
    group_size: int,
    work: Path,
    progress: Callable[[int], Any],
    keep_near: bool = False,
    held_out: int = HELD_OUT,
    may_be_empty: bool = False,
) -> Splits:
    """Leave out duplicates, assign documents to splits in an order set by their content, cut those that are too long.

    Args:
        file, places, digests: what `spool` wrote and returned.
        group_size: no document may have more than its `longest_share` of its split's bytes.
        work: a folder for temporary files.
        progress: called with the number of bytes sketched.
        keep_near: keep near-duplicates.
        held_out: about the most bytes for tuning, and for validation.

    Raises ValueError if there is no text, unless it may be empty.
    """
    kept, duplicates = unlike(file, places, digests, work, progress, keep_near=keep_near) if places.any() else ([], 0)
    if not len(kept) and may_be_empty:
        none = np.zeros((0, 2), dtype=np.int64)
        return Splits(dict.fromkeys(SPLITS, none), dict.fromkeys(SPLITS, none[:, 0] > 0), duplicates, 0)
    if not len(kept):
        raise ValueError("there is no text in the corpus")
    documents = places[kept]
    total = int(documents[:, 1].sum())
    shares = [min(share, held_out / total) for share in (VALIDATION, TUNING)]
    huge = documents[:, 1] > HUGE * max(shares) * total
    # Few documents, or such large ones that a single one exceeds what is held out.
    divide_all = len(documents) < FEW or round(min(shares) * int((~huge).sum())) < 1
    with opened(file) as text:
        divided = [_divided(text, *place, *shares) for place in documents[huge | divide_all].tolist()]
        in_parts = list(np.array(divided, dtype=np.int64).reshape(-1, len(SPLITS), 2).swapaxes(0, 1))
        if divide_all:
            parts = uncut = in_parts
        else:
            rest = documents[~huge]
            counts = [_count(len(rest), share, group_size) for share in shares]
            dealt = np.split(rest, np.cumsum(counts))[::-1]
            uncut = [np.concatenate(both) for both in zip(dealt, in_parts, strict=True)]
            # Training divides documents into segments rather than lose half of its text; evaluation loses text.
            parts = [
                _cut(text, p, group_size, 0.5 if s == "train" else 0.125) for s, p in zip(SPLITS, uncut, strict=True)
            ]
    result, cut = {}, {}
    for name, part, before in zip(SPLITS, parts, uncut, strict=True):
        some = part[:, 1] > 0
        result[name], cut[name] = part[some], (part != before).any(axis=1)[some]
    return Splits(result, cut, duplicates, total)


def longest_share(group_size: int) -> float:
    """Of a split's bytes, that a document may have at most: less than one of `group_size` parts, with some room."""
    return 1 / (2.5 * group_size)


def _enough(documents: int, group_size: int) -> bool:
    """Whether there are enough documents for each to have less than 1 / (2 * group_size) of all text."""
    return documents >= 3.125 * group_size


def _count(documents: int, share: float, group_size: int) -> int:
    """The number of a split's documents: its share of all, or up to twice that if it then needs no segments."""
    usual, more = round(share * documents), min(round(2 * share * documents), 5 * group_size)
    return more if more > usual and _enough(more, group_size) else usual


def _cut(text: int, places: np.ndarray, group_size: int, least: float) -> np.ndarray:
    """Documents cut to their share; unchanged if there are too few or if less than `least` of the text remained."""
    if not _enough(len(places), group_size):
        return places
    share = longest_share(group_size)
    lengths = places[:, 1]
    longest, total = int(lengths.max()), int(lengths.sum())
    while longest > share * total and total >= least * lengths.sum():
        longest = int(share * total)  # cutting lowers the total, and with it the share
        total = int(np.minimum(lengths, longest).sum())
    if total < least * lengths.sum():
        return places
    return _shortened(text, places, np.minimum(lengths, longest))


def cut_by_tokens(text: int, places: np.ndarray, tokens: np.ndarray, group_size: int) -> np.ndarray:
    """Documents within their share of the bytes, cut if they exceed their share of the `tokens` (documents,).

    Tables of numbers may have twice as many tokens as prose of that length. Nothing is cut if there are too few
    documents, or if that would remove more than a tenth of the text.
    """
    most = tokens.sum() / (2.2 * group_size)
    if not _enough(len(places), group_size) or (tokens - np.minimum(tokens, most)).sum() > tokens.sum() / 10:
        return places
    lengths = places[:, 1]
    return _shortened(text, places, np.where(tokens > most, (0.9 * most / tokens * lengths).astype(np.int64), lengths))


def _shortened(text: int, places: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Documents cut to `lengths` (documents,) or to the end of a character before it."""
    result = places.copy()
    for number in np.flatnonzero(lengths < places[:, 1]):
        offset = int(places[number, 0])
        result[number, 1] = _character(text, offset + int(lengths[number])) - offset
    return result


def _divided(text: int, offset: int, length: int, validation: float, tuning: float) -> list[tuple[int, int]]:
    """Training, tuning and validation part of a document, in the order of its text."""
    edges = [offset]
    for share in (1 - validation - tuning, 1 - validation):
        place = offset + round(share * length)
        line_end = os.pread(text, min(length // 40, 2**16, offset + length - place), place).find(b"\n")
        edges.append(_character(text, place) if line_end < 0 else place + line_end + 1)
    edges.append(offset + length)
    return [(a, b - a) for a, b in pairwise(edges)]


def _character(text: int, place: int) -> int:
    """The start of the UTF-8 character that the byte at `place` of an open file is part of."""
    while (os.pread(text, 1, place) or b"\0")[0] & 0xC0 == 0x80:
        place -= 1
    return place


def pieces_of(file: int, offset: int, length: int, largest: int) -> Iterator[bytes]:
    """The text of a document in pieces of at most `largest` bytes that end at a line's end, or at a character's."""
    end = offset + length
    while offset < end:
        piece = os.pread(file, min(largest, end - offset), offset)
        if offset + len(piece) < end:
            last = piece.rfind(b"\n", len(piece) // 2) + 1
            piece = piece[: last or _character(file, offset + len(piece)) - offset]
        yield piece
        offset += len(piece)
