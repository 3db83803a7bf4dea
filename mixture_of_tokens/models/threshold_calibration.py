"""Thresholds as trained weights want them, measured on text.

In training a threshold follows the scores of the last batches, some of them with older weights, so single experts get
up to a fifth more or less than their even share. Measured anew with weights that no longer change, they do not.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from mixture_of_tokens.layers.thresholds import ExpertThreshold
from mixture_of_tokens.models.forward_hooks import check_batches, watch
from mixture_of_tokens.models.modeling import MixtureOfTokensForCausalLM


@torch.no_grad()
def calibrate_thresholds(model: MixtureOfTokensForCausalLM, batches: Iterable[dict[str, Tensor]]) -> None:
    """Set the thresholds of every Expert Threshold layer to their means over `batches`, if there are such layers.

    Of several processes each measures on its own batches alone: give all of them the same.

    Args:
        model: uncompiled and unwrapped.
        batches: inputs of the model, each of many tokens: an expert's even share of a batch is to be some tokens.
            Smaller ones are ignored.

    Raises ValueError if there is no batch, and for arguments of another type.
    """
    check_batches(model, batches)
    layers = [module for module in model.modules() if isinstance(module, ExpertThreshold)]
    if not layers:
        return
    for layer in layers:
        layer.noted = None  # of training that no `balance` followed
    try:
        watch(model, dict.fromkeys(layers, _note), batches)
        if all(layer.noted is None for layer in layers):
            raise ValueError("there is no batch to measure thresholds on; an iterator gives its batches once")
        for layer in layers:
            if layer.noted is not None:
                layer.move_threshold(1, layer.noted)
    finally:
        for layer in layers:
            layer.noted = None


def _note(layer: ExpertThreshold, x_BTD: Tensor, token_mask: Tensor | None = None) -> None:
    layer.note(layer.gate(x_BTD.flatten(0, 1) if token_mask is None else x_BTD[token_mask.bool()]))
