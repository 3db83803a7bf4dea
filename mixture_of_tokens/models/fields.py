"""Fields of a model's configuration as flags, `--model.FIELD VALUE`: read, and checked beyond what upstream checks."""

import math
import typing
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from mixture_of_tokens.layers.experts import check_choices
from mixture_of_tokens.models.config import MixtureOfTokensConfig
from mixture_of_tokens.models.hf_internals import ROPE_INIT_FUNCTIONS
from mixture_of_tokens.models.names import config_from_name
from mixture_of_tokens.settings.flags import typed
from mixture_of_tokens.utils.checks import check_number
from mixture_of_tokens.utils.formatting import in_words

# Of weights in training; Adam's smallest numbers are zero in float16.
DTYPES = ("float32", "bfloat16", "float64")


def config_of(name: str, flags: Mapping[str, str]) -> tuple[MixtureOfTokensConfig, dict[str, Any]]:
    """A name's configuration with the values of these flags, and these values by field.

    Raises ValueError where they are no model.
    """
    overrides = _overrides(flags)
    with names_the_flag(name, overrides):
        config = config_from_name(name, **overrides)
    _check_model(config)
    _check_effect(config, overrides)
    return config, overrides


def _overrides(flags: Mapping[str, str]) -> dict[str, Any]:
    """Fields of the model's configuration as values of their types."""
    hints = typing.get_type_hints(MixtureOfTokensConfig, localns={"torch": torch}) | {"head_dim": int | None}
    overrides = {}
    for field, text in flags.items():
        value = typed(f"--model.{field}", text, hints.get(field))
        check_number(f"--model.{field}", value)
        overrides[field] = float(value) if hints.get(field) is float else value  # upstream takes no 1 for 1.0
    if (dtype := overrides.get("dtype")) not in (None, *DTYPES):
        raise ValueError(f"--model.dtype {dtype}: weights are trained in {', '.join(DTYPES)}")
    return overrides


def _check_model(config: MixtureOfTokensConfig) -> None:
    """Raises ValueError for numbers with which a model computes NaN, or trains for something else."""
    rope = config.rope_parameters or {}
    theta, kind, factor = rope.get("rope_theta", 1.0), rope.get("rope_type", "default"), rope.get("factor", 1.0)
    for field, value in {"rms_norm_eps": config.rms_norm_eps, "rope_parameters: its rope_theta": theta}.items():
        if not (isinstance(value, int | float) and 0 < value < math.inf):
            raise ValueError(f"--model.{field} must be positive and finite, not {value}")
    if kind not in (kinds := ["default", *ROPE_INIT_FUNCTIONS]):
        raise ValueError(f"--model.rope_parameters: its rope_type {kind!r} is unknown; legal are {', '.join(kinds)}")
    if not (isinstance(factor, int | float) and 1 <= factor < math.inf):  # upstream warns, and computes with it
        raise ValueError(f"--model.rope_parameters: its factor must be at least 1 and finite, not {factor}")


def _check_effect(config: MixtureOfTokensConfig, overrides: Mapping[str, Any]) -> None:
    """Raises ValueError for fields of upstream's that do nothing here, but with the value that they have anyway."""
    for field, does, anyway in (
        ("initializer_range", "--model.initializer_scale", MixtureOfTokensConfig.initializer_range),
        ("decoder_sparse_step", "--model.mlp_layer_types", config.decoder_sparse_step),
        ("mlp_only_layers", "--model.mlp_layer_types", config.mlp_only_layers),
        ("sliding_window", "with --model.use_sliding_window true it", config.sliding_window),
        *((f"{token}_token_id", "the tokenizer", None) for token in ("eos", "pad")),
    ):
        if overrides.get(field) not in (None, anyway):
            raise ValueError(f"--model.{field} {overrides[field]} would do nothing; {does} does")
    if "num_experts_per_tok" in overrides:  # which a mixture has for a switch, and reads nowhere
        check_choices(config.num_experts_per_tok, config.num_experts, "--model.num_experts_per_tok")


@contextmanager
def names_the_flag(name: str, overrides: Mapping[str, Any]) -> Iterator[None]:
    """Raise as ValueError, with the flag, what a library raises for one of these fields of the model."""
    flag = f"--model.{next(iter(overrides))}" if len(overrides) == 1 else "--model"
    try:
        yield
    except Exception as error:
        what = f"it lacks {error}" if isinstance(error, KeyError) else in_words(error)
        if what.partition(" ")[0] in overrides:
            raise ValueError(f"--model.{what}") from error
        if isinstance(error, ValueError) and (not overrides or name in what):
            raise
        raise ValueError(f"{flag}: {what}") from error
