"""Configurations by their names, and names by their configurations. The grammar stands in `settings/names.py`."""

from dataclasses import replace
from typing import Any

from mixture_of_tokens.models.config import MixtureOfTokensConfig, layer_types
from mixture_of_tokens.settings.model import FIELDS as DECLARED
from mixture_of_tokens.settings.names import SIZES, Name, parse_name
from mixture_of_tokens.settings.routings import BY_PREFIX, MIXTURE
from mixture_of_tokens.utils.checks import check, checked, divisors
from mixture_of_tokens.utils.formatting import enumerated, listing
from mixture_of_tokens.utils.wording import nearest

FIELDS = sorted(DECLARED)  # that may be overridden

# The fields that a name determines; NAMED_OF_EXPERTS only where there are experts. A name leaves open the vocabulary,
# the context and training settings (temperature, capacity, ...).
NAMED = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
)
NAMED += ("hidden_act", "gated", "qk_norm", "attention_bias", "tie_word_embeddings", "mlp_layer_types")
SIZES_NAMED = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
NAMED_OF_EXPERTS = ("num_experts", "moe_intermediate_size", "num_experts_per_tok", "group_size")


@checked
def config_from_name(
    name: str, *, gated: bool = True, vocab_size: int | None = None, **overrides: Any
) -> MixtureOfTokensConfig:
    """The configuration that a name stands for.

    Args:
        name: see the grammar in `settings/names.py`.
        gated: SwiGLU feed-forwards; False: the paper's plain ones with ReLU, 1.5 times as wide at equal FLOPs.
        vocab_size: the tokenizer's; by default the size's.
        overrides: any of `FIELDS`. Values derived from an overridden field follow it: expert widths from
            `intermediate_size`, the sparse half from `num_hidden_layers`, key and value heads from
            `num_attention_heads`.

    Raises ValueError for an unknown name or field, or a granularity that does not divide d_ff.
    """
    for field in overrides:
        if field not in FIELDS:
            raise ValueError(f"the configuration has no field {field!r}{nearest(field, FIELDS)}")
    for field in ("intermediate_size", "num_attention_heads", "num_hidden_layers"):  # others depend on these
        if field in overrides:
            check(field, overrides[field], int)
    parsed = parse_name(name)
    if not parsed.size and (missing := [field for field in SIZES_NAMED if field not in overrides]):
        example = replace(parsed, size="Nano")
        raise ValueError(f"{name!r} has no size, as {str(example)!r} has one, and {enumerated(missing)} are not given")
    size, k = parsed.dimensions, parsed.granularity
    routed = k - _shared(parsed, overrides.get("shared_experts", 0))
    width = overrides.get("intermediate_size", size.gated_width if gated else size.plain_width)
    if width % k:
        what = f"granularity {k} does not divide the feed-forward width {width}"
        raise ValueError(f"{name!r}: {what}; legal are {listing(divisors(width))}")
    heads = overrides.get("num_attention_heads", size.heads)
    blocks = overrides.get("num_hidden_layers", size.blocks)
    dense = 0 if size.sparse_everywhere else blocks // 2
    values = {
        "vocab_size": size.vocab_size if vocab_size is None else vocab_size,
        "hidden_size": size.hidden_size,
        "intermediate_size": width,
        "num_hidden_layers": blocks,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "max_position_embeddings": size.context,
        "hidden_act": "silu" if gated else "relu",
        "gated": gated,
        "mlp_layer_types": layer_types(blocks, dense=dense, kind=parsed.routing.kind),
        "num_experts": parsed.group_size * routed,
        "moe_intermediate_size": width // k,
        "num_experts_per_tok": routed,  # conversion from MoT to Token Choice needs it too
        "group_size": parsed.group_size,
        "router_temperature": size.mixture_temperature if parsed.routing.kind == MIXTURE.kind else 1.0,
    }
    return MixtureOfTokensConfig(**values | overrides)


def as_named(name: str, config: MixtureOfTokensConfig) -> MixtureOfTokensConfig:
    """The configuration that a name stands for by itself, but for sizes that it does not say: those of `config`."""
    sizes = {} if parse_name(name).size else {field: getattr(config, field) for field in SIZES_NAMED}
    return config_from_name(name, **sizes)


def other_sizes(name: str, config: MixtureOfTokensConfig) -> dict[str, tuple[Any, Any]]:
    """Sizes, by field, that are not as the model's name says: its own, and the name's."""
    if not parse_name(name).size:
        return {}
    how: dict[str, Any] = {"gated": config.gated, "shared_experts": config.shared_experts}
    try:
        named = config_from_name(name, **how)
    except ValueError:  # its granularity divides no width but the one that was chosen
        named = config_from_name(name, intermediate_size=config.intermediate_size, **how)
    fields_of = SIZES_NAMED + (NAMED_OF_EXPERTS if config.sparse_routings else ())
    pairs = {field: (getattr(config, field), getattr(named, field)) for field in fields_of}
    return {field: pair for field, pair in pairs.items() if pair[0] != pair[1]}


def _shared(name: Name, count: int) -> int:
    if not isinstance(count, int) or not count:  # what is no number is the configuration's to refuse
        return 0
    if not name.routing.sparse:
        raise ValueError(f"'{name}': shared_experts must be 0, as a {name.system} has no experts")
    if count >= name.granularity:
        more = "some must be routed" if name.granularity > 1 else "a name like MoT-Nano/32E/8 has more"
        raise ValueError(
            f"'{name}': shared_experts must be below the granularity {name.granularity}, not {count}: {more}"
        )
    return count


def name_of(config: MixtureOfTokensConfig) -> str | None:
    """The name of a configuration, whatever its vocabulary, context and training settings; None if it has no name."""
    used = {routing.prefix for routing in config.sparse_routings or config.routings}
    if len(used) > 1:
        return None
    (system,) = used
    granularity = config.intermediate_size // config.moe_intermediate_size
    groups = () if not BY_PREFIX[system].sparse else (config.group_size, granularity)
    for size in SIZES:
        name = Name(system, size, *groups)
        try:
            named = config_from_name(str(name), gated=config.gated, shared_experts=config.shared_experts)
        except ValueError:  # this granularity does not divide this size's width
            continue
        named_fields = NAMED + NAMED_OF_EXPERTS if groups else NAMED
        if all(getattr(named, field, None) == getattr(config, field, None) for field in named_fields):
            return str(name)
    return None
