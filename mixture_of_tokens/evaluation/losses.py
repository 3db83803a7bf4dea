"""The loss of a model over text, always over the same blocks in the same groups."""

import itertools
import math

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from mixture_of_tokens.data.blocks import Blocks
from mixture_of_tokens.data.groups import grouped_order
from mixture_of_tokens.layers.losses import IGNORE
from mixture_of_tokens.models.forward_hooks import evaluating
from mixture_of_tokens.models.modeling import MixtureOfTokensForCausalLM
from mixture_of_tokens.parallel.sharding import is_sharded
from mixture_of_tokens.runs.records import FULL
from mixture_of_tokens.utils.checks import check_sizes
from mixture_of_tokens.utils.progress import progress_bar

LOGITS = 2**27  # in memory at once, for models that compute all logits; half a gigabyte in fp32


@torch.no_grad()
def cross_entropy(model: PreTrainedModel, inputs: dict[str, Tensor]) -> tuple[float, int]:
    """The sum over the tokens that have a label, and their number.

    A model of another library gets as many rows at once as make `LOGITS` logits.
    """
    labels = inputs["shift_labels"]
    count = int((labels != IGNORE).sum())
    if not count:
        return 0.0, 0
    if isinstance(model, MixtureOfTokensForCausalLM):
        return float(model(**inputs, return_logits=False, use_cache=False).loss) * count, count
    rows = max(1, LOGITS // (labels.shape[1] * model.config.get_text_config().vocab_size))
    nats = 0.0
    for start in range(0, len(labels), rows):
        given = {name: tensor[start : start + rows] for name, tensor in inputs.items()}
        expected = given.pop("shift_labels").flatten()
        given.pop("token_mask", None)  # with positions: padding is on the right, where nothing sees it
        logits = model(**given, use_cache=False).logits.flatten(0, 1).float()
        nats += float(F.cross_entropy(logits, expected, ignore_index=IGNORE, reduction="sum"))
    return nats, count


@torch.no_grad()
def score_tokens(model: nn.Module, text: Blocks, *, group_size: int, groups: int | None = None, seed: int = 0) -> float:
    """The loss of a causal language model over text, in nats a token: of transformers, or one that returns logits.

    Rows are scored in groups of different documents, as `GroupedBatches` deals them out; in what way is the model's:
    mixed, or alone after `serve_alone()` (and after `calibrate_companions`, or the loss is much higher).

    Args:
        text: As `prepare_tokens`, `split_tokens` or `prepare_text` return it. Blocks that fill no group are left out.
        group_size: Rows that the model gets at once, those that it mixes or a multiple.
        groups: So many are scored, from all over the text; by default all. With the same seed always the same ones.

    Raises ValueError for less text than two groups.
    """
    check_sizes(group_size=group_size, **({} if groups is None else {"groups": groups}))
    order, device = grouped_order(text, group_size, seed=seed)[:groups], next(model.parameters()).device
    nats = 0.0
    with evaluating(model):
        for rows in order:
            inputs = {name: tensor.to(device) for name, tensor in text.batch(rows).items()}
            if isinstance(model, MixtureOfTokensForCausalLM):
                nats += cross_entropy(model, inputs)[0]
                continue
            result = model(inputs["input_ids"])  # the whole group: it may be mixed
            logits = result if isinstance(result, Tensor) else result.logits
            labels = inputs["shift_labels"].flatten()
            nats += float(F.cross_entropy(logits.flatten(0, 1).float(), labels, reduction="sum"))
    return nats / (order.size * text.context)


def takes_all(blocks: Blocks, group_size: int, groups: int | None) -> bool:
    """Whether so many groups are all of the text: of one that fills a group, and not two, none could be left out."""
    return groups is None or max(groups, min(2, group_size)) * group_size > len(blocks)


def groups_of(blocks: Blocks, group_size: int, rows: int | None) -> int | None:
    """The groups that hold so many rows; None for all of the text."""
    groups = None if rows is None or rows >= blocks.total else max(1, rows // group_size)
    return None if takes_all(blocks, group_size, groups) else groups


def evaluated_groups(
    blocks: Blocks, group_size: int, groups: int | None = None, seed: int = 0
) -> tuple[np.ndarray, bool]:
    """The groups of blocks (groups, G) that `evaluate_blocks` takes, and whether they are all of the text."""
    everything = takes_all(blocks, group_size, groups)
    order = grouped_order(blocks, group_size, seed=seed, everything=everything)
    return order[: None if everything else groups], everything


def evaluate_blocks(
    model,
    blocks: Blocks,
    *,
    group_size: int,
    batch_size: int,
    groups: int | None = None,
    seed: int = 0,
    progress: str | None = None,
    accelerator: Accelerator | None = None,
) -> dict[str, float]:
    """Mean cross-entropy in nats a token, in fixed groups of different documents.

    Args:
        batch_size: rows at a time, a multiple of the rows that the model mixes.
        groups: how many groups to take. None, or more than there are, takes all of the text, each token once, fills
            incomplete groups with masked rows, and computes bits per byte too.
        seed: of the groups.
        progress: title of a bar on standard error, which appears after two seconds; None for no bar.
        accelerator: of the processes that share the work; all of them must call, and all get one process's result.

    Returns `loss`, `tokens` and, over all of the text, `bits_per_byte`.
    """
    order, everything = evaluated_groups(blocks, group_size, groups, seed)
    device = model.device
    batches = np.split(order.ravel(), range(batch_size, order.size, batch_size))
    rank, count = (0, 1) if accelerator is None else (accelerator.process_index, accelerator.num_processes)
    own, spare, padded = range(rank, len(batches), count), 0, everything
    if is_sharded(model):  # its processes need each other for every batch, and those of equal sizes
        batches[-1] = np.pad(batches[-1], (0, batch_size - len(batches[-1])), constant_values=-1)
        spare, padded = math.ceil(len(batches) / count) - len(own), True
    found = torch.zeros(len(batches), 2, dtype=torch.float64)  # nats and tokens of each batch
    bar = progress_bar(progress, own, unit="batch", delay=2, leave=False, hidden=not progress)
    with evaluating(model):
        for i in itertools.chain(bar, [0] * spare):
            empty = not (batches[i] >= 0).any()  # for a batch without text the model would not be called
            rows = batches[0] if empty else batches[i]
            inputs = {name: tensor.to(device) for name, tensor in blocks.batch(rows, padded=padded).items()}
            result = cross_entropy(model, inputs)
            if i in own and not empty:
                found[i, 0], found[i, 1] = result
    if accelerator is not None:  # every batch is one process's and zero elsewhere: sums are exact in any order
        found = accelerator.reduce(found.to(accelerator.device), "sum")
    nats, tokens = 0.0, 0
    for batch_nats, batch_tokens in found.tolist():  # pyright: ignore
        nats, tokens = nats + batch_nats, tokens + int(batch_tokens)
    result = {"loss": nats / tokens, "tokens": tokens}
    if everything:
        result["bits_per_byte"] = nats / math.log(2) / blocks.bytes
    return result


def label_of_groups(groups: np.ndarray) -> str:
    """How groups of blocks (groups, G) are called in tables; -1 is a missing row."""
    size, rows = groups.shape[1], float((not_empty(groups) >= 0).sum(axis=1).mean())
    return FULL if rows > 0.9 * size else f"groups of {rows:.0f} of {size} rows"


def not_empty(groups: np.ndarray) -> np.ndarray:
    """Of short text there are empty groups."""
    return groups[(groups >= 0).any(axis=1)]
