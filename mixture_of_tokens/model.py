"""The causal language model: transformers' Qwen3-MoE in which only the feed-forward differs.

Attention, norms, rotary positions, KV cache, `generate`, checkpoints and parameter names are upstream's; this file
holds the differences. Every import of transformers' internals stands here.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import MoeCausalLMOutputWithPast
from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import (
    Qwen3MoeAttention,
    Qwen3MoeForCausalLM,
    Qwen3MoeMLP,
    Qwen3MoeModel,
    Qwen3MoePreTrainedModel,
    Qwen3MoeRMSNorm,
    Qwen3MoeRotaryEmbedding,
)
from transformers.utils.generic import can_return_tuple
from transformers.utils.output_capturing import OutputRecorder, maybe_install_capturing_hooks

from mixture_of_tokens.layers import (
    ACTIVATIONS,
    ExpertChoice,
    Experts,
    MixtureOfTokens,
    Router,
    TokenChoice,
    truncated_normal_,
)
from mixture_of_tokens.loss import IGNORE, chunked_cross_entropy, load_balancing_loss

ROUTER_DTYPES = ("float32", "bfloat16", "float64")
POSITIVE = ("hidden_size", "intermediate_size", "moe_intermediate_size", "num_hidden_layers", "num_attention_heads")
POSITIVE += ("num_key_value_heads", "head_dim", "num_experts", "num_experts_per_tok", "group_size", "vocab_size")
POSITIVE += ("max_position_embeddings",)
FLAGS = ("gated", "learnable_temperature", "normalize_mixture")  # upstream checks its own


class MixtureOfTokensConfig(Qwen3MoeConfig):
    """Qwen3-MoE's fields (`num_experts`, `moe_intermediate_size`, `num_experts_per_tok`, ...) and ours.

    Fields:
        mlp_layer_types: the feed-forward of each block: "dense", "mixture_of_tokens", "uniform", "token_choice" or
            "expert_choice". None: Mixture of Tokens in the later half of the blocks, as in the paper.
        group_size: tokens that are mixed, each of another example; a training batch is a multiple of it.
        gated: SwiGLU feed-forwards, dense and expert; False: plain ones, act(x W) W', as in the paper (with "relu").
        router_temperature, learnable_temperature, router_dtype, normalize_mixture, capacity_factor: see `layers.py`.
        initializer_scale: weights are drawn with std = scale / sqrt(fan_in), cut at two std; embeddings have fan_in 1.
        router_aux_loss_coef: weight of Token Choice's load-balancing loss, in training.
    """

    model_type = "mixture_of_tokens"
    # Upstream's plans split experts in ways that know nothing of groups.
    base_model_tp_plan = None
    base_model_ep_plan = None
    base_model_pp_plan = None

    vocab_size: int = 50257
    hidden_size: int = 512
    intermediate_size: int = 1376
    num_hidden_layers: int = 8
    num_attention_heads: int = 8
    num_key_value_heads: int = 8
    max_position_embeddings: int = 256
    num_experts: int = 32
    moe_intermediate_size: int = 1376
    num_experts_per_tok: int = 1
    router_aux_loss_coef: float = 0.01

    mlp_layer_types: list[str] | None = None
    group_size: int = 32
    gated: bool = True
    router_temperature: float = 1.0
    learnable_temperature: bool = False
    router_dtype: str = "float32"
    normalize_mixture: bool = False
    capacity_factor: float | None = 1.25
    initializer_scale: float = 0.1**0.5

    def __post_init__(self, **kwargs):
        for name in POSITIVE:
            value = kwargs.get(name, getattr(self, name, None))
            if value is not None and not (isinstance(value, int) and value >= 1):
                raise ValueError(f"{name} must be at least 1, not {value}")
        if self.mlp_layer_types is None:
            dense = self.num_hidden_layers // 2
            self.mlp_layer_types = ["dense"] * dense + ["mixture_of_tokens"] * (self.num_hidden_layers - dense)
        if not isinstance(self.mlp_layer_types, list | tuple):
            raise ValueError(f"mlp_layer_types must name the {self.num_hidden_layers} blocks' kinds in a list")
        unknown = set(map(str, self.mlp_layer_types)) - set(FEED_FORWARDS)
        if unknown:
            raise ValueError(f"mlp_layer_types has {', '.join(sorted(unknown))}; legal are {', '.join(FEED_FORWARDS)}")
        if len(self.mlp_layer_types) != self.num_hidden_layers:
            raise ValueError(f"mlp_layer_types names {len(self.mlp_layer_types)} of {self.num_hidden_layers} blocks")
        if not 0 < self.initializer_scale < math.inf:
            raise ValueError(f"initializer_scale must be positive and finite, not {self.initializer_scale}")
        if not 0 < self.router_temperature < math.inf:
            raise ValueError(f"router_temperature must be positive and finite, not {self.router_temperature}")
        if self.hidden_act not in ACTIVATIONS:
            raise ValueError(f"hidden_act {self.hidden_act!r} is unknown; legal are {', '.join(ACTIVATIONS)}")
        heads, kv_heads = self.num_attention_heads, kwargs.get("num_key_value_heads", self.num_key_value_heads)
        if heads % kv_heads:
            raise ValueError(f"num_key_value_heads {kv_heads} does not divide num_attention_heads {heads}")
        width = kwargs.get("head_dim", getattr(self, "head_dim", None)) or self.hidden_size // heads
        if width % 2:
            raise ValueError(f"head_dim must be even, for rotary positions, not {width}")
        if not 0 <= self.attention_dropout < 1:
            raise ValueError(f"attention_dropout must be at least 0 and below 1, not {self.attention_dropout}")
        for name in FLAGS:
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be true or false, not {getattr(self, name)!r}")
        if self.router_dtype not in ROUTER_DTYPES:
            raise ValueError(f"router_dtype {self.router_dtype!r} is unknown; legal are {', '.join(ROUTER_DTYPES)}")
        # Upstream's way of saying the same, for the export.
        self.mlp_only_layers = [i for i, kind in enumerate(self.mlp_layer_types) if kind == "dense"]
        self.decoder_sparse_step = 1
        super().__post_init__(**kwargs)

    @property
    def feed_forwards(self) -> list[str]:
        """The kind of each block's feed-forward."""
        return list(self.mlp_layer_types or [])

    @property
    def mixes_examples(self) -> bool:
        """Whether what one example gets depends on the others of its batch."""
        return not {"dense", "token_choice"}.issuperset(self.feed_forwards)


class DenseMLP(Qwen3MoeMLP):
    def forward(self, x: Tensor, token_mask: Tensor | None = None) -> Tensor:
        return super().forward(x)


class PlainMLP(nn.Module):
    """The paper's dense feed-forward: no gate, no biases."""

    def __init__(self, config: MixtureOfTokensConfig):
        super().__init__()
        self.act = ACTIVATIONS[config.hidden_act]
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor, token_mask: Tensor | None = None) -> Tensor:
        return self.down_proj(self.act(self.up_proj(x)))


def _sizes(config) -> tuple[int, int, int]:
    return config.hidden_size, config.moe_intermediate_size, config.num_experts


def _options(config) -> dict:
    return {
        "gated": config.gated,
        "activation": config.hidden_act,
        "temperature": config.router_temperature,
        "learnable_temperature": config.learnable_temperature,
        "router_dtype": getattr(torch, config.router_dtype),
        "initializer_scale": config.initializer_scale,
    }


def _mixture_of_tokens(config, uniform=False):
    mixing = {"normalize_mixture": config.normalize_mixture, "uniform": uniform}
    return MixtureOfTokens(*_sizes(config), config.group_size, **mixing, **_options(config))


def _expert_choice(config):
    choice = {"num_experts_per_tok": config.num_experts_per_tok}
    return ExpertChoice(*_sizes(config), config.group_size, **choice, **_options(config))


def _token_choice(config):
    choice = {"num_experts_per_tok": config.num_experts_per_tok, "norm_topk_prob": config.norm_topk_prob}
    return TokenChoice(*_sizes(config), **choice, capacity_factor=config.capacity_factor, **_options(config))


FEED_FORWARDS = {
    "dense": lambda config: DenseMLP(config) if config.gated else PlainMLP(config),
    "mixture_of_tokens": _mixture_of_tokens,
    "uniform": lambda config: _mixture_of_tokens(config, uniform=True),
    "token_choice": _token_choice,
    "expert_choice": _expert_choice,
}


class MixtureOfTokensDecoderLayer(GradientCheckpointingLayer):
    def __init__(self, config: MixtureOfTokensConfig, layer_idx: int):
        super().__init__()
        self.self_attn = Qwen3MoeAttention(config, layer_idx)
        self.mlp = FEED_FORWARDS[config.feed_forwards[layer_idx]](config)
        self.input_layernorm = Qwen3MoeRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = Qwen3MoeRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, hidden_states: Tensor, token_mask: Tensor | None = None, **attention_kwargs) -> Tensor:
        attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **attention_kwargs)
        hidden_states = hidden_states + attended
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states), token_mask)


class MixtureOfTokensPreTrainedModel(Qwen3MoePreTrainedModel):
    config_class = MixtureOfTokensConfig
    config: MixtureOfTokensConfig
    _no_split_modules = ["MixtureOfTokensDecoderLayer"]
    _can_record_outputs = {
        "router_logits": OutputRecorder(Router, index=0),
        "hidden_states": MixtureOfTokensDecoderLayer,
        "attentions": Qwen3MoeAttention,
    }

    def _init_weights(self, module):
        scale = self.config.initializer_scale
        if isinstance(module, nn.Linear):
            truncated_normal_(module.weight, scale)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding) and self.config.tie_word_embeddings:  # it is the head as well
            truncated_normal_(module.weight, scale)
        elif isinstance(module, nn.Embedding):
            nn.init.trunc_normal_(module.weight, std=scale, a=-2 * scale, b=2 * scale)
        elif isinstance(module, Experts | Router):
            module.reset_parameters(scale)
        elif isinstance(module, MixtureOfTokens):  # of a checkpoint without them
            nn.init.zeros_(module.companion)
            nn.init.zeros_(module.companion_logit)
        else:
            super()._init_weights(module)


class MixtureOfTokensModel(MixtureOfTokensPreTrainedModel, Qwen3MoeModel):
    def __init__(self, config: MixtureOfTokensConfig):
        MixtureOfTokensPreTrainedModel.__init__(self, config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        blocks = [MixtureOfTokensDecoderLayer(config, layer_idx) for layer_idx in range(config.num_hidden_layers)]
        self.layers = nn.ModuleList(blocks)
        self.norm = Qwen3MoeRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = Qwen3MoeRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.post_init()
        # Upstream installs them at the first call that records, under a lock that `torch.compile` cannot trace.
        maybe_install_capturing_hooks(self)

    def forward(self, input_ids=None, attention_mask=None, token_mask=None, inputs_embeds: Any = None, **kwargs):
        """As upstream's, with `token_mask` (B, T), true where a token is real; by default from a 2-D attention mask."""
        if token_mask is None and attention_mask is not None:
            if not isinstance(attention_mask, Tensor) or attention_mask.dim() != 2:
                raise ValueError("an attention mask that is not (B, T) says nothing of padding: give token_mask too")
            current = input_ids if input_ids is not None else inputs_embeds
            token_mask = attention_mask[:, -current.shape[1] :].bool().to(current.device)
        kwargs |= {"input_ids": input_ids, "inputs_embeds": inputs_embeds, "token_mask": token_mask}
        return super().forward(attention_mask=attention_mask, **kwargs)


class MixtureOfTokensForCausalLM(MixtureOfTokensPreTrainedModel, Qwen3MoeForCausalLM):
    _tp_plan = {}
    _pp_plan = {}

    def __init__(self, config: MixtureOfTokensConfig):
        MixtureOfTokensPreTrainedModel.__init__(self, config)
        self.model = MixtureOfTokensModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def set_router_temperature(self, temperature: float) -> None:
        """Set every router's temperature, for a schedule; it is saved with the model."""
        self.config.router_temperature = temperature
        for module in self.modules():
            if isinstance(module, Router):
                module.initial_temperature = temperature
                module.set_temperature(temperature)

    def serve_alone(self, alone: bool = True) -> None:
        """Have every row by itself, as `MixtureOfTokens.alone` says, until told otherwise; it is not saved.

        Raises ValueError for Expert Choice, which has nothing to put in the place of batch-mates.
        """
        if "expert_choice" in self.config.feed_forwards:
            raise ValueError("Expert Choice chooses among the rows of a batch; it cannot serve a row alone")
        for module in self.modules():
            if isinstance(module, MixtureOfTokens):
                module.alone = alone

    @property
    def mixes_examples(self) -> bool:
        """Whether what one row gets depends on the others of its batch, as the model is now."""
        layers = [module for module in self.modules() if isinstance(module, MixtureOfTokens | ExpertChoice)]
        return any(not getattr(layer, "alone", False) for layer in layers)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_mask: Tensor | None = None,
        labels: Tensor | None = None,
        shift_labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        return_logits: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        output_router_logits: bool | None = None,
        **kwargs,
    ) -> MoeCausalLMOutputWithPast:
        """Logits, or the loss without them: the (B, T, V) logits exist only where they are asked for.

        Args beyond upstream's:
            token_mask: (B, T), true where a token is real and takes part in groups; by default the attention mask.
            labels: (B, T), predicted from the position before; `shift_labels`: the same, shifted already.
            num_items_in_batch: what the summed loss is divided by; by default the number of labels here. Under
                gradient accumulation the labels of the whole step; the auxiliary loss is then weighted by this
                micro-batch's share of them, so that it counts once a step.
            return_logits: by default only when there are no labels.

        Returns `loss` (cross-entropy in nats, in training plus router_aux_loss_coef times `aux_loss`), `aux_loss`
        (Token Choice's load-balancing loss, mean over its blocks), `logits`, and upstream's other outputs.
        """
        balanced = [i for i, kind in enumerate(self.config.feed_forwards) if kind == "token_choice"]
        with_aux = bool(balanced) and self.training and self.config.router_aux_loss_coef > 0
        with_routers = self.config.output_router_logits if output_router_logits is None else output_router_logits
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            token_mask=token_mask,
            output_router_logits=with_routers or with_aux,
            return_dict=True,
            **kwargs,
        )
        hidden = outputs.last_hidden_state
        loss = aux_loss = logits = None
        has_labels = labels is not None or shift_labels is not None
        if return_logits or (return_logits is None and not has_labels):
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.lm_head(hidden[:, kept] if logits_to_keep is not None else hidden)
        if with_aux:
            if token_mask is None and attention_mask is not None:
                token_mask = attention_mask
            mask_TB = None if token_mask is None else token_mask.T.to(hidden.device)
            routed = [i for i, block in enumerate(self.model.layers) if getattr(block.mlp, "gate", None) is not None]
            logits_of = dict(zip(routed, outputs.router_logits, strict=True))
            top_k = self.config.num_experts_per_tok
            losses = [load_balancing_loss(logits_of[i], top_k, mask_TB) for i in balanced]
            aux_loss = torch.stack(losses).mean()
        if has_labels:
            if shift_labels is None:
                assert labels is not None
                shift_labels = F.pad(labels, (0, 1), value=IGNORE)[:, 1:]
            shift_labels = shift_labels.to(hidden.device)
            count = (shift_labels != IGNORE).sum()
            loss = chunked_cross_entropy(hidden.flatten(0, 1), self.lm_head.weight, shift_labels.flatten())
            if aux_loss is not None:
                loss = loss + self.config.router_aux_loss_coef * aux_loss * count
            loss = loss / (count.clamp(min=1) if num_items_in_batch is None else num_items_in_batch)
        inner = ("last_hidden_state", *(() if with_routers else ("router_logits",)))
        others = {name: value for name, value in outputs.items() if name not in inner}
        return MoeCausalLMOutputWithPast(loss=loss, aux_loss=aux_loss, logits=logits, **others)

    def generate(self, inputs=None, generation_config=None, **kwargs):
        """As upstream's. Rows that have finished leave the mixture; a group is one column of the batch.

        The samples of num_return_sequences are rows like others: those of one prompt are mixed with each other.

        Raises ValueError where a mixture would be wrong: prompts padded on the right, beam search, stop strings.
        """

        def setting(name: str) -> Any:
            """As upstream takes it: what is given, of the configuration given, of the model's own."""
            own = getattr(generation_config, name, None)
            return kwargs.get(name, getattr(self.generation_config, name) if own is None else own)

        if self.mixes_examples:
            if (setting("num_beams") or 1) > 1:
                raise ValueError(
                    "beam search would mix the beams of one prompt with each other; use num_beams=1, or serve_alone()"
                )
            mask = kwargs.get("attention_mask")
            if mask is not None and mask.dim() == 2 and not mask[:, -1].all():
                raise ValueError(
                    "prompts must be padded on the left: a group is a column, and a new token's is the last"
                )
            if setting("stop_strings"):
                raise ValueError("rows that end by stop_strings would stay in the mixture; use eos_token_id")
            stop, prompt = setting("eos_token_id"), kwargs.get("input_ids") if inputs is None else inputs
            kwargs["stop_ids"] = [] if stop is None else torch.as_tensor(stop).flatten().tolist()
            if prompt is not None:
                kwargs["prompt_length"] = prompt.shape[1]
            else:  # without one it starts from a token; embeddings have no place among the ids
                kwargs["prompt_length"] = 1 if kwargs.get("inputs_embeds") is None else 0
        return super().generate(inputs, generation_config=generation_config, **kwargs)  # pyright: ignore

    def prepare_inputs_for_generation(
        self,
        input_ids,
        attention_mask=None,
        inputs_embeds=None,
        cache=None,
        past_key_values=None,
        stop_ids: Sequence[int] = (),
        prompt_length: int = 0,
        **kwargs,
    ):
        """Upstream's inputs and the token mask: padding is not real, nor is what follows a row's stop token.

        Args beyond upstream's:
            stop_ids: tokens that end a row; prompt_length: ids that are there before the first is written.
        """
        # Named because `generate` refuses arguments that are not; the cache's name depends on transformers' version.
        named = {"inputs_embeds": inputs_embeds, "cache": cache, "past_key_values": past_key_values}
        kwargs |= {name: value for name, value in named.items() if value is not None}
        inputs = super().prepare_inputs_for_generation(  # pyright: ignore
            input_ids, attention_mask=attention_mask, **kwargs
        )
        # Upstream drops the mask of prompts that are all equally long; a static cache has one of its own shape.
        if attention_mask is None and not stop_ids and inputs.get("attention_mask") is None:
            return inputs
        current = inputs["input_ids"] if inputs.get("input_ids") is not None else inputs["inputs_embeds"]
        width = current.shape[1]
        stops = torch.isin(input_ids[:, prompt_length:], input_ids.new_tensor(stop_ids))
        finished = (stops.cumsum(-1) - stops.int()) > 0
        token_mask = ~F.pad(finished, (width, 0))[:, -width:]
        if attention_mask is not None and attention_mask.dim() == 2:
            token_mask &= attention_mask[:, -width:].bool().to(token_mask.device)
        inputs["token_mask"] = token_mask.to(current.device)
        return inputs
