"""Mixture of Tokens (arXiv 2310.15961): a continuous mixture of experts for autoregressive language models.

Each name below is imported at its first use. The layers need torch alone, the models transformers too. The functions
that train, evaluate and compare need the packages of the extra `train`.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0.dev0"

if TYPE_CHECKING:
    from mixture_of_tokens.commands.audit import audit
    from mixture_of_tokens.commands.compare import compare
    from mixture_of_tokens.commands.data_report import data_report
    from mixture_of_tokens.commands.evaluate import evaluate
    from mixture_of_tokens.commands.export import export
    from mixture_of_tokens.commands.generate import generate
    from mixture_of_tokens.commands.plan import plan
    from mixture_of_tokens.commands.prepare import prepare
    from mixture_of_tokens.commands.report import report
    from mixture_of_tokens.commands.sweep import sweep
    from mixture_of_tokens.commands.train import train
    from mixture_of_tokens.commands.transition import transition
    from mixture_of_tokens.commands.upcycle import upcycle
    from mixture_of_tokens.data.groups import GroupedBatches, prepare_tokens
    from mixture_of_tokens.data.own_tokens import count_collisions, split_tokens
    from mixture_of_tokens.data.prepare import prepare_text
    from mixture_of_tokens.evaluation.audit import audit_model
    from mixture_of_tokens.evaluation.losses import score_tokens
    from mixture_of_tokens.layers.experts import Experts, Router
    from mixture_of_tokens.layers.mixture import MixtureOfTokens
    from mixture_of_tokens.layers.soft import SoftMoE
    from mixture_of_tokens.layers.thresholds import ExpertThreshold, ReMoE
    from mixture_of_tokens.layers.token_choice import ExpertChoice, SigmoidChoice, TokenChoice
    from mixture_of_tokens.models.balance_callback import BalanceCallback
    from mixture_of_tokens.models.companions import calibrate_companions
    from mixture_of_tokens.models.config import MixtureOfTokensConfig
    from mixture_of_tokens.models.modeling import MixtureOfTokensForCausalLM, MixtureOfTokensModel
    from mixture_of_tokens.models.names import config_from_name
    from mixture_of_tokens.models.threshold_calibration import calibrate_thresholds
    from mixture_of_tokens.runs.run import Run, read_run
    from mixture_of_tokens.settings.options import Options
    from mixture_of_tokens.training.grouped import GroupedTrainer

# The module of each public name.
_MODULES = {
    "layers.experts": ("Experts", "Router"),
    "layers.mixture": ("MixtureOfTokens",),
    "layers.token_choice": ("ExpertChoice", "SigmoidChoice", "TokenChoice"),
    "layers.thresholds": ("ExpertThreshold", "ReMoE"),
    "layers.soft": ("SoftMoE",),
    "models.config": ("MixtureOfTokensConfig",),
    "models.modeling": ("MixtureOfTokensForCausalLM", "MixtureOfTokensModel"),
    "models.names": ("config_from_name",),
    "models.balance_callback": ("BalanceCallback",),
    "models.threshold_calibration": ("calibrate_thresholds",),
    "models.companions": ("calibrate_companions",),
    "commands.data_report": ("data_report",),
    "data.prepare": ("prepare_text",),
    "data.groups": ("GroupedBatches", "prepare_tokens"),
    "data.own_tokens": ("count_collisions", "split_tokens"),
    "training.grouped": ("GroupedTrainer",),
    "settings.options": ("Options",),
    "commands.plan": ("plan",),
    "commands.prepare": ("prepare",),
    "commands.train": ("train",),
    "commands.sweep": ("sweep",),
    "commands.generate": ("generate",),
    "commands.evaluate": ("evaluate",),
    "evaluation.losses": ("score_tokens",),
    "commands.audit": ("audit",),
    "evaluation.audit": ("audit_model",),
    "commands.transition": ("transition",),
    "commands.export": ("export",),
    "commands.upcycle": ("upcycle",),
    "commands.compare": ("compare",),
    "commands.report": ("report",),
    "runs.run": ("Run", "read_run"),
}
_PLACES = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "BalanceCallback",
    "ExpertChoice",
    "ExpertThreshold",
    "Experts",
    "GroupedBatches",
    "GroupedTrainer",
    "MixtureOfTokens",
    "MixtureOfTokensConfig",
    "MixtureOfTokensForCausalLM",
    "MixtureOfTokensModel",
    "Options",
    "ReMoE",
    "Router",
    "Run",
    "SigmoidChoice",
    "SoftMoE",
    "TokenChoice",
    "audit",
    "audit_model",
    "calibrate_companions",
    "calibrate_thresholds",
    "compare",
    "config_from_name",
    "count_collisions",
    "data_report",
    "evaluate",
    "export",
    "generate",
    "plan",
    "prepare",
    "prepare_text",
    "prepare_tokens",
    "read_run",
    "report",
    "score_tokens",
    "split_tokens",
    "sweep",
    "train",
    "transition",
    "upcycle",
]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(importlib.import_module(f"{__name__}.{_PLACES[name]}"), name)
    except ModuleNotFoundError as error:
        from mixture_of_tokens.utils.process import missing_package

        if (package := missing_package(error)) is None:
            raise
        ask = 'pip install "mixture-of-tokens[train]"'
        raise ModuleNotFoundError(f"{package} is not installed; {name} comes with {ask}", name=error.name) from error


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
