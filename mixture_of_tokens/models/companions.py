"""Companions: for each expert, averages over full groups that replace the tokens which a group lacks.

A Mixture of Tokens is trained in full groups and served in groups of any size, down to a single prompt. Other tokens
affect an expert through the softmax denominator and through the mixture. Both are averaged over full groups of
training text:

    companion_logit[e] = -log(mean over groups of G / sum_g e^logit[g, e])    so that a logit gets its mean weight
    companion[e]       = mean over groups of sum_g w[g, e] x_g                the mean mixture

These averages replace every missing token. The output for a token alone then depends on no other text, and has none
of the noise that the other tokens of a random group bring.
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from mixture_of_tokens.layers.grouping import full_precision, grouped
from mixture_of_tokens.layers.mixture import MixtureOfTokens
from mixture_of_tokens.models.forward_hooks import check_batches, serving_restored, watch
from mixture_of_tokens.models.modeling import MixtureOfTokensForCausalLM


class _Means:
    """Running sums over the full groups that one layer sees, in float64."""

    def __init__(self, layer: MixtureOfTokens):
        self.groups = 0
        self.log_inverse_E = torch.full_like(layer.companion_logit, -math.inf, dtype=torch.float64)
        self.mixtures_ED = torch.zeros_like(layer.companion, dtype=torch.float64)

    def add(self, layer: MixtureOfTokens, x_BTD: Tensor, token_mask: Tensor | None = None) -> None:
        x_MGD, _, missing_M11 = grouped(x_BTD, token_mask, layer.group_size)
        if missing_M11 is not None:
            x_MGD = x_MGD[missing_M11.flatten() == 0]
        self.groups += len(x_MGD)
        self.log_inverse_E = torch.logaddexp(
            self.log_inverse_E, (-layer.logits(x_MGD).double().logsumexp(1)).logsumexp(0)
        )
        weights_MGE = layer.weights(x_MGD)
        with full_precision(x_MGD.device):
            mixtures_ED = torch.einsum("mge,mgd->ed", weights_MGE, x_MGD.to(weights_MGE.dtype))
        self.mixtures_ED += mixtures_ED.double()

    def give(self, layer: MixtureOfTokens) -> None:
        layer.companion_logit.copy_(math.log(self.groups) - self.log_inverse_E - math.log(layer.group_size))
        layer.companion.copy_(self.mixtures_ED / self.groups)


def forget_companions(model: nn.Module) -> None:
    """Set them to zero, as they are in training."""
    for module in model.modules():
        if isinstance(module, MixtureOfTokens):
            module.reset_state()


@torch.no_grad()
def calibrate_companions(model: nn.Module, batches: Iterable[dict[str, Tensor] | Tensor]) -> None:
    """Set the companions of every Mixture of Tokens layer to their means over `batches`.

    Of several processes each measures on its own batches alone: give all of them the same.

    Args:
        model: any module with such layers, uncompiled and unwrapped. Full groups use no companions, so calibrating
            twice gives the same. A model of this library may have none, and stays as it is.
        batches: what the model is called with, keyword arguments or a tensor, on its device. The rows form full groups
            of different texts; incomplete groups are ignored. Of a model of this library, its inputs on any device, and
            other entries, such as labels, are left out.

    Raises ValueError if no batch has a full group, for another module without such layers, and for arguments of another
    type.
    """
    check_batches(model, batches)
    with serving_restored(model) as layers:
        if not layers and not isinstance(model, MixtureOfTokensForCausalLM):
            raise ValueError(f"model, a {type(model).__name__}, has no layer MixtureOfTokens to calibrate")
        before = [(layer.companion.clone(), layer.companion_logit.clone()) for layer in layers]
        means = {layer: _Means(layer) for layer in layers}
        for layer in layers:  # measured in groups, and as it was before the first time
            layer.serve_alone(False)
            layer.measuring = True
        forget_companions(model)
        try:
            watch(model, {layer: mean.add for layer, mean in means.items()}, batches if layers else ())
        finally:
            for layer in layers:
                layer.measuring = False
            for layer, (companion, logit) in zip(layers, before, strict=True):
                layer.companion.copy_(companion)
                layer.companion_logit.copy_(logit)
        if not all(mean.groups for mean in means.values()):
            raise ValueError(f"no batch has a group of {layers[0].group_size} real tokens to measure companions on")
        for layer, mean in means.items():
            mean.give(layer)
