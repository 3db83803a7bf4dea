"""What a model costs over several devices: memory of each, and what it sends in a step.

Collectives are counted as rings: a device sends (n - 1) / n of what n devices gather or reduce, twice that for an
all-reduce. N parameters, of them N_e of experts; S shards, R copies, X devices that divide the experts of a copy:

    copies (DDP)     gradients are all-reduced over all devices, once a step
    shards (FSDP2)   weights are gathered before each pass, forward and backward, but those of the head and the norm
                     before it once for both, and gradients are reduced to shards; in one copy once a step, and until
                     then each device holds whole gradients; in several copies in every micro-step, and the shards are
                     all-reduced over the copies once a step
    experts          an expert's weights are shards of S / X devices only. Each layer exchanges what experts read and
                     what they give, forward and backward: four times E * M rows of width D, whatever is routed where
"""

from dataclasses import dataclass
from itertools import product

from mixture_of_tokens.models.config import MixtureOfTokensConfig
from mixture_of_tokens.parallel.placement import COPIES, Placement
from mixture_of_tokens.planning.cost import BYTES, legal_micro_batches, memory, parameters
from mixture_of_tokens.settings.routings import BY_CONSTRUCTION
from mixture_of_tokens.utils.checks import divisors
from mixture_of_tokens.utils.formatting import aligned, listing

WEIGHT, EXCHANGED = 4, 2  # bytes of an element, as with --training.bf16 true
CAPACITY = 1.25  # of Token Choice, beside which a plan stands
COUNT = 8  # bytes of a number of tokens


@dataclass(frozen=True)
class Spread:
    """A model over devices. Bytes are those of one device; sent in a step.

    memory: weights, gradients and optimizer are this device's parts; gathered is the largest block in one piece.
    sent: by kind. experts_sent: what experts alone send, in this placement and in others with as many devices.
    even_at: tokens of a device and micro-step below which exchanging sends less than gathering experts, if all devices
        divide them; None without experts that could be divided.
    """

    devices: int
    placement: Placement
    micro_batch: int
    micro_steps: int
    memory: dict[str, int]
    sent: dict[str, float]
    experts_sent: dict[str, float]
    even_at: int | None
    legal_placements: list[Placement]

    def __str__(self) -> str:
        held = [[part, f"{size / 2**30:.3f}"] for part, size in self.memory.items()]
        sent = [[part, f"{size / 1e6:,.1f}"] for part, size in self.sent.items()]
        others = [[part, f"{size / 1e6:,.1f}"] for part, size in self.experts_sent.items()]
        rows = f"{self.micro_batch} sequences at once, {self.micro_steps} times a step"
        lines = [f"{self.devices} devices, {self.placement}: {rows}", ""]
        lines += [aligned([["memory of a device", "GiB"], *held]), ""]
        lines += [aligned([["a device sends in a step", "MB"], *sent]), ""]
        if others:
            lines += [aligned([["of it for experts, and in other ways", "MB"], *others]), ""]
        if self.even_at is not None:
            lines.append(
                f"Below {self.even_at:,} tokens of a device and micro-step, exchanging what experts read sends less "
                "than gathering them."
            )
        legal: dict[int, list[str]] = {}
        for one in self.legal_placements:
            legal.setdefault(one.shard, []).append(str(one.expert_parallel))
        ways = [
            f"--shard {shard} (--expert-parallel {', '.join(parts)})" for shard, parts in legal.items() if shard > 1
        ]
        return "\n".join([*lines, f"Legal beside copies: {'; '.join(ways) or 'nothing'}."])


def spread_of(
    config: MixtureOfTokensConfig,
    *,
    batch: int,
    devices: int,
    placement: Placement,
    micro_batch: int | None = None,
    dtype="float32",
) -> Spread:
    """What a step of `batch` sequences costs on so many devices.

    Args:
        micro_batch: sequences of a device at once; by default all of its share.
        dtype: of what a device holds.

    Raises ValueError where the batch does not divide, and for a model that cannot lie so.
    """
    placement.check(config)
    legal = [size for size in legal_micro_batches(config, batch) if batch % (size * devices) == 0]
    if not legal:
        group, groups = config.group_size, batch // config.group_size
        raise ValueError(
            f"a batch of {batch} sequences does not divide over {devices} devices into groups of {group}: at most "
            f"{groups} devices, or --batch-size {group * devices}; it divides over {listing(divisors(groups))}"
        )
    micro_batch = legal[-1] if micro_batch is None else micro_batch
    if micro_batch not in legal:
        words = listing(legal)
        raise ValueError(f"micro-batch {micro_batch} is not legal for {batch} sequences on {devices} devices: {words}")
    steps = batch // (micro_batch * devices)
    return Spread(
        devices=devices,
        placement=placement,
        micro_batch=micro_batch,
        micro_steps=steps,
        memory=_memory(config, placement, micro_batch, steps, dtype),
        sent=_sent(config, devices, placement, micro_batch, steps),
        experts_sent=_experts_sent(config, devices, placement, micro_batch, steps),
        even_at=_even_at(config, devices, micro_batch, steps),
        legal_placements=legal_placements(config, devices),
    )


def legal_placements(config: MixtureOfTokensConfig, devices: int) -> list[Placement]:
    found, numbers = [COPIES], divisors(devices)
    for shard, expert_parallel in product(numbers[1:], numbers):
        if shard % expert_parallel == 0:
            placement = Placement(shard, devices // shard, expert_parallel)
            try:
                placement.check(config)
            except ValueError:
                continue
            found.append(placement)
    return found


def _memory(
    config: MixtureOfTokensConfig, placement: Placement, micro_batch: int, steps: int, dtype: str
) -> dict[str, int]:
    parts = memory(config, micro_batch, dtype)
    if not placement.sharded:
        return parts | {"total": sum(parts.values())}
    for part in ("weights", "gradients", "optimizer"):
        parts[part] = -(-parts[part] // placement.shard)
    if steps > 1 and placement.replicate == 1:  # not reduced to shards before the last micro-step
        own = parameters(config)
        parts["gradients"] = BYTES[dtype] * (
            own["total"] - own["experts"] + own["experts"] // placement.expert_parallel
        )
    parts["gathered"] = BYTES[dtype] * _largest_block(config, placement)
    return parts | {"total": sum(parts.values())}


def _largest_block(config: MixtureOfTokensConfig, placement: Placement) -> int:
    """Parameters that stand in one piece at a time: a block's, or the embedding's or the head's."""
    counts, blocks, sparse = parameters(config), config.num_hidden_layers, len(config.sparse_routings)
    column = (3 if config.gated else 2) * config.hidden_size
    feed_forwards = [column * config.intermediate_size] if sparse < blocks else []
    if sparse:
        experts = counts["experts"] // placement.expert_parallel
        shared = column * config.shared_experts * config.moe_intermediate_size
        feed_forwards.append((counts["router"] + experts) // sparse + shared)
    return max(
        counts["embedding"], counts["head"], (counts["attention"] + counts["norms"]) // blocks + max(feed_forwards)
    )


def _sent(
    config: MixtureOfTokensConfig, devices: int, placement: Placement, micro_batch: int, steps: int
) -> dict[str, float]:
    counts = parameters(config)
    if placement.sharded:
        once = counts["head"] + config.hidden_size  # and the norm before it, which stay whole between the passes
        parts = _weights_sent(counts["total"] - counts["experts"], placement, placement.shard, steps, once)
        for kind, sent in _of_experts(config, placement, micro_batch, steps).items():
            parts[kind] = parts.get(kind, 0.0) + sent
    else:
        parts = {"gradients of copies": _all_reduced(counts["total"], devices)}
    return {kind: sent for kind, sent in parts.items() if sent} | {"total": sum(parts.values())}


def _of_experts(config: MixtureOfTokensConfig, placement: Placement, micro_batch: int, steps: int) -> dict[str, float]:
    own, among = parameters(config)["experts"] / placement.expert_parallel, placement.shard // placement.expert_parallel
    parts = _weights_sent(own, placement, among, steps)
    rows = _rows(config, micro_batch)
    return parts | {"exchanged by experts": steps * _exchanged(config, placement.expert_parallel, rows)}


def _experts_sent(
    config: MixtureOfTokensConfig, devices: int, placement: Placement, micro_batch: int, steps: int
) -> dict[str, float]:
    """As they lie, and for comparison: each way over all devices at once."""
    routings, count = config.sparse_routings, parameters(config)["experts"]
    if not routings or devices == 1:
        return {}
    copies = _all_reduced(count, devices)
    here = sum(_of_experts(config, placement, micro_batch, steps).values()) if placement.sharded else copies
    ways = {"as here": here, "copies": copies}
    ways["shards"] = sum(_weights_sent(count, Placement(devices), devices, steps).values())
    if _can_be_divided(config):
        ways["divided"] = steps * _exchanged(config, devices, _rows(config, micro_batch))
    chosen = steps * micro_batch * config.max_position_embeddings * config.num_experts_per_tok * len(routings)
    counts = steps * len(routings) * config.num_experts * COUNT * _ring(devices)
    ways[f"divided, Token Choice, capacity {CAPACITY:g}"] = _exchanged(config, devices, CAPACITY * chosen)
    ways["divided, Token Choice, dropless"] = counts + _exchanged(config, devices, chosen)
    return ways


def _even_at(config: MixtureOfTokensConfig, devices: int, micro_batch: int, steps: int) -> int | None:
    if devices == 1 or not _can_be_divided(config):
        return None
    gathered = sum(_weights_sent(parameters(config)["experts"], Placement(devices), devices, steps).values())
    tokens = micro_batch * config.max_position_embeddings
    return round(gathered / steps / _exchanged(config, devices, _rows(config, micro_batch) / tokens))


def _can_be_divided(config: MixtureOfTokensConfig) -> bool:
    routings = config.sparse_routings
    return bool(routings) and all(routing.balance == BY_CONSTRUCTION for routing in routings)


def _rows(config: MixtureOfTokensConfig, micro_batch: int) -> int:
    """That all experts of all layers read in a micro-step of one device."""
    routings = config.sparse_routings
    return sum(routing.rows(config, micro_batch, config.max_position_embeddings, True) for routing in routings)


def _weights_sent(count: float, placement: Placement, shard: int, steps: int, once: int = 0) -> dict[str, float]:
    """For so many weights, which are shards of `shard` devices; `once` of them are gathered for both passes."""
    reductions = steps if placement.replicate > 1 else 1
    return {
        "weights gathered": steps * _ring(shard) * WEIGHT * (2 * count - once),
        "gradients reduced": reductions * _ring(shard) * WEIGHT * count,
        "gradients of copies": _all_reduced(count / shard, placement.replicate),
    }


def _all_reduced(count: float, devices: int) -> float:
    return 2 * _ring(devices) * WEIGHT * count


def _exchanged(config: MixtureOfTokensConfig, devices: int, rows: float) -> float:
    return 4 * _ring(devices) * rows * config.hidden_size * EXCHANGED


def _ring(count: int) -> float:
    return (count - 1) / count
