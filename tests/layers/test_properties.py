"""What the layers promise of any weights and any input: nobody's future, nobody else's group.

A property is a `check_...` that asserts. Beside each stands a control: a layer with the fault the check is for, which
it must flag, so that a check that sees nothing cannot pass for a promise that is kept.
"""

from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.gradcheck import GradcheckError
from torch.testing import assert_close

from routings import (
    CAUSAL,
    DROPLESS,
    DROPPING,
    EXPERT_CHOICES,
    GROUPED,
    MIXTURES,
    ROUTINGS,
    SOFT,
    THRESHOLDS,
    B,
    D,
    E,
    Faulty,
    G,
    T,
    build,
    some_mask,
    tokens,
)


def along_the_sequence(layer, x, mask):
    """Groups are neighbouring positions of one example."""
    return layer(x.transpose(0, 1), None if mask is None else mask.T).transpose(0, 1)


def with_shifted_groups(layer, x, mask):
    """Row 1 opens the first group."""
    return layer(x.roll(-1, 0), None if mask is None else mask.roll(-1, 0)).roll(1, 0)


def by_row_number(layer, x, mask):
    """What a token gets depends on its place in the batch."""
    return layer(x, mask) * torch.arange(1, 1 + len(x), dtype=x.dtype)[:, None, None]


# Causality. The weights are float64, so that Token Choice's order of summation, which does depend on how many rows an
# expert has and thus on later tokens, stays far below what a leak would be.


def check_causal(layer: nn.Module, mask: Tensor | None, *, bitwise: bool) -> None:
    """Whatever follows position k, in the example and in its group-mates, moves nothing up to k and moves the rest."""
    x, other = tokens(), 3 * tokens(seed=5)
    y = layer(x, mask)
    for k in range(T - 1):
        corrupted = torch.cat([x[:, : k + 1], other[:, k + 1 :]], dim=1)
        y_corrupted = layer(corrupted, mask)
        assert_close(y_corrupted[:, : k + 1], y[:, : k + 1], rtol=0, atol=0 if bitwise else 1e-12)
        assert (y_corrupted - y)[:, k + 1 :].abs().amax(dim=(0, 2)).min() > 1e-3


@pytest.mark.parametrize("mask", [None, some_mask()], ids=["unmasked", "masked"])
@pytest.mark.parametrize("name", CAUSAL)
def test_no_output_depends_on_a_later_token(name, mask):
    check_causal(build(name), mask, bitwise=name in GROUPED)


@pytest.mark.parametrize("name", SOFT)
def test_soft_moe_depends_on_later_tokens_of_its_own_text(name):
    with pytest.raises(AssertionError, match="not close"):
        check_causal(build(name), None, bitwise=False)


@pytest.mark.xfail(strict=True, raises=AssertionError, reason="experts that take the best of a sequence know its end")
def test_expert_choice_along_the_sequence_is_causal():
    check_causal(Faulty(build("ec_takes_2"), along_the_sequence), None, bitwise=False)


@pytest.mark.parametrize("name", MIXTURES | DROPPING)
def test_mixing_or_dropping_along_the_sequence_is_caught(name):
    with pytest.raises(AssertionError, match="not close"):
        check_causal(Faulty(build(name), along_the_sequence), None, bitwise=False)


# Isolation.


def check_isolated(layer: nn.Module, group_size: int, mask: Tensor | None, rows: int) -> None:
    """An example moves its own group's outputs and no others'."""
    x, real = tokens(rows, T, D), torch.ones(rows, T, dtype=torch.bool) if mask is None else mask
    y = layer(x, mask)
    for j in range(rows):
        changed = x.clone()
        changed[j] = 3 * tokens(T, D, seed=5)
        moved = ((layer(changed, mask) - y).abs() > 1e-12).any(-1)
        own = torch.arange(rows) // group_size == j // group_size
        assert not moved[~own].any()
        expected = real[own] & real[j]  # where example j is real it moves every real token of its group
        assert moved[own].equal(expected)


@pytest.mark.parametrize(("rows", "masked"), [(B, False), (B, True), (10, False), (2, False)])
@pytest.mark.parametrize("name", MIXTURES)
def test_an_example_moves_its_own_group_and_no_other(name, rows, masked):
    check_isolated(build(name), G, some_mask() if masked else None, rows)


@pytest.mark.parametrize("name", MIXTURES)
def test_groups_in_the_wrong_rows_are_caught(name):
    with pytest.raises(AssertionError):
        check_isolated(Faulty(build(name), with_shifted_groups), G, None, B)


@pytest.mark.parametrize("name", DROPLESS | SOFT)
def test_what_is_private_moves_only_the_example_itself(name):
    check_isolated(build(name), 1, some_mask(), B)


@pytest.mark.parametrize("name", THRESHOLDS)
def test_with_thresholds_an_example_moves_no_other(name):
    """Its own tokens may have no expert before and after."""
    layer, x, mask = build(name), tokens(), some_mask()
    y = layer(x, mask)
    for j in range(B):
        changed = x.clone()
        changed[j] = 3 * tokens(T, D, seed=5)
        moved = ((layer(changed, mask) - y).abs() > 1e-12).any(-1)
        assert moved[j].any()
        assert not moved[torch.arange(B) != j].any()


def test_expert_choice_moves_within_the_group_only():
    layer, x = build("ec_takes_1"), tokens()
    y, companions_moved = layer(x), False
    for j in range(B):
        changed = x.clone()
        changed[j] = 3 * tokens(T, D, seed=5)
        moved = ((layer(changed) - y).abs() > 1e-12).flatten(1).any(1)
        own = torch.arange(B) // G == j // G
        assert not moved[~own].any()
        assert moved[j]
        companions_moved |= bool(moved[own].sum() > 1)
    assert companions_moved  # the experts' choice did change


# Equivariance.


def check_equivariant(layer: nn.Module, rows: Tensor, mask: Tensor | None) -> None:
    x = tokens()
    assert_close(layer(x[rows], None if mask is None else mask[rows]), layer(x, mask)[rows])


WITHIN_GROUPS, OF_GROUPS, ACROSS_GROUPS = [2, 0, 1, 4, 5, 3], [3, 4, 5, 0, 1, 2], [0, 4, 2, 3, 1, 5]


@pytest.mark.parametrize("mask", [None, some_mask()], ids=["unmasked", "masked"])
@pytest.mark.parametrize("permutation", [WITHIN_GROUPS, OF_GROUPS], ids=["within_groups", "of_groups"])
@pytest.mark.parametrize("name", GROUPED)
def test_outputs_follow_a_permutation(name, permutation, mask):
    check_equivariant(build(name), torch.tensor(permutation), mask)
    with pytest.raises(AssertionError, match="not close"):
        check_equivariant(Faulty(build(name), by_row_number), torch.tensor(permutation), mask)
    with pytest.raises(AssertionError, match="not close"):
        check_equivariant(build(name), torch.tensor(ACROSS_GROUPS), mask)


@pytest.mark.parametrize("name", DROPLESS | THRESHOLDS | SOFT)
def test_outputs_of_what_is_private_follow_any_permutation(name):
    check_equivariant(build(name), torch.tensor(ACROSS_GROUPS), some_mask())


@pytest.mark.parametrize("name", ROUTINGS)
def test_experts_may_be_renumbered_with_their_router_rows(name):
    layer, renumbered, x = build(name), build(name), tokens()
    order = torch.randperm(E, generator=torch.Generator().manual_seed(0))
    assert not order.equal(torch.arange(E))
    with torch.no_grad():
        for weight in renumbered.experts.parameters():
            weight.copy_(weight[order])
    if renumbered.gate is not None:
        assert not torch.allclose(renumbered(x), layer(x))  # the control: the rows alone are not enough
        with torch.no_grad():
            slots = renumbered.gate.weight.unflatten(0, (E, -1))  # one, but in Soft MoE
            renumbered.gate.weight.copy_(slots[order].flatten(0, 1))
            for name in ("selection_bias", "default_output", "threshold"):
                if hasattr(renumbered, name):
                    getattr(renumbered, name).copy_(getattr(renumbered, name)[order])
    assert_close(renumbered(x), layer(x))


# Weights, gradients.


def check_weights(weights_MGE: Tensor, real_MG: Tensor) -> None:
    """Not negative, zero where masked, one in sum for each expert of a group with anything real."""
    assert weights_MGE.min() >= 0
    some = real_MG.any(1)
    assert not weights_MGE[some][~real_MG[some]].any()
    assert_close(weights_MGE.sum(1)[some], torch.ones_like(weights_MGE[some, 0]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", MIXTURES)
def test_weights_over_a_group_sum_to_one(name, dtype):
    layer, real_MG = build(name, dtype=dtype, temperature=0.125), some_mask().unflatten(0, (-1, G)).mT.flatten(0, 1)
    x_MGD = tokens(len(real_MG), G, D, dtype=dtype)
    weights_MGE = layer.weights(x_MGD, real_MG[..., None])
    check_weights(weights_MGE, real_MG)
    check_weights(layer.weights(x_MGD), torch.ones_like(real_MG))
    with pytest.raises(AssertionError):
        check_weights(layer.weights(x_MGD), real_MG)
    with pytest.raises(AssertionError):  # a softmax over the experts
        check_weights(weights_MGE.log().softmax(-1).nan_to_num(), real_MG)


def check_gradients(layer: nn.Module, mask: Tensor | None) -> None:
    x = tokens().requires_grad_()
    layer.zero_grad()
    layer(x, mask).backward(tokens(seed=3))
    real = torch.ones(B, T, dtype=torch.bool) if mask is None else mask
    assert x.grad is not None
    assert x.grad.isfinite().all()
    assert not x.grad[~real].any()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.norm() > 1e-6, name


@pytest.mark.parametrize("mask", [None, some_mask()], ids=["unmasked", "masked"])
@pytest.mark.parametrize("name", ROUTINGS)
def test_every_parameter_gets_a_finite_gradient(name, mask):
    check_gradients(build(name), mask)


@pytest.mark.parametrize("name", EXPERT_CHOICES | DROPLESS | THRESHOLDS | SOFT)
def test_a_learnable_temperature_gets_a_finite_gradient(name):
    check_gradients(build(name, learnable_temperature=True), None)


def test_a_parameter_without_a_gradient_is_caught():
    layer = build("mot_learnable_temperature")
    layer.register_parameter("unused", nn.Parameter(torch.ones(())))
    with pytest.raises(AssertionError, match="unused"):
        check_gradients(layer, None)


def check_derivative(layer: nn.Module, x: Tensor, mask: Tensor | None, check=torch.autograd.gradcheck) -> None:
    names, values = zip(*layer.named_parameters(), strict=True)

    def call(x, *values):
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x, mask))

    assert check(call, (x.requires_grad_(), *values))


@pytest.mark.parametrize("name", ROUTINGS)
def test_gradcheck(name):
    layer, x = build(name, hidden_size=3, expert_size=2), tokens(4, 2, 3)
    check_derivative(layer, x, some_mask(4, 2))
    check_derivative(layer, x, None)


second = partial(torch.autograd.gradgradcheck, fast_mode=True)


@pytest.mark.parametrize(
    "rows", [4, pytest.param(40, marks=pytest.mark.slow)], ids=["few_tokens", "many_tokens"]
)  # for which sparse routings differ
@pytest.mark.parametrize("name", ROUTINGS)
def test_gradgradcheck(name, rows):
    layer = build(name, hidden_size=3, expert_size=2)
    check_derivative(layer, tokens(rows, 2, 3), some_mask(rows, 2), second)
    check_derivative(layer, tokens(rows, 2, 3), None, second)


def check_functional_gradients(layer: nn.Module, x: Tensor) -> None:
    """`torch.func`'s gradients and Jacobians are those of autograd."""
    names, values = zip(*layer.named_parameters(), strict=True)

    def call(values, x):
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,)).square().sum()

    values = tuple(value.detach().requires_grad_() for value in values)
    assert_close(torch.func.grad(call)(values, x), torch.autograd.grad(call(values, x), values))
    assert_close(torch.func.jacrev(layer)(x), torch.autograd.functional.jacobian(layer, x))


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")  # of torch's embedding_bag
@pytest.mark.parametrize("name", MIXTURES | EXPERT_CHOICES | DROPPING | SOFT)
def test_functional_gradients(name):
    check_functional_gradients(build(name, hidden_size=3, expert_size=2), tokens(4, 2, 3))


def test_an_autograd_function_of_the_older_form_is_caught():
    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return 2 * x

        @staticmethod
        def backward(ctx, grad):
            return 2 * grad

    layer = Faulty(build("mot", hidden_size=3), lambda layer, x, mask: Twice.apply(layer(x, mask)))
    with pytest.raises(RuntimeError, match="must override the setup_context"):
        check_functional_gradients(layer, tokens(4, 2, 3))


def test_a_wrong_second_derivative_is_caught():
    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(2 * x)  # neither an input nor an output, so a constant to autograd
            return x.square()

        @staticmethod
        def backward(ctx, grad):
            return grad * ctx.saved_tensors[0]

    layer, x = build("mot", hidden_size=3, expert_size=2), tokens(4, 2, 3)
    layer = Faulty(layer, lambda layer, x, mask: Square.apply(layer(x, mask)))
    check_derivative(layer, x, None)
    with pytest.raises(GradcheckError):
        check_derivative(layer, x, None, second)


def test_a_wrong_derivative_is_caught():
    def detached_weights(layer, x, mask):
        return layer(x, mask) + 1e-2 * layer.weights(x).sum(-1, keepdim=True).detach()

    with pytest.raises(GradcheckError):
        check_derivative(Faulty(build("mot", hidden_size=3), detached_weights), tokens(4, 2, 3), None)
