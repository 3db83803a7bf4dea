"""The command `mot plan`: what a model costs before it is trained, and, timed on this machine, how long it takes."""

import math
from dataclasses import replace
from typing import Any, Literal

import torch

from mixture_of_tokens.models.config import MixtureOfTokensConfig
from mixture_of_tokens.models.fields import config_of
from mixture_of_tokens.models.names import parse_name
from mixture_of_tokens.parallel.placement import Placement
from mixture_of_tokens.planning.communication import spread_of
from mixture_of_tokens.planning.cost import training_flops
from mixture_of_tokens.planning.estimates import Plan, Training, plan_of
from mixture_of_tokens.settings.flags import as_words
from mixture_of_tokens.utils.checks import at_least_one, check_number, checked
from mixture_of_tokens.utils.process import check_one_process

TFLOPS = 300.0  # some 30 % of an H100's 989 in bf16


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
    tflops: float | None = None,
    measure: bool = False,
    model: dict[str, Any] | None = None,
) -> Plan:
    """Print what a model costs: parameters, FLOPs per token, memory, legal micro-batches, matched models.

    No model is built but by --measure. FLOPs are those of matrix products in training; a multiply-add is two. Memory is
    an estimate. With --devices also what each device holds and sends in a step with --training.bf16 true, activations
    counted as in fp32: for the placement that the other flags describe, for others, and for Token Choice.

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
        tflops: What a device gives, in 10^12 FLOPs a second: its peak times the share of it that is reached; by default
            300 where there is a GPU, and with --devices. Some 30 % of an H100's peak in bf16.
        measure: Build the model, time a few steps on this machine, and say how long a training takes: of --steps, or of
            the size's own number. Evaluations come on top.
        model: Fields of the model's configuration, as in --model.num_hidden_layers 8.

    Raises ValueError for an unknown name or field, and for a micro-batch or a placement that is not legal.
    """
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
    fields = ({} if gated else {"gated": "false"}) | as_words("model", model or {})
    parsed, (config, _) = parse_name(name), config_of(name, fields)
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


def _measured(name: str, planned: Plan, steps: int | None, fields: dict[str, str]) -> Training:
    """By steps that are timed now, of micro-batches as planned."""
    # What trains needs more packages than a plan.
    from mixture_of_tokens.training.options import Options
    from mixture_of_tokens.training.recipes import merge
    from mixture_of_tokens.training.timing import pace_of

    check_one_process()
    parts = {"gradient_accumulation_steps": str(planned.batch // planned.micro_batch)}
    merged = merge(name, 0, None, Options(steps=steps, batch_size=planned.batch, model=fields, training=parts))
    steps, flops = merged.config.steps, training_flops(merged.config.model_config, planned.batch)
    seconds = steps * pace_of(merged).step
    return Training(steps, steps * planned.batch * planned.context, steps * flops, None, 1, seconds, measured=True)
