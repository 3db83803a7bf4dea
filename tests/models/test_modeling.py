"""The causal language model: what it inherits works with groups, and what it must not inherit is gone."""

import math
import pickle
from contextlib import nullcontext
from functools import partial
from inspect import signature

import pytest
import torch
from accelerate import cpu_offload
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters
from torch.nn import functional as F
from torch.nn.utils import prune
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    DynamicCache,
    GenerationConfig,
    MaxLengthCriteria,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    StaticCache,
)

import routings
from mixture_of_tokens import MixtureOfTokens, MixtureOfTokensConfig, MixtureOfTokensForCausalLM, Router, TokenChoice
from mixture_of_tokens.layers.grouping import warn_once
from mixture_of_tokens.layers.losses import IGNORE, L1Loss, LoadBalancingLoss
from mixture_of_tokens.models import modeling
from mixture_of_tokens.settings.routings import ROUTINGS, TABLE

KINDS = [row.kind for row in TABLE]
END, PAD = 7, 0
tiny = partial(routings.tiny, eos_token_id=END, pad_token_id=PAD)


def tokens(rows: int, length: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(8, 97, (rows, length), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=KINDS)
def kind(request) -> str:
    return request.param


@pytest.fixture(params=[row.kind for row in TABLE if row.causal])
def causal(request) -> str:
    return request.param


@pytest.mark.parametrize(
    ("name", "more", "told"), [("mixture_of_tokens", 1, 1), ("mixture_of_tokens", 0, 0), ("token_choice", 1, 0)]
)
def test_training_in_an_incomplete_group_is_told_once(name, more, told, caplog):
    warn_once.cache_clear()
    model = tiny(name).train()
    rows = 2 * model.config.group_size + more
    for _ in range(2):
        model(tokens(rows, 9), labels=tokens(rows, 9))
    model.eval()(tokens(1, 9))
    assert caplog.text.count(f"A batch of {rows} rows is no multiple of the group size") == told


def test_training_what_is_served_alone_is_not_told_of_incomplete_groups(caplog):
    warn_once.cache_clear()
    layer = MixtureOfTokens(8, 4, 4, 4)
    layer.serve_alone()
    layer.train()(torch.randn(8, 3, 8))
    assert "no multiple of the group size" not in caplog.text


def test_what_cannot_serve_a_row_alone_may_be_asked_not_to():
    model = tiny("expert_choice")
    model.serve_alone(False)
    with pytest.raises(ValueError, match=r"Expert Choice chooses .*; it cannot serve a row alone"):
        model.serve_alone()


@pytest.mark.parametrize(("name", "told"), [("mixture_of_tokens", 1), ("token_choice", 0)])
def test_training_what_is_served_alone_is_told_once(name, told, caplog):
    modeling.logger.warning_once.cache_clear()
    model, rows = tiny(name), tokens(6, 9)
    model.serve_alone()
    model.eval()(rows)
    assert "training forms no groups" not in caplog.text
    for _ in range(2):
        model.train()(rows, labels=rows)
    assert caplog.text.count("so training forms no groups; call serve_alone(False) first") == told


# Loading, saving, names of parameters


def test_save_and_load_through_auto_classes_gives_identical_logits(kind, tmp_path):
    model, x = tiny(kind, router_temperature=0.5), tokens(4, 9)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again) is MixtureOfTokensForCausalLM
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())
    # Where weights lie in memory changes the rounding of matrix products.
    torch.testing.assert_close(again(x).logits, model(x).logits, rtol=1e-6, atol=1e-6)
    base = AutoModel.from_pretrained(tmp_path)
    torch.testing.assert_close(base(x).last_hidden_state, model.model(x).last_hidden_state, rtol=1e-6, atol=1e-6)
    assert AutoConfig.from_pretrained(tmp_path).mlp_layer_types == ["dense", kind, kind]


def test_a_temperature_that_a_schedule_has_set_is_saved(tmp_path):
    model, x = tiny("token_choice"), tokens(4, 9)
    routers = [module for module in model.modules() if isinstance(module, Router)]
    for router in routers:
        router.set_temperature(0.05)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(again(x).logits, model(x).logits, rtol=1e-6, atol=1e-6)
    routers[0].set_temperature(0.5)
    with pytest.raises(ValueError, match=r"routers have the temperatures \[0.05, 0.5\]"):
        model.save_pretrained(tmp_path)


@pytest.mark.parametrize("kind", ["mixture_of_tokens", "token_choice", "expert_choice"])
def test_state_dict_loads_into_qwen3_moe_with_every_key(kind):
    model = tiny(kind)
    ours = {name: value for name, value in model.state_dict().items() if "companion" not in name}
    assert Qwen3MoeForCausalLM(model.config).load_state_dict(ours).missing_keys == []


def test_token_choice_is_qwen3_moe():
    model, x = tiny("token_choice", num_experts_per_tok=2), tokens(4, 9)
    upstream = Qwen3MoeForCausalLM(model.config).eval()
    upstream.load_state_dict(model.state_dict())
    torch.testing.assert_close(model(x).logits, upstream(x).logits)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("num_hidden_layers", 2, "mlp_layer_types names 3 of 2 blocks"),
        ("threshold_decay", 7.0, "threshold_decay must be"),
        ("shared_experts", -1, "shared_experts must be 0 or more, not -1"),
    ],
)
def test_a_field_that_loading_is_given_is_checked_like_a_saved_one(field, value, message, tmp_path):
    tiny("mixture_of_tokens").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path, **{field: value})
    again = AutoModelForCausalLM.from_pretrained(tmp_path, router_temperature=0.5, dtype=torch.float64)
    assert (again.config.router_temperature, again.dtype) == (0.5, torch.float64)


def test_a_mixture_of_tokens_can_be_pickled():
    model, x = tiny("mixture_of_tokens").eval(), torch.randint(64, (4, 8))
    assert torch.equal(pickle.loads(pickle.dumps(model))(x).logits, model(x).logits)


@pytest.mark.parametrize(
    ("field", "value", "told"),
    [
        ("capacity_factor", "x", "capacity_factor takes a number, not 'x'"),
        ("balance_rate", "x", "balance_rate takes a number, not 'x'"),
        ("router_temperature", None, "router_temperature takes a number, not None"),
        ("group_size", True, "group_size takes a whole number, not True"),
    ],
)
def test_a_field_of_another_type_is_named(field, value, told):
    with pytest.raises(ValueError, match=told):
        MixtureOfTokensConfig(**{field: value})


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"capacity_factor": -1.0}, "capacity_factor must be positive, not -1"),
        ({"capacity_factor": math.nan}, "capacity_factor takes a finite number, not nan"),
        ({"router_aux_loss_coef": -1.0}, "router_aux_loss_coef must be 0 or more, not -1"),
        ({"router_aux_loss_coef": math.nan}, "router_aux_loss_coef takes a finite number, not nan"),
        ({"use_sliding_window": True, "sliding_window": 0}, "sliding_window must be at least 1, not 0"),
    ],
)
def test_a_number_with_which_no_model_is_trained_is_named(fields, told):
    with pytest.raises(ValueError, match=told):
        MixtureOfTokensConfig(**fields)


@pytest.mark.parametrize("gated", [True, False])
def test_weights_are_drawn_with_std_of_fan_in_and_cut_at_two(gated):
    scale = 0.5
    activation = "silu" if gated else "relu"
    model = tiny("mixture_of_tokens", hidden_size=64, initializer_scale=scale, gated=gated, hidden_act=activation)
    for name, weight in model.named_parameters():
        if "norm" in name:
            assert torch.equal(weight, torch.ones_like(weight))
            continue
        std = scale if "embed" in name else scale / math.sqrt(weight.shape[-1])
        assert weight.abs().max() <= 2 * std, name
        # A normal cut at two std has 0.88 of its std; 320 to 6,208 draws estimate it to within 5 %.
        assert weight.std().item() == pytest.approx(0.88 * std, rel=0.12), name


# Loss


def test_initial_loss_is_near_ln_v(kind):
    model, x = tiny(kind, initializer_scale=0.1**0.5), tokens(8, 32)
    assert model(x, labels=x).loss.item() == pytest.approx(math.log(97), abs=0.15)


def test_one_batch_can_be_overfit(kind):
    model, x = tiny(kind, initializer_scale=0.1**0.5).train(), tokens(6, 12)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(120):
        loss = model(x, labels=x).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if loss.item() < 0.05:
            break
    # Uniform mixing gives every token of a group the same update, and yet attention alone learns this batch.
    assert model.eval()(x, labels=x).loss.item() < 0.2


def test_loss_needs_no_logits_and_equals_the_one_with_them(kind):
    model, x = tiny(kind), tokens(4, 9)
    labels = x.clone()
    labels[1, :4] = -100
    quick, full = model(x, labels=labels, return_logits=False), model(x, labels=labels)
    assert quick.logits is None
    assert model.train()(x, labels=labels).logits is None
    model.eval()
    plain = F.cross_entropy(full.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(quick.loss, plain)
    shifted = F.pad(labels, (0, 1), value=-100)[:, 1:]
    assert torch.equal(model(x, shift_labels=shifted, return_logits=False).loss, quick.loss)
    assert torch.equal(model(x, shift_labels=shifted).loss, full.loss)


def test_an_evaluation_with_labels_multiplies_by_the_head_once():
    model, x = tiny("token_choice").eval(), tokens(4, 9)
    counted = []
    for labels in (None, x):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(x, labels=labels)
        counted.append(counter.get_total_flops())
    assert counted[0] == counted[1]


def test_the_third_argument_is_of_positions_as_upstream(kind):
    model, x, positions = tiny(kind).double(), tokens(4, 9), 3 * torch.arange(9).expand(4, 9)
    expected = model(x, attention_mask=None, position_ids=positions).logits
    assert torch.equal(model(x, None, positions).logits, expected)
    assert not torch.allclose(model(x).logits, expected)


def test_logits_to_keep(kind):
    model, x = tiny(kind), tokens(4, 9)
    torch.testing.assert_close(model(x, logits_to_keep=2).logits, model(x).logits[:, -2:])


def test_every_parameter_gets_a_finite_gradient(kind):
    model, x = tiny(kind, learnable_temperature=kind == "mixture_of_tokens").train(), tokens(6, 9)
    model(x, labels=x).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


# The load-balancing loss


def test_auxiliary_loss_is_the_mean_over_blocks_and_only_in_training():
    model, x = tiny("token_choice", mlp_layer_types=["token_choice", "dense", "token_choice"]), tokens(4, 9)
    assert model(x, labels=x).aux_loss is None
    cross_entropy = model(x, labels=x).loss
    model.config.capacity_factor = None
    for block in model.model.layers:
        if hasattr(block.mlp, "capacity_factor"):
            block.mlp.capacity_factor = None
    out = model.train()(x, labels=x, output_router_logits=True)
    expected = torch.stack(
        [LoadBalancingLoss()(logits.softmax(-1), logits.argmax(-1, keepdim=True), None) for logits in out.router_logits]
    ).mean()
    torch.testing.assert_close(out.aux_loss, expected)
    torch.testing.assert_close(out.loss, cross_entropy + model.config.router_aux_loss_coef * expected)


def test_remoe_s_penalty_counts_with_its_weight_and_reaches_the_router_also_when_checkpointed():
    model, x = tiny("remoe").train(), tokens(4, 9)
    for block in model.model.layers[1:]:
        block.mlp.l1_weight.fill_(0.5)
    out = model(x, labels=x, output_router_logits=True)
    expected = torch.stack([L1Loss(1)(logits.relu(), None) for logits in out.router_logits]).mean()
    torch.testing.assert_close(out.aux_loss, expected)
    torch.testing.assert_close(out.loss, out.cross_entropy + 0.5 * expected)
    with_penalty = gradients(model, x)
    enable_checkpointing(model)
    for name, gradient in gradients(model, x).items():
        torch.testing.assert_close(gradient, with_penalty[name])
    for block in model.model.layers[1:]:
        block.mlp.l1_weight.fill_(0)
    without = gradients(model, x)
    for i in (1, 2):
        gate = f"model.layers.{i}.mlp.gate.weight"
        assert (with_penalty[gate] - without[gate]).norm() > 0.1 * without[gate].norm()


def test_losses_of_two_routings_count_with_a_weight_each():
    kinds = ["token_choice", "dense", "remoe"]
    model, x = tiny("token_choice", mlp_layer_types=kinds, capacity_factor=None).train(), tokens(4, 9)
    model.model.layers[2].mlp.l1_weight.fill_(0.5)
    out = model(x, labels=x, output_router_logits=True)
    chosen, thresholded = out.router_logits
    balance = LoadBalancingLoss()(chosen.softmax(-1), chosen.argmax(-1, keepdim=True), None)
    penalty = L1Loss(1)(thresholded.relu(), None)
    expected = out.cross_entropy + model.config.router_aux_loss_coef * balance + 0.5 * penalty
    torch.testing.assert_close(out.loss, expected)
    torch.testing.assert_close(out.aux_loss, (balance + penalty) / 2)


@pytest.mark.parametrize("kind", ["token_choice", "sigmoid_choice"])
def test_the_z_loss_is_added_with_its_weight_and_is_of_real_tokens(kind):
    model, x = tiny(kind, router_z_loss_coef=0.5, router_aux_loss_coef=0.0).train(), tokens(4, 9)
    mask = (torch.arange(4)[:, None] < 3).expand(4, 9)
    for real, token_mask in ((slice(None), None), (slice(3), mask)):
        out = model(x, token_mask=token_mask, labels=x, output_router_logits=True)
        expected = torch.stack([logits[:, real].logsumexp(-1).square().mean() for logits in out.router_logits]).mean()
        torch.testing.assert_close(out.loss, out.cross_entropy + 0.5 * expected)
        assert out.aux_loss is None  # it does not balance
    assert torch.equal(model.eval()(x, labels=x).loss, model(x, labels=x).cross_entropy)


@pytest.mark.parametrize("kind", ["token_choice", "sigmoid_choice"])
def test_the_z_loss_makes_logits_smaller(kind):
    def size(coefficient: float) -> float:
        model, x = tiny(kind, router_z_loss_coef=coefficient).train(), tokens(6, 12)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for _ in range(20):
            optimizer.zero_grad()
            model(x, labels=x).loss.backward()
            optimizer.step()
        logits = model(x, labels=x, output_router_logits=True).router_logits
        return torch.stack([each.logsumexp(-1).abs().mean() for each in logits]).mean().item()

    assert size(1.0) < 0.5 * size(0.0)


def test_auxiliary_loss_reaches_the_router():
    model, x = tiny("token_choice", router_aux_loss_coef=1.0).train(), tokens(4, 9)
    model(x, labels=x).aux_loss.backward()
    assert all(block.mlp.gate.weight.grad.abs().max() > 0 for block in model.model.layers[1:])


def test_auxiliary_loss_leaves_padding_out():
    model, x = tiny("token_choice").train(), tokens(4, 9)
    padded = torch.cat([torch.full((4, 3), PAD), x], dim=1)
    mask = (torch.arange(12) >= 3).long().expand(4, 12)
    position = (torch.arange(12) - 3).clamp(min=0).expand(4, 12)
    alone = model(x, labels=x).aux_loss
    with_padding = model(padded, attention_mask=mask, position_ids=position, labels=padded).aux_loss
    torch.testing.assert_close(alone, with_padding)


def test_loss_over_micro_batches_counts_the_auxiliary_loss_once():
    model, x = tiny("token_choice", capacity_factor=None).train(), tokens(6, 9)
    whole = model(x, labels=x)
    items = 6 * 8
    parts = [model(part, labels=part, num_items_in_batch=items) for part in x.split((2, 4))]
    cross_entropy = whole.loss - 0.01 * whole.aux_loss
    weighted_aux = sum(part.aux_loss * len(rows) / 6 for part, rows in zip(parts, x.split((2, 4)), strict=True))
    torch.testing.assert_close(sum(part.loss for part in parts), cross_entropy + 0.01 * weighted_aux)


# What may reach what


def test_no_logit_moves_when_the_future_changes(causal):
    model, x = tiny(causal).double(), tokens(6, 9)
    changed = x.clone()
    changed[:, 5:] = tokens(6, 4, seed=2)  # in the example and in all of its mates
    before, after = model(x).logits, model(changed).logits
    if not ROUTINGS[causal].grouped and ROUTINGS[causal].sparse:  # matrix products of other sizes, so other rounding
        torch.testing.assert_close(after[:, :5], before[:, :5])
    else:
        assert torch.equal(after[:, :5], before[:, :5])
    assert (after[:, 5:] - before[:, 5:]).abs().amin(dim=(0, 2)).max() > 0


def test_a_changed_example_moves_its_own_group_and_no_other(kind):
    model, x = tiny(kind).double(), tokens(6, 9)
    changed = x.clone()
    changed[4] = tokens(1, 9, seed=2)
    moved = (model(changed).logits - model(x).logits).abs().amax(dim=(1, 2)) > 1e-9
    mates = ROUTINGS[kind].shares_batch
    assert moved.tolist() == [False, False, False, mates, True, mates]


def test_padding_on_the_left_and_padded_rows_change_nothing(kind):
    model, x = tiny(kind).double(), tokens(6, 9)
    expected = model(x).logits
    padded = torch.full((9, 13), PAD)
    padded[:6, 4:] = x
    mask = torch.zeros(9, 13, dtype=torch.long)
    mask[:6, 4:] = 1
    position = (mask.cumsum(-1) - 1).clamp(min=0)  # upstream's rotary angles are fp32, so shifted ones differ by 1e-6
    logits = model(padded, attention_mask=mask, position_ids=position).logits[:6, 4:]
    torch.testing.assert_close(logits, expected)
    cotangent = torch.randn(expected.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    found, wanted = (torch.autograd.grad(each, weights, cotangent, allow_unused=True) for each in (logits, expected))
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-9)


def test_padding_that_is_not_masked_does_change_something():
    model, x = tiny("mixture_of_tokens").double(), tokens(5, 9)
    unmasked = torch.cat([x, torch.full((1, 9), PAD)])
    assert not torch.allclose(model(unmasked).logits[3:5], model(x).logits[3:5])


def test_a_mask_that_says_nothing_of_padding_is_refused():
    model, x = tiny("mixture_of_tokens"), tokens(3, 5)
    with pytest.raises(ValueError, match="give token_mask"):
        model(x, attention_mask=torch.zeros(3, 1, 5, 5))
    causal = torch.full((5, 5), -torch.inf).triu(1).expand(3, 1, 5, 5)
    given = model(x, attention_mask=causal, token_mask=torch.ones(3, 5, dtype=torch.bool))
    torch.testing.assert_close(given.logits, model(x).logits)


# Generation


def left_padded(lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(lengths)
    mask = torch.stack([(torch.arange(width) >= width - length).long() for length in lengths])
    return torch.where(mask.bool(), tokens(len(lengths), width), PAD), mask


def test_cached_decoding_equals_the_full_forward(causal):
    model = tiny(causal).double()
    x, mask = left_padded([9, 4, 7, 9, 2])
    position = (mask.cumsum(-1) - 1).clamp(min=0)
    full = model(x, attention_mask=mask, position_ids=position).logits
    first = model(x[:, :6], attention_mask=mask[:, :6], position_ids=position[:, :6], use_cache=True)
    key = "cache" if "cache" in first.keys() else "past_key_values"  # noqa: SIM118 - renamed in transformers 5.24
    cache = {key: first[key]}
    steps = [first.logits]
    for t in range(6, 9):
        inputs = {"attention_mask": mask[:, : t + 1], "position_ids": position[:, t : t + 1]}
        steps.append(model(x[:, t : t + 1], use_cache=True, **inputs, **cache).logits)
    real = mask.bool()
    torch.testing.assert_close(torch.cat(steps, dim=1)[real], full[real])


def test_a_mask_of_all_that_a_static_cache_has_room_for_is_of_the_same_tokens(causal):
    model = tiny(causal).double()
    x, mask = left_padded([9, 4, 7, 9, 2])
    position = (mask.cumsum(-1) - 1).clamp(min=0)
    whole = model(x, attention_mask=mask, position_ids=position, use_cache=True)
    full, name = whole.logits, "cache" if "cache" in whole.keys() else "past_key_values"  # noqa: SIM118 - as above
    cache, steps = StaticCache(config=model.config, max_cache_len=16), []
    for start, end in ((0, 6), (6, 7), (7, 9)):
        seen = F.pad(mask[:, :end], (0, 16 - end))
        inputs = {"attention_mask": seen, "position_ids": position[:, start:end], name: cache}
        steps.append(model(x[:, start:end], use_cache=True, **inputs).logits)
    real = mask.bool()
    torch.testing.assert_close(torch.cat(steps, dim=1)[real], full[real])


def test_a_model_whose_layers_cannot_tell_packed_texts_apart_says_so():
    with pytest.raises(ValueError, match="continuous batching is not for this model: use generate"):
        tiny("token_choice").generate_batch([[1, 2]])


def test_weights_and_buffers_may_be_moved_from_elsewhere_layer_by_layer(kind):
    """As accelerate does for a model that a device has no room for."""
    model, x = tiny(kind), tokens(4, 9)
    expected = model(x).logits
    cpu_offload(model, execution_device=torch.device("cpu"), offload_buffers=True)
    torch.testing.assert_close(model(x).logits, expected)


@pytest.mark.parametrize(
    "settings", [{}, {"use_cache": False}, {"cache_implementation": "static", "disable_compile": True}]
)
@pytest.mark.parametrize("lengths", [[9, 4, 7, 9, 2], [9] * 5], ids=["padded", "equal"])
def test_every_generated_token_is_the_argmax_of_a_masked_uncached_forward(causal, settings, lengths):
    model = tiny(causal).double()
    x, mask = left_padded(lengths)
    # Row 1 ends at once, row 3 after three tokens, the others never: what a finished row feeds must reach nobody.
    stops = {1: 0, 3: 3}

    def end_some_rows(batch, scores):
        for row, step in stops.items():
            scores[row, END] = torch.inf if batch.shape[1] - 9 == step else -torch.inf
        scores[[0, 2, 4], END] = -torch.inf
        return scores

    written = model.generate(
        x, attention_mask=mask, max_new_tokens=8, do_sample=False, logits_processor=[end_some_rows], **settings
    )
    assert (written[1, 9:] == torch.tensor([END] + [PAD] * 7)).all()
    for step in range(8):
        length = 9 + step
        alive = torch.tensor([row not in stops or step <= stops[row] for row in range(5)])
        token_mask = mask.clone()
        for new in range(step):
            still = torch.tensor([row not in stops or new <= stops[row] for row in range(5)])
            token_mask = torch.cat([token_mask, still.long()[:, None]], dim=1)
        position = (F.pad(mask, (0, step), value=1).cumsum(-1) - 1).clamp(min=0)
        out = model(
            written[:, :length],
            attention_mask=F.pad(mask, (0, step), value=1),
            token_mask=token_mask.bool(),
            position_ids=position,
        )
        expected = end_some_rows(written[:, :length], out.logits[:, -1].clone()).argmax(-1)
        assert torch.equal(written[alive, length], expected[alive]), step


@pytest.mark.parametrize(("lengths", "masked"), [([6, 6], False), ([6, 4], True)], ids=str)
def test_layers_get_a_mask_only_where_a_token_is_masked(lengths, masked):
    model, seen = tiny("mixture_of_tokens"), []
    model.model.layers[1].mlp.register_forward_pre_hook(lambda layer, args: seen.append(args[1]))
    x, mask = left_padded(lengths)
    model.generate(x, attention_mask=mask, max_new_tokens=3, do_sample=False, eos_token_id=None)
    assert [token_mask is not None for token_mask in seen] == 3 * [masked]


def test_what_is_not_causal_refuses_to_write():
    model, (x, mask) = tiny("soft_moe"), left_padded([4, 4])
    with pytest.raises(ValueError, match="it cannot write"):
        model.generate(x, attention_mask=mask, max_new_tokens=2)


def test_the_model_s_own_stop_token_and_beams_hold_beside_a_given_configuration():
    """As upstream has it: what a given GenerationConfig leaves open is the model's own."""
    model = tiny("mixture_of_tokens").double()
    x, mask = left_padded([6, 6, 6])

    def end_the_first(batch, scores):
        scores[0, END] = torch.inf
        scores[1:, END] = -torch.inf
        return scores

    settings = {"attention_mask": mask, "logits_processor": [end_the_first]}
    given = GenerationConfig(max_new_tokens=6, do_sample=False, pad_token_id=PAD)
    written = model.generate(x, generation_config=given, **settings)
    assert torch.equal(written, model.generate(x, max_new_tokens=6, do_sample=False, **settings))
    other = model.generate(x, max_new_tokens=6, do_sample=False, pad_token_id=9, **settings)
    assert torch.equal(written[1:], other[1:])  # what a finished row is fed reaches nobody
    model.generation_config.num_beams = 2
    with pytest.raises(ValueError, match="num_beams=1"):
        model.generate(x, generation_config=given, attention_mask=mask)


@pytest.mark.filterwarnings("ignore:Both .past_key_values. and .cache.:FutureWarning")
def test_a_cache_is_found_beside_an_empty_one_of_its_old_name():
    model, x = tiny("mixture_of_tokens"), tokens(4, 9)
    given = model(x[:, :-1], use_cache=True)
    named = {"cache": given["cache"], "past_key_values": None} if "cache" in given else dict(given)
    named = {name: value for name, value in named.items() if name in ("cache", "past_key_values")}
    found = model(x[:, -1:], attention_mask=torch.ones(4, 9, dtype=torch.long), **named)
    torch.testing.assert_close(found.logits, model(x).logits[:, -1:])


@pytest.mark.parametrize("lengths", [[6, 3, 5], [6, 6, 6]], ids=["padded", "equal"])
def test_a_given_cache_and_embeddings_generate_the_same(causal, lengths):
    model = tiny(causal).double()
    x, mask = left_padded(lengths)
    settings = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False}
    written = model.generate(x, **settings)
    # Renamed in transformers 5.24.
    upstream = signature(Qwen3MoeForCausalLM.prepare_inputs_for_generation).parameters
    cache = {"cache" if "cache" in upstream else "past_key_values": DynamicCache(config=model.config)}
    assert torch.equal(model.generate(x, **cache, **settings), written)
    embedded = model.get_input_embeddings()(x)
    assert torch.equal(model.generate(inputs_embeds=embedded, **settings), written[:, 6:])


def test_tuples_in_place_of_named_outputs(kind):
    model, x = tiny(kind), tokens(3, 5)
    assert torch.equal(model(x, return_dict=False)[0], model(x).logits)


def test_biases_begin_at_zero_and_tied_logits_are_as_large_as_others():
    model, x = tiny("dense", attention_bias=True, tie_word_embeddings=True), tokens(3, 5)
    assert not any(parameter.any() for name, parameter in model.named_parameters() if name.endswith("bias"))
    apart = model(x).logits.std() / tiny("dense")(x).logits.std()
    assert 0.5 < apart < 2


def test_several_samples_of_a_prompt_are_one_batch():
    model = tiny("mixture_of_tokens")
    x, mask = left_padded([5, 3])
    settings = {"max_new_tokens": 4, "do_sample": True}
    torch.manual_seed(0)
    written = model.generate(x, attention_mask=mask, num_return_sequences=3, **settings)
    assert written.shape == (6, 9)
    assert torch.equal(written[:, :5], x.repeat_interleave(3, dim=0))
    torch.manual_seed(0)
    apart = [each.repeat_interleave(3, dim=0) for each in (x, mask)]
    assert torch.equal(model.generate(apart[0], attention_mask=apart[1], **settings), written)


def test_generation_refuses_what_would_be_wrong():
    model = tiny("mixture_of_tokens")
    x, mask = left_padded([5, 3])
    with pytest.raises(ValueError, match="padded on the left"):
        model.generate(x.flip(1), attention_mask=mask.flip(1), max_new_tokens=2)
    with pytest.raises(ValueError, match="num_beams=1"):
        model.generate(x, attention_mask=mask, max_new_tokens=2, num_beams=2)
    with pytest.raises(ValueError, match="rows that end by other criteria"):
        model.generate(x, attention_mask=mask, max_new_tokens=2, stopping_criteria=[MaxLengthCriteria(7)])
    with pytest.raises(ValueError, match="rows that end by other criteria"):
        model.generate(x, attention_mask=mask, max_new_tokens=2, stop_strings=["a"])
    with pytest.raises(ValueError, match="leave guidance_scale out"):
        model.generate(x, attention_mask=mask, max_new_tokens=2, guidance_scale=1.5)
    own = model.config
    sizes = {"vocab_size": own.vocab_size, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    helper = Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, num_key_value_heads=2, head_dim=8, num_experts=2)).eval()
    with pytest.raises(ValueError, match="a Qwen3MoeForCausalLM takes no token mask, so it cannot assist"):
        model.generate(x[:1], max_new_tokens=2, assistant_model=helper)
    assert model.generate(x[:1], max_new_tokens=2, assistant_model=tiny("dense"), do_sample=False).shape[0] == 1
    with pytest.raises(ValueError, match="generate makes the token mask itself: give attention_mask"):
        model.generate(x, token_mask=mask.bool(), max_new_tokens=2)
    with pytest.raises(ValueError, match="one ends with the padding token"):
        model.generate(torch.tensor([[8, 9], [8, PAD]]), max_new_tokens=2)
    tiny("dense").generate(x, attention_mask=mask, max_new_tokens=2, num_beams=2, do_sample=False)


# Gradient checkpointing, compilation, low precision


def gradients(model, x) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(x, labels=x).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def enable_checkpointing(model, *how) -> None:
    # Renamed in transformers 5.24.
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)(*how)


def test_gradient_checkpointing_changes_no_gradient(kind):
    model, x = tiny(kind, use_cache=False).train(), tokens(6, 9)
    plain = gradients(model, x)
    enable_checkpointing(model)
    assert all(block.gradient_checkpointing for block in model.model.layers)
    for name, gradient in gradients(model, x).items():
        torch.testing.assert_close(gradient, plain[name])


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")  # of torch
def test_reentrant_checkpointing_would_lose_the_balancing_loss():
    for kind, loses in {"token_choice": True, "remoe": True, "mixture_of_tokens": False}.items():
        model, x = tiny(kind, use_cache=False).train(), tokens(6, 9)
        enable_checkpointing(model, {"use_reentrant": True})
        with pytest.raises(ValueError, match="drops the loss that balances") if loses else nullcontext():
            model(x, labels=x)
        for router in (module for module in model.modules() if isinstance(module, Router)):
            router.requires_grad_(False)  # which have nothing to learn from it
        model(x, labels=x)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # of torch, where a graph breaks
@pytest.mark.parametrize(
    ("kind", "training"),
    [
        ("mixture_of_tokens", True),
        pytest.param("token_choice", False, marks=pytest.mark.slow),
        *(pytest.param(kind, True, marks=pytest.mark.slow) for kind in KINDS if kind != "mixture_of_tokens"),
        *(pytest.param(kind, False, marks=pytest.mark.slow) for kind in ("dense", "sigmoid_choice")),
    ],
)
def test_the_whole_model_compiles_without_a_graph_break(kind, training):
    """In evaluation only the head, Token Choice and what is not compiled compute something else."""
    torch.compiler.reset()
    counters.clear()
    model = tiny(kind, num_hidden_layers=2, mlp_layer_types=["dense", kind], use_cache=False).train(training)
    x = tokens(6, 9)
    varies = ROUTINGS[kind].varies  # those go on by a number that the device computes
    compiled = torch.compile(model, backend="aot_eager", fullgraph=not varies)
    compiled_loss = compiled(x, labels=x).loss  # before any call without the compiler, which could set things up for it
    # What encloses the break is compiled in parts, and in these upstream's hooks, which look into a ContextVar, break.
    breaks = [reason for reason in counters["graph_break"] if "ContextVar" not in reason]
    assert len(breaks) == int(varies)
    assert all("the number of pairs differs in every batch" in reason for reason in breaks)
    loss, plain = model(x, labels=x).loss, gradients(model, x)
    model.zero_grad()
    compiled_loss.backward()
    torch.testing.assert_close(compiled_loss, loss)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, plain[name])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_a_routing_whose_number_of_experts_varies_is_not_compiled_anew_for_every_batch():
    """Expert Threshold's forward is the same one, and it has no loss beside it."""
    torch.compiler.reset()
    model = tiny("remoe", num_hidden_layers=2, mlp_layer_types=["dense", "remoe"], use_cache=False).train()
    compiled = torch.compile(model, backend="aot_eager")
    for seed in range(5):
        with torch._dynamo.config.patch(error_on_recompile=seed > 2):
            x = tokens(16, 32, seed=seed)
            compiled(x, labels=x).loss.backward()


@pytest.mark.slow
def test_a_compiled_step_of_token_choice_searches_a_token_s_experts_once():
    """Not again for the balancing loss."""
    searches = []

    def counted(graph, inputs):
        searches.append(sum(node.target is torch.ops.aten.topk.default for node in graph.graph.nodes))
        return make_boxed_func(graph)

    torch.compiler.reset()
    backend = aot_autograd(fw_compiler=counted, partition_fn=min_cut_rematerialization_partition)
    model, x = tiny("token_choice", num_experts_per_tok=2).train(), tokens(4, 9)
    torch.compile(model, backend=backend, fullgraph=True)(x, labels=x)
    assert searches[0] == sum(kind == "token_choice" for kind in model.config.mlp_layer_types) > 0


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's inductor imports what torch has deprecated
def test_the_default_compiler_gives_the_same_loss(kind):
    torch.compiler.reset()
    model, x = tiny(kind, use_cache=False).train(), tokens(6, 9)
    compiled = torch.compile(model, fullgraph=not ROUTINGS[kind].varies)
    torch.testing.assert_close(compiled(x, labels=x).loss, model(x, labels=x).loss)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("kind", ["mixture_of_tokens", "uniform", "token_choice", "expert_choice"])
def test_the_default_compiler_takes_two_blocks_and_masked_batches_of_changing_shapes(kind):
    torch.compiler.reset()
    model = tiny(kind, num_hidden_layers=2, mlp_layer_types=[kind] * 2, use_cache=False).train()
    compiled = torch.compile(model)
    for lengths in ([4, 9, 7, 9, 2, 1], [12, 5, 3, 12, 8, 1, 2, 9, 11], [3, 7, 7, 5]):  # the last group is incomplete
        x, mask = left_padded(lengths)
        found = []
        for each in (model, compiled):
            model.zero_grad()
            loss = each(x, attention_mask=mask, labels=x.masked_fill(mask == 0, IGNORE)).loss
            loss.backward()
            found.append((loss.detach(), {name: weight.grad for name, weight in model.named_parameters()}))
        torch.testing.assert_close(found[1], found[0])


def test_autocast_and_bf16_weights_train(kind):
    model, x = tiny(kind).train(), tokens(6, 9)
    expected = model(x, labels=x, return_logits=True)

    def error(logits: torch.Tensor) -> float:
        """Norm-wise; where rounding tips some choices of experts (up to 0.09 of all logits), the middle token's."""
        by_token = (logits - expected.logits).norm(dim=-1) / expected.logits.norm(dim=-1)
        every = routings.relative_error(logits, expected.logits)
        return every if ROUTINGS[kind].differentiable else by_token.median().item()

    for block in model.model.layers[1:]:  # the control: a feed-forward that gives nothing
        hook = block.mlp.register_forward_hook(lambda module, args, output: 0 * output)
        assert error(model(x, labels=x, return_logits=True).logits) > 1.6e-2
        hook.remove()
    with torch.autocast("cpu", torch.bfloat16):
        autocast = model(x, labels=x, return_logits=True)
    autocast.loss.backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters())
    low = model.to(torch.bfloat16)(x, labels=x, return_logits=True)
    low.loss.backward()
    for found in (autocast, low):
        assert found.loss.dtype == torch.float32
        torch.testing.assert_close(found.loss, expected.loss, rtol=1.6e-2, atol=0.0)
        assert 0 < error(found.logits) < 1.6e-2


class Adapted(nn.Linear):
    """A head as adapters make it."""

    def forward(self, input):
        return 2 * super().forward(input)


def with_bias(head: nn.Linear) -> nn.Module:
    biased = nn.Linear(head.in_features, head.out_features)
    nn.init.normal_(biased.bias)
    return biased


def hooked(head: nn.Linear) -> nn.Module:
    head.register_forward_hook(lambda module, args, logits: 2 * logits)
    return head


def replaced(head: nn.Linear) -> nn.Module:
    plain = head.forward
    head.forward = lambda input: 2 * plain(input)  # as accelerate and quantizers do
    return head


def pruned(head: nn.Linear) -> nn.Module:
    return prune.l1_unstructured(head, "weight", 0.5)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("change", [with_bias, hooked, replaced, pruned, lambda head: Adapted(24, 97, bias=False)])
def test_the_loss_is_of_the_logits_whatever_the_head_does(change, training):
    model, x = tiny("mixture_of_tokens").train(training), tokens(6, 9)
    model.set_output_embeddings(change(model.lm_head))
    for _ in range(2):  # a hook may make the weight anew at each call
        out = model(x, labels=x, return_logits=True)
        expected = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), x[:, 1:].flatten())
        torch.testing.assert_close(out.loss, expected)
        out.loss.backward()
    assert all(weight.grad is not None and weight.grad.any() for weight in model.lm_head.parameters())


def test_a_layer_that_takes_the_place_of_another_is_told_where_its_loss_is_needed():
    model, x = tiny("token_choice").train(), tokens(6, 9)
    model.model.layers[1].mlp = TokenChoice(24, 16, 5)
    with pytest.raises(ValueError, match="2 auxiliary losses, and 1 were recorded"):
        model(x, labels=x)


def test_the_router_works_in_fp32_whatever_the_weights():
    model, x = tiny("mixture_of_tokens").to(torch.bfloat16), tokens(3, 5)
    seen = []
    for module in model.modules():
        if isinstance(module, Router):
            module.register_forward_hook(lambda _module, _inputs, logits: seen.append(logits.dtype))
    model(x)
    assert seen == [torch.float32] * 2


# Configuration


def test_the_later_half_mixes_by_default():
    config = MixtureOfTokensConfig(num_hidden_layers=5)
    assert config.mlp_layer_types == ["dense"] * 2 + ["mixture_of_tokens"] * 3
    assert config.mlp_only_layers == [0, 1]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mlp_layer_types": ["dense", "moe"], "num_hidden_layers": 2}, "moe; legal are dense, mixture_of_tokens"),
        ({"mlp_layer_types": ["dense"], "num_hidden_layers": 2}, "1 of 2 blocks"),
    ],
)
def test_a_wrong_configuration_says_what_is_legal(fields, message):
    with pytest.raises(ValueError, match=message):
        MixtureOfTokensConfig(**fields)


@pytest.mark.parametrize("kind", ["dense", "mixture_of_tokens", "token_choice"])
@pytest.mark.parametrize("width", [4, 6])
def test_a_mask_of_another_width_than_the_tokens_is_refused(kind, width):
    """Attention would read its first columns, and mixtures its last ones."""
    model, ids = tiny(kind), torch.randint(1, 97, (3, 5))
    with pytest.raises(ValueError, match=rf"attention_mask must be \(3, 5\), as the tokens are, not \(3, {width}\)"):
        model(ids, attention_mask=torch.ones(3, width))


def test_an_assistant_writes_on_from_a_text_that_ends_like_padding():
    """Transformers gives it no mask, and its text has no padding."""
    model = tiny("mixture_of_tokens")
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = 0, 96
    settings = GenerationConfig.from_dict(model.generation_config.to_dict() | {"max_new_tokens": 3, "do_sample": False})
    prompt = torch.tensor([[5, 0, 7, 0]])
    with pytest.raises(ValueError, match="one ends with the padding token"):
        model.generate(prompt, settings)
    expected = model.generate(prompt, settings, attention_mask=torch.ones_like(prompt))
    # As transformers gives them to an assistant.
    settings.update(
        is_assistant=True, assistant_confidence_threshold=0, return_dict_in_generate=True, output_scores=True
    )
    assert torch.equal(model.generate(prompt, settings).sequences, expected)
