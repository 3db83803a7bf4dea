"""Tokens to the experts of sparse routings and back, and the products of experts with uneven numbers of rows.

A slot is a row that an expert reads; an expert's slots are neighbours. Tokens go to slots by a gather and come back by
another, and so do their gradients: torch's index_add, and its gradient of an index, are several times slower on a CPU.
Shape letters as in `mixture.py`, and N slots. Sizes are read from `shape`: `len` would be a constant to the compiler.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from mixture_of_tokens.layers.experts import Routed
from mixture_of_tokens.layers.grouping import applied, autocast_to, expert_linear, save_inputs

SMALL = 2**17  # bytes of an expert, up to which a CPU multiplies several at once
COPIED = 2**22  # weights that are copied at most, where an expert has few rows, as where text is written
FEW = 4  # rows of an expert on average
WAITS = (torch.Tag.cudagraph_unsafe,)  # the host waits for the device, to know the sizes


class _ToSlots(torch.autograd.Function):
    @staticmethod
    def forward(x_SD, token_N, slot_A, start_S, kept_A):
        return _at_rows(x_SD, token_N)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[2:])

    @staticmethod
    def backward(ctx, grad_ND):
        slot_A, start_S, kept_A = ctx.saved_tensors
        return _sum_by_token(grad_ND, slot_A, start_S, kept_A.to(grad_ND.dtype)), None, None, None, None


class _FromSlots(torch.autograd.Function):
    @staticmethod
    def forward(y_ND, gate_A, token_N, assignment_N, slot_A, start_S):
        return _sum_by_token(y_ND, slot_A, start_S, gate_A)

    setup_context = staticmethod(save_inputs)

    @staticmethod
    def backward(ctx, grad_SD):
        y_ND, gate_A, token_N, assignment_N, slot_A, _ = ctx.saved_tensors
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
        """From each assignment's token, in ascending order, and its slot, which is `num_slots` where it is dropped."""
        A, device = token_A.shape[0], token_A.device
        empty_N = slot_A.new_full((num_slots + 1,), A)
        assignment_N = empty_N.index_copy(0, slot_A, torch.arange(A, device=device))[:-1]
        kept_A = slot_A < num_slots
        return cls(
            slot_A=slot_A.masked_fill(~kept_A, 0),
            kept_A=kept_A,
            start_S=torch.searchsorted(token_A, torch.arange(num_tokens, device=device)),
            token_N=torch.cat([token_A, token_A.new_full((1,), num_tokens)]).index_select(0, assignment_N),
            assignment_N=assignment_N,
        )

    def dispatch(self, x_SD: Tensor) -> Tensor:
        """What is in the slots: (S, D) -> (N, D)."""
        return applied(_ToSlots, *autocast_to(x_SD), self.token_N, self.slot_A, self.start_S, self.kept_A)

    def of_assignments(self, values_A: Tensor) -> Tensor:
        """Each slot's: (A,) -> (N,); 0 for one that is empty."""
        return _at_rows(values_A[:, None], self.assignment_N)[:, 0]

    def combine(self, y_ND: Tensor, gate_A: Tensor) -> Tensor:
        """The sum of gate[a] * y[slot[a]] over the assignments of each token that are kept: (N, D), (A,) -> (S, D)."""
        gate_A = (gate_A * self.kept_A).to(y_ND.dtype)
        return applied(_FromSlots, y_ND, gate_A, self.token_N, self.assignment_N, self.slot_A, self.start_S)


def dropless(
    layer: Routed,
    x_SD: Tensor,
    expert: Tensor,
    gate: Tensor,
    token_A: Tensor | None = None,
    read: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None,
    seen: Callable[[Tensor, Tensor], object] | None = None,
) -> Tensor:
    """The sum of gate[a] * FFN_expert[a](x[token[a]]) over the assignments of each token: (S, D).

    Those of masked tokens, which must be zeros, are to expert E, which does not exist, with gate 0, and add nothing.

    Args:
        expert, gate: (S, K), or (A,) of assignments to these tokens, in ascending order.
        read: called with tokens (..., D), the experts' numbers (...) and gates (...); gives what experts read instead.
        seen: called with what experts give (N, D), and their numbers (N,); rows of zeros may have any number.
    """
    experts, E, (S, D), A = layer.experts, layer.num_experts, x_SD.shape, expert.numel()
    few = min(FEW * E, COPIED // layer.weights_of_an_expert)
    known = expert.clamp(max=E - 1) if read is None else expert  # where experts read mixtures, none is missing
    if few >= A:
        x = x_SD[:, None] if token_A is None else x_SD.index_select(0, token_A)
        x = x.expand(*expert.shape, D) if read is None else read(x, known, gate)
        which_A = known.flatten()
        y_A1D = experts(x.reshape(A, 1, D), lambda x, weight: expert_linear(x, weight.index_select(0, which_A)))
        if seen is not None:
            seen(y_A1D[:, 0], which_A)
        y = gate[..., None] * y_A1D.view(*expert.shape, D)
        return y.sum(1) if token_A is None else y.new_zeros(S, D).index_add(0, token_A, y)
    if token_A is None:
        token_A = torch.arange(S, device=x_SD.device).repeat_interleave(A // S)
    expert_A, gate_A = expert.flatten(), gate.flatten()
    order = order_of_slots(layer, x_SD, A // E)
    slot_A, ends_E, order_E, num_slots = slots_without_limit(expert_A, E, *order)
    slots = Slots.of(token_A, slot_A, num_slots, S)
    x_ND = slots.dispatch(x_SD)
    if read is not None:
        x_ND = read(x_ND, slots.of_assignments(known.flatten()), slots.of_assignments(gate_A))
    y_ND = experts(x_ND, lambda x, weight: ragged_linear(x, weight, ends_E, order_E))
    if seen is not None:
        seen(y_ND, slots.of_assignments(known.flatten()))
    return slots.combine(y_ND, gate_A)


def order_of_slots(layer: Routed, x_SD: Tensor, mean_rows: int) -> tuple[int, bool]:
    """The multiple that an expert's rows are rounded up to, and whether experts are sorted by their numbers of rows.

    On a CPU small experts are sorted, and those with equally many rows are multiplied at once. Large experts in 16 bits
    are rounded up, because oneDNN compiles a product for each number of rows, ten times as long as the product takes.
    """
    (like,) = autocast_to(x_SD.new_empty(0))
    if like.device.type != "cpu" or mean_rows == 0:
        return 1, False
    if layer.weights_of_an_expert * like.itemsize <= SMALL:
        most = mean_rows if like.itemsize == 2 else max(1, mean_rows // 4)  # products of empty rows cost more in fp32
        return next(multiple for multiple in (32, 16, 8, 4, 2, 1) if multiple <= most), True
    return 16 if like.itemsize == 2 else 1, False


def slots_without_limit(
    expert_A: Tensor, num_experts: int, multiple: int, by_rows: bool
) -> tuple[Tensor, Tensor, Tensor | None, int]:
    """The slot of each assignment, where each expert's slots end, the order of the experts, and the number of slots.

    Assignments to expert `num_experts`, which does not exist, get the last slots, where `ragged_linear` gives zeros.

    Args:
        multiple: each expert gets a multiple of so many slots.
        by_rows: sort experts by their numbers of slots; else they keep their own order, and the one returned is None.
    """
    A, device = expert_A.shape[0], expert_A.device
    sorted_A, order_A = expert_A.sort(stable=True)
    ends_E = torch.searchsorted(sorted_A, torch.arange(num_experts, device=device), right=True)
    load_E = _sizes(ends_E)
    size_E = -(-load_E // multiple) * multiple
    order_E = size_E.argsort(stable=True) if by_rows else None
    sorted_E = size_E if order_E is None else size_E[order_E]
    last_E = sorted_E.cumsum(0)
    first_E = last_E - sorted_E if order_E is None else (last_E - sorted_E)[order_E.argsort()]
    # From an assignment's place among all to its slot; those to no expert come after all slots of the others.
    shift_E = torch.cat([first_E - (ends_E - load_E), last_E[-1:] - ends_E[-1:]])
    slot_of_sorted_A = torch.arange(A, device=device) + shift_E[sorted_A]
    slot_A = torch.empty_like(order_A).index_copy(0, order_A, slot_of_sorted_A)
    return slot_A, last_E, order_E, A + min(A, num_experts) * (multiple - 1)


def ragged_linear(x_NI: Tensor, weight_EOI: Tensor, ends_E: Tensor, order_E: Tensor | None = None) -> Tensor:
    """As `expert_linear` for experts with different numbers of rows: (N, I), (E, O, I), (E,) -> (N, O).

    Expert e, or with an order the expert order[e], has the rows from ends[e - 1] to ends[e]; rows from ends[-1] on come
    out as zero.
    """
    (x_NI,) = autocast_to(x_NI)
    if order_E is not None:  # small ones, on a CPU
        weight_EOI = weight_EOI.to(x_NI.dtype).index_select(0, order_E)
    return _ragged_mm(x_NI, weight_EOI, ends_E)


# Custom operators: `torch.compile` can look neither into a loop whose sizes depend on the data nor, in fp32, into
# `grouped_mm`.
@torch.library.custom_op("mixture_of_tokens::ragged_mm", mutates_args=(), tags=WAITS)
def _ragged_mm(x_NI: Tensor, weight_EOI: Tensor, ends_E: Tensor) -> Tensor:
    x_NI, weight_EOI = x_NI.contiguous(), weight_EOI.to(x_NI.dtype)  # in here, as in `layout._ExpertLinear`
    if len(x_NI) > len(ends_E) and _in_one_call(ends_E, x_NI, weight_EOI):
        y_NO = F.grouped_mm(x_NI, weight_EOI.mT, offs=ends_E.to(torch.int32))
    else:
        y_NO = x_NI.new_empty(len(x_NI), weight_EOI.shape[1])
        for which, rows, shape in _runs(ends_E):
            if rows.start < rows.stop:  # where text is written, most experts have no row
                x_nRI, y_nRO = (each[rows].unflatten(0, shape) for each in (x_NI, y_NO))
                torch.bmm(x_nRI, weight_EOI[which].mT, out=y_nRO)
    if x_NI.device.type == "cpu":
        y_NO[int(ends_E[-1]) :] = 0
    else:  # without waiting for the device
        y_NO.masked_fill_(torch.arange(len(y_NO), device=y_NO.device)[:, None] >= ends_E[-1], 0)
    return y_NO


@torch.library.custom_op("mixture_of_tokens::ragged_weight_gradient", mutates_args=(), tags=WAITS)
def _ragged_weight_gradient(grad_NO: Tensor, x_NI: Tensor, ends_E: Tensor) -> Tensor:
    grad_NO, x_NI = grad_NO.contiguous(), x_NI.contiguous()
    if _in_one_call(ends_E, grad_NO, x_NI):
        grad_EOI = F.grouped_mm(grad_NO.mT, x_NI, offs=ends_E.to(torch.int32))
        # On some GPUs experts without rows get what was in memory (pytorch 172439).
        return grad_EOI.masked_fill_((_sizes(ends_E) == 0)[:, None, None], 0)
    grad_EOI = x_NI.new_empty(len(ends_E), grad_NO.shape[1], x_NI.shape[1])
    for which, rows, shape in _runs(ends_E):
        grad_nRO, x_nRI = (each[rows].unflatten(0, shape) for each in (grad_NO, x_NI))
        torch.bmm(grad_nRO.mT, x_nRI, out=grad_EOI[which])
    return grad_EOI


def _in_one_call(ends_E: Tensor, *operands: Tensor) -> bool:
    """Whether `grouped_mm` takes these, and may be more than a loop.

    On a GPU; not float64, nor rows or addresses that are no multiples of 16 bytes, nor 1,024 experts or more.
    """
    if operands[0].device.type == "cpu" or len(ends_E) >= 1024:
        return False
    sizes = [length * x.itemsize for x in operands for length in x.shape[1:]]
    aligned = not any(number % 16 for number in (*sizes, *(x.data_ptr() for x in operands)))
    return operands[0].dtype != torch.float64 and aligned


def _sizes(ends_E: Tensor) -> Tensor:
    return ends_E.diff(prepend=ends_E.new_zeros(1))


def _runs(ends_E: Tensor) -> Iterator[tuple[slice, slice, tuple[int, int]]]:
    """Neighbours with equally many rows: which experts, their rows, and how many experts and rows of each.

    A power of two of experts at once, as oneDNN compiles a product for each number of matrices too.
    """
    sizes, first, start = _sizes(ends_E).tolist(), 0, 0
    while first < len(sizes):
        size, number = sizes[first], 1
        while sizes[first : first + 2 * number] == [size] * (2 * number):
            number *= 2
        end, stop = first + number, start + number * size
        yield slice(first, end), slice(start, stop), (number, size)
        first, start = end, stop


def _ragged_backward(ctx, grad_NO):
    x_NI, weight_EOI, ends_E = ctx.saved_tensors
    into_x, into_weight, _ = ctx.needs_input_grad  # experts may be frozen
    grad_NI = _ragged_mm(grad_NO, weight_EOI.mT, ends_E) if into_x else None
    grad_EOI = _ragged_weight_gradient(grad_NO, x_NI, ends_E).to(weight_EOI.dtype) if into_weight else None
    return grad_NI, grad_EOI, None


def _ragged_second_backward(ctx, grad_EOI):
    grad_NO, x_NI, ends_E = ctx.saved_tensors
    return _ragged_mm(x_NI, grad_EOI, ends_E), _ragged_mm(grad_NO, grad_EOI.mT, ends_E), None


_ragged_mm.register_fake(lambda x, weight, ends: x.new_empty(x.shape[0], weight.shape[1]))
_ragged_weight_gradient.register_fake(lambda g, x, ends: x.new_empty(ends.shape[0], g.shape[1], x.shape[1]))
_ragged_mm.register_autograd(_ragged_backward, setup_context=save_inputs)
_ragged_weight_gradient.register_autograd(_ragged_second_backward, setup_context=save_inputs)
