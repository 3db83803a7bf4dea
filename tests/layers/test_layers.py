"""The layers against literal loops, hand-worked numbers and identities; their arguments, autocast, compilation."""

import inspect
import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional
from torch.profiler import ProfilerActivity, profile
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

import reference
from mixture_of_tokens.layers import dispatch as dispatching
from mixture_of_tokens.layers.dispatch import Slots, order_of_slots, ragged_linear, slots_without_limit
from mixture_of_tokens.layers.experts import Experts, Routed, Router, highest
from mixture_of_tokens.layers.grouping import precise_linear, warn_once
from mixture_of_tokens.layers.mixture import MixtureOfTokens
from mixture_of_tokens.layers.soft import SoftMoE
from mixture_of_tokens.layers.thresholds import ExpertThreshold, ReMoE
from mixture_of_tokens.layers.token_choice import DefaultMoE, ExpertChoice, SigmoidChoice, TokenChoice
from mixture_of_tokens.settings.routings import TABLE
from routings import ROUTINGS, B, D, E, F, G, T, build, gradients, randomized, relative_error, some_mask, tiny, tokens

EXPERTS = {"gated": {}, "plain": {"gated": False, "activation": "relu"}}


def literal(layer: Routed, x: Tensor, mask: Tensor | None, parameters: dict[str, Tensor], per_token: int) -> Tensor:
    """What the layer should return, by the loops of `reference.py`. Expert Choice does not keep its k: `per_token`."""
    gated, gate = layer.experts.gated, parameters.get("gate.weight")
    experts = (parameters[f"experts.{'gate_up' if gated else 'up'}_proj"], parameters["experts.down_proj"])
    options = {"gated": gated, "activation": layer.experts.activation}
    if layer.gate is not None:
        log_temperature = parameters.get("gate.log_temperature")
        temperature = layer.gate.temperature_setting if log_temperature is None else log_temperature.exp()
        options["temperature"] = temperature
    if isinstance(layer, MixtureOfTokens):
        options |= {"group_size": layer.group_size, "normalize_mixture": layer.normalize_mixture}
        options |= {"companion": layer.companion.double(), "companion_logit": layer.companion_logit.double()}
        return reference.mixture_of_tokens(x, mask, gate, experts, uniform=layer.gate is None, **options)
    assert gate is not None
    if isinstance(layer, ExpertChoice):
        options |= {"group_size": layer.group_size, "num_experts_per_tok": per_token}
        return reference.expert_choice(x, mask, gate, experts, **options)
    if isinstance(layer, ExpertThreshold):
        options |= {"threshold": layer.threshold.double(), "scores": "softmax" if layer.competing else "sigmoid"}
        return reference.expert_threshold(x, mask, gate, experts, **options)
    if isinstance(layer, ReMoE):
        return reference.remoe(x, mask, gate, experts, **options)
    if isinstance(layer, SoftMoE):
        return reference.soft_moe(x, mask, gate, experts, num_slots=layer.num_slots, **options)
    assert isinstance(layer, TokenChoice)
    options["num_experts_per_tok"] = layer.num_experts_per_tok
    if isinstance(layer, DefaultMoE):
        return reference.default_moe(x, mask, gate, experts, default_output=layer.default_output.double(), **options)
    options["norm_topk_prob"] = layer.norm_topk_prob
    if isinstance(layer, SigmoidChoice):
        return reference.sigmoid_choice(x, mask, gate, experts, selection_bias=layer.selection_bias.double(), **options)
    options["capacity_factor"] = layer.capacity_factor if layer.training else None
    return reference.token_choice(x, mask, gate, experts, **options)


def compare_with_literal(layer, x, mask=None, *, per_token=1, output=None, gradient=None, temperature=None):
    """Output and every gradient under a random cotangent; the loops run in float64 on the layer's rounded weights.

    Tolerances of the output, the gradients and that of the temperature are norm-wise; None is `assert_close` at its
    defaults for the precision of x.
    """
    cotangent = tokens(*x.shape, seed=3, dtype=x.dtype)
    y, grads = gradients(layer, x, mask, cotangent)
    exact = {"x": x, **dict(layer.named_parameters())}
    exact = {name: value.detach().double().requires_grad_() for name, value in exact.items()}
    y_exact = literal(layer, exact["x"], mask, exact, per_token)
    grads_exact = torch.autograd.grad(y_exact, list(exact.values()), cotangent.double())
    expected = dict(zip(exact, grads_exact, strict=True)) | {"y": y_exact.detach()}
    tolerances = {"y": output, "gate.log_temperature": temperature}
    for name, actual in (grads | {"y": y}).items():
        tolerance = tolerances.get(name, gradient)
        precise = name == "gate.log_temperature"  # which stays in fp32
        assert actual.dtype == (torch.promote_types(x.dtype, torch.float32) if precise else x.dtype), name
        if tolerance is not None:
            assert relative_error(actual, expected[name]) < tolerance, name
        else:
            assert_close(actual, expected[name].to(actual.dtype), msg=lambda text, name=name: f"{name}: {text}")


def per_token(name: str) -> int:
    return 3 if name == "ec_takes_2" else 1


LAYOUTS = {  # batch size, masked
    "full": (B, False),
    "masked": (B, True),
    "partial_group": (10, False),
    "masked_partial_group": (10, True),
    "less_than_a_group": (2, False),
    "masked_less_than_a_group": (2, True),
}


@pytest.mark.parametrize("experts", EXPERTS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ROUTINGS)
def test_equals_the_literal_loops(name, layout, experts):
    rows, masked = LAYOUTS[layout]
    mask = some_mask(rows, T) if masked else None
    compare_with_literal(build(name, **EXPERTS[experts]), tokens(rows, T, D), mask, per_token=per_token(name))


PRECISIONS = {
    # The temperature's gradient is a single sum whose terms cancel: measured up to 2e-6 in fp32 and 5e-2 in bf16.
    torch.float32: {"output": None, "gradient": 1e-6, "temperature": 5e-6},
    torch.bfloat16: {"output": 1.6e-2, "gradient": 1.6e-2, "temperature": 1e-1},
}


@pytest.mark.parametrize("experts", EXPERTS)
@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("name", ROUTINGS)
def test_equals_the_literal_loops_in(dtype, name, experts):
    options = dict(EXPERTS[experts])
    if dtype == torch.bfloat16 and experts == "plain":
        options["activation"] = "gelu"  # rounding takes some inputs over relu's kink: gradients are then 9e-2 off
    layer, x = build(name, dtype=dtype, **options), tokens(10, T, D, dtype=dtype)
    compare_with_literal(layer, x, some_mask(10, T), per_token=per_token(name), **PRECISIONS[dtype])


EDGES = {  # experts, group size, batch size, positions
    "prime_experts": (7, 4, 8, 3),
    "group_of_one": (5, 1, 3, 2),
    "fewer_experts_than_group": (2, 5, 10, 3),
    "more_experts_than_group": (11, 2, 4, 3),
    "one_expert": (1, 3, 6, 4),
    "one_position": (5, 3, 6, 1),
    "one_example": (5, 3, 1, 4),
    "one_token": (5, 3, 1, 1),
}


@pytest.mark.parametrize("edge", EDGES)
@pytest.mark.parametrize("kind", [MixtureOfTokens, ExpertChoice, TokenChoice, ExpertThreshold, ReMoE, SoftMoE])
def test_equals_the_literal_loops_at(edge, kind):
    experts, group, rows, positions = EDGES[edge]
    sizes = (D, F, experts, group) if kind in (MixtureOfTokens, ExpertChoice) else (D, F, experts)
    compare_with_literal(randomized(kind(*sizes)).double(), tokens(rows, positions, D))


@pytest.mark.parametrize("activation", ["silu", "relu", "gelu"])
def test_equals_the_literal_loops_with_activation(activation):
    compare_with_literal(build("mot", activation=activation), tokens())


@pytest.mark.parametrize("name", ROUTINGS)
def test_strides_do_not_matter(name):
    layer, x, cotangent = build(name), tokens(), tokens(seed=3)
    strided = x.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    strided_cotangent = cotangent.transpose(0, 1).contiguous().transpose(0, 1)
    assert not strided.is_contiguous()
    assert not strided_cotangent.is_contiguous()
    assert_close(gradients(layer, strided, some_mask(), strided_cotangent), gradients(layer, x, some_mask(), cotangent))


# Two tokens x1 = (1, 0), x2 = (0, 1) and two plain relu experts of width 1:
#     FFN_1(x) = (1, 2) * relu(4 x[0] + 8 x[1])      FFN_2(x) = (0, 1) * relu(-5 x[0] + 5 x[1])
# Router rows c1 = (ln 3, 0), c2 = (0, ln 4), so the logits are x1: (ln 3, 0), x2: (0, ln 4).
TWO_TOKENS = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]], dtype=torch.float64)


def two_experts(kind, *sizes, **options):
    layer = kind(2, 1, 2, *sizes, gated=False, activation="relu", **options).double()
    weights = {
        "gate.weight": [[math.log(3), 0], [0, math.log(4)]],
        "experts.up_proj": [[[4, 8]], [[-5, 5]]],
        "experts.down_proj": [[[1], [2]], [[0], [1]]],
    }
    for name, value in weights.items():
        torch.nn.init.zeros_(layer.get_parameter(name)).data += torch.tensor(value)
    return layer


@pytest.mark.parametrize(
    ("layer", "mask", "expected"),
    [
        # Over the group expert 1 weighs exp(ln 3) : exp(0) = 3/4, 1/4 and expert 2 weighs 1/5, 4/5.
        # mix1 = (3/4, 1/4), y1 = (1, 2) * (3 + 2) = (5, 10);  mix2 = (1/5, 4/5), y2 = (0, 1) * (-1 + 4) = (0, 3)
        # out1 = 3/4 y1 + 1/5 y2 = (3.75, 8.1);  out2 = 1/4 y1 + 4/5 y2 = (1.25, 4.9)
        (two_experts(MixtureOfTokens, 2), None, [[3.75, 8.1], [1.25, 4.9]]),
        # x1 beside a missing token, which is zeros: expert 1 weighs exp(ln 3) : exp(0) = 3/4 and expert 2 weighs 1/2.
        # mix1 = (3/4, 0), y1 = (1, 2) * 3 = (3, 6);  mix2 = (1/2, 0), y2 = (0, 1) * relu(-2.5);  out1 = 3/4 y1
        (two_experts(MixtureOfTokens, 2), [[True], [False]], [[2.25, 4.5], [0, 0]]),
        # The mixtures over the norms of their weights, sqrt(10)/4 and sqrt(17)/5; relu passes positive scales on.
        (
            two_experts(MixtureOfTokens, 2, normalize_mixture=True),
            None,
            [[15 / 10**0.5, 30 / 10**0.5 + 3 / 17**0.5], [5 / 10**0.5, 10 / 10**0.5 + 12 / 17**0.5]],
        ),
        # Weights of 1/2: both mixtures are (1/2, 1/2), y1 = (6, 12), y2 = (0, 0).
        (two_experts(MixtureOfTokens, 2, temperature=1e15), None, [[3, 6], [3, 6]]),
        # Over the experts x1 has gates 3/4, 1/4 and x2 has 1/5, 4/5: x1 takes expert 1, x2 takes expert 2.
        # out1 = 3/4 (4, 8);  out2 = 4/5 FFN_2(x2) = 4/5 (0, 5)
        (two_experts(TokenChoice), None, [[3, 6], [0, 4]]),
        # Both experts each, of gates that sum to one anyway: FFN_1(x2) = (8, 16).
        # out1 = 3/4 (4, 8) + 1/4 (0, 0);  out2 = 1/5 (8, 16) + 4/5 (0, 5)
        (two_experts(TokenChoice, num_experts_per_tok=2), None, [[3, 6], [1.6, 7.2]]),
        # C = 1: expert 1 takes x1 (3/4 against 1/5), expert 2 takes x2 (4/5 against 1/4).
        (two_experts(ExpertChoice, 2), None, [[3, 6], [0, 4]]),
        # C = 2: both take both.
        (two_experts(ExpertChoice, 2, num_experts_per_tok=2), None, [[3, 6], [1.6, 7.2]]),
    ],
    ids=["mot", "mot_masked", "mot_normalized", "mot_hot", "tc", "tc_top2", "ec", "ec_takes_2"],
)
def test_two_tokens_two_experts_by_hand(layer, mask, expected):
    y = layer(TWO_TOKENS, None if mask is None else torch.tensor(mask))
    assert_close(y[:, 0], torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("experts", EXPERTS)
@pytest.mark.parametrize("kind", [MixtureOfTokens, TokenChoice, ExpertChoice])
def test_one_expert_on_single_tokens_is_the_dense_mlp(kind, experts):
    sizes = (D, F, 1) if kind is TokenChoice else (D, F, 1, 1)
    layer, x = randomized(kind(*sizes, **EXPERTS[experts])).double().eval(), tokens()
    if experts == "gated":
        gate, up = layer.experts.gate_up_proj[0].chunk(2)
        hidden = functional.silu(x @ gate.T) * (x @ up.T)
    else:
        hidden = functional.relu(x @ layer.experts.up_proj[0].T)
    assert_close(layer(x), hidden @ layer.experts.down_proj[0].T)


@pytest.mark.parametrize("mask", [None, some_mask()], ids=["unmasked", "masked"])
def test_a_zero_router_is_uniform_mixing(mask):
    layer, uniform, x = build("mot"), build("uniform"), tokens()
    uniform.load_state_dict({k: v for k, v in layer.state_dict().items() if not k.startswith("gate")})
    assert not torch.allclose(layer(x, mask), uniform(x, mask))
    torch.nn.init.zeros_(layer.gate.weight)
    assert_close(layer(x, mask), uniform(x, mask))


def test_temperature_to_zero_sends_each_expert_one_token():
    layer, x_MGD = build("mot", temperature=1e-6), tokens(T, G, D)
    chosen_ME = (x_MGD @ layer.gate.weight.T).argmax(dim=1)
    weights_MGE = layer.weights(x_MGD)
    assert_close(weights_MGE, functional.one_hot(chosen_ME, G).double().mT)
    y_ETD = layer.experts(x_MGD[torch.arange(T)[:, None], chosen_ME].transpose(0, 1))
    expected_TGD = torch.zeros_like(x_MGD)
    for t in range(T):
        for e in range(E):
            expected_TGD[t, chosen_ME[t, e]] += y_ETD[e, t]
    assert_close(layer(x_MGD.transpose(0, 1)), expected_TGD.transpose(0, 1))


def test_equal_tokens_share_an_expert_at_temperature_zero():
    layer = build("mot", temperature=1e-6)
    twins = tokens(T, 1, D).expand(T, 2, D)  # every logit is a tie
    one_hot_by_equality = ((logits := layer.gate(twins)) == logits.amax(dim=1, keepdim=True)).double()
    assert one_hot_by_equality.sum(1).eq(2).all()  # the control: the tie is real
    assert_close(layer.weights(twins), torch.full((T, 2, E), 0.5, dtype=torch.float64))


def test_temperature_can_be_set_between_steps():
    layer, x = build("mot", temperature=1.0), tokens()
    layer.gate.set_temperature(0.5)
    assert_close(layer(x), build("mot", temperature=0.5)(x))
    learnable = build("mot_learnable_temperature")
    learnable.gate.set_temperature(0.5)
    assert_close(learnable.gate.temperature.item(), 0.5)


@pytest.mark.parametrize("kind", ["mixture_of_tokens", "expert_choice"])
def test_training_a_layer_in_incomplete_groups_is_told_once(kind, caplog):
    warn_once.cache_clear()
    layer = tiny(kind).model.layers[1].mlp
    size, width = layer.group_size, layer.experts.down_proj.shape[1]
    told = f"A batch of {size + 1} rows is no multiple of the group size, {size}: the last group is trained incomplete"

    def count(rows: int) -> int:
        for _ in range(2):
            layer(torch.randn(rows, 3, width))
        return caplog.text.count(told)

    layer.eval()
    assert count(size + 1) == 0
    layer.train()
    assert count(2 * size) == 0
    with torch.no_grad():
        assert count(size + 1) == 0
    assert count(size + 1) == 1


@pytest.mark.parametrize("experts", EXPERTS)
def test_weights_start_as_in_the_paper(experts):
    layer: Any = TokenChoice(24, 40, 64, learnable_temperature=True, temperature=0.5, **EXPERTS[experts])
    assert_close(layer.gate.log_temperature.item(), math.log(0.5))
    for weight in (layer.gate.weight, *layer.experts.parameters()):
        std = math.sqrt(0.1 / weight.shape[-1])
        assert weight.abs().max() <= 2 * std
        assert_close(weight.std().item() / std, 0.88, rtol=0.05, atol=0)  # of a normal cut at two standard deviations


OPTIONS: dict[str, Any] = {"gated": False, "activation": "gelu", "initializer_scale": 9.0}
OF_ROUTERS: dict[str, Any] = {"temperature": 0.6, "learnable_temperature": True, "router_dtype": torch.float64}


def check_options(layer: Routed) -> None:
    """Those above, none of which is a default."""
    assert (layer.experts.gated, layer.experts.activation) == (False, "gelu")
    weights = [*layer.experts.parameters()]
    if layer.gate is not None:
        assert layer.gate.temperature_setting == 0.6
        assert layer.gate.log_temperature is not None
        assert layer.gate.router_dtype == torch.float64
        weights.append(layer.gate.weight)
    for weight in weights:
        assert 1 < weight.abs().max() * math.sqrt(weight.shape[-1]) / 9 <= 2  # of a normal cut at two deviations


@pytest.mark.parametrize("name", ROUTINGS)
def test_a_layer_has_the_options_that_it_was_given(name):
    layer = ROUTINGS[name](**OPTIONS, **OF_ROUTERS)
    check_options(layer)
    given = ROUTINGS[name].keywords
    kept = {field: value for field, value in given.items() if hasattr(layer, field) and field != "scores"}
    assert {field: getattr(layer, field) for field in kept} == kept
    assert kept.keys() >= {"norm_topk_prob", "capacity_factor"} & given.keys()


@pytest.mark.parametrize("uniform", [False, True])
def test_matched_passes_its_options_on(uniform):
    layer = MixtureOfTokens.matched(D, 24, G, 4, normalize_mixture=True, uniform=uniform, **OPTIONS, **OF_ROUTERS)
    check_options(layer)
    assert layer.normalize_mixture
    assert (layer.gate is None) == uniform


@pytest.mark.parametrize("kind", [row.kind for row in TABLE if row.routed])
def test_a_configuration_s_fields_reach_the_layer(kind):
    fields = {"gated": False, "hidden_act": "gelu", "initializer_scale": 9.0, "router_temperature": 0.6}
    fields |= {"learnable_temperature": True, "router_dtype": "float64"}
    own = {"normalize_mixture": True, "num_experts_per_tok": 2, "norm_topk_prob": True, "capacity_factor": 0.75}
    own |= {"balance_rate": 0.5, "default_decay": 0.5, "threshold_decay": 0.5, "group_size": 2}
    layer: Any = tiny(kind, threshold_scores="sigmoid", **fields, **own).model.layers[1].mlp
    check_options(layer)
    kept = {field: value for field, value in own.items() if hasattr(layer, field)}
    if kind == "sigmoid_choice":
        kept["capacity_factor"] = None  # it never drops
    if kind == "default_moe":
        kept |= {"capacity_factor": None, "norm_topk_prob": False}  # all experts together have a weight of one
    assert {field: getattr(layer, field) for field in kept} == kept
    assert getattr(layer, "competing", False) is False  # of the threshold's scores


@pytest.mark.parametrize(
    "make", [lambda: Experts(D, F, E), lambda: Experts(D, F, E, gated=False), lambda: Router(D, E)]
)
def test_experts_and_routers_of_their_own_draw_their_weights(make, monkeypatch):
    def nothing(*size, **options):
        return torch.full(size if isinstance(size[0], int) else size[0], torch.nan, **options)

    monkeypatch.setattr(torch, "empty", nothing)
    weights = [parameter for parameter in make().parameters() if parameter.dim()]
    for weight in weights:
        assert weight.isfinite().all()
        assert weight.std() > 0


def test_matched_has_the_experts_of_the_name():
    layer = MixtureOfTokens.matched(D, 24, G, granularity=4)
    assert (layer.group_size, layer.num_experts) == (G, 4 * G)
    dense = 3 * D * 24  # gate, up and down
    assert sum(weight.numel() for weight in layer.experts.parameters()) == G * dense


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Experts(0, F, E), "hidden_size must be at least 1, not 0"),
        (lambda: MixtureOfTokens(D, -1, E, G), "expert_size must be at least 1, not -1"),
        (lambda: TokenChoice(D, F, 0), "num_experts must be at least 1, not 0"),
        (lambda: SoftMoE(D, F, 2**40), "num_experts is more than 2147483647"),
        (lambda: Router(D, -2), "num_experts must be at least 1, not -2"),
        (lambda: TokenChoice(D, "7", E), "expert_size takes a whole number, not '7'"),
        (lambda: MixtureOfTokens(D, F, E, 2.5), "group_size takes a whole number, not 2.5"),
        (lambda: ExpertChoice(D, F, E, "3"), "group_size takes a whole number, not '3'"),
        (lambda: MixtureOfTokens.matched(D, 8, G, "2"), "granularity takes a whole number, not '2'"),
        (lambda: MixtureOfTokens(D, F, E, G, temperature="1"), "temperature takes a number, not '1'"),
        (lambda: MixtureOfTokens(D, F, E, G, initializer_scale="1"), "initializer_scale takes a number, not '1'"),
        (lambda: MixtureOfTokens(D, F, E, G).serve_alone(True, True), "can go to 1 to .* experts, not True"),
        (
            lambda: MixtureOfTokens(D, F, E, G)(torch.ones(G, T, D).bfloat16()),
            "x is torch.bfloat16 and the experts are",
        ),
        (lambda: TokenChoice(D, F, E, num_experts_per_tok=1.5), "num_experts_per_tok takes a whole number, not 1.5"),
        (lambda: TokenChoice(D, F, E, capacity_factor="1"), "capacity_factor takes a number, not '1'"),
        (lambda: TokenChoice(D, F, E, capacity_factor=math.inf), "capacity_factor takes a finite number, not inf"),
        (lambda: SoftMoE(D, F, E, num_slots="1"), "num_slots takes a whole number, not '1'"),
        (lambda: ExpertThreshold(D, F, E, threshold_decay="0.5"), "threshold_decay takes a number, not '0.5'"),
        (lambda: ReMoE(D, F, E, l1_factor="2"), "l1_factor takes a number, not '2'"),
        (lambda: MixtureOfTokens(D, F, E, G, uniform="no"), "uniform takes True or False, not 'no'"),
        (lambda: MixtureOfTokens(D, F, E, G, normalize_mixture=1), "normalize_mixture takes True or False, not 1"),
        (lambda: TokenChoice(D, F, E, norm_topk_prob="no"), "norm_topk_prob takes True or False, not 'no'"),
        (lambda: ExpertChoice(D, F, E, G, gated="no"), "gated takes True or False, not 'no'"),
        (lambda: TokenChoice(D, F, E, learnable_temperature=0), "learnable_temperature takes True or False, not 0"),
        (
            lambda: MixtureOfTokens(D, F, E, G, router_dtype="float32"),
            "router_dtype takes a floating-point torch.dtype",
        ),
        (lambda: MixtureOfTokens(D, F, E, G, router_dtype=torch.int32), "torch.dtype, not torch.int32"),
        (lambda: MixtureOfTokens(D, F, E, G, router_dtype=torch.ones(2, 3)), "^router_dtype .*$"),
        (lambda: MixtureOfTokens(D, F, E, G, temperature=torch.ones(2, 3)), "^temperature .*$"),
        (lambda: MixtureOfTokens(D, F, E, G, temperature=10**400), "^temperature .*$"),
        (lambda: ExpertThreshold(D, F, E, scores=torch.ones(2, 3)), "^scores .*$"),
        (lambda: ExpertThreshold(D, F, E, scores=np.array(["sigmoid", "x"])), "^scores .*$"),
        (lambda: ReMoE(D, F, E, l1_factor=math.inf), "^l1_factor .* not inf$"),
        (lambda: ReMoE(D, F, E, l1_start=math.inf), "^l1_start .* not inf$"),
        (lambda: ReMoE(D, F, E, l1_start=1e300), "^l1_start .*$"),  # no number in fp32
        (lambda: MixtureOfTokens(D, F, E, G, activation=[]), r"activation takes text, not \[\]"),
        (lambda: MixtureOfTokens(D, F, E, G, initializer_scale=None), "initializer_scale takes a number, not None"),
        (lambda: Experts(D, F, E, activation="swish"), "'swish' is unknown; legal are silu, relu, gelu"),
        (lambda: MixtureOfTokens(D, F, E, 0), "group_size must be at least 1, not 0"),
        (lambda: MixtureOfTokens(D, F, E, G, temperature=0), "temperature must be at least 1e-20, not 0"),
        (lambda: TokenChoice(D, F, E, temperature=-1.0), "temperature must be at least 1e-20, not -1.0"),
        (lambda: ExpertChoice(D, F, E, G, temperature=math.inf), "temperature takes a finite number, not inf"),
        (lambda: MixtureOfTokens(D, F, E, G, temperature=math.nan), "temperature takes a finite number, not nan"),
        (lambda: MixtureOfTokens(D, F, E, G, temperature=1e39), r"temperature must be at most 1e\+20, not 1e\+39"),
        (lambda: MixtureOfTokens(D, F, E, G, temperature=1e-46), "temperature must be at least 1e-20, not 1e-46"),
        (lambda: MixtureOfTokens(D, F, E, G, initializer_scale=-1.0), "initializer_scale must be positive"),
        (lambda: build("uniform")(tokens(G, T, D + 1)), f"x has rows of width {D + 1}, and hidden_size is {D}"),
        (lambda: build("mot")(tokens(G, T, D).numpy()), "a layer takes tensors of torch, .* not ndarray and NoneType"),
        (lambda: build("tc_top1")(tokens(G, T, D), [[1] * T] * G), "a layer takes tensors of .* not Tensor and list"),
        (lambda: build("mot").gate.set_temperature(0), "temperature must be at least 1e-20, not 0"),
        (lambda: MixtureOfTokens.matched(D, 12, G, granularity=5), "5 does not divide .*legal are 1, 2, 3, 4, 6, 12$"),
        (lambda: MixtureOfTokens.matched(D, 1024, G, granularity=3), "legal are 1, 2, 4, .*, 256, 512, 1024$"),
        (lambda: MixtureOfTokens.matched(D, 12, G, granularity=0), "0 does not divide .*legal are 1, 2, 3, 4, 6, 12$"),
        (lambda: ExpertChoice(D, F, E, 0), "group_size must be at least 1, not 0"),
        (lambda: ExpertChoice(D, F, E, G, num_experts_per_tok=0), "num_experts_per_tok must be at least 1, not 0"),
        (lambda: TokenChoice(D, F, E, num_experts_per_tok=0), "num_experts_per_tok must be 1 to 5, not 0"),
        (lambda: TokenChoice(D, F, E, num_experts_per_tok=6), "num_experts_per_tok must be 1 to 5, not 6"),
    ],
)
def test_a_bad_argument_is_refused_by_name(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("name", ROUTINGS)
def test_autocast_computes_in_bfloat16_what_float32_does(name):
    layer, x, cotangent = build(name, dtype=torch.float32), tokens(dtype=torch.float32), tokens(seed=3)
    y, grads = gradients(layer, x, some_mask(), cotangent)
    with torch.autocast("cpu", torch.bfloat16):
        y_autocast, grads_autocast = gradients(layer, x, some_mask(), cotangent)
    assert 0 < relative_error(y_autocast, y) < 1.6e-2
    for key in grads:
        assert grads_autocast[key].dtype == torch.float32
        assert relative_error(grads_autocast[key], grads[key]) < 1.6e-2, key


def test_routing_is_in_float32_for_bfloat16_tokens():
    layer, x_MGD = build("mot", dtype=torch.bfloat16), tokens(T, G, D, dtype=torch.bfloat16)
    logits_MGE = x_MGD.double() @ layer.gate.weight.double().T / 0.75
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(layer.gate(x_MGD), logits_MGE.float())
        assert_close(layer.weights(x_MGD), logits_MGE.softmax(1).float())


@pytest.mark.parametrize("name", ROUTINGS)
def test_a_layer_keeps_its_temperature_where_its_type_and_device_change(name):
    layer, x = build(name, dtype=torch.float32, temperature=0.3), tokens(dtype=torch.float32)
    if layer.gate is not None and layer.gate.log_temperature is None:
        for changed in (layer.bfloat16(), layer.float(), layer.double(), layer.float()):
            assert float(changed.gate.temperature) == pytest.approx(0.3, rel=1e-7)
    with torch.device("meta"):
        empty = ROUTINGS[name](temperature=0.3)
    if empty.gate is not None:
        shown = "0.3" if empty.gate.log_temperature is None else "learned"
        assert f"temperature={shown}," in str(empty.gate)
    empty.to_empty(device="cpu").load_state_dict(layer.state_dict())
    assert_close(empty.eval()(x), layer.eval()(x))


def test_the_softmax_is_in_float32_for_a_bfloat16_router():
    layer = build("mot", dtype=torch.bfloat16, router_dtype=torch.bfloat16)
    x_MGD = tokens(T, G, D, dtype=torch.bfloat16)
    logits_MGE = layer.gate(x_MGD)
    assert logits_MGE.dtype == torch.bfloat16
    assert_close(layer.weights(x_MGD), logits_MGE.double().softmax(1).float())


@pytest.mark.parametrize("name", ["ec_takes_2", "tc_top2"])
def test_gates_are_in_float32_for_a_bfloat16_router(name, monkeypatch):
    seen = []
    real = torch.Tensor.topk
    monkeypatch.setattr(torch.Tensor, "topk", lambda x, *args, **kwargs: seen.append(x) or real(x, *args, **kwargs))
    layer, x = build(name, dtype=torch.bfloat16, router_dtype=torch.bfloat16), tokens(dtype=torch.bfloat16)
    assert layer(x).dtype == torch.bfloat16
    assert [scores.dtype for scores in seen] == [torch.float32]


@pytest.mark.parametrize("name", ROUTINGS)
def test_under_autocast_no_copy_of_expert_weights_is_kept_for_the_backward_pass(name, monkeypatch):
    """A shard's whole weights are freed between the passes; a copy of them in bf16 would not be."""
    monkeypatch.setattr(dispatching, "SMALL", 0)  # small experts are copied in order, on a CPU
    layer, x = build(name, dtype=torch.float32).train(), tokens(dtype=torch.float32)
    sizes = {frozenset(weight.shape) for weight in layer.experts.parameters()}
    own, copies = {weight.data_ptr() for weight in layer.parameters()}, []

    def keep(saved: Tensor) -> Tensor:
        if frozenset(saved.shape) in sizes and saved.data_ptr() not in own:
            copies.append(saved.shape)
        return saved

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda saved: saved), torch.autocast("cpu", torch.bfloat16):
        layer(x.repeat(1, 5, 1))
    assert copies == []


def test_second_derivatives_of_a_float32_router_under_autocast_are_refused():
    layer, x = build("mot", dtype=torch.float32), tokens(dtype=torch.float32).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    with pytest.raises(RuntimeError, match="router of float32 under autocast has no second derivatives: turn autocast"):
        torch.autograd.grad(y.sum(), x, create_graph=True)


def few_of(names: list[str], fast: tuple[str, ...]) -> list:
    """The others are slow."""
    return [pytest.param(name, marks=[pytest.mark.slow] * (name not in fast)) for name in names]


COMPILED = ["mot", "mot_normalized", "uniform", "ec_takes_2", "tc_top1", "tc_top1_dropping", "tc_top2_dropping"]


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's, of its own tracing
@pytest.mark.parametrize("case", ["unmasked", "masked", pytest.param("autocast", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", few_of(COMPILED, ("mot", "tc_top2_dropping")))
def test_compiles_without_a_break_to_the_same_numbers(name, case):
    torch._dynamo.reset()  # what other tests have compiled
    layer, x = build(name, dtype=torch.float32), tokens(dtype=torch.float32)
    cotangent, mask = tokens(seed=3, dtype=torch.float32), None if case == "unmasked" else some_mask()
    compiled: Any = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for training in (True, False) if isinstance(layer, TokenChoice) else (True,):  # others are the same in evaluation
        layer.train(training)
        with torch.autocast("cpu", torch.bfloat16, enabled=case == "autocast"):
            expected = gradients(layer, x, mask, cotangent)
            y, found = gradients(compiled, x, mask, cotangent)
        prefix = "_orig_mod."
        assert_close((y, {name.removeprefix(prefix): grad for name, grad in found.items()}), expected)


@pytest.mark.parametrize("name", ROUTINGS)
def test_shapes_that_no_layer_takes_are_refused_by_name(name):
    layer = build(name)
    for shape in ((0, T, D), (B, 0, D), (B, D)):
        with pytest.raises(ValueError, match=r"x must be \(examples, positions, hidden size\) with at least one"):
            layer(torch.zeros(shape, dtype=torch.float64))
    if layer.gate is not None:
        with pytest.raises(ValueError, match=f"x has rows of width {D + 1}, and hidden_size is {D}"):
            layer(torch.zeros(B, T, D + 1, dtype=torch.float64))
    for mask in (torch.ones(T, B), torch.ones(B, T + 1), torch.ones(B)):
        with pytest.raises(ValueError, match=r"token_mask must be \(6, 4\)"):
            layer(tokens(), mask.bool())
    with pytest.raises(ValueError, match=r"token_mask must be .* bool or integer, not torch.float32"):
        layer(tokens(), torch.zeros(B, T))  # as attention adds it, 0 where a token is real
    torch.testing.assert_close(layer(tokens(), some_mask().long()), layer(tokens(), some_mask()))


@pytest.mark.parametrize("name", ROUTINGS)
def test_under_autocast_every_routing_returns_the_precision_that_it_was_given(name):
    layer, x = build(name, dtype=torch.float32), tokens(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == layer(x, some_mask()).dtype == torch.float32


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # of torch, where a graph breaks
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's inductor imports what torch has deprecated
@pytest.mark.parametrize(
    "name",
    [
        "mot",
        "uniform",
        "ec_takes_2",
        "tc_top1",
        "tc_top1_dropping",
        "stc_top1",
        "et_top1",
        "remoe_top1",
        "soft_2_slots",
    ],
)
def test_the_default_compiler_takes_masked_batches_of_changing_shapes(name):
    torch._dynamo.reset()
    layer = build(name, dtype=torch.float32)
    compiled: Any = torch.compile(layer)
    for rows, positions in ((6, 4), (9, 7), (7, 5)):  # the last one does not fill its groups
        x, mask = tokens(rows, positions, D, dtype=torch.float32), some_mask(rows, positions)
        cotangent = tokens(rows, positions, D, seed=3, dtype=torch.float32)
        y, found = gradients(compiled, x, mask, cotangent)
        expected, gradient = gradients(layer, x, mask, cotangent)
        assert_close(y, expected)
        assert_close(found["x"], gradient["x"])


WITH_CAPACITY = ["tc_top1_dropping", "tc_top2_dropping"]
EXPORTED = ["mot", "soft", "ec_takes_2", "tc_top1", "stc_top1", *WITH_CAPACITY]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # torch's, of its own tracing
@pytest.mark.parametrize("name", few_of(EXPORTED, ("mot",)))
def test_an_exported_layer_takes_batches_of_other_sizes(name):
    layer, sizes = build(name, dtype=torch.float32), {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}
    layer.train(name in WITH_CAPACITY)  # in training the others have a state, or nothing more
    given = (tokens(6, 5, D, dtype=torch.float32), some_mask(6, 5))
    exported = torch.export.export(layer, given, dynamic_shapes=(sizes, sizes)).module()
    x, mask = tokens(9, 3, D, dtype=torch.float32), some_mask(9, 3)
    assert_close(exported(x, mask), layer(x, mask))


@pytest.mark.slow
def test_layers_with_other_capacities_compile_for_sizes_that_vary():
    torch._dynamo.reset()
    x = tokens(8, 5, D, dtype=torch.float32)
    for factors in ((0.5, 0.25), (1.1,), (2,)):  # the first is a schedule
        layer = TokenChoice(D, F, E)
        compiled: Any = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=True)
        for factor in factors:
            layer.capacity_factor = factor
            assert_close(compiled(x), layer(x))


@pytest.mark.parametrize("name", ["mot", "mot_normalized", "mot_learnable_temperature", "uniform"])
def test_a_mixture_is_mapped_over_batches_and_over_models(name):
    layers = [build(name, seed=seed) for seed in range(3)]
    many = torch.stack([tokens(seed=seed) for seed in range(3)])
    weights, state = torch.func.stack_module_state(layers)

    def of(weights, state, x):
        return torch.func.functional_call(layers[0], (weights, state), (x,))

    found = torch.func.vmap(of)(weights, state, many)
    assert_close(found, torch.stack([layer(x) for layer, x in zip(layers, many, strict=True)]))
    own = dict(layers[0].named_parameters())
    gradient = torch.func.grad(lambda weights, x: of(weights, {}, x).square().sum())
    by_batch = torch.func.vmap(gradient, in_dims=(None, 0))(own, many)
    for number, x in enumerate(many):
        for part, expected in gradient(own, x).items():
            assert_close(by_batch[part][number], expected)


@pytest.mark.parametrize("name", [name for name in ROUTINGS if name != "uniform"])
def test_a_router_that_is_not_finite_is_seen(name):
    layer = build(name)
    with torch.no_grad():
        layer.gate.weight[0, 0] = math.nan
    assert not layer(tokens()).isfinite().all()
    assert not layer.eval()(tokens()).isfinite().all()


def test_thresholds_outlive_a_router_that_is_not_finite():
    layer = build("et_top1")
    before = layer.threshold.clone()
    with torch.no_grad():
        layer.gate.weight[0, 0] = math.nan
    layer(tokens())
    ExpertThreshold.balance([layer])
    assert torch.equal(layer.threshold, before)


def test_types_that_differ_are_told_without_memory_too():
    with torch.device("meta"):
        layer = MixtureOfTokens(D, F, E, G).bfloat16()
        x = torch.randn(G, T, D)
    with pytest.raises(ValueError, match=r"x is torch.float32 and the experts are torch.bfloat16"):
        layer(x)


@pytest.mark.parametrize("name", ROUTINGS)
def test_weights_are_assigned_to_a_layer_without_memory(name):
    layer = build(name, dtype=torch.float32)
    with torch.device("meta"):
        made = build(name, dtype=torch.float32)
    made.load_state_dict(layer.state_dict(), assign=True)
    made.train(layer.training)
    x = tokens(dtype=torch.float32)
    assert_close(made(x), layer(x))


@pytest.mark.slow
def test_a_layer_that_drops_nothing_is_not_compiled_anew_for_every_number_of_tokens():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    layer = build("stc_top1", dtype=torch.float32)
    compiled: Any = torch.compile(layer, backend=counter, fullgraph=True, dynamic=True)
    for rows in range(6, 30, 2):
        x = tokens(rows, 5, D, dtype=torch.float32)
        assert_close(compiled(x), layer(x))
    assert counter.frame_count <= 4


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's inductor imports what torch has deprecated
def test_compiled_products_of_bfloat16_copy_no_matrix_of_an_expert_transposed():
    torch._dynamo.reset()
    experts, groups, hidden = 8, 12, 16
    layer = MixtureOfTokens(hidden, 8, experts, 4)
    compiled: Any = torch.compile(layer)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            y = compiled(tokens(8, 6, hidden, dtype=torch.float32))
        y.sum().backward()

    step()
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiled:
        step()
    copied = [event.input_shapes[0] for event in profiled.events() or [] if event.name == "aten::copy_"]
    assert [experts, groups, hidden] in copied
    assert [experts, hidden, groups] not in copied


@pytest.mark.parametrize(
    ("experts", "k", "searches"), [(7, 1, 0), (7, 3, 1), (64, 4, 2), (64, 5, 1), (66, 2, 1), (256, 8, 2)]
)
def test_the_highest_scores_are_found_and_get_the_gradients(experts, k, searches):
    scores = tokens(64, 5, experts, seed=experts).requires_grad_()  # enough of them for two searches to pay
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        values, where = highest(scores, k)
    assert [event.name for event in profiled.events() or []].count("aten::topk") == searches
    expected, there = scores.topk(k)
    assert where.equal(there)
    assert values.equal(expected)
    cotangent = tokens(64, 5, k, seed=1)
    found, wanted = (torch.autograd.grad(each, scores, cotangent)[0] for each in (values, expected))
    assert found.equal(wanted)


def test_slots_take_tokens_to_experts_and_back_as_indexing_and_adding_up_do():
    """Six tokens with no, one or several assignments; some are dropped, and some slots empty."""
    token, slot = torch.tensor([0, 0, 2, 3, 3, 3, 5]), torch.tensor([4, 9, 1, 0, 9, 7, 3])  # 9: dropped
    kept = slot < 9
    x, gate = tokens(6, 4, seed=1).requires_grad_(), tokens(len(token), seed=2).requires_grad_()
    scale, cotangent = tokens(9, 4, seed=3), tokens(6, 4, seed=4)
    held_at = Slots.of(token, slot, 9, 6)
    held = held_at.dispatch(x)
    assert held[slot[kept]].equal(x[token[kept]])
    assert not held[[2, 5, 6, 8]].any()
    y = held_at.combine(held * scale + 1, gate)  # 1 is what an empty slot gives, and nobody gets
    added = gate[kept, None] * (x[token[kept]] * scale[slot[kept]] + 1)
    expected = torch.zeros(6, 4, dtype=x.dtype).index_add(0, token[kept], added)
    assert_close(y, expected)
    for found, wanted in zip(*(torch.autograd.grad(each, (x, gate), cotangent) for each in (y, expected)), strict=True):
        assert_close(found, wanted)


@pytest.mark.parametrize("by_rows", [True, False])
@pytest.mark.parametrize("multiple", [1, 16])
def test_without_a_limit_everything_has_a_slot_of_its_own_expert(multiple, by_rows):
    expert = torch.randint(0, 5, (97,), generator=torch.Generator().manual_seed(0))
    expert[expert == 2] = 4  # 4 experts: the fifth number is that of masked tokens
    slot, ends, order, number = slots_without_limit(expert, 4, multiple, by_rows)
    assert (order is not None) == by_rows
    order = torch.arange(4) if order is None else order
    served = expert < 4
    assert slot[~served].ge(ends[-1]).all()
    assert len(slot.unique()) == len(slot)
    assert slot.max() < number
    assert order[torch.searchsorted(ends, slot[served], right=True)].equal(expert[served])
    sizes = [-(-int((expert == e).sum()) // multiple) * multiple for e in order]
    assert min(sizes) == 0
    assert ends.diff(prepend=ends.new_zeros(1)).tolist() == (sorted(sizes) if by_rows else sizes)


@pytest.mark.parametrize(
    ("width", "dtype", "autocast", "expected"),
    [
        (8, torch.float32, False, {0: (1, False), 1: (1, True), 40: (8, True), 500: (32, True)}),
        (8, torch.bfloat16, False, {0: (1, False), 1: (1, True), 40: (32, True), 500: (32, True)}),
        (8, torch.float32, True, {5: (4, True), 40: (32, True)}),
        (512, torch.float32, False, {0: (1, False), 40: (1, False)}),
        (512, torch.float32, True, {0: (1, False), 1: (16, False), 40: (16, False)}),
    ],
)
def test_rows_are_rounded_up_by_their_number_the_size_of_experts_and_precision(width, dtype, autocast, expected):
    layer, x = TokenChoice(width, 64, 4, capacity_factor=None), torch.empty(3, width, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        assert {rows: order_of_slots(layer, x, rows) for rows in expected} == expected


def test_experts_with_equally_many_rows_are_multiplied_at_once_by_powers_of_two():
    runs = list(dispatching._runs(torch.tensor([0, 0, 8, 8, 8, 8, 8, 40]).cumsum(0)))
    assert [shape for *_, shape in runs] == [(2, 0), (4, 8), (1, 8), (1, 40)]
    assert [which for which, *_ in runs] == [slice(0, 2), slice(2, 6), slice(6, 7), slice(7, 8)]
    assert [rows for _, rows, _ in runs] == [slice(0, 0), slice(0, 32), slice(32, 40), slice(40, 80)]


SIZES = {"many": [3, 0, 16, 17, 1, 40, 15, 2], "few": [0, 1, 0, 0, 2, 0, 0, 0], "alike": [0, 0, 8, 8, 8, 8, 8, 40]}
WAYS = [
    *itertools.product([False], [torch.float64, torch.float32, torch.bfloat16], [6, 16]),
    *itertools.product([True], [torch.float32, torch.bfloat16], [16]),
]


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize(("one_call", "dtype", "width"), WAYS)
def test_products_of_uneven_rows_are_each_expert_s_own(dtype, width, one_call, sizes, monkeypatch):
    """In runs, or as on a GPU in one call, if rows are multiples of 16 bytes. Rows after the last must not show."""
    order = torch.tensor([5, 2, 0, 7, 1, 6, 3, 4])
    if one_call:
        monkeypatch.setattr(dispatching, "_in_one_call", lambda *operands: True)
    ends = torch.tensor(sizes).cumsum(0)
    used = int(ends[-1])
    x = tokens(used + 5, 8, seed=1, dtype=dtype)
    x[used:] = math.nan
    weight, cotangent = tokens(len(sizes), width, 8, seed=2, dtype=dtype), tokens(used + 5, width, seed=3, dtype=dtype)
    x.requires_grad_(), weight.requires_grad_()
    y = ragged_linear(x, weight, ends, order)
    y.backward(cotangent)
    assert not y[used:].any()
    assert x.grad is not None
    assert weight.grad is not None
    for part, g, own, its, into_x, into_its in zip(
        *(torch.split(each[:used], sizes) for each in (x.detach(), cotangent)),
        *(weight.detach()[order], torch.split(y.detach()[:used], sizes)),
        *(torch.split(x.grad[:used], sizes), weight.grad[order]),
        strict=True,
    ):
        for found, expected in ((its, part @ own.T), (into_x, g @ own), (into_its, g.T @ part)):
            assert_close(found, expected)


def test_a_router_s_logits_keep_their_precision_under_autocast_and_gradients_have_autocast_s():
    x, weight, cotangent = (
        tokens(*shape, seed=i, dtype=torch.float32) for i, shape in enumerate([(3, 5, 16), (7, 16), (3, 5, 7)])
    )
    x, weight = x.requires_grad_(), weight.requires_grad_()

    def found(autocast: bool) -> tuple[Tensor, ...]:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = precise_linear(x, weight)
        return y, *torch.autograd.grad(y, (x, weight), cotangent)

    (exact, *exact_gradients), (logits, *of_autocast) = found(False), found(True)
    assert_close(logits, exact)
    assert logits.dtype == torch.float32
    for gradient, expected in zip(of_autocast, exact_gradients, strict=True):
        assert gradient.dtype == torch.float32
        assert 1e-4 < relative_error(gradient, expected) < 1e-2


def test_a_router_in_float64_has_gradients_in_float64():
    layer = build("mot", dtype=torch.float32, router_dtype=torch.float64)
    x = tokens(dtype=torch.float32).requires_grad_()
    weight, cotangent = layer.gate.weight, tokens(*x.shape[:2], layer.num_experts, seed=1)

    def into_weight(autocast: bool) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            logits = layer.gate(x)
        (gradient,) = torch.autograd.grad(logits, weight, cotangent.to(logits.dtype), create_graph=True)
        assert gradient.requires_grad  # for second derivatives
        return gradient

    expected = cotangent.double().flatten(0, 1).T @ x.detach().double().flatten(0, 1) / layer.gate.temperature
    for autocast in (False, True):
        assert relative_error(into_weight(autocast), expected) < 1e-7


def test_a_router_s_logits_are_precise_for_bfloat16_tokens_and_gradients_are_in_bfloat16():
    x = tokens(3, 5, 16, dtype=torch.bfloat16).requires_grad_()
    weight = tokens(7, 16, seed=1, dtype=torch.float32).requires_grad_()
    cotangent = tokens(3, 5, 7, seed=2, dtype=torch.float32)
    y = precise_linear(x, weight)
    assert y.dtype == torch.float32
    exact = torch.nn.functional.linear(x.double(), weight.double())
    assert_close(y, exact.float())
    for of, gradient, expected in zip(
        (x, weight),
        torch.autograd.grad(y, (x, weight), cotangent, create_graph=True),
        torch.autograd.grad(exact, (x, weight), cotangent.double()),
        strict=True,
    ):
        assert gradient.dtype == of.dtype
        assert 1e-4 < relative_error(gradient, expected) < 1e-2
        assert gradient.requires_grad  # for second derivatives
    in_a_map = torch.func.vmap(precise_linear, in_dims=(0, None))(x, weight)
    assert_close(in_a_map, y)


class Counting(TorchDispatchMode):
    """The calls of operators that compute the gradients of experts' weights, among others."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += func.name() in ("aten::bmm", "mixture_of_tokens::ragged_weight_gradient")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["mot", "tc_top2_dropping", "tc_top2"])
def test_frozen_experts_cost_no_gradients(name):
    layer, calls = build(name), []
    for trained in (True, False):
        layer.experts.requires_grad_(trained)
        y = layer(tokens().requires_grad_())
        with Counting() as counting:
            y.backward(tokens(seed=3))
        calls.append(counting.calls)
    assert calls[0] - calls[1] == 2  # two matrices each


@pytest.mark.parametrize("name", ROUTINGS)
def test_help_of_a_layer_says_what_it_takes_and_gives(name):
    layer = build(name)
    assert "token_mask: (B, T)" in (inspect.getdoc(layer.forward) or "")
    with pytest.raises(ValueError, match=r"x must be of a floating-point type, not torch\.int64"):
        layer(torch.ones(B, T, D, dtype=torch.int64))


@pytest.mark.parametrize("name", ROUTINGS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_what_moves_by_small_steps_stays_in_fp32_at_least(name, dtype):
    layer = build(name, dtype=torch.float32)
    before = {name: buffer.clone() for name, buffer in layer.named_buffers(recurse=False)}
    layer.to(dtype)
    precise = torch.promote_types(dtype, torch.float32)
    for name, parameter in layer.named_parameters():
        assert parameter.dtype == (precise if name == "gate.log_temperature" else dtype)
    for name, buffer in layer.named_buffers(recurse=False):
        assert buffer.dtype == torch.promote_types(dtype, torch.float32)
        assert torch.equal(buffer.float(), before[name])


def test_loads_are_balanced_in_a_layer_of_bf16():
    """The bias moves by less than two numbers of bf16 are apart."""
    layer = SigmoidChoice(D, F, 2).to(torch.bfloat16)
    layer.selection_bias.copy_(torch.tensor([0.5, -0.5]))  # expert 0 has nearly all tokens
    for seed in range(20):
        layer(tokens(seed=seed, dtype=torch.bfloat16))
        SigmoidChoice.balance([layer])
    assert_close(layer.selection_bias, torch.tensor([0.48, -0.48]))


def test_a_learned_temperature_moves_by_small_steps_in_a_layer_of_bf16():
    layer = MixtureOfTokens(D, F, E, G, temperature=0.3, learnable_temperature=True)
    exact = layer.gate.log_temperature.detach().clone()
    layer.gate.log_temperature.grad = torch.ones(())
    layer.to(torch.bfloat16)
    temperature = layer.gate.log_temperature
    assert torch.equal(temperature, exact)
    assert temperature.grad is not None
    assert temperature.grad.dtype == torch.float32
    optimizer = torch.optim.SGD([temperature], lr=1e-3)
    for _ in range(200):
        temperature.grad = torch.ones(())
        optimizer.step()
    assert_close(temperature.detach(), exact - 0.2)
    assert layer.to("meta").gate.log_temperature.dtype == torch.float32


@pytest.mark.parametrize("make", [lambda: MixtureOfTokens(D, F, E, G), lambda: ExpertThreshold(D, F, E)])
def test_a_layer_that_was_on_no_device_is_initialised_by_torch_s_convention(make):
    with torch.device("meta"):
        layer = make()
    layer.to_empty(device="cpu")
    for module in layer.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    assert layer(tokens(B, T, D, dtype=torch.float32)).isfinite().all()
    assert all(buffer.isfinite().all() for buffer in layer.buffers())
