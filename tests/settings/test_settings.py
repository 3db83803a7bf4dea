"""Settings of some routings: which read them, and that others refuse them."""

import inspect
import json
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import routings
from mixture_of_tokens import Options, compare, plan, prepare, sweep, train
from mixture_of_tokens.data.tokenizer import ids_of, load_tokenizer, train_tokenizer
from mixture_of_tokens.models.feed_forwards import LAYERS
from mixture_of_tokens.settings.layers import FIELDS, fields_of
from mixture_of_tokens.settings.names import parse_name
from mixture_of_tokens.settings.routings import SETTINGS, TABLE, Routing
from mixture_of_tokens.training.compare import _plans
from mixture_of_tokens.training.merging import chosen_in, merge
from processes import mot

OTHER = {  # than the default
    "router_temperature": 0.3,
    "learnable_temperature": True,
    "router_dtype": "float64",
    "normalize_mixture": True,
    "norm_topk_prob": True,
    "capacity_factor": 0.5,
    "router_aux_loss_coef": 1.0,
    "router_z_loss_coef": 1.0,
    "balance_rate": 0.5,
    "default_decay": 0.1,
    "threshold_decay": 0.1,
    "l1_start": 0.1,
    "l1_factor": 1e8,
    "threshold_scores": "sigmoid",
}
MIXED = {"mlp_layer_types": ["dense", "mixture_of_tokens", "token_choice", "dense"]}


def trained(kind: str, **fields) -> dict[str, Tensor]:
    """The weights after two steps, each of which is balanced."""
    model = routings.tiny(kind, num_experts_per_tok=2, **fields).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    rows = torch.randint(97, (6, 9), generator=torch.Generator().manual_seed(1))
    for _ in range(2):
        optimizer.zero_grad()
        model(rows, labels=rows).loss.backward()
        optimizer.step()
        model.balance()
    return {name: weight for name, weight in model.named_parameters() if not name.endswith("log_temperature")}


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.kind)
def test_a_routing_reads_its_settings_and_no_others(row: Routing):
    plain = trained(row.kind)
    found = {}
    for field, value in OTHER.items():
        other = trained(row.kind, **{field: value})
        found[field] = any(not torch.equal(weight, plain[name]) for name, weight in other.items())
    assert found == {field: field in row.settings for field in SETTINGS}


@pytest.mark.parametrize("row", [row for row in TABLE if row.kind in LAYERS], ids=lambda row: row.kind)
def test_a_layer_s_own_defaults_are_those_of_the_settings(row: Routing):
    layer, _ = LAYERS[row.kind]
    arguments = inspect.signature(layer).parameters
    for name in fields_of(row.kind):
        own = arguments.get(FIELDS[name].metadata["argument"] or name)
        assert own is None or own.default == FIELDS[name].default, name


def asked(name: str, **options) -> list[str]:
    """What commands that train say to these options; "" where they take them."""
    told = []
    for command in (train, sweep, compare):
        try:
            command(name, options=Options(**options), dry_run=True)
        except ValueError as error:
            told.append(str(error))
        else:
            told.append("")
    return told


def test_a_setting_that_no_block_reads_is_refused():
    for field, value in OTHER.items():
        for name in ("Transformer-Nano", "Uniform-Nano/4E", "MoT-Nano/4E", "TC-Nano/4E", "STC-Nano/4E"):
            of = SETTINGS[field]
            line = f"model.{field} would do nothing in {name}; it is of {', '.join(of)}"
            assert asked(name, model={field: value}) == ["" if parse_name(name).system in of else line] * 3
    assert set(asked("MoT-Nano/4E", model=MIXED | {"capacity_factor": 2})) == {""}


def test_a_sweep_s_values_and_a_text_s_flags_are_checked_too():
    line = r"^model.capacity_factor would do nothing in MoT-Nano/32E; it is of TC$"
    with pytest.raises(ValueError, match=line):
        sweep("MoT-Nano/32E", options=Options(model={"capacity_factor": "1,2"}), dry_run=True)
    with pytest.raises(ValueError, match=line):
        prepare("MoT-Nano/32E", options=Options(model={"capacity_factor": 2}))


def test_a_plan_counts_the_tokens_of_a_given_tokenizer(tmp_path):
    train_tokenizer(["some text"], 300).save_pretrained(tmp_path)
    given = {"steps": 10, "tokenizer": str(tmp_path)}
    (own,) = sweep("Transformer-Nano", options=Options(**given), dry_run=True).runs
    ids = str(ids_of(load_tokenizer(str(tmp_path))))
    (same,) = sweep("Transformer-Nano", options=Options(**given, model={"vocab_size": ids}), dry_run=True).runs
    (default,) = sweep("Transformer-Nano", options=Options(steps=10), dry_run=True).runs
    assert own.flops == same.flops < default.flops


def test_models_of_a_comparison_share_settings_that_one_of_them_reads():
    options = Options(model={"capacity_factor": 1.5})
    compare("Transformer-Nano", "MoT-Nano/4E", "TC-Nano/4E", options=options, dry_run=True)
    with pytest.raises(ValueError, match=r"nothing in Transformer-Nano, MoT-Nano/4E; it is of TC$"):
        compare("Transformer-Nano", "MoT-Nano/4E", seeds=[0, 1], options=options, dry_run=True)


def test_a_run_of_a_comparison_has_the_settings_that_it_reads_and_earlier_ones_go_on(tmp_path):
    options = Options(model={"capacity_factor": 1.5})
    for each in _plans(("Transformer-Nano", "TC-Nano/4E"), [0], [None, None], options, tmp_path):
        config, before = each.merged.config, merge(each.name, 0, None, options).config
        with_unread = replace(before, model=before.model | {"capacity_factor": 1.5})  # as earlier runs have it
        assert config.identity() == with_unread.identity()
        assert config == (before if each.name == "TC-Nano/4E" else train(each.name, dry_run=True))


@pytest.mark.parametrize(
    ("name", "options", "line"),
    [
        ("MoT-Nano/4E", {"model": {"capacity_factor": None}}, "model.capacity_factor would do nothing in MoT-Nano/4E"),
        ("MoT-Nano/4E", {"model": {"num_experts_per_tok": 5}}, "model.num_experts_per_tok must be 1 to 4, not 5"),
        ("TC-Nano/4E", {"training": {"eval_steps": 1e300}}, "training.eval_steps is more than 2147483647"),
        ("TC-Nano/4E", {"training": {"eval_delay": 1e300}}, "training.eval_delay is more than 2147483647"),
    ],
)
def test_a_value_that_would_do_nothing_is_refused(name, options, line):
    assert [said.startswith(line) for said in asked(name, **options)] == [True] * 3


@pytest.mark.parametrize("name", ["Transformer-Nano", "MoT-Nano/4E", "Uniform-Nano/4E", "STC-Nano/4E"])
def test_a_setting_may_have_the_value_that_it_has_anyway(name):
    """As in config.yaml, whatever else is set."""
    made = train(name, dry_run=True)
    fields = {field: getattr(made.model_config, field) for field in SETTINGS}
    assert train(name, options=Options(model=fields), dry_run=True) == made
    others = {"intermediate_size": 100, "num_hidden_layers": 2}
    assert set(asked(f"{name}/5" if "/" in name else name, model=fields | others)) == {""}
    assert set(asked(name, model=chosen_in(made.as_read())["model"])) == {""}


@pytest.mark.parametrize(
    ("name", "chosen", "other"),
    [
        ("MoT-Nano/4E", {"num_hidden_layers": 2}, "TC-Nano/4E"),
        ("MoT-Nano/32E/8", {"shared_experts": 1}, "MoT-Nano/4E/8"),
        ("MoT-Nano/32E/8", {"shared_experts": 1}, "TC-Nano/8E/4"),
        ("Transformer-Micro", {"gated": False}, "Transformer-Nano"),
        ("TC-Nano/4E", {"capacity_factor": None, "num_attention_heads": 8}, "TC-Micro/4E"),
        ("MoT-Nano/4E", {}, "MoT-Micro/4E"),
    ],
)
def test_a_runs_file_with_another_name_keeps_what_was_chosen_alone(name, chosen, other, tmp_path, capsys):
    """Not what followed from it, which would make another model than the name says."""
    mot("train", name, *(f"--model.{key}={json.dumps(value)}" for key, value in chosen.items()), "--dry-run")
    (tmp_path / "config.yaml").write_text(capsys.readouterr().out)
    mot("train", other, "--config", tmp_path / "config.yaml", "--dry-run")
    asked = train(other, options=Options(model=chosen), dry_run=True)
    assert capsys.readouterr().out == str(asked)


def test_a_window_is_refused_where_none_is_used():
    told = "model.sliding_window 8 would do nothing; with model.use_sliding_window true it does"
    for name in ("Transformer-Nano", "MoT-Nano/4E"):
        assert asked(name, model={"sliding_window": 8}) == [told] * 3
        assert set(asked(name, model={"sliding_window": 8, "use_sliding_window": True})) == {""}
        assert set(asked(name, model={"sliding_window": None})) == {""}


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: Options(model={"group_size": 0}), "model.group_size must be at least 1, not 0"),
        (lambda: Options(training={"weight_decay": -1}), "training.weight_decay must be 0 or more, not -1"),
        (lambda: train("MoT-Nano/32E", options=Options(batch_size=33)), "by batch_size"),
        (lambda: train("MoT-Nano/32E", seed=-1), "^seed "),
        (lambda: train(start="nowhere"), "^start nowhere"),
        (lambda: plan("MoT-Nano/32E", shard=2), "shard, replicate and expert_parallel are for devices N"),
    ],
)
def test_python_is_told_of_arguments_and_not_of_flags(call, said):
    with pytest.raises(ValueError, match=said) as refused:
        call()
    assert "--" not in str(refused.value)
