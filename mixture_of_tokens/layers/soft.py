"""Soft MoE, which mixes the positions of one text and so is not causal: for comparison. Letters as in `mixture.py`."""

from typing import Any, Unpack

import torch
from torch import Tensor

from mixture_of_tokens.layers.experts import Routed, RoutedOptions, softmax
from mixture_of_tokens.layers.grouping import check_shapes, combine, dispatch
from mixture_of_tokens.utils.checks import check_sizes


class SoftMoE(Routed):
    """Experts read mixtures of all positions of a text, later ones included (Puigcerver et al., arXiv 2308.00951).

    Each expert has P slots, which the router tells apart. With logits of a text's token t for slot s, their eq. 1 to 3:

        dispatch[t, s] = exp(logit[t, s]) / sum_u exp(logit[u, s])      softmax over the positions
        combine[t, s]  = exp(logit[t, s]) / sum_r exp(logit[t, r])      softmax over the slots
        y[s]           = FFN_e(sum_t dispatch[t, s] * x_t)              e is the expert of the slot
        out[t]         = sum_s combine[t, s] * y[s]

    A token's output depends on the text that follows it. Such a model can be trained, and its loss is low for that
    reason; it cannot write text. Their normalisation of inputs, for wide models, is left out.

    Args beyond those of `Routed`:
        num_slots: P. Per token of T positions, experts cost E * P / T rows.
    """

    def __init__(
        self, hidden_size: int, expert_size: int, num_experts: int, num_slots: int = 1, **options: Unpack[RoutedOptions]
    ):
        check_sizes(num_slots=num_slots)
        super().__init__(hidden_size, expert_size, num_experts, _logits_per_expert=num_slots, **options)
        self.num_slots = num_slots

    def extra_repr(self) -> str:
        return f"num_slots={self.num_slots}"

    def weights(self, logits_BTS: Tensor, mask_BT1: Tensor | None) -> tuple[Tensor, Tensor]:
        """Dispatch and combine weights (B, T, E * P); the slots of an expert are neighbours."""
        combine_BTS = softmax(logits_BTS, dim=2)
        if mask_BT1 is not None:
            combine_BTS = combine_BTS.masked_fill(~mask_BT1, 0)
            # Not -inf: a text without real tokens must not become NaN.
            logits_BTS = logits_BTS.masked_fill(~mask_BT1, torch.finfo(logits_BTS.dtype).min)
        return softmax(logits_BTS, dim=1), combine_BTS

    def forward(self, x_BTD: Tensor, token_mask: Tensor | None = None, return_weights: bool = False) -> Any:
        check_shapes(x_BTD, token_mask)
        mask_BT1 = None
        if token_mask is not None:
            mask_BT1 = token_mask.bool()[..., None]
            x_BTD = x_BTD.masked_fill(~mask_BT1, 0)
        dispatch_BTS, combine_BTS = self.weights(self.gate(x_BTD), mask_BT1)
        slots_SBD = dispatch(dispatch_BTS.to(x_BTD.dtype), x_BTD.contiguous())
        y_ERD = self.experts(slots_SBD.unflatten(0, (self.num_experts, self.num_slots)).flatten(1, 2))
        y_SBD = y_ERD.unflatten(1, (self.num_slots, -1)).flatten(0, 1)
        y_BTD = combine(combine_BTS.to(x_BTD.dtype), y_SBD).to(x_BTD.dtype)
        y_BTD = y_BTD if mask_BT1 is None else y_BTD.masked_fill(~mask_BT1, 0)
        return (y_BTD, combine_BTS.unflatten(-1, (self.num_experts, -1)).sum(-1)) if return_weights else y_BTD
