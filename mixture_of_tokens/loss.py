"""Cross-entropy without all logits in memory, and the auxiliary losses that balance sparse routings."""

import torch
from torch import Tensor
from torch.nn import functional as F

from mixture_of_tokens.experts import highest, softmax
from mixture_of_tokens.layout import autocast_to

IGNORE = -100  # the label of a position that is not predicted, as everywhere in transformers
# 64 MiB in fp32, which a CPU has in its cache in part; a GPU's products want more rows.
LOGITS_AT_ONCE = {"cpu": 2**24, "cuda": 2**27}


def chunked_cross_entropy(hidden: Tensor, head: Tensor, labels: Tensor, *, logits_at_once: int | None = None) -> Tensor:
    """Sum over tokens of the cross-entropy of softmax(hidden @ head.T), in nats, in fp32 (float64 for float64).

    Only one chunk of tokens has its logits in memory at a time. Gradients are computed in the same pass,
    while these logits are in memory, so nothing is computed twice. Double backward is not supported.

    Args:
        hidden: (S, D); head: (V, D); labels: (S,), `IGNORE` where nothing is predicted.
        logits_at_once: the most logits in memory at a time, by default of the device; never fewer than of one token.
    """
    if logits_at_once is None:
        logits_at_once = LOGITS_AT_ONCE.get(hidden.device.type, LOGITS_AT_ONCE["cpu"])
    hidden, head = autocast_to(hidden, head)
    chunk = max(1, logits_at_once // head.shape[0])
    return _ChunkedCrossEntropy.apply(hidden, head, labels, chunk, torch.is_grad_enabled())


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, head, labels, size, with_gradients):
        at_least_fp32 = torch.promote_types(hidden.dtype, torch.float32)
        loss = hidden.new_zeros((), dtype=at_least_fp32)
        # Summed over chunks in fp32: in bf16 the later chunks would be rounded away.
        grad_hidden, grad_head = torch.empty_like(hidden), torch.zeros_like(head, dtype=at_least_fp32)
        for start in range(0, len(hidden), size):
            chunk, label = hidden[start : start + size], labels[start : start + size, None]
            real = label != IGNORE
            label = label.where(real, 0)  # another negative label is an error, as one beyond the vocabulary
            log_probabilities = F.linear(chunk, head).log_softmax(-1, dtype=at_least_fp32)
            loss -= (log_probabilities.gather(1, label) * real).sum()
            if with_gradients:
                grad = log_probabilities.exp_()
                grad.scatter_add_(1, label, grad.new_full(label.shape, -1.0))
                grad = grad.to(hidden.dtype)
                # Tokens that are not predicted are left out here, where they have D columns and not V.
                grad_hidden[start : start + size] = (grad @ head) * real
                grad_head += grad.T @ (chunk * real)
        if with_gradients:
            ctx.save_for_backward(grad_hidden, grad_head.to(head.dtype))
        return loss

    @staticmethod
    def backward(ctx, grad_loss):
        grad_hidden, grad_head = ctx.saved_tensors
        grads = (grad_hidden * grad_loss).to(grad_hidden.dtype), (grad_head * grad_loss).to(grad_head.dtype)
        return *grads, None, None, None


def load_balancing_loss(logits: Tensor, top_k: int, token_mask: Tensor | None) -> Tensor:
    """Switch Transformer's loss (arXiv 2101.03961, eq. 4-6) of one layer, over real tokens: 1 when balanced, at most E.

    E * sum_e f_e * P_e, where f_e is the share of the assignments (tokens times choices) that name expert e and P_e
    the mean probability of e. Capacity plays no part: assignments that are dropped later still count.

    Args:
        logits: (..., E), before the softmax; token_mask: (...), true where a token is real, or None.
    """
    probabilities = softmax(logits, dim=-1)  # as the layer has it, so that a compiled step searches once
    chosen = torch.zeros_like(probabilities).scatter(-1, highest(probabilities, top_k)[1], 1.0)
    return _uneven(probabilities, chosen, top_k, token_mask)


def l1_loss(logits: Tensor, top_k: int, token_mask: Tensor | None) -> Tensor:
    """ReMoE's penalty (arXiv 2412.14711, eq. 8 and 9) of one layer, over real tokens, of the gates relu(logits).

    The mean L1 norm of a token's gates, in which expert e counts E * f_e / top_k times: f_e is the share of the tokens
    with a gate above zero. Arguments as above.
    """
    gates = logits.to(torch.promote_types(logits.dtype, torch.float32)).relu()
    return _uneven(gates, (gates > 0).to(gates.dtype), top_k, token_mask)


def _uneven(weights: Tensor, chosen: Tensor, top_k: int, token_mask: Tensor | None) -> Tensor:
    """E * sum_e f_e * P_e of weights and choices (..., E)."""
    weights, chosen = (each.reshape(-1, each.shape[-1]) for each in (weights, chosen))
    real = torch.ones_like(weights[:, :1])
    if token_mask is not None:
        real = token_mask.reshape(-1, 1).to(real.dtype)
    tokens = real.sum().clamp(min=1)
    asked, mean_weight = (chosen * real).sum(0) / (tokens * top_k), (weights * real).sum(0) / tokens
    return weights.shape[-1] * (asked * mean_weight).sum()
