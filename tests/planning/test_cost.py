"""Cost formulas against reality: `numel()`, torch's FLOP counter, what autograd keeps; and what `plan` prints.

Models run on fake tensors: shapes without values or memory, on a device that, unlike "meta", knows autocast.
"""

import json
import math
import re
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import asdict

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from mixture_of_tokens import plan
from mixture_of_tokens.layers import dispatch as dispatching
from mixture_of_tokens.models.config import MixtureOfTokensConfig
from mixture_of_tokens.models.feed_forwards import feed_forward
from mixture_of_tokens.models.modeling import MixtureOfTokensForCausalLM
from mixture_of_tokens.models.names import config_from_name
from mixture_of_tokens.planning.cost import flops_per_token, legal_micro_batches, memory, parameters
from mixture_of_tokens.planning.estimates import plan_of
from mixture_of_tokens.runs.run import read_run
from mixture_of_tokens.settings.options import Options
from mixture_of_tokens.settings.routings import BY_PREFIX, ROUTINGS
from mixture_of_tokens.training.merging import merge
from paper import PAPER
from processes import mot

KINDS = list(ROUTINGS)
GATED = pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
SHARED = {"shared_experts": 3}
SPARSE = pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "dense"])

# Millions of parameters as in the paper's table (`PAPER` has the sizes).
PAPER_MILLIONS = {
    "Transformer-Mini": 29.0,
    "MoT-Mini/32E/16": 94.5,
    "Transformer-Medium": 76.8,
    "MoT-Medium/8E": 135.5,
    "MoT-Medium/32E": 336.9,
    "MoT-Medium/32E/8": 337.4,
    "MoT-Medium/32E/16": 337.9,
    "MoT-Medium/32E/32": 338.9,
    "MoT-Medium/128E": 1142.4,
    "Transformer-Base": 162.4,
    "MoT-Base/32E": 1040.2,
    "MoT-Base/64E/16": 1950.7,  # the paper: about 1.95 B
}


@pytest.fixture(autouse=True)
def without_empty_rows(monkeypatch) -> None:
    """As on a GPU; costs leave out the rows by which a CPU rounds up those of small experts."""
    monkeypatch.setattr(dispatching, "SMALL", 0)


def odd_config(kind: str, **changes) -> MixtureOfTokensConfig:
    """All sizes differ; one block is dense, two are not."""
    sizes = {
        "vocab_size": 101,
        "hidden_size": 24,
        "intermediate_size": 20,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 10,
        "max_position_embeddings": 9,
        "num_experts": 14,
        "moe_intermediate_size": 11,
        "num_experts_per_tok": 10 if kind == "expert_choice" else 2,  # its experts take 5 of 7 tokens
        "group_size": 7,
        "mlp_layer_types": ["dense", kind, kind],
        "attn_implementation": "eager",  # the counter sees no other on the CPU
    }
    return MixtureOfTokensConfig(**sizes | changes)


def on_meta(config: MixtureOfTokensConfig, dtype: torch.dtype = torch.float32) -> MixtureOfTokensForCausalLM:
    with torch.device("meta"):
        return MixtureOfTokensForCausalLM(config).to(dtype)  # pyright: ignore[reportArgumentType]


def different(config: MixtureOfTokensConfig, batch: int, context: int) -> Tensor:
    return torch.arange(batch * context).view(batch, context) % config.vocab_size


def varies(config: MixtureOfTokensConfig) -> bool:
    """Whether the sizes of products depend on numbers, which fake tensors do not have."""
    return any(routing.varies for routing in config.routings)


def faked(config: MixtureOfTokensConfig) -> AbstractContextManager:
    return nullcontext() if varies(config) else FakeTensorMode(allow_non_fake_inputs=True)


def ready(config: MixtureOfTokensConfig, dtype: torch.dtype = torch.float32) -> MixtureOfTokensForCausalLM:
    """The model, with weights of fake tensors where that will do."""
    torch.manual_seed(0)
    if varies(config):
        return MixtureOfTokensForCausalLM(config).to(dtype)  # pyright: ignore[reportArgumentType]
    model = on_meta(config, dtype)
    with faked(config):
        return model.to_empty(device="cpu")


def measured(config: MixtureOfTokensConfig, batch: int, context: int) -> float | None:
    """Experts a token, of the tokens and the model of `counted_flops`, where that varies."""
    if not varies(config):
        return None
    model, rows = ready(config), []
    for block in model.model.layers[1:]:
        block.mlp.experts.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    model(different(config, batch, context))
    assert min(rows) > 0
    assert set(rows) != {config.num_experts_per_tok * batch * context}  # otherwise than as planned
    return sum(rows) / len(rows) / (batch * context)


def ragged_flops(left: torch.Size, right: torch.Size, *args, out_shape: torch.Size) -> int:
    """Of rows times a matrix each, or of their outer products: for both, a multiplication and an addition for each
    number of one operand and each column of the other."""
    return 2 * left[0] * left[1] * (out_shape[1] if len(right) == 3 else right[1])


def counted_flops(config: MixtureOfTokensConfig, batch: int, context: int, *, training: bool) -> int:
    """Of a whole forward pass, in training with the backward pass too."""
    model = ready(config)
    products = {torch.ops.mixture_of_tokens.ragged_mm: ragged_flops}
    products[torch.ops.mixture_of_tokens.ragged_weight_gradient] = ragged_flops
    with faked(config), FlopCounterMode(display=False, custom_mapping=products) as counter:
        model.train(training)
        tokens = different(config, batch, context)
        with torch.set_grad_enabled(training):
            loss = model(tokens, labels=tokens, return_logits=False).loss
            if training:
                loss.backward()
    # transformers 5.17 computes the rotary angles, an outer product, as a matrix product.
    rotary = counter.get_flop_counts().get("MixtureOfTokensForCausalLM.model.rotary_emb", {})
    return counter.get_total_flops() - sum(rotary.values())


def kept_bytes(config: MixtureOfTokensConfig, batch: int, dtype: torch.dtype) -> int:
    """What autograd keeps for the backward pass, each storage once, without parameters and buffers."""
    model = ready(config, dtype)
    with faked(config):
        model.train()
        own = {tensor.untyped_storage()._cdata for tensor in [*model.parameters(), *model.buffers()]}
        kept: dict[int, Tensor] = {}

        def keep(tensor: Tensor) -> Tensor:
            kept.setdefault(tensor.untyped_storage()._cdata, tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            tokens = different(config, batch, config.max_position_embeddings)
            model(tokens, labels=tokens)
        return sum(tensor.untyped_storage().nbytes() for storage, tensor in kept.items() if storage not in own)


@GATED
@pytest.mark.parametrize("kind", KINDS)
def test_parameters_are_those_of_the_model(kind, gated):
    for changes in ({}, {"attention_bias": True, "learnable_temperature": True}, {"tie_word_embeddings": True}, SHARED):
        config = odd_config(kind, gated=gated, **changes)
        assert parameters(config)["total"] == sum(p.numel() for p in on_meta(config).parameters())


@pytest.mark.parametrize("name", PAPER)
def test_parameters_of_the_papers_models(name):
    """The count is the model's, and the paper's figure once the differences of its GPT are made good.

    The authors' GPT has learned positions, LayerNorms with biases where we have RMSNorms and norms of queries and keys,
    no norm before the head, and biases in its dense feed-forwards. (Its head's bias is in none of their figures.)
    """
    config = config_from_name(name, gated=False)
    counted = parameters(config)
    assert counted["total"] == sum(p.numel() for p in on_meta(config).parameters())
    D, blocks = config.hidden_size, config.num_hidden_layers
    theirs = 256 * D + blocks * 4 * D + config.mlp_layer_types.count("dense") * (config.intermediate_size + D)
    assert round((counted["total"] - counted["norms"] + theirs) / 1e6, 1) == PAPER_MILLIONS[name]


@GATED
@pytest.mark.parametrize("system", [prefix for prefix, row in BY_PREFIX.items() if row.sparse])
def test_active_parameters_are_the_dense_models_and_the_router(system, gated):
    dense = parameters(config_from_name("Transformer-Base", gated=gated))
    sparse = parameters(config_from_name(f"{system}-Base/64E/16", gated=gated))
    assert dense["active"] == dense["total"] == sparse["active"] - sparse["router"]
    assert sparse["experts"] == 64 * dense["feed_forward"] // 2
    slots = 4 if system == "SoftMoE" else 1  # 256 positions and 16 experts a token are 4 rows for each of 1,024
    assert sparse["router"] == (0 if system == "Uniform" else 6 * 64 * 16 * slots * 768)


SIZES = {
    "gated": (True, 14, 9),
    "plain": (False, 14, 9),
    "incomplete_group": (True, 16, 5),
    "below_a_group": (False, 4, 9),
}


def counted_at(kind: str, name: str):
    few = kind in ("dense", "mixture_of_tokens") or name == "incomplete_group"
    return pytest.param(kind, *SIZES[name], id=f"{name}-{kind}", marks=[] if few else pytest.mark.slow)


@pytest.mark.parametrize(
    ("kind", "gated", "batch", "context"), [counted_at(kind, name) for name in SIZES for kind in KINDS]
)
def test_flops_are_those_that_torch_counts(kind, gated, batch, context):
    config, tokens = odd_config(kind, gated=gated), batch * context
    experts = measured(config, batch, context)
    sizes = {"batch": batch, "context": context, "experts_per_token": experts}
    forward, backward = (sum(f.values()) for f in flops_per_token(config, **sizes))
    assert round((forward + backward) * tokens, 3) == counted_flops(config, batch, context, training=True)
    evaluation = sum(flops_per_token(config, **sizes, training=False).forward.values())
    assert round(evaluation * tokens, 3) == counted_flops(config, batch, context, training=False)


@pytest.mark.parametrize("name", ["MoT-Medium/32E/8", pytest.param("TC-Medium/32E/8", marks=pytest.mark.slow)])
def test_flops_of_named_models(name):
    config = config_from_name(name, attn_implementation="eager")
    flops = flops_per_token(config)
    total = sum(flops.forward.values()) + sum(flops.backward.values())
    assert round(total * 32 * 256, 1) == counted_flops(config, 32, 256, training=True)


@pytest.mark.parametrize("kind", ["mixture_of_tokens", "sigmoid_choice"])
def test_shared_experts_are_counted(kind):
    config = odd_config(kind, **SHARED)
    forward, backward = (sum(f.values()) for f in flops_per_token(config, batch=14))
    assert round((forward + backward) * 14 * 9, 3) == counted_flops(config, 14, 9, training=True)
    named = config_from_name(f"{'MoT' if kind == 'mixture_of_tokens' else 'STC'}-Nano/16E/8", **SHARED)
    assert memory(named, batch=32)["activations"] == pytest.approx(kept_bytes(named, 32, torch.float32), rel=0.06)
    assert (
        sum(plan_of(named, 128).flops_per_token["forward"][part] for part in ("feed_forward", "experts"))
        == (flops_per_token(config_from_name("Transformer-Nano")).forward["feed_forward"])
    )


@SPARSE
def test_every_system_spends_the_dense_models_flops_on_experts(kind):
    """In evaluation; in training Token Choice's experts compute on their capacity too, filled or not."""
    systems = {row.kind: prefix for prefix, row in BY_PREFIX.items()}
    config = config_from_name(f"{systems[kind]}-Medium/32E/8")
    dense = flops_per_token(config_from_name("Transformer-Medium")).forward["feed_forward"]
    training, evaluation = (flops_per_token(config, training=training).forward for training in (True, False))
    assert evaluation["experts"] + evaluation["feed_forward"] == dense
    assert training["experts"] == evaluation["experts"] * (1.25 if kind == "token_choice" else 1)


def test_token_choices_capacity_counts_whole_rows():
    """One token a time with k = 2 of 14 experts: each expert has room for one row, a seventh of which is used."""
    config = odd_config("token_choice")
    one, dropless = flops_per_token(config, batch=1, context=1), odd_config("token_choice", capacity_factor=None)
    assert one.forward["experts"] == 7 * flops_per_token(dropless, batch=1, context=1).forward["experts"]


@pytest.mark.parametrize("factor", [1.1, 1.25, 2.2, 1e-9, 10])
@pytest.mark.parametrize("tokens", [1, 100, 203])
def test_token_choices_capacity_is_its_layers(factor, tokens):
    """Also where a product of floats is above the whole number that it should be: 1.1 * 100 / 10."""
    config = config_from_name("TC-Nano/4E", num_experts=10, capacity_factor=factor)
    layer = feed_forward(config, len(config.routings) - 1)
    _, slots = layer._slots_within_capacity(torch.zeros(tokens, 1, 1, dtype=torch.long))
    assert ROUTINGS["token_choice"].rows(config, 1, tokens, True) == slots


@pytest.mark.parametrize(
    ("name", "floor"), [("MoT-Medium/32E", 0.977), ("MoT-Medium/32E/8", 0.842), ("Uniform-Medium/32E/8", 0.889)]
)
def test_the_floor_is_what_routing_costs(name, floor):
    """Router, mixing and giving back cost 2 D E each beside a plain feed-forward's 4 D d_ff.

    That is 6 * 32 / (4 * 2048) = 2.3 % and 6 * 256 / (4 * 2048) = 18.8 %; without a router 12.5 %.
    """
    planned = plan_of(config_from_name(name, gated=False), batch=256)
    assert planned.floor["feed_forward"] == pytest.approx(floor, abs=5e-4)
    assert planned.floor["model"] == pytest.approx(1 / planned.flops_per_token["share_of_dense"]["total"])


@pytest.mark.parametrize(
    ("size", "groups", "gated", "dtype"),
    [
        ("Nano", "16E/8", True, torch.float32),
        ("Nano", "16E/8", True, torch.bfloat16),
        ("Nano", "16E/8", False, torch.bfloat16),
        pytest.param("Medium", "32E/4", True, torch.float32, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("system", [prefix for prefix, row in BY_PREFIX.items() if not row.varies])
def test_activations_are_what_autograd_keeps(system, size, groups, gated, dtype):
    """The estimate leaves out masks and the norms' scales: it is 0.95 to 1.01 of what is kept."""
    name = f"{system}-{size}" if system == "Transformer" else f"{system}-{size}/{groups}"
    config = config_from_name(name, gated=gated, attn_implementation="sdpa")
    estimate = memory(config, batch=32, dtype=str(dtype).removeprefix("torch."))["activations"]
    assert estimate == pytest.approx(kept_bytes(config, 32, dtype), rel=0.06)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("system", "experts"), [("ET", None), ("ReMoE", 64)])
def test_activations_are_what_autograd_keeps_where_the_experts_of_a_token_vary(system, experts, dtype):
    """At the beginning ET has about as many as it is to have, and ReMoE half of all: then it may have more."""
    config = config_from_name(f"{system}-Nano/16E/8", attn_implementation="sdpa")
    name = str(dtype).removeprefix("torch.")
    estimate = memory(config, batch=32, dtype=name, experts_per_token=experts)["activations"]
    most = memory(config, batch=32, dtype=name)["activations"]
    assert most == estimate if experts is None else 1.5 * estimate < most < 2 * estimate
    assert estimate == pytest.approx(kept_bytes(config, 32, dtype), rel=0.1)


def test_weights_gradients_and_moments_are_those_of_the_model():
    config = odd_config("mixture_of_tokens")
    model = on_meta(config, torch.bfloat16)
    weights = sum(p.nbytes for p in model.parameters())
    held = memory(config, batch=7, dtype="bfloat16")
    assert (held["weights"], held["gradients"], held["optimizer"]) == (weights, weights, 2 * weights)


def test_legal_micro_batches_are_whole_groups_and_divide_the_batch():
    assert legal_micro_batches(odd_config("mixture_of_tokens", group_size=6), 36) == [6, 12, 18, 36]
    assert legal_micro_batches(odd_config("expert_choice", group_size=6), 36) == [6, 12, 18, 36]
    assert legal_micro_batches(odd_config("token_choice", group_size=6), 12) == [6, 12]
    with pytest.raises(ValueError, match="a batch of 40 sequences does not divide into groups of 6; 42 would"):
        legal_micro_batches(odd_config("uniform", group_size=6), 40)
    with pytest.raises(ValueError, match="groups of 6; 6 would"):
        legal_micro_batches(odd_config("uniform", group_size=6), 2)


def test_the_model_that_is_planned_has_its_own_fields(tiny_runs, capsys):
    fields = {"num_hidden_layers": 6, "vocab_size": 50257, "max_position_embeddings": 256}
    planned = plan("MoT-Micro/32E/8", model=fields)
    config = config_from_name("MoT-Micro/32E/8", **fields)
    assert planned.parameters == parameters(config)
    assert (planned.context, planned.vocab_size) == (256, 50257)
    flags = [word for field, value in fields.items() for word in (f"--model.{field}", value)]
    mot("plan", "MoT-Micro/32E/8", *flags, "--json")
    assert json.loads(capsys.readouterr().out) == asdict(planned)
    plain = plan("MoT-Micro/32E/8", model=fields | {"gated": False})
    assert plain == plan("MoT-Micro/32E/8", model=fields, gated=False) != planned
    run = tiny_runs["MoT-Nano/4E/2"]
    mot("plan", "--config", run / "config.yaml", "--json")
    shown, (config, facts) = json.loads(capsys.readouterr().out), (read_run(run).config, read_run(run).facts)
    assert shown["parameters"]["total"] == facts.parameters
    assert (shown["batch"], shown["training"]["steps"]) == (config.batch_size, config.steps)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--model.layers", 3), "--model.layers is no setting; legal are hidden_size"),
        (("--model.hidden_size", "wide"), "--model.hidden_size takes a whole number, not 'wide'"),
        (("--model.num_experts", 0), "num_experts"),
        (("--model.rms_norm_eps", 0), "--model.rms_norm_eps must be positive, not 0"),
    ],
)
def test_a_field_that_cannot_be_planned_is_one_line(words, told, capsys):
    with pytest.raises(SystemExit, match="2"):
        mot("plan", "MoT-Nano/4E/2", *words)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("mot: error: --model.")
    assert told in captured.err
    assert captured.err.count("\n") == 1


def test_plan_prints_what_json_holds(capsys):
    flags = ("plan", "MoT-Medium/32E/8", "--micro-batch", 64, "--dtype", "bfloat16", "--no-gated")
    mot(*flags, "--json")
    planned = json.loads(capsys.readouterr().out)
    assert planned == asdict(plan("MoT-Medium/32E/8", micro_batch=64, dtype="bfloat16", gated=False))
    assert planned["matched"][0] == "Transformer-Medium"
    assert planned["legal_micro_batches"] == [32, 64, 128, 256]
    for parts in (*planned["flops_per_token"].values(), planned["memory_bytes"]):
        assert parts["total"] == pytest.approx(sum(parts.values()) - parts["total"])

    mot(*flags)
    text = capsys.readouterr().out
    for part, flops in planned["flops_per_token"]["forward"].items():
        backward = planned["flops_per_token"]["backward"][part]
        assert re.search(rf"{part} +{flops / 1e6:.1f} M +{backward / 1e6:.1f} M ", text)
    for part, held in planned["memory_bytes"].items():
        assert re.search(rf"{part} +{held / 2**30:.3f}$", text, re.MULTILINE)
    assert "0.842" in text
    assert "64 sequences at once" in text


def test_plan_says_how_long_a_training_takes(capsys):
    per_token = [parts["total"] for parts in list(plan("MoT-Nano/4E").flops_per_token.values())[:2]]
    found = plan("MoT-Nano/4E", steps=1000, tflops=2, devices=4).training
    assert found is not None
    assert (found.tokens, found.flops) == (1000 * 8192, pytest.approx(1000 * 8192 * sum(per_token)))
    assert found.seconds == pytest.approx(found.flops / (4 * 2e12))
    mot("plan", "MoT-Nano/4E", "--steps", 1000, "--tflops", 1e-4)
    seconds = 4 * 2e12 / 1e8 * found.seconds
    said = rf"^1,000 steps: 8.19 M tokens, {found.flops / 1e12:.3g} TFLOPs; {seconds / 3600:.1f} h at 0.0001 TFLOP/s"
    assert re.search(said, capsys.readouterr().out, re.MULTILINE)
    assert plan("MoT-Nano/4E").training is None
    of_many = plan("MoT-Mini/4E", steps=10, devices=2).training
    assert of_many is not None
    assert of_many.tflops == 300
    if not torch.cuda.is_available():  # no peak is known of a CPU
        mot("plan", "MoT-Nano/4E", "--steps", 1000)
        assert "TFLOPs; --measure says how long that takes here" in capsys.readouterr().out
    with pytest.raises(ValueError, match="tflops is for steps N"):
        plan("MoT-Nano/4E", tflops=2)
    with pytest.raises(ValueError, match="tflops must be positive and finite, not nan"):
        plan("MoT-Nano/4E", steps=1000, tflops=math.nan)


def test_plan_measures_this_machine(capsys, monkeypatch):
    monkeypatch.setattr("mixture_of_tokens.training.timing.SECONDS", 0.2)
    mot("plan", "MoT-Nano/4E", "--batch-size", 8, "--micro-batch", 4, "--steps", 1000, "--measure", "--json")
    found = json.loads(capsys.readouterr().out)["training"]
    assert found["measured"]
    assert found["tokens"] == 1000 * 8 * 64
    assert 0 < found["seconds"] < 1000
    mot("plan", "MoT-Nano/4E", "--batch-size", 8, "--measure")
    said = capsys.readouterr()
    assert re.search(r"^1,500 steps: 768 k tokens, .* on this machine, \S+ s a step as timed", said.out, re.MULTILINE)
    assert said.err == ""
    for flags in ({"tflops": 2, "steps": 5}, {"devices": 2}):
        with pytest.raises(ValueError, match="measure times this machine: leave out tflops and devices"):
            plan("MoT-Nano/4E", measure=True, **flags)


def test_plan_has_the_micro_batches_that_train_takes(capsys):
    assert plan("TC-Nano/32E").legal_micro_batches == [32, 64, 128]
    assert plan("Transformer-Nano").legal_micro_batches == [1, 2, 4, 8, 16, 32, 64, 128]
    for name in ("TC-Nano/32E", "Transformer-Nano"):
        taken = []
        for parts in range(128, 0, -1):
            with suppress(ValueError):
                merge(name, 0, None, Options(training={"gradient_accumulation_steps": str(parts)}))
                taken.append(128 // parts)
        assert taken == plan(name).legal_micro_batches
    with pytest.raises(ValueError, match="a batch of 100 sequences does not divide into groups of 32; 96 would"):
        plan("TC-Nano/32E", batch_size=100)


def test_the_floor_counts_shared_experts():
    config = config_from_name("MoT-Medium/32E/8", shared_experts=4)
    forward = plan_of(config, batch=256).flops_per_token["forward"]
    dense = plan_of(config_from_name("Transformer-Medium"), batch=256).flops_per_token["forward"]["feed_forward"]
    routing = forward["router"] + forward["dispatch"] + forward["combine"]
    shared = forward["feed_forward"] - dense / 2  # half of the blocks are dense
    floor = dense / 2 / (forward["experts"] + shared + routing)
    assert plan_of(config, batch=256).floor["feed_forward"] == pytest.approx(floor)


def test_plan_answers_for_any_batch():
    assert plan("Transformer-Nano", batch_size=2**31 - 1).legal_micro_batches == [1, 2**31 - 1]
    with pytest.raises(ValueError, match="devices is more than 2147483647"):
        plan("Transformer-Nano", devices=10**10)
    with pytest.raises(ValueError, match=f"groups of 32; {2**31 - 32} would"):  # and would be taken
        plan("MoT-Nano/32E", batch_size=2**31 - 1)
    many = plan("MoT-Nano/32E", batch_size=32 * 55440)
    assert len(many.legal_micro_batches) == 120
    assert f"legal micro-batches: {', '.join(map(str, many.legal_micro_batches[:23]))}, 97 more\n" in str(many)


def test_plan_takes_a_batch_that_the_group_divides():
    planned = plan("MoT-Nano/24E")
    assert (planned.batch, planned.micro_batch) == (144, 144)  # 128 is no multiple of 24


def test_a_model_without_a_name_has_a_plan():
    assert plan_of(odd_config("mixture_of_tokens"), batch=14).matched == []


def test_plan_refuses_what_it_cannot_plan():
    with pytest.raises(ValueError, match="micro-batch 48 is not legal; legal are 32, 64, 128, 256"):
        plan("MoT-Medium/32E", micro_batch=48)
    with pytest.raises(ValueError, match="dtype 'float8' is unknown; legal are float32, bfloat16"):
        plan_of(config_from_name("MoT-Medium/32E"), batch=256, dtype="float8")
    with pytest.raises(ValueError, match="dtype takes float32 or bfloat16, not 'float8'"):
        plan("MoT-Medium/32E", dtype="float8")  # pyright: ignore[reportArgumentType]
