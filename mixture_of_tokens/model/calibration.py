"""What layers keep beside their weights, measured on text; and thresholds as trained weights want them.

In training a threshold follows the scores of the last batches, some of them with older weights, so single experts get
up to a fifth more or less than their even share. Measured anew with weights that no longer change, they do not.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mixture_of_tokens.model.modeling import MixtureOfTokensForCausalLM
from mixture_of_tokens.thresholds import ExpertThreshold


@torch.no_grad()
def watch(
    model: MixtureOfTokensForCausalLM,
    hooks: Mapping[nn.Module, Callable[..., None]],
    batches: Iterable[dict[str, Tensor]],
) -> None:
    """Run a model over batches in evaluation mode, with a hook after the forward pass of each of these modules."""
    handles, training = [module.register_forward_hook(hook) for module, hook in hooks.items()], model.training
    try:
        model.eval()
        for batch in batches:
            inputs = {k: batch[k].to(model.device) for k in ("input_ids", "attention_mask", "token_mask") if k in batch}
            model(**inputs, logits_to_keep=1, use_cache=False)
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()


@torch.no_grad()
def calibrate_thresholds(model: MixtureOfTokensForCausalLM, batches: Iterable[dict[str, Tensor]]) -> None:
    """Set the thresholds of every Expert Threshold layer to their means over `batches`, if there are such layers.

    Args:
        model: uncompiled and unwrapped.
        batches: inputs of the model, each of many tokens: an expert's even share of a batch is to be some tokens.
    """
    layers = [module for module in model.modules() if isinstance(module, ExpertThreshold)]
    if not layers:
        return
    watch(model, dict.fromkeys(layers, _note), batches)
    for layer in layers:
        if (mean_E := layer.noted_mean()) is not None:
            layer.threshold.copy_(mean_E)


def _note(layer: ExpertThreshold, args: tuple[Any, ...], output: Tensor) -> None:
    x_BTD, mask_BT = args[0], args[1] if len(args) > 1 else None
    real_S = x_BTD.new_ones(x_BTD.shape[:2], dtype=torch.bool) if mask_BT is None else mask_BT.bool()
    layer.note(layer.gate(x_BTD.masked_fill(~real_S[..., None], 0)).flatten(0, 1), real_S.flatten())
