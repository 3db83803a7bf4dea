"""Tokens -> blocks that know their documents.

A document can be in a group twice only if it has more than 1 / (2 G) of the blocks, as `groups` says. Such a document
is divided into segments, which count as documents.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from mixture_of_tokens.data.tokens import TokenFile
from mixture_of_tokens.layers.losses import IGNORE
from mixture_of_tokens.utils.formatting import few_of
from mixture_of_tokens.utils.progress import say_once


@dataclass(frozen=True)
class Blocks:
    """A token stream cut into blocks of `context` tokens, each with the token that follows as its last target.

    tokens: (L,) of one split, documents one after the other, each closed by the end-of-text token.
    ends: (documents,), where each document ends in `tokens`; or each segment, which counts as a document.
    document_ends: where whole documents end, if some are divided into segments; else None, as `ends` says it.
    bytes: the UTF-8 length of the text, by which an evaluation divides; 0 of text that is only trained on.
    separate: whether the documents of a block do not see each other: a batch then has `position_ids`.
    """

    tokens: np.ndarray | TokenFile
    ends: np.ndarray
    context: int
    bytes: int = 0
    separate: bool = False
    document_ends: np.ndarray | None = None

    @classmethod
    def of(cls, tokens: np.ndarray | TokenFile, ends: np.ndarray, context: int, group_size: int, **others: Any) -> Self:
        """Of whole documents, divided into segments where groups of this size could not be made of different ones."""
        parts = segmented(ends, context, group_size)
        return cls(tokens, parts, context, document_ends=ends if len(parts) > len(ends) else None, **others)

    @property
    def undivided(self) -> Self:
        """The same with whole documents."""
        return self if self.document_ends is None else replace(self, ends=self.document_ends, document_ends=None)

    @property
    def segments(self) -> int:
        """How many segments count as documents."""
        if self.document_ends is None:
            return 0
        parts = np.bincount(np.searchsorted(self.document_ends, self.ends))
        return int(parts[parts > 1].sum())

    def apart(self, group_size: int) -> int:
        """How many tokens lie at least between two blocks of a group, as `tokens_apart` says."""
        return tokens_apart(len(self.tokens), self.context, group_size)

    def __repr__(self) -> str:
        sizes = f"{len(self.tokens):,} tokens, {len(self.ends):,} documents or segments"
        return f"Blocks({len(self):,} of {self.context} tokens; {sizes})"

    def __len__(self) -> int:
        """Complete blocks. The incomplete one at the end is evaluated (`padded=True`) but not trained on."""
        return max(0, len(self.tokens) - 1) // self.context

    @property
    def total(self) -> int:
        """Blocks, including the incomplete one at the end."""
        return -(-max(0, len(self.tokens) - 1) // self.context)

    def documents(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """First and last document that a block touches, its last target included."""
        start = np.asarray(index, dtype=np.int64) * self.context
        last = np.minimum(start + self.context, len(self.tokens) - 1)
        return np.searchsorted(self.ends, start, "right"), np.searchsorted(self.ends, last, "right")

    def batch(self, index: np.ndarray, padded: bool = False) -> dict[str, Tensor]:
        """Blocks by number, as model inputs (B, T). With `padded`, number -1 is an empty row, and there is a mask.

        Of `separate` documents the mask is of tokens alone: beside an attention mask transformers would not look at
        positions, and padding, which is on the right, is a document of its own.
        """
        index = np.asarray(index, dtype=np.int64)[:, None]
        position = index * self.context + np.arange(self.context + 1)
        real = (position < len(self.tokens)) & (index >= 0)
        window = torch.from_numpy(self.tokens[np.where(real, position, 0)].astype(np.int64))
        ids, labels = window[:, :-1].contiguous(), window[:, 1:].contiguous()  # else a GPU waits for each copy
        inputs = {"input_ids": ids, "shift_labels": labels}
        if self.separate:
            inputs["position_ids"] = torch.from_numpy(self._in_documents(position[:, :-1]))
        if not padded:
            return inputs
        mask = torch.from_numpy(real)
        masked = {"token_mask": mask[:, :-1]} if self.separate else {"attention_mask": mask[:, :-1].long()}
        return inputs | {"shift_labels": torch.where(mask[:, 1:], labels, IGNORE)} | masked

    def _in_documents(self, position: np.ndarray) -> np.ndarray:
        """Places of tokens (B, T) in their rows, counted anew from the first token of each document."""
        document = np.searchsorted(self.ends, position, "right")
        begin = np.where(document > 0, self.ends[document - 1], position[:, :1])  # an empty row is before all
        return position - np.maximum(begin, position[:, :1])


def tokens_apart(tokens: int, context: int, group_size: int) -> int:
    """How many tokens lie at least between the last target of a block and the first token of another of its group."""
    return max(1, (tokens - 1) // context // group_size // 2) * context


def segmented(ends: np.ndarray, context: int, group_size: int) -> np.ndarray:
    """Divide documents (`ends` as in `Blocks`) that could be in a group twice into segments that cannot.

    A segment is at most half as long as what lies between two blocks of a group, so two blocks of one document never
    touch the same segment or adjacent ones.

    Returns the new `ends`; no token is added.
    """
    lengths = np.diff(ends, prepend=0)
    reach = tokens_apart(int(lengths.sum()), context, group_size)
    parts = np.where(lengths > reach, -(-lengths // max(1, reach // 2)), 1)
    document = np.repeat(np.arange(len(ends)), parts)
    part = np.arange(1, len(document) + 1) - (np.cumsum(parts) - parts)[document]
    return (ends - lengths)[document] + part * lengths[document] // parts[document]


def say_segments(sources: Sequence[str], group_size: int, *texts: Blocks) -> None:
    """Once for a text, if it has segments: a part of several is opened often."""
    divided = [blocks for blocks in texts if blocks.segments]
    if not divided:
        return
    segments = sum(blocks.segments for blocks in divided)
    apart = min(blocks.apart(group_size) for blocks in divided)
    what = f"{few_of(sources)}: too few documents, or too long ones, for groups of {group_size} different ones"
    how = f"long documents are divided into {segments:,} segments, which count as documents"
    means = f"Two of a document, at least {apart:,} tokens apart, may meet in a group: bad if one tells of the other"
    say_once(f"{what}: {how}. {means}. With some {40 * group_size:,} documents of like length none is divided")


def in_blocks_of(blocks: Blocks, context: int, group_size: int) -> Blocks:
    """The same text in blocks of another length, its documents divided once more where those could meet."""
    whole = blocks.undivided.ends
    ends = segmented(blocks.ends, context, group_size)
    return replace(blocks, context=context, ends=ends, document_ends=whole if len(ends) > len(whole) else None)
