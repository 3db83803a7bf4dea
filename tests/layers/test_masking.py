"""Padding and masks: what is not real takes no part, whatever stands there.

As in `test_properties.py`, beside each check stands a layer with the fault that it must flag.
"""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.testing import assert_close

from mixture_of_tokens.layers.mixture import MixtureOfTokens
from routings import (
    DROPLESS,
    DROPPING,
    GROUPED,
    MIXTURES,
    ROUTINGS,
    THRESHOLDS,
    B,
    D,
    E,
    F,
    Faulty,
    G,
    T,
    build,
    gradients,
    randomized,
    some_mask,
    tokens,
)


def without_the_mask(layer, x, mask):
    return layer(x)


def masked_with_zeros(layer, x, mask):
    """Masked tokens take part as zeros, and get zeros by multiplication."""
    return layer(x * mask[..., None]) * mask[..., None]


def completed_with_zeros(layer, x, mask):
    """As an earlier port does: what is missing in a group are zeros that take part."""
    missing = -len(x) % layer.group_size
    return layer(functional.pad(x, (0, 0, 0, 0, 0, missing)))[: len(x)]


def padded(x: Tensor, mask: Tensor, sides: tuple[int, int, int], value: float) -> tuple[Tensor, Tensor]:
    """Masked tokens of a value: positions to the left, positions to the right, rows at the end."""
    left, right, rows = sides
    sizes = (left, right, 0, rows)
    return functional.pad(x, (0, 0, *sizes), value=value), functional.pad(mask, sizes, value=False)


SIDES = {"left": (2, 0, 0), "right": (0, 3, 0), "rows_to_a_group": (0, 0, 2), "more_rows": (0, 0, 7), "all": (1, 2, 4)}


def check_padding(layer: nn.Module, sides: tuple[int, int, int]) -> None:
    x, mask, cotangent = tokens(7, T, D), some_mask(7, T), tokens(7, T, D, seed=3)
    y, grads = gradients(layer, x, mask, cotangent)
    x_padded, mask_padded = padded(x, mask, sides, 100.0)
    cotangent_padded, _ = padded(cotangent, mask, sides, 100.0)
    y_padded, grads_padded = gradients(layer, x_padded, mask_padded, cotangent_padded)
    y_expected, _ = padded(y, mask, sides, 0.0)
    grads["x"], _ = padded(grads["x"], mask, sides, 0.0)
    assert_close(y_padded, y_expected)
    assert_close(grads_padded, grads)


@pytest.mark.parametrize("sides", SIDES)
@pytest.mark.parametrize("name", ROUTINGS)
def test_padding_changes_nothing(name, sides):
    check_padding(build(name), SIDES[sides])


@pytest.mark.parametrize("name", GROUPED)
def test_rows_that_complete_a_group_may_stand_anywhere_in_it(name):
    layer, x = build(name), tokens(2, T, D)
    wide = torch.stack([x[0], torch.full_like(x[0], 100.0), x[1]])
    y = layer(wide, torch.tensor([True, False, True])[:, None].expand(3, T))
    assert_close(y[[0, 2]], layer(x))


@pytest.mark.parametrize("fault", [without_the_mask, masked_with_zeros])
@pytest.mark.parametrize("name", MIXTURES | DROPPING)
def test_padding_that_takes_part_is_caught(name, fault):
    with pytest.raises(AssertionError, match="not close"):
        check_padding(Faulty(build(name), fault), SIDES["all"])


def check_masked_rows_reach_nothing(layer: nn.Module, value: float) -> None:
    """Whatever stands in masked rows of x and of the cotangent, everything else stays the same, bit by bit."""
    x, mask, cotangent = tokens(10, T, D), some_mask(10, T), tokens(10, T, D, seed=3)

    def planted(value):
        hidden = ~mask[..., None]
        return gradients(layer, x.masked_fill(hidden, value), mask, cotangent.masked_fill(hidden, value))

    (y, grads), (y_planted, grads_planted) = planted(0), planted(value)
    assert y_planted.equal(y)
    assert not y[~mask].any()
    for key, grad in grads.items():
        assert grads_planted[key].equal(grad), key


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e300])
@pytest.mark.parametrize("name", ROUTINGS)
def test_what_stands_in_masked_rows_reaches_nothing(name, value):
    check_masked_rows_reach_nothing(build(name), value)


@pytest.mark.parametrize("rows", [2, 10])
@pytest.mark.parametrize("name", DROPLESS | THRESHOLDS)
def test_a_row_that_is_not_finite_reaches_no_other(name, rows):
    """Nor their padding, through a weight of zero. Two rows of one position have fewer assignments than experts."""
    layer, x, mask = build(name).eval(), tokens(rows, T, D), some_mask(rows, T)
    for positions in (slice(None), slice(T - 1, None)):
        expected = layer(x[:, positions], mask[:, positions])
        spoilt = x.clone()
        spoilt[0] = math.nan
        assert_close(layer(spoilt[:, positions], mask[:, positions])[1:], expected[1:])


@pytest.mark.parametrize("name", ROUTINGS)
def test_a_mask_by_multiplication_is_caught(name):
    with pytest.raises(AssertionError):
        check_masked_rows_reach_nothing(Faulty(build(name), masked_with_zeros), math.nan)


def test_masked_tokens_take_no_weight_however_low_the_real_logits():
    layer, x_MGD = build("mot", temperature=1e-12), tokens(T, G, D)
    real_MG1 = (torch.arange(G) == 1)[:, None].expand(T, G, 1)
    assert layer.gate(x_MGD)[:, 1].min() < -1e11
    assert layer.weights(x_MGD, real_MG1).equal(real_MG1.double().expand(T, G, E))


@pytest.mark.parametrize("name", ROUTINGS)
def test_a_mask_of_all_true_is_no_mask(name):
    layer, x, cotangent = build(name), tokens(), tokens(seed=3)
    mask = torch.ones(B, T, dtype=torch.bool)
    expected = gradients(layer, x, None, cotangent)
    assert_close(gradients(layer, x, mask, cotangent), expected)
    assert_close(gradients(layer, x, mask.long(), cotangent), expected)  # as tokenizers give it


def completed_with_companions(layer: MixtureOfTokens, x: Tensor) -> Tensor:
    """The layer over full groups: for each expert, a layer of it alone over the rows and copies of its companion."""
    n, total = len(x), torch.zeros_like(x)
    for e in range(layer.num_experts):
        alone = MixtureOfTokens(D, F, 1, layer.group_size, normalize_mixture=layer.normalize_mixture).double()
        alone.load_state_dict({name: value[e : e + 1] for name, value in layer.state_dict().items()})
        total += alone(torch.cat([x, layer.companion[e].expand(layer.group_size - n, T, D)]))[:n]
    return total


def check_companions(layer: nn.Module, x: Tensor, expected: Tensor) -> None:
    group_size, n = 6, len(x)
    assert_close(layer(x), expected)
    mask = (torch.arange(group_size) < n)[:, None].expand(-1, T)
    assert_close(layer(functional.pad(x, (0, 0, 0, 0, 0, group_size - n)), mask)[:n], expected)


@pytest.mark.parametrize("n", [1, 2, 5])
@pytest.mark.parametrize("normalize_mixture", [False, True])
def test_companions_complete_a_partial_group(normalize_mixture, n):
    layer, x = randomized(MixtureOfTokens(D, F, E, 6, normalize_mixture=normalize_mixture)).double(), tokens(n, T, D)
    with torch.no_grad():  # a companion that is a token has the router's logit
        layer.companion_logit.copy_((layer.companion * layer.gate.weight).sum(1))
    expected = completed_with_companions(layer, x)
    check_companions(layer, x, expected)
    with pytest.raises(AssertionError, match="not close"):
        check_companions(Faulty(layer, completed_with_zeros), x, expected)


@pytest.mark.parametrize("n", [1, 4])
@pytest.mark.parametrize("options", [{}, {"uniform": True}, {"normalize_mixture": True}], ids=str)
def test_before_calibration_missing_tokens_are_zeros(options, n):
    layer, x = MixtureOfTokens(D, F, E, 6, **options).double(), tokens(n, T, D)
    check_companions(layer, x, completed_with_zeros(layer, x, None))


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("name", ROUTINGS)
def test_nothing_real_gives_zeros_and_finite_gradients(name, training):
    layer, x = build(name).train(training), tokens().requires_grad_()
    y = layer(x, torch.zeros(B, T, dtype=torch.bool))
    assert not y.any()
    y.backward(tokens(seed=3))
    for leaf in (x, *layer.parameters()):
        assert leaf.grad is not None
        assert not leaf.grad.any()
