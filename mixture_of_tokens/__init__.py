"""Mixture of Tokens (arXiv 2310.15961): a continuous mixture of experts for autoregressive language models.

Each name below is imported at its first use. The layers need torch alone, the models transformers too. The functions
that train, evaluate and compare need the packages of the extra `train`.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0.dev0"

if TYPE_CHECKING:
    from mixture_of_tokens.convert.export import export
    from mixture_of_tokens.convert.transition import transition
    from mixture_of_tokens.convert.upcycle import upcycle
    from mixture_of_tokens.data.groups import GroupedBatches, prepare_tokens
    from mixture_of_tokens.data.own import count_collisions, split_tokens
    from mixture_of_tokens.data.prepare import prepare_text
    from mixture_of_tokens.data.report import data_report
    from mixture_of_tokens.experts import Experts, Router
    from mixture_of_tokens.inference.audit import audit, audit_model
    from mixture_of_tokens.inference.evaluate import evaluate
    from mixture_of_tokens.inference.generate import generate
    from mixture_of_tokens.inference.losses import score_tokens
    from mixture_of_tokens.layers import MixtureOfTokens
    from mixture_of_tokens.model.balance import BalanceCallback
    from mixture_of_tokens.model.calibration import calibrate_thresholds
    from mixture_of_tokens.model.companions import calibrate_companions
    from mixture_of_tokens.model.config import MixtureOfTokensConfig
    from mixture_of_tokens.model.modeling import MixtureOfTokensForCausalLM, MixtureOfTokensModel
    from mixture_of_tokens.model.names import config_from_name
    from mixture_of_tokens.reports.compare import compare
    from mixture_of_tokens.reports.report import report
    from mixture_of_tokens.runs.run import Run, read_run
    from mixture_of_tokens.soft import SoftMoE
    from mixture_of_tokens.sparse import ExpertChoice, SigmoidChoice, TokenChoice
    from mixture_of_tokens.thresholds import ExpertThreshold, ReMoE
    from mixture_of_tokens.training.grouped import GroupedTrainer
    from mixture_of_tokens.training.options import Options
    from mixture_of_tokens.training.plan import plan
    from mixture_of_tokens.training.prepare import prepare
    from mixture_of_tokens.training.sweep import sweep
    from mixture_of_tokens.training.train import train

# The module of each public name.
_MODULES = {
    "experts": ("Experts", "Router"),
    "layers": ("MixtureOfTokens",),
    "sparse": ("ExpertChoice", "SigmoidChoice", "TokenChoice"),
    "thresholds": ("ExpertThreshold", "ReMoE"),
    "soft": ("SoftMoE",),
    "model.config": ("MixtureOfTokensConfig",),
    "model.modeling": ("MixtureOfTokensForCausalLM", "MixtureOfTokensModel"),
    "model.names": ("config_from_name",),
    "model.balance": ("BalanceCallback",),
    "model.calibration": ("calibrate_thresholds",),
    "model.companions": ("calibrate_companions",),
    "data.report": ("data_report",),
    "data.prepare": ("prepare_text",),
    "data.groups": ("GroupedBatches", "prepare_tokens"),
    "data.own": ("count_collisions", "split_tokens"),
    "training.grouped": ("GroupedTrainer",),
    "training.options": ("Options",),
    "training.plan": ("plan",),
    "training.prepare": ("prepare",),
    "training.train": ("train",),
    "training.sweep": ("sweep",),
    "inference.generate": ("generate",),
    "inference.evaluate": ("evaluate",),
    "inference.losses": ("score_tokens",),
    "inference.audit": ("audit", "audit_model"),
    "convert.transition": ("transition",),
    "convert.export": ("export",),
    "convert.upcycle": ("upcycle",),
    "reports.compare": ("compare",),
    "reports.report": ("report",),
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
        from mixture_of_tokens.process import missing_package

        if (package := missing_package(error)) is None:
            raise
        ask = 'pip install "mixture-of-tokens[train]"'
        raise ModuleNotFoundError(f"{package} is not installed; {name} comes with {ask}", name=error.name) from error


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
