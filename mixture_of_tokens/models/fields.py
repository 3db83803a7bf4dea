"""A model's configuration from a name and fields, checked beyond what transformers checks."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from mixture_of_tokens.layers.experts import check_choices
from mixture_of_tokens.models.config import MixtureOfTokensConfig
from mixture_of_tokens.models.hf_internals import ROPE_INIT_FUNCTIONS
from mixture_of_tokens.models.names import config_from_name
from mixture_of_tokens.utils.formatting import in_words


def config_of(name: str, fields: Mapping[str, Any]) -> MixtureOfTokensConfig:
    """A name's configuration with these fields (`settings.model`). Raises ValueError where they are no model."""
    with names_the_flag(name, fields):
        config = config_from_name(name, **fields)
    _check_model(config)
    _check_effect(config, fields)
    return config


def _check_model(config: MixtureOfTokensConfig) -> None:
    """Raises ValueError for numbers with which a model computes NaN, or trains for something else."""
    rope = config.rope_parameters or {}
    theta, kind, factor = rope.get("rope_theta", 1.0), rope.get("rope_type", "default"), rope.get("factor", 1.0)
    if not (isinstance(theta, int | float) and 0 < theta < math.inf):
        raise ValueError(f"--model.rope_parameters: its rope_theta must be positive and finite, not {theta}")
    if kind not in (kinds := ["default", *ROPE_INIT_FUNCTIONS]):
        raise ValueError(f"--model.rope_parameters: its rope_type {kind!r} is unknown; legal are {', '.join(kinds)}")
    if not (isinstance(factor, int | float) and 1 <= factor < math.inf):  # upstream warns, and computes with it
        raise ValueError(f"--model.rope_parameters: its factor must be at least 1 and finite, not {factor}")


def _check_effect(config: MixtureOfTokensConfig, overrides: Mapping[str, Any]) -> None:
    """Raises ValueError for upstream's fields that have no effect here, unless they are given their default."""
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
