"""Loss of a model over text it was not trained on, always over the same blocks in the same groups."""

import math

import numpy as np
import torch

from mixture_of_tokens.data import Blocks, grouped_order
from mixture_of_tokens.loss import IGNORE


@torch.no_grad()
def evaluate_blocks(model, blocks: Blocks, *, group_size: int, batch_size: int, groups: int | None = None) -> dict:
    """Mean cross-entropy in nats a token, in fixed groups of different documents.

    Args:
        batch_size: rows at a time, a multiple of the group size.
        groups: how many groups to take. None, or more than there are, takes all of the text, each token once, in
            groups that are filled up with masked rows where need be, and then counts bits per byte too.

    Returns `loss`, `tokens` and, over all of the text, `bits_per_byte`.
    """
    everything = groups is None or groups * group_size > len(blocks)
    order = grouped_order(blocks, group_size, everything=everything)[: None if everything else groups]
    training = model.training
    model.eval()
    nats, tokens = 0.0, 0
    for rows in np.split(order.ravel(), range(batch_size, order.size, batch_size)):
        inputs = {name: tensor.to(model.device) for name, tensor in blocks.batch(rows, padded=everything).items()}
        count = int((inputs["shift_labels"] != IGNORE).sum())
        if count:
            nats += float(model(**inputs, use_cache=False).loss) * count
            tokens += count
    model.train(training)
    result = {"loss": nats / tokens, "tokens": tokens}
    if everything:
        result["bits_per_byte"] = nats / math.log(2) / blocks.bytes
    return result
