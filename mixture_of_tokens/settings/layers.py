"""Fields of a configuration that Qwen3-MoE does not have, or that a layer is made with.

A new one is a line here, and an argument of the same name of the layers that read it: the configuration, the command
line, files, the table of routings and the builders of layers take it from here. It needs no library, as a model's own
files on the Hub have it too.
"""

from collections.abc import Mapping
from dataclasses import Field, dataclass, field, fields
from typing import Any, Literal, get_args, get_origin

from mixture_of_tokens.settings.choices import Scores
from mixture_of_tokens.utils.checks import check, check_choice, check_range

CHOICES = ("token_choice", "sigmoid_choice", "default_moe")
Dtypes = Literal["float32", "bfloat16", "float64"]


def setting(
    default: Any, *of: str, argument: str | None = None, training: bool = False, later: bool = False, **bounds: float
) -> Any:
    """A field of `LayerSettings`.

    Args:
        of: the kinds of routing whose layers take it as an argument; none for what the model reads itself.
        argument: the argument's name, where it is not the field's.
        training: it changes how a model is trained, not what it computes.
        later: added after the first release. Files of before lack it, so it is written where it is not the default.
        bounds: as `check_range` takes them.
    """
    metadata = {"of": of, "argument": argument, "training": training, "later": later, "bounds": bounds}
    return field(default=default, metadata=metadata)


@dataclass(kw_only=True)
class LayerSettings:
    """What each is stands at `MixtureOfTokensConfig` and in the layers."""

    group_size: int = setting(32, ge=1)
    shared_experts: int = setting(0, ge=0)
    gated: bool = setting(True)
    qk_norm: bool = setting(True, later=True)
    initializer_scale: float = setting(0.1**0.5, gt=0, training=True)
    router_temperature: float = setting(1.0, ge=1e-20, le=1e20)  # beyond it logits of fp32 vanish, or are infinite
    learnable_temperature: bool = setting(False)
    router_dtype: Dtypes = setting("float32")
    normalize_mixture: bool = setting(False, "mixture_of_tokens", "uniform")
    norm_topk_prob: bool = setting(False, "token_choice", "sigmoid_choice")
    capacity_factor: float | None = setting(1.25, "token_choice", gt=0, training=True)
    router_aux_loss_coef: float = setting(0.01, "token_choice", "default_moe", ge=0, training=True)
    router_z_loss_coef: float = setting(0.0, *CHOICES, ge=0, training=True, later=True)
    balance_rate: float = setting(1e-3, "sigmoid_choice", ge=0, training=True)
    default_decay: float = setting(0.99, "default_moe", ge=0, lt=1, training=True, later=True)
    threshold_decay: float = setting(0.9, "expert_threshold", ge=0, lt=1, training=True)
    l1_start: float = setting(1e-8, "remoe", gt=0, le=1e38, training=True, later=True)
    l1_factor: float = setting(1.2, "remoe", gt=1, le=1e38, training=True, later=True)
    threshold_scores: Scores = setting("softmax", "expert_threshold", argument="scores")


FIELDS: Mapping[str, Field[Any]] = {each.name: each for each in fields(LayerSettings)}
LATER = {name: each.default for name, each in FIELDS.items() if each.metadata["later"]}
OF_TRAINING = tuple(name for name, each in FIELDS.items() if each.metadata["training"])


def fields_of(kind: str) -> tuple[str, ...]:
    """Those that the layers of a kind of routing take, and not all."""
    return tuple(name for name, each in FIELDS.items() if kind in each.metadata["of"])


def arguments_of(kind: str, config: Any) -> dict[str, Any]:
    """These as arguments of the layer, with a configuration's values."""
    return {FIELDS[name].metadata["argument"] or name: getattr(config, name) for name in fields_of(kind)}


def check_setting(name: str, value: Any) -> None:
    """Raises ValueError, naming the field, for a value that is not legal."""
    hint, bounds = FIELDS[name].type, FIELDS[name].metadata["bounds"]
    if get_origin(hint) is Literal:
        check_choice(name, value, get_args(hint))
    else:
        check(name, value, hint)
        if bounds and value is not None:
            check_range(name, value, **bounds)
