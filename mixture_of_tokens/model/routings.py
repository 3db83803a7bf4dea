"""The table of routings: a row for each kind of feed-forward, with all that the rest of the library needs to know.

Names, costs, evaluation, generation, audit, conversion, export and the report read this table; there is no other list
of kinds. A new routing is a layer (`layers.py`, `sparse.py`), a row here, and its literal reference in
`tests/reference.py`; the property tests run over the table.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mixture_of_tokens.layers import ACTIVATIONS, MixtureOfTokens
from mixture_of_tokens.model.upstream import Qwen3MoeMLP
from mixture_of_tokens.sparse import ExpertChoice, SigmoidChoice, TokenChoice

if TYPE_CHECKING:  # the configuration checks its kinds against this table
    from mixture_of_tokens.model.config import MixtureOfTokensConfig


@dataclass(frozen=True, kw_only=True)
class Routing:
    """One kind of feed-forward.

    What it is:
        kind: its name in a configuration's `mlp_layer_types`; prefix: what its models' names begin with.
        title, meaning: its name and a sentence or two, for people.
        build: makes the feed-forward of one block.

    What it promises:
        shares_batch: rows of a batch influence each other, unless they are served alone.
        serves_alone: a row can be served by itself.
        exports_as: the architecture of transformers that computes the same; None if there is none.
        converts_to: the kinds that it can be converted to, with softmax and with sigmoid gates; empty if to none.
        balanced: it is trained with the load-balancing loss.

    What it costs beside its experts' matrices, which `cost.py` adds up:
        sparse: it has experts. Nothing below applies to a dense block.
        rows: the number of rows that all experts read for B x T tokens, from (configuration, B, T, training).
        routed: it has a router; grouped: it works on groups, and the last one is padded with masked rows.
        mixes: tokens are collected into mixtures, and the outputs are spread over the tokens.
        kept_weights, kept_outputs: how many copies the backward pass keeps, in fp32 and in the model's precision. Of
            the weights a copy is a number per token and expert; of the outputs a vector per row of an expert, or,
            where it is not grouped, per choice of a token.
    """

    kind: str
    prefix: str
    title: str
    meaning: str
    build: Callable[["MixtureOfTokensConfig"], nn.Module]
    shares_batch: bool = False
    serves_alone: bool = True
    exports_as: str | None = None
    converts_to: tuple[str, ...] = ()
    balanced: bool = False
    sparse: bool = True
    rows: Callable[["MixtureOfTokensConfig", int, int, bool], int] = lambda config, batch, context, training: 0
    routed: bool = True
    grouped: bool = True
    mixes: bool = False
    kept_weights: tuple[int, int] = (1, 0)
    kept_outputs: tuple[int, int] = (0, 1)


def groups_of(config: "MixtureOfTokensConfig", batch: int, context: int) -> tuple[int, int]:
    """The number of groups and of rows in each; a batch smaller than a group is one group of B rows."""
    size = min(config.group_size, batch)
    return -(-batch // size) * context, size


class DenseMLP(Qwen3MoeMLP):
    def forward(self, x: Tensor, token_mask: Tensor | None = None) -> Tensor:
        return super().forward(x)


class PlainMLP(nn.Module):
    """The paper's dense feed-forward: no gate, no biases."""

    def __init__(self, config: "MixtureOfTokensConfig"):
        super().__init__()
        self.act = ACTIVATIONS[config.hidden_act]
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor, token_mask: Tensor | None = None) -> Tensor:
        return self.down_proj(self.act(self.up_proj(x)))


def _dense(config: "MixtureOfTokensConfig") -> nn.Module:
    return DenseMLP(config) if config.gated else PlainMLP(config)


def _common(config: "MixtureOfTokensConfig") -> dict[str, Any]:
    """What every sparse layer's constructor takes."""
    return {
        "hidden_size": config.hidden_size,
        "expert_size": config.moe_intermediate_size,
        "num_experts": config.num_experts,
        "gated": config.gated,
        "activation": config.hidden_act,
        "temperature": config.router_temperature,
        "learnable_temperature": config.learnable_temperature,
        "router_dtype": getattr(torch, config.router_dtype),
        "initializer_scale": config.initializer_scale,
    }


def _mixture_of_tokens(config: "MixtureOfTokensConfig", uniform: bool = False) -> nn.Module:
    mixing = {"normalize_mixture": config.normalize_mixture, "uniform": uniform}
    return MixtureOfTokens(group_size=config.group_size, **mixing, **_common(config))


def _mixture_rows(config: "MixtureOfTokensConfig", batch: int, context: int, training: bool) -> int:
    return config.num_experts * groups_of(config, batch, context)[0]


def _expert_choice(config: "MixtureOfTokensConfig") -> nn.Module:
    choice = {"group_size": config.group_size, "num_experts_per_tok": config.num_experts_per_tok}
    return ExpertChoice(**choice, **_common(config))


def _expert_choice_rows(config: "MixtureOfTokensConfig", batch: int, context: int, training: bool) -> int:
    groups, size = groups_of(config, batch, context)
    capacity = max(1, round(config.group_size * config.num_experts_per_tok / config.num_experts))
    return config.num_experts * groups * min(capacity, size)


def _choice(config: "MixtureOfTokensConfig") -> dict[str, Any]:
    choice = {"num_experts_per_tok": config.num_experts_per_tok, "norm_topk_prob": config.norm_topk_prob}
    return choice | _common(config)


def _token_choice(config: "MixtureOfTokensConfig") -> nn.Module:
    return TokenChoice(capacity_factor=config.capacity_factor, **_choice(config))


def _sigmoid_choice(config: "MixtureOfTokensConfig") -> nn.Module:
    return SigmoidChoice(balance_rate=config.balance_rate, **_choice(config))


def _chosen_rows(config: "MixtureOfTokensConfig", batch: int, context: int, training: bool) -> int:
    return batch * context * config.num_experts_per_tok


def _token_choice_rows(config: "MixtureOfTokensConfig", batch: int, context: int, training: bool) -> int:
    assignments = _chosen_rows(config, batch, context, training)
    if not training or config.capacity_factor is None:
        return assignments
    capacity = math.ceil(config.capacity_factor * assignments / config.num_experts)
    return config.num_experts * min(capacity, batch * context)


ROWS = (
    Routing(
        kind="dense",
        prefix="Transformer",
        title="Transformer",
        meaning="The dense model: each token goes through the one feed-forward of a layer.",
        build=_dense,
        exports_as="Qwen3ForCausalLM",
        sparse=False,
        routed=False,
        grouped=False,
    ),
    Routing(
        kind="mixture_of_tokens",
        prefix="MoT",
        title="Mixture of Tokens",
        meaning="Tokens at the same position of different texts form a group. Each expert reads one mixture of the "
        "group, weighted by a router, and its output goes back to the tokens with the same weights. No token is "
        "dropped.",
        build=_mixture_of_tokens,
        shares_batch=True,
        converts_to=("token_choice", "sigmoid_choice"),
        rows=_mixture_rows,
        mixes=True,
        kept_weights=(1, 1),
    ),
    Routing(
        kind="uniform",
        prefix="Uniform",
        title="Uniform",
        meaning="Mixture of Tokens without a router: every mixture is the plain mean of the group.",
        build=lambda config: _mixture_of_tokens(config, uniform=True),
        shares_batch=True,
        rows=_mixture_rows,
        routed=False,
        mixes=True,
        kept_weights=(0, 1),
    ),
    Routing(
        kind="token_choice",
        prefix="TC",
        title="Token Choice",
        meaning="Sparse mixture of experts: each token goes to the experts that its router rates highest. In training "
        "an expert takes at most 1.25 times an even share of the tokens, unless another capacity was set, and the rest "
        "are dropped. After conversion from Mixture of Tokens none are dropped by default.",
        build=_token_choice,
        exports_as="Qwen3MoeForCausalLM",
        balanced=True,
        rows=_token_choice_rows,
        grouped=False,
        kept_weights=(2, 0),
        kept_outputs=(1, 2),
    ),
    Routing(
        kind="sigmoid_choice",
        prefix="STC",
        title="Sigmoid Token Choice",
        meaning="Token Choice with independent gates, as in DeepSeek-V3: the sigmoid of a logit, for the experts whose "
        "gate plus a bias is highest. The bias balances the load without a loss, and no token is dropped.",
        build=_sigmoid_choice,
        exports_as="Dots1ForCausalLM",
        rows=_chosen_rows,
        grouped=False,
        kept_outputs=(1, 1),
    ),
    Routing(
        kind="expert_choice",
        prefix="EC",
        title="Expert Choice",
        meaning="Sparse mixture of experts: each expert takes the tokens it rates highest in a group.",
        build=_expert_choice,
        shares_batch=True,
        serves_alone=False,
        rows=_expert_choice_rows,
        kept_outputs=(1, 1),
    ),
)
ROUTINGS = {row.kind: row for row in ROWS}
DENSE, MIXTURE = ROWS[:2]
BY_PREFIX = {row.prefix: row for row in ROWS}


def routings_of(model: Any) -> list[Routing]:
    """Each block's row, for a model or a configuration; empty for models of other libraries."""
    return getattr(getattr(model, "config", model), "routings", [])


def converted_from(kind: str) -> Routing:
    """The routing that can be converted to this kind."""
    return next(row for row in ROWS if kind in row.converts_to)
