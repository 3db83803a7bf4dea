"""The weights of a Mixture of Tokens in a Token Choice model, and what is fitted before its first step."""

import math
import os
import signal
import threading

import pytest
import torch
from torch.testing import assert_close
from tqdm import tqdm

import reference
from mixture_of_tokens import MixtureOfTokensForCausalLM, calibrate_companions
from mixture_of_tokens.conversion import distil as distillation
from mixture_of_tokens.conversion.distil import distil
from mixture_of_tokens.conversion.switch import branches, rescale_moments, to_token_choice, token_choice_config
from mixture_of_tokens.data.groups import training_groups
from mixture_of_tokens.evaluation.losses import cross_entropy
from mixture_of_tokens.runs.loading import load_model, text_of
from mixture_of_tokens.utils.progress import progress_bar
from routings import small_model, tokens

MIXED = "MoT-Nano/4E/2"


def switched(source, **options):
    target = MixtureOfTokensForCausalLM(token_choice_config(source.config, **options)).to(source.dtype).eval()
    return target, to_token_choice(source, target)


@pytest.mark.parametrize("learnable", [False, True])
@pytest.mark.parametrize("top_k", [None, 1])
def test_a_token_gets_its_top_experts_by_the_same_logits(learnable, top_k):
    options = {"num_experts_per_tok": 2, "router_temperature": 0.5, "learnable_temperature": learnable}
    source = small_model("mixture_of_tokens", **options).double()
    target, scales = switched(source, top_k=top_k)
    mixing, choosing = source.model.layers[1].mlp, target.model.layers[1].mlp
    x = torch.randn(4, 5, 16, dtype=torch.float64)
    expected = reference.token_choice(
        x,
        None,
        mixing.gate.weight,
        (mixing.experts.gate_up_proj, mixing.experts.down_proj),
        num_experts_per_tok=2 if top_k is None else top_k,
        temperature=mixing.gate.temperature,
    )
    assert_close(choosing(x), expected, rtol=1e-6, atol=1e-6)  # the temperature is a number in float32
    assert scales["model.layers.1.mlp.gate.weight"] == pytest.approx(
        1 / float(torch.as_tensor(mixing.gate.temperature).detach())
    )
    others = {name: value for name, value in source.named_parameters() if ".mlp.gate." not in name}
    assert any(name.endswith("mlp.gate_proj.weight") for name in others)  # of a dense block
    for name, value in others.items():
        assert torch.equal(target.get_parameter(name), value), name


def test_shared_experts_stay_as_they_are():
    source = small_model("mixture_of_tokens", shared_experts=2, num_experts_per_tok=2)
    target, _ = switched(source, scores="sigmoid")
    names = [name for name, _ in source.named_parameters() if "shared_experts" in name]
    assert len(names) == 3
    assert all(torch.equal(source.get_parameter(name), target.get_parameter(name)) for name in names)
    # What a block gives is what its routed experts give and what the shared ones do.
    block, x = source.model.layers[1], torch.randn(3, 4, 16)
    noted = []
    block.mlp.register_forward_hook(lambda module, args, output: noted.append((args[0], output)))
    positions = source.model.rotary_emb(x, torch.arange(4)[None])
    y = block(x, position_embeddings=positions, attention_mask=None)
    (normed, routed), with_them = noted.pop(), y
    shared, block.shared_experts = block.shared_experts, None
    assert_close(with_them - block(x, position_embeddings=positions, attention_mask=None), shared(normed))
    assert shared.down_proj.weight.shape == (16, 2 * 12)
    assert routed.abs().max() > 0


@pytest.mark.parametrize("kind", ["dense", "uniform", "token_choice", "expert_choice"])
def test_only_a_mixture_with_a_router_becomes_token_choice(kind):
    with pytest.raises(ValueError, match="only a Mixture of Tokens with a router can become Token Choice"):
        token_choice_config(small_model(kind).config)


@pytest.fixture(scope="module")
def trained(tiny_runs):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MIXTURE_OF_TOKENS_CACHE", str(tiny_runs["TC-Nano/4E"].parent / "cache"))
        return load_model(str(tiny_runs[MIXED])), text_of(str(tiny_runs[MIXED]))


@pytest.fixture(scope="module")
def seen(trained):
    source, text = trained
    calibrate_companions(source, list(training_groups(text.train, 32))[:3])
    return branches(source, training_groups(text.train, source.config.group_size, groups=None), 94 * 64)


def test_branches_are_what_each_layer_gives_a_text_alone(trained, seen):
    source, text = trained
    rows = next(iter(training_groups(text.train, source.config.group_size)))["input_ids"]
    with torch.no_grad():
        source.serve_alone()
        hidden = source(rows, output_hidden_states=True, use_cache=False).hidden_states
        source.serve_alone(False)
    block = source.model.layers[2]
    (x_SD, y_SD), after = seen[2], hidden[3].flatten(0, 1)
    assert set(seen) == {2, 3}
    assert len(x_SD) == len(y_SD) == 94 * 64
    residual = after - y_SD[: len(after)]  # what the feed-forward's output was added to
    assert_close(block.post_attention_layernorm(residual), x_SD[: len(after)], rtol=1e-4, atol=1e-4)
    # Alone a layer is a sparse one with sigmoid gates, a bias an expert, and all experts.
    expected = reference.alone(x_SD[:5], block.mlp)
    assert_close(y_SD[:5], expected, rtol=1e-4, atol=1e-5)


def test_branches_may_be_of_few_experts_of_a_token(trained, seen):
    source, text = trained
    groups = [next(iter(training_groups(text.train, source.config.group_size)))]
    found = branches(source, groups, 256, num_experts_alone=3)
    x_SD, y_SD = found[2]
    assert_close(x_SD, seen[2][0][:256], rtol=1e-4, atol=1e-5)  # no layer before it is a mixture
    layer = source.model.layers[2].mlp
    assert_close(y_SD[:5], reference.alone(x_SD[:5], layer, few=3), rtol=1e-4, atol=1e-5)
    assert (layer.alone, layer.num_experts_alone) == (False, 8)


@pytest.mark.parametrize("scores", ["softmax", pytest.param("sigmoid", marks=pytest.mark.slow)])
def test_distilled_layers_give_what_the_source_gives_alone(scores, trained, seen):  # `seen` has calibrated it
    source, text = trained
    target, _ = switched(source, scores=scores)
    rows = text.validation.batch(range(64))
    plain = cross_entropy(target, rows)[0]
    before = [weight.clone() for weight in source.state_dict().values()]
    errors = distil(source, target, text.train, steps=30)
    assert set(errors) == {"2", "3"}
    assert all(after < 0.5 * at_first for at_first, after in errors.values())
    assert cross_entropy(target, rows)[0] < plain
    assert all(torch.equal(a, b) for a, b in zip(source.state_dict().values(), before, strict=True))
    for name, weight in target.named_parameters():  # nothing but the sparse layers has changed
        assert torch.equal(weight, source.get_parameter(name)) == (".2.mlp." not in name and ".3.mlp." not in name), (
            name
        )
        assert weight.grad is None


def test_distillation_is_the_same_each_time(trained, seen):
    source, text = trained
    targets = [switched(source)[0] for _ in range(2)]
    for target in targets:
        distil(source, target, text.train, steps=10)
    for a, b in zip(*(target.parameters() for target in targets), strict=True):
        assert torch.equal(a, b)


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_layers_are_distilled_at_once_as_one_after_the_other(trained, seen, monkeypatch, two_threads):
    source, text = trained
    monkeypatch.setattr(distillation, "branches", lambda *_: seen)
    made, used = [], []
    advance = distillation.Fit.advance

    def noting(fit, *args):
        for step in advance(fit, *args):
            used.append((threading.get_ident(), torch.get_num_threads()))
            yield step

    monkeypatch.setattr(distillation.Fit, "advance", noting)
    for threads in (2, 1):
        torch.set_num_threads(threads)
        used.clear()
        made.append(switched(source)[0])
        distil(source, made[-1], text.train, steps=10)
        assert len(set(used)) == threads
        assert {number for _, number in used} == {1}
        assert torch.get_num_threads() == threads
    for name, weight in made[0].state_dict().items():
        assert torch.equal(weight, made[1].state_dict()[name]), name


def many_steps():
    for _ in range(10**6):
        yield


def interrupted_after_a_step():
    yield
    os.kill(os.getpid(), signal.SIGINT)  # to the main thread, which waits
    yield from many_steps()


def failing_after_a_step():
    yield
    raise ValueError("of this layer")


@pytest.mark.parametrize(
    ("steps", "error"), [(interrupted_after_a_step, KeyboardInterrupt), (failing_after_a_step, ValueError)]
)
def test_what_ends_one_layer_s_distillation_ends_all(steps, error, two_threads):
    fits = [steps(), many_steps()]
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background it is ignored
    try:
        with pytest.raises(error), tqdm(disable=True) as bar:
            distillation._at_once(fits, torch.device("cpu"), bar)
    finally:
        signal.signal(signal.SIGINT, before)
    assert torch.get_num_threads() == 2
    assert next(fits[1], "ended") is None


def test_distillation_reads_on_in_the_text_and_begins_it_again(trained, seen, monkeypatch):
    source, text = trained[0], trained[1].validation  # it is short
    monkeypatch.setattr(distillation, "PART", 4)
    parts, bars = [], []
    monkeypatch.setattr(distillation, "branches", lambda *args: parts.append(branches(*args)) or parts[-1])
    monkeypatch.setattr(
        distillation, "progress_bar", lambda *args, **how: bars.append(progress_bar(*args, **how)) or bars[-1]
    )
    target, _ = switched(source)
    errors = distil(source, target, text, steps=10)
    assert [len(part[2][0]) for part in parts] == [4 * 512, 4 * 512, 2 * 512]
    a_round = sum(group["input_ids"].numel() for group in training_groups(text, source.config.group_size, groups=None))
    inputs = torch.cat([part[2][0] for part in parts])
    assert 0 < a_round < len(inputs) < 2 * a_round, "the text is too long or too short for this test"
    assert not torch.equal(inputs[: 4 * 512], inputs[4 * 512 : 8 * 512])
    assert torch.equal(inputs[a_round:], inputs[: len(inputs) - a_round])
    assert errors["2"][1] == distillation.distance(target.model.layers[2].mlp, *parts[-1][2])
    assert bars[0].n == pytest.approx(bars[0].total)


@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize("scores", ["softmax", "sigmoid"])
def test_distillation_starts_from_biases_in_the_router_and_gates_in_the_experts(scores, normalised):
    """A softmax ignores what all biases have in common, log(G - 1)."""
    source = small_model("mixture_of_tokens", num_experts_per_tok=2).double()
    mixing, x = source.model.layers[1].mlp, 1 + tokens(300, 16)
    mixing.companion_logit[5] += 50  # so that nothing chooses this expert
    before, layer = (
        switched(source, scores=scores, norm_topk_prob=normalised)[0].model.layers[1].mlp for _ in range(2)
    )
    distillation.start(mixing, layer, x)
    bias, others = mixing.companion_logit, math.log(mixing.group_size - 1)
    constant = torch.linalg.lstsq(x, torch.ones(300, 1, dtype=x.dtype)).solution
    expected = before.gate.weight - (bias + others * (scores == "sigmoid"))[:, None] * constant.T
    assert_close(layer.gate.weight, expected, rtol=1e-4, atol=1e-4)
    gates = (x @ mixing.gate.weight.T / mixing.gate.temperature - bias - others).sigmoid().detach()
    for e in range(6):
        own = gates[(gates > gates[:, [e]]).sum(1) < 2, e]  # of tokens that have it among their two
        mean = float((own**3).sum() / (own**2).sum()) if len(own) else 0.05
        assert_close(layer.experts.gate_up_proj[e], mean * before.experts.gate_up_proj[e], rtol=1e-6, atol=0)
        assert (len(own) == 0) == (e == 5)
    new = x @ layer.gate.weight.T
    new = (new.softmax(-1) if scores == "softmax" else new.sigmoid()).detach()
    new = new / new.topk(2).values.sum(-1, keepdim=True) if normalised else new
    for e in range(6):
        chosen = (new > new[:, [e]]).sum(1) < 2
        by = float((new * gates)[chosen, e].sum() / new[chosen, e].square().sum()) if chosen.any() else 1
        assert_close(layer.experts.down_proj[e], by * before.experts.down_proj[e], rtol=1e-6, atol=0)
        assert bool(chosen.any()) == (e != 5)


def test_only_the_first_distillation_starts_so(trained, seen, monkeypatch):
    (source, text), (target, _) = trained, switched(trained[0])
    started = []
    monkeypatch.setattr(distillation, "start", lambda *layers: started.append(layers[:2]))
    distil(source, target, text.train, steps=1, again=True)
    assert started == []
    distil(source, target, text.train, steps=1)
    assert started == [(source.model.layers[i].mlp, target.model.layers[i].mlp) for i in (2, 3)]


@pytest.mark.parametrize(("again", "share"), [(False, distillation.RATE), (True, distillation.RATE_AGAIN)])
def test_a_layer_that_was_distilled_is_distilled_again_by_smaller_steps(again, share, trained, seen, monkeypatch):
    (source, text), (target, _) = trained, switched(trained[0])
    monkeypatch.setattr(distillation, "start", lambda *layers: None)
    before = {name: weight.clone().detach() for name, weight in target.named_parameters() if ".2.mlp." in name}
    distil(source, target, text.train, steps=1, again=again)
    assert len(before) == 3
    for name, weight in before.items():  # Adam's first step moves each by the rate
        moved = (target.get_parameter(name).detach() - weight).abs().max()
        of_the_rate = distillation.ROUTER if name.endswith("gate.weight") else 1
        assert_close(moved, of_the_rate * share * weight.abs().mean(), rtol=1e-2, atol=0)


def test_one_step_of_distillation_has_a_row_to_read(trained, seen):
    source, text = trained
    target, _ = switched(source)
    plain = target.model.layers[2].mlp.gate.weight.clone()
    distil(source, target, text.train, steps=1)
    assert not torch.equal(target.model.layers[2].mlp.gate.weight, plain)


def test_without_training_text_there_is_nothing_to_distil(trained):
    with pytest.raises(ValueError, match="there is too little to fit the switch to"):
        branches(trained[0], [], 1000)


def test_moments_are_those_of_training_the_scaled_weights():
    """Adam on w, then rescaled, has the moments that Adam on w' = s w has had all along."""
    torch.manual_seed(0)
    start, scale = torch.randn(3, 4, dtype=torch.float64), torch.tensor([[0.5], [2.0], [3.0]], dtype=torch.float64)
    gradients = [torch.randn(3, 4, dtype=torch.float64) for _ in range(5)]

    def moments(weight, by) -> torch.optim.Optimizer:
        adam = torch.optim.AdamW([weight], lr=1e-9)
        for gradient in gradients:
            weight.grad = gradient / by
            adam.step()
        return adam

    weight, scaled = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start * scale)
    before, expected = moments(weight, 1), moments(scaled, scale)
    rescale_moments(before, {id(weight): "w"}, {"w": scale})
    for key in ("exp_avg", "exp_avg_sq"):
        assert_close(before.state[weight][key], expected.state[scaled][key])
    rescale_moments(before, {id(weight): "w"}, {})  # nothing was multiplied
    assert_close(before.state[weight]["exp_avg"], expected.state[scaled]["exp_avg"])
