"""The command `mot plan`: what a model costs before it is trained, and, timed on this machine, how long it takes."""

import math
from dataclasses import replace
from typing import Any, Literal

import torch

from mixture_of_tokens.models.config import MixtureOfTokensConfig
from mixture_of_tokens.models.fields import config_of
from mixture_of_tokens.parallel.placement import Placement
from mixture_of_tokens.planning.communication import spread_of
from mixture_of_tokens.planning.cost import training_flops
from mixture_of_tokens.planning.estimates import Plan, Training, plan_of
from mixture_of_tokens.settings.model import model_fields
from mixture_of_tokens.settings.names import parse_name
from mixture_of_tokens.utils.checks import at_least_one, check_number
from mixture_of_tokens.utils.process import check_one_process

TFLOPS = 300.0  # some 30 % of an H100's 989 in bf16


def plan(
    name: str,
    *,
    micro_batch: int | None,
    dtype: Literal["float32", "bfloat16"],
    gated: bool,
    batch_size: int | None,
    devices: int | None,
    shard: int | None,
    replicate: int | None,
    expert_parallel: int | None,
    steps: int | None,
    tflops: float | None,
    measure: bool,
    model: dict[str, Any] | None,
) -> Plan:
    """As the function of `commands/plan.py`, which explains its arguments."""
    at_least_one(batch_size=batch_size, devices=devices, steps=steps)
    for flag, value in {"batch-size": batch_size, "devices": devices, "steps": steps}.items():
        check_number(f"--{flag}", value)
    if tflops is not None and not 0 < tflops < math.inf:
        raise ValueError(f"--tflops must be positive and finite, not {tflops}")
    if devices is None and not shard == replicate == expert_parallel is None:
        raise ValueError("--shard, --replicate and --expert-parallel are for --devices N")
    if steps is None and tflops is not None:
        raise ValueError("--tflops is for --steps N, whose time it says")
    if measure and not tflops is devices is None:
        raise ValueError("--measure times this machine: leave out --tflops and --devices")
    fields = ({} if gated else {"gated": False}) | model_fields(model or {})
    parsed, config = parse_name(name), config_of(name, fields)
    batch = batch_size or -(-parsed.dimensions.batch // parsed.group_size) * parsed.group_size
    spread = None
    if devices is not None:
        placement = Placement.of(shard, replicate, expert_parallel, devices, "devices")
        spread = spread_of(config, batch=batch, devices=devices, placement=placement, micro_batch=micro_batch)
        micro_batch = spread.micro_batch
    planned = plan_of(config, batch=batch, micro_batch=micro_batch, dtype=dtype)
    if measure:
        training = _measured(name, planned, steps, fields | {"dtype": dtype})
    else:
        training = None if steps is None else _computed(planned, config, steps, tflops, devices)
    return replace(planned, spread=spread, training=training)


def _computed(
    planned: Plan, config: MixtureOfTokensConfig, steps: int, tflops: float | None, devices: int | None
) -> Training:
    """By what devices give; of a CPU nothing is known."""
    flops, count = steps * training_flops(config, planned.batch), devices or 1
    if tflops is None and (devices is not None or torch.cuda.is_available()):
        tflops = TFLOPS
    seconds = None if tflops is None else flops / (count * tflops * 1e12)
    return Training(steps, steps * planned.batch * planned.context, flops, tflops, count, seconds)


def _measured(name: str, planned: Plan, steps: int | None, fields: dict[str, Any]) -> Training:
    """By steps that are timed now, of micro-batches as planned."""
    # What trains needs more packages than a plan.
    from mixture_of_tokens.settings.options import Options
    from mixture_of_tokens.training.merging import merge
    from mixture_of_tokens.training.timing import pace_of

    check_one_process()
    parts = {"gradient_accumulation_steps": planned.batch // planned.micro_batch}
    merged = merge(name, 0, None, Options(steps=steps, batch_size=planned.batch, model=fields, training=parts))
    steps, flops = merged.config.steps, training_flops(merged.config.model_config, planned.batch)
    seconds = steps * pace_of(merged).step
    return Training(steps, steps * planned.batch * planned.context, steps * flops, None, 1, seconds, measured=True)
