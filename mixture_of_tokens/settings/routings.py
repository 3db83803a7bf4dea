"""The table of routings: a row for each kind of feed-forward, with all that the rest of the library needs to know.

Names, costs, evaluation, generation, audit, conversion, export and the report read this table; there is no other list
of kinds but that which makes their layers, `models/feed_forwards.py`. It needs no torch, so names are checked at once.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mixture_of_tokens.settings.layers import fields_of

Config = Any  # a `MixtureOfTokensConfig`, which checks its kinds against this table
BY_A_LOSS = "by a loss"  # which is of a micro-batch
BY_CONSTRUCTION = "by construction"  # experts read equally many rows, whatever the router says
OF_A_ROUTER = ("router_temperature", "learnable_temperature", "router_dtype")


@dataclass(frozen=True, kw_only=True)
class Routing:
    """One kind of feed-forward.

    What it is:
        kind: its name in a configuration's `mlp_layer_types`; prefix: what its models' names begin with.
        title, meaning: its name and a sentence or two, for people.

    What it promises:
        causal: a token's output does not depend on later tokens.
        shares_batch: rows of a batch influence each other in evaluation, unless they are served alone. In training
            Token Choice's rows do too, where it has a capacity.
        serves_alone: a row can be served by itself.
        differentiable: outputs are continuous in the weights: no token's choice of experts jumps.
        balance: what keeps the load of the experts even; "" where there is nothing to balance.
        exports_as: the architecture of transformers that computes the same; None if there is none. Of models whose
            queries and keys are not normed `conversion/to_hf.py` names others.
        converts_to: the kinds that it can be converted to, with softmax and with sigmoid gates; empty if to none.

    What it costs beside its experts' matrices, which `cost.py` adds up:
        sparse: it has experts. Nothing below applies to a dense block.
        rows: the number of rows that all experts read for B x T tokens, from (configuration, B, T, training);
            varies: it is only so on average, and only once training has settled; most: the experts that a token may
            have until then, for which memory is needed.
        routed: it has a router; logits: the number of its logits for a token.
        grouped: it works on groups, and the last one is padded with masked rows.
        reads_mixtures: experts read mixtures of tokens, and their outputs are combined for the tokens.
        averages: tokens get a weighted sum of what all experts give on average.
        kept_weights: how many copies of the weights, a number per token and expert, the backward pass keeps, in fp32
            and in the model's precision.
    """

    kind: str
    prefix: str
    title: str
    meaning: str
    causal: bool = True
    shares_batch: bool = False
    serves_alone: bool = True
    differentiable: bool = False
    balance: str = ""
    exports_as: str | None = None
    converts_to: tuple[str, ...] = ()
    sparse: bool = True
    rows: Callable[[Config, int, int, bool], int] = lambda config, batch, context, training: 0
    varies: bool = False
    most: Callable[[Config], int] = lambda config: config.num_experts_per_tok
    routed: bool = True
    logits: Callable[[Config], int] = lambda config: config.num_experts
    grouped: bool = True
    reads_mixtures: bool = False
    averages: bool = False
    kept_weights: tuple[int, int] = (1, 0)

    @property
    def settings(self) -> tuple[str, ...]:
        """The fields of the configuration that are its own, or those of some routings."""
        own = fields_of(self.kind)
        return (*OF_A_ROUTER, *own) if self.routed else own

    @property
    def private(self) -> bool:
        """Nothing of another text, and nothing of the text's own future, reaches a token in evaluation."""
        return self.causal and not self.shares_batch


def groups_of(config: Config, batch: int, context: int) -> tuple[int, int]:
    """The number of groups and of rows in each; a batch smaller than a group is one group of B rows."""
    size = min(config.group_size, batch)
    return -(-batch // size) * context, size


def _mixture_rows(config: Config, batch: int, context: int, training: bool) -> int:
    return config.num_experts * groups_of(config, batch, context)[0]


def _expert_choice_rows(config: Config, batch: int, context: int, training: bool) -> int:
    from mixture_of_tokens.layers.token_choice import tokens_of_an_expert

    groups, size = groups_of(config, batch, context)
    capacity = tokens_of_an_expert(config.group_size, config.num_experts_per_tok, config.num_experts)
    return config.num_experts * groups * min(capacity, size)


def _chosen_rows(config: Config, batch: int, context: int, training: bool) -> int:
    return batch * context * config.num_experts_per_tok


def num_slots(config: Config) -> int:
    """Of an expert of Soft MoE, at least one: in full texts experts read about as many rows as in Token Choice."""
    return max(1, round(config.max_position_embeddings * config.num_experts_per_tok / config.num_experts))


def _token_choice_rows(config: Config, batch: int, context: int, training: bool) -> int:
    assignments = _chosen_rows(config, batch, context, training)
    if not training or config.capacity_factor is None:
        return assignments
    from mixture_of_tokens.layers.token_choice import capacity_ratio

    times, over = capacity_ratio(config.capacity_factor, config.num_experts)
    capacity = max(1, -(-times * assignments // (over * config.num_experts)))
    return config.num_experts * min(capacity, batch * context)


TABLE = (
    Routing(
        kind="dense",
        prefix="Transformer",
        title="Transformer",
        meaning="The dense model: each token goes through the one feed-forward of a layer.",
        differentiable=True,
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
        shares_batch=True,
        differentiable=True,
        balance=BY_CONSTRUCTION,
        converts_to=("token_choice", "sigmoid_choice"),
        rows=_mixture_rows,
        reads_mixtures=True,
        kept_weights=(1, 1),
    ),
    Routing(
        kind="uniform",
        prefix="Uniform",
        title="Uniform",
        meaning="Mixture of Tokens without a router: every mixture is the plain mean of the group.",
        shares_batch=True,
        differentiable=True,
        balance=BY_CONSTRUCTION,
        rows=_mixture_rows,
        routed=False,
        reads_mixtures=True,
        kept_weights=(0, 1),
    ),
    Routing(
        kind="token_choice",
        prefix="TC",
        title="Token Choice",
        meaning="Sparse mixture of experts: each token goes to the experts that its router rates highest. In training "
        "an expert takes at most 1.25 times an even share of the tokens, unless another capacity was set, and the rest "
        "are dropped. After conversion from Mixture of Tokens none are dropped by default.",
        exports_as="Qwen3MoeForCausalLM",
        balance=BY_A_LOSS,
        rows=_token_choice_rows,
        grouped=False,
    ),
    Routing(
        kind="sigmoid_choice",
        prefix="STC",
        title="Sigmoid Token Choice",
        meaning="Token Choice with independent gates, as in DeepSeek-V3: the sigmoid of a logit, for the experts whose "
        "gate plus a bias is highest. The bias balances the load without a loss, and no token is dropped.",
        balance="by biases",
        exports_as="Dots1ForCausalLM",
        rows=_chosen_rows,
        grouped=False,
    ),
    Routing(
        kind="default_moe",
        prefix="DMoE",
        title="Default MoE",
        meaning="Token Choice in which the experts that a token does not go to give it what they give on average, so "
        "that its router hears of every expert. No token is dropped.",
        balance=BY_A_LOSS,
        rows=_chosen_rows,
        grouped=False,
        averages=True,
    ),
    Routing(
        kind="expert_choice",
        prefix="EC",
        title="Expert Choice",
        meaning="Sparse mixture of experts: each expert takes the tokens it rates highest in a group.",
        shares_batch=True,
        serves_alone=False,
        balance=BY_CONSTRUCTION,
        rows=_expert_choice_rows,
    ),
    Routing(
        kind="expert_threshold",
        prefix="ET",
        title="Expert Threshold",
        meaning="Each expert takes the tokens whose score is above its threshold, which follows the score that an even "
        "share of the tokens is above. Tokens get more experts or fewer, as many on average as in Token Choice.",
        balance="by thresholds",
        rows=_chosen_rows,
        varies=True,
        grouped=False,
        kept_weights=(2, 0),
    ),
    Routing(
        kind="remoe",
        prefix="ReMoE",
        title="ReMoE",
        meaning="Each token goes to all experts with a positive logit, which is the gate. A penalty on the gates grows "
        "until tokens have as many experts on average as in Token Choice; before that they have more.",
        differentiable=True,
        balance=BY_A_LOSS,
        rows=_chosen_rows,
        varies=True,
        most=lambda config: config.num_experts,
        grouped=False,
    ),
    Routing(
        kind="soft_moe",
        prefix="SoftMoE",
        title="Soft MoE",
        meaning="Experts read mixtures of all positions of a text, later ones included. It is no language model: its "
        "loss is low because it sees what it is to predict, and it cannot write text.",
        causal=False,
        differentiable=True,
        balance=BY_CONSTRUCTION,
        rows=lambda config, batch, context, training: batch * config.num_experts * num_slots(config),
        logits=lambda config: config.num_experts * num_slots(config),
        grouped=False,
        reads_mixtures=True,
        kept_weights=(2, 2),
    ),
)
PROPERTIES = ("causal", "private", "balanced", "differentiable")
ROUTINGS = {row.kind: row for row in TABLE}
DENSE, MIXTURE = TABLE[:2]
BY_PREFIX = {row.prefix: row for row in TABLE}
# Fields of the configuration that not every routing reads, and the prefixes of those that do.
SETTINGS = {
    field: [row.prefix for row in TABLE if field in row.settings]
    for field in dict.fromkeys(field for row in TABLE for field in row.settings)
}


def routings_of(model: Any) -> list[Routing]:
    """Each block's row, for a model or a configuration; empty for models of other libraries."""
    return getattr(getattr(model, "config", model), "routings", [])


def properties(routings: list[Routing]) -> dict[str, str]:
    """What the routings of a model's blocks promise, for people: "yes", "no", or how.

    causal: nothing depends on later tokens; private: nor on other texts of a batch, in evaluation; balanced: what keeps
    the experts' load even; differentiable: no choice of experts jumps.
    """
    rows = [row for row in routings if row.sparse] or routings

    def all_are(promise: str) -> str:
        return "yes" if all(getattr(row, promise) for row in rows) else "no"

    private = all_are("private")
    if private == "no" and all(row.causal and row.serves_alone for row in rows):
        private = "when served alone"
    balanced = ", ".join(dict.fromkeys(row.balance for row in rows if row.balance)) or "no experts"
    found = (all_are("causal"), private, balanced, all_are("differentiable"))
    return dict(zip(PROPERTIES, found, strict=True))
