"""The layers, which need torch alone: Mixture of Tokens (`mixture.py` is the idea) and the sparse ones beside it."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mixture_of_tokens.layers.experts import Experts, Router
    from mixture_of_tokens.layers.mixture import MixtureOfTokens
    from mixture_of_tokens.layers.soft import SoftMoE
    from mixture_of_tokens.layers.thresholds import ExpertThreshold, ReMoE
    from mixture_of_tokens.layers.token_choice import DefaultMoE, ExpertChoice, SigmoidChoice, TokenChoice

# Imported at their first use, as some bring torch's compiler with them.
_MODULES = {
    "Experts": "experts",
    "Router": "experts",
    "MixtureOfTokens": "mixture",
    "SoftMoE": "soft",
    "ExpertThreshold": "thresholds",
    "ReMoE": "thresholds",
    "DefaultMoE": "token_choice",
    "ExpertChoice": "token_choice",
    "SigmoidChoice": "token_choice",
    "TokenChoice": "token_choice",
}
__all__ = [
    "DefaultMoE",
    "ExpertChoice",
    "ExpertThreshold",
    "Experts",
    "MixtureOfTokens",
    "ReMoE",
    "Router",
    "SigmoidChoice",
    "SoftMoE",
    "TokenChoice",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
