"""The feed-forward of each kind of block, made from a configuration: the layers, and the dense ones beside them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mixture_of_tokens.layers.experts import ACTIVATIONS
from mixture_of_tokens.layers.mixture import MixtureOfTokens
from mixture_of_tokens.layers.soft import SoftMoE
from mixture_of_tokens.layers.thresholds import ExpertThreshold, ReMoE
from mixture_of_tokens.layers.token_choice import ExpertChoice, SigmoidChoice, TokenChoice
from mixture_of_tokens.models.config import MixtureOfTokensConfig
from mixture_of_tokens.models.hf_internals import Qwen3MoeMLP
from mixture_of_tokens.settings.routings import num_slots


class DenseMLP(Qwen3MoeMLP):
    def forward(self, x: Tensor, token_mask: Tensor | None = None) -> Tensor:
        return super().forward(x)


class PlainMLP(nn.Module):
    """The paper's dense feed-forward: no gate, no biases."""

    def __init__(self, config: MixtureOfTokensConfig, intermediate_size: int | None = None):
        super().__init__()
        width = intermediate_size or config.intermediate_size
        self.act = ACTIVATIONS[config.hidden_act]
        self.up_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.down_proj = nn.Linear(width, config.hidden_size, bias=False)

    def forward(self, x: Tensor, token_mask: Tensor | None = None) -> Tensor:
        return self.down_proj(self.act(self.up_proj(x)))


def dense_feed_forward(config: MixtureOfTokensConfig, width: int | None = None) -> nn.Module:
    """Of the configuration's width, or of another."""
    return (DenseMLP if config.gated else PlainMLP)(config, width)


def _common(config: MixtureOfTokensConfig) -> dict[str, Any]:
    """What every sparse layer's constructor takes."""
    return {
        "hidden_size": config.hidden_size,
        "expert_size": config.moe_intermediate_size,
        "num_experts": config.num_experts,
        "gated": config.gated,
        "activation": config.hidden_act,
        "temperature": config.router_temperature,
        "learnable_temperature": config.learnable_temperature,
        "router_dtype": getattr(torch, config.router_dtype),
        "initializer_scale": config.initializer_scale,
    }


def _choosing(config: MixtureOfTokensConfig) -> dict[str, Any]:
    """What the constructor of a layer takes in which some experts are chosen for a token."""
    return _common(config) | {"num_experts_per_tok": config.num_experts_per_tok}


def _mixture_of_tokens(config: MixtureOfTokensConfig, uniform: bool = False) -> nn.Module:
    mixing = {"normalize_mixture": config.normalize_mixture, "uniform": uniform}
    return MixtureOfTokens(group_size=config.group_size, **mixing, **_common(config))


# By the kind of the block: a row for each of the table of routings.
BUILDERS: dict[str, Callable[[MixtureOfTokensConfig], nn.Module]] = {
    "dense": dense_feed_forward,
    "mixture_of_tokens": _mixture_of_tokens,
    "uniform": lambda config: _mixture_of_tokens(config, uniform=True),
    "token_choice": lambda config: TokenChoice(
        norm_topk_prob=config.norm_topk_prob, capacity_factor=config.capacity_factor, **_choosing(config)
    ),
    "sigmoid_choice": lambda config: SigmoidChoice(
        norm_topk_prob=config.norm_topk_prob, balance_rate=config.balance_rate, **_choosing(config)
    ),
    "expert_choice": lambda config: ExpertChoice(group_size=config.group_size, **_choosing(config)),
    "expert_threshold": lambda config: ExpertThreshold(
        threshold_decay=config.threshold_decay,
        scores=config.threshold_scores,  # pyright: ignore[reportArgumentType]
        **_choosing(config),
    ),
    "remoe": lambda config: ReMoE(**_choosing(config)),
    "soft_moe": lambda config: SoftMoE(num_slots=num_slots(config), **_common(config)),
}


def feed_forward(config: MixtureOfTokensConfig, block: int) -> nn.Module:
    """Of this block."""
    return BUILDERS[config.routings[block].kind](config)
