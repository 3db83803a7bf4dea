"""From Mixture of Tokens to Token Choice with the same weights: what carries over, and what the layers are to give.

Experts and router carry over one to one (Antoniak et al., transition tuning). What changes is how weights are made. A
softmax over the group ignores a constant offset in an expert's logits; gates over experts route by it. Experts now
read single tokens, and only the top k answer. So the loss jumps, and training has to bring it down.

It need not jump. Served alone, a Mixture of Tokens *is* a sparse layer, with a sigmoid gate and a bias an expert:

    w[t, e] = sigmoid(x_t . c_e / temperature - b_e)             b_e = companion_logit[e] + log(G - 1)
    out[t]  = sum_e w[t, e] * FFN_e(w[t, e] * x_t + (1 - w[t, e]) * companion[e])

`branches` records x and out of every layer on training text, and `distil.py` fits the new layers to them.
"""

import copy
import math
from collections.abc import Callable, Iterable
from typing import Any, TypeVar, get_args

import torch
from torch import Tensor

from mixture_of_tokens.layers.mixture import MixtureOfTokens
from mixture_of_tokens.layers.token_choice import SigmoidChoice, TokenChoice
from mixture_of_tokens.models.config import MixtureOfTokensConfig
from mixture_of_tokens.models.forward_hooks import evaluating, serving_alone
from mixture_of_tokens.models.modeling import MixtureOfTokensForCausalLM
from mixture_of_tokens.settings.choices import Scores
from mixture_of_tokens.settings.routings import MIXTURE

AT_ONCE = 8192  # tokens that a distance is computed on at a time

Layer = TypeVar("Layer", MixtureOfTokens, TokenChoice)
# By a router's name, what its weight has been multiplied by.
Scales = dict[str, float]
# By layer, the distance from the source's output as a share of its size, before and after a fit.
Errors = dict[str, tuple[float, float]]
# By layer, inputs and outputs (S, D).
Branches = dict[int, tuple[Tensor, Tensor]]


def default_scores(config: MixtureOfTokensConfig) -> Scores:
    """Those with which the new model can be exported: no plain architecture has a softmax and shared experts."""
    return "sigmoid" if config.shared_experts else "softmax"


def token_choice_config(
    config: MixtureOfTokensConfig,
    *,
    top_k: int | None = None,
    capacity_factor: float | None = None,
    scores: Scores = "softmax",
    norm_topk_prob: bool = False,
) -> MixtureOfTokensConfig:
    """The configuration after the switch. Top k is by default the granularity, without shared experts: equal FLOPs.

    Raises ValueError where there is no Mixture of Tokens with a router, for an impossible k, and for normalised gates
    of one expert.
    """
    kinds = {routing.kind for routing in config.sparse_routings}
    if kinds != {MIXTURE.kind}:
        found = ", ".join(sorted(kinds)) or "dense blocks alone"
        raise ValueError(f"only a Mixture of Tokens with a router can become Token Choice; this model has {found}")
    top_k = config.num_experts_per_tok if top_k is None else top_k
    if not 1 <= top_k <= config.num_experts:
        raise ValueError(f"--top-k must be 1 to {config.num_experts}, the number of experts, not {top_k}")
    if norm_topk_prob and top_k == 1:
        raise ValueError("--norm-topk-prob needs 2 experts a token or more: the gate of one would always be 1")
    changed, kind = copy.deepcopy(config), MIXTURE.converts_to[get_args(Scores).index(scores)]
    changed.mlp_layer_types = [kind if routing.converts_to else routing.kind for routing in config.routings]
    changed.num_experts_per_tok, changed.capacity_factor = top_k, capacity_factor
    changed.norm_topk_prob = norm_topk_prob
    changed.router_temperature, changed.learnable_temperature, changed.normalize_mixture = 1.0, False, False
    return changed


@torch.no_grad()
def to_token_choice(source: MixtureOfTokensForCausalLM, target: MixtureOfTokensForCausalLM) -> Scales:
    """Copy a Mixture of Tokens' weights to a model of `token_choice_config`, temperatures folded into the routers."""
    scales: Scales = {}
    named = source.named_parameters(remove_duplicate=False)  # both names of tied embeddings
    weights = {name: value.clone() for name, value in named if "log_temperature" not in name}
    for i, layer in sparse_layers(source, MixtureOfTokens):
        name = f"model.layers.{i}.mlp.gate.weight"
        assert layer.gate is not None  # `token_choice_config` refuses uniform mixing
        scales[name] = float(1 / layer.gate.temperature)
        weights[name] *= scales[name]
    target.load_state_dict(weights, strict=False)  # but for biases of selection, which are zero
    return scales


def sparse_layers(model: MixtureOfTokensForCausalLM, kind: type[Layer]) -> list[tuple[int, Layer]]:
    return [(i, block.mlp) for i, block in enumerate(model.model.layers) if isinstance(block.mlp, kind)]


@torch.no_grad()
def branches(
    source: MixtureOfTokensForCausalLM,
    batches: Iterable[dict[str, Tensor]],
    tokens: int,
    num_experts_alone: int | None = None,
    served: Callable[[int], object] = lambda tokens: None,
) -> Branches:
    """Input x and output y (S, D) of every Mixture of Tokens layer, each row served alone.

    Args:
        source: with calibrated companions; it is left as it was.
        batches: rows of training text, of which at most this many tokens are taken, but at least one row.
        num_experts_alone: as `serve_alone` takes it.
        served: called with the number of tokens of each batch, after it.

    Raises ValueError where there are none.
    """
    layers = sparse_layers(source, MixtureOfTokens)
    seen: dict[int, tuple[list[Tensor], list[Tensor]]] = {i: ([], []) for i, _ in layers}

    def note(i: int) -> Any:
        def hook(module, args, output):
            seen[i][0].append(args[0].flatten(0, 1))
            seen[i][1].append(output.flatten(0, 1))

        return hook

    handles = [layer.register_forward_hook(note(i)) for i, layer in layers]
    count = 0
    try:
        with serving_alone(source, num_experts_alone), evaluating(source):
            for batch in batches:
                length = batch["input_ids"].shape[1]
                rows = batch["input_ids"].to(source.device)[: max(1, (tokens - count) // length)]
                source(rows, logits_to_keep=1, use_cache=False)
                count += rows.numel()
                served(rows.numel())
                if count + length > tokens:
                    break  # before the next batch is taken, which may be another call's
    finally:
        for handle in handles:
            handle.remove()
    if not count:
        raise ValueError("the training text has no group of different texts: there is too little to fit the switch to")
    found: Branches = {}
    while seen:  # one layer's stand in memory twice, not all
        i, (x, y) = seen.popitem()
        found[i] = torch.cat(x), torch.cat(y)
    return found


def alone_bias(source: MixtureOfTokens) -> Tensor:
    """b (E,) in the formula above."""
    return source.companion_logit + math.log(max(1, source.group_size - 1))


def router_bias(source: MixtureOfTokens, target: TokenChoice) -> Tensor:
    """What to subtract from the logits (E,) that the target turns into gates; a softmax ignores a common part."""
    return alone_bias(source) if isinstance(target, SigmoidChoice) else source.companion_logit


def constant_direction(x_SD: Tensor) -> Tensor:
    """u (D,) with x . u about 1 for every x, so that -b u in a router's row is a bias of -b."""
    second_DD = x_SD.double().T @ x_SD.double() / len(x_SD)
    ridge_DD = 1e-6 * second_DD.diagonal().mean() * torch.eye(len(second_DD), device=x_SD.device)
    return torch.linalg.solve(second_DD + ridge_DD, x_SD.double().mean(0)).to(x_SD.dtype)


@torch.no_grad()
def distance(layer: TokenChoice, x_SD: Tensor, y_SD: Tensor) -> float:
    """Of a layer's output from y, as a share of the size of y."""
    layer.eval()
    parts = zip(x_SD.split(AT_ONCE), y_SD.split(AT_ONCE), strict=True)
    return float(sum((layer(x[None])[0] - y).square().sum() for x, y in parts) / y_SD.square().sum()) ** 0.5


def rescale_moments(optimizer: torch.optim.Optimizer, names: dict[int, str], scales: Scales) -> None:
    """Rescale Adam's moments of weights that were multiplied by s: their gradients are divided by s.

    Args:
        names: a parameter's name by its `id`.
    """
    for parameter, state in optimizer.state.items():
        scale = scales.get(names[id(parameter)])
        if scale is not None:
            for name, power in {"exp_avg": 1, "exp_avg_sq": 2}.items():
                state[name] /= scale**power
