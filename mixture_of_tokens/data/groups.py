"""Tokens -> blocks that know their documents -> batches in groups.

The G rows of a group are blocks of different documents, by construction. Blocks are in the order of the text, so the
blocks of one document are neighbours. They are divided into G stripes. A group takes one random block of every stripe,
all from the first halves of the stripes or all from the second. The blocks of a group are therefore more than half a
stripe apart, and a document can be in a group twice only if it has more than 1 / (2 G) of the blocks. Such a document
is divided into segments, which count as documents: see `segmented`.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from mixture_of_tokens.data.tokens import TokenFiles
from mixture_of_tokens.layers.losses import IGNORE
from mixture_of_tokens.utils.checks import LARGEST, at_least_one, check, check_sizes
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

    tokens: np.ndarray | TokenFiles
    ends: np.ndarray
    context: int
    bytes: int = 0
    separate: bool = False
    document_ends: np.ndarray | None = None

    @classmethod
    def of(
        cls, tokens: np.ndarray | TokenFiles, ends: np.ndarray, context: int, group_size: int, **others: Any
    ) -> Self:
        """Of whole documents, divided into segments where groups of this size could not be made of different ones."""
        parts = segmented(ends, context, group_size)
        return cls(tokens, parts, context, document_ends=ends if len(parts) > len(ends) else None, **others)

    @property
    def whole_ends(self) -> np.ndarray:
        """Where whole documents end, be they divided or not."""
        return self.ends if self.document_ends is None else self.document_ends

    @property
    def segments(self) -> int:
        """How many segments count as documents."""
        if self.document_ends is None:
            return 0
        parts = np.bincount(np.searchsorted(self.document_ends, self.ends))
        return int(parts[parts > 1].sum())

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
    apart = min(tokens_apart(len(blocks.tokens), blocks.context, group_size) for blocks in divided)
    what = f"{few_of(sources)}: too few documents, or too long ones, for groups of {group_size} different ones"
    how = f"long documents are divided into {segments:,} segments, which count as documents"
    means = f"Two of a document, at least {apart:,} tokens apart, may meet in a group: bad if one tells of the other"
    say_once(f"{what}: {how}. {means}. With some {40 * group_size:,} documents of like length none is divided")


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
    check_sizes(context=context, group_size=group_size)
    check("vocab_size", vocab_size, int | None)
    at_least_one(vocab_size=vocab_size)
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


def in_blocks_of(blocks: Blocks, context: int, group_size: int) -> Blocks:
    """The same text in blocks of another length, its documents divided once more where those could meet."""
    whole = blocks.whole_ends
    ends = segmented(blocks.ends, context, group_size)
    return replace(blocks, context=context, ends=ends, document_ends=whole if len(ends) > len(whole) else None)


def deal(blocks: Blocks, group_size: int, *, seed: int = 0, epoch: int = 0, everything: bool = False) -> np.ndarray:
    """`grouped_order`, but a document may meet itself. Raises ValueError for too few blocks."""
    count = blocks.total if everything else len(blocks)
    groups = -(-count // group_size) if everything else count // group_size
    fewest = min(2, group_size)  # a single group would hold neighbouring blocks
    if everything and count:
        groups = max(groups, fewest)
    if groups < fewest:
        more = f"at least {-(-fewest * group_size // count)} times as much text" if count else "more text"
        raise ValueError(
            f"{count} blocks of {blocks.context} tokens do not fill {'two groups' if fewest == 2 else 'a group'} of "
            f"{group_size}: give {more}{', or take smaller groups' if fewest == 2 else ''}"
        )
    rng = np.random.default_rng((seed, epoch))
    places = groups * group_size
    circle = max(places, count)
    # In place, and in 32 bits if they suffice, as there may be many millions of blocks.
    order = np.arange(places, dtype=np.int32 if 2 * circle < 2**31 else np.int64)
    order += int(rng.integers(count))
    order %= circle
    order[order >= count] = -1
    stripes = order.reshape(group_size, groups)
    for half in (stripes[:, : (groups + 1) // 2], stripes[:, (groups + 1) // 2 :]):
        rng.permuted(half, axis=1, out=half)
    return stripes.T[rng.permutation(groups)]


def grouped_order(
    blocks: Blocks, group_size: int, *, seed: int = 0, epoch: int = 0, everything: bool = False
) -> np.ndarray:
    """Block numbers (groups, G) of one epoch: a pure function of its arguments.

    Every complete block is used once, except the remainder that does not fill a group, which changes with the epoch.
    With `everything` all blocks are used, the incomplete last one too, and -1 fills up the incomplete groups.

    Raises ValueError for fewer blocks than two groups need (with `everything`, for none at all), and for a document
    that has more than 1 / (2 G) of the blocks.
    """
    order = deal(blocks, group_size, seed=seed, epoch=epoch, everything=everything)
    if len(collisions(blocks, order)[0]):
        raise ValueError(
            f"a document has more than 1 / {2 * group_size} of the {order.size} blocks and could be in a group "
            "twice: give more text, smaller groups or shorter documents"
        )
    return order


def collisions(blocks: Blocks, groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Blocks that touch a document of another block of their group (groups, G): their groups and places in them."""
    found = []
    rows = max(1, 2**18 // groups.shape[1])  # at once, to save memory
    for start in range(0, len(groups), rows):
        part = groups[start : start + rows]
        empty = part < 0
        first, last = blocks.documents(np.where(empty, 0, part))
        nobody = np.broadcast_to(-1 - np.arange(part.shape[1]), part.shape)  # an empty place is a document of its own
        first, last = np.where(empty, nobody, first), np.where(empty, nobody, last)
        order = np.argsort(first, axis=1)
        first, last = np.take_along_axis(first, order, axis=1), np.take_along_axis(last, order, axis=1)
        group, pair = np.nonzero(last[:, :-1] >= first[:, 1:])
        found.append((start + group, order[group, pair]))
    return np.concatenate([group for group, _ in found]), np.concatenate([place for _, place in found])


def count_of_one_document(blocks: Blocks, groups: np.ndarray) -> int:
    """Blocks that touch a whole document of another block of their group (groups, G), be it divided or not."""
    return len(collisions(replace(blocks, ends=blocks.whole_ends), groups)[0]) if len(groups) else 0


class _Whole(dict):
    """A batch, of which a DataLoader without `collate_fn=dict` asks for rows."""

    def __missing__(self, key: Any) -> Any:
        raise KeyError(f"{key!r}: a batch comes whole, as a dict of tensors; give the DataLoader collate_fn=dict")


class GroupedBatches(Dataset):
    """Training rows in order: row i is of step i // batch_size, and the rows of a step depend on (seed, step) alone.

    `for batch in rows` gives the batch of each step, for `model(**batch)`; `rows[i]` is a single row, and `len(rows)`
    counts rows. `GroupedTrainer` trains on them; in a DataLoader of your own they need `collate_fn=dict`.

    Consecutive rows form groups. So a micro-batch whose size is a multiple of the group size holds complete groups,
    however processes and accumulation divide a step's rows in order.

    A row has `input_ids` and `labels`, the same ids, which models shift by themselves, as transformers has it. Its last
    token would predict nothing then, though the next one is known: `shift_labels` has that too, and a model of
    transformers that gets both takes it in place of `labels`. All are (T,) in a row, (B, T) in a batch.

    Args:
        mixed: rows that the model mixes, by default those of a group; those of a group must be a multiple of them.
        first_step: the number of steps of the run that this one continues.

    Batches must be whole groups of mixed rows, in order: rows of two groups may be of one document. Raises ValueError
    for others, as of a loader that shuffles.
    """

    def __init__(
        self,
        blocks: Blocks,
        *,
        group_size: int,
        batch_size: int,
        steps: int,
        seed: int,
        mixed: int | None = None,
        first_step: int = 0,
    ):
        check("blocks", blocks, Blocks)
        numbers = {"group_size": group_size, "batch_size": batch_size, "steps": steps, "seed": seed}
        numbers |= {"first_step": first_step} | ({} if mixed is None else {"mixed": mixed})
        for what, number in numbers.items():
            check(what, number, int)
        at_least_one(group_size=group_size, mixed=mixed)
        self.blocks, self.group_size, self.seed, self.first_step = blocks, group_size, seed, first_step
        self.mixed = mixed or group_size
        if group_size % self.mixed:
            raise ValueError(f"group_size {group_size} must be a multiple of mixed, {mixed}, or groups would meet")
        self.batch_size, self.length, self.gone = batch_size, steps * batch_size, first_step * batch_size
        for what, number in {"seed": seed, "steps": steps, "first_step": first_step}.items():
            if number < 0:
                raise ValueError(f"{what} must be 0 or more, not {number}")
        if batch_size < 1 or batch_size % self.mixed:
            raise ValueError(f"batch_size {batch_size} must be a multiple of the group size, {self.mixed}")
        self.rows_per_epoch = len(blocks) // group_size * group_size
        self._order: tuple[int, np.ndarray] | None = None
        self._rows_of(0)  # fail now rather than in a worker

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        """The batch of each step."""
        for first in range(0, self.length, self.batch_size):
            yield self.__getitems__(list(range(first, first + self.batch_size)))

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        if not -self.length <= row < self.length:
            raise IndexError(f"there are {self.length} rows, and no row {row}")
        return {name: tensor[0] for name, tensor in self._with_labels([int(row) % self.length]).items()}

    def _blocks_of(self, epoch: int) -> Blocks:
        return self.blocks

    def _rows_of(self, epoch: int) -> np.ndarray:
        if self._order is None or self._order[0] != epoch:
            self._order = (
                epoch,
                grouped_order(self._blocks_of(epoch), self.group_size, seed=self.seed, epoch=epoch).ravel(),
            )
        return self._order[1]

    def block_numbers(self, rows: list[int]) -> np.ndarray:
        numbers = [self.gone + row for row in rows]
        return np.array([self._rows_of(row // self.rows_per_epoch)[row % self.rows_per_epoch] for row in numbers])

    def position(self, step: int) -> dict[str, Any]:
        """What a checkpoint after so many steps is to know of the text beside its hash."""
        return {}

    def go_on_from(self, facts: dict[str, Any]) -> None:
        """Take what `position` has given to a checkpoint."""

    def begin(self, step: int) -> None:
        """Called before the first step; `ready` before every step; `end` when training ends, however it does."""

    def ready(self, step: int) -> None:
        pass

    def end(self) -> None:
        pass

    def __getitems__(self, rows: list[int]) -> dict[str, Tensor]:
        firsts = rows[:: self.mixed]
        whole = [row for first in firsts for row in range(first, first + self.mixed)]
        if list(rows) != whole or any(first % self.mixed for first in firsts):
            raise ValueError(
                f"rows {', '.join(map(str, rows[:3]))}, ... are no whole groups of {self.mixed} consecutive rows: do "
                f"not shuffle them, and take batches of a multiple of {self.mixed}, as GroupedTrainer does in place of "
                "Trainer"
            )
        return _Whole(self._with_labels(rows))

    def _with_labels(self, rows: list[int]) -> dict[str, Tensor]:
        batch = self._batch(rows)
        return {"input_ids": batch["input_ids"], "labels": batch["input_ids"].clone(), **batch}

    def _batch(self, rows: list[int]) -> dict[str, Tensor]:
        return self.blocks.batch(self.block_numbers(rows))


GROUPS = 32  # groups of training text that `mot train` measures companions on


def training_groups(text: Blocks, group_size: int, groups: int | None = GROUPS) -> Iterator[dict[str, Tensor]]:
    """The first groups of a text, or all, one at a time; a run's companions are measured on the first ones."""
    for rows in grouped_order(text, group_size)[:groups]:
        yield text.batch(rows)
