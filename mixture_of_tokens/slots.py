"""Tokens to the experts of sparse routings and back, and the products of experts with uneven numbers of rows.

A slot is a row that an expert reads; an expert's slots are neighbours. Tokens go to slots by a gather and come back by
another, and so do their gradients: torch's index_add, and its gradient of an index, are several times slower on a CPU.
Shape letters as in `layers.py`, and N slots.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from mixture_of_tokens.layers import Routed
from mixture_of_tokens.layout import autocast_to, expert_linear

ROWS_MULTIPLE = 16
SMALL, SMALL_MULTIPLE = 2**17, 32  # bytes of an expert that a CPU multiplies with others at once, and of its rows
COPIED = 2**22  # weights that are copied at most, where an expert has few rows, as where text is written
FEW = 4  # rows of an expert on average
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

    slot_A: an assignment's slot. kept_A: false where it has none; slot_A is then 0 and means nothing.
    start_S: a token's first assignment.
    token_N, assignment_N: what is in a slot; S and A where it is empty.
    """

    slot_A: Tensor
    kept_A: Tensor
    start_S: Tensor
    token_N: Tensor
    assignment_N: Tensor

    @classmethod
    def of(cls, token_A: Tensor, slot_A: Tensor, num_slots: int, num_tokens: int) -> "Slots":
        """By the token of each assignment, in order, and its slot, which is N where it is dropped."""
        A, device = len(token_A), token_A.device
        empty_N = slot_A.new_full((num_slots + 1,), A)
        assignment_N = empty_N.index_copy(0, slot_A, torch.arange(A, device=device))[:-1]
        kept_A = slot_A < num_slots
        return cls(
            slot_A=slot_A.masked_fill(~kept_A, 0),
            kept_A=kept_A,
            start_S=torch.searchsorted(token_A, torch.arange(num_tokens, device=device)),
            token_N=F.pad(token_A, (0, 1), value=num_tokens).index_select(0, assignment_N),
            assignment_N=assignment_N,
        )

    def dispatch(self, x_SD: Tensor) -> Tensor:
        """What is in the slots: (S, D) -> (N, D)."""
        return _Dispatch.apply(*autocast_to(x_SD), self.token_N, self.slot_A, self.start_S, self.kept_A)

    def combine(self, y_ND: Tensor, gate_A: Tensor) -> Tensor:
        """The sum of gate[a] * y[slot[a]] over the assignments of each token that are kept: (N, D), (A,) -> (S, D)."""
        gate_A = (gate_A * self.kept_A).to(y_ND.dtype)
        return _Combine.apply(y_ND, gate_A, self.token_N, self.assignment_N, self.slot_A, self.start_S)


def dropless(layer: Routed, x_SD: Tensor, token_A: Tensor, expert_A: Tensor, gate_A: Tensor) -> Tensor:
    """The sum of gate[a] * FFN_expert[a](x[token[a]]) over the assignments of each token: (S, D).

    Assignments are token by token; those to expert E, which there is not, count nothing, and have gate 0.
    """
    experts, E = layer.experts, layer.num_experts
    if len(expert_A) <= min(FEW * E, COPIED // layer.weights_of_an_expert):
        which_A, x_A1D = expert_A.clamp(max=E - 1), x_SD.index_select(0, token_A)[:, None]
        y_A1D = experts(x_A1D, lambda x, weight: expert_linear(x, weight.index_select(0, which_A)))
        y_AD = (gate_A[:, None] * y_A1D[:, 0]).masked_fill(expert_A[:, None] == E, 0)
        return y_AD.new_zeros(x_SD.shape).index_add(0, token_A, y_AD)
    slot_A, room, num_slots = slots_without_limit(expert_A, E, rows_multiple(layer, x_SD, len(expert_A) // E))
    slots = Slots.of(token_A, slot_A, num_slots, len(x_SD))
    y_ND = experts(slots.dispatch(x_SD), lambda x, weight: ragged_linear(x, weight, room))
    return slots.combine(y_ND, gate_A)


class Room(NamedTuple):
    """Where the slots of each expert end, in the order in which experts lie there, and this order."""

    ends_E: Tensor
    order_E: Tensor


def rows_multiple(layer: Routed, x_SD: Tensor, mean_rows: int) -> int:
    """To which multiple an expert's rows are rounded up.

    On a CPU small experts are multiplied many at once, those with equally many rows. For others in 16 bits oneDNN
    compiles a product for each number of rows, which takes ten times as long as the product.
    """
    (like,) = autocast_to(x_SD.new_empty(0))
    if like.device.type != "cpu" or not mean_rows:
        return 1
    if layer.weights_of_an_expert * like.itemsize <= SMALL:
        return min(SMALL_MULTIPLE, 2 ** (mean_rows.bit_length() - 1))
    return ROWS_MULTIPLE if like.itemsize == 2 else 1


def slots_without_limit(expert_A: Tensor, num_experts: int, multiple: int) -> tuple[Tensor, Room, int]:
    """The slot of each assignment, where the experts' slots are, and the number of slots.

    Assignments to expert `num_experts`, which there is not, get the last slots, for which `ragged_linear` gives zeros.
    On a CPU experts lie in the order of their numbers of slots.
    """
    A, device = len(expert_A), expert_A.device
    sorted_A, order_A = expert_A.sort(stable=True)
    ends_E = torch.searchsorted(sorted_A, torch.arange(num_experts, device=device), right=True)
    load_E = _sizes(ends_E)
    size_E = -(-load_E // multiple) * multiple
    order_E = size_E.argsort(stable=True) if device.type == "cpu" else torch.arange(num_experts, device=device)
    room = Room(size_E[order_E].cumsum(0), order_E)
    start_E = torch.empty_like(ends_E).index_copy(0, order_E, room.ends_E - size_E[order_E])
    # From an assignment's place among all to its slot; those to no expert come after all slots of the others.
    shift_E = torch.cat([start_E - (ends_E - load_E), room.ends_E[-1:] - ends_E[-1:]])
    slot_of_sorted_A = torch.arange(A, device=device) + shift_E[sorted_A]
    slot_A = torch.empty_like(order_A).index_copy(0, order_A, slot_of_sorted_A)
    return slot_A, room, A + min(A, num_experts) * (multiple - 1)


def ragged_linear(x_NI: Tensor, weight_EOI: Tensor, room: Room) -> Tensor:
    """As `expert_linear` for experts with different numbers of rows: (N, I), (E, O, I) -> (N, O).

    The expert order[e] has the rows from ends[e - 1] to ends[e]; rows from ends[-1] on come out as zero.
    """
    return _ragged_mm(*autocast_to(x_NI, weight_EOI), *room)


# Custom operators: `torch.compile` can look neither into a loop whose sizes depend on the data nor, in fp32, into
# `grouped_mm`.
@torch.library.custom_op("mixture_of_tokens::ragged_mm", mutates_args=(), tags=WAITS)
def _ragged_mm(x_NI: Tensor, weight_EOI: Tensor, ends_E: Tensor, order_E: Tensor) -> Tensor:
    x_NI = x_NI.contiguous()
    if len(x_NI) > len(ends_E) and _in_one_call(x_NI, weight_EOI):
        y_NO = F.grouped_mm(x_NI, weight_EOI.mT, offs=ends_E.to(torch.int32))
    else:
        y_NO = x_NI.new_empty(len(x_NI), weight_EOI.shape[1])
        for rows, shape, which in _runs(ends_E, order_E, weight_EOI[0]):
            if rows.start < rows.stop:  # where text is written, most experts have no row
                x_nRI, y_nRO = (each[rows].unflatten(0, shape) for each in (x_NI, y_NO))
                weight_nOI = weight_EOI[which] if isinstance(which, slice) else weight_EOI.index_select(0, which)
                torch.bmm(x_nRI, weight_nOI.mT, out=y_nRO)
    if x_NI.device.type == "cpu":
        y_NO[int(ends_E[-1]) :] = 0
    else:  # without waiting for the device
        y_NO.masked_fill_(torch.arange(len(y_NO), device=y_NO.device)[:, None] >= ends_E[-1], 0)
    return y_NO


@torch.library.custom_op("mixture_of_tokens::ragged_weight_gradient", mutates_args=(), tags=WAITS)
def _ragged_weight_gradient(grad_NO: Tensor, x_NI: Tensor, ends_E: Tensor, order_E: Tensor) -> Tensor:
    grad_NO, x_NI = grad_NO.contiguous(), x_NI.contiguous()
    if _in_one_call(grad_NO, x_NI):
        grad_EOI = F.grouped_mm(grad_NO.mT, x_NI, offs=ends_E.to(torch.int32))
        if grad_EOI.device.type != "cpu":  # on some GPUs experts without rows get what was in memory (pytorch 172439)
            grad_EOI.masked_fill_((_sizes(ends_E) == 0)[:, None, None], 0)
        return grad_EOI
    grad_EOI = x_NI.new_empty(len(ends_E), grad_NO.shape[1], x_NI.shape[1])
    for rows, shape, which in _runs(ends_E, order_E, grad_EOI[0]):
        grad_nRO, x_nRI = (each[rows].unflatten(0, shape) for each in (grad_NO, x_NI))
        if isinstance(which, slice):
            torch.bmm(grad_nRO.mT, x_nRI, out=grad_EOI[which])
        else:
            grad_EOI.index_copy_(0, which, torch.bmm(grad_nRO.mT, x_nRI))
    return grad_EOI


def _in_one_call(*operands: Tensor) -> bool:
    """Whether `grouped_mm` takes these, and is more than a loop.

    On a GPU; not float64, nor rows or addresses that are no multiples of 16 bytes.
    """
    if operands[0].device.type == "cpu":
        return False
    sizes = [length * x.itemsize for x in operands for length in x.shape[1:]]
    aligned = not any(number % 16 for number in (*sizes, *(x.data_ptr() for x in operands)))
    return operands[0].dtype != torch.float64 and aligned


def _sizes(ends_E: Tensor) -> Tensor:
    return ends_E.diff(prepend=ends_E.new_zeros(1))


def _runs(
    ends_E: Tensor, order_E: Tensor, matrix_OI: Tensor
) -> Iterator[tuple[slice, tuple[int, int], slice | Tensor]]:
    """Experts that are multiplied at once: their rows, how many experts and rows of each, and which experts.

    Neighbours with equally many rows, a power of two of them, as oneDNN compiles a product for each number of matrices
    too; experts with large matrices one by one.
    """
    sizes, first, start = _sizes(ends_E).tolist(), 0, 0
    at_once = matrix_OI.numel() * matrix_OI.itemsize <= SMALL
    experts = [] if at_once else order_E.tolist()
    while first < len(sizes):
        size, number = sizes[first], 1
        while at_once and sizes[first : first + 2 * number] == [size] * (2 * number):
            number *= 2
        rows = slice(start, start + number * size)
        which = order_E[first : first + number] if at_once else slice(experts[first], experts[first] + 1)
        yield rows, (number, size), which
        first, start = first + number, rows.stop


def _save_for_backward(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _ragged_backward(ctx, grad_NO):
    x_NI, weight_EOI, ends_E, order_E = ctx.saved_tensors
    grad_NI = _ragged_mm(grad_NO, weight_EOI.mT, ends_E, order_E)
    return grad_NI, _ragged_weight_gradient(grad_NO, x_NI, ends_E, order_E), None, None


_ragged_mm.register_fake(lambda x, weight, ends, order: x.new_empty(len(x), weight.shape[1]))
_ragged_weight_gradient.register_fake(lambda g, x, ends, order: x.new_empty(len(ends), g.shape[1], x.shape[1]))
_ragged_mm.register_autograd(_ragged_backward, setup_context=_save_for_backward)
