"""Tokens to the experts of sparse routings and back, and the products of experts with uneven numbers of rows.

What experts read are slots, expert by expert. Tokens go to slots by a gather and come back by another, and so do their
gradients: torch's index_add, and its gradient of an index, are several times slower on a CPU. Shape letters as in
`layers.py`, and N slots.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from mixture_of_tokens.layout import autocast_to

ROWS_AT_ONCE = 16  # in 16-bit precision
WAITS = (torch.Tag.cudagraph_unsafe,)  # the host waits for the device, to know the sizes


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_SD, token_N, slot_A, start_S, kept_A):
        ctx.save_for_backward(slot_A, start_S, kept_A)
        return _at_rows(x_SD, token_N)

    @staticmethod
    def backward(ctx, grad_ND):
        slot_A, start_S, kept_A = ctx.saved_tensors
        return _sum_by_token(grad_ND, slot_A, start_S, kept_A.to(grad_ND.dtype)), None, None, None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y_ND, gate_A, token_N, assignment_N, slot_A, start_S):
        ctx.save_for_backward(y_ND, gate_A, token_N, assignment_N, slot_A)
        return _sum_by_token(y_ND, slot_A, start_S, gate_A)

    @staticmethod
    def backward(ctx, grad_SD):
        y_ND, gate_A, token_N, assignment_N, slot_A = ctx.saved_tensors
        grad_ND = _at_rows(grad_SD, token_N)
        gate_N1 = _at_rows(gate_A[:, None], assignment_N)
        of_gate_A = (grad_ND * y_ND).sum(-1).index_select(0, slot_A)
        return grad_ND * gate_N1, of_gate_A, None, None, None, None


def _at_rows(x_SD: Tensor, row_N: Tensor) -> Tensor:
    """The rows of these numbers; a row of zeros for the number S."""
    return F.pad(x_SD, (0, 0, 0, 1)).index_select(0, row_N)


def _sum_by_token(x_ND: Tensor, slot_A: Tensor, start_S: Tensor, weight_A: Tensor) -> Tensor:
    """The sum of weight[a] * x[slot[a]] over the assignments of each token: (S, D)."""
    return F.embedding_bag(slot_A, x_ND, start_S, per_sample_weights=weight_A, mode="sum")


class Slots(NamedTuple):
    """Where experts read tokens: A assignments, token by token, in N slots, expert by expert.

    slot_A, kept_A: the slot of an assignment; 0 where it is dropped, that is, not kept.
    start_S: a token's first assignment.
    token_N, assignment_N: what is in a slot; S and A where it is empty.
    """

    slot_A: Tensor
    kept_A: Tensor
    start_S: Tensor
    token_N: Tensor
    assignment_N: Tensor

    @classmethod
    def of(cls, token_A: Tensor, slot_A: Tensor, tokens: int, number: int) -> "Slots":
        """By the token of each assignment, in order, and its slot, `number` for what is dropped."""
        A, device = len(token_A), token_A.device
        empty_N = slot_A.new_full((number + 1,), A)
        assignment_N = empty_N.index_copy(0, slot_A, torch.arange(A, device=device))[:-1]
        kept_A = slot_A < number
        return cls(
            slot_A=slot_A.masked_fill(~kept_A, 0),
            kept_A=kept_A,
            start_S=torch.searchsorted(token_A, torch.arange(tokens, device=device)),
            token_N=F.pad(token_A, (0, 1), value=tokens).index_select(0, assignment_N),
            assignment_N=assignment_N,
        )

    def dispatch(self, x_SD: Tensor) -> Tensor:
        """What is in the slots: (S, D) -> (N, D)."""
        return _Dispatch.apply(*autocast_to(x_SD), self.token_N, self.slot_A, self.start_S, self.kept_A)

    def combine(self, y_ND: Tensor, gate_A: Tensor) -> Tensor:
        """The sum of gate[a] * y[slot[a]] over the assignments of each token that are kept: (N, D), (A,) -> (S, D)."""
        gate_A = (gate_A * self.kept_A).to(y_ND.dtype)
        return _Combine.apply(y_ND, gate_A, self.token_N, self.assignment_N, self.slot_A, self.start_S)


def slots_without_limit(expert_A: Tensor, num_experts: int, like: Tensor) -> tuple[Tensor, Tensor, int]:
    """The slot of each assignment, where each expert's slots end, and their number N.

    Assignments to expert `num_experts` are dropped, their slot is N. In 16-bit precision an expert's slots are rounded
    up to ROWS_AT_ONCE, so that products have few shapes: on a CPU oneDNN compiles one for each, which takes ten times
    as long as the product.
    """
    A, device = len(expert_A), expert_A.device
    at_once = ROWS_AT_ONCE if autocast_to(like)[0].itemsize == 2 and num_experts < A else 1
    sorted_A, order_A = expert_A.sort(stable=True)
    ends_E = torch.searchsorted(sorted_A, torch.arange(num_experts, device=device), right=True)
    load_E = ends_E.diff(prepend=ends_E.new_zeros(1))
    room_E = -(-load_E // at_once) * at_once
    number = A + min(A, num_experts) * (at_once - 1)
    shift_E = F.pad((room_E - load_E).cumsum(0), (1, 0))[sorted_A]
    slots = torch.where(sorted_A < num_experts, torch.arange(A, device=device) + shift_E, number)
    return torch.empty_like(slots).index_copy(0, order_A, slots), room_E.cumsum(0), number


def ragged_linear(x_NI: Tensor, weight_EOI: Tensor, ends_E: Tensor) -> Tensor:
    """As `expert_linear` for experts with different numbers of rows: (N, I), (E, O, I), (E,) -> (N, O).

    Expert e has the rows from ends[e - 1] to ends[e]; rows from ends[-1] on come out as zero.
    """
    return _ragged_mm(*autocast_to(x_NI, weight_EOI), ends_E)


# Custom operators, since `torch.compile` cannot look into a loop whose sizes depend on the data.
@torch.library.custom_op("mixture_of_tokens::ragged_mm", mutates_args=(), tags=WAITS)
def _ragged_mm(x_NI: Tensor, weight_EOI: Tensor, ends_E: Tensor) -> Tensor:
    if len(x_NI) <= len(ends_E):  # as where texts are written: most experts have no row
        expert_N = torch.searchsorted(ends_E, torch.arange(len(x_NI), device=x_NI.device), right=True)
        weight_NOI = weight_EOI[expert_N.clamp(max=len(ends_E) - 1)]
        return torch.bmm(x_NI[:, None], weight_NOI.mT)[:, 0].masked_fill(expert_N[:, None] == len(ends_E), 0)
    if _at_once(x_NI, weight_EOI):
        y_NO = F.grouped_mm(x_NI, weight_EOI.mT, offs=ends_E.to(torch.int32))
    else:
        y_NO = x_NI.new_empty(len(x_NI), weight_EOI.shape[1])
        for rows, weight_OI in zip(_row_slices(ends_E), weight_EOI, strict=True):
            torch.mm(x_NI[rows], weight_OI.T, out=y_NO[rows])
    y_NO[int(ends_E[-1]) :] = 0
    return y_NO


@torch.library.custom_op("mixture_of_tokens::ragged_weight_gradient", mutates_args=(), tags=WAITS)
def _ragged_weight_gradient(grad_NO: Tensor, x_NI: Tensor, ends_E: Tensor) -> Tensor:
    if _at_once(grad_NO, x_NI):
        return F.grouped_mm(grad_NO.mT, x_NI, offs=ends_E.to(torch.int32))
    grad_EOI = x_NI.new_empty(len(ends_E), grad_NO.shape[1], x_NI.shape[1])
    for rows, grad_OI in zip(_row_slices(ends_E), grad_EOI, strict=True):
        torch.mm(grad_NO[rows].T, x_NI[rows], out=grad_OI)
    return grad_EOI


def _at_once(*operands: Tensor) -> bool:
    """Whether torch multiplies these in one call: not in float64, nor rows that are no multiple of 16 bytes."""
    rows = [length * x.itemsize for x in operands for length in x.shape[1:]]
    return operands[0].dtype != torch.float64 and not any(length % 16 for length in rows)


def _row_slices(ends_E: Tensor) -> list[slice]:
    ends = ends_E.tolist()
    return [slice(start, end) for start, end in zip([0, *ends[:-1]], ends, strict=True)]


def _save_for_backward(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _ragged_backward(ctx, grad_NO):
    x_NI, weight_EOI, ends_E = ctx.saved_tensors
    grad_NI = _ragged_mm(grad_NO, weight_EOI.mT, ends_E)
    return grad_NI, _ragged_weight_gradient(grad_NO, x_NI, ends_E), None


_ragged_mm.register_fake(lambda x, weight, ends: x.new_empty(len(x), weight.shape[1]))
_ragged_weight_gradient.register_fake(lambda g, x, ends: x.new_empty(len(ends), g.shape[1], x.shape[1]))
_ragged_mm.register_autograd(_ragged_backward, setup_context=_save_for_backward)
