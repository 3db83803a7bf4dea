"""Dense models as this library's: its own, and transformers' Qwen3 and Llama, whose weights have the same names."""

from typing import Any

from mixture_of_tokens.conversion.to_hf import COMMON
from mixture_of_tokens.models.config import MixtureOfTokensConfig
from mixture_of_tokens.models.modeling import MixtureOfTokensForCausalLM
from mixture_of_tokens.settings.routings import DENSE
from mixture_of_tokens.utils.checks import shown

# Fields of transformers' configurations with which a model computes what ours cannot, and the values that ours has.
MUST_BE = {"mlp_bias": (False, None), "use_sliding_window": (False, None), "quantization_config": (None,)}


def dense_config(source: str, model: Any) -> MixtureOfTokensConfig:
    """The configuration of a dense model as one of this library.

    Raises ValueError, naming the architecture or the field, for what this library's dense model does not compute.
    """
    config = model.config
    if isinstance(model, MixtureOfTokensForCausalLM):
        if config.sparse_routings:
            raise ValueError(f"{source} has {config.sparse_routings[0].title} layers, and a dense model is upcycled")
        return config
    kind = config.model_type
    if kind not in ("qwen3", "llama"):
        raise ValueError(
            f"{source} is a {type(model).__name__}: Qwen3, Llama and dense models of this library are taken"
        )
    for field, legal in MUST_BE.items():
        if (value := getattr(config, field, None)) not in legal:
            raise ValueError(f"{source}: its {field} is {shown(value)}, and only {shown(legal[0])} is taken")
    fields = {field: getattr(config, field) for field in COMMON if hasattr(config, field)}
    own = {"head_dim": config.head_dim, "moe_intermediate_size": config.intermediate_size, "group_size": 1}
    own |= {"num_experts": 1, "mlp_layer_types": [DENSE.kind] * config.num_hidden_layers}
    try:
        return MixtureOfTokensConfig(**fields, **own, qk_norm=kind == "qwen3")
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None
