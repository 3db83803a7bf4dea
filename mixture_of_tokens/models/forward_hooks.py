"""Forward passes of a trained model whose hooks measure something, in evaluation mode."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mixture_of_tokens.layers.mixture import MixtureOfTokens
from mixture_of_tokens.models.modeling import MixtureOfTokensForCausalLM

INPUTS = ("input_ids", "attention_mask", "token_mask", "position_ids")


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


@contextmanager
def serving_restored(model: nn.Module) -> Iterator[list[MixtureOfTokens]]:
    """The Mixture of Tokens layers of a model; afterwards each serves as before."""
    layers = [module for module in model.modules() if isinstance(module, MixtureOfTokens)]
    before = [(layer.alone, layer.num_experts_alone) for layer in layers]
    try:
        yield layers
    finally:
        for layer, was in zip(layers, before, strict=True):
            layer.serve_alone(*was)


@contextmanager
def serving_alone(model: MixtureOfTokensForCausalLM, num_experts_alone: int | None = None) -> Iterator[None]:
    """A model that serves each row alone; afterwards each of its layers serves as before."""
    with serving_restored(model):
        model.serve_alone(num_experts_alone=num_experts_alone)
        yield


def check_batches(model: Any, batches: Any) -> None:
    """Raises ValueError, naming it, for an argument of another type."""
    if not isinstance(model, nn.Module):
        raise ValueError(f"model takes a module of torch, not a {type(model).__name__}")
    if not isinstance(batches, Iterable):
        raise ValueError(f"batches takes several batches, as in a list or a loader, not a {type(batches).__name__}")
    if isinstance(batches, Tensor | Mapping):
        raise ValueError("batches takes several; of one, give [batch]")


def pass_forward(model: MixtureOfTokensForCausalLM, batch: Mapping[str, Tensor]) -> None:
    """For what hooks see: the head computes one position only, and what is no input, such as labels, is left out."""
    inputs = {name: batch[name] for name in INPUTS if name in batch}
    if model.device.type != "meta":  # as of a model that lies on the disk
        inputs = {name: tensor.to(model.device) for name, tensor in inputs.items()}
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
