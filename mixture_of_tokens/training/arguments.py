"""Fields of transformers' TrainingArguments as flags: which work here, which are refused and why, and their values."""

import dataclasses
import enum
import multiprocessing
import os
import typing
from collections.abc import Mapping
from types import NoneType
from typing import Any

import torch
from accelerate.utils import DynamoBackend
from transformers import SchedulerType, Trainer, TrainingArguments, get_scheduler
from transformers.integrations.integration_utils import get_available_reporting_integrations
from transformers.training_args import OptimizerNames
from transformers.utils.logging import get_log_levels_dict

from mixture_of_tokens.settings.flags import typed
from mixture_of_tokens.settings.names import nearest
from mixture_of_tokens.utils.checks import LARGEST, check_number
from mixture_of_tokens.utils.formatting import first_line, in_words
from mixture_of_tokens.utils.process import process_count

# Fields of TrainingArguments that have a flag of their own.
TAKEN = {"output_dir": "--out", "use_cpu": "--device", "max_steps": "--steps", "seed": "--seed"}
TAKEN |= {"learning_rate": "--learning-rate", "per_device_train_batch_size": "--batch-size"}
TAKEN |= {"num_train_epochs": "--steps"}
# Those whose value is given here, and is not to be changed.
FIXED = {"remove_unused_columns": False, "label_names": ["shift_labels"], "logging_nan_inf_filter": False}
FIXED |= {"disable_tqdm": True}
# Those that keep the value they have, by the reason: they would do something else here, or nothing.
REFUSED_FOR = {
    "groups need complete batches of rows in a fixed order": "auto_find_batch_size accelerator_config "
    "dataloader_drop_last dataloader_in_order ignore_data_skip train_sampling_strategy length_column_name",
    "--seed sets the order of the text": "data_seed",
    "--resume goes on from the newest valid checkpoint": "resume_from_checkpoint",
    "a run is resumed from all of its state": "save_only_model restore_callback_states_from_checkpoint",
    "a run ends with its last weights": "load_best_model_at_end metric_for_best_model greater_is_better",
    "the loss is the mean cross-entropy of all tokens": "label_smoothing_factor label_names "
    "average_tokens_across_devices",
    "--shard N shards a model over the processes of torchrun": "fsdp fsdp_config deepspeed parallelism_config",
    "one process writes a run directory": "save_on_each_node",
    "torchrun gives each process its number": "local_rank",
    "a signal saves a checkpoint in any case": "enable_jit_checkpoint",
    "nothing is uploaded": "push_to_hub hub_token hub_private_repo hub_model_id hub_strategy hub_always_push "
    "hub_revision",
    "evaluation is in groups, with a loop of its own": "prediction_loss_only eval_do_concat_batches "
    "eval_use_gather_object eval_accumulation_steps include_for_metrics batch_eval_metrics bf16_full_eval "
    "fp16_full_eval",
    "a resumed run would have this evaluation twice": "eval_on_start",
    "metrics.jsonl counts all tokens, and the bar is not transformers'": "include_num_input_tokens_seen disable_tqdm",
    "a loss that is not finite stops the run": "logging_nan_inf_filter debug",
    "no file of a run would have it": "skip_memory_metrics log_on_each_node",
    "these kernels and adapters do not know this model": "use_liger_kernel liger_kernel_config optim_target_modules",
    "training keeps no cache of keys and values": "use_cache",
    "the batches have no other columns": "remove_unused_columns",
    "it has no effect on mot": "do_train do_eval do_predict",
}
REFUSED = {field: reason for reason, fields in REFUSED_FOR.items() for field in fields.split()}
# Refused values of fields that work otherwise.
REFUSED_VALUES = {
    "optim": {
        **dict.fromkeys(("lomo", "adalomo"), "it steps during the backward pass, before gradients are clipped"),
        **dict.fromkeys(
            ("schedule_free_radam", "schedule_free_adamw", "schedule_free_sgd"),
            "its weights for evaluations are not those of training",
        ),
    },
    "lr_scheduler_type": dict.fromkeys(
        ("reduce_lr_on_plateau", "greedy"), "the learning rate is a function of the step alone"
    ),
    "eval_strategy": {"epoch": "all steps are one epoch; --training.eval_steps N evaluates every N steps"},
    "save_strategy": {"best": "a run is resumed from its newest checkpoint"},
    "logging_strategy": dict.fromkeys(
        ("no", "epoch"), "metrics.jsonl has a row every logging_steps; give more of them"
    ),
}
# Whole numbers of steps, or shares of all steps below 1.
STEPS = ("logging_steps", "eval_steps", "save_steps", "warmup_steps")
POSITIVE = ("gradient_accumulation_steps", *STEPS[:3], "adam_epsilon", "save_total_limit", "torch_empty_cache_steps")
POSITIVE += ("dataloader_prefetch_factor", "ddp_timeout", "ddp_bucket_cap_mb")
NOT_NEGATIVE = ("weight_decay", "max_grad_norm", "warmup_steps", "eval_delay", "neftune_noise_alpha")
NOT_NEGATIVE += ("dataloader_num_workers",)
BELOW_ONE = ("adam_beta1", "adam_beta2")
OF_WORKERS = ("dataloader_persistent_workers", "dataloader_prefetch_factor", "dataloader_multiprocessing_context")
OF_CHECKPOINTING = ("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs")
CHECKPOINTING = ("use_reentrant", "preserve_rng_state", "determinism_check", "debug")  # what torch's function takes
COMPILE_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
CHOICES: dict[str, Any] = {
    "log_level": ["passive", *get_log_levels_dict()],
    "log_level_replica": ["passive", *get_log_levels_dict()],
    "dataloader_multiprocessing_context": multiprocessing.get_all_start_methods(),
    "ddp_backend": torch.distributed.Backend.backend_list if torch.distributed.is_available() else [],
    "torch_compile_backend": [backend.value.lower() for backend in DynamoBackend if backend.value != "NO"],
    "torch_compile_mode": COMPILE_MODES,
}
# Variables with which accelerate changes a training that its flags do not tell of; `accelerate launch` sets them to no.
ENVIRONMENT = {
    **dict.fromkeys(("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_MEGATRON_LM"), REFUSED["fsdp"]),
    "ACCELERATE_USE_PARALLELISM_CONFIG": REFUSED["fsdp"],
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "--training.gradient_accumulation_steps N accumulates",
    "ACCELERATE_MIXED_PRECISION": "--training.bf16 true sets the precision",
    "ACCELERATE_DYNAMO_BACKEND": "--training.torch_compile true compiles",
}


def given_fields(given: Mapping[str, str]) -> dict[str, Any]:
    """The fields that are given, with typed values. Raises ValueError, naming the flag, for what is not legal."""
    hints = typing.get_type_hints(TrainingArguments)
    known = {field.name for field in dataclasses.fields(TrainingArguments) if field.init}
    values: dict[str, Any] = {}
    for field, text in given.items():
        if field not in known:
            raise ValueError(f"--training.{field} is no field of TrainingArguments{nearest(field, known)}")
        if field in TAKEN:
            raise ValueError(f"--training.{field} has a flag of its own: {TAKEN[field]}")
        value = typed(f"--training.{field}", text, hints[field])
        if field not in REFUSED:
            _check_field(field, value, hints[field])
            values[field] = float(value) if field in BELOW_ONE else value  # torch takes no 0 for 0.0
        elif value != unchanged(field):
            raise ValueError(f"--training.{field}: {REFUSED[field]}")
    checkpointing = values.get("activation_checkpointing") or values.get("gradient_checkpointing")
    for field in OF_CHECKPOINTING:
        unknown = set(values.get(field) or ()) - set(CHECKPOINTING)
        if unknown:
            raise ValueError(f"--training.{field} {unknown.pop()!r} is unknown; legal are {', '.join(CHECKPOINTING)}")
        if (values.get(field) or {}).get("use_reentrant"):
            why = "losses that balance a routing would have no gradient"
            raise ValueError(f"--training.{field} with use_reentrant true: {why}; false, the default, works")
        if values.get(field) and not checkpointing:
            raise ValueError(f"--training.{field}: it is for --training.activation_checkpointing true")
    for field in OF_WORKERS:
        if values.get(field) and not values.get("dataloader_num_workers"):
            raise ValueError(f"--training.{field}: it is for --training.dataloader_num_workers above 0")
    if values.get("ddp_backend") and process_count() == 1:
        raise ValueError("--training.ddp_backend: it is for several processes, as torchrun starts them")
    return values


def unchanged(field: str) -> Any:
    """The value of a field of TrainingArguments that is not given."""
    if field in FIXED:
        return FIXED[field]
    default = TrainingArguments.__dataclass_fields__[field]
    if default.default_factory is not dataclasses.MISSING:
        return default.default_factory()
    return default.default.value if isinstance(default.default, enum.Enum) else default.default


def _check_field(field: str, value: Any, hint: Any) -> None:
    """Raises ValueError, naming the flag, for a value that this field cannot have."""
    flag = f"--training.{field}"
    check_number(flag, value)
    reason = REFUSED_VALUES.get(field, {}).get(value) if isinstance(value, str) else None
    if reason is not None:
        raise ValueError(f"{flag} {value}: {reason}")
    if isinstance(value, int | float) and not isinstance(value, bool):
        if field in POSITIVE and value <= 0:
            raise ValueError(f"{flag} must be positive, not {value}")
        if field in NOT_NEGATIVE and value < 0:
            raise ValueError(f"{flag} must be 0 or more, not {value}")
        if field in BELOW_ONE and not 0 <= value < 1:
            raise ValueError(f"{flag} must be at least 0 and below 1, not {value}")
        if field in (*STEPS, "eval_delay") and value > LARGEST:
            raise ValueError(f"{flag} is more than {LARGEST}")
        if field in STEPS and value > 1 and value != int(value):
            raise ValueError(f"{flag} must be a whole number of steps, or a share of them below 1, not {value}")
    kinds = typing.get_args(hint) or (hint,)
    choices = CHOICES.get(field)
    for kind in kinds:
        if isinstance(kind, type) and issubclass(kind, enum.Enum):
            choices = [each.value for each in kind if each.value not in REFUSED_VALUES.get(field, {})]
    if choices is not None and value not in choices and not (value is None and NoneType in kinds):
        raise ValueError(f"{flag} {value!r} is unknown; legal are {', '.join(choices)}")
    if any(typing.get_origin(kind) is dict or kind is dict for kind in kinds) and not isinstance(value, dict | None):
        raise ValueError(f"{flag} takes names and values, as in '{{name: 0.1}}', not {value!r}")
    if field == "report_to":
        installed, reporters = get_available_reporting_integrations(), value if isinstance(value, list) else [value]
        if len(reporters) > 1 and not {"all", "none"}.isdisjoint(reporters):
            raise ValueError(f"{flag} {', '.join(map(str, reporters))}: all and none stand alone")
        for reporter in reporters:
            if reporter not in ("all", "none", *installed):
                raise ValueError(f"{flag} {reporter}: it is not installed; there is {', '.join(installed)}")


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
