"""Mixture of Tokens (arXiv 2310.15961): a continuous mixture of experts for autoregressive language models.

Each name below is imported at its first use. The layers need torch alone, the models transformers too. The functions
that train, evaluate and compare need the packages of the extra `train`.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0.dev0"

if TYPE_CHECKING:  # `X as X` says that X is public
    from mixture_of_tokens.commands.audit import audit as audit
    from mixture_of_tokens.commands.compare import compare as compare
    from mixture_of_tokens.commands.data_report import data_report as data_report
    from mixture_of_tokens.commands.evaluate import evaluate as evaluate
    from mixture_of_tokens.commands.export import export as export
    from mixture_of_tokens.commands.generate import generate as generate
    from mixture_of_tokens.commands.plan import plan as plan
    from mixture_of_tokens.commands.prepare import prepare as prepare
    from mixture_of_tokens.commands.report import report as report
    from mixture_of_tokens.commands.sweep import sweep as sweep
    from mixture_of_tokens.commands.train import train as train
    from mixture_of_tokens.commands.transition import transition as transition
    from mixture_of_tokens.commands.upcycle import upcycle as upcycle
    from mixture_of_tokens.data.groups import GroupedBatches as GroupedBatches
    from mixture_of_tokens.data.own_tokens import count_collisions as count_collisions
    from mixture_of_tokens.data.own_tokens import prepare_tokens as prepare_tokens
    from mixture_of_tokens.data.own_tokens import split_tokens as split_tokens
    from mixture_of_tokens.data.prepare import prepare_text as prepare_text
    from mixture_of_tokens.evaluation.audit import audit_model as audit_model
    from mixture_of_tokens.evaluation.losses import score_tokens as score_tokens
    from mixture_of_tokens.layers.experts import Experts as Experts
    from mixture_of_tokens.layers.experts import Router as Router
    from mixture_of_tokens.layers.mixture import MixtureOfTokens as MixtureOfTokens
    from mixture_of_tokens.layers.soft import SoftMoE as SoftMoE
    from mixture_of_tokens.layers.thresholds import ExpertThreshold as ExpertThreshold
    from mixture_of_tokens.layers.thresholds import ReMoE as ReMoE
    from mixture_of_tokens.layers.token_choice import DefaultMoE as DefaultMoE
    from mixture_of_tokens.layers.token_choice import ExpertChoice as ExpertChoice
    from mixture_of_tokens.layers.token_choice import SigmoidChoice as SigmoidChoice
    from mixture_of_tokens.layers.token_choice import TokenChoice as TokenChoice
    from mixture_of_tokens.models.balance_callback import BalanceCallback as BalanceCallback
    from mixture_of_tokens.models.companions import calibrate_companions as calibrate_companions
    from mixture_of_tokens.models.config import MixtureOfTokensConfig as MixtureOfTokensConfig
    from mixture_of_tokens.models.modeling import MixtureOfTokensForCausalLM as MixtureOfTokensForCausalLM
    from mixture_of_tokens.models.modeling import MixtureOfTokensModel as MixtureOfTokensModel
    from mixture_of_tokens.models.names import config_from_name as config_from_name
    from mixture_of_tokens.models.threshold_calibration import calibrate_thresholds as calibrate_thresholds
    from mixture_of_tokens.runs.run import Run as Run
    from mixture_of_tokens.runs.run import read_run as read_run
    from mixture_of_tokens.settings.options import Options as Options
    from mixture_of_tokens.training.grouped import GroupedTrainer as GroupedTrainer

# The module of each public name.
_MODULES = {
    "layers.experts": ("Experts", "Router"),
    "layers.mixture": ("MixtureOfTokens",),
    "layers.token_choice": ("DefaultMoE", "ExpertChoice", "SigmoidChoice", "TokenChoice"),
    "layers.thresholds": ("ExpertThreshold", "ReMoE"),
    "layers.soft": ("SoftMoE",),
    "models.config": ("MixtureOfTokensConfig",),
    "models.modeling": ("MixtureOfTokensForCausalLM", "MixtureOfTokensModel"),
    "models.names": ("config_from_name",),
    "models.balance_callback": ("BalanceCallback",),
    "models.threshold_calibration": ("calibrate_thresholds",),
    "models.companions": ("calibrate_companions",),
    "data.prepare": ("prepare_text",),
    "data.groups": ("GroupedBatches",),
    "data.own_tokens": ("count_collisions", "prepare_tokens", "split_tokens"),
    "training.grouped": ("GroupedTrainer",),
    "settings.options": ("Options",),
    "evaluation.losses": ("score_tokens",),
    "evaluation.audit": ("audit_model",),
    "runs.run": ("Run", "read_run"),
}
_PLACES = {name: module for module, names in _MODULES.items() for name in names}
_COMMANDS = ("audit", "compare", "data_report", "evaluate", "export", "generate", "plan", "prepare", "report", "sweep")
_COMMANDS += ("train", "transition", "upcycle")
_PLACES |= {name: f"commands.{name}" for name in _COMMANDS}

__all__ = sorted(_PLACES)  # pyright: ignore[reportUnsupportedDunderAll]


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
