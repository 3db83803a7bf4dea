"""A model in transformers' own classes.

|                | queries and keys normed | not normed (`qk_norm` false), as in Llama                                |
| -------------- | ----------------------- | ------------------------------------------------------------------------ |
| no experts     | Qwen3                   | Llama                                                                    |
| softmax gates  | Qwen3-MoE               | Mixtral, if all blocks are sparse and gates normalised; else Qwen2-MoE   |
| sigmoid gates  | Dots1                   | none                                                                     |

Dots1 and Qwen2-MoE always have a shared expert, which is zero where the model has none, and Qwen2-MoE has biases of
queries, keys and values, which are zero too.
"""

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor

from mixture_of_tokens.layers.token_choice import SigmoidChoice, TokenChoice
from mixture_of_tokens.models.config import MixtureOfTokensConfig
from mixture_of_tokens.models.modeling import MixtureOfTokensForCausalLM
from mixture_of_tokens.settings.routings import BY_PREFIX, DENSE, MIXTURE

# Fields of our configuration that all have under the same name; `attention_bias` only those that can have biases.
COMMON = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "hidden_act"),
    *("num_key_value_heads", "max_position_embeddings", "initializer_range", "rms_norm_eps", "attention_bias"),
    *("tie_word_embeddings", "rope_parameters", "attention_dropout", "bos_token_id", "eos_token_id", "pad_token_id"),
)
OF_EXPERTS = ("moe_intermediate_size", "num_experts_per_tok", "num_experts", "norm_topk_prob")
NONE_SHARED = "Qwen3-MoE, with softmax gates, has no shared experts"
SHARED = ".mlp.shared_expert"  # what names of shared experts and of their gates have in them
NO_WIDTH = 16  # of the zero shared expert of Qwen2-MoE, which engines divide among processes


def to_plain(model: MixtureOfTokensForCausalLM) -> Any:
    """The same model in transformers' own classes. Raises ValueError as `architecture_of`."""
    config = model.config
    kind = architecture_of(config)
    common = {field: getattr(config, field) for field in COMMON if hasattr(config, field)}
    common |= {"head_dim": config.head_width}
    if kind in UNBIASED:
        del common["attention_bias"]
    architecture: Any = getattr(transformers, kind)
    plain = architecture(architecture.config_class(**common | OWN[kind](config)))
    weights = plain_weights(model)
    plain.load_state_dict(weights | zeros_for(plain, weights))
    return plain.eval()


def architecture_of(config: MixtureOfTokensConfig) -> str:
    """The class of transformers that computes the same.

    Raises ValueError, naming the field or an alternative, for a model that has no counterpart in transformers.
    """
    if ours := {routing.kind for routing in config.routings if routing.exports_as is None}:
        can = [*(f"{prefix}-" for prefix, row in BY_PREFIX.items() if row.exports_as), f"{MIXTURE.prefix}-"]
        raise ValueError(
            f"{', '.join(sorted(ours))} layers are not in plain transformers: they cannot be exported; models that can "
            f"are {', '.join(can)}"
        )
    if config.sliding_window is not None:
        raise ValueError("models whose attention has a sliding window cannot be exported; train without one")
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
    if not config.qk_norm:
        return _architecture_without_norms(config, kinds)
    if kinds == {"Qwen3MoeForCausalLM"} and config.shared_experts:
        raise ValueError(f"{NONE_SHARED}: this model cannot be exported; with sigmoid gates (STC-) it could, as Dots1")
    return str(*kinds or {DENSE.exports_as})


def _architecture_without_norms(config: MixtureOfTokensConfig, normed: set[str | None]) -> str:
    """Where queries and keys are not normed. normed: the architectures of its sparse blocks if they were."""
    unnormed, heads = "queries and keys are not normed (qk_norm false)", config.num_attention_heads
    if not normed:
        if config.hidden_size % heads:
            what = f"a multiple of num_attention_heads {heads}, not {config.hidden_size}"
            raise ValueError(f"{unnormed}: it would be a Llama, whose hidden_size must be {what}")
        return "LlamaForCausalLM"
    if config.shared_experts:
        raise ValueError(f"{unnormed}: it cannot be exported with shared experts; shared_experts must be 0")
    if normed == {"Dots1ForCausalLM"}:
        raise ValueError(f"{unnormed}: it cannot be exported with sigmoid gates (STC-); softmax gates (TC-) can")
    if config.attention_bias:
        raise ValueError(f"{unnormed}: it cannot be exported with biases and experts; attention_bias must be false")
    mixtral = config.norm_topk_prob and len(config.sparse_routings) == len(config.routings)
    return "MixtralForCausalLM" if mixtral else "Qwen2MoeForCausalLM"


def _balancing(config: MixtureOfTokensConfig) -> dict[str, Any]:
    """Upstream's loss is not divided by the number of choices."""
    return {"router_aux_loss_coef": config.router_aux_loss_coef / config.num_experts_per_tok}


def _qwen_moe(config: MixtureOfTokensConfig) -> dict[str, Any]:
    experts = {field: getattr(config, field) for field in OF_EXPERTS} | _balancing(config)
    blocks = {"mlp_only_layers": config.mlp_only_layers, "decoder_sparse_step": config.decoder_sparse_step}
    return experts | blocks | {"use_sliding_window": False}


def _mixtral(config: MixtureOfTokensConfig) -> dict[str, Any]:
    experts = {"num_local_experts": config.num_experts, "num_experts_per_tok": config.num_experts_per_tok}
    return experts | {"intermediate_size": config.moe_intermediate_size} | _balancing(config)


def _qwen2_moe(config: MixtureOfTokensConfig) -> dict[str, Any]:
    # Other software takes none without biases of queries, keys and values (vLLM always makes them).
    return _qwen_moe(config) | {"qkv_bias": True, "shared_expert_intermediate_size": NO_WIDTH}


def _dots1(config: MixtureOfTokensConfig) -> dict[str, Any]:
    dense = len(config.routings) - len(config.sparse_routings)
    experts = {"n_routed_experts": config.num_experts, "num_experts_per_tok": config.num_experts_per_tok}
    experts |= {"moe_intermediate_size": config.moe_intermediate_size, "norm_topk_prob": config.norm_topk_prob}
    # Other software takes no Dots1 without a shared expert (vLLM divides by its width), and reads `scoring_func`.
    others = {"n_shared_experts": config.shared_experts or 1, "scoring_func": "sigmoid"}
    others |= {"n_group": 1, "topk_group": 1, "sliding_window": None}
    return experts | others | {"first_k_dense_replace": dense}


# By the class of transformers, the fields of its configuration beside those that all have.
OWN: dict[str, Callable[[MixtureOfTokensConfig], dict[str, Any]]] = {
    "Qwen3ForCausalLM": lambda config: {"use_sliding_window": False, "layer_types": None},
    "LlamaForCausalLM": lambda config: {},
    "Qwen3MoeForCausalLM": _qwen_moe,
    "MixtralForCausalLM": _mixtral,
    "Qwen2MoeForCausalLM": _qwen2_moe,
    "Dots1ForCausalLM": _dots1,
}
UNBIASED = ("MixtralForCausalLM", "Qwen2MoeForCausalLM")  # whose attention has no such field


def zeros_for(plain: Any, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """What an architecture always has and a model of these weights has not: shared experts and biases, all zero."""
    missing = {name: value for name, value in plain.state_dict().items() if name not in weights}
    named = [name for name in missing if SHARED in name or name.endswith(".bias")]
    return {name: torch.zeros_like(missing[name]) for name in named}


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
