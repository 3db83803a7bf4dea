"""The causal language model: transformers' Qwen3-MoE in which only the feed-forward differs.

Attention, norms, rotary positions, KV cache, `generate`, checkpoints and parameter names are upstream's; this file
holds the differences, and `generation.py` those of `generate`.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn import functional as F
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers.utils import logging

from mixture_of_tokens.layers.experts import Experts, Routed, Router, truncated_normal_
from mixture_of_tokens.layers.losses import IGNORE, AuxiliaryLoss, chunked_cross_entropy, summed_cross_entropy
from mixture_of_tokens.layers.mixture import MixtureOfTokens
from mixture_of_tokens.models.config import MixtureOfTokensConfig
from mixture_of_tokens.models.feed_forwards import dense_feed_forward, feed_forward
from mixture_of_tokens.models.generation import GroupedGeneration, check_width, real_tokens
from mixture_of_tokens.models.hf_internals import (
    GradientCheckpointingLayer,
    MoeCausalLMOutputWithPast,
    OutputRecorder,
    Qwen3MoeAttention,
    Qwen3MoeForCausalLM,
    Qwen3MoeModel,
    Qwen3MoePreTrainedModel,
    Qwen3MoeRMSNorm,
    Qwen3MoeRotaryEmbedding,
    can_return_tuple,
    maybe_install_capturing_hooks,
)

logger = logging.get_logger(__name__)

MANY_BATCHES = 200  # of training, more than gradients are accumulated over


@dataclass
class CausalLMOutput(MoeCausalLMOutputWithPast):
    """Upstream's, with the loss without what auxiliary losses add."""

    cross_entropy: Tensor | None = None


class MixtureOfTokensDecoderLayer(GradientCheckpointingLayer):
    def __init__(self, config: MixtureOfTokensConfig, layer_idx: int):
        super().__init__()
        attention: Any = Qwen3MoeAttention(config, layer_idx)
        if not config.qk_norm:
            attention.q_norm, attention.k_norm = nn.Identity(), nn.Identity()
        self.self_attn = attention
        self.mlp = feed_forward(config, layer_idx)
        self.shared_experts = None
        if config.shared_experts and config.routings[layer_idx].sparse:
            self.shared_experts = dense_feed_forward(config, config.shared_experts * config.moe_intermediate_size)
        self.input_layernorm = Qwen3MoeRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = Qwen3MoeRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, hidden_states: Tensor, token_mask: Tensor | None = None, **attention_kwargs) -> Tensor:
        attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **attention_kwargs)
        hidden_states = hidden_states + attended
        normed = self.post_attention_layernorm(hidden_states)
        hidden_states = hidden_states + self.mlp(normed, token_mask)
        return hidden_states if self.shared_experts is None else hidden_states + self.shared_experts(normed)


class MixtureOfTokensPreTrainedModel(Qwen3MoePreTrainedModel):
    config_class = MixtureOfTokensConfig
    config: MixtureOfTokensConfig
    _no_split_modules = ["MixtureOfTokensDecoderLayer"]
    # What moves by small steps, or is measured.
    _keep_in_fp32_modules_strict = ["log_temperature", "selection_bias", "threshold", "l1_weight"]
    _keep_in_fp32_modules_strict += ["companion", "companion_logit", "default_output"]
    _can_record_outputs = {
        "router_logits": OutputRecorder(Router, index=0),
        "auxiliary_losses": OutputRecorder(AuxiliaryLoss, index=0),
        "hidden_states": MixtureOfTokensDecoderLayer,
        "attentions": Qwen3MoeAttention,
    }

    def _init_weights(self, module):
        scale = self.config.initializer_scale
        if isinstance(module, nn.Linear):
            truncated_normal_(module.weight, scale)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding) and self.config.tie_word_embeddings:  # it is the head too
            truncated_normal_(module.weight, scale)
        elif isinstance(module, nn.Embedding):
            nn.init.trunc_normal_(module.weight, std=scale, a=-2 * scale, b=2 * scale)
        elif isinstance(module, Experts | Router):
            module.reset_parameters()
        elif isinstance(module, Routed):  # for a checkpoint without, such as one without companions
            module.reset_state()
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
        if self.auxiliary_losses():
            # Upstream installs them at the first call that records, under a lock that `torch.compile` cannot trace.
            # A model with them cannot be pickled.
            maybe_install_capturing_hooks(self)

    def auxiliary_losses(self) -> list[tuple[AuxiliaryLoss, float | Tensor]]:
        """Those of all blocks, in the order in which they are called, with their weights."""
        return [one for block in self.layers for one in getattr(block.mlp, "auxiliary_losses", list)()]

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        *,
        inputs_embeds: Any = None,
        token_mask=None,
        **kwargs,
    ):
        """As upstream's, with `token_mask` (B, T), true where a token is real; by default from a 2-D attention mask."""
        if token_mask is None:
            names = ("past_key_values", "cache")  # depending on transformers' version
            cache = next((kwargs[name] for name in names if kwargs.get(name) is not None), None)
            current = inputs_embeds if input_ids is None else input_ids
            if cache is None:
                check_width(attention_mask, current)
            token_mask = real_tokens(attention_mask, current, cache)
        kwargs |= {"position_ids": position_ids, "inputs_embeds": inputs_embeds, "token_mask": token_mask}
        return super().forward(input_ids=input_ids, attention_mask=attention_mask, **kwargs)


def _is_matrix(head: nn.Module) -> bool:
    """Whether a head does nothing but multiply by a weight that is whole: no bias, adapter, quantizer or hook.

    The hooks of FSDP make the weight whole, for the final norm and the head together.
    """
    if type(head).forward is not nn.Linear.forward or "forward" in vars(head) or head.bias is not None:
        return False
    kinds = (head._forward_pre_hooks, head._forward_hooks, head._backward_pre_hooks, head._backward_hooks)
    hooks = [hook for kind in kinds for hook in kind.values()]
    whole = not is_traceable_wrapper_subclass(head.weight)  # as a DTensor is, and a quantized weight
    return whole and all(str(hook.__module__).startswith("torch.distributed.fsdp") for hook in hooks)


class MixtureOfTokensForCausalLM(GroupedGeneration, MixtureOfTokensPreTrainedModel, Qwen3MoeForCausalLM):
    _tp_plan = {}
    _pp_plan = {}

    def __init__(self, config: MixtureOfTokensConfig):
        MixtureOfTokensPreTrainedModel.__init__(self, config)
        self.model = MixtureOfTokensModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self._batches_since_balance = 0
        self.post_init()

    def serve_alone(self, alone: bool = True, num_experts_alone: int | None = None) -> None:
        """Serve every row alone (see `MixtureOfTokens.serve_alone`), until called with False. This is not saved.

        Args:
            num_experts_alone: experts that a token of a Mixture of Tokens goes to, by default all of them; as many as
                the granularity cost what a dense feed-forward does, and give nearly the same.

        Raises ValueError for a routing that cannot do without the other rows, such as Expert Choice, for
        num_experts_alone of a model that mixes no rows, and as the layers do.
        """
        for routing in self.config.routings:
            if alone and not routing.serves_alone:
                raise ValueError(f"{routing.title} chooses among the rows of a batch; it cannot serve a row alone")
        mixtures = [module for module in self.modules() if isinstance(module, MixtureOfTokens)]
        if num_experts_alone is not None and not mixtures:
            raise ValueError("num_experts_alone is for a Mixture of Tokens; this model serves each row alone as it is")
        for mixture in mixtures:
            mixture.serve_alone(alone, num_experts_alone)

    def save_pretrained(self, save_directory, **kwargs):
        """As upstream's; a temperature that a schedule has set is saved as `router_temperature`.

        Raises ValueError where routers have several, which the configuration cannot hold.
        """
        routers = [module for module in self.modules() if isinstance(module, Router)]
        set_to = {router.temperature_setting for router in routers if router.log_temperature is None}
        if len(set_to) > 1:
            raise ValueError(f"routers have the temperatures {sorted(set_to)}, and a configuration has one for all")
        self.config.router_temperature = next(iter(set_to), self.config.router_temperature)
        super().save_pretrained(save_directory, **kwargs)

    def balance(self, group: ProcessGroup | None = None) -> None:
        """To be called after each step of training: biases, thresholds, penalties and averages of routings then move.

        Args:
            group: the processes that hold the same layers, and all call this; by default all that there are.
        """
        self._batches_since_balance = 0
        layers = self._to_balance()
        for kind in dict.fromkeys(map(type, layers)):
            kind.balance([layer for layer in layers if type(layer) is kind], group)

    def _to_balance(self) -> list[Routed]:
        routed = [module for module in self.modules() if isinstance(module, Routed)]
        balanced = [layer for layer in routed if type(layer).balance is not Routed.balance]
        # Where a router is frozen, as below an adapter, its layer stays as it was saved.
        return [layer for layer in balanced if any(weight.requires_grad for weight in layer.gate.parameters())]

    def _check_balance_is_called(self) -> None:
        """Warn, once, in a training without `balance`, such as a Trainer's without `BalanceCallback`."""
        self._batches_since_balance += torch.is_grad_enabled()
        if self._batches_since_balance == MANY_BATCHES and self._to_balance():
            logger.warning_once(
                f"{MANY_BATCHES} batches were trained on without a call of balance(), and nothing else moves what the "
                "routing of this model keeps beside its weights. Call it after each step, or give a Trainer "
                "callbacks=[BalanceCallback(model)]."
            )

    def _added_to_the_loss(
        self, losses: list[tuple[AuxiliaryLoss, float | Tensor]], recorded: list[Tensor], device: torch.device
    ) -> tuple[Tensor, Tensor | None]:
        """What auxiliary losses add, of each kind the mean over its blocks; and the mean over the kinds that balance.

        Raises ValueError where one is missing.
        """
        if len(recorded) != len(losses):
            raise ValueError(
                f"the layers have {len(losses)} auxiliary losses, and {len(recorded)} were recorded: those that the "
                "model was made with are, and none that took the place of one"
            )
        kinds: dict[type[AuxiliaryLoss], tuple[float | Tensor, list[Tensor]]] = {}
        for (loss, weight), value in zip(losses, recorded, strict=True):
            kinds.setdefault(type(loss), (weight, []))[1].append(value.to(device))  # one weight for all of a kind
        added, balancing = torch.zeros((), device=device), []
        for kind, (weight, values) in kinds.items():
            mean = torch.stack(values).mean()
            added = added + (weight.to(device) if isinstance(weight, Tensor) else weight) * mean
            balancing += [mean] * kind.balances
        return added, torch.stack(balancing).mean() if balancing else None

    @property
    def shares_batch(self) -> bool:
        """Whether a row's output depends on the other rows of its batch, which `serve_alone` changes."""
        blocks = zip(self.config.routings, self.model.layers, strict=True)
        return any(routing.shares_batch and not getattr(block.mlp, "alone", False) for routing, block in blocks)

    def _check_groups(self) -> None:
        """Warn, once, where training forms no groups."""
        if self.config.shares_batch and not self.shares_batch:
            logger.warning_once("Each row is served alone, so training forms no groups; call serve_alone(False) first.")

    def _check_balanced(self, added: Tensor) -> None:
        """Raises ValueError where reentrant checkpointing, whose first pass has no gradients, loses the loss's."""
        checkpointed = any(block.gradient_checkpointing for block in self.model.layers)
        if checkpointed and torch.is_grad_enabled() and not added.requires_grad:
            routers = [module for module in self.modules() if isinstance(module, Router)]
            if any(weight.requires_grad for router in routers for weight in router.parameters()):
                raise ValueError(
                    "reentrant gradient checkpointing drops the loss that balances experts: call "
                    'gradient_checkpointing_enable({"use_reentrant": False})'
                )

    def _summed_cross_entropy(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """Of (S, D) and (S,), without all logits in memory where the head is only a matrix, and on this device."""
        head = self.lm_head
        if _is_matrix(head) and head.weight.device == hidden.device:
            return chunked_cross_entropy(hidden, head.weight, labels)
        return summed_cross_entropy(head(hidden).to(hidden.device), labels)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        *,
        inputs_embeds: Tensor | None = None,
        token_mask: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        return_logits: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        output_router_logits: bool | None = None,
        **kwargs,
    ) -> CausalLMOutput:
        """Logits, and with labels the loss; in training the (B, T, V) logits are then computed only on request.

        Args beyond upstream's:
            token_mask: (B, T), true where a token is real and takes part in groups; by default the attention mask. It
                does not mask attention: with it alone, real tokens still attend to padding.
            labels: (B, T), predicted from the position before; or `shift_labels`, the same, shifted already.
            num_items_in_batch: divisor of the summed loss, by default the number of labels in this call. With gradient
                accumulation it is the number of labels in the step; the auxiliary loss is then weighted by this
                micro-batch's share of them, so that it counts once per step.
            return_logits: by default not in training with labels.

        Returns `loss` (`cross_entropy`, in nats, in training plus auxiliary losses times their weights), `aux_loss`
        (what balances a routing, such as Token Choice's load-balancing loss; the mean over its blocks), `logits`, and
        upstream's others.
        `router_logits` have the shapes in which routings choose: (M, G, E) of groups, (T, B, E) where each token
        chooses, (B, T, E * P) of Soft MoE. Served alone by all experts, a Mixture of Tokens has several for a layer,
        of some tokens each.
        """
        # Not among the arguments: Trainer would take it for a label that every batch of an evaluation must have.
        shift_labels = kwargs.pop("shift_labels", None)
        if self.training and not torch.compiler.is_compiling():  # which cannot trace a warning
            self._check_groups()
            self._check_balance_is_called()
        losses = self.model.auxiliary_losses() if self.training else []
        with_routers = self.config.output_router_logits if output_router_logits is None else output_router_logits
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            token_mask=token_mask,
            output_router_logits=with_routers,
            output_auxiliary_losses=len(losses) > 0,  # the compiler of torch 2.10 cannot trace bool(losses)
            return_dict=True,
            **kwargs,
        )
        hidden = outputs.last_hidden_state
        loss = cross_entropy = aux_loss = added = logits = None
        has_labels = labels is not None or shift_labels is not None
        if return_logits or (return_logits is None and not (has_labels and self.training)):
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.lm_head(hidden[:, kept] if logits_to_keep is not None else hidden)
        if losses:
            added, aux_loss = self._added_to_the_loss(losses, outputs.auxiliary_losses, hidden.device)
            self._check_balanced(added)
        if has_labels:
            if shift_labels is None:
                assert labels is not None
                shift_labels = F.pad(labels, (0, 1), value=IGNORE)[:, 1:]
            shift_labels = shift_labels.to(hidden.device)
            count = (shift_labels != IGNORE).sum()
            if logits is None or self.training or logits.shape[:2] != hidden.shape[:2]:
                total = self._summed_cross_entropy(hidden.flatten(0, 1), shift_labels.flatten())
            else:
                total = summed_cross_entropy(logits.flatten(0, 1).to(hidden.device), shift_labels.flatten())
            divisor = count.clamp(min=1) if num_items_in_batch is None else num_items_in_batch
            cross_entropy = total / divisor
            loss = cross_entropy if added is None else (total + added * count) / divisor
        inner = ("last_hidden_state", "auxiliary_losses")
        others = {name: value for name, value in outputs.items() if name not in inner}
        others |= {"loss": loss, "aux_loss": aux_loss, "logits": logits, "cross_entropy": cross_entropy}
        return CausalLMOutput(**others)
