"""Blocks -> batches in groups.

The G rows of a group are blocks of different documents, by construction. Blocks are in the order of the text, so the
blocks of one document are neighbours. They are divided into G stripes. A group takes one random block of every stripe,
all from the first halves of the stripes or all from the second. The blocks of a group are therefore more than half a
stripe apart, and a document can be in a group twice only if it has more than 1 / (2 G) of the blocks. Such a document
is divided into segments, which count as documents: see `blocks.segmented`.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset

from mixture_of_tokens.data.blocks import Blocks
from mixture_of_tokens.utils.checks import check, check_sizes


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
    if collisions(blocks, order):
        raise ValueError(
            f"a document has more than 1 / {2 * group_size} of the {order.size} blocks and could be in a group "
            "twice: give more text, smaller groups or shorter documents"
        )
    return order


def collisions(blocks: Blocks, groups: np.ndarray) -> int:
    """How many blocks touch a document of another block of their group (groups, G)."""
    found = 0
    rows = max(1, 2**18 // groups.shape[1])  # at once, to save memory
    for start in range(0, len(groups), rows):
        part = groups[start : start + rows]
        empty = part < 0
        first, last = blocks.documents(np.where(empty, 0, part))
        nobody = np.broadcast_to(-1 - np.arange(part.shape[1]), part.shape)  # an empty place is a document of its own
        first, last = np.where(empty, nobody, first), np.where(empty, nobody, last)
        order = np.argsort(first, axis=1)
        first, last = np.take_along_axis(first, order, axis=1), np.take_along_axis(last, order, axis=1)
        found += int((last[:, :-1] >= first[:, 1:]).sum())
    return found


def meetings(blocks: Blocks, groups: np.ndarray) -> tuple[int, int]:
    """`collisions` where segments count as documents, and where the documents that they are parts of do."""
    found = collisions(blocks, groups)
    return found, found if blocks.document_ends is None else collisions(blocks.undivided, groups)


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
        self.mixed = group_size if mixed is None else mixed
        check_sizes(group_size=group_size, batch_size=batch_size, mixed=self.mixed)
        for what, number in {"seed": seed, "steps": steps, "first_step": first_step}.items():
            check(what, number, int)
            if number < 0:
                raise ValueError(f"{what} must be 0 or more, not {number}")
        self.blocks, self.group_size, self.seed, self.first_step = blocks, group_size, seed, first_step
        if group_size % self.mixed:
            raise ValueError(f"group_size {group_size} must be a multiple of mixed, {mixed}, or groups would meet")
        self.batch_size, self.length, self.gone = batch_size, steps * batch_size, first_step * batch_size
        if batch_size % self.mixed:
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
