"""The command `mot plan`: what a model costs, on one device and on several, before it is trained."""

import math
from copy import copy
from dataclasses import dataclass, replace
from textwrap import indent
from typing import Any, Literal

from mixture_of_tokens.checks import LARGEST, at_least_one, checked
from mixture_of_tokens.flags import as_words
from mixture_of_tokens.formatting import Result, aligned, duration, listing, short
from mixture_of_tokens.model.config import MixtureOfTokensConfig
from mixture_of_tokens.model.cost import flops_per_token, legal_micro_batches, memory, parameters, training_flops
from mixture_of_tokens.model.fields import config_of
from mixture_of_tokens.model.names import SIZES, name_of, parse_name
from mixture_of_tokens.model.placement import Placement
from mixture_of_tokens.model.routings import DENSE
from mixture_of_tokens.model.spread import Spread, spread_of

TFLOPS = 300.0  # some 30 % of an H100's 989 in bf16


@dataclass(frozen=True)
class Training:
    """Of so many steps: `seconds` is FLOPs, forward and backward, over what the devices together give."""

    steps: int
    tokens: int
    flops: float
    tflops: float
    devices: int
    seconds: float

    def __str__(self) -> str:
        each = "of a device" if self.devices == 1 else f"of each of {self.devices} devices"
        work = f"{self.steps:,} steps: {short(self.tokens)} tokens, {short(self.flops)}FLOPs"
        return f"{work}; {duration(self.seconds)} at {self.tflops:g} TFLOP/s {each}."


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
    spread: Spread | None = None
    training: Training | None = None

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
                f"legal micro-batches: {listing(self.legal_micro_batches)}",
                "",
                first,
                "",
                second,
                f"A perfect implementation has {self.floor['model']:.3f} of the dense model's speed "
                f"({self.floor['feed_forward']:.3f} in the sparse blocks' feed-forwards).",
                "",
                f"{head}   estimated, {self.micro_batch} sequences at once",
                memory_rows,
                *([] if self.training is None else ["", str(self.training)]),
                *([] if self.spread is None else ["", str(self.spread)]),
            ]
        )


def plan_of(config: MixtureOfTokensConfig, batch: int, micro_batch: int | None = None, dtype="float32") -> Plan:
    """What a configuration costs.

    Args:
        batch: sequences a step; micro_batch: sequences at once, by default all of them, as in `mot train`.

    Raises ValueError for a batch or micro_batch that is not legal, or an unknown dtype.
    """
    legal = legal_micro_batches(config, batch, in_groups=True)
    if micro_batch is None:
        micro_batch = legal[-1]
    if micro_batch not in legal:
        raise ValueError(f"micro-batch {micro_batch} is not legal; legal are {listing(legal)}")
    name, dense = name_of(config), copy(config)
    dense.mlp_layer_types = [DENSE.kind] * config.num_hidden_layers
    forward, backward = map(_with_total, flops_per_token(config, batch=micro_batch))
    of_dense = _with_total(flops_per_token(dense, batch=micro_batch).forward)
    matched = of_dense["feed_forward"] * len(config.sparse_routings) / config.num_hidden_layers
    shared = forward["feed_forward"] - (of_dense["feed_forward"] - matched)
    sparse = shared + sum(forward[part] for part in ("experts", "router", "dispatch", "combine"))
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
        if number >= 0.99995 * power:
            return f"{number / power:.1f}{unit}"
    return f"{number:.0f}  "


@checked
def plan(
    name: str,
    *,
    micro_batch: int | None = None,
    dtype: Literal["float32", "bfloat16"] = "float32",
    gated: bool = True,
    batch_size: int | None = None,
    devices: int | None = None,
    shard: int | None = None,
    replicate: int | None = None,
    expert_parallel: int | None = None,
    steps: int | None = None,
    tflops: float = TFLOPS,
    model: dict[str, Any] | None = None,
) -> Plan:
    """Print what a model costs: parameters, FLOPs per token, memory, legal micro-batches, matched models.

    No model is built. FLOPs are those of matrix products in training; a multiply-add is two. Memory is an estimate.
    With --devices also what each device holds and sends in a step with --training.bf16 true, activations counted as in
    fp32: for the placement that the other flags describe, for others, and for Token Choice.

    Args:
        name: The model, such as MoT-Medium/32E/8.
        micro_batch: Sequences per device at once; by default a device's whole share of the batch, as in mot train.
        dtype: The type of weights, gradients, optimizer state and activations.
        gated: SwiGLU feed-forwards. Otherwise the paper's plain ones with ReLU.
        batch_size: Sequences a step; by default the size's own number, in whole groups.
        devices: Devices that train together.
        shard: Devices that hold one copy of the model together, as in mot train.
        replicate: Copies of a sharded model.
        expert_parallel: Devices of a copy that divide the experts.
        steps: Steps of a training, whose tokens, FLOPs and time are then printed too.
        tflops: What a device gives, in 10^12 FLOPs a second: its peak times the share of it that is reached.
        model: Fields of the model's configuration, as in --model.num_hidden_layers 8.

    Raises ValueError for an unknown name or field, and for a micro-batch or a placement that is not legal.
    """
    at_least_one(batch_size=batch_size, devices=devices, steps=steps)
    for flag, value in {"batch-size": batch_size, "devices": devices, "steps": steps}.items():
        if value is not None and value > LARGEST:
            raise ValueError(f"--{flag} is more than {LARGEST}")
    if not 0 < tflops < math.inf:
        raise ValueError(f"--tflops must be positive and finite, not {tflops}")
    if devices is None and not shard == replicate == expert_parallel is None:
        raise ValueError("--shard, --replicate and --expert-parallel are for --devices N")
    if steps is None and tflops != TFLOPS:
        raise ValueError("--tflops is for --steps N, whose time it says")
    fields = ({} if gated else {"gated": "false"}) | as_words("model", model or {})
    parsed, (config, _) = parse_name(name), config_of(name, fields)
    batch = batch_size or -(-SIZES[parsed.size].batch // parsed.group_size) * parsed.group_size
    spread = None
    if devices is not None:
        placement = Placement.of(shard, replicate, expert_parallel, devices, "devices")
        spread = spread_of(config, batch=batch, devices=devices, placement=placement, micro_batch=micro_batch)
        micro_batch = spread.micro_batch
    planned = plan_of(config, batch=batch, micro_batch=micro_batch, dtype=dtype)
    training = None
    if steps is not None:
        flops, count = steps * training_flops(config, batch), devices or 1
        tokens = steps * batch * planned.context
        training = Training(steps, tokens, flops, tflops, count, flops / (count * tflops * 1e12))
    return replace(planned, spread=spread, training=training)
