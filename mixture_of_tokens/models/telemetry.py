"""Router telemetry: the same measures for every routing, taken on a probe batch outside the training step.

All measures but the last are computed from the combine weights w[t, e], which a layer returns when it is asked to
(`return_weights`): the output of expert e is multiplied by w[t, e] and added to token t's output. In Mixture of Tokens
they are the softmax over the group, in its uniform form 1 / G; in sparse routings the gates of the choices that were
not dropped; in Soft MoE the combine weights of an expert's slots, summed. Elsewhere they are zero. A group is the n
real tokens at one position of `group_size` rows, in all routings, so that tokens per expert mean the same. Masked
tokens do not count.

    mixture_entropy     entropy of an expert's weights over the tokens of a group / log n. 1: the group is averaged,
                        0: one token has all. Mean over groups and the experts they use (0 if no group has two tokens)
    effective_tokens    tokens per mixture: exp of that entropy, before division by log n; 1 to n, mean
    effective_experts   experts per token: exp of the entropy of a token's weights over experts; 1 to E, mean over the
                        tokens that have any
    experts_per_token   experts with any weight for a token, mean
    dead_experts        share of the experts whose total weight is negligible: under 1 % of the mean expert's
    dropped             share of the tokens whose total weight is negligible: under 1 % of the mean token's
    largest_load        the largest total weight of an expert / the mean expert's: 1 when balanced, at most E
    branch_to_residual  RMS of what the feed-forward adds, without shared experts / RMS of the residual stream that it
                        is added to

In Mixture of Tokens every expert's weights sum to one in a full group, so no expert is dead and the load is even by
construction. A sharp router may still leave tokens with almost no weight. Shape letters as in `mixture.py`.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils.hooks import RemovableHandle

from mixture_of_tokens.layers.experts import Routed
from mixture_of_tokens.layers.grouping import at_least_fp32, grouped
from mixture_of_tokens.models.forward_hooks import evaluating, pass_forward
from mixture_of_tokens.models.modeling import MixtureOfTokensForCausalLM

NEGLIGIBLE = 0.01


@torch.no_grad()
def measure(model: MixtureOfTokensForCausalLM, batch: dict[str, Tensor]) -> dict[str, dict[str, float]]:
    """The measures above of every block, by its index as a string; a dense block has `branch_to_residual` alone.

    This runs one forward pass, under the autocast of training if the model was prepared for it; the head computes one
    position only. Token Choice drops as in training. Dropout is off, so no random number is drawn and equal weights
    give equal measures. The model is left unchanged. If parameters are sharded, every process must call it.

    Args:
        model: uncompiled and unwrapped.
        batch: input_ids (B, T), B a multiple of the group size, and attention_mask or token_mask (B, T) where there is
            padding; at least one token is real. Other entries, such as labels, are ignored.
    """
    blocks: list[Any] = list(model.model.layers)
    found: list[dict[str, Tensor]] = [{} for _ in blocks]
    handles: list[RemovableHandle] = []
    try:
        with evaluating(model):
            for block, measures in zip(blocks, found, strict=True):
                block.mlp.training = True
                handles += _watch(block, model.config.group_size, measures)
            pass_forward(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return {str(i): {name: value.item() for name, value in measures.items()} for i, measures in enumerate(found)}


def router_gradient_norms(model: MixtureOfTokensForCausalLM) -> dict[str, float]:
    """The 2-norm of each router's current gradient, by the block's index; blocks without one are left out."""
    norms = {}
    for i, block in enumerate(model.model.layers):
        gate = getattr(block.mlp, "gate", None)
        if gate is not None and gate.weight.grad is not None:
            norm = _norm(gate.weight.grad)
            norms[str(i)] = (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()  # FSDP: of all shards
    return norms


def watch_weights(layer: Routed, seen: Callable[[Tensor], object]) -> list[RemovableHandle]:
    """Hooks by which `seen` gets the combine weights w (B, T, E) of each forward pass of a layer."""

    def ask(module, args, kwargs):
        return args, kwargs | {"return_weights": True}

    def take(module, args, output):
        y_BTD, weights_BTE = output
        seen(weights_BTE)
        return y_BTD  # which is all that other hooks see

    return [layer.register_forward_pre_hook(ask, with_kwargs=True), layer.register_forward_hook(take, prepend=True)]


def routing_measures(weights_BTE: Tensor, token_mask: Tensor, group_size: int) -> dict[str, Tensor]:
    """All measures above but the last, of combine weights (B, T, E) and the mask (B, T)."""
    weights_MGE, mask_MG1, _ = grouped(weights_BTE, token_mask, group_size)
    assert mask_MG1 is not None
    tokens_M1 = mask_MG1.sum(1)
    entropy_ME, serves_ME = _entropy(weights_MGE), weights_MGE.sum(1) > 0
    weights_SE = weights_BTE[token_mask]
    token_S, expert_E = weights_SE.sum(1), weights_SE.sum(0)
    return {
        "mixture_entropy": _mean(entropy_ME / tokens_M1.log(), serves_ME & (tokens_M1 > 1)),
        "effective_tokens": _mean(entropy_ME.exp(), serves_ME),
        "effective_experts": _mean(_entropy(weights_SE).exp(), token_S > 0),
        "experts_per_token": (weights_SE > 0).sum(1, dtype=weights_SE.dtype).mean(),
        "dead_experts": (expert_E <= NEGLIGIBLE * expert_E.mean()).to(expert_E.dtype).mean(),
        "dropped": (token_S <= NEGLIGIBLE * token_S.mean()).to(token_S.dtype).mean(),
        "largest_load": expert_E.max() / expert_E.mean().clamp(min=torch.finfo(expert_E.dtype).tiny),
    }


def _watch(block: Any, group_size: int, measures: dict[str, Tensor]) -> list[RemovableHandle]:
    """Hooks that fill in a block's measures at its next forward pass."""
    seen: dict[str, Tensor] = {}

    def residual(module, args, output):
        seen["residual"] = args[0]

    def feed_forward(module, args, output):
        mask = output.new_ones(output.shape[:2], dtype=torch.bool) if args[1] is None else args[1].bool()
        if "weights" in seen:
            measures.update(routing_measures(seen["weights"], mask, group_size))
        measures["branch_to_residual"] = _norm(output[mask]) / _norm(seen["residual"][mask])
        seen.clear()

    handles = [block.post_attention_layernorm.register_forward_hook(residual)]
    if isinstance(block.mlp, Routed):
        handles += watch_weights(block.mlp, lambda weights: seen.update(weights=weights))
    return [*handles, block.mlp.register_forward_hook(feed_forward)]


def _entropy(weights: Tensor) -> Tensor:
    """In nats, of the weights along the second dimension divided by their sum; 0 where all are zero."""
    total = weights.sum(1, keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)
    return torch.special.entr(weights / total).sum(1)


def _mean(values: Tensor, where: Tensor) -> Tensor:
    """The mean of the values where true; 0 if there are none."""
    return values.where(where, 0).sum() / where.sum().clamp(min=1)


def _norm(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dtype=at_least_fp32(x.dtype))
