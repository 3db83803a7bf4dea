"""A model in transformers' own classes: Qwen3-MoE, with sigmoid gates Dots1, without experts Qwen3."""

from typing import Any

import torch
from torch import Tensor
from transformers import (
    Dots1Config,
    Dots1ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from mixture_of_tokens.layers.token_choice import SigmoidChoice, TokenChoice
from mixture_of_tokens.models.config import MixtureOfTokensConfig
from mixture_of_tokens.models.modeling import MixtureOfTokensForCausalLM
from mixture_of_tokens.settings.routings import BY_PREFIX, MIXTURE

# Fields of our configuration that all three have under the same name.
COMMON = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "hidden_act"),
    *("num_key_value_heads", "max_position_embeddings", "initializer_range", "rms_norm_eps", "attention_bias"),
    *("tie_word_embeddings", "rope_parameters", "attention_dropout", "bos_token_id", "eos_token_id", "pad_token_id"),
)
OF_EXPERTS = ("moe_intermediate_size", "num_experts_per_tok", "num_experts", "norm_topk_prob")
NONE_SHARED = "Qwen3-MoE, with softmax gates, has no shared experts"


def to_plain(model: MixtureOfTokensForCausalLM) -> Any:
    """The same model in transformers' own classes. Raises ValueError as `check_exportable`."""
    config = model.config
    check_exportable(config)
    common = {field: getattr(config, field) for field in COMMON if hasattr(config, field)}
    common["head_dim"] = config.head_width
    kinds = {routing.exports_as for routing in config.sparse_routings}
    if not kinds:
        plain: Any = Qwen3ForCausalLM(Qwen3Config(**common, use_sliding_window=False, layer_types=None))
    elif kinds == {"Dots1ForCausalLM"}:
        plain = _dots1(config, common)
    else:
        plain = _qwen3_moe(config, common)
    weights = plain_weights(model)
    plain.load_state_dict(weights | unshared(plain, weights))
    return plain.eval()


def check_exportable(config: MixtureOfTokensConfig) -> None:
    """Raises ValueError, naming an alternative, for a model that has no counterpart in transformers."""
    if ours := {routing.kind for routing in config.routings if routing.exports_as is None}:
        can = [*(f"{prefix}-" for prefix, row in BY_PREFIX.items() if row.exports_as), f"{MIXTURE.prefix}-"]
        raise ValueError(
            f"{', '.join(sorted(ours))} layers are not in plain transformers: they cannot be exported; models that can "
            f"are {', '.join(can)}"
        )
    if config.sliding_window is not None:
        raise ValueError("models whose attention has a sliding window cannot be exported; train without one")
    if not config.qk_norm:
        raise ValueError(
            "queries and keys are not normed (qk_norm false), and in Qwen3 they are: it cannot be exported"
        )
    if not config.gated:
        raise ValueError("plain feed-forwards (gated false) are not in Qwen3; train with the default, gated ones")
    for field in ("hidden_size", "moe_intermediate_size"):
        if config.sparse_routings and (width := getattr(config, field)) % 4:
            what = "plain transformers multiplies experts by grouped_mm, which takes multiples of 4 in fp32"
            raise ValueError(f"{field} is {width}: {what}")
    kinds = {routing.exports_as for routing in config.sparse_routings}
    if len(kinds) > 1:
        raise ValueError("softmax gates in some blocks and sigmoid gates in others are in no model of transformers")
    dense = len(config.routings) - len(config.sparse_routings)
    if kinds == {"Dots1ForCausalLM"} and any(routing.sparse for routing in config.routings[:dense]):
        raise ValueError("in Dots1 the first blocks are dense and all others sparse; this model has another order")
    if kinds == {"Qwen3MoeForCausalLM"} and config.shared_experts:
        raise ValueError(f"{NONE_SHARED}: this model cannot be exported; with sigmoid gates (STC-) it could, as Dots1")


def _qwen3_moe(config: MixtureOfTokensConfig, common: dict[str, Any]) -> Any:
    experts = {field: getattr(config, field) for field in OF_EXPERTS}
    # Upstream's loss is not divided by the number of choices.
    experts["router_aux_loss_coef"] = config.router_aux_loss_coef / config.num_experts_per_tok
    experts |= {"mlp_only_layers": config.mlp_only_layers, "decoder_sparse_step": config.decoder_sparse_step}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**common, **experts, use_sliding_window=False))


def _dots1(config: MixtureOfTokensConfig, common: dict[str, Any]) -> Any:
    dense = len(config.routings) - len(config.sparse_routings)
    experts = {"n_routed_experts": config.num_experts, "num_experts_per_tok": config.num_experts_per_tok}
    experts |= {"moe_intermediate_size": config.moe_intermediate_size, "norm_topk_prob": config.norm_topk_prob}
    # Other software takes no Dots1 without a shared expert (vLLM divides by its width), and reads `scoring_func`.
    others = {"n_shared_experts": config.shared_experts or 1, "scoring_func": "sigmoid"}
    others |= {"n_group": 1, "topk_group": 1, "sliding_window": None}
    return Dots1ForCausalLM(Dots1Config(**common, **experts, **others, first_k_dense_replace=dense))


def unshared(plain: Any, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights, all zero, of the shared experts that Dots1 has and a model of these weights has not."""
    missing = [name for name in plain.state_dict() if ".mlp.shared_experts." in name and name not in weights]
    return {name: torch.zeros_like(plain.state_dict()[name]) for name in missing}


@torch.no_grad()
def plain_weights(model: MixtureOfTokensForCausalLM) -> dict[str, Tensor]:
    """The model's weights by transformers' names, which are its own; plain routers have no temperature."""
    named = model.named_parameters(remove_duplicate=False)  # both names of tied embeddings
    weights = {
        name.replace(".shared_experts.", ".mlp.shared_experts."): value.detach().clone()
        for name, value in named
        if "log_temperature" not in name
    }
    for i, block in enumerate(model.model.layers):
        gate = f"model.layers.{i}.mlp.gate"
        if isinstance(block.mlp, TokenChoice):
            weights[f"{gate}.weight"] /= block.mlp.gate.temperature
        if isinstance(block.mlp, SigmoidChoice):
            weights[f"{gate}.e_score_correction_bias"] = block.mlp.selection_bias.detach().clone()
    return weights
