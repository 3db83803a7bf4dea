"""What a model costs, on one device and on several, before it is trained; `mot plan` prints it."""

from copy import copy
from dataclasses import dataclass
from textwrap import indent

from mixture_of_tokens.models.config import MixtureOfTokensConfig
from mixture_of_tokens.models.names import name_of
from mixture_of_tokens.planning.communication import Spread
from mixture_of_tokens.planning.cost import flops_per_token, legal_micro_batches, memory, parameters
from mixture_of_tokens.settings.names import parse_name
from mixture_of_tokens.settings.routings import DENSE
from mixture_of_tokens.utils.formatting import Result, aligned, duration, listing, short


@dataclass(frozen=True)
class Training:
    """Of so many steps, without evaluations.

    seconds: as measured on this machine, or FLOPs, forward and backward, over what the devices together give; None
        where nothing is known of a device.
    """

    steps: int
    tokens: int
    flops: float
    tflops: float | None
    devices: int
    seconds: float | None
    measured: bool = False

    def __str__(self) -> str:
        work = f"{self.steps:,} steps: {short(self.tokens)} tokens, {short(self.flops)}FLOPs"
        if self.seconds is None:
            return f"{work}; --measure says how long that takes here, --tflops N on a device that gives so many."
        if self.measured:
            step = f"{self.seconds / self.steps:.2g} s a step"
            return f"{work}; {duration(self.seconds)} on this machine, {step} as timed now, without evaluations."
        each = "of a device" if self.devices == 1 else f"of each of {self.devices} devices"
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
    legal = legal_micro_batches(config, batch)
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
