"""A fit of scalars to the branch of a Mixture of Tokens served alone, folded into the weights of Token Choice.

    router    beta * (c_e - b_e u)     u is the direction in which every x has about 1, so b_e is e's bias; it starts at
                                       its companions' logit. beta is an inverse temperature
    experts   s_e * FFN_e(a_e * x)     folded into gate_up_proj (or up_proj) and down_proj

The architecture stays plain, and Adam's moments can be rescaled with the weights. It takes seconds. Where
`distil.py` leaves nothing of the jump, it leaves a fifth to a third; after long training nearly half.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.func import functional_call
from tqdm import tqdm

from mixture_of_tokens.convert.switch import (
    Errors,
    Fit,
    Scales,
    branches,
    constant_direction,
    distance,
    router_bias,
    sparse_layers,
)
from mixture_of_tokens.layers import MixtureOfTokens
from mixture_of_tokens.model.modeling import MixtureOfTokensForCausalLM
from mixture_of_tokens.sparse import TokenChoice

TOKENS = 16_384  # to fit a layer on, at most
STEPS = 400  # of Adam, for each layer
# Adam's rates, falling to zero. At a higher rate routers drift to a few experts, and fit worse than their first biases.
SCALE_RATE, ROUTER_RATE = 0.1, 0.01


def fit_scales(
    source: MixtureOfTokensForCausalLM,
    target: MixtureOfTokensForCausalLM,
    batches: Iterable[dict[str, Tensor]],
    scales: Scales,
    *,
    steps: int = STEPS,
) -> Errors:
    """Fit the layers of a model just switched to those of its source, whose companions are calibrated.

    Args:
        batches: rows of training text; some 16,000 tokens are used.
        scales: of `to_token_choice`; they are multiplied by the factors folded in.
        steps: of Adam, for each layer.

    Returns, by layer, the distance from the source's output as a share of its size, before and after.
    """
    what = {"desc": "Serving the source alone", "total": TOKENS, "unit": "token"}
    with tqdm(**what, delay=2, leave=False, dynamic_ncols=True) as served:
        seen = branches(source, batches, TOKENS, None, served.update)
    errors = {}
    layers, mixing = sparse_layers(target, TokenChoice), dict(sparse_layers(source, MixtureOfTokens))
    bar = tqdm(desc="Fitting routers and scales", total=len(layers) * steps, unit="step", delay=2, dynamic_ncols=True)
    for i, layer in layers:
        x_SD, y_SD = seen[i]
        bias_E = router_bias(mixing[i], layer)
        before = {name: weight.detach().clone() for name, weight in layer.named_parameters()}
        error = distance(layer, x_SD, y_SD)
        after, folded = _fit(layer, before, bias_E, x_SD, y_SD, steps, bar)
        with torch.no_grad():
            for name, weight in after.items():
                layer.get_parameter(name).copy_(weight)
            errors[str(i)] = (error, distance(layer, x_SD, y_SD))
        for name, scale in folded.items():
            full = f"model.layers.{i}.mlp.{name}"
            scales[full] = scales.get(full, torch.ones(())) * scale
    bar.close()
    return errors


def _fit(
    layer: nn.Module, before: dict[str, Tensor], bias_E: Tensor, x_SD: Tensor, y_SD: Tensor, steps: int, bar: tqdm
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The layer's weights with the scalars folded in, and what they were multiplied by."""
    u_D = constant_direction(x_SD)
    first = next(name for name in before if name.endswith("up_proj"))
    free = {name: torch.zeros_like(bias_E) for name in ("log_a", "log_s")}
    free |= {"bias": bias_E.clone(), "log_beta": torch.zeros_like(bias_E[0])}
    for value in free.values():
        value.requires_grad_()

    def folded() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        beta, a_E, s_E = free["log_beta"].exp(), free["log_a"].exp(), free["log_s"].exp()
        scales = {"gate.weight": beta, first: a_E[:, None, None], "experts.down_proj": s_E[:, None, None]}
        biased_ED = before["gate.weight"] - free["bias"][:, None] * u_D
        folded = {name: (biased_ED if name == "gate.weight" else before[name]) * s for name, s in scales.items()}
        return {name: weight.to(before[name].dtype) for name, weight in folded.items()}, scales

    slow = {"params": [free["bias"], free["log_beta"]], "lr": ROUTER_RATE}
    groups = [{"params": [free["log_a"], free["log_s"]], "lr": SCALE_RATE}, slow]
    layer.eval()
    fit = Fit(lambda x: functional_call(layer, folded()[0], (x[None],))[0], groups, steps)
    for _ in fit.advance(x_SD, y_SD, steps):
        bar.update()
    with torch.no_grad():
        weights, scales = folded()
    return {name: weight.detach() for name, weight in weights.items()}, {n: s.detach() for n, s in scales.items()}
