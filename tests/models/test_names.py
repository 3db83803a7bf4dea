"""Names <-> configurations: the paper's table, the way back, what follows an overridden field, what errors say."""

import itertools
import re

import pytest

from mixture_of_tokens.models.config import MixtureOfTokensConfig
from mixture_of_tokens.models.names import FIELDS, config_from_name, name_of
from mixture_of_tokens.settings.names import SIZES, Name, parse_name
from mixture_of_tokens.settings.routings import BY_PREFIX
from mixture_of_tokens.utils.wording import nearest
from paper import PAPER


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_names_are_the_papers_models(name):
    config = config_from_name(name, gated=False)
    sizes = (config.hidden_size, config.intermediate_size, config.num_hidden_layers, config.num_attention_heads)
    assert (*sizes, config.group_size, config.num_experts, config.moe_intermediate_size) == PAPER[name]
    assert (config.max_position_embeddings, config.vocab_size, config.hidden_act) == (256, 50257, "relu")


@pytest.mark.parametrize(
    ("name", "sparse"),
    [("MoT-Nano/8E", 2), ("MoT-Mini/8E", 4), ("MoT-Medium/8E", 4), ("MoT-Base/8E", 6), ("Transformer-Base", 0)],
)
def test_the_later_half_is_sparse_and_in_mini_all(name, sparse):
    config = config_from_name(name)
    dense = config.num_hidden_layers - sparse
    assert config.mlp_layer_types == ["dense"] * dense + ["mixture_of_tokens"] * sparse


@pytest.mark.parametrize("size", SIZES)
def test_gated_and_plain_feed_forwards_have_equal_flops(size):
    """Three matrices beside two; widths are multiples of 32, which costs up to 1.6 %, and a Nano 13 %."""
    gated, plain = (config_from_name(f"Transformer-{size}", gated=gated).intermediate_size for gated in (True, False))
    assert 3 * gated == pytest.approx(2 * plain, rel=0.13 if size == "Nano" else 0.016)
    assert gated % 32 == 0


@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("system", BY_PREFIX)
def test_a_name_comes_back_from_its_configuration(system, size, gated):
    endings = [""] if system == "Transformer" else ["/1E", "/6E", "/32E/8", "/128E/32"]
    for name in (f"{system}-{size}{ending}" for ending in endings):
        assert name_of(config_from_name(name, gated=gated)) == name
        assert str(parse_name(name)) == name


def test_granularity_1_may_be_written_and_is_left_out():
    assert parse_name("TC-Base/64E/1") == Name("TC", "Base", 64, 1)
    assert str(parse_name("TC-Base/64E/1")) == "TC-Base/64E"


def test_matched_names_differ_in_the_system_alone():
    dense, *sparse = parse_name("EC-Mini/8E/2").matched()
    assert dense == "Transformer-Mini"
    assert sparse == [f"{prefix}-Mini/8E/2" for prefix, row in BY_PREFIX.items() if row.sparse]
    assert parse_name("Transformer-Mini").matched() == ["Transformer-Mini"]


def test_a_name_survives_saving_and_what_it_does_not_tell(tmp_path):
    settings = {"router_temperature": 0.25, "normalize_mixture": True, "capacity_factor": None}
    config = config_from_name("TC-Nano/8E/2", vocab_size=300, max_position_embeddings=32, **settings)
    config.save_pretrained(tmp_path)
    loaded = MixtureOfTokensConfig.from_pretrained(tmp_path)
    assert name_of(loaded) == "TC-Nano/8E/2"
    assert (loaded.vocab_size, loaded.router_temperature, loaded.capacity_factor) == (300, 0.25, None)


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_size": 64},
        {"num_hidden_layers": 6},
        {"num_experts": 17},
        {"num_experts_per_tok": 3},
        {"moe_intermediate_size": 200},
        {"head_dim": 8},
        {"tie_word_embeddings": True},
        {"mlp_layer_types": ["mixture_of_tokens", "dense"] * 2},
        {"mlp_layer_types": ["dense", "mixture_of_tokens", "uniform", "uniform"]},
    ],
    ids=lambda change: "_".join(change),
)
def test_another_architecture_has_no_name(change):
    assert name_of(config_from_name("MoT-Nano/8E/2", **change)) is None


def test_what_is_derived_follows_an_overridden_field():
    config = config_from_name("EC-Medium/8E/4", intermediate_size=400, num_hidden_layers=3, num_attention_heads=4)
    assert config.moe_intermediate_size == 100
    assert config.mlp_layer_types == ["dense", "expert_choice", "expert_choice"]
    assert config.num_key_value_heads == 4
    assert config_from_name("EC-Medium/8E/4", num_experts=5, group_size=7).num_experts == 5
    assert config_from_name("MoT-Nano/8E", hidden_act="gelu", gated=False).hidden_act == "gelu"


@pytest.mark.parametrize(
    ("name", "says"),
    [
        (
            "Mot-Nano/32E",
            "no legal system: 'Mot' is none of Transformer, MoT, Uniform, TC, STC, DMoE, EC, ET, ReMoE, SoftMoE; did",
        ),
        ("MoT-Meduim/32E", "no legal size: 'Meduim' is none of Nano, Micro, Mini, Medium, Base; did you mean Medium?"),
        ("MoT", "no legal size: '' is none of"),
        ("MoT-Nano/32E,TC-Nano/32E", "is no name of a model: several names have a space between them"),
        ("1", "is no name of a model: several seeds are given as 0,1,2"),
        ("", "no legal system: '' is none of"),
        ("nano", "SoftMoE; the system stands before the size, as in MoT-Nano/32E/8"),
        ("MoT-Nano", "after the size comes /<group size>E"),
        ("MoT-Nano/", "as in 'MoT-Nano/32E' or 'MoT-Nano/32E/8'"),
        ("MoT-Nano/32", "after the size comes /<group size>E"),
        ("MoT-Nano/0E", "after the size comes /<group size>E"),
        ("MoT-Nano/32E/0", "after the size comes /<group size>E"),
        ("MoT-Nano/32E/x", "after the size comes /<group size>E"),
        ("MoT-Nano/32E/4/2", "after the size comes /<group size>E"),
        ("MoT-Nano/32E\n", "after the size comes /<group size>E"),
        ("Transformer-Nano/32E", "a Transformer has no experts, its name is 'Transformer-Nano'"),
        (f"MoT-Nano/{2**31}E", "group size and granularity are at most 2147483647"),
        (f"MoT-Nano/{10**400}E/8", "group size and granularity are at most 2147483647"),
        ("MoT-Nano/32E/5", "granularity 5 does not divide the feed-forward width 96; legal are 1, 2, 3, 4, 6, 8, 12,"),
    ],
)
def test_an_illegal_name_is_told_in_one_line_what_is_legal(name, says):
    with pytest.raises(ValueError, match=re.escape(says)) as caught:
        config_from_name(name)
    assert "\n" not in str(caught.value)


def test_shared_experts_are_some_of_the_granularity():
    config = config_from_name("TC-Nano/8E/4", shared_experts=1)
    assert (config.num_experts, config.num_experts_per_tok, config.moe_intermediate_size) == (24, 3, 24)
    assert name_of(config) == "TC-Nano/8E/4"
    with pytest.raises(ValueError, match="shared_experts must be below the granularity 4, not 4: some must be routed"):
        config_from_name("TC-Nano/8E/4", shared_experts=4)
    with pytest.raises(ValueError, match="below the granularity 1, not 1: a name like MoT-Nano/32E/8 has more"):
        config_from_name("MoT-Nano/8E", shared_experts=1)
    with pytest.raises(ValueError, match="shared_experts must be 0, as a Transformer has no experts"):
        config_from_name("Transformer-Nano", shared_experts=1)
    with pytest.raises(ValueError, match="shared_experts must be 0 or more, not -1"):
        config_from_name("MoT-Nano/8E/2", shared_experts=-1)
    with pytest.raises(ValueError, match="shared_experts takes a whole number, not True"):
        config_from_name("MoT-Nano/8E/2", shared_experts=True)


@pytest.mark.parametrize("field", ["intermediate_size", "num_attention_heads", "num_hidden_layers"])
@pytest.mark.parametrize("value", ["96", 2.5, None])
def test_a_field_that_others_depend_on_is_a_whole_number(field, value):
    with pytest.raises(ValueError, match=f"{field} takes a whole number, not {value!r}"):
        config_from_name("MoT-Nano/8E", **{field: value})


def test_an_unknown_field_is_told_the_nearest():
    with pytest.raises(ValueError, match=r"no field 'num_expert'; did you mean num_experts\?$"):
        config_from_name("MoT-Nano/8E", num_expert=3)
    with pytest.raises(ValueError, match=r"no field 'qqqq'$"):
        config_from_name("MoT-Nano/8E", qqqq=3)
    assert {"group_size", "vocab_size", "head_dim"} <= set(FIELDS)


def test_the_nearest_word_ignores_case_and_is_silent_when_nothing_is_near():
    assert nearest("TRANSFORMR", BY_PREFIX) == "; did you mean Transformer?"
    assert nearest("llama", BY_PREFIX) == ""


def test_only_the_mixtures_of_nano_and_micro_have_a_sharper_router():
    for size, system in itertools.product(SIZES, ("MoT", "TC", "STC", "EC")):
        sharper = system == "MoT" and size in ("Nano", "Micro")
        assert config_from_name(f"{system}-{size}/32E").router_temperature == (0.25 if sharper else 1.0)
    assert config_from_name("MoT-Nano/32E", router_temperature=0.5).router_temperature == 0.5
