"""Cross-entropy without all logits in memory, and the auxiliary losses that balance sparse routings."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mixture_of_tokens.layers.grouping import at_least_fp32, autocast_to, full_precision, once_only

IGNORE = -100  # the label of a position that is not predicted, as everywhere in transformers
# 64 MiB in fp32, which a CPU has in its cache in part; a GPU's products want more rows.
LOGITS_AT_ONCE = {"cpu": 2**24, "cuda": 2**27}


def chunked_cross_entropy(hidden: Tensor, head: Tensor, labels: Tensor, *, logits_at_once: int | None = None) -> Tensor:
    """Sum over tokens of the cross-entropy of softmax(hidden @ head.T), in nats, in fp32 (float64 for float64).

    Only one chunk of tokens has its logits in memory at a time. Gradients are computed in the same pass,
    while these logits are in memory, so nothing is computed twice. Raises RuntimeError for second derivatives.

    Args:
        hidden: (S, D); head: (V, D); labels: (S,), `IGNORE` where nothing is predicted.
        logits_at_once: the most logits in memory at a time, by default of the device; never fewer than of one token.
    """
    hidden, head = autocast_to(hidden, head)
    chunk = _tokens_at_once(hidden.device, head.shape[0], logits_at_once)
    with full_precision(hidden.device):  # autocast would take the wide product of fp16 back to fp16
        return _ChunkedCrossEntropy.apply(hidden, head, labels, chunk, torch.is_grad_enabled())


def summed_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """The same of logits (S, V) that are in memory already; in fp32 are those of a chunk at a time."""
    chunk = _tokens_at_once(logits.device, logits.shape[1])
    precise, total = at_least_fp32(logits.dtype), 0.0
    for some, label in zip(logits.split(chunk), labels.split(chunk), strict=True):
        total = total + F.cross_entropy(some.to(precise), label, ignore_index=IGNORE, reduction="sum")
    return torch.as_tensor(total, dtype=precise)


def _tokens_at_once(device: torch.device, vocabulary: int, logits: int | None = None) -> int:
    if logits is None:
        logits = LOGITS_AT_ONCE.get(device.type, LOGITS_AT_ONCE["cpu"])
    return max(1, logits // vocabulary)


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, head, labels, size, with_gradients):
        precise = at_least_fp32(hidden.dtype)
        # A sum over many tokens is beyond the range of fp16, also where their mean is not.
        wide = precise if hidden.dtype == torch.float16 else hidden.dtype
        loss = hidden.new_zeros((), dtype=precise)
        into_head = with_gradients and ctx.needs_input_grad[1]  # the head may be frozen
        like_hidden, like_head = hidden if with_gradients else hidden[:0], head if into_head else head[:0]
        # Summed over chunks in fp32: in bf16 the later chunks would be rounded away.
        grad_hidden, grad_head = torch.empty_like(like_hidden), torch.zeros_like(like_head, dtype=precise)
        for start in range(0, len(hidden), size):
            label = labels[start : start + size, None]
            real = label != IGNORE
            chunk = hidden[start : start + size].masked_fill(~real, 0)  # what is not predicted may be NaN
            label = label.where(real, 0)  # another negative label is an error, as one beyond the vocabulary
            log_probabilities = F.linear(chunk, head).log_softmax(-1, dtype=precise)
            loss -= log_probabilities.gather(1, label).where(real, 0).sum()
            if with_gradients:
                grad = log_probabilities.exp_()
                grad.scatter_add_(1, label, grad.new_full(label.shape, -1.0))
                grad = grad.to(hidden.dtype)
                # Tokens that are not predicted are left out here, where they have D columns and not V.
                grad_hidden[start : start + size] = (grad @ head).where(real, 0)
                if into_head:
                    grad_head += grad.T.to(wide) @ chunk.to(wide)
        if with_gradients:
            ctx.save_for_backward(grad_hidden, grad_head.to(wide))
        return loss

    @staticmethod
    def backward(ctx, grad_loss):
        once_only("chunked_cross_entropy", "give the model no labels, and take the cross-entropy of its logits")
        grad_hidden, grad_head = ctx.saved_tensors
        dtype = grad_hidden.dtype  # the head's too
        into_head = (grad_head * grad_loss).to(dtype) if ctx.needs_input_grad[1] else None
        return (grad_hidden * grad_loss).to(dtype), into_head, None, None, None


class AuxiliaryLoss(nn.Module):
    """What a sparse routing adds to the loss: a module, called in training, so that a forward hook gets its output.

    It is of one layer and over real tokens. The layer's `auxiliary_losses` says what it is to be multiplied by.
    """

    balances = True  # the load of the experts


class RouterZLoss(AuxiliaryLoss):
    """ST-MoE's loss (arXiv 2202.08906, eq. 5), for small logits: the mean of logsumexp(logits)^2 over tokens."""

    balances = False

    def forward(self, logits: Tensor, token_mask: Tensor | None) -> Tensor:
        """Of the logits (..., E), and the mask of tokens (...), true where one is real."""
        squared = logits.to(at_least_fp32(logits.dtype)).logsumexp(-1).square()
        if token_mask is None:
            return squared.mean()
        return squared.masked_fill(~token_mask, 0).sum() / token_mask.sum().clamp(min=1)


class LoadBalancingLoss(AuxiliaryLoss):
    """Switch Transformer's loss (arXiv 2101.03961, eq. 4-6): 1 when balanced, at most E.

    E * sum_e f_e * P_e, where f_e is the share of the assignments (tokens times choices) that name expert e and P_e
    the mean probability of e. Capacity plays no part: assignments that are dropped later still count.
    """

    def forward(self, probabilities: Tensor, expert: Tensor, token_mask: Tensor | None) -> Tensor:
        """Of the probabilities (..., E), each token's K experts (..., K), and its mask (...), true where it is real."""
        E, K, counted = probabilities.shape[-1], expert.shape[-1], probabilities.new_ones(expert.numel())
        if token_mask is not None:
            real = token_mask[..., None].to(probabilities.dtype)
            probabilities, counted = probabilities * real, real.expand_as(expert).flatten()
        tokens = counted.sum().clamp(min=1) / K
        asked = counted.new_zeros(E).index_add(0, expert.flatten(), counted) / (tokens * K)
        return E * (asked * probabilities.flatten(0, -2).sum(0) / tokens).sum()


class L1Loss(AuxiliaryLoss):
    """ReMoE's penalty (arXiv 2412.14711, eq. 8 and 9): the mean L1 norm of a token's gates.

    Expert e counts E * f_e / K times in it, where f_e is the share of the tokens with a gate above zero.
    """

    def __init__(self, num_experts_per_tok: int):
        super().__init__()
        self.num_experts_per_tok = num_experts_per_tok

    def forward(self, gates: Tensor, token_mask: Tensor | None) -> Tensor:
        """Of the gates (..., E), zero or more, and the mask of tokens (...), true where one is real."""
        gates, tokens = gates.flatten(0, -2), gates[..., 0].numel()
        if token_mask is not None:
            gates, tokens = gates * token_mask.reshape(-1, 1), token_mask.sum().clamp(min=1)
        asked = (gates > 0).sum(0).to(gates.dtype) / (tokens * self.num_experts_per_tok)
        return gates.shape[-1] * (asked * gates.sum(0) / tokens).sum()
