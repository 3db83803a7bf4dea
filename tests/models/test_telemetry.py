"""Router telemetry: the weights are the layer's own, the measures are worked by hand, the model is left as it was."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.testing import assert_close

from mixture_of_tokens import MixtureOfTokensForCausalLM
from mixture_of_tokens.layers.experts import Router
from mixture_of_tokens.layers.mixture import MixtureOfTokens
from mixture_of_tokens.layers.soft import SoftMoE
from mixture_of_tokens.layers.token_choice import DefaultMoE
from mixture_of_tokens.models.telemetry import measure, router_gradient_norms, routing_measures
from mixture_of_tokens.settings.routings import TABLE
from mixture_of_tokens.training.trainer import _RouterGradients
from processes import finish, start
from routings import DROPPING, ROUTINGS, D, E, T, build, relative_error, some_mask, tiny, tokens

KINDS = [row.kind for row in TABLE if row.sparse]
EXPERTS, GROUP, ROWS, LENGTH = 5, 4, 8, 10


def in_training(kind: str, **fields) -> MixtureOfTokensForCausalLM:
    return tiny(kind, num_experts=EXPERTS, group_size=GROUP, **fields).train()


def probe(rows: int = ROWS, seed: int = 1) -> dict[str, Tensor]:
    """No token twice in a column."""
    generator = torch.Generator().manual_seed(seed)
    columns = [torch.randperm(97, generator=generator)[:rows] for _ in range(LENGTH)]
    return {"input_ids": torch.stack(columns, dim=1)}


def padded(seed: int = 1) -> dict[str, Tensor]:
    mask = torch.ones(ROWS, LENGTH, dtype=torch.long)
    mask[0, :4] = mask[5, :7] = 0
    return probe(seed=seed) | {"attention_mask": mask}


@pytest.fixture(params=KINDS)
def kind(request) -> str:
    return request.param


# The weights


def weights_of(layer, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """The layer's output, and the weights by which it is said to have been made."""
    with torch.no_grad():
        y, weights = layer(x, mask, return_weights=True)
        assert torch.equal(y, layer(x, mask))
    return y, weights


def combined(layer, x: Tensor, mask: Tensor | None, weights: Tensor) -> Tensor:
    """What the weights say that the layer's output is."""
    if isinstance(layer, SoftMoE):  # all weights of an expert's slots are known together, so only for one slot
        logits = layer.gate(x if mask is None else x.masked_fill(~mask[..., None], 0))
        dispatch, combine = layer.weights(logits, None if mask is None else mask[..., None])
        assert_close(combine.unflatten(-1, (E, -1)).sum(-1), weights)
        x = x if mask is None else x.masked_fill(~mask[..., None], 0)
        slots = torch.einsum("bts,btd->sbd", dispatch, x).unflatten(0, (E, -1)).flatten(1, 2)
        return torch.einsum("bts,sbd->btd", combine, layer.experts(slots).unflatten(1, (-1, len(x))).flatten(0, 1))
    if not isinstance(layer, MixtureOfTokens):
        outputs = layer.experts(x.flatten(0, 1).expand(E, -1, -1))
        return torch.einsum("se,esd->sd", weights.flatten(0, 1), outputs).view_as(x)
    y = torch.zeros_like(x)
    for first in range(0, len(x), layer.group_size):
        rows = slice(first, first + layer.group_size)
        for t in range(x.shape[1]):
            w = weights[rows, t].to(x.dtype)
            if mask is not None and not mask[rows, t].any():
                assert not w.any()
                continue
            lacking = layer.group_size - (len(x[rows]) if mask is None else int(mask[rows, t].sum()))
            each = (1 - w.sum(0)) / max(lacking, 1)  # of the companions
            into = torch.cat([w, each.expand(lacking, -1)])
            if layer.normalize_mixture:
                into, each = into / into.norm(dim=0), each / into.norm(dim=0)
            mixtures = into[: len(w)].T @ x[rows, t] + (lacking * each)[:, None] * layer.companion
            y[rows, t] = w @ layer.experts(mixtures[:, None])[:, 0]
    return y


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("rows", "masked"), [(6, False), (6, True), (7, True), (2, False)])
@pytest.mark.parametrize("name", ROUTINGS)
def test_the_weights_applied_to_the_experts_outputs_are_the_layers_output(name, rows, masked, training):
    layer, x = build(name).train(training), tokens(rows, T, D)
    if isinstance(layer, DefaultMoE):
        layer.default_output.zero_()  # which is no expert's output for the token
    mask = some_mask(rows, T) if masked else None
    y, weights = weights_of(layer, x, mask)
    assert weights.shape == (rows, T, E)
    assert relative_error(combined(layer, x, mask, weights), y) < 1e-12


def test_a_layer_that_serves_texts_alone_has_no_weights_of_groups():
    layer = build("mot").eval()
    layer.serve_alone()
    with pytest.raises(ValueError, match="return_weights is for texts in groups"):
        layer(tokens(), return_weights=True)


@pytest.mark.parametrize("name", DROPPING)
def test_the_weights_know_who_was_dropped(name):
    # The control: weights without dropping, in evaluation, do not give training's output.
    layer, x = build(name), tokens()
    y, weights = weights_of(layer, x, None)
    _, dropless = weights_of(layer.eval(), x, None)
    assert (weights.count_nonzero(), dropless.count_nonzero()) == (
        assignments(layer, x, kept=True),
        assignments(layer, x, kept=False),
    )
    assert relative_error(combined(layer, x, None, dropless), y) > 0.1


def assignments(layer, x: Tensor, *, kept: bool) -> int:
    """Choices of all tokens, or those within the capacity, counted expert by expert."""
    tokens_, k = x.shape[0] * x.shape[1], layer.num_experts_per_tok
    asked = layer.gate(x).topk(k).indices.flatten().bincount(minlength=E)
    capacity = math.ceil(layer.capacity_factor * tokens_ * k / E)
    return int((asked.clamp(max=capacity) if kept else asked).sum())


# The measures


def test_measures_of_a_group_worked_by_hand():
    # One position, one group of two tokens a and b, three experts: the first gives both 1/2, the second all to a, the
    # third nothing. Entropies ln 2 and 0. a has (1/2, 1): of its weights 1/3 and 2/3; b has one expert.
    weights = torch.tensor([[[0.5, 1.0, 0.0]], [[0.5, 0.0, 0.0]]])
    entropy_of_a = math.log(3) - 2 / 3 * math.log(2)
    found = routing_measures(weights, torch.ones(2, 1, dtype=torch.bool), 2)
    expected = {
        "mixture_entropy": (1 + 0) / 2,
        "effective_tokens": (2 + 1) / 2,
        "effective_experts": (math.exp(entropy_of_a) + 1) / 2,
        "experts_per_token": (2 + 1) / 2,
        "dead_experts": 1 / 3,
        "dropped": 0.0,
        "largest_load": 1 / (2 / 3),
    }
    assert {name: value.item() for name, value in found.items()} == pytest.approx(expected, rel=1e-6)


def test_a_layer_that_serves_nobody_is_all_dead():
    found = routing_measures(torch.zeros(4, 2, 3), torch.ones(4, 2, dtype=torch.bool), 2)
    measured = {name: found[name].item() for name in ("dead_experts", "dropped", "largest_load", "experts_per_token")}
    assert measured == {"dead_experts": 1, "dropped": 1, "largest_load": 0, "experts_per_token": 0}


def test_a_group_is_one_position_of_consecutive_rows():
    # Four rows and two positions in groups of two; the only expert gives row 2 everything at position 0, and rows 2 and
    # 3 halves at position 1. Over all eight tokens, or over rows, the entropy would be another.
    weights = torch.zeros(4, 2, 1)
    weights[2, 0], weights[2:, 1] = 1, 0.5
    found = routing_measures(weights, torch.ones(4, 2, dtype=torch.bool), 2)
    assert found["mixture_entropy"].item() == pytest.approx((0 + 1) / 2)
    assert found["effective_tokens"].item() == pytest.approx((1 + 2) / 2)
    assert found["dropped"].item() == 5 / 8


def test_entropy_is_normalised_by_the_real_tokens_of_a_group():
    # Three of four tokens are real and share evenly; a group of one token has no entropy to speak of.
    weights, mask = torch.zeros(4, 2, 1), torch.zeros(4, 2, dtype=torch.bool)
    weights[:3, 0], mask[:3, 0] = 1 / 3, True
    weights[0, 1], mask[0, 1] = 1, True
    found = routing_measures(weights, mask, 4)
    assert found["mixture_entropy"].item() == pytest.approx(1)
    assert found["effective_tokens"].item() == pytest.approx((3 + 1) / 2)
    assert found["dropped"].item() == 0
    lone = routing_measures(weights[:1, 1:], mask[:1, 1:], 4)
    assert (lone["mixture_entropy"].item(), lone["effective_tokens"].item()) == (0, 1)


@pytest.mark.parametrize(("weight", "negligible"), [(0.009, 1.0), (0.011, 0.0)])
def test_under_a_hundredth_of_the_mean_is_negligible(weight, negligible):
    # 1000 experts and 1000 tokens, each served by its own with weight 1, but for one.
    own = torch.ones(1000)
    own[7] = weight
    found = routing_measures(own.diag()[:, None], torch.ones(1000, 1, dtype=torch.bool), 1000)
    assert found["dead_experts"].item() == pytest.approx(negligible / 1000)
    assert found["dropped"].item() == pytest.approx(negligible / 1000)


# Of a model


def routed(measures: dict[str, dict[str, float]]) -> list[dict[str, float]]:
    assert list(measures) == ["0", "1", "2"]
    assert list(measures["0"]) == ["branch_to_residual"]
    return [measures["1"], measures["2"]]


@pytest.mark.parametrize("kind", ["mixture_of_tokens", "uniform"])
def test_a_router_of_zeros_mixes_evenly(kind):
    model, batch = in_training(kind), probe()
    for block in model.model.layers[1:]:
        if kind == "mixture_of_tokens":
            torch.nn.init.zeros_(block.mlp.gate.weight)
    even = {"mixture_entropy": 1, "effective_tokens": GROUP, "effective_experts": EXPERTS}
    even["experts_per_token"] = EXPERTS
    even |= {"dead_experts": 0, "dropped": 0, "largest_load": 1}
    for measures in routed(measure(model, batch)):
        assert measures.pop("branch_to_residual") > 0
        assert measures == pytest.approx(even, rel=1e-5)


def test_a_tiny_temperature_gives_each_expert_one_token():
    model, batch = in_training("mixture_of_tokens"), probe()
    warm = routed(measure(model, batch))
    for router in (module for module in model.modules() if isinstance(module, Router)):
        router.set_temperature(1e-6)
    for measures, before in zip(routed(measure(model, batch)), warm, strict=True):
        assert measures["mixture_entropy"] < 1e-3 < before["mixture_entropy"]
        assert measures["effective_tokens"] == pytest.approx(1, abs=1e-3)
        # 5 experts choose among 4 tokens: few choose all four, and then one has two experts.
        assert before["dropped"] == 0 < measures["dropped"]
        assert measures["effective_experts"] == pytest.approx(EXPERTS / GROUP / (1 - measures["dropped"]), rel=0.05)


def test_token_choice_forced_to_one_expert():
    """The residual stream is the embeddings, all positive; a router's row of ones then wins over rows of zeros."""
    model, batch = in_training("token_choice", capacity_factor=1.25), probe()
    with torch.no_grad():
        model.model.embed_tokens.weight.abs_()
        for block in model.model.layers:
            block.self_attn.o_proj.weight.zero_()
            for parameter in block.mlp.parameters():
                parameter.zero_()
        for block in model.model.layers[1:]:
            block.mlp.gate.weight[3] = 1
    n = ROWS * LENGTH
    capacity = math.ceil(1.25 * n / EXPERTS)  # 20 of 80: the first two columns of 8, and a group of the third
    expected = {
        "mixture_entropy": 1,
        "effective_tokens": GROUP,
        "effective_experts": 1,
        "experts_per_token": capacity / n,
        "dead_experts": (EXPERTS - 1) / EXPERTS,
        "dropped": 1 - capacity / n,
        "largest_load": EXPERTS,
        "branch_to_residual": 0,
    }
    for mode in (True, False):  # as in training, also when it is called between evaluations
        for measures in routed(measure(model.train(mode), batch)):
            # Gates are nearly one, and so nearly even.
            assert measures == pytest.approx(expected, abs=0.01)
    model.model.layers[1].mlp.capacity_factor = None
    assert measure(model, batch)["1"]["dropped"] == 0


def test_expert_choice_takes_one_token_a_group():
    # C = max(1, round(4 / 5)) = 1: an expert's weight is on one token, and at most all 5 experts on the same one.
    for measures in routed(measure(in_training("expert_choice"), probe())):
        assert (measures["mixture_entropy"], measures["effective_tokens"]) == (0, 1)
        assert 0 < measures["dropped"] < 1 - 1 / GROUP
        assert 1 < measures["effective_experts"] < EXPERTS


def test_branch_to_residual_is_the_feed_forwards_rms_over_the_streams(kind):
    model, batch = tiny(kind, group_size=GROUP), padded()
    inside: list[tuple[Tensor, Tensor]] = []
    handles = [
        block.mlp.register_forward_hook(lambda module, args, output: inside.append((args[0], output)))
        for block in model.model.layers
    ]
    blocks = model(**batch, output_hidden_states=True).hidden_states
    for handle in handles:
        handle.remove()
    real = batch["attention_mask"].bool()
    found = measure(model, batch)
    for i in range(2 if kind != "token_choice" else 1):  # the last hidden state is normalised; TC drops in training
        branch = inside[i][1][real]
        residual = blocks[i + 1][real] - branch
        expected = branch.square().mean().sqrt() / residual.square().mean().sqrt()
        assert found[str(i)]["branch_to_residual"] == pytest.approx(expected.item(), rel=1e-5)


def test_a_dense_model_has_the_branch_alone():
    found = measure(in_training("dense"), probe())
    assert [list(measures) for measures in found.values()] == [["branch_to_residual"]] * 3


def test_masked_tokens_count_nowhere(kind):
    model, batch = in_training(kind), padded()
    expected = measure(model, batch)
    other = torch.where(batch["attention_mask"].bool(), batch["input_ids"], padded(seed=5)["input_ids"])
    assert not torch.equal(other, batch["input_ids"])
    assert measure(model, batch | {"input_ids": other}) == expected
    # A group of padding more changes sizes, and the order of sums with them.
    longer = {name: torch.cat([x, x[:GROUP]]) for name, x in batch.items()}
    longer["attention_mask"][ROWS:] = 0
    for i, measures in measure(model, longer).items():
        assert measures == pytest.approx(expected[i], rel=1e-5, abs=1e-6)
    # The control: what is said to be real does count.
    unmasked = {"input_ids": batch["input_ids"]}
    assert measure(model, unmasked) != measure(model, {"input_ids": other})


def test_measures_are_in_full_precision_under_low_precision(kind, monkeypatch):
    model, batch = in_training(kind).bfloat16(), probe()
    even = kind not in ("uniform", "expert_choice", "expert_threshold", "remoe")
    for block in model.model.layers[1:]:
        if even:
            torch.nn.init.zeros_(block.mlp.gate.weight)
    summed: list[Tensor] = []
    residuals: list[Tensor] = []
    branches: list[Tensor] = []
    for block in model.model.layers:
        block.post_attention_layernorm.register_forward_pre_hook(lambda module, args: residuals.append(args[0]))
        block.mlp.register_forward_hook(lambda module, args, output: branches.append(output))

    def noted(weights: Tensor, *how) -> dict[str, Tensor]:
        summed.append(weights)
        return routing_measures(weights, *how)

    monkeypatch.setattr("mixture_of_tokens.models.telemetry.routing_measures", noted)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        measured = measure(model, batch)
    found = routed(measured)
    for measures, residual, branch in zip(measured.values(), residuals, branches, strict=True):
        expected = branch.double().norm() / residual.double().norm()
        assert measures["branch_to_residual"] == pytest.approx(expected.item(), rel=1e-5)
    assert [weights.dtype for weights in summed] == [torch.float32] * 2
    if not even and kind != "uniform":  # whose weights are numbers of bf16 too
        assert not any(weights.equal(weights.bfloat16().float()) for weights in summed)
    for measures in found:
        assert all(math.isfinite(value) for value in measures.values())
        if even or kind == "uniform":  # equal weights, which a sum in bf16 would not get to within 1e-5
            one_takes_all = kind in ("token_choice", "sigmoid_choice", "default_moe")
            assert measures["largest_load"] == pytest.approx(EXPERTS if one_takes_all else 1, rel=1e-5)


# What it leaves behind


def state(model) -> dict:
    return {
        "rng": torch.get_rng_state().tolist(),
        "modes": {name: module.training for name, module in model.named_modules()},
        "hooks": {n: (len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in model.named_modules()},
        "children": {name: id(module) for name, module in model.named_modules()},
        "weights": {name: value.tolist() for name, value in model.state_dict().items()},
        "gradients": {name: parameter.grad for name, parameter in model.named_parameters()},
    }


def test_the_model_is_left_as_it_was_and_equal_weights_give_equal_measures(kind):
    model = in_training(kind, attention_dropout=0.5)
    model.model.layers[1].eval()  # a mode of its own
    graphs: list[bool] = []  # a hook of its own, which sees whether a graph is built
    model.lm_head.register_forward_hook(lambda module, args, output: graphs.append(output.requires_grad))
    before = state(model)
    first = measure(model, probe())
    assert state(model) == before
    assert graphs == [False]
    torch.manual_seed(7)
    model.eval()
    assert measure(model, probe() | {"shift_labels": torch.zeros(1)}) == first
    assert not model.training
    assert torch.is_grad_enabled()


def test_an_error_leaves_no_hooks_and_the_mode(kind):
    model = in_training(kind)
    before = state(model)
    with pytest.raises(IndexError):
        measure(model, {"input_ids": probe()["input_ids"] + 97})
    # An error inside a hook.
    del model.model.layers[2].mlp.experts.down_proj
    with pytest.raises(AttributeError):
        measure(model, probe())
    assert state(model)["hooks"] == before["hooks"]
    assert state(model)["modes"] == before["modes"]


def test_gradients_of_a_step_are_those_of_a_step_without_a_probe(kind):
    batch, gradients = probe(), []
    for probed in (False, True):
        model = in_training(kind)
        loss = model(**batch, labels=batch["input_ids"]).loss
        if probed:
            measure(model, batch)
        loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert_close(*gradients, rtol=0, atol=0)


# Gradients of routers


def test_router_gradient_norms_are_autograds(kind):
    model, batch = in_training(kind), probe()
    assert router_gradient_norms(model) == {}
    gates = {str(i): getattr(model.model.layers[i].mlp, "gate", None) for i in (1, 2)}
    weights = {i: gate.weight for i, gate in gates.items() if gate is not None}
    assert bool(weights) == (kind != "uniform")
    expected = {}
    if weights:
        loss = model(**batch, labels=batch["input_ids"]).loss
        found = torch.autograd.grad(loss, list(weights.values()))
        expected = {i: g.square().sum().sqrt().item() for i, g in zip(weights, found, strict=True)}
    model(**batch, labels=batch["input_ids"]).loss.backward()
    assert router_gradient_norms(model) == pytest.approx(expected, rel=1e-5)
    for parameter in model.parameters():
        parameter.grad = None
    assert router_gradient_norms(model) == {}


def sharded(rank: int, rendezvous: str, expected: tuple) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    model = in_training("token_choice")
    for block in model.model.layers:
        fully_shard(block)
    fully_shard(model)
    batch = probe()
    model(**batch, labels=batch["input_ids"]).loss.backward()
    norms, measures = router_gradient_norms(model), measure(model, batch)
    assert norms == pytest.approx(expected[0], rel=1e-5)
    for i in measures:
        assert measures[i] == pytest.approx(expected[1][i], rel=1e-5)
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize(("total", "expected"), [(1.0, 2.0), (math.inf, math.inf)])
def test_router_gradient_norms_are_those_before_clipping(total, expected, monkeypatch):
    monkeypatch.setattr("mixture_of_tokens.training.trainer.router_gradient_norms", lambda model: {"1": 1.0})
    trainer: Any = SimpleNamespace(total_norm=torch.tensor(total), causal_lm=None, gradient_norms={})
    state, args = SimpleNamespace(global_step=19, logging_steps=20), SimpleNamespace(max_grad_norm=0.5)
    _RouterGradients(trainer).on_pre_optimizer_step(args, state, None)
    assert trainer.gradient_norms["1"] == pytest.approx(expected, rel=1e-5)


def test_sharded_parameters_give_the_same_telemetry(tmp_path):
    model, batch = in_training("token_choice"), probe()
    model(**batch, labels=batch["input_ids"]).loss.backward()
    expected = (router_gradient_norms(model), measure(model, batch))
    words = (str(tmp_path / "rendezvous"), expected)
    processes = [start(sharded, rank, *words, log=tmp_path / "log") for rank in range(2)]
    assert [finish(process) for process in processes] == [0, 0], (tmp_path / "log").read_text()
