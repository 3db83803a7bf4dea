"""The configuration of a model: the fields of transformers' Qwen3-MoE, and ours."""

from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassFieldValidationError

from mixture_of_tokens.layers.experts import ACTIVATIONS
from mixture_of_tokens.models.hf_internals import Qwen3MoeConfig
from mixture_of_tokens.settings.layers import FIELDS, LayerSettings, check_setting
from mixture_of_tokens.settings.routings import DENSE, MIXTURE, ROUTINGS, Routing
from mixture_of_tokens.utils.checks import KINDS, check, check_choice, shown

POSITIVE = ("hidden_size", "intermediate_size", "moe_intermediate_size", "num_hidden_layers", "num_attention_heads")
POSITIVE += ("num_key_value_heads", "head_dim", "num_experts", "num_experts_per_tok", "vocab_size")
POSITIVE += ("max_position_embeddings",)

MOST_BLOCKS = 1000


def layer_types(blocks: int, *, dense: int, kind: str) -> list[str]:
    """The kinds of a model's blocks, of which the first ones are dense. Raises ValueError for more than MOST_BLOCKS."""
    if blocks > MOST_BLOCKS:
        raise ValueError(f"num_hidden_layers must be at most {MOST_BLOCKS}, not {blocks}")
    return [DENSE.kind] * dense + [kind] * (blocks - dense)


class MixtureOfTokensConfig(LayerSettings, Qwen3MoeConfig):
    """Qwen3-MoE's fields (`num_experts`, `moe_intermediate_size`, `num_experts_per_tok`, ...) and ours.

    Fields:
        mlp_layer_types: the kind of each block's feed-forward, from the table in `routings.py`: "dense",
            "mixture_of_tokens", ... None: Mixture of Tokens in the later half of the blocks, as in the paper.
        group_size: tokens mixed together, each from a different example; training batches are multiples of it.
        gated: SwiGLU feed-forwards, dense and expert; False: plain ones, act(x W) W', as in the paper (with "relu").
        qk_norm: each head's queries and keys are normed, as in Qwen3; False: they are not, as in Llama.
        router_temperature, learnable_temperature, router_dtype: see `Router`; normalize_mixture: see `MixtureOfTokens`.
        capacity_factor: see `TokenChoice`; balance_rate: see `SigmoidChoice`; default_decay: see `DefaultMoE`;
            l1_start, l1_factor: see `ReMoE`; threshold_decay, threshold_scores ("softmax" or "sigmoid"): see
            `ExpertThreshold`.
        shared_experts: experts of a sparse block that every token goes to, with gate 1, beside the routed ones
            (DeepSeekMoE, arXiv 2401.06066): one dense feed-forward of their width.
        initializer_scale: weights are drawn with std = scale / sqrt(fan_in), cut at two std; embeddings have fan_in 1.
        router_aux_loss_coef: weight of the load-balancing loss of Token Choice and Default MoE, in training;
            router_z_loss_coef: of the loss that keeps their logits small (`RouterZLoss`).

    Raises ValueError, naming the field, for what makes no model.
    """

    model_type = "mixture_of_tokens"
    keys_to_ignore_at_inference = ["past_key_values", "cache", "cross_entropy", "aux_loss", "router_logits"]
    # Upstream's parallel plans split experts without regard to groups.
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

    mlp_layer_types: list[str] | None = None

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs):
        """As upstream's, which takes a folder without config.json, such as a run, for a model of all defaults.

        Raises ValueError for such a folder.
        """
        found, others = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        if not found:
            folder = Path(pretrained_model_name_or_path)
            if (folder / "model" / "config.json").is_file():
                raise ValueError(f"{folder} is a run, whose model is in {folder / 'model'}: load that")
            raise ValueError(f"{folder} has no config.json: it is no model")
        return found, others

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        """As upstream's; but what `from_pretrained` is given in place of a saved field is checked like it."""
        given = {name: kwargs.pop(name) for name in kwargs.keys() & cls.__dataclass_fields__.keys()}
        return super().from_dict(config_dict | given, **kwargs)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in FIELDS:
            check_setting(name, value)
        try:
            super().__setattr__(name, value)
        except StrictDataclassFieldValidationError:  # of several lines
            kind = type(self).__dataclass_fields__[name].type
            legal = KINDS[kind][1] if kind in KINDS else getattr(kind, "__name__", kind)
            raise ValueError(f"{name} takes {legal}, not {shown(value)}") from None

    def __post_init__(self, **kwargs):
        if (head_dim := kwargs.pop("head_dim", None)) is not None:  # a field that upstream reads and does not declare
            self.head_dim = head_dim
        for name in POSITIVE:
            value = getattr(self, name, None)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ValueError(f"{name} must be at least 1, not {shown(value)}")
        if self.mlp_layer_types is None:
            blocks = self.num_hidden_layers
            self.mlp_layer_types = layer_types(blocks, dense=blocks // 2, kind=MIXTURE.kind)
        if not isinstance(self.mlp_layer_types, list | tuple):
            raise ValueError(f"mlp_layer_types must be a list of the kinds of the {self.num_hidden_layers} blocks")
        unknown = set(map(str, self.mlp_layer_types)) - set(ROUTINGS)
        if unknown:
            raise ValueError(f"mlp_layer_types has {', '.join(sorted(unknown))}; legal are {', '.join(ROUTINGS)}")
        if len(self.mlp_layer_types) != self.num_hidden_layers:
            raise ValueError(f"mlp_layer_types names {len(self.mlp_layer_types)} of {self.num_hidden_layers} blocks")
        check_choice("hidden_act", self.hidden_act, ACTIVATIONS)
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        if heads % kv_heads:
            raise ValueError(f"num_key_value_heads {kv_heads} does not divide num_attention_heads {heads}")
        if self.head_width % 2:
            raise ValueError(f"head_dim must be even, for rotary positions, not {self.head_width}")
        if not 0 <= self.attention_dropout < 1:
            raise ValueError(f"attention_dropout must be at least 0 and below 1, not {self.attention_dropout}")
        if self.use_sliding_window and self.sliding_window is not None and self.sliding_window < 1:
            raise ValueError(f"sliding_window must be at least 1, not {self.sliding_window}")
        if isinstance(self.dtype, str) and not isinstance(getattr(torch, self.dtype, None), torch.dtype):
            raise ValueError(f"dtype {self.dtype!r} is none of torch's types")
        check("id2label", self.id2label, dict[int, str] | None)  # upstream checks the fields of Qwen3-MoE alone
        # The same in upstream's fields, for the export.
        self.mlp_only_layers = [i for i, kind in enumerate(self.mlp_layer_types) if kind == DENSE.kind]
        self.decoder_sparse_step = 1
        super().__post_init__(**kwargs)

    @property
    def head_width(self) -> int:
        """Of an attention head: `head_dim`, or upstream's default where that is not given."""
        return getattr(self, "head_dim", None) or self.hidden_size // self.num_attention_heads

    @property
    def routings(self) -> list[Routing]:
        """Each block's row of the table of routings."""
        return [ROUTINGS[kind] for kind in self.mlp_layer_types or ()]

    @property
    def sparse_routings(self) -> list[Routing]:
        """The rows of the blocks that have experts."""
        return [routing for routing in self.routings if routing.sparse]

    @property
    def causal(self) -> bool:
        """Whether no output depends on a later token."""
        return all(routing.causal for routing in self.routings)

    @property
    def shares_batch(self) -> bool:
        """Whether an example's output depends on the other examples of its batch."""
        return any(routing.shares_batch for routing in self.routings)

    @property
    def serves_alone(self) -> bool:
        """Whether an example can be served by itself."""
        return all(routing.serves_alone for routing in self.routings)
