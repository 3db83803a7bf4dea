"""The trainer of a run: its text, its model with weights drawn by its seed, and the arguments of Trainer."""

import copy
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments, set_seed

from mixture_of_tokens.data.blocks import Blocks
from mixture_of_tokens.data.groups import GroupedBatches
from mixture_of_tokens.data.prepare import Prepared
from mixture_of_tokens.data.streaming import PartedBatches
from mixture_of_tokens.data.tokenizer import ids_of
from mixture_of_tokens.models.config import MixtureOfTokensConfig
from mixture_of_tokens.models.modeling import MixtureOfTokensForCausalLM
from mixture_of_tokens.parallel.placement import COPIES, Placement
from mixture_of_tokens.parallel.sharding import limit_waits, shard_model
from mixture_of_tokens.runs.records import RunConfig
from mixture_of_tokens.training.merging import Merged
from mixture_of_tokens.training.trainer import RunTrainer


def arguments_of(merged: Merged, out: Path, **others: Any) -> TrainingArguments:
    """Of a run in this directory; `others` in place of its own."""
    taken = TrainingArguments(output_dir=str(out), **merged.arguments | others)
    taken.output_dir = str(out)  # of which transformers expands ~, and nothing here does
    taken.run_name = taken.run_name or out.name
    # Several GPUs of one process would each take all the rows; they are for torchrun.
    taken._n_gpu = min(1, taken.n_gpu)
    return taken


def build(run: RunConfig, arguments: TrainingArguments, placement: Placement = COPIES) -> tuple[RunTrainer, Prepared]:
    """The trainer of a run, its data prepared and its model initialised, the same in every placement."""
    prepared, config = run.prepare(), copy.deepcopy(run.model_config)
    config.vocab_size = vocabulary_of(run, prepared)
    vocabulary = prepared.tokenizer.get_vocab()
    config.eos_token_id = vocabulary[str(prepared.tokenizer.eos_token)]
    config.pad_token_id = vocabulary[str(prepared.tokenizer.pad_token)]
    parts, order = run.parts, order_of(run)
    rows = GroupedBatches(prepared.train, **order) if parts is None else PartedBatches(parts, **order)
    trainer = trainer_of(
        run,
        config,
        arguments,
        placement,
        rows=rows,
        evaluated=getattr(prepared, run.evaluate_on),
        corpus=f"{prepared.facts['hash']} {prepared.facts['tokenizer']}",
        processing_class=prepared.tokenizer,
    )
    return trainer, prepared


def vocabulary_of(run: RunConfig, prepared: Prepared) -> int:
    """How many tokens the model of a run knows."""
    decided = run.tokenizer is not None and "vocab_size" in run.model
    return run.model_config.vocab_size if decided else ids_of(prepared.tokenizer)


def order_of(run: RunConfig) -> dict[str, Any]:
    """Arguments of `GroupedBatches`."""
    order = {"group_size": run.group_size, "batch_size": run.batch_size, "steps": run.steps}
    before = 0 if run.start is None else -(-run.start.rows // run.batch_size)
    return order | {"seed": run.seed, "first_step": run.first_step + before, "mixed": run.model_config.group_size}


def trainer_of(
    run: RunConfig,
    config: MixtureOfTokensConfig,
    arguments: TrainingArguments,
    placement: Placement,
    *,
    rows: GroupedBatches,
    evaluated: Blocks,
    corpus: str,
    **others: Any,
) -> RunTrainer:
    """The trainer of a run on these rows, with a model of this configuration that its seed has drawn."""
    set_seed(run.seed)
    model = MixtureOfTokensForCausalLM(config)
    if isinstance(config.dtype, torch.dtype):
        # Weights alone: thresholds, biases and learned temperatures move by less than bf16 tells apart.
        for parameter in (each for each in model.parameters() if each.dim()):
            parameter.data = parameter.data.to(config.dtype)
    if "attn_implementation" not in run.model and _is_slow_in_half_precision(arguments, config):
        model.set_attn_implementation("eager")
    model = shard_model(model, placement)
    limit_waits(model, arguments.ddp_timeout)
    given = {"rows": rows, "evaluated": evaluated, "corpus": corpus, "scored_rows": run.scored_rows}
    given |= {"first_step": run.first_step}
    return RunTrainer(model, arguments, **given, **others)


def _is_slow_in_half_precision(arguments: TrainingArguments, config: MixtureOfTokensConfig) -> bool:
    """Whether torch's own attention is: on the CPU its backward pass takes twice as long as products and a softmax do.

    At a context of 2,048 it no longer does, and the scores of all heads take memory.
    """
    half = arguments.bf16 or config.dtype in (torch.bfloat16, torch.float16)
    return half and arguments.device.type == "cpu" and config.max_position_embeddings <= 1024
