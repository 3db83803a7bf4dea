"""What stands for missing tokens: how it is measured, and that it serves a row alone and in private."""

import copy
import math

import pytest
import torch
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

import reference
from mixture_of_tokens import MixtureOfTokens, MixtureOfTokensForCausalLM, calibrate_companions, calibrate_thresholds
from mixture_of_tokens.data.groups import training_groups
from mixture_of_tokens.evaluation.losses import cross_entropy
from mixture_of_tokens.layers.grouping import warn_once
from mixture_of_tokens.layers.mixture import AT_ONCE
from mixture_of_tokens.layers.token_choice import TokenChoice
from mixture_of_tokens.runs.loading import load_model, text_of
from routings import E, G, T, build, gradients, some_mask, tiny, tokens

MIXED = "MoT-Nano/4E/2"


def mixing(kind: str = "mixture_of_tokens", **fields) -> MixtureOfTokensForCausalLM:
    return tiny(kind, **fields).double()


def batch(rows: int = 6, length: int = 7, seed: int = 0) -> dict[str, torch.Tensor]:
    return {"input_ids": torch.randint(37, (rows, length), generator=torch.Generator().manual_seed(seed))}


def layer_of(model) -> MixtureOfTokens:
    return model.model.layers[1].mlp


@pytest.mark.parametrize("options", [{}, {"normalize_mixture": True}, {"router_temperature": 0.3}], ids=str)
def test_companions_are_means_over_full_groups(options):
    model, seen = mixing(**options), []
    layer = layer_of(model)
    layer.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    calibrate_companions(model, [batch(), batch(3, seed=1)])
    inverse, mixtures, groups = torch.zeros(5).double(), torch.zeros(5, 24).double(), 0
    for x in seen:  # literally: every group, every expert
        for start in range(0, len(x), 3):
            for t in range(x.shape[1]):
                group = x[start : start + 3, t]
                exponentials = (group @ layer.gate.weight.double().T / layer.gate.temperature_setting).exp()
                total = exponentials.sum(0)
                inverse += 3 / total
                mixtures += (exponentials / total).T @ group
                groups += 1
    assert groups == 21
    assert_close(layer.companion_logit, -(inverse / groups).log())
    assert_close(layer.companion, mixtures / groups)


def test_full_groups_are_as_before_and_a_second_time_changes_nothing():
    model = mixing()
    logits, alone = model(**batch()).logits, model(**batch(1)).logits
    calibrate_companions(model, [batch(seed=1)])
    assert torch.equal(model(**batch()).logits, logits)
    assert not torch.allclose(model(**batch(1)).logits, alone)
    once = copy.deepcopy(model.state_dict())
    calibrate_companions(model, [batch(seed=1)])
    assert_close(dict(model.state_dict()), dict(once), rtol=0, atol=0)


def test_companions_do_not_reach_a_full_group_whose_mask_is_given():
    layer, x = build("mot", dtype=torch.float32), tokens(G, T, 8, dtype=torch.float32)
    full = torch.ones(G, T, dtype=torch.bool)
    y = layer(x, full)
    torch.nn.init.normal_(layer.companion, std=100)
    torch.nn.init.normal_(layer.companion_logit)
    assert torch.equal(layer(x, full), y)
    full[0, 0] = False
    assert not torch.allclose(layer(x, full)[1:, 0], y[1:, 0])


@pytest.mark.parametrize("options", [{"router_dtype": torch.bfloat16}, {"uniform": True}], ids=str)
def test_what_a_companion_weighs_is_not_rounded_to_the_precision_of_the_router(options):
    layer = MixtureOfTokens(8, 4, 5, 32, **options).to(torch.bfloat16)
    if layer.gate is not None:
        torch.nn.init.zeros_(layer.gate.weight)
    weights = layer.weights(torch.ones(1, 1, 8, dtype=torch.bfloat16), None, torch.full((1, 1, 1), 31.0))
    assert_close(weights, torch.full((1, 1, 5), 1 / 32), rtol=1e-6, atol=0)


def test_a_router_that_sees_no_difference_gets_the_mean_token():
    model = mixing("uniform")
    seen = []
    layer_of(model).register_forward_hook(lambda module, args, output: seen.append(args[0]))
    calibrate_companions(model, [batch()])
    assert_close(layer_of(model).companion_logit, torch.zeros(5).double())
    assert_close(layer_of(model).companion, seen[0].flatten(0, 1).mean(0).expand(5, 24))


def test_without_a_whole_group_there_is_nothing_to_measure():
    with pytest.raises(ValueError, match="no batch has a group of 3 real tokens"):
        calibrate_companions(mixing(), [batch(2)])
    calibrate_companions(tiny("token_choice"), [])  # nor is there without a Mixture of Tokens
    with pytest.raises(ValueError, match="model, a Linear, has no layer MixtureOfTokens"):  # not the caller's model?
        calibrate_companions(torch.nn.Linear(8, 8), [tokens(G, T, 8)])


def test_of_groups_that_lack_a_token_nothing_is_in_the_means():
    layer, x, mask = build("mot"), tokens(2 * G + 1, T, 8), torch.ones(2 * G + 1, T, dtype=torch.bool)
    mask[0, 0] = mask[:G, 1] = False  # one token of a group, all of another; and the last row is in no full group

    def measured(*batches) -> tuple[torch.Tensor, torch.Tensor]:
        calibrate_companions(layer, batches)
        return layer.companion.clone(), layer.companion_logit.clone()

    found = measured({"x_BTD": x, "token_mask": mask})
    assert_close(found, measured(x[:G, 2:], x[G : 2 * G]))
    for mean, other in zip(found, measured(x[: 2 * G]), strict=True):  # the control
        assert not torch.allclose(mean, other)


def test_companions_are_saved_and_zeros_where_a_checkpoint_has_none(tmp_path):
    model = mixing()
    calibrate_companions(model, [batch()])
    model.save_pretrained(tmp_path / "with")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "with", dtype=torch.float64)
    for name in ("companion", "companion_logit"):
        assert torch.equal(getattr(layer_of(again), name), getattr(layer_of(model), name))
    assert_close(again(**batch(1)).logits, model(**batch(1)).logits)
    without = {name: value for name, value in model.state_dict().items() if "companion" not in name}
    model.save_pretrained(tmp_path / "without", state_dict=without)
    older = AutoModelForCausalLM.from_pretrained(tmp_path / "without", dtype=torch.float64)
    assert not layer_of(older).companion.any()
    assert not layer_of(older).companion_logit.any()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", ["mot", "mot_normalized", "uniform"])
def test_alone_every_row_gets_what_it_gets_by_itself(name, masked, monkeypatch):
    layer, x, cotangent = build(name), tokens(2 * G + 1, T, 8), tokens(2 * G + 1, T, 8, seed=3)
    monkeypatch.setitem(AT_ONCE, "cpu", 5)  # across rows, not a divisor
    mask = some_mask(2 * G + 1, T) if masked else None
    each = [layer(x[i : i + 1], None if mask is None else mask[i : i + 1]) for i in range(len(x))]
    together = layer(x, mask)
    layer.serve_alone()
    y, grads = gradients(layer, x, mask, cotangent)
    assert_close(y, torch.cat(each))
    assert not torch.allclose(y, together)
    assert all(grad.isfinite().all() for grad in grads.values())


@pytest.mark.parametrize("few", [None, 2])
def test_alone_a_layer_refuses_what_it_refuses_in_groups(few):
    layer, x = build("mot"), tokens(3, 5, 8)
    layer.serve_alone(num_experts_alone=few)
    for mask in (torch.ones(5, 3), torch.ones(15), torch.ones(3, 4)):
        with pytest.raises(ValueError, match=r"token_mask must be \(3, 5\), not"):
            layer(x, mask.bool())
    with pytest.raises(ValueError, match=r"x must be \(examples, positions, hidden size\) .* not \(5, 8\)"):
        layer(x[0])


@pytest.mark.parametrize("few", [None, 2])
def test_what_is_measured_in_inference_mode_is_for_training_too(few):
    layer, x = build("mot", dtype=torch.float32), tokens(2 * G, T, 8, dtype=torch.float32)
    with torch.inference_mode():
        calibrate_companions(layer, [x])
        layer.serve_alone(num_experts_alone=few)
    assert not any(buffer.is_inference() for buffer in layer.buffers())
    layer(x).sum().backward()
    assert all(weight.grad is not None for weight in layer.parameters())


@pytest.mark.usefixtures("tiny_cache")
def test_a_checkpoint_has_its_companions_and_the_last_one_those_of_the_run(tiny_runs):
    run = tiny_runs["MoT-Nano/4E/2"]
    found, expected = (load_model(str(place)).state_dict() for place in (run / "checkpoint-30", run))
    names = [name for name in expected if name.endswith(("companion", "companion_logit"))]
    assert len(names) == 4
    assert all(expected[name].any() and torch.equal(found[name], expected[name]) for name in names)


def test_a_long_text_alone_is_served_in_parts_too(monkeypatch):
    layer, x, seen = build("mot"), tokens(1, 3 * T, 8), []
    layer.serve_alone()
    expected = layer(x)
    monkeypatch.setitem(AT_ONCE, "cpu", 4)
    layer.experts.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[1]))
    assert_close(layer(x), expected)
    assert max(seen) == 4
    assert sum(seen) == 3 * T


@pytest.mark.parametrize("rows", [1, 2 * G + 1])  # those of the fewest are multiplied by copies of experts
@pytest.mark.parametrize("few", [1, 2, E - 1])
@pytest.mark.parametrize("options", [{}, {"gated": False, "activation": "gelu"}, {"normalize_mixture": True}], ids=str)
def test_alone_a_token_may_go_to_few_experts(options, few, rows):
    layer, x = build("mot", **options), tokens(rows, T, 8)
    layer.serve_alone(num_experts_alone=few)
    with torch.no_grad():
        assert_close(layer(x).flatten(0, 1), reference.alone(x.flatten(0, 1), layer, few))
    of = (x.requires_grad_(), layer.gate.weight)  # what experts give their companions is no constant in the reference
    cotangent = tokens(rows, T, 8, seed=3)
    found = torch.autograd.grad(layer(x), of, cotangent)
    assert_close(found, torch.autograd.grad(reference.alone(x.flatten(0, 1), layer, few), of, cotangent.flatten(0, 1)))


class Counted(TorchDispatchMode):
    """How many operations of torch run."""

    number = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.number += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("rows", [1, 32])
def test_to_few_experts_a_written_token_takes_few_more_operations_than_by_token_choice(rows):
    """They, and not the products, are what takes time."""
    mixture, choice = MixtureOfTokens(32, 12, 256, 32), TokenChoice(32, 12, 256, num_experts_per_tok=8).eval()
    mixture.serve_alone(num_experts_alone=8)
    x, counts = torch.randn(rows, 1, 32), {}
    for layer in (mixture, choice):
        with torch.inference_mode(), Counted() as counted:
            layer(x)
        counts[layer] = counted.number
    assert counts[mixture] <= 1.2 * counts[choice], counts.values()  # it was 1.6 times as many


@pytest.mark.parametrize("autocast", [False, True])
def test_few_experts_in_bf16(autocast):
    exact, x = build("mot").requires_grad_(False), tokens(2 * G + 1, T, 8)
    exact.serve_alone(num_experts_alone=2)
    layer = build("mot", dtype=torch.float32 if autocast else torch.bfloat16).requires_grad_(False)
    layer.serve_alone(num_experts_alone=2)
    x = x.to(torch.bfloat16)
    with torch.autocast("cpu", enabled=autocast):
        y = layer(x.float() if autocast else x)
    assert y.dtype == (torch.float32 if autocast else torch.bfloat16)
    expected = exact(x.double())
    assert (y - expected).norm() < 0.016 * expected.norm()


def test_the_more_experts_a_token_goes_to_the_nearer_it_is_to_all():
    layer, x = build("mot").requires_grad_(False), tokens(2 * G + 1, T, 8)
    layer.serve_alone()
    exact, errors = layer(x), []
    for few in range(1, E + 1):
        layer.serve_alone(num_experts_alone=few)
        errors.append(float((layer(x) - exact).norm() / exact.norm()))
    assert errors == sorted(errors, reverse=True), errors
    assert errors[-2] > 0 == errors[-1]
    layer.serve_alone(False)
    assert not torch.allclose(layer(x), exact)
    for odd in (build("uniform"), build("mot", group_size=1)):
        with pytest.raises(ValueError, match="to all experts where these weigh it alike"):
            odd.serve_alone(num_experts_alone=2)
    for few in (0, -1, E + 1, 2.0, "2"):
        with pytest.raises(ValueError, match=f"can go to 1 to {E} experts, not {few!r}"):
            layer.serve_alone(num_experts_alone=few)


def test_a_number_is_not_taken_for_whether_texts_are_served_alone():
    layer = build("mot")
    with pytest.raises(ValueError, match="True or False, not 2; experts are num_experts_alone=2"):
        layer.serve_alone(2)
    with pytest.raises(ValueError, match="num_experts_alone is for texts that are served alone"):
        layer.serve_alone(False, num_experts_alone=2)
    assert not layer.alone


def test_weights_that_are_loaded_later_have_their_own_companions_output():
    layer, other, x = build("mot"), build("mot"), tokens(2, T, 8)
    with torch.no_grad():
        other.companion_logit += 1
        for parameter in other.parameters():
            parameter.mul_(1.5)
    for each in (layer, other):
        each.serve_alone(num_experts_alone=2)
    expected = other(x)
    assert not torch.allclose(layer(x), expected)
    torch.nn.Sequential(layer).load_state_dict(torch.nn.Sequential(other).state_dict())
    assert_close(layer(x), expected)
    later = copy.deepcopy(layer).requires_grad_(False)
    later.load_state_dict({name: 2 * value for name, value in layer.state_dict().items()}, assign=True)
    assert not torch.allclose(later.companion_output, layer.companion_output)
    assert_close(layer(x), expected)
    layer.serve_alone(False)
    layer.load_state_dict(other.state_dict())
    assert not layer.alone


def test_weights_that_are_drawn_anew_have_their_own_companions_output():
    layer = build("mot")
    with torch.no_grad():
        layer.companion.normal_()
    layer.serve_alone(num_experts_alone=2)
    before = layer.companion_output.clone()
    layer.reset_parameters()
    assert not torch.allclose(layer.companion_output, before)
    given = layer.companion_output.clone()
    layer.serve_alone(num_experts_alone=2)
    assert_close(layer.companion_output, given)


def test_a_model_served_alone_without_companions_says_so(caplog):
    model = tiny("mixture_of_tokens").eval()
    warn_once.cache_clear()
    copy.deepcopy(model).to("meta").serve_alone()  # of which nobody knows
    assert not caplog.text
    model.serve_alone()
    model.serve_alone(False)
    assert caplog.text.count("call calibrate_companions first") == 1
    calibrate_companions(model, [{"input_ids": torch.randint(0, model.config.vocab_size, (4 * G, T))}])
    model.serve_alone()
    assert caplog.text.count("call calibrate_companions first") == 1


def test_in_a_model_of_one_s_own_a_layer_served_alone_without_companions_says_so(caplog):
    layer, x = build("mot"), tokens(2 * G, T, 8)
    layer.reset_state()
    warn_once.cache_clear()
    layer.serve_alone(False)
    build("mot", group_size=1).serve_alone()  # where no token is missing
    assert not caplog.text
    layer.serve_alone()
    assert caplog.text.count("call calibrate_companions first") == 1
    warn_once.cache_clear()
    calibrate_companions(layer, [x])
    layer.serve_alone(num_experts_alone=2)
    assert caplog.text.count("call calibrate_companions first") == 1


def test_few_experts_alone_are_refused_where_no_layer_mixes():
    for kind in ("dense", "token_choice"):
        model = tiny(kind)
        model.serve_alone()
        with pytest.raises(ValueError, match="num_experts_alone is for a Mixture of Tokens"):
            model.serve_alone(num_experts_alone=2)


def test_an_expert_that_does_not_read_a_token_is_off_by_the_square_of_its_weight():
    layer, x = build("mot").requires_grad_(False), tokens(4, T, 8)
    errors = []
    for bias in (8.0, 10.0):  # all weights become smaller by a factor of nearly e^2
        layer.companion_logit.fill_(bias)
        layer.serve_alone()
        exact = layer(x)
        layer.serve_alone(num_experts_alone=1)
        errors.append(float((layer(x) - exact).norm()))
    assert math.exp(3.8) < errors[0] / errors[1] < math.exp(4.2)


def test_to_few_experts_masked_tokens_count_for_nothing():
    layer, x, mask = build("mot"), tokens(2 * G + 1, T, 8), some_mask(2 * G + 1, T)
    layer.serve_alone(num_experts_alone=2)
    expected = layer(x).masked_fill(~mask[..., None], 0)
    y = layer(x.masked_fill(~mask[..., None], math.nan), mask)
    assert_close(y, expected)


def test_where_calibration_fails_all_is_as_before():
    model = mixing()
    calibrate_companions(model, [batch(seed=1)])
    model.serve_alone(num_experts_alone=2)
    logits = model(**batch()).logits
    with pytest.raises(KeyError):
        calibrate_companions(model, (batch(seed=2) if i < 1 else {}["nothing"] for i in range(2)))
    assert torch.equal(model(**batch()).logits, logits)


def test_what_companions_get_is_of_the_companions_that_are_there():
    model = mixing()
    model.serve_alone(num_experts_alone=1)
    calibrate_companions(model, [batch(seed=1)])
    logits = model(**batch()).logits
    model.serve_alone(num_experts_alone=1)
    assert torch.equal(model(**batch()).logits, logits)


def test_served_alone_a_model_mixes_nothing():
    model = mixing()
    calibrate_companions(model, [batch(seed=5)])
    inputs = batch()
    assert model.shares_batch
    model.serve_alone()
    assert not model.shares_batch
    expected = torch.cat([model(input_ids=row[None]).logits for row in inputs["input_ids"]])
    assert_close(model(**inputs).logits, expected)
    beams = model.generate(**inputs, num_beams=2, max_new_tokens=3, do_sample=False)  # no more refused
    assert beams.shape == (6, 10)
    model.serve_alone(False)
    assert not torch.allclose(model(**inputs).logits, expected)
    with pytest.raises(ValueError, match="Expert Choice chooses among the rows of a batch"):
        tiny("expert_choice").serve_alone()


def test_a_run_s_companions_make_a_row_alone_better(tiny_runs, tiny_cache):
    model, text = load_model(str(tiny_runs[MIXED])), text_of(str(tiny_runs[MIXED]))
    layers = [module for module in model.modules() if isinstance(module, MixtureOfTokens)]
    saved = [(layer.companion.clone(), layer.companion_logit.clone()) for layer in layers]
    rows = text.validation.batch(range(40))

    def loss() -> float:
        return cross_entropy(model, rows)[0]

    model.serve_alone()
    calibrated = loss()
    for layer in layers:
        layer.companion.zero_()
        layer.companion_logit.zero_()
    zeros = loss()
    model.serve_alone(False)
    calibrate_companions(model, training_groups(text.train, 32))
    for layer, (companion, logit) in zip(layers, saved, strict=True):  # what `mot train` measured
        assert_close(layer.companion, companion)
        assert_close(layer.companion_logit, logit)
    assert calibrated < zeros
    assert math.isfinite(zeros)


def test_calibrating_while_serving_alone_and_twice_with_padding_measures_the_same():
    inputs = batch(rows=9) | {"token_mask": torch.ones(9, 7, dtype=torch.bool)}
    inputs["token_mask"][4, :3] = False  # so one group is not full, and later positions see what it got
    model = mixing(num_hidden_layers=3, mlp_layer_types=["dense", "mixture_of_tokens", "mixture_of_tokens"])
    layers = [module for module in model.modules() if isinstance(module, MixtureOfTokens)]
    found = []
    for alone in (False, False, True):
        model.serve_alone(alone)
        calibrate_companions(model, [inputs])
        assert all(layer.alone == alone for layer in layers)
        found.append([(layer.companion.clone(), layer.companion_logit.clone()) for layer in layers])
    for again in found[1:]:
        for one, other in zip(found[0], again, strict=True):
            assert_close(other, one, rtol=0, atol=0)


def test_companions_are_measured_in_float32_under_autocast():
    layer, other, x = (*(build("mot", dtype=torch.float32) for _ in range(2)), tokens(dtype=torch.float32))
    calibrate_companions(layer, [x])
    with torch.autocast("cpu", torch.bfloat16):
        calibrate_companions(other, [x])
    assert_close(dict(other.named_buffers()), dict(layer.named_buffers()), rtol=0, atol=0)


def test_companions_that_cannot_be_measured_stay_as_they_were():
    model = mixing()
    calibrate_companions(model, [batch()])
    before = layer_of(model).companion.clone()
    for loader in (model, torch.nn.Sequential(model)):
        with pytest.raises(ValueError, match="a tensor or a dictionary of keyword arguments for each, not list"):
            calibrate_companions(loader, [[batch()]])
    with pytest.raises(ValueError, match="no batch has a group"):
        calibrate_companions(model, [batch(rows=2)])
    with pytest.raises(ValueError, match=r"batches takes several; of one, give \[batch\]"):
        calibrate_companions(model, batch())
    assert_close(layer_of(model).companion, before, rtol=0, atol=0)


def test_a_model_that_lies_on_the_disk_is_measured_too(tmp_path):
    model, batch = tiny("mixture_of_tokens"), {"input_ids": torch.randint(97, (6, 9))}
    model.save_pretrained(tmp_path / "model")
    there = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map={"": "disk"}, offload_folder=tmp_path / "offloaded"
    )
    assert there.device.type == "meta"
    assert torch.equal(there(**batch).logits, model(**batch).logits)
    for each in (model, there):
        calibrate_companions(each, [batch])
        each.serve_alone()
    torch.testing.assert_close(there(**batch).logits, model(**batch).logits)


@pytest.mark.parametrize("calibrate", [calibrate_companions, calibrate_thresholds])
def test_what_is_calibrated_and_by_what_is_checked(calibrate):
    model = tiny("mixture_of_tokens")
    with pytest.raises(ValueError, match="model takes a module of torch, not a str"):
        calibrate("runs/mine", [])
    with pytest.raises(ValueError, match="batches takes several batches, as in a list or a loader, not a NoneType"):
        calibrate(model, None)
