"""Mixture of Tokens (arXiv 2310.15961): a continuous mixture of experts for autoregressive language models."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from mixture_of_tokens.companions import calibrate_companions
from mixture_of_tokens.layers import ExpertChoice, Experts, MixtureOfTokens, Router, TokenChoice
from mixture_of_tokens.model import MixtureOfTokensConfig, MixtureOfTokensForCausalLM, MixtureOfTokensModel

AutoConfig.register("mixture_of_tokens", MixtureOfTokensConfig, exist_ok=True)
AutoModel.register(MixtureOfTokensConfig, MixtureOfTokensModel, exist_ok=True)
AutoModelForCausalLM.register(MixtureOfTokensConfig, MixtureOfTokensForCausalLM, exist_ok=True)

__all__ = [
    "ExpertChoice",
    "Experts",
    "MixtureOfTokens",
    "MixtureOfTokensConfig",
    "MixtureOfTokensForCausalLM",
    "MixtureOfTokensModel",
    "Router",
    "TokenChoice",
    "calibrate_companions",
]
