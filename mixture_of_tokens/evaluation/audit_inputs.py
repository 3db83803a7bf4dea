"""The batches of an audit, and what replaces their tokens."""

import numpy as np
import torch
from torch import Tensor

from mixture_of_tokens.data.blocks import Blocks
from mixture_of_tokens.data.groups import grouped_order

ROWS, LENGTH = 8, 64  # of a batch without groups; tokens of a text, if nothing else is asked for
LOGITS = 2**27  # at most, of a batch: memory holds all logits several times

Shape = tuple[int, int, int, int]  # batches, the two of a pair, rows, length
Pair = tuple[Tensor, Tensor]  # token ids (rows, length), and others, different everywhere


def rows_of(group_size: int | None) -> int:
    """Of a batch: two groups."""
    return 2 * (group_size or ROWS // 2)


def length_of(asked: int | None, rows: int, context: int | None, vocab_size: int) -> int:
    """Of a batch's texts, in tokens. Raises ValueError for more than the context, where that is known."""
    if asked is None:
        length = max(8, min(LENGTH, LOGITS // (rows * vocab_size)))
        return length if context is None else min(context, length)
    if context is not None and asked > context:
        raise ValueError(f"length {asked} is more than the {context} tokens that the model takes")
    return asked


def texts(blocks: Blocks, shape: Shape, vocab_size: int, seed: int) -> list[Pair]:
    """Groups of text as in training."""
    batches, _, rows, length = shape
    order = grouped_order(blocks, rows // 2, seed=seed)
    chosen = order[np.arange(4 * batches) % len(order)].reshape(batches, 2, rows)
    tokens = torch.stack([blocks.batch(each.ravel())["input_ids"][:, :length] for each in chosen])
    return _different(tokens.unflatten(1, (2, rows)), vocab_size)


def random_tokens(shape: Shape, vocab_size: int, seed: int) -> list[Pair]:
    return _different(torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(seed)), vocab_size)


def _different(tokens: Tensor, vocab_size: int) -> list[Pair]:
    return [(ids, torch.where(ids == others, (others + 1) % vocab_size, others)) for ids, others in tokens]
