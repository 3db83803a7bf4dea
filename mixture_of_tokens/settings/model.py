"""Fields of a model's configuration that can be given: those of Qwen3-MoE, and those of `settings/layers.py`.

What they mean, and which values they have where they are not given, stands at `MixtureOfTokensConfig`; what belongs
together, as heads and their width, is checked there too.
"""

import dataclasses
from typing import Annotated, Any, TypedDict, get_type_hints

from pydantic import Field

from mixture_of_tokens.settings.fields import given_fields
from mixture_of_tokens.settings.layers import FIELDS as OF_LAYERS
from mixture_of_tokens.settings.layers import Dtypes

Size = Annotated[int, Field(ge=1)]


class ModelSettings(TypedDict, total=False):
    """Of a name without a size the first four must be given."""

    # Its size
    hidden_size: Size
    intermediate_size: Size
    num_hidden_layers: Size
    num_attention_heads: Size
    num_key_value_heads: Size
    head_dim: Size | None
    vocab_size: Size | None
    max_position_embeddings: Size
    num_experts: Size
    moe_intermediate_size: Size
    num_experts_per_tok: Size
    # Its feed-forwards, beside what stands in `settings/layers.py`
    mlp_layer_types: list[str] | None
    hidden_act: str
    # Attention, norms and embeddings
    attention_bias: bool
    attention_dropout: Annotated[float, Field(ge=0, lt=1)]
    attn_implementation: str | None
    rope_parameters: dict[str, Any] | None
    rms_norm_eps: Annotated[float, Field(gt=0)]
    use_sliding_window: bool
    sliding_window: int | None
    tie_word_embeddings: bool
    # What it is computed in; Adam's smallest numbers are zero in float16
    dtype: Dtypes | None
    # What transformers keeps, and what other fields set
    output_router_logits: bool
    use_cache: bool
    bos_token_id: int | None
    eos_token_id: int | list[int] | None
    pad_token_id: int | None
    initializer_range: float
    decoder_sparse_step: int
    mlp_only_layers: list[int] | None


def _declared(field: dataclasses.Field[Any]) -> Any:
    """A field of a layer with its bounds, as pydantic has them."""
    bounds = field.metadata["bounds"]
    return Annotated[field.type, Field(**bounds)] if bounds else field.type  # pyright: ignore[reportInvalidTypeForm]


FIELDS = get_type_hints(ModelSettings, include_extras=True)
FIELDS |= {name: _declared(field) for name, field in OF_LAYERS.items()}


def model_fields(given: dict[str, Any]) -> dict[str, Any]:
    """The given fields, checked. Raises ValueError, naming the flag, for what is not legal."""
    return given_fields("model", FIELDS, given)
