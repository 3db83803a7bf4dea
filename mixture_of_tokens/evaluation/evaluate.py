"""Loss of a model over text it was not trained on, always over the same blocks in the same groups: `mot evaluate`."""

import dataclasses
import math
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from mixture_of_tokens.data.blocks import Blocks, in_blocks_of
from mixture_of_tokens.data.evaluation_text import whole_text
from mixture_of_tokens.data.groups import grouped_order
from mixture_of_tokens.data.prepare import COMMON_GROUP
from mixture_of_tokens.evaluation.losses import cross_entropy, label_of_groups, not_empty
from mixture_of_tokens.layers.experts import Router
from mixture_of_tokens.layers.mixture import MixtureOfTokens
from mixture_of_tokens.models.forward_hooks import serving_alone
from mixture_of_tokens.parallel.sharding import is_sharded
from mixture_of_tokens.runs.loading import (
    check_experts,
    check_tokens,
    context_of,
    group_size_of,
    load_model,
    load_tokenizer_of,
    placed,
    separates_documents,
    text_of,
)
from mixture_of_tokens.settings.choices import Device, Dtype
from mixture_of_tokens.settings.routings import routings_of
from mixture_of_tokens.utils.checks import at_least_one
from mixture_of_tokens.utils.formatting import Result, aligned
from mixture_of_tokens.utils.process import is_main
from mixture_of_tokens.utils.progress import progress_bar, say_once

BATCH_SIZE = 32  # of models that do not mix rows
ROWS_FOR_SPEED = 256  # alone, of models whose loss is the same as in batches
ARGMAX_TEMPERATURE = 1e-6
LARGEST_LOSS = math.log(sys.float_info.max)  # of a loss whose perplexity is a number


@dataclasses.dataclass(frozen=True)
class EvaluationLine:
    """The loss in groups of `rows` rows: nats a token, its spread over regroupings, and the time of a group."""

    label: str
    rows: int
    loss: float
    spread: float | None
    perplexity: float
    bits_per_byte: float | None
    tokens: int
    seconds_per_group: float
    tokens_per_second: float


@dataclasses.dataclass(frozen=True)
class Evaluation(Result):
    """A model's loss over a text of `bytes` bytes, in blocks of `context` tokens."""

    run: str
    group_size: int | None
    context: int
    bytes: int
    lines: list[EvaluationLine]

    def __str__(self) -> str:
        columns = ["", "loss", "spread", "perplexity", "bits/byte", "ms", "tokens/s", "tokens"]
        table = [
            [
                line.label,
                f"{line.loss:.4f}",
                "" if line.spread is None else f"{line.spread:.4f}",
                f"{line.perplexity:.3f}",
                "" if line.bits_per_byte is None else f"{line.bits_per_byte:.4f}",
                f"{1000 * line.seconds_per_group:.1f}",
                f"{line.tokens_per_second:,.0f}",
                f"{line.tokens:,}",
            ]
            for line in self.lines
        ]
        return aligned([columns, *table])


class _PlannedLine(NamedTuple):
    """A line to be: its label, block numbers (groups, rows) of every regrouping, and how the model is served."""

    label: str
    orders: list[np.ndarray]
    served: AbstractContextManager = nullcontext()


class _Measured(NamedTuple):
    nats: float
    tokens: int
    seconds: list[float]
    speeds: list[float]


def evaluate(
    run: str,
    *,
    data: list[str] | None,
    field: str,
    context: int | None,
    regroupings: int,
    sweep_tokens: int,
    max_tokens: int | None,
    experts: int | None,
    separate_documents: bool | None,
    device: Device | None,
    dtype: Dtype | None,
    shard: int | None,
    expert_parallel: int | None,
) -> Evaluation:
    """As the function of `commands/evaluate.py`, which explains its arguments."""
    at_least_one(regroupings=regroupings, sweep_tokens=sweep_tokens, max_tokens=max_tokens, context=context)
    at_least_one(experts=experts)
    if data == []:
        raise ValueError("data names no text; leave it out for the run's own validation text")
    model = load_model(run, device=device, dtype=dtype, placement=placed(shard, expert_parallel, experts))
    check_experts(run, model, experts)
    longest = context_of(model)
    context = min(longest, 1024) if context is None else context
    if context > longest:
        raise ValueError(f"--context {context} is more than the {longest} tokens that the model takes")
    group_size = group_size_of(model)
    if experts is not None:
        with serving_alone(model, experts):  # or why not
            pass
    if data is None:
        blocks = in_blocks_of(text_of(run).validation, context, max(COMMON_GROUP, group_size or BATCH_SIZE))
    else:
        tokenizer = load_tokenizer_of(run)
        blocks = whole_text(data, tokenizer, field=field, context=context, group_size=group_size or BATCH_SIZE)
        tokens: Any = blocks.tokens  # in memory
        check_tokens(model, run, int(tokens.max()))
        if (first := tokenizer.bos_token_id) is not None and tokenizer("a").input_ids[:1] == [first]:
            what = f"{run} expects {tokenizer.bos_token} at the beginning of a text"
            say_once(f"{what}, and blocks have none: its loss may come out too high")
    if separate_documents is None:
        separate_documents = separates_documents(run)
    blocks = dataclasses.replace(blocks, separate=separate_documents)
    plan, lines = _planned(model, blocks, regroupings, sweep_tokens, max_tokens, experts), []
    total = sum(len(not_empty(order)) for planned in plan for order in planned.orders)
    with progress_bar("Evaluating", total=total, unit="group", hidden=not is_main()) as bar:
        for planned in plan:
            with planned.served:
                found = [_measure(model, blocks, order, bar) for order in planned.orders]
            lines.append(_line(planned, found, blocks))
    return Evaluation(run, group_size, context, blocks.bytes, lines)


def _planned(
    model, blocks: Blocks, regroupings: int, sweep_tokens: int, max_tokens: int | None, experts: int | None
) -> list[_PlannedLine]:
    """The lines of an evaluation, before they are measured."""
    mixes, group_size = group_size_of(model) is not None, group_size_of(model) or BATCH_SIZE
    seeds = range(regroupings if mixes and max_tokens is None else 1)
    full = [grouped_order(blocks, group_size, seed=seed, everything=True) for seed in seeds]
    if all(len(not_empty(order)) == 1 for order in full):  # so short a text is grouped in one way
        full = full[:1]
    if max_tokens is not None:
        full = [full[0][: max(1, max_tokens // (group_size * blocks.context))]]
    part = full[0][: max(1, sweep_tokens // (group_size * blocks.context))]
    counts = np.concatenate([(not_empty(order) >= 0).sum(1) for order in full])
    filled = label_of_groups(np.concatenate(full)) if mixes else f"{group_size} rows"
    plan = [_PlannedLine(filled, full)]
    if len(part) < len(full[0]):
        plan.append(_PlannedLine(f"{filled}, same text as below", [part]))
    routed = [routing.routed for routing in routings_of(model) if routing.reads_mixtures]
    if any(routed):
        plan.append(_PlannedLine(f"{filled}, argmax routing", [part], argmax_routing(model)))
    # Below the largest group that there is.
    sizes = [2**power for power in range(1, int(counts.max() - 1).bit_length())] if mixes else []
    plan += [_PlannedLine(f"{n} rows a group", [in_parts(part, n)]) for n in reversed(sizes)]
    if all(routing.serves_alone for routing in routings_of(model)):
        rows = in_parts(part, 1)
        if not mixes and len(rows) > ROWS_FOR_SPEED:  # its loss is the same
            plan.append(_PlannedLine(f"alone, {ROWS_FOR_SPEED} rows", [rows[:ROWS_FOR_SPEED]]))
        else:
            plan.append(_PlannedLine("alone", [rows]))
        if mixes and group_size > 1 and routed and all(routed) and not is_sharded(model):
            count, granularity = model.config.num_experts, model.config.num_experts_per_tok
            wanted = (2 * granularity, granularity) if experts is None else (experts,)
            for few in (few for few in wanted if few < count):
                served = serving_alone(model, few)
                plan.append(_PlannedLine(f"alone, {few} of {count} experts", [in_parts(part, 1)], served))
    return plan


def _line(planned: _PlannedLine, found: list[_Measured], blocks: Blocks) -> EvaluationLine:
    """What was found of each regrouping, as one line."""
    losses = [one.nats / one.tokens for one in found]
    loss, first = statistics.mean(losses), found[0]
    complete = first.tokens == len(blocks.tokens) - 1
    return EvaluationLine(
        label=planned.label,
        rows=planned.orders[0].shape[1],
        loss=loss,
        spread=max(losses) - min(losses) if len(losses) > 1 else None,
        perplexity=math.exp(loss) if loss < LARGEST_LOSS else math.inf,
        bits_per_byte=loss * first.tokens / math.log(2) / blocks.bytes if complete else None,
        tokens=first.tokens,
        seconds_per_group=statistics.median(seconds for one in found for seconds in one.seconds),
        tokens_per_second=statistics.median(speed for one in found for speed in one.speeds),
    )


def in_parts(groups: np.ndarray, n: int) -> np.ndarray:
    """Split groups of blocks (groups, G) into groups of n. Incomplete ones are padded with -1, empty ones left out."""
    padded = np.pad(groups, ((0, 0), (0, -groups.shape[1] % n)), constant_values=-1)
    return not_empty(padded.reshape(-1, n))


@contextmanager
def argmax_routing(model) -> Iterator[None]:
    """Every expert reads only the token of a group with the largest weight, and writes back to it alone.

    What stands for missing tokens takes part: its logits are divided by the same temperature.
    """
    routers = [module for module in model.modules() if isinstance(module, Router)]
    layers = [module for module in model.modules() if isinstance(module, MixtureOfTokens)]
    settings = [router.temperature_setting for router in routers]
    learned = [router.log_temperature for router in routers if router.log_temperature is not None]
    before = [temperature.detach().clone() for temperature in learned]
    companions = [layer.companion_logit.clone() for layer in layers]
    try:
        for layer in layers:
            if layer.gate is not None:
                with torch.no_grad():
                    layer.companion_logit *= layer.gate.temperature / ARGMAX_TEMPERATURE
        for router in routers:
            router.set_temperature(ARGMAX_TEMPERATURE)
        yield
    finally:
        for router, setting in zip(routers, settings, strict=True):
            router.set_temperature(setting)
        for temperature, log_temperature in zip(learned, before, strict=True):
            temperature.data.copy_(log_temperature)
        for layer, companion_logit in zip(layers, companions, strict=True):
            layer.companion_logit.copy_(companion_logit)


def _measure(model, blocks: Blocks, groups: np.ndarray, bar: tqdm) -> _Measured:
    """Summed cross-entropy of blocks by number (groups, n), one group at a time, and the seconds of each group."""
    nats, tokens, seconds, speeds = 0.0, 0, [], []
    for rows in not_empty(groups):
        padded = bool((rows < 0).any() or rows.max() >= len(blocks))
        inputs = {name: tensor.to(model.device) for name, tensor in blocks.batch(rows, padded=padded).items()}
        start = time.perf_counter()
        group_nats, group_tokens = cross_entropy(model, inputs)
        seconds.append(time.perf_counter() - start)
        speeds.append(group_tokens / seconds[-1])
        nats, tokens = nats + group_nats, tokens + group_tokens
        bar.update()
    return _Measured(nats, tokens, seconds, speeds)
