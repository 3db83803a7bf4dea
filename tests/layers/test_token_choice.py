"""Token Choice's capacity, the bias that balances sigmoid gates, average outputs: who is dropped, what moves, by hand.

Every expert e returns its input times e + 1, so an output says which experts a token got.
"""

import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from mixture_of_tokens.layers.token_choice import DefaultMoE, SigmoidChoice, TokenChoice


def scaling_experts(num_experts: int, **options) -> TokenChoice:
    """Expert e of a token x (2,), not negative, is (e + 1) x; the router's logit for it is -e x[0] + e x[1]."""
    layer = TokenChoice(2, 2, num_experts, gated=False, activation="relu", **options).double()
    e = torch.arange(num_experts, dtype=torch.float64)
    with torch.no_grad():
        layer.experts.up_proj.copy_(torch.eye(2))
        layer.experts.down_proj.copy_((e + 1)[:, None, None] * torch.eye(2))
        layer.gate.weight.copy_(torch.stack([-e, e], dim=1))
    return layer


def crowd(rows: int, positions: int) -> Tensor:
    """Tokens (1, 0): all want expert 0 first, expert 1 second and so on."""
    return torch.tensor([1.0, 0.0], dtype=torch.float64).expand(rows, positions, 2)


def served(y: Tensor) -> list[list[int]]:
    """1 where a token got anything."""
    return y.any(-1).int().tolist()


@pytest.mark.parametrize(
    ("rows", "positions", "experts", "factor", "expected"),
    [
        # ceil(1.25 * 8 / 2) = 5 of 8: both rows at two positions, then row 0.
        (2, 4, 2, 1.25, [[1, 1, 1, 0], [1, 1, 0, 0]]),
        # ceil(1 * 8 / 4) = 2
        (2, 4, 4, 1.0, [[1, 0, 0, 0], [1, 0, 0, 0]]),
        # ceil(0.5 * 6 / 2) = 2 of 6: the first two rows of one position
        (3, 2, 2, 0.5, [[1, 0], [1, 0], [0, 0]]),
        # ceil(2 * 4 / 2) = 4: nobody is dropped
        (2, 2, 2, 2.0, [[1, 1], [1, 1]]),
    ],
)
def test_a_full_expert_drops_later_positions_then_later_rows(rows, positions, experts, factor, expected):
    layer = scaling_experts(experts, capacity_factor=factor)
    assert served(layer(crowd(rows, positions))) == expected


def test_first_choices_go_before_second_ones_at_one_position():
    # Of two experts each wants both, (1, 0) expert 0 first and (0, 1) expert 1 first. ceil(0.5 * 2 * 2 / 2) = 1 place:
    # each gets its first choice, with the probability 1 / (1 + 1 / e).
    layer = scaling_experts(2, num_experts_per_tok=2, capacity_factor=0.5)
    x = torch.tensor([[[1, 0]], [[0, 1]]], dtype=torch.float64)
    p = 1 / (1 + math.exp(-1))
    assert_close(layer(x), torch.tensor([[[p, 0]], [[0, 2 * p]]], dtype=torch.float64))


def test_an_earlier_position_goes_before_a_later_ones_first_choice():
    # The same two tokens in one row: the first takes both places, p * 1 + (1 - p) * 2, the second gets nothing.
    layer = scaling_experts(2, num_experts_per_tok=2, capacity_factor=0.5)
    x = torch.tensor([[[1, 0], [0, 1]]], dtype=torch.float64)
    p = 1 / (1 + math.exp(-1))
    assert_close(layer(x), torch.tensor([[[2 - p, 0], [0, 0]]], dtype=torch.float64))


def test_a_dropped_token_gets_no_gradient_and_gives_none():
    layer, x = scaling_experts(2), crowd(2, 4).clone().requires_grad_()
    layer(x).sum().backward()
    assert x.grad is not None
    assert served(x.grad) == [[1, 1, 1, 0], [1, 1, 0, 0]]
    alone = scaling_experts(2, capacity_factor=None)
    alone(crowd(1, 5)).sum().backward()
    for parameter, expected in zip(layer.parameters(), alone.parameters(), strict=True):
        assert_close(parameter.grad, expected.grad)


@pytest.mark.parametrize("experts", [2, 8, 33])
def test_capacity_is_never_below_one(experts):
    layer = scaling_experts(experts)
    assert served(layer(crowd(1, 1))) == [[1]]
    assert int(1.25 * 1 / experts) == 0  # the control: what a rounding down gives
    assert served(layer(crowd(2, 1), torch.tensor([[False], [True]]))) == [[0], [1]]


@pytest.mark.parametrize("choices", [1, 2])
def test_nothing_is_dropped_in_evaluation(choices):
    layer, x = scaling_experts(5, num_experts_per_tok=choices, capacity_factor=0.25), crowd(3, 4)
    assert served(layer(x)) != [[1] * 4] * 3
    unlimited = scaling_experts(5, num_experts_per_tok=choices, capacity_factor=None)
    assert_close(layer.eval()(x), unlimited(x))
    assert_close(layer(x), layer(x[:1, :1]).expand(3, 4, 2))


def test_masked_tokens_take_no_place():
    # Six real of ten: ceil(1.25 * 6 / 2) = 4 places. The first masked tokens stand before any real one.
    mask = torch.tensor([[0, 1, 1, 0, 1], [0, 1, 1, 0, 0]]).bool()
    mask[1, 4] = True
    y = scaling_experts(2)(crowd(2, 5), mask)
    assert served(y) == [[0, 1, 1, 0, 0], [0, 1, 1, 0, 0]]
    # Five real of ten: again ceil(1.25 * 5 / 2) = 4; were all ten counted, ceil(1.25 * 10 / 2) = 7 would fit them all.
    mask[1, 4] = False
    y = scaling_experts(2)(crowd(2, 5), mask)
    assert served(y) == [[0, 1, 1, 0, 0], [0, 1, 1, 0, 0]]


def test_capacity_counts_in_full_precision_whatever_the_padding():
    # 1.2 * 25 / 5 is 6; in float32 it is a little more, which rounds up to 7.
    layer, x = scaling_experts(5, capacity_factor=1.2), crowd(5, 5)
    assert layer(x).any(-1).sum() == 6
    mask = (torch.arange(8) < 5)[:, None].expand(8, 5)
    assert layer(crowd(8, 5), mask).any(-1).sum() == 6


def test_capacity_is_what_its_formula_says_of_the_decimal_number():
    layer = scaling_experts(10, capacity_factor=1.1)
    assert layer(crowd(10, 10)).any(-1).sum() == 11  # 1.1 * 100 / 10; in float64 1.1 * 100 is above 110


def test_a_huge_capacity_computes_no_more_rows_than_there_are_tokens():
    rows = []
    layer, x = scaling_experts(3, num_experts_per_tok=2, capacity_factor=1e9).train(), crowd(4, 5)
    layer.experts.register_forward_pre_hook(lambda module, args: rows.append(args[0].shape[1]))
    y = layer(x)
    assert rows == [4 * 5]  # no token chooses an expert twice
    layer.capacity_factor = None
    assert_close(layer(x), y)


def sigmoid_experts(**options) -> SigmoidChoice:
    """Logits of a token (1, 0) are 2, 1 and -1 for the three experts."""
    layer = SigmoidChoice(2, 2, 3, gated=False, activation="relu", **options).double()
    with torch.no_grad():
        layer.gate.weight.copy_(torch.tensor([[2.0, 0], [1, 0], [-1, 0]]))
        layer.experts.up_proj.copy_(torch.eye(2))
        layer.experts.down_proj.copy_(torch.arange(1.0, 4)[:, None, None] * torch.eye(2))
    return layer


def sigmoid(logit: float) -> float:
    return 1 / (1 + math.exp(-logit))


def test_the_bias_decides_the_choice_and_not_the_gate():
    layer = sigmoid_experts()
    assert_close(layer(crowd(1, 1))[0, 0, 0].item(), sigmoid(2))
    layer.selection_bias[2] = 1  # sigmoid(-1) + 1 is more than sigmoid(2)
    assert_close(layer(crowd(1, 1))[0, 0, 0].item(), 3 * sigmoid(-1))


def test_gates_that_are_all_zero_are_not_divided_by_their_sum():
    torch.manual_seed(0)
    layer = SigmoidChoice(4, 3, 5, num_experts_per_tok=2, norm_topk_prob=True)
    with torch.no_grad():
        layer.gate.weight.fill_(-50)
    x = torch.ones(1, 2, 4)  # logits of -200, whose sigmoids are 0 in float32
    assert torch.equal(layer(x), torch.zeros_like(x))


def test_the_bias_moves_against_the_load_of_all_micro_batches():
    layer = sigmoid_experts(num_experts_per_tok=2, balance_rate=0.1)
    layer(crowd(2, 3))  # 6 tokens for experts 0 and 1 each, none for expert 2: the mean is 4
    layer(crowd(1, 2))
    layer.balance([layer])
    assert layer.selection_bias.tolist() == pytest.approx([-0.1, -0.1, 0.1])
    layer.balance([layer])  # nothing was chosen since
    assert layer.selection_bias.tolist() == pytest.approx([-0.1, -0.1, 0.1])
    for _ in range(2):
        layer(crowd(1, 2))
        layer.balance([layer])
    assert layer.selection_bias.tolist() == pytest.approx([-0.3, -0.3, 0.3])  # sigmoid(1) - 0.3 < sigmoid(-1) + 0.3
    layer(crowd(1, 2))
    layer.balance([layer])  # now experts 0 and 2 are chosen
    assert layer.selection_bias.tolist() == pytest.approx([-0.4, -0.2, 0.2])


def test_nothing_is_counted_but_training():
    layer = sigmoid_experts()
    layer.eval()(crowd(1, 1))
    with torch.no_grad():
        layer.train()(crowd(1, 1))
    layer(crowd(1, 1), torch.zeros(1, 1, dtype=torch.bool))
    layer.balance([layer])
    assert layer.selection_bias.tolist() == [0, 0, 0]
    with pytest.raises(ValueError, match="balance_rate must be 0 or more, not -1"):
        sigmoid_experts(balance_rate=-1)


def averaging_experts(**options) -> DefaultMoE:
    """Tokens (1, 0) go to expert 0 of three, tokens (0, 1) to expert 2, by a probability of nearly one."""
    layer = DefaultMoE(2, 2, 3, gated=False, activation="relu", **options).double()
    with torch.no_grad():
        layer.gate.weight.copy_(torch.tensor([[1.0, 0], [0, 0], [0, 1]]))
        layer.experts.up_proj.copy_(torch.eye(2))
        layer.experts.down_proj.copy_(torch.arange(1.0, 4)[:, None, None] * torch.eye(2))
    return layer


FIRST, LAST = [1.0, 0.0], [0.0, 1.0]


def of(*tokens: list[float]) -> Tensor:
    return torch.tensor(tokens, dtype=torch.float64)[:, None]


@pytest.mark.parametrize("copies", [1, 50])  # computed token by token, and expert by expert
def test_averages_move_towards_what_experts_gave_in_all_micro_batches(copies):
    layer = averaging_experts(default_decay=0.75)
    layer(of(*copies * [FIRST, [3.0, 0.0]]))
    layer(of(*copies * [LAST, [5.0, 0.0], [9.0, 0.0]]), torch.tensor([[True], [True], [False]] * copies))
    assert not layer.default_output.any()  # not before the step's end
    layer.balance([layer])
    means = torch.tensor([[3.0, 0], [0, 0], [0, 3]], dtype=torch.float64)  # (1 + 3 + 5) / 3, and 3 x (0, 1)
    assert_close(layer.default_output, means / 4)
    layer(of(*copies * [FIRST]))
    layer.balance([layer])
    assert_close(layer.default_output[:, 0], torch.tensor([0.75 * 0.75 + 0.25, 0, 0], dtype=torch.float64))
    assert_close(layer.default_output[2], means[2] / 4)  # which no token chose
    kept = layer.default_output.clone()
    layer.eval()(of(FIRST))
    with torch.no_grad():  # as telemetry
        layer.train()(of(LAST))
    layer.balance([layer])
    assert torch.equal(layer.default_output, kept)


def test_what_is_not_chosen_gives_its_average_and_the_router_hears_of_it():
    layer = averaging_experts()
    layer.default_output.copy_(torch.tensor([[7.0, 7], [10, 20], [7, 7]]))
    layer.default_output[2] = 0
    shares = torch.tensor([1.0, 0, 0], dtype=torch.float64).softmax(0)
    y = layer(of(FIRST))[0, 0]
    assert_close(y, shares[0] * of(FIRST)[0, 0] + shares[1] * of([10.0, 20])[0, 0])
    y[1].backward()  # 20 shares[1]
    grad = 20 * shares[1] * (torch.eye(3, dtype=torch.float64)[1] - shares)
    assert_close(layer.gate.weight.grad, grad[:, None] * of(FIRST)[0])
    assert not layer(of(FIRST), torch.zeros(1, 1, dtype=torch.bool)).any()  # masked
    with pytest.raises(ValueError, match="default_decay must be below 1, not 1"):
        averaging_experts(default_decay=1)
