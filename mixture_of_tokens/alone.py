"""A Mixture of Tokens that is served alone: every token forms a group with G - 1 companions. Letters as in `layers.py`.

By default every expert runs for every token, at G times the FLOPs. With `num_experts_alone` only those of the token's K
largest weights do; the others give it what they give their companion, which `set_alone` computes, once:

    out[t] = sum_e w[t, e] * FFN_e(w[t, e] * x_t + (1 - w[t, e]) * companion[e])     for e in t's top K
           + sum_e w[t, e] * FFN_e(companion[e])                                     for all other e

(with `normalize_mixture` both mixtures are divided by their norms). An expert of weight w is off by about w squared, so
with K = k, the granularity, where experts cost what a dense feed-forward does, the output is nearly the same.
FFN_e(companion[e]) and the logit of all companions of a token together are computed without a gradient when
`serve_alone` is called, and again when weights are drawn anew or loaded. After any other change of the weights, call
`serve_alone` again.
"""

import functools
import itertools
import math
from numbers import Integral
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from mixture_of_tokens.experts import Experts, highest
from mixture_of_tokens.layout import at_least_fp32, check_shapes, never_measured, warn_once
from mixture_of_tokens.slots import dropless

if TYPE_CHECKING:
    from mixture_of_tokens.layers import MixtureOfTokens

# Tokens served by all experts at a time. Each has E mixtures, which a CPU's cache is to hold and a GPU's memory; the
# GPU's number is no measured one.
AT_ONCE = {"cpu": 64, "cuda": 1024}


@torch.inference_mode(False)  # what is made here is for training too
@torch.no_grad()
def set_alone(layer: "MixtureOfTokens", alone: bool, num_experts_alone: int | None) -> None:
    few = layer.num_experts if num_experts_alone is None else num_experts_alone
    if not isinstance(alone, bool):
        raise ValueError(f"serve_alone takes True or False, not {alone!r}; experts are num_experts_alone={alone!r}")
    if isinstance(few, bool) or not isinstance(few, Integral) or not 1 <= few <= layer.num_experts:
        raise ValueError(f"served alone, a token can go to 1 to {layer.num_experts} experts, not {few!r}")
    if not alone and few < layer.num_experts:
        raise ValueError("num_experts_alone is for texts that are served alone")
    if few < layer.num_experts and (layer.gate is None or layer.group_size == 1):
        raise ValueError("served alone, a token goes to all experts where these weigh it alike")
    layer.alone, layer.num_experts_alone = alone, int(few) if alone else layer.num_experts
    if alone and never_measured(layer.companion, layer.group_size):
        warn_once(
            "Served alone, companions stand for the other texts, and those of this layer were never measured: call "
            "calibrate_companions first, or the loss is much higher."
        )
    layer.companion_output, layer.rest_logit = (layer.companion.new_empty(0) for _ in range(2))
    if layer.num_experts_alone < layer.num_experts:
        (experts,) = (module for module in layer.experts.modules() if isinstance(module, Experts))  # below an adapter
        each_E, no_E = torch.arange(layer.num_experts, device=layer.companion.device), 0 * layer.companion_logit
        mix_ED = _beside_companions(layer, layer.companion.to(experts.down_proj.dtype), each_E, no_E)
        y_E1D = layer.experts(mix_ED[:, None])
        layer.companion_output = y_E1D[:, 0].to(layer.companion.dtype)
        layer.rest_logit = layer.companion_logit + math.log(layer.group_size - 1)


def renew_alone(layer: "MixtureOfTokens", _: object = None) -> None:
    """After other weights are loaded or drawn, what companions get is another constant."""
    if layer.num_experts_alone < layer.num_experts:
        set_alone(layer, True, layer.num_experts_alone)


def served_alone(layer: "MixtureOfTokens", x_BTD: Tensor, token_mask: Tensor | None) -> Tensor:
    check_shapes(x_BTD, token_mask)
    if layer.num_experts_alone < layer.num_experts:
        return _to_few_experts(layer, x_BTD, token_mask)
    at_once = AT_ONCE.get(x_BTD.device.type, AT_ONCE["cpu"])
    if len(x_BTD) == 1 and x_BTD.shape[1] <= at_once:
        return layer.in_groups(x_BTD, token_mask)
    # Tokens as positions of one example.
    x_1SD = x_BTD.reshape(1, -1, x_BTD.shape[-1])
    masks = itertools.repeat(None) if token_mask is None else token_mask.reshape(1, -1).split(at_once, dim=1)
    parts = zip(x_1SD.split(at_once, dim=1), masks, strict=False)
    return torch.cat([layer.in_groups(*part) for part in parts], dim=1).view_as(x_BTD)


def _beside_companions(layer: "MixtureOfTokens", x: Tensor, expert: Tensor, weight: Tensor) -> Tensor:
    """Mixtures of tokens (..., D) with the companions of experts (...), by the tokens' weights (...)."""
    companion = F.embedding(expert, layer.companion)
    mix = companion.lerp(x.to(companion.dtype), weight[..., None].to(companion.dtype))
    if layer.normalize_mixture:
        squares = weight.square() + (1 - weight).square() / (layer.group_size - 1)
        mix = mix / squares.sqrt()[..., None]
    return mix.to(x.dtype)


def _to_few_experts(layer: "MixtureOfTokens", x_BTD: Tensor, token_mask: Tensor | None) -> Tensor:
    """The formula of the module's docstring."""
    masked_S1 = None if token_mask is None else ~token_mask.bool().reshape(-1, 1)
    x_SD = x_BTD.flatten(0, 1) if masked_S1 is None else x_BTD.flatten(0, 1).masked_fill(masked_S1, 0)
    assert layer.gate is not None  # or `set_alone` has refused
    logits_SE = layer.gate(x_SD)
    # The softmax over a token and its companions, of which all have the same logit.
    weights_SE = (logits_SE.to(at_least_fp32(logits_SE.dtype)) - layer.rest_logit).sigmoid()
    weight_SK, expert_SK = highest(weights_SE, layer.num_experts_alone)
    read = functools.partial(_beside_companions, layer)
    own_SD = dropless(layer, x_SD, expert_SK, weight_SK, read=read)
    others_SE = weights_SE.scatter(1, expert_SK, 0)
    y_SD = torch.addmm(own_SD.to(others_SE.dtype), others_SE, layer.companion_output.to(others_SE.dtype))
    if masked_S1 is not None:
        y_SD = y_SD.masked_fill(masked_S1, 0)
    return y_SD.view_as(x_BTD).to(x_BTD.dtype)
