"""What `layer.py` measures: one feed-forward layer of each kind, ready to run forward and forward + backward."""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from mixture_of_tokens.layers.mixture import MixtureOfTokens
from mixture_of_tokens.layers.token_choice import ExpertChoice, TokenChoice
from mixture_of_tokens.models.config import MixtureOfTokensConfig
from mixture_of_tokens.models.feed_forwards import dense_feed_forward


@dataclass(frozen=True)
class Sizes:
    feed_forward: str  # plain or gated
    hidden: int
    intermediate: int
    group_size: int
    tokens: int
    context: int

    @property
    def gated(self) -> bool:
        return self.feed_forward == "gated"

    @property
    def activation(self) -> str:
        return "silu" if self.gated else "relu"

    @property
    def options(self) -> dict:
        return {"gated": self.gated, "activation": self.activation}


@dataclass(frozen=True)
class Provider:
    forward: Callable[[], object]
    forward_backward: Callable[[], object]
    reset: Callable[[], object] = lambda: None  # of the gradients


class Literal(nn.Module):
    """The equations of `MixtureOfTokens`, computed literally. Router and activation are the layer's own."""

    def __init__(self, layer: MixtureOfTokens):
        super().__init__()
        self.layer = layer

    def forward(self, x_BTD: Tensor) -> Tensor:
        layer, T = self.layer, x_BTD.shape[1]
        assert layer.gate is not None
        x_MGD = x_BTD.unflatten(0, (-1, layer.group_size)).transpose(1, 2).flatten(0, 1)
        weights_MGE = layer.gate(x_MGD).softmax(dim=1).to(x_BTD.dtype)
        mixtures_EMD = torch.einsum("mge,mgd->emd", weights_MGE, x_MGD)
        outputs_EMD = layer.experts(mixtures_EMD, linear=lambda x, weight: torch.bmm(x, weight.mT))
        y_MGD = torch.einsum("mge,emd->mgd", weights_MGE, outputs_EMD)
        return y_MGD.unflatten(0, (-1, T)).transpose(1, 2).flatten(0, 1)


def dense(sizes: Sizes) -> nn.Module:
    config = MixtureOfTokensConfig(
        hidden_size=sizes.hidden, intermediate_size=sizes.intermediate, gated=sizes.gated, hidden_act=sizes.activation
    )
    return dense_feed_forward(config)


def mot(sizes: Sizes, granularity: int) -> MixtureOfTokens:
    shape = (sizes.hidden, sizes.intermediate, sizes.group_size)
    return MixtureOfTokens.matched(*shape, granularity, **sizes.options)


def token_choice(sizes: Sizes, capacity_factor: float | None) -> nn.Module:
    shape = (sizes.hidden, sizes.intermediate, sizes.group_size)
    return TokenChoice(*shape, capacity_factor=capacity_factor, **sizes.options)


def expert_choice(sizes: Sizes) -> nn.Module:
    return ExpertChoice(sizes.hidden, sizes.intermediate, sizes.group_size, sizes.group_size, **sizes.options)


def qwen3_width(sizes: Sizes) -> int:
    """Of gated experts with the FLOPs of the plain ones: 2/3, rounded to a multiple of 32 as the model sizes are."""
    return sizes.intermediate if sizes.gated else max(1, round(sizes.intermediate / 48)) * 32


def qwen3(sizes: Sizes, implementation: str) -> nn.Module:
    config = Qwen3MoeConfig(
        hidden_size=sizes.hidden,
        moe_intermediate_size=qwen3_width(sizes),
        num_experts=sizes.group_size,
        num_experts_per_tok=1,
    )
    config._experts_implementation = implementation
    return Qwen3MoeSparseMoeBlock(config)


LAYERS: dict[str, Callable[[Sizes], nn.Module]] = {
    "dense": dense,
    "mot/1": lambda sizes: mot(sizes, 1),
    "mot/8": lambda sizes: mot(sizes, 8),
    "mot/16": lambda sizes: mot(sizes, 16),
    "token_choice": lambda sizes: token_choice(sizes, 1.25),
    "token_choice_dropless": lambda sizes: token_choice(sizes, None),
    "expert_choice": expert_choice,
    "qwen3_eager": lambda sizes: qwen3(sizes, "eager"),
    "qwen3_grouped_mm": lambda sizes: qwen3(sizes, "grouped_mm"),
    "literal/1": lambda sizes: Literal(mot(sizes, 1)),
    "literal/8": lambda sizes: Literal(mot(sizes, 8)),
    "literal/16": lambda sizes: Literal(mot(sizes, 16)),
}
FLOORS = ("matmuls/1", "matmuls/8", "matmuls/16")


def granularity(name: str) -> int:
    return int(name.partition("/")[2] or 1)


def matmuls(sizes: Sizes, granularity: int, dtype: torch.dtype, device: str) -> Provider:
    """The matrix products of `mot`, every operand contiguous and of its own, every result into an existing buffer.

    Tensors of one shape are one tensor; no operand is a result.
    """
    S, D, G, F = sizes.tokens, sizes.hidden, sizes.group_size, sizes.intermediate // granularity
    M, E = S // G, G * granularity
    forward = [  # batch, rows, inner, columns
        ((), S, D, E),  # router
        ((M,), E, G, D),  # dispatch
        ((E,), M, D, 2 * F if sizes.gated else F),  # up
        ((E,), M, F, D),  # down
        ((M,), G, E, D),  # combine
    ]
    backward = [product for batch, n, k, m in forward for product in ((batch, n, m, k), (batch, k, n, m))]
    operand = functools.cache(lambda *shape: torch.randn(shape, dtype=dtype, device=device))
    result = functools.cache(lambda *shape: torch.empty(shape, dtype=dtype, device=device))

    def prepared(products):
        calls = [(operand(*b, n, k), operand(*b, k, m), result(*b, n, m)) for b, n, k, m in products]

        def run():
            for left, right, out in calls:
                (torch.mm if left.dim() == 2 else torch.bmm)(left, right, out=out)

        return run

    return Provider(prepared(forward), prepared(forward + backward))


def build(name: str, sizes: Sizes, dtype: torch.dtype, device: str) -> Provider:
    torch.manual_seed(0)
    if name in FLOORS:
        return matmuls(sizes, granularity(name), dtype, device)
    # Not the layers' own initialisation: truncated normals take minutes here, and memory that would be measured.
    with torch.device("meta"):
        layer = LAYERS[name](sizes).to(dtype)
    layer.to_empty(device=device)
    for weight in layer.parameters():
        nn.init.normal_(weight, std=(0.1 / weight.shape[-1]) ** 0.5)
    x = torch.randn(sizes.tokens // sizes.context, sizes.context, sizes.hidden, dtype=dtype, device=device)
    x.requires_grad_()
    cotangent = torch.randn_like(x)

    def reset():
        layer.zero_grad()
        x.grad = None

    return Provider(torch.no_grad()(lambda: layer(x)), lambda: layer(x).backward(cotangent), reset)
