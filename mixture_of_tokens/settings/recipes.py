"""How each size is trained unless options say otherwise: peak rate, steps, and fields of TrainingArguments."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Recipe:
    """How a size is trained: Mini to Base by the authors' settings (their configuration files), the others by ours."""

    learning_rate: float
    steps: int
    warmup_steps: int
    eval_every: int
    save_every: int


RECIPES = {
    "Nano": Recipe(2e-2, 1500, 100, 100, 500),
    "Micro": Recipe(8e-3, 6000, 200, 200, 500),
    "Mini": Recipe(4e-3, 150_000, 2500, 1000, 1000),
    "Medium": Recipe(7e-4, 150_000, 2500, 1000, 1000),
    "Base": Recipe(4e-4, 150_000, 2500, 1000, 1000),
}
FROM_ELSEWHERE = Recipe(2e-4, 10_000, 500, 500, 500)  # of a model without a size's name
# Systems with another peak rate than their size's: of Nano and Micro by sweeps (experiments/LOG.md), else the authors'.
LEARNING_RATES = {("Nano", system): 1e-2 for system in ("TC", "STC", "ET")} | {("Micro", "ET"): 4e-3}
LEARNING_RATES |= {("Mini", system): 2e-3 for system in ("MoT", "Uniform")}
LEARNING_RATES |= {("Base", system): 2e-4 for system in ("MoT", "Uniform")}
# Of the peak rate of drawn weights, by `Start.kind`: of the model itself, and of the dense model that was copied.
OF_A_START = {"continued": 0.2, "copies": 0.5}
# Fields of TrainingArguments; those of the rate, of evaluations and of checkpoints follow from the number of steps.
TRAINING: dict[str, Any] = {
    "lr_scheduler_type": "cosine_with_min_lr",
    "optim": "adamw_torch_fused",
    "adam_beta2": 0.999,
    "weight_decay": 0.1,
    "max_grad_norm": 0.5,
    "eval_strategy": "steps",
    "save_strategy": "steps",
    "save_total_limit": 2,
    "report_to": "tensorboard",
    "ddp_find_unused_parameters": False,
    "ddp_timeout": 600,
}
