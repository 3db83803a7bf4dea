"""The feed-forward of each kind of block, made from a configuration: the layers, and the dense ones beside them."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from mixture_of_tokens.layers.experts import ACTIVATIONS
from mixture_of_tokens.layers.mixture import MixtureOfTokens
from mixture_of_tokens.layers.soft import SoftMoE
from mixture_of_tokens.layers.thresholds import ExpertThreshold, ReMoE
from mixture_of_tokens.layers.token_choice import DefaultMoE, ExpertChoice, SigmoidChoice, TokenChoice
from mixture_of_tokens.models.config import MixtureOfTokensConfig
from mixture_of_tokens.models.hf_internals import Qwen3MoeMLP
from mixture_of_tokens.settings.layers import arguments_of
from mixture_of_tokens.settings.routings import DENSE, num_slots


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


GROUPS, CHOICES = ("group_size",), ("num_experts_per_tok",)
# By the kind of the block, as the table of routings has it: the layer, and what it takes beside what all take and the
# fields that are its own (`settings/layers.py`).
LAYERS: dict[str, tuple[Callable[..., nn.Module], tuple[str, ...]]] = {
    "mixture_of_tokens": (MixtureOfTokens, GROUPS),
    "uniform": (partial(MixtureOfTokens, uniform=True), GROUPS),
    "token_choice": (TokenChoice, CHOICES),
    "sigmoid_choice": (SigmoidChoice, CHOICES),
    "default_moe": (DefaultMoE, CHOICES),
    "expert_choice": (ExpertChoice, GROUPS + CHOICES),
    "expert_threshold": (ExpertThreshold, CHOICES),
    "remoe": (ReMoE, CHOICES),
    "soft_moe": (SoftMoE, ()),
}


def feed_forward(config: MixtureOfTokensConfig, block: int) -> nn.Module:
    """Of this block."""
    kind = config.routings[block].kind
    if kind == DENSE.kind:
        return dense_feed_forward(config)
    layer, names = LAYERS[kind]
    more = {name: getattr(config, name) for name in names} | arguments_of(kind, config)
    if layer is SoftMoE:
        more["num_slots"] = num_slots(config)
    return layer(
        hidden_size=config.hidden_size,
        expert_size=config.moe_intermediate_size,
        num_experts=config.num_experts,
        gated=config.gated,
        activation=config.hidden_act,
        temperature=config.router_temperature,
        learnable_temperature=config.learnable_temperature,
        router_dtype=getattr(torch, config.router_dtype),
        initializer_scale=config.initializer_scale,
        **more,
    )
