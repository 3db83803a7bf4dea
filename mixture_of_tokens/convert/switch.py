"""From Mixture of Tokens to Token Choice with the same weights, and a fit that makes the loss jump less.

Experts and router carry over one to one (Antoniak et al., transition tuning). What changes is the softmax. A softmax
over the group ignores a constant offset in an expert's logits; a softmax over experts routes by it. Experts now read
single tokens, and only the top k answer, weighted by their probabilities. So the loss jumps, and training has to bring
it down again.

`calibrate` takes away a part of the jump before the first step. Layer by layer it fits scalars to the output of the
Mixture of Tokens for a token alone, beside each expert's typical companions:

    router    beta * (c_e - b_e u)     u is the direction in which every x has about 1, so b_e is e's bias; it starts at
                                       its companions' logit. beta is an inverse temperature
    experts   s_e * FFN_e(a_e * x)     folded into gate_up_proj (or up_proj) and down_proj

All are folded into the weights, so that the architecture stays plain. Adam's moments are rescaled with the weights.
"""

import copy
from collections.abc import Iterable
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call
from tqdm import tqdm

from mixture_of_tokens.layers import MixtureOfTokens
from mixture_of_tokens.model.config import MixtureOfTokensConfig
from mixture_of_tokens.model.modeling import MixtureOfTokensForCausalLM
from mixture_of_tokens.model.routings import MIXTURE
from mixture_of_tokens.sparse import TokenChoice

TOKENS = 16_384  # to fit a layer on, at most
STEPS, STEP_TOKENS = 400, 2048
# Adam's rates, falling to zero. At a higher rate routers drift to a few experts, and fit worse than their first biases.
SCALE_RATE, ROUTER_RATE = 0.1, 0.01

Layer = TypeVar("Layer", MixtureOfTokens, TokenChoice)
# By a weight's name, what it has been multiplied by; 1 where a name is missing.
Scales = dict[str, Tensor]


def token_choice_config(
    config: MixtureOfTokensConfig, *, top_k: int | None = None, capacity_factor: float | None = None
) -> MixtureOfTokensConfig:
    """The configuration after the switch. Top k is the granularity by default: equal FLOPs.

    Raises ValueError where there is no Mixture of Tokens with a router, or for an impossible k.
    """
    kinds = {routing.kind for routing in config.sparse_routings}
    if kinds != {MIXTURE.kind}:
        found = ", ".join(sorted(kinds)) or "dense blocks alone"
        raise ValueError(f"only a Mixture of Tokens with a router can become Token Choice; this model has {found}")
    top_k = config.num_experts_per_tok if top_k is None else top_k
    if not 1 <= top_k <= config.num_experts:
        raise ValueError(f"--top-k must be 1 to {config.num_experts}, the number of experts, not {top_k}")
    changed = copy.deepcopy(config)
    changed.mlp_layer_types = [routing.converts_to or routing.kind for routing in config.routings]
    changed.num_experts_per_tok, changed.capacity_factor = top_k, capacity_factor
    changed.router_temperature, changed.learnable_temperature, changed.normalize_mixture = 1.0, False, False
    return changed


@torch.no_grad()
def to_token_choice(source: MixtureOfTokensForCausalLM, target: MixtureOfTokensForCausalLM) -> Scales:
    """Copy a Mixture of Tokens' weights to a model of `token_choice_config`, temperatures folded into the routers."""
    scales: Scales = {}
    named = source.named_parameters(remove_duplicate=False)  # both names of tied embeddings
    weights = {name: value.clone() for name, value in named if "log_temperature" not in name}
    for i, layer in _layers(source, MixtureOfTokens):
        name = f"model.layers.{i}.mlp.gate.weight"
        assert layer.gate is not None  # `token_choice_config` refuses uniform mixing
        scales[name] = 1 / layer.gate.temperature.detach()
        weights[name] *= scales[name]
    target.load_state_dict(weights)
    return scales


def calibrate(
    source: MixtureOfTokensForCausalLM,
    target: MixtureOfTokensForCausalLM,
    batches: Iterable[dict[str, Tensor]],
    scales: Scales,
    *,
    steps: int = STEPS,
) -> dict[str, tuple[float, float]]:
    """Fit the layers of a model just switched to those of its source, whose companions are calibrated.

    Args:
        batches: rows of training text; some 16,000 tokens are used.
        scales: of `to_token_choice`; they are multiplied by the factors folded in.
        steps: of Adam, for each layer.

    Returns, by layer, the distance from the source's output as a share of its size, before and after.
    """
    seen = _branches(source, batches)
    errors = {}
    layers = _layers(target, TokenChoice)
    bar = tqdm(desc="Fitting routers and scales", total=len(layers) * steps, unit="step", delay=2, dynamic_ncols=True)
    for i, layer in layers:
        x_SD, y_SD = seen[i]
        bias_E = source.get_submodule(f"model.layers.{i}.mlp").get_buffer("companion_logit")
        before = {name: weight.detach().clone() for name, weight in layer.named_parameters()}
        with torch.no_grad():
            error = _distance(layer, before, x_SD, y_SD)
        after, folded = _fit(layer, before, bias_E, x_SD, y_SD, steps, bar)
        with torch.no_grad():
            errors[str(i)] = (error, _distance(layer, after, x_SD, y_SD))
            for name, weight in after.items():
                layer.get_parameter(name).copy_(weight)
        for name, scale in folded.items():
            full = f"model.layers.{i}.mlp.{name}"
            scales[full] = scales.get(full, torch.ones(())) * scale
    bar.close()
    return errors


def _layers(model: MixtureOfTokensForCausalLM, kind: type[Layer]) -> list[tuple[int, Layer]]:
    return [(i, block.mlp) for i, block in enumerate(model.model.layers) if isinstance(block.mlp, kind)]


@torch.no_grad()
def _branches(source: MixtureOfTokensForCausalLM, batches: Iterable[dict[str, Tensor]]) -> dict[int, list[Tensor]]:
    """Input x and output y (S, D) of every sparse layer, each row served alone."""
    seen: dict[int, list[list[Tensor]]] = {i: [[], []] for i, _ in _layers(source, MixtureOfTokens)}

    def note(i: int):
        def hook(module, args, output):
            seen[i][0].append(args[0].flatten(0, 1))
            seen[i][1].append(output.flatten(0, 1))

        return hook

    handles = [layer.register_forward_hook(note(i)) for i, layer in _layers(source, MixtureOfTokens)]
    training, count = source.training, 0
    source.eval().serve_alone()
    try:
        for batch in batches:
            rows = batch["input_ids"].to(source.device)[: max(1, (TOKENS - count) // batch["input_ids"].shape[1])]
            source(rows, logits_to_keep=1, use_cache=False)
            count += rows.numel()
            if count >= TOKENS:
                break
    finally:
        source.train(training).serve_alone(False)
        for handle in handles:
            handle.remove()
    return {i: [torch.cat(parts) for parts in pair] for i, pair in seen.items()}


def _distance(layer: nn.Module, weights: dict[str, Tensor], x_SD: Tensor, y_SD: Tensor) -> float:
    return float((_call(layer, weights, x_SD) - y_SD).norm() / y_SD.norm())


def _call(layer: nn.Module, weights: dict[str, Tensor], x_SD: Tensor) -> Tensor:
    return functional_call(layer.eval(), weights, (x_SD[None],))[0]


def _fit(
    layer: nn.Module, before: dict[str, Tensor], bias_E: Tensor, x_SD: Tensor, y_SD: Tensor, steps: int, bar: tqdm
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The layer's weights with the scalars folded in, and what they were multiplied by."""
    second_DD = x_SD.double().T @ x_SD.double() / len(x_SD)
    ridge_DD = 1e-6 * second_DD.diagonal().mean() * torch.eye(len(second_DD), device=x_SD.device)
    u_D = torch.linalg.solve(second_DD + ridge_DD, x_SD.double().mean(0)).to(x_SD.dtype)
    first = next(name for name in before if name.endswith("up_proj"))
    free = {name: torch.zeros_like(bias_E) for name in ("log_a", "log_s")}
    free |= {"bias": bias_E.clone(), "log_beta": torch.zeros_like(bias_E[0])}
    for value in free.values():
        value.requires_grad_()

    def folded() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        beta, a_E, s_E = free["log_beta"].exp(), free["log_a"].exp(), free["log_s"].exp()
        scales = {"gate.weight": beta, first: a_E[:, None, None], "experts.down_proj": s_E[:, None, None]}
        biased_ED = before["gate.weight"] - free["bias"][:, None] * u_D
        return {name: (biased_ED if name == "gate.weight" else before[name]) * s for name, s in scales.items()}, scales

    generator = torch.Generator().manual_seed(0)
    slow = {"params": [free["bias"], free["log_beta"]], "lr": ROUTER_RATE}
    adam = torch.optim.Adam([{"params": [free["log_a"], free["log_s"]], "lr": SCALE_RATE}, slow])
    schedule = torch.optim.lr_scheduler.LinearLR(adam, 1.0, 0.0, total_iters=steps)
    for _ in range(steps):
        rows = torch.randint(len(x_SD), (min(STEP_TOKENS, len(x_SD)),), generator=generator).to(x_SD.device)
        error = (_call(layer, folded()[0], x_SD[rows]) - y_SD[rows]).square().sum() / y_SD[rows].square().sum()
        adam.zero_grad()
        error.backward()
        adam.step()
        schedule.step()
        bar.update()
    with torch.no_grad():
        weights, scales = folded()
    return {name: weight.detach() for name, weight in weights.items()}, {n: s.detach() for n, s in scales.items()}


def rescale_moments(optimizer: torch.optim.Optimizer, names: dict[int, str], scales: Scales) -> None:
    """Rescale Adam's moments of weights that were multiplied by s: their gradients are divided by s.

    Args:
        names: a parameter's name by its `id`.
    """
    for parameter, state in optimizer.state.items():
        scale = scales.get(names[id(parameter)])
        if scale is not None:
            state["exp_avg"] /= scale.to(state["exp_avg"])
            state["exp_avg_sq"] /= scale.to(state["exp_avg_sq"]) ** 2
