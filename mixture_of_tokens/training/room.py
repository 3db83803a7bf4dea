"""Whether a training fits in the memory of its device, by the estimate of `mot plan`, before anything is written."""

import math
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from mixture_of_tokens.planning.communication import spread_of
from mixture_of_tokens.planning.cost import legal_micro_batches
from mixture_of_tokens.training.merging import Merged
from mixture_of_tokens.utils.process import process_count, process_number, processes_here
from mixture_of_tokens.utils.progress import say, warn_once

# Peaks of a step were 1.05 to 1.3 times the estimate, and with ReMoE, counted with all of its experts, 0.77 times.
SURELY, CLOSE = 0.9, 0.8  # of the estimate, what a training takes at least; of the memory, from where on it may fail
# Of the activations, what is kept at least in mixed precision, where experts vary, and by torch.compile.
MIXED, VARYING, COMPILED = 0.6, 0.5, 0.4
ADAM = ("adamw_torch", "adamw_torch_fused")  # whose two moments are counted; others may keep less


@dataclass(frozen=True)
class Room:
    """Bytes of memory for one process, with and without the disk space that stands in for RAM, and what they are."""

    size: float
    with_swap: float
    what: str


def room_of(*, on_cpu: bool, root: Path = Path("/")) -> Room:
    """Of the device: a GPU's memory, or RAM, less where a control group limits it."""
    if not on_cpu:
        device = process_number() % processes_here() % torch.cuda.device_count()
        size = torch.cuda.get_device_properties(device).total_memory
        return Room(size, size, "GPU memory")
    size, what = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), "RAM"
    if (limit := _limit_of_group(root)) < size:
        size, what = limit, "memory, by the limit of its control group"
    count = processes_here()
    shared = f", for each of {count} processes" * (count > 1)
    return Room(size / count, (size + _swap(root)) / count, what + shared)


def _limit_of_group(root: Path) -> float:
    """Bytes that the control group of this process, or one that holds it, may use; version 2 and version 1."""
    limits = [math.inf]
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, kinds, path = line.split(":", 2)
        if kinds in ("", "memory"):
            top, file = root / "sys/fs/cgroup" / kinds, "memory.limit_in_bytes" if kinds else "memory.max"
            own = top / path.lstrip("/")  # in a container perhaps a path outside of it, whose lower part is not there
            for group in (own, *own.parents):
                if group.is_relative_to(top) and (word := _text(group / file).strip()).isdecimal():
                    limits.append(int(word))
    return min(limits)


def _swap(root: Path) -> float:
    """Bytes; without end where it is unknown, as macOS makes more of it."""
    for line in _text(root / "proc/meminfo").splitlines():
        if line.startswith("SwapTotal:"):
            return 1024 * int(line.split()[1])
    return math.inf


def _text(file: Path) -> str:
    try:
        return file.read_text()
    except OSError:
        return ""


def estimate(merged: Merged, rows: int | None = None, *, at_least: bool = False) -> float:
    """Bytes that a device takes to train so many rows at once, by default the run's micro-batch.

    Args:
        at_least: what cannot be less, whatever the settings save.
    """
    run, config = merged.config, merged.config.model_config
    rows, blocks = rows or run.micro_batch, config.num_hidden_layers
    dtype = "bfloat16" if config.dtype in (torch.bfloat16, torch.float16) else "float32"
    where = {"devices": process_count(), "placement": merged.placement}
    spread = spread_of(config, batch=run.batch_size, micro_batch=rows, dtype=dtype, **where)
    parts: dict[str, float] = {part: size for part, size in spread.memory.items() if part != "total"}
    if run.of_training("activation_checkpointing") or run.of_training("gradient_checkpointing"):
        inputs = blocks * rows * config.max_position_embeddings * config.hidden_size * 4
        parts["activations"] = min(parts["activations"], parts["activations"] // blocks + inputs)
    if not at_least:
        return sum(parts.values())
    shares = {
        MIXED: run.of_training("bf16") or run.of_training("fp16"),
        VARYING: any(routing.varies for routing in config.routings),
        COMPILED: run.of_training("torch_compile"),
    }
    parts["activations"] *= math.prod(share for share, applies in shares.items() if applies)
    parts["optimizer"] *= merged.arguments["optim"] in ADAM
    del parts["logits"]  # a chunk of them, which is smaller on a CPU
    return SURELY * sum(parts.values())


def tell_room(merged: Merged) -> None:
    """Say how much memory a training takes, and how much there is."""
    say(_told(merged, room_of(on_cpu=merged.arguments["use_cpu"])))


def check_room(merged: Merged) -> None:
    """Warn of a training that comes close to the memory of its device.

    Raises ValueError, naming a number of micro-batches that fits, for one that cannot have enough.
    """
    room = room_of(on_cpu=merged.arguments["use_cpu"])
    if not merged.config.steps or estimate(merged) <= CLOSE * room.size:
        return
    what = f"{_told(merged, room)}; {_way_out(merged, room)}"
    if estimate(merged, at_least=True) > room.with_swap:
        raise ValueError(what)
    warn_once(what)


def _told(merged: Merged, room: Room) -> str:
    run = merged.config
    takes = f"{run.name} takes about {_gib(estimate(merged))} to train on {run.micro_batch} rows at once"
    return f"{takes}, and there are {_gib(room.size)} of {room.what}"


def _way_out(merged: Merged, room: Room) -> str:
    """Of the numbers of micro-batches that are legal, the least that fits, or what else there is."""
    run = merged.config
    share = run.batch_size // process_count()
    legal = legal_micro_batches(run.model_config, run.batch_size)
    smaller = [rows for rows in legal if share % rows == 0 and rows < run.micro_batch]
    fit = [rows for rows in smaller if estimate(merged, rows) <= CLOSE * room.size]
    if fit:
        parts = share // fit[-1]
        return f"--training.gradient_accumulation_steps {parts} takes about {_gib(estimate(merged, fit[-1]))}"
    fewer = f"--training.gradient_accumulation_steps {share // smaller[0]}, " if smaller else ""
    return f"{fewer}--training.activation_checkpointing true or --shard N takes less"


def _gib(size: float) -> str:
    return f"{size / 2**30:.1f} GiB"
