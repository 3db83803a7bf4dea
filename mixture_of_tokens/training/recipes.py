"""How a run is configured: the recipe of its size, overridden by options, and checked."""

import dataclasses
import enum
import math
import multiprocessing
import os
import typing
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import NoneType
from typing import Any, NamedTuple

import torch
from accelerate.utils import DynamoBackend
from transformers import Trainer, TrainingArguments, get_scheduler
from transformers.integrations.integration_utils import get_available_reporting_integrations
from transformers.training_args import OptimizerNames
from transformers.utils.logging import get_log_levels_dict

from mixture_of_tokens.model.config import MixtureOfTokensConfig
from mixture_of_tokens.model.modeling import MixtureOfTokensForCausalLM
from mixture_of_tokens.model.names import FIELDS, SIZES, config_from_name, nearest, parse_name
from mixture_of_tokens.runs.records import DERIVED, RunConfig, Transition
from mixture_of_tokens.runs.run import check_seed
from mixture_of_tokens.training.options import Options, typed

# Fields of TrainingArguments that have a flag of their own.
TAKEN = {"output_dir": "--out", "use_cpu": "--device", "max_steps": "--steps", "seed": "--seed"}
TAKEN |= {"learning_rate": "--learning-rate", "per_device_train_batch_size": "--batch-size"}
# Those whose value is given here, and is not to be changed.
FIXED = {"remove_unused_columns": False, "label_names": ["shift_labels"], "logging_nan_inf_filter": False}
FIXED |= {"disable_tqdm": True}
# Those that keep the value they have, by the reason: they would do something else here, or nothing.
REFUSED_FOR = {
    "groups need complete batches of rows in a fixed order": "auto_find_batch_size accelerator_config "
    "dataloader_drop_last dataloader_in_order ignore_data_skip train_sampling_strategy length_column_name",
    "--seed sets the order of the text": "data_seed",
    "--steps sets the length of a run": "num_train_epochs",
    "--resume goes on from the newest valid checkpoint": "resume_from_checkpoint",
    "a run is resumed from all of its state": "save_only_model restore_callback_states_from_checkpoint",
    "a run ends with its last weights": "load_best_model_at_end metric_for_best_model greater_is_better",
    "the loss is the mean cross-entropy of all tokens": "label_smoothing_factor label_names "
    "average_tokens_across_devices",
    "a run's model is written by one process, which would have a shard of it": "fsdp fsdp_config deepspeed "
    "parallelism_config",
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
    "save_strategy": {"best": "a run is resumed from its newest checkpoint"},
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
# All others work. A field of a newer transformers is in none of these tables, and tests/test_flags.py finds it.
WORKS = {*STEPS, *POSITIVE, *NOT_NEGATIVE, *BELOW_ONE, *OF_WORKERS, *CHOICES, *REFUSED_VALUES}
WORKS |= {
    *("lr_scheduler_kwargs", "optim_args", "bf16", "fp16", "tf32", "activation_checkpointing", "torch_compile"),
    *("gradient_checkpointing", *OF_CHECKPOINTING),
    *("logging_strategy", "logging_first_step", "eval_strategy", "per_device_eval_batch_size", "report_to", "run_name"),
    *("project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id", "full_determinism"),
    *("dataloader_pin_memory", "ddp_find_unused_parameters", "ddp_broadcast_buffers", "ddp_static_graph"),
}
# Variables with which accelerate changes a training that its flags do not tell of; `accelerate launch` sets them to no.
ENVIRONMENT = {
    **dict.fromkeys(("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_MEGATRON_LM"), REFUSED["fsdp"]),
    "ACCELERATE_USE_PARALLELISM_CONFIG": REFUSED["fsdp"],
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "--training.gradient_accumulation_steps N accumulates",
    "ACCELERATE_MIXED_PRECISION": "--training.bf16 true sets the precision",
    "ACCELERATE_DYNAMO_BACKEND": "--training.torch_compile true compiles",
}
LARGEST = 2**31 - 1  # of whole numbers: steps times rows are counted in 64 bits


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a size is trained. Mini to Base are the authors' settings (their configuration files); Nano's are ours."""

    learning_rate: float
    steps: int
    warmup_steps: int
    eval_every: int
    save_every: int


RECIPES = {
    "Nano": Recipe(2e-2, 1500, 100, 100, 500),
    "Mini": Recipe(4e-3, 150_000, 2500, 1000, 1000),
    "Medium": Recipe(7e-4, 150_000, 2500, 1000, 1000),
    "Base": Recipe(4e-4, 150_000, 2500, 1000, 1000),
}
# Systems with another peak rate than their size's: Nano's by sweeps (experiments/LOG.md), the others' are the authors'.
LEARNING_RATES = {("Nano", "TC"): 1e-2}
LEARNING_RATES |= {("Mini", system): 2e-3 for system in ("MoT", "Uniform")}
LEARNING_RATES |= {("Base", system): 2e-4 for system in ("MoT", "Uniform")}


class Merged(NamedTuple):
    """A run's configuration, and keywords of TrainingArguments."""

    config: RunConfig
    arguments: dict[str, Any]


def merge(
    name: str,
    seed: int,
    learning_rate: float | None,
    options: Options,
    *,
    first_step: int = 0,
    transition: Transition | None = None,
) -> Merged:
    """A name's recipe, overridden by the options and checked.

    Args:
        first_step, transition: of a run that continues another.

    Raises ValueError for invalid settings.
    """
    _check_environment()
    parsed = parse_name(name)
    size = parsed.size
    hints = typing.get_type_hints(MixtureOfTokensConfig, localns={"torch": torch}) | {"head_dim": int | None}
    overrides = {}
    for field, text in options.model.items():
        value = typed(f"--model.{field}", text, hints.get(field))
        _check_number(f"--model.{field}", value)
        overrides[field] = float(value) if hints.get(field) is float else value  # upstream takes no 1 for 1.0
    with _names_the_flag(name, overrides):
        config = config_from_name(name, **overrides)
    _check_model(config)
    if config.learnable_temperature and options.anneal_temperature_to is not None:
        raise ValueError("--anneal-temperature-to would set the temperature that --model.learnable_temperature learns")
    recipe = RECIPES[size]
    steps = recipe.steps if options.steps is None else options.steps
    batch_size = SIZES[size].batch if options.batch_size is None else options.batch_size
    if learning_rate is None:
        learning_rate = LEARNING_RATES.get((size, parsed.system), recipe.learning_rate)
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no CUDA device here; leave the flag out, or give cpu")
    positive = {"steps": steps, "batch-size": batch_size, "learning-rate": learning_rate}
    positive |= {"anneal-temperature-to": options.anneal_temperature_to, "max-bytes": options.max_bytes}
    _check(positive, seed=seed, batch_size=batch_size, group_size=config.group_size)
    written = config.to_diff_dict() | {"num_experts": config.num_experts}  # upstream writes it under another name
    written = {field: value for field, value in written.items() if field in FIELDS and field not in DERIVED}
    # Null is a value here: with capacity null nothing is dropped. A null vocabulary is the default.
    nothing = {field for field, value in overrides.items() if value is None} - {"vocab_size"}
    if options.tokenizer is not None and "vocab_size" not in overrides:
        written["vocab_size"] = None  # the tokenizer's
    micro_batch, training = _training_fields(options.training, recipe, steps, batch_size, config.group_size)
    run = RunConfig(
        name=name,
        seed=seed,
        steps=steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        anneal_temperature_to=options.anneal_temperature_to,
        data=options.data,
        field=options.field,
        max_bytes=options.max_bytes,
        tokenizer=options.tokenizer,
        evaluate_on=options.evaluate_on or "validation",
        training=training,
        model={field: value for field, value in written.items() if value is not None or field in nothing},
        micro_batch=micro_batch,
        first_step=first_step,
        transition=transition,
    )
    with _names_the_flag(name, overrides), torch.device("meta"):  # invalid fields are reported before the run starts
        MixtureOfTokensForCausalLM(config)
    on_cpu = options.device == "cpu" or not torch.cuda.is_available()  # Apple's GPUs have no float64, which this needs
    taken = {"max_steps": steps, "seed": seed, "learning_rate": learning_rate, "use_cpu": on_cpu}
    taken |= {"per_device_train_batch_size": micro_batch}
    try:  # also before it starts
        arguments = TrainingArguments(output_dir=os.devnull, **taken, **training)
    except Exception as error:
        raise ValueError(f"--training: {_what(error)}") from error
    if arguments.fp16 and on_cpu:
        raise ValueError("--training.fp16 needs a GPU; --training.bf16 does not")
    _try(arguments)
    return Merged(run, taken | training)


def _training_given(given: Mapping[str, str]) -> dict[str, Any]:
    """The fields that are given, each for itself a legal value."""
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
        if values.get(field) and not checkpointing:
            raise ValueError(f"--training.{field}: it is for --training.gradient_checkpointing true")
    for field in OF_WORKERS:
        if values.get(field) and not values.get("dataloader_num_workers"):
            raise ValueError(f"--training.{field}: it is for --training.dataloader_num_workers above 0")
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
    _check_number(flag, value)
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
        installed = get_available_reporting_integrations()
        for reporter in value if isinstance(value, list) else [value]:
            if reporter not in ("all", "none", *installed):
                raise ValueError(f"{flag} {reporter}: it is not installed; there is {', '.join(installed)}")


def _check_number(flag: str, value: Any) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{flag} takes a finite number, not {value}")
    if isinstance(value, int) and abs(value) > LARGEST:
        raise ValueError(f"{flag} is more than {LARGEST}" if value > 0 else f"{flag} is less than -{LARGEST}")


def _check_model(config: MixtureOfTokensConfig) -> None:
    """Raises ValueError for numbers with which a model computes NaN, or trains for something else."""
    theta = (config.rope_parameters or {}).get("rope_theta", 1.0)
    for field, value in {"rms_norm_eps": config.rms_norm_eps, "rope_parameters: its rope_theta": theta}.items():
        if not (isinstance(value, int | float) and 0 < value < math.inf):
            raise ValueError(f"--model.{field} must be positive and finite, not {value}")
    if not isinstance(config.dtype, torch.dtype | None):
        raise ValueError(f"--model.dtype {config.dtype!r} is no type of torch")
    if config.capacity_factor is not None and config.capacity_factor <= 0:
        raise ValueError(f"--model.capacity_factor must be positive, not {config.capacity_factor}")
    if config.router_aux_loss_coef < 0:
        raise ValueError(f"--model.router_aux_loss_coef must be 0 or more, not {config.router_aux_loss_coef}")


def _check_environment() -> None:
    for name, reason in ENVIRONMENT.items():
        value = os.environ.get(name, "")
        if value.lower() not in ("", "0", "1", "no", "false") or (value == "1" and "USE" in name):
            raise ValueError(f"{name}={value} in the environment: {reason}; unset it")


def _try(arguments: TrainingArguments) -> None:
    """Make the optimizer and its schedule for one weight. Raises ValueError for arguments that they do not take."""
    flag = "--training.optim_args" if arguments.optim_args is not None else "--training.optim"
    if arguments.optim_args is not None and arguments.optim in ("adamw_torch", "adamw_torch_fused", "adafactor"):
        raise ValueError(f"{flag}: {OptimizerNames(arguments.optim).value} takes none")
    steps = arguments.max_steps
    try:
        kind, settings = Trainer.get_optimizer_cls_and_kwargs(arguments)
        optimizer = kind([torch.zeros(1, requires_grad=True)], **settings)
        flag = "--training.lr_scheduler_kwargs"
        schedule: Any = get_scheduler(
            arguments.lr_scheduler_type,
            optimizer,
            num_warmup_steps=arguments.get_warmup_steps(steps),
            num_training_steps=steps,
            scheduler_specific_kwargs=arguments.lr_scheduler_kwargs,  # pyright: ignore[reportArgumentType]
        )
        rates = {step: [of(step) for of in schedule.lr_lambdas] for step in (0, steps // 2, steps - 1)}
    except Exception as error:
        raise ValueError(f"{flag}: {_what(error)}") from error
    for step, found in rates.items():
        for rate in found:
            if not (isinstance(rate, int | float) and 0 <= rate < math.inf):
                raise ValueError(f"{flag}: at step {step} the learning rate would be {rate} of its peak")


def _what(error: Exception) -> str:
    return str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"


@contextmanager
def _names_the_flag(name: str, overrides: Mapping[str, Any]) -> Iterator[None]:
    """Raise as ValueError, with the flag, what a library raises for one of these fields of the model."""
    flag = f"--model.{next(iter(overrides))}" if len(overrides) == 1 else "--model"
    try:
        yield
    except Exception as error:
        what = _what(error)
        if what.partition(" ")[0] in overrides:
            raise ValueError(f"--model.{what}") from error
        if isinstance(error, ValueError) and (not overrides or name in what):
            raise
        raise ValueError(f"{flag}: {what}") from error


def _check(positive: dict[str, float | None], *, seed: int, batch_size: int, group_size: int) -> None:
    check_seed(seed)
    for what, value in positive.items():
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"--{what} must be positive, not {value}")
        if what != "max-bytes":
            _check_number(f"--{what}", value)
    if batch_size % group_size:
        low = batch_size // group_size * group_size
        legal = " or ".join(str(n) for n in (low, low + group_size) if n)
        raise ValueError(f"--batch-size {batch_size} is no multiple of the group size {group_size}; {legal} would be")


def _training_fields(
    flags: Mapping[str, str], recipe: Recipe, steps: int, batch_size: int, group_size: int
) -> tuple[int, dict[str, Any]]:
    """Rows of a micro-batch, and fields of TrainingArguments: our defaults, overridden by the user's."""
    given = _training_given(flags)
    rows = given.get("per_device_eval_batch_size", group_size)
    if rows < 1 or rows % group_size:
        raise ValueError(
            f"--training.per_device_eval_batch_size {rows} must be a multiple of the group size, {group_size}"
        )
    kind = given.get("lr_scheduler_type", "cosine_with_min_lr")
    parts = given.get("gradient_accumulation_steps", 1) * int(os.environ.get("WORLD_SIZE", "1"))
    micro_batch, rest = divmod(batch_size, parts)
    if rest or micro_batch % group_size or not micro_batch:
        raise ValueError(
            f"a batch of {batch_size} rows does not split into {parts} parts (processes x accumulation) that are "
            f"multiples of the group size {group_size}; give a multiple of {group_size * parts} as --batch-size"
        )
    return micro_batch, {
        "per_device_eval_batch_size": micro_batch,
        "lr_scheduler_type": "cosine_with_min_lr",
        "lr_scheduler_kwargs": {"min_lr_rate": 0.1} if "min_lr" in kind or "constant" in kind else None,
        "warmup_steps": min(recipe.warmup_steps, steps // 10),
        "optim": "adamw_torch_fused",
        "adam_beta2": 0.999,
        "weight_decay": 0.1,
        "max_grad_norm": 0.5,
        "logging_steps": max(1, min(20, steps // 20)),
        "eval_strategy": "steps",
        "eval_steps": max(1, min(recipe.eval_every, steps // 10)),
        "save_strategy": "steps",
        "save_steps": recipe.save_every,
        "save_total_limit": 2,
        "report_to": "tensorboard",
        **FIXED,
        "dataloader_pin_memory": False,
        "ddp_find_unused_parameters": False,
        **given,
    }
