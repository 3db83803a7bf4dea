"""What a configuration costs: parameters, FLOPs per token, memory.

Letters as in `mixture.py`; B sequences of T tokens are computed at once. A multiply-add is 2 FLOPs, and only matrix
products count, as in `torch.utils.flop_counter`. Causal attention counts as the full T x T square, as in that
counter; kernels that skip the masked half do half of it.
"""

import math
from typing import NamedTuple

from mixture_of_tokens.layers.losses import LOGITS_AT_ONCE
from mixture_of_tokens.models.config import MixtureOfTokensConfig
from mixture_of_tokens.settings.routings import groups_of
from mixture_of_tokens.utils.checks import LARGEST, divisors

BYTES = {"float32": 4, "bfloat16": 2}


def _attention_widths(config: MixtureOfTokensConfig) -> tuple[int, int, int]:
    """The widths of a head, of all queries and of all keys of a token."""
    head = config.head_width
    return head, head * config.num_attention_heads, head * config.num_key_value_heads


def parameters(config: MixtureOfTokensConfig) -> dict[str, int]:
    """Number of parameters: total, active, and the total by component.

    Active parameters are those that one token uses. Experts count in proportion to the rows they read per token: in a
    Mixture of Tokens all E experts read one row for G tokens, so E / G experts are active.
    """
    D, blocks, routings = config.hidden_size, config.num_hidden_layers, config.sparse_routings
    head, queries, keys = _attention_widths(config)
    biases = config.attention_bias * (queries + 2 * keys + D)
    column = (3 if config.gated else 2) * D  # parameters per unit of a feed-forward's width
    expert = column * config.moe_intermediate_size
    shared = len(routings) * config.shared_experts * expert
    parts = {
        "embedding": config.vocab_size * D,
        "attention": blocks * (2 * D * (queries + keys) + biases),
        "norms": blocks * 2 * (D + head * config.qk_norm) + D,  # a head's queries and keys may have one each
        "feed_forward": column * (blocks - len(routings)) * config.intermediate_size + shared,
        "experts": len(routings) * config.num_experts * expert,
        "router": sum(
            routing.logits(config) * D + config.learnable_temperature for routing in routings if routing.routed
        ),
        "head": 0 if config.tie_word_embeddings else config.vocab_size * D,
    }
    # One group, without spare capacity.
    tokens = config.group_size * config.max_position_embeddings
    rows = sum(routing.rows(config, config.group_size, config.max_position_embeddings, False) for routing in routings)
    total = sum(parts.values())
    return {"total": total, "active": total - parts["experts"] + round(expert * rows / tokens)} | parts


class Flops(NamedTuple):
    """FLOPs per token, by component."""

    forward: dict[str, float]
    backward: dict[str, float]


def flops_per_token(
    config: MixtureOfTokensConfig,
    *,
    batch: int | None = None,
    context: int | None = None,
    training: bool = True,
    experts_per_token: float | None = None,
) -> Flops:
    """FLOPs of a forward and a backward pass, by component.

    The components are attention (its projections), attention_scores (both T x T products), feed_forward (of dense
    blocks, and shared experts), experts, router, dispatch (makes mixtures), combine (gives outputs back to tokens) and
    head (all logits).

    Args:
        batch: sequences at once, by default one group; it matters if the last group is incomplete.
        context: positions, by default the configuration's.
        training: Token Choice's experts then compute on their full capacity, filled or not: capacity_factor times
            the matched FLOPs. In evaluation they compute on their tokens only.
        experts_per_token: in routings where it varies, as it was measured; by default what it is to become.
    """
    B, T = batch or config.group_size, context or config.max_position_embeddings
    D, blocks, routings = config.hidden_size, config.num_hidden_layers, config.sparse_routings
    _, queries, keys = _attention_widths(config)
    column = (6 if config.gated else 4) * D  # FLOPs per unit of a feed-forward's width
    shared = len(routings) * config.shared_experts * config.moe_intermediate_size
    filled = math.prod(groups_of(config, B, T)) / (B * T)
    logits = {routing: routing.logits(config) * (filled if routing.grouped else 1) for routing in routings}
    routed = sum(logits[routing] for routing in routings if routing.routed)
    mixed = sum(logits[routing] for routing in routings if routing.reads_mixtures)
    averaged = sum(logits[routing] for routing in routings if routing.averages)
    as_measured = {routing: routing.varies and experts_per_token is not None for routing in routings}
    rows = sum(
        B * T * experts_per_token if as_measured[routing] else routing.rows(config, B, T, training)  # pyright: ignore
        for routing in routings
    )
    forward = {
        "attention": blocks * 4 * D * (queries + keys),
        "attention_scores": blocks * 4 * T * queries,
        "feed_forward": column * ((blocks - len(routings)) * config.intermediate_size + shared),
        "experts": column * config.moe_intermediate_size * rows / (B * T),
        "router": 2 * D * routed,
        "dispatch": 2 * D * mixed,
        "combine": 2 * D * (mixed + averaged),
        "head": 2 * D * config.vocab_size,
    }
    # The gradient of a product is two products of its size, one for each factor; weights without a router have none,
    # and nor do averages.
    backward = {part: 2 * flops for part, flops in forward.items()}
    uniform = sum(logits[routing] for routing in routings if routing.reads_mixtures and not routing.routed)
    backward["dispatch"] -= 2 * D * uniform
    backward["combine"] -= 2 * D * (uniform + averaged)
    return Flops(forward, backward)


def training_flops(config: MixtureOfTokensConfig, batch: int) -> float:
    """FLOPs of a training step on `batch` sequences: both passes."""
    passes = flops_per_token(config, batch=batch)
    return sum(sum(parts.values()) for parts in passes) * batch * config.max_position_embeddings


def memory(
    config: MixtureOfTokensConfig, batch: int, dtype="float32", *, experts_per_token: int | None = None
) -> dict[str, int]:
    """An estimate of the bytes held when training on `batch` sequences at once, by part.

    weights, gradients, optimizer (AdamW's two moments); activations: what autograd keeps for the backward pass, with
    fused attention (no T x T scores) and nothing recomputed; logits: one chunk and its gradient, in fp32. All else is
    in `dtype`. Mixed precision needs as much as float32, but for activations 0.63 to 0.84 of it (measured at Nano and
    Medium). Not counted: gradients of activations, work space, fragmentation, and the
    rows by which a CPU rounds up those of small experts.

    Args:
        experts_per_token: in routings where it varies, by default the most that there may be: in ReMoE all, which its
            first steps come near.

    Raises ValueError for an unknown dtype.
    """
    if dtype not in BYTES:
        raise ValueError(f"dtype {dtype!r} is unknown; legal are {', '.join(BYTES)}")
    size, tokens = BYTES[dtype], batch * config.max_position_embeddings
    V, D = config.vocab_size, config.hidden_size
    weights = size * parameters(config)["total"]
    last_norm, loss = tokens * (4 + size) * D, size * (tokens + V) * D  # the loss keeps the gradients of its inputs
    return {
        "weights": weights,
        "gradients": weights,
        "optimizer": 2 * weights,
        "activations": _kept_by_blocks(config, batch, size, experts_per_token) + last_norm + loss,
        "logits": 2 * 4 * min(LOGITS_AT_ONCE["cuda"], tokens * V),
    }


def _kept_by_blocks(config: MixtureOfTokensConfig, batch: int, size: int, experts: int | None) -> int:
    """Bytes that autograd keeps for the blocks: `size` an element, but 4 in RMSNorm and routing, which work in fp32.

    A norm keeps its input and its output before the learned scale; a linear layer its input; attention its queries,
    keys, values and output; a gated feed-forward four of its width (gate, up, silu(gate), their product).
    """
    T, D, blocks = config.max_position_embeddings, config.hidden_size, config.num_hidden_layers
    tokens, routings = batch * T, config.sparse_routings
    _, queries, keys = _attention_widths(config)
    hidden = 4 if config.gated else 1 if config.hidden_act == "relu" else 2
    norms_and_attention = (4 + size) * (2 * D + queries + keys) + size * (D + 2 * queries + 2 * keys)
    dense = size * (D + hidden * config.intermediate_size)
    kept = tokens * (blocks * norms_and_attention + (blocks - len(routings)) * dense)
    for routing in routings:
        rows = routing.rows(config, batch, T, True)
        if routing.varies:
            rows = tokens * (routing.most(config) if experts is None else experts)
        shared = config.shared_experts * config.moe_intermediate_size
        kept += tokens * size * hidden * shared
        fp32, own = routing.kept_weights
        weights = 4 * fp32 + size * own * (size < 4 or not fp32)  # in float32 a cast is no copy
        kept += tokens * (size * D + weights * routing.logits(config))
        kept += rows * size * (2 * D + hidden * config.moe_intermediate_size)  # what experts read and what they return
        if not routing.reads_mixtures:
            kept += rows * (size + 4 * 8)  # gates, and where rows come from and go to
    return kept


def legal_micro_batches(config: MixtureOfTokensConfig, batch: int) -> list[int]:
    """Legal numbers of sequences per device at once: multiples of the group size that divide the step's batch.

    Also where the model mixes no rows, as `mot train` gives all systems the same groups.

    Raises ValueError if the batch does not divide into groups.
    """
    group = config.group_size
    if batch < 1 or batch % group:
        nearest = max(1, min(round(batch / group), LARGEST // group)) * group
        raise ValueError(f"a batch of {batch} sequences does not divide into groups of {group}; {nearest} would")
    return [group * groups for groups in divisors(batch // group)]
