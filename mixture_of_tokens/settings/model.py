"""Fields of a model's configuration that can be given: those of Qwen3-MoE and ours.

What they mean, and which values they have where they are not given, stands at `MixtureOfTokensConfig`; what belongs
together, as heads and their width, is checked there too.
"""

from typing import Annotated, Any, Literal

from pydantic import Field

from mixture_of_tokens.settings.fields import Settings, given_fields

Size = Annotated[int, Field(ge=1)]
# Logits over it are finite, and their differences do not vanish, in fp32.
Temperature = Annotated[float, Field(ge=1e-20, le=1e20)]


class ModelSettings(Settings, total=False):
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
    group_size: Size
    shared_experts: Annotated[int, Field(ge=0)]
    # Its feed-forwards and routers
    mlp_layer_types: list[str] | None
    gated: bool
    hidden_act: str
    router_temperature: Temperature
    learnable_temperature: bool
    router_dtype: Literal["float32", "bfloat16", "float64"]
    normalize_mixture: bool
    norm_topk_prob: bool
    capacity_factor: Annotated[float, Field(gt=0)] | None
    router_aux_loss_coef: Annotated[float, Field(ge=0)]
    balance_rate: Annotated[float, Field(ge=0)]
    threshold_decay: Annotated[float, Field(ge=0, lt=1)]
    threshold_scores: Literal["softmax", "sigmoid"]
    # Attention, norms and embeddings
    qk_norm: bool
    attention_bias: bool
    attention_dropout: Annotated[float, Field(ge=0, lt=1)]
    attn_implementation: str | None
    rope_parameters: dict[str, Any] | None
    rms_norm_eps: Annotated[float, Field(gt=0)]
    use_sliding_window: bool
    sliding_window: int | None
    tie_word_embeddings: bool
    # How it begins and what it is computed in; Adam's smallest numbers are zero in float16
    initializer_scale: Annotated[float, Field(gt=0)]
    dtype: Literal["float32", "bfloat16", "float64"] | None
    # What transformers keeps, and what other fields set
    output_router_logits: bool
    use_cache: bool
    bos_token_id: int | None
    eos_token_id: int | list[int] | None
    pad_token_id: int | None
    initializer_range: float
    decoder_sparse_step: int
    mlp_only_layers: list[int] | None


def model_fields(given: dict[str, Any]) -> dict[str, Any]:
    """The given fields, checked. Raises ValueError, naming the flag, for what is not legal."""
    return given_fields("model", ModelSettings, given)
