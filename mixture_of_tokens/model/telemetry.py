"""What routers do, by one yardstick for every routing: measured on a probe batch, outside the training step.

All but the last measure are of the combine weights w[t, e], by which the output of expert e is multiplied before it
is added to token t's: in Mixture of Tokens the softmax over the group, in its uniform form 1 / G; in Expert
Choice the gates of the chosen, in Token Choice those of the choices that were not dropped; zero elsewhere.
A group is the n real tokens at one position of `group_size` rows, in Token Choice too: so "how many tokens does an
expert serve at a position" is one question for all. Masked tokens count nowhere.

    mixture_entropy     entropy of an expert's weights over the tokens of a group / log n. 1: the group is averaged,
                        0: one token has all. Mean over groups and experts that serve it (0 if no group has two tokens)
    effective_tokens    tokens per mixture: exp of that entropy, before it is normalised; 1 to n, mean
    effective_experts   experts per token: exp of the entropy of a token's weights over experts; 1 to E, mean over the
                        tokens that have any
    dead_experts        share of the experts whose total weight is negligible: under 1 % of the mean expert's
    dropped             share of the tokens whose total weight is negligible: under 1 % of the mean token's
    largest_load        the largest total weight of an expert / the mean expert's: 1 when balanced, at most E
    branch_to_residual  RMS of what the feed-forward adds / RMS of the residual stream that it is added to

In Mixture of Tokens every expert has a total weight of one a group, so that none is dead and the load is even by
construction; a sharp router may still leave tokens without any. Shape letters are those of `layers.py`.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils.hooks import RemovableHandle

from mixture_of_tokens.layers import MixtureOfTokens, Routed
from mixture_of_tokens.layout import expert_linear, full_precision, grouped, ungrouped
from mixture_of_tokens.model.modeling import MixtureOfTokensForCausalLM

NEGLIGIBLE = 0.01
INPUTS = ("input_ids", "attention_mask", "token_mask")


@torch.no_grad()
def measure(model: MixtureOfTokensForCausalLM, batch: dict[str, Tensor]) -> dict[str, dict[str, float]]:
    """The measures above of every block, by its index as a string; a dense block has `branch_to_residual` alone.

    One forward pass, of the head at one position only, under the autocast of training where the model has been prepared
    for it. Token Choice drops as in training; dropout is off, so that no random number is drawn and equal weights give
    equal measures. The model is left as it was. Where parameters are sharded, every process must call it.

    Args:
        model: uncompiled and unwrapped.
        batch: input_ids (B, T), B a multiple of the group size, and attention_mask or token_mask (B, T) where there is
            padding; at least one token is real. Other entries, such as labels, are ignored.
    """
    blocks: list[Any] = list(model.model.layers)
    modes = [(module, module.training) for module in model.modules()]
    found: list[dict[str, Tensor]] = [{} for _ in blocks]
    handles: list[RemovableHandle] = []
    try:
        model.eval()
        for block, measures in zip(blocks, found, strict=True):
            block.mlp.training = True
            handles += _watch(block, model.config.group_size, measures)
        model(**{name: batch[name] for name in INPUTS if name in batch}, logits_to_keep=1, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
        for module, training in modes:
            module.training = training
    return {str(i): {name: value.item() for name, value in measures.items()} for i, measures in enumerate(found)}


def router_gradient_norms(model: MixtureOfTokensForCausalLM) -> dict[str, float]:
    """The 2-norm of each router's gradient as it stands, by the block's index; of blocks that have one."""
    norms = {}
    for i, block in enumerate(model.model.layers):
        gate = getattr(block.mlp, "gate", None)
        if gate is not None and gate.weight.grad is not None:
            norm = _norm(gate.weight.grad)
            norms[str(i)] = (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()  # FSDP: of all shards
    return norms


def combine_weights(layer: Routed, logits: Tensor | None, token_mask: Tensor) -> Tensor:
    """w (B, T, E), in fp32 or better, where the layer's router has returned these logits (None for uniform).

    The layer's own methods make it, on a copy whose router returns the logits, so that the two do not drift apart. A
    routing that gives experts single tokens need not say its weights: w[t, e] is the derivative of t's output by what
    expert e answered for t. The copy runs on numbered tokens, with experts that note which they were given.

    Args:
        logits: as the router returned them, in the layer's own order of tokens.
        token_mask: (B, T), true where a token is real.
    """
    (B, T), E, device = token_mask.shape, layer.num_experts, token_mask.device
    dtype = torch.float32 if logits is None else torch.promote_types(logits.dtype, torch.float32)
    if isinstance(layer, MixtureOfTokens):
        x_MG1, *missing = grouped(torch.zeros(B, T, 1, dtype=dtype, device=device), token_mask, layer.group_size)
        return ungrouped(_stand_in(layer, logits).weights(x_MG1, *missing), missing[0], B, T)
    noted: list[Tensor] = []

    def answers(number: Tensor, linear=expert_linear) -> Tensor:
        ones = torch.ones_like(number, requires_grad=True)
        expert = linear(torch.ones_like(number), torch.arange(E, device=device, dtype=number.dtype).view(E, 1, 1))
        noted.extend((number.long(), expert.long(), ones))
        return ones

    numbers_BT1 = torch.arange(1, 1 + B * T, device=device, dtype=torch.float64).view(B, T, 1)
    with torch.enable_grad(), full_precision(device):
        y_BT1 = _stand_in(layer, logits, answers).forward(numbers_BT1, token_mask)
    number, expert, ones = noted
    weights = numbers_BT1.new_zeros(1 + B * T, E, dtype=dtype)  # row 0: masked tokens, and places that none took
    weights[number, expert] = torch.autograd.grad(y_BT1, ones, torch.ones_like(y_BT1))[0].to(dtype)
    return weights[1:].view(B, T, E)


def _stand_in(layer: Routed, logits: Tensor | None, experts: Callable[..., Tensor] | None = None) -> Any:
    """A copy of the layer with other parts, to call by its methods: hooks are the layer's own."""
    copied = copy.copy(layer)
    vars(copied)["_modules"] = {"gate": None if logits is None else lambda x: logits, "experts": experts}
    return copied


def routing_measures(weights_BTE: Tensor, token_mask: Tensor, group_size: int) -> dict[str, Tensor]:
    """All measures above but the last, of combine weights (B, T, E) and the mask (B, T)."""
    weights_MGE, mask_MG1, _ = grouped(weights_BTE, token_mask, group_size)
    assert mask_MG1 is not None
    tokens_M1 = mask_MG1.sum(1)
    entropy_ME, serves_ME = _entropy(weights_MGE, 1), weights_MGE.sum(1) > 0
    weights_SE = weights_BTE[token_mask]
    token_S, expert_E = weights_SE.sum(1), weights_SE.sum(0)
    return {
        "mixture_entropy": _mean(entropy_ME / tokens_M1.log(), serves_ME & (tokens_M1 > 1)),
        "effective_tokens": _mean(entropy_ME.exp(), serves_ME),
        "effective_experts": _mean(_entropy(weights_SE, 1).exp(), token_S > 0),
        "dead_experts": (expert_E < NEGLIGIBLE * expert_E.mean()).to(expert_E.dtype).mean(),
        "dropped": (token_S < NEGLIGIBLE * token_S.mean()).to(token_S.dtype).mean(),
        "largest_load": expert_E.max() / expert_E.mean(),
    }


def _watch(block: Any, group_size: int, measures: dict[str, Tensor]) -> list[RemovableHandle]:
    """Hooks that fill in a block's measures at its next forward pass, before the next block's."""
    seen: dict[str, Tensor] = {}

    def residual(module, args, output):
        seen["residual"] = args[0]

    def logits(module, args, output):
        seen["logits"] = output

    def feed_forward(module, args, output):
        mask = output.new_ones(output.shape[:2], dtype=torch.bool) if args[1] is None else args[1].bool()
        if isinstance(module, Routed):
            measures.update(routing_measures(combine_weights(module, seen.get("logits"), mask), mask, group_size))
        measures["branch_to_residual"] = _norm(output[mask]) / _norm(seen["residual"][mask])
        seen.clear()

    watched = {block.post_attention_layernorm: residual, block.mlp: feed_forward}
    if getattr(block.mlp, "gate", None) is not None:
        watched[block.mlp.gate] = logits
    return [module.register_forward_hook(hook) for module, hook in watched.items()]


def _entropy(weights: Tensor, dim: int) -> Tensor:
    """In nats, of the weights along `dim` divided by their sum; 0 where all are zero."""
    total = weights.sum(dim, keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)
    return torch.special.entr(weights / total).sum(dim)


def _mean(values: Tensor, where: Tensor) -> Tensor:
    """0 over nothing."""
    return values.where(where, 0).sum() / where.sum().clamp(min=1)


def _norm(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dtype=torch.promote_types(x.dtype, torch.float32))
