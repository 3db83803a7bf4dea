"""Every routing under test, by name and small, with sizes that all differ so that no transpose can hide."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mixture_of_tokens.layers.experts import Routed
from mixture_of_tokens.layers.mixture import MixtureOfTokens
from mixture_of_tokens.layers.soft import SoftMoE
from mixture_of_tokens.layers.thresholds import ExpertThreshold, ReMoE
from mixture_of_tokens.layers.token_choice import DefaultMoE, ExpertChoice, SigmoidChoice, TokenChoice
from mixture_of_tokens.models.config import MixtureOfTokensConfig
from mixture_of_tokens.models.modeling import MixtureOfTokensForCausalLM

B, G, E, T, D, F = 6, 3, 5, 4, 8, 7

Routings = dict[str, Callable[..., Routed]]
tc = partial(TokenChoice, hidden_size=D, expert_size=F, num_experts=E)
stc = partial(SigmoidChoice, hidden_size=D, expert_size=F, num_experts=E)
ec = partial(ExpertChoice, group_size=G, **tc.keywords)
mot = partial(MixtureOfTokens, group_size=G, **tc.keywords)

MIXTURES: Routings = {
    "mot": mot,
    "mot_normalized": partial(mot, normalize_mixture=True),
    "mot_learnable_temperature": partial(mot, learnable_temperature=True),
    "uniform": partial(mot, uniform=True),
}
EXPERT_CHOICES: Routings = {"ec_takes_1": ec, "ec_takes_2": partial(ec, num_experts_per_tok=3)}
GROUPED: Routings = MIXTURES | EXPERT_CHOICES
DROPLESS: Routings = {
    "tc_top1": partial(tc, capacity_factor=None),
    "tc_top2": partial(tc, num_experts_per_tok=2, capacity_factor=None),
    "tc_top2_norm": partial(tc, num_experts_per_tok=2, norm_topk_prob=True, capacity_factor=None),
    "stc_top1": stc,
    "stc_top2": partial(stc, num_experts_per_tok=2),
    "stc_top2_norm": partial(stc, num_experts_per_tok=2, norm_topk_prob=True),
    "default_top1": partial(DefaultMoE, **tc.keywords),
    "default_top2": partial(DefaultMoE, num_experts_per_tok=2, **tc.keywords),
}
# Private too; how many experts a token gets varies, and may be none.
THRESHOLDS: Routings = {
    "et_top1": partial(ExpertThreshold, **tc.keywords),
    "et_top2": partial(ExpertThreshold, num_experts_per_tok=2, **tc.keywords),
    "et_sigmoid": partial(ExpertThreshold, scores="sigmoid", **tc.keywords),
    "remoe_top1": partial(ReMoE, **tc.keywords),
}
DROPPING: Routings = {
    "tc_top1_dropping": partial(tc, capacity_factor=0.5),
    "tc_top2_dropping": partial(tc, num_experts_per_tok=2, capacity_factor=0.75),
}
CAUSAL: Routings = GROUPED | DROPLESS | THRESHOLDS | DROPPING
SOFT: Routings = {"soft": partial(SoftMoE, **tc.keywords), "soft_2_slots": partial(SoftMoE, num_slots=2, **tc.keywords)}
ROUTINGS: Routings = CAUSAL | SOFT


STATE = ("companion", "bias", "threshold", "default_output")  # of buffers that decide what a layer gives


def build(name: str, seed: int = 0, dtype: torch.dtype = torch.float64, **options) -> Any:
    """The routing with weights large enough that its choices are clear and its softmaxes far from uniform."""
    layer = ROUTINGS[name](**({"temperature": 0.75} | options))
    return randomized(layer, seed).to(dtype)


def randomized(layer: nn.Module, seed: int = 0) -> Any:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        kept = [tensor for name, tensor in layer.named_buffers() if any(word in name for word in STATE)]
        for tensor in (*layer.parameters(), *kept):
            tensor.copy_(0.5 * torch.randn(tensor.shape, generator=generator, dtype=torch.float64))
        if getattr(layer, "competing", False):  # whose scores are logarithms of shares
            layer.threshold -= 2  # pyright: ignore
    return layer


def tiny(kind: str, **fields) -> MixtureOfTokensForCausalLM:
    """A dense block and two of this kind, with weights as at the first step of training, but spread more widely."""
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 97,
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "num_experts": 5,
        "moe_intermediate_size": 16,
        "group_size": 3,
        "max_position_embeddings": 64,
        "mlp_layer_types": ["dense", kind, kind],
        "initializer_scale": 1.0,
    }
    return MixtureOfTokensForCausalLM(MixtureOfTokensConfig(**(sizes | fields))).eval()


def small_model(kind: str, **options) -> MixtureOfTokensForCausalLM:
    """A dense block and one of this kind, with weights as `randomized` gives them."""
    sizes = {"vocab_size": 37, "hidden_size": 16, "intermediate_size": 20, "moe_intermediate_size": 12}
    heads = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    layout = {"num_experts": 6, "group_size": 3, "mlp_layer_types": ["dense", kind]}
    return randomized(MixtureOfTokensForCausalLM(MixtureOfTokensConfig(**sizes, **heads, **layout, **options))).eval()


def tokens(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*(shape or (B, T, D)), generator=generator, dtype=torch.float64).to(dtype)


def some_mask(*shape: int, seed: int = 2) -> Tensor:
    """About two thirds real; the first group is all masked at the first position and all real at the last."""
    mask = torch.rand(*(shape or (B, T)), generator=torch.Generator().manual_seed(seed)) > 0.35
    mask[:G, 0], mask[:G, -1] = False, True
    return mask


def gradients(layer: nn.Module, x: Tensor, mask: Tensor | None, cotangent: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The output and the gradient of the input ("x") and of every parameter."""
    leaves = {"x": x.detach().requires_grad_(), **dict(layer.named_parameters())}
    y = layer(leaves["x"], mask)
    found = torch.autograd.grad(y, list(leaves.values()), cotangent.to(y.dtype))
    return y.detach(), dict(zip(leaves, found, strict=True))


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of what is expected."""
    actual, expected = actual.detach().double(), expected.detach().double()
    return ((actual - expected).norm() / expected.norm()).item()


class Faulty(nn.Module):
    """A layer with a fault: `fault(layer, x, mask)` instead of `layer(x, mask)`."""

    def __init__(self, layer: nn.Module, fault):
        super().__init__()
        self.layer, self.fault = layer, fault

    def forward(self, x: Tensor, token_mask: Tensor | None = None) -> Tensor:
        return self.fault(self.layer, x, token_mask)
