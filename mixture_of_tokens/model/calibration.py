"""What layers keep beside their weights, measured on text; and thresholds as trained weights want them.

In training a threshold follows the scores of the last batches, some of them with older weights, so single experts get
up to a fifth more or less than their even share. Measured anew with weights that no longer change, they do not.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mixture_of_tokens.model.modeling import MixtureOfTokensForCausalLM
from mixture_of_tokens.thresholds import ExpertThreshold

INPUTS = ("input_ids", "attention_mask", "token_mask")


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """A model in evaluation mode; afterwards each of its modules is in its own again."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, was in training.items():
            module.training = was


def pass_forward(model: MixtureOfTokensForCausalLM, batch: Mapping[str, Tensor]) -> None:
    """For what hooks see: the head computes one position only, and what is no input, such as labels, is left out."""
    inputs = {name: batch[name].to(model.device) for name in INPUTS if name in batch}
    model(**inputs, logits_to_keep=1, use_cache=False)


@torch.no_grad()
def watch(
    model: nn.Module, hooks: Mapping[nn.Module, Callable[..., None]], batches: Iterable[dict[str, Tensor] | Tensor]
) -> None:
    """Run a model over batches in evaluation mode, with a hook after the forward pass of each of these modules.

    A hook gets the module and what it was called with.
    """

    def noted(hook: Callable[..., None]) -> Any:
        def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            hook(module, *args, **kwargs)

        return after

    if isinstance(batches, Tensor | Mapping):
        raise ValueError("batches takes several; of one, give [batch]")
    handles = [module.register_forward_hook(noted(hook), with_kwargs=True) for module, hook in hooks.items()]
    try:
        with evaluating(model):
            for batch in batches:
                if not isinstance(batch, Tensor | Mapping):
                    what = "a tensor or a dictionary of keyword arguments"
                    raise ValueError(f"batches takes {what} for each, not {type(batch).__name__}")
                if isinstance(model, MixtureOfTokensForCausalLM):
                    pass_forward(model, {"input_ids": batch} if isinstance(batch, Tensor) else batch)
                elif isinstance(batch, Tensor):
                    model(batch)
                else:
                    model(**batch)
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def calibrate_thresholds(model: MixtureOfTokensForCausalLM, batches: Iterable[dict[str, Tensor]]) -> None:
    """Set the thresholds of every Expert Threshold layer to their means over `batches`, if there are such layers.

    Of several processes each measures on its own batches alone: give all of them the same.

    Args:
        model: uncompiled and unwrapped.
        batches: inputs of the model, each of many tokens: an expert's even share of a batch is to be some tokens.
    """
    layers = [module for module in model.modules() if isinstance(module, ExpertThreshold)]
    if not layers:
        return
    for layer in layers:
        layer.noted = None  # of training that no `balance` followed
    try:
        watch(model, dict.fromkeys(layers, _note), batches)
        for layer in layers:
            layer.move_threshold(1, over_processes=False)
    finally:
        for layer in layers:
            layer.noted = None


def _note(layer: ExpertThreshold, x_BTD: Tensor, token_mask: Tensor | None = None) -> None:
    layer.note(layer.gate(x_BTD.flatten(0, 1) if token_mask is None else x_BTD[token_mask.bool()]))
