"""Transformers' Trainer on rows of `GroupedBatches`, which have an order of their own and come as whole batches."""

import copy
import inspect
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainingArguments

from mixture_of_tokens.data.groups import GroupedBatches
from mixture_of_tokens.models.balance_callback import BalanceCallback
from mixture_of_tokens.models.companions import forget_companions
from mixture_of_tokens.models.modeling import MixtureOfTokensForCausalLM

OF_ROWS = {"per_device_train_batch_size": 8, "max_steps": -1}  # transformers' defaults of what rows say


class TemperaturesUndecayed(Trainer):
    """Weight decay would draw the logarithm of a learned temperature to 0, and so the temperature to 1."""

    def get_decay_parameter_names(self, model) -> list[str]:
        return [name for name in super().get_decay_parameter_names(model) if not name.endswith("log_temperature")]


class GroupedTrainer(TemperaturesUndecayed):
    """A Trainer of transformers for any causal language model, with the steps and batches of a `GroupedBatches`.

    Rows are neither shuffled nor collated, and a model gets of `input_ids`, `labels` and `shift_labels` what its
    forward takes. Processes and gradient accumulation divide the batch of a step, so `per_device_train_batch_size` can
    be left out (transformers' default, 8, counts as left out), and so can `max_steps`; fewer steps than the rows have
    may be asked for.

    A model of this library is balanced after each step, where its routing has no loss for that. Companions are set to
    zero when training begins, as what was measured is of other weights: `calibrate_companions` measures them again.

    Args:
        train_dataset: the rows; eval_dataset: others, whose batches are those of an evaluation. Others are Trainer's.

    Raises ValueError for other data, for a batch that processes and accumulation cannot divide into whole groups, and
    for arguments that say otherwise than the rows.
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        args: TrainingArguments | None = None,
        data_collator: Any = None,
        train_dataset: GroupedBatches | None = None,
        eval_dataset: GroupedBatches | None = None,
        **kwargs,
    ):
        taken = {"model": (model, nn.Module), "args": (args, TrainingArguments)}
        taken |= {"train_dataset": (train_dataset, GroupedBatches), "eval_dataset": (eval_dataset, GroupedBatches)}
        for name, (given, kind) in taken.items():
            if given is not None and not isinstance(given, kind):
                raise ValueError(f"{name} takes a {kind.__name__}, not a {type(given).__name__}")
        if data_collator is not None:
            raise ValueError("data_collator: rows of GroupedBatches come as whole batches, which nothing is to collate")
        args = copy.copy(TrainingArguments("trainer_output") if args is None else args)
        args.train_sampling_strategy = "sequential"
        args.remove_unused_columns = False  # it would take a batch for a row; what is not used is left out below
        if train_dataset is not None:
            _as_the_rows(args, train_dataset)
        if (evaluated := eval_dataset or train_dataset) is not None:
            args.per_device_eval_batch_size = evaluated.batch_size
        collate = _WhatItTakes(model)
        super().__init__(model, args, collate, train_dataset, eval_dataset, **kwargs)
        if isinstance(self.model, MixtureOfTokensForCausalLM):
            self.add_callback(BalanceCallback(self.model))

    def train(self, *args, **kwargs):
        if self.model is not None:
            forget_companions(self.model)
        return super().train(*args, **kwargs)


def _as_the_rows(args: TrainingArguments, rows: GroupedBatches) -> None:
    """Set the batch and the number of steps. Raises ValueError where others were asked for, or none can be set."""
    devices = args.world_size * max(1, args.n_gpu)
    parts = args.gradient_accumulation_steps * devices
    if rows.batch_size % (parts * rows.mixed):
        what = f"{devices} devices and {args.gradient_accumulation_steps} micro-batches"
        raise ValueError(f"a batch of {rows.batch_size} rows is not divided into groups of {rows.mixed} by {what}")
    per_device, steps = rows.batch_size // parts, len(rows) // rows.batch_size
    if args.per_device_train_batch_size not in (OF_ROWS["per_device_train_batch_size"], per_device):
        asked = args.per_device_train_batch_size
        raise ValueError(f"per_device_train_batch_size {asked}: for batches of {rows.batch_size} it is {per_device}")
    if args.max_steps > steps:
        raise ValueError(f"max_steps {args.max_steps} is more than the {steps} steps of the rows")
    args.per_device_train_batch_size = per_device
    args.max_steps = steps if args.max_steps == OF_ROWS["max_steps"] else args.max_steps


class _WhatItTakes:
    """Of a whole batch what the model's forward takes; all where that takes any keyword, as transformers' models do."""

    def __init__(self, model: Any):
        forward = {} if model is None else inspect.signature(model.forward).parameters
        kinds = {parameter.kind for parameter in forward.values()}
        self.names = None if model is None or inspect.Parameter.VAR_KEYWORD in kinds else set(forward)

    def __call__(self, batch: Any) -> dict[str, torch.Tensor]:
        return {name: tensor for name, tensor in batch.items() if self.names is None or name in self.names}
