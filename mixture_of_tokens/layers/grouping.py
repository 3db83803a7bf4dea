"""Rows to groups and back, and the layers' matrix products in the memory layouts that make them fast.

Shape letters as in `mixture.py`. Each product could be one einsum. They are autograd functions for speed:

- torch returns the weight gradient of `bmm(x, weight.mT)` transposed. Its accumulation into `.grad` then copies it:
  134 MB per matrix and step at Medium size. `expert_linear` computes it in the weight's own layout.
- Mixtures are made group by group and read expert by expert. In between they are a transposed view: matrix products
  read it as fast as a copy, and a copy would be as large as all mixtures. Writing each product straight into its
  place (`out=`) is no faster, and many times slower when another process uses a core.

Each public function casts as autocast would, so that what it saves has one type, and `backward`, which runs outside of
autocast, multiplies in that one too. A router's logits keep their precision; only their gradients are in autocast's
type (`precise_linear`).
"""

import functools
import logging
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def check_shapes(x_BTD: Tensor, token_mask: Tensor | None) -> None:
    """Raises ValueError for what no layer takes."""
    if not isinstance(x_BTD, Tensor) or not isinstance(token_mask, Tensor | None):
        given = " and ".join(type(each).__name__ for each in (x_BTD, token_mask))
        raise ValueError(f"a layer takes tensors of torch, x and perhaps a token_mask, not {given}")
    if x_BTD.dim() != 3 or not x_BTD.numel():
        raise ValueError(
            "x must be (examples, positions, hidden size) with at least one example and position, not "
            f"{tuple(x_BTD.shape)}"
        )
    if not x_BTD.is_floating_point():
        raise ValueError(f"x must be of a floating-point type, not {x_BTD.dtype}")
    if token_mask is not None and token_mask.shape != x_BTD.shape[:2]:
        raise ValueError(f"token_mask must be {tuple(x_BTD.shape[:2])}, not {tuple(token_mask.shape)}")
    if token_mask is not None and token_mask.is_floating_point():  # perhaps one that is added, 0 for real tokens
        raise ValueError(f"token_mask must be true where a token is real, so bool or integer, not {token_mask.dtype}")


def check_full(x_BTD: Tensor, group_size: int) -> None:
    """Warn, once for a number of rows, where the last group of a batch is incomplete; called in training."""
    if not torch.compiler.is_compiling() and torch.is_grad_enabled() and len(x_BTD) % group_size:
        warn_once(
            f"A batch of {len(x_BTD)} rows is no multiple of the group size, {group_size}: the last group is trained "
            f"incomplete. Take batches of a multiple of {group_size}, and drop the last one."
        )


def never_measured(companion_ED: Tensor, group_size: int) -> bool:
    """Whether the companions of a layer that needs some are those it was made with; of meta tensors nobody knows."""
    with_values = type(companion_ED) is Tensor and not companion_ED.is_meta  # no fake one, which counts FLOPs
    return group_size > 1 and with_values and not companion_ED.any()


@functools.cache
def warn_once(message: str) -> None:
    logging.getLogger(__name__).warning(message)


def at_least_fp32(dtype: torch.dtype | None = None) -> torch.dtype:
    """float32, or this type where it is more precise; by default torch's default type."""
    return torch.promote_types(torch.get_default_dtype() if dtype is None else dtype, torch.float32)


def grouped(x_BTD: Tensor, token_mask: Tensor | None, group_size: int) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Rows -> groups: x (M, G, D) with masked rows zeroed, the mask (M, G, 1), the number of missing tokens (M, 1, 1).

    An incomplete last group is padded with masked rows; a batch smaller than a group is one group of B rows. The mask
    is None where no row is masked or padded, and the number where every group is full.
    """
    check_shapes(x_BTD, token_mask)
    B, T, _ = x_BTD.shape
    rows = min(group_size, B)
    dtype = at_least_fp32(x_BTD.dtype)
    if token_mask is None and B % rows == 0:
        x_MGD = _in_groups(x_BTD, rows)
        lacking = group_size - rows
        return x_MGD, None, x_MGD.new_full((len(x_MGD), 1, 1), lacking, dtype=dtype) if lacking else None
    mask_BT1 = x_BTD.new_ones((B, T, 1), dtype=torch.bool) if token_mask is None else token_mask.bool()[..., None]
    missing = -B % rows
    x_MGD = _in_groups(F.pad(x_BTD.masked_fill(~mask_BT1, 0), (0, 0, 0, 0, 0, missing)), rows)
    # Not F.pad: of a bool with sizes that vary, torch 2.13 compiles C++ that does not compile.
    mask_MG1 = _in_groups(torch.cat([mask_BT1, mask_BT1.new_zeros(missing, T, 1)]), rows)
    return x_MGD, mask_MG1, group_size - mask_MG1.sum(1, keepdim=True, dtype=dtype)


def _in_groups(x_BTD: Tensor, rows: int) -> Tensor:
    """(B, T, D) -> (B / rows * T, rows, D)"""
    return x_BTD.unflatten(0, (-1, rows)).transpose(1, 2).flatten(0, 1).contiguous()


def ungrouped(y_MGD: Tensor, mask_MG1: Tensor | None, B: int, T: int) -> Tensor:
    """Groups -> rows, the inverse of `grouped`; masked rows get zero."""
    if mask_MG1 is not None:
        y_MGD = y_MGD.masked_fill(~mask_MG1, 0)
    return y_MGD.unflatten(0, (-1, T)).transpose(1, 2).flatten(0, 1)[:B]


def is_autocast(device: str) -> bool:
    # Not `torch.amp.is_autocast_available`, which torch 2.10's compiler cannot trace.
    return device != "meta" and torch.is_autocast_enabled(device)


def autocast_dtype(x: Tensor) -> torch.dtype:
    """The type in which autocast would multiply this tensor: its own without autocast, and where it is float64."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if is_autocast(device) and x.dtype != torch.float64 else x.dtype


def autocast_to(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors, cast as autocast would for a matrix product."""
    return tuple(x.to(autocast_dtype(x)) for x in tensors)


def full_precision(device: torch.device) -> AbstractContextManager:
    """A context without autocast."""
    return torch.autocast(device.type, enabled=False) if is_autocast(device.type) else nullcontext()


def applied(function: Any, *tensors: Any) -> Tensor:
    """An autograd function of these, but where no gradient is taken its forward alone.

    For one token that is being written, `apply` takes longer than the product.
    """
    return function.apply(*tensors) if torch.is_grad_enabled() else function.forward(*tensors)


def _swapped(x: Tensor) -> Tensor:
    """(E, M, D) <-> (M, E, D): a view, but a copy in bf16 on the CPU, whose kernels are slow on strided matrices."""
    return _copied_swapped(x) if x.device.type == "cpu" and x.dtype == torch.bfloat16 else x.transpose(0, 1)


# A custom operator, since `torch.compile` lets a copy of its own keep the layout that it was read in. The products then
# copy each matrix transposed, which took a tenth of a Micro's step.
@torch.library.custom_op("mixture_of_tokens::copied_swapped", mutates_args=())
def _copied_swapped(x: Tensor) -> Tensor:
    return x.transpose(0, 1).clone(memory_format=torch.contiguous_format)


_copied_swapped.register_fake(lambda x: x.new_empty(x.shape[1], x.shape[0], x.shape[2]))
_copied_swapped.register_autograd(lambda ctx, grad: _copied_swapped(grad))


def save_inputs(ctx, inputs, output) -> None:
    """Keep what second derivatives pass through; what a function computes for itself is a constant to autograd."""
    ctx.save_for_backward(*inputs)


class _Dispatch(torch.autograd.Function):
    # As `bmm`, whose own backward pass multiplies by transposed copies: in bf16 on a CPU a layer takes 8 % longer.
    generate_vmap_rule = True

    @staticmethod
    def forward(weights_MGE, x_MGD):
        return torch.bmm(weights_MGE.mT, x_MGD)

    setup_context = staticmethod(save_inputs)

    @staticmethod
    def backward(ctx, grad_MED):
        weights_MGE, x_MGD = ctx.saved_tensors
        into_weights, into_x = ctx.needs_input_grad  # uniform weights need none
        return (
            torch.bmm(x_MGD, grad_MED.mT) if into_weights else None,
            torch.bmm(weights_MGE, grad_MED) if into_x else None,
        )


class _Combine(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(weights_MGE, y_MED):
        return torch.bmm(weights_MGE, y_MED)

    setup_context = staticmethod(save_inputs)

    @staticmethod
    def backward(ctx, grad_MGD):
        weights_MGE, y_MED = ctx.saved_tensors
        into_weights, into_y = ctx.needs_input_grad
        return (
            torch.bmm(grad_MGD, y_MED.mT) if into_weights else None,
            torch.bmm(weights_MGE.mT, grad_MGD) if into_y else None,
        )


class _ExpertLinear(torch.autograd.Function):
    # Under autocast weights are cast here and again in the backward pass: a copy that is kept would outlive the whole
    # weights of a shard, which are freed between the passes.
    generate_vmap_rule = True

    @staticmethod
    def forward(x_ERI, weight_EOI):
        return torch.bmm(x_ERI, weight_EOI.to(x_ERI.dtype).mT)

    setup_context = staticmethod(save_inputs)

    @staticmethod
    def backward(ctx, grad_ERO):
        x_ERI, weight_EOI = ctx.saved_tensors
        into_x, into_weight = ctx.needs_input_grad  # experts may be frozen
        return (
            torch.bmm(grad_ERO, weight_EOI.to(grad_ERO.dtype)) if into_x else None,
            torch.bmm(grad_ERO.mT, x_ERI).to(weight_EOI.dtype) if into_weight else None,
        )


def once_only(what: str, instead: str) -> None:
    """Raises RuntimeError where a second derivative may be asked for, as torch.func always does: too little is kept."""
    if torch.is_grad_enabled():
        raise RuntimeError(f"{what} has no second derivatives: {instead}")


class _PreciseLinear(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x, weight_OI, low):
        return F.linear(x.to(weight_OI.dtype), weight_OI)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight_OI, low = inputs
        ctx.dtype = x.dtype
        ctx.save_for_backward(x.to(low), weight_OI)

    @staticmethod
    def backward(ctx, grad):
        x, weight_OI = ctx.saved_tensors
        if x.dtype != ctx.dtype:
            once_only("the router of float32 under autocast", "turn autocast off")
        low = grad.to(x.dtype)
        into_weight = low.reshape(-1, low.shape[-1]).T @ x.reshape(-1, x.shape[-1])
        return (low @ weight_OI.to(x.dtype)).to(ctx.dtype), into_weight.to(weight_OI.dtype), None


def precise_linear(x: Tensor, weight_OI: Tensor) -> Tensor:
    """`F.linear` in the precision of the weight: (..., I), (O, I) -> (..., O).

    Its gradients are computed in the type of x, and under autocast in autocast's, as those of all other products are;
    for a weight in float64 in float64.
    """
    low = autocast_dtype(x)
    with full_precision(x.device):
        if weight_OI.dtype in (low, torch.float64):
            return F.linear(x.to(weight_OI.dtype), weight_OI)
        return applied(_PreciseLinear, x, weight_OI, low)


def dispatch(weights_MGE: Tensor, x_MGD: Tensor) -> Tensor:
    """mix[e, m] = sum_g weights[m, g, e] * x[m, g]: (M, G, E), (M, G, D) -> (E, M, D)."""
    return _swapped(applied(_Dispatch, *autocast_to(weights_MGE, x_MGD)))


def combine(weights_MGE: Tensor, y_EMD: Tensor) -> Tensor:
    """out[m, g] = sum_e weights[m, g, e] * y[e, m]: (M, G, E), (E, M, D) -> (M, G, D)."""
    weights_MGE, y_EMD = autocast_to(weights_MGE, y_EMD)
    return applied(_Combine, weights_MGE, _swapped(y_EMD))


def expert_linear(x_ERI: Tensor, weight_EOI: Tensor) -> Tensor:
    """Each expert's rows times its own matrix: (E, R, I), (E, O, I) -> (E, R, O)."""
    return applied(_ExpertLinear, *autocast_to(x_ERI), weight_EOI)
