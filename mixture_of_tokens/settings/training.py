"""How a run is trained: the fields of transformers' `TrainingArguments` that can be given."""

from typing import Annotated, Any, Literal, TypedDict, get_type_hints

from pydantic import AfterValidator, Field

from mixture_of_tokens.settings.fields import given_fields
from mixture_of_tokens.utils.checks import LARGEST

# Fields of TrainingArguments that have a flag of their own.
ELSEWHERE = {"output_dir": "--out", "use_cpu": "--device", "max_steps": "--steps", "seed": "--seed"}
ELSEWHERE |= {"learning_rate": "--learning-rate", "per_device_train_batch_size": "--batch-size"}
ELSEWHERE |= {"num_train_epochs": "--steps", "data_seed": "--seed", "resume_from_checkpoint": "--resume"}
ELSEWHERE |= dict.fromkeys(("fsdp", "fsdp_config", "deepspeed", "parallelism_config"), "--shard")
# Those whose value is given here. A run's config.yaml has them; no other value is legal.
FIXED = {"remove_unused_columns": False, "label_names": ["shift_labels"], "logging_nan_inf_filter": False}
FIXED |= {"disable_tqdm": True}
CHECKPOINTING = ("use_reentrant", "preserve_rng_state", "determinism_check", "debug")  # what torch's function takes


def _steps(value: int | float) -> int | float:
    # The message's {value} is filled in by `fields`, with what was given.
    if value > LARGEST:
        raise ValueError(f"is more than {LARGEST}")
    if value > 1 and value != int(value):
        raise ValueError("must be a whole number of steps, or a share of them below 1, not {value}")
    return value


def _known(value: dict[str, Any] | None) -> dict[str, Any] | None:
    for name in value or ():
        if name not in CHECKPOINTING:
            raise ValueError(f"{name!r} is unknown; legal are {', '.join(CHECKPOINTING)}")
    if (value or {}).get("use_reentrant"):
        why = "losses that balance a routing would have no gradient"
        raise ValueError(f"with use_reentrant true: {why}; false, the default, works")
    return value


Steps = Annotated[int | float, Field(gt=0), AfterValidator(_steps)]  # whole steps, or a share of all below 1
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
BelowOne = Annotated[float, Field(ge=0, lt=1)]
AtLeastOne = Annotated[int, Field(gt=0)]
Kwargs = dict[str, Any] | None
Checkpointing = Annotated[Kwargs, AfterValidator(_known)]
Optimizer = Literal[
    "adamw_torch",
    "adamw_torch_fused",
    "adafactor",
    "sgd",
    "adagrad",
    "rmsprop",
    "adamw_anyprecision",
    "ademamix",
    "adamw_torch_4bit",
    "adamw_torch_8bit",
    "adamw_8bit",
    "adamw_bnb_8bit",
    "ademamix_8bit",
    "lion_32bit",
    "lion_8bit",
    "rmsprop_bnb",
    "rmsprop_bnb_8bit",
    "rmsprop_bnb_32bit",
    "paged_adamw_32bit",
    "paged_adamw_8bit",
    "paged_lion_32bit",
    "paged_lion_8bit",
    "paged_ademamix_32bit",
    "paged_ademamix_8bit",
    "grokadamw",
    "stable_adamw",
]
Schedule = Literal[
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
    "cosine_with_min_lr",
    "cosine_warmup_with_min_lr",
    "warmup_stable_decay",
]
LogLevel = Literal["passive", "detail", "debug", "info", "warning", "error", "critical"]


class TrainingSettings(TypedDict, total=False):
    """Fields with flags of their own, such as the steps and the rate, are `Options`."""

    # The optimizer and its rate. Not those that step during the backward pass, before gradients are clipped, or whose
    # weights for evaluation are not those of training; and rates are functions of the step alone.
    optim: Optimizer
    optim_args: str | None
    weight_decay: NotNegative
    adam_beta1: BelowOne
    adam_beta2: BelowOne
    adam_epsilon: Positive
    max_grad_norm: NotNegative
    lr_scheduler_type: Schedule
    lr_scheduler_kwargs: Kwargs
    warmup_steps: Annotated[int | float, Field(ge=0), AfterValidator(_steps)]
    neftune_noise_alpha: NotNegative | None
    # Precision, memory and speed
    bf16: bool
    fp16: bool
    tf32: bool | None
    gradient_accumulation_steps: AtLeastOne
    per_device_eval_batch_size: int
    gradient_checkpointing: bool
    gradient_checkpointing_kwargs: Checkpointing
    activation_checkpointing: bool
    activation_checkpointing_kwargs: Checkpointing
    torch_compile: bool
    torch_compile_backend: str | None
    torch_compile_mode: Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"] | None
    torch_empty_cache_steps: AtLeastOne | None
    full_determinism: bool
    # Logs, evaluations and checkpoints
    logging_steps: Steps
    logging_first_step: bool
    logging_strategy: Literal["steps"]
    eval_steps: Steps
    eval_strategy: Literal["no", "steps"]
    eval_delay: Annotated[NotNegative, AfterValidator(_steps)]
    save_steps: Steps
    save_strategy: Literal["no", "steps", "epoch"]
    save_total_limit: AtLeastOne | None
    report_to: str | list[str]
    run_name: str | None
    project: str
    trackio_space_id: str | None
    trackio_bucket_id: str | None
    trackio_static_space_id: str | None
    log_level: LogLevel
    log_level_replica: LogLevel
    # Batches
    dataloader_num_workers: Annotated[int, Field(ge=0)]
    dataloader_persistent_workers: bool
    dataloader_prefetch_factor: AtLeastOne | None
    dataloader_pin_memory: bool
    dataloader_multiprocessing_context: Literal["fork", "spawn", "forkserver"] | None
    # Several processes
    ddp_backend: str | None
    ddp_timeout: AtLeastOne
    ddp_bucket_cap_mb: AtLeastOne | None
    ddp_find_unused_parameters: bool | None
    ddp_broadcast_buffers: bool | None
    ddp_static_graph: bool | None


DECLARED = get_type_hints(TrainingSettings, include_extras=True)


def training_fields(given: dict[str, Any]) -> dict[str, Any]:
    """The given fields, checked. Raises ValueError, naming the flag, for what is not legal."""
    free = {}
    for field, value in given.items():
        if field in ELSEWHERE:
            raise ValueError(f"--training.{field} has a flag of its own: {ELSEWHERE[field]}")
        if field not in FIXED:
            free[field] = value
        elif value not in (FIXED[field], str(FIXED[field]).lower(), '["shift_labels"]'):
            raise ValueError(f"--training.{field} is {FIXED[field]} in every run, and is not to be set")
    values = given_fields("training", DECLARED, free)
    checkpointing = values.get("activation_checkpointing") or values.get("gradient_checkpointing")
    for field in ("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs"):
        if values.get(field) and not checkpointing:
            raise ValueError(f"--training.{field}: it is for --training.activation_checkpointing true")
    for field in ("persistent_workers", "prefetch_factor", "multiprocessing_context"):
        if values.get(f"dataloader_{field}") and not values.get("dataloader_num_workers"):
            raise ValueError(f"--training.dataloader_{field}: it is for --training.dataloader_num_workers above 0")
    return values
