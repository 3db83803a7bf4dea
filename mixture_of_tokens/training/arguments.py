"""TrainingArguments that this machine takes, tried before a run starts; `settings/training.py` has their fields."""

import os
from collections.abc import Mapping
from typing import Any

import torch
from accelerate.utils import DynamoBackend
from transformers import SchedulerType, Trainer, TrainingArguments, get_scheduler
from transformers.integrations.integration_utils import get_available_reporting_integrations
from transformers.training_args import OptimizerNames

from mixture_of_tokens.utils.checks import check_choice, listed
from mixture_of_tokens.utils.formatting import first_line, in_words
from mixture_of_tokens.utils.process import process_count

SHARDED = "--shard N shards a model over the processes of torchrun"
# Variables with which accelerate changes a training that its flags do not tell of; `accelerate launch` sets them to no.
ENVIRONMENT = {
    **{f"ACCELERATE_USE_{each}": SHARDED for each in ("FSDP", "DEEPSPEED", "MEGATRON_LM", "PARALLELISM_CONFIG")},
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "--training.gradient_accumulation_steps N accumulates",
    "ACCELERATE_MIXED_PRECISION": "--training.bf16 true sets the precision",
    "ACCELERATE_DYNAMO_BACKEND": "--training.torch_compile true compiles",
}


def check_here(given: Mapping[str, Any]) -> None:
    """Raises ValueError for fields of TrainingArguments that this machine or this process cannot have."""
    if (backend := given.get("ddp_backend")) is not None:
        if process_count() == 1:
            raise ValueError("--training.ddp_backend: it is for several processes, as torchrun starts them")
        check_choice("--training.ddp_backend", backend, torch.distributed.Backend.backend_list)
    if (backend := given.get("torch_compile_backend")) is not None:
        check_choice("--training.torch_compile_backend", backend, [each.value.lower() for each in DynamoBackend][1:])
    reporters, installed = listed(given.get("report_to", "none")), get_available_reporting_integrations()
    if len(reporters) > 1 and not {"all", "none"}.isdisjoint(reporters):
        raise ValueError(f"--training.report_to {', '.join(reporters)}: all and none stand alone")
    for reporter in reporters:
        if reporter not in ("all", "none", *installed):
            raise ValueError(f"--training.report_to {reporter}: it is not installed; there is {', '.join(installed)}")


def check_environment() -> None:
    """Raises ValueError where accelerate would train in another way than the flags say."""
    for name, reason in ENVIRONMENT.items():
        value = os.environ.get(name, "")
        if value.lower() not in ("", "0", "1", "no", "false") or (value == "1" and "USE" in name):
            raise ValueError(f"{name}={value} in the environment: {reason}; unset it")


def try_out(arguments: TrainingArguments) -> None:
    """Make the optimizer and its schedule for one weight. Raises ValueError for arguments that they do not take."""
    flag = "--training.optim_args" if arguments.optim_args is not None else "--training.optim"
    if arguments.optim_args is not None and arguments.optim in ("adamw_torch", "adamw_torch_fused", "adafactor"):
        raise ValueError(f"{flag}: {OptimizerNames(arguments.optim).value} takes none")
    steps, kind = arguments.max_steps, SchedulerType(arguments.lr_scheduler_type)
    if kind == SchedulerType.CONSTANT and arguments.warmup_steps:
        raise ValueError("--training.warmup_steps: constant has no warm-up; constant_with_warmup has one")
    if kind in (SchedulerType.CONSTANT, SchedulerType.CONSTANT_WITH_WARMUP) and arguments.lr_scheduler_kwargs:
        raise ValueError(f"--training.lr_scheduler_kwargs: {kind.value} takes none")
    if (warm_up := arguments.get_warmup_steps(steps)) > steps:
        raise ValueError(f"--training.warmup_steps {warm_up} is more than the {steps} steps of the training")
    try:
        kind, settings = Trainer.get_optimizer_cls_and_kwargs(arguments)
        optimizer = kind([torch.zeros(1, requires_grad=True)], **settings)
        flag = "--training.lr_scheduler_kwargs"
        schedule: Any = get_scheduler(
            arguments.lr_scheduler_type,
            optimizer,
            num_warmup_steps=warm_up,
            num_training_steps=steps,
            scheduler_specific_kwargs=arguments.lr_scheduler_kwargs,  # pyright: ignore[reportArgumentType]
        )
        rates = {step: [of(step) for of in schedule.lr_lambdas] for step in (0, steps // 2, steps - 1)}
    except Exception as error:
        raise ValueError(f"{flag}: {in_words(error)}") from error
    for step, found in rates.items():
        for rate in found:
            if not (isinstance(rate, int | float) and 0 <= rate <= 1 + 1e-9):
                raise ValueError(f"{flag}: at step {step} the learning rate would be {rate} of its peak")
    backend = arguments.torch_compile_backend
    if arguments.torch_compile and backend not in (None, "inductor"):
        try:
            torch.compile(torch.neg, backend=backend)(torch.zeros(1))
        except Exception as error:
            raise ValueError(f"--training.torch_compile_backend {backend}: {first_line(error)}") from error
