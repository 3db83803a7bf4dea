"""What a configuration costs: parameters, FLOPs per token, memory; the command `mot plan`.

Letters as in `layers.py`; B sequences of T tokens are computed at once. A multiply-add is 2 FLOPs, and only matrix
products count, as in `torch.utils.flop_counter`. Causal attention counts as the full T x T square, as in that
counter; kernels that skip the masked half do half of it.
"""

import math
from copy import copy
from dataclasses import dataclass
from textwrap import indent
from typing import Literal, NamedTuple

from mixture_of_tokens.formatting import Result, aligned
from mixture_of_tokens.loss import LOGITS_AT_ONCE
from mixture_of_tokens.model.config import MixtureOfTokensConfig
from mixture_of_tokens.model.names import SIZES, config_from_name, name_of, parse_name
from mixture_of_tokens.model.routings import DENSE, groups_of

BYTES = {"float32": 4, "bfloat16": 2}


def _attention_widths(config: MixtureOfTokensConfig) -> tuple[int, int, int]:
    """The widths of a head, of all queries and of all keys of a token."""
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
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
        "norms": blocks * 2 * (D + head) + D,  # a head's queries and keys have one each
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
    blocks, and shared experts), experts, router, collect (makes mixtures), spread (distributes outputs to tokens) and
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
    mixed = sum(logits[routing] for routing in routings if routing.mixes)
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
        "collect": 2 * D * mixed,
        "spread": 2 * D * mixed,
        "head": 2 * D * config.vocab_size,
    }
    # The gradient of a product is two products of its size, one for each factor.
    return Flops(forward, {part: 2 * flops for part, flops in forward.items()})


def training_flops(config: MixtureOfTokensConfig, batch: int) -> float:
    """FLOPs of a training step on `batch` sequences: both passes."""
    passes = flops_per_token(config, batch=batch)
    return sum(sum(parts.values()) for parts in passes) * batch * config.max_position_embeddings


def memory(
    config: MixtureOfTokensConfig,
    batch: int,
    context: int | None = None,
    dtype="float32",
    *,
    experts_per_token: int | None = None,
) -> dict[str, int]:
    """An estimate of the bytes held when training on `batch` sequences at once, by part.

    weights, gradients, optimizer (AdamW's two moments); activations: what autograd keeps for the backward pass, with
    fused attention (no T x T scores) and nothing recomputed; logits: one chunk and its gradient, in fp32. All else is
    in `dtype`. Mixed precision needs as much as float32, but for activations 0.63 to 0.84 of it (measured at Nano and
    Medium). Not counted: gradients of activations, work space, fragmentation.

    Args:
        experts_per_token: in routings where it varies, by default the most that there may be: in ReMoE all, which its
            first steps come near.

    Raises ValueError for an unknown dtype.
    """
    if dtype not in BYTES:
        raise ValueError(f"dtype {dtype!r} is unknown; legal are {', '.join(BYTES)}")
    size, T = BYTES[dtype], context or config.max_position_embeddings
    tokens, V, D = batch * T, config.vocab_size, config.hidden_size
    weights = size * parameters(config)["total"]
    last_norm, loss = tokens * (4 + size) * D, size * (tokens + V) * D  # the loss keeps the gradients of its inputs
    return {
        "weights": weights,
        "gradients": weights,
        "optimizer": 2 * weights,
        "activations": _kept_by_blocks(config, batch, T, size, experts_per_token) + last_norm + loss,
        "logits": 2 * 4 * min(LOGITS_AT_ONCE, tokens * V),
    }


def _kept_by_blocks(config: MixtureOfTokensConfig, batch: int, context: int, size: int, experts: int | None) -> int:
    """Bytes that autograd keeps for the blocks: `size` an element, but 4 in RMSNorm and routing, which work in fp32.

    A norm keeps its input and its output before the learned scale; a linear layer its input; attention its queries,
    keys, values and output; a gated feed-forward four of its width (gate, up, silu(gate), their product).
    """
    tokens, D, blocks, routings = batch * context, config.hidden_size, config.num_hidden_layers, config.sparse_routings
    _, queries, keys = _attention_widths(config)
    hidden = 4 if config.gated else 1 if config.hidden_act == "relu" else 2
    norms_and_attention = (4 + size) * (2 * D + queries + keys) + size * (D + 2 * queries + 2 * keys)
    dense = size * (D + hidden * config.intermediate_size)
    kept = tokens * (blocks * norms_and_attention + (blocks - len(routings)) * dense)
    for routing in routings:
        rows = routing.rows(config, batch, context, True)
        if routing.varies:
            rows = tokens * (routing.most(config) if experts is None else experts)
        by_rows = routing.grouped or routing.mixes or routing.varies
        outputs = rows if by_rows else tokens * config.num_experts_per_tok
        shared = config.shared_experts * config.moe_intermediate_size
        kept += tokens * size * hidden * shared
        (fp32, own), vectors = routing.kept_weights, 4 * routing.kept_outputs[0] + size * routing.kept_outputs[1]
        weights = 4 * fp32 + size * own * (size < 4 or not fp32)  # in float32 a cast is no copy
        cast = 4 * D if routing.routed and size < 4 else 0  # the router's input
        kept += tokens * (size * D + cast + weights * routing.logits(config))
        kept += rows * size * (D + hidden * config.moe_intermediate_size) + outputs * vectors * D
    return kept


def legal_micro_batches(config: MixtureOfTokensConfig, batch: int) -> list[int]:
    """Legal numbers of sequences per device at once: multiples of the group size that divide the step's batch.

    Raises ValueError if the batch does not divide into groups.
    """
    group = config.group_size if config.mixes_examples else 1
    if batch < 1 or batch % group:
        nearest = max(1, round(batch / group)) * group
        raise ValueError(f"a batch of {batch} sequences does not divide into groups of {group}; {nearest} would")
    return [size for size in range(group, batch + 1, group) if batch % size == 0]


@dataclass(frozen=True)
class Plan(Result):
    """Everything that `plan` prints; memory in bytes.

    `floor` is the dense model's FLOPs divided by this one's, which is the relative speed of a perfect implementation:
    for the model, and for the feed-forwards of the sparse blocks alone.
    """

    name: str | None
    matched: list[str]
    context: int
    vocab_size: int
    batch: int
    legal_micro_batches: list[int]
    parameters: dict[str, int]
    flops_per_token: dict[str, dict[str, float]]
    floor: dict[str, float]
    micro_batch: int
    dtype: str
    memory_bytes: dict[str, int]

    def __str__(self) -> str:
        forward, backward, share = self.flops_per_token.values()
        tokens = f"{self.batch} sequences x {self.context} = {self.batch * self.context:,} tokens"
        count = [[part, _short(count)] for part, count in self.parameters.items() if count]
        flops = [[part, _short(n), _short(backward[part]), f"{share[part]:.1%}"] for part, n in forward.items() if n]
        held = [[part, f"{size / 2**30:.3f}"] for part, size in self.memory_bytes.items()]
        blocks = [
            [["parameters", ""], *count],
            [["FLOPs per token", "forward", "backward", "of dense"], *flops],
            [[f"memory, {self.dtype}", "GiB"], *held],
        ]
        first, second, third = (indent(aligned(block), "  ") for block in blocks)
        head, _, memory_rows = third.partition("\n")
        return "\n".join(
            [
                f"{self.name or 'a model without a name'}: vocabulary {self.vocab_size:,}, a step of {tokens}",
                f"matched: {', '.join(self.matched) or 'none'}",
                f"legal micro-batches: {', '.join(map(str, self.legal_micro_batches))}",
                "",
                first,
                "",
                second,
                f"A perfect implementation has {self.floor['model']:.3f} of the dense model's speed "
                f"({self.floor['feed_forward']:.3f} in the sparse blocks' feed-forwards).",
                "",
                f"{head}   estimated, {self.micro_batch} sequences at once",
                memory_rows,
            ]
        )


def plan_of(config: MixtureOfTokensConfig, batch: int, micro_batch: int | None = None, dtype="float32") -> Plan:
    """What a configuration costs.

    Args:
        batch: sequences a step; micro_batch: sequences at once, by default the smallest legal number of at least 32.

    Raises ValueError for a batch or micro_batch that is not legal, or an unknown dtype.
    """
    legal = legal_micro_batches(config, batch)
    if micro_batch is None:
        micro_batch = next((size for size in legal if size >= 32), legal[-1])
    if micro_batch not in legal:
        raise ValueError(f"micro-batch {micro_batch} is not legal; legal are {', '.join(map(str, legal))}")
    name, dense = name_of(config), copy(config)
    dense.mlp_layer_types = [DENSE.kind] * config.num_hidden_layers
    forward, backward = map(_with_total, flops_per_token(config, batch=micro_batch))
    of_dense = _with_total(flops_per_token(dense, batch=micro_batch).forward)
    matched = of_dense["feed_forward"] - forward["feed_forward"]
    sparse = sum(forward[part] for part in ("experts", "router", "collect", "spread"))
    share = {part: flops / of_dense["total"] for part, flops in forward.items()}
    return Plan(
        name=name,
        matched=parse_name(name).matched() if name else [],
        context=config.max_position_embeddings,
        vocab_size=config.vocab_size,
        batch=batch,
        legal_micro_batches=legal,
        parameters=parameters(config),
        flops_per_token={"forward": forward, "backward": backward, "share_of_dense": share},
        floor={"model": of_dense["total"] / forward["total"], "feed_forward": matched / sparse if sparse else 1.0},
        micro_batch=micro_batch,
        dtype=dtype,
        memory_bytes=_with_total(memory(config, micro_batch, dtype=dtype)),
    )


def _with_total(parts: dict) -> dict:
    return parts | {"total": sum(parts.values())}


def _short(number: float) -> str:
    for unit, power in ((" G", 1e9), (" M", 1e6), (" k", 1e3)):
        if number >= power:
            return f"{number / power:.1f}{unit}"
    return f"{number:.0f}  "


def plan(
    name: str, *, micro_batch: int | None = None, dtype: Literal["float32", "bfloat16"] = "float32", gated: bool = True
) -> Plan:
    """Print what a model costs: parameters, FLOPs per token, memory, legal micro-batches, matched models.

    No model is built. FLOPs are those of matrix products in training; a multiply-add is two. Memory is an estimate.

    Args:
        name: The model, such as MoT-Medium/32E/8.
        micro_batch: Sequences per device at once. By default the smallest legal number that is at least 32.
        dtype: The type of weights, gradients, optimizer state and activations.
        gated: SwiGLU feed-forwards. Otherwise the paper's plain ones with ReLU.

    Raises ValueError for an unknown name, or a micro-batch that is not legal.
    """
    parsed = parse_name(name)
    batch = -(-SIZES[parsed.size].batch // parsed.group_size) * parsed.group_size
    return plan_of(config_from_name(name, gated=gated), batch=batch, micro_batch=micro_batch, dtype=dtype)
