"""Mixture of Tokens.

The layer (Antoniak et al., arXiv 2310.15961). A group is the G tokens x_1 .. x_G that stand at one position of
G different examples. With a linear router c and experts FFN_1 .. FFN_E, for every group:

    logit[g, e] = (x_g . c_e) / temperature
    w[g, e]     = exp(logit[g, e]) / sum_h exp(logit[h, e])     softmax over the group, one for each expert
    mix[e]      = sum_g w[g, e] * x_g                           what expert e reads
    y[e]        = FFN_e(mix[e])
    out[g]      = sum_e w[g, e] * y[e]                          returned to the tokens with the same weights

Shape letters, carried by names as a suffix (`x_BTD`):

    B examples, T positions, D hidden size, G group size, M groups = ceil(B / G) * T, E experts, F expert width,
    R rows an expert reads, K experts a token chooses, C tokens an expert chooses in a group,
    S tokens = B * T, A assignments of a token to an expert, S * K where each token chooses K

Weights: the router's `gate.weight` (E, D); gated experts `experts.gate_up_proj` (E, 2F, D) and `experts.down_proj`
(E, D, F); plain experts `experts.up_proj` (E, F, D) and `experts.down_proj` (E, D, F). There are no biases.

Every layer is called as `y = layer(x, token_mask=None)` with x and y (B, T, D) and the mask (B, T), true where a token
is real. Examples in consecutive rows form a group: rows 0 .. G-1, G .. 2G-1 and so on. They must be independent texts;
otherwise one may contain another's future. Masked values, NaN included, affect no output and no gradient.

Beyond the paper: masked and incomplete groups, in which each expert's companion (see `MixtureOfTokens`) replaces every
missing token; the option `normalize_mixture`; a softmax in fp32 or better, whatever the input's precision.
"""

from typing import Any, Unpack

import torch
from torch import Tensor, nn

from mixture_of_tokens.checks import check, divisors
from mixture_of_tokens.experts import Routed, RoutedOptions, at_least_fp32, highest, softmax
from mixture_of_tokens.layout import check_shapes, combine, dispatch, grouped, ungrouped
from mixture_of_tokens.slots import dropless

# Tokens served alone by all experts at a time. Each has E mixtures, which a CPU's cache is to hold and a GPU's memory;
# the GPU's number is no measured one.
ALONE_AT_ONCE = {"cpu": 64, "cuda": 1024}


class MixtureOfTokens(Routed):
    """The layer of the module's docstring, for any batch, group size, number and width of experts.

    In a group with n < G real tokens, expert e gets for each of the G - n missing tokens the token `companion[e]` with
    the logit `companion_logit[e]`. Both are initialised to 0, so missing tokens are zeros. `calibrate_companions` sets
    them to the expert's averages over full groups; a token alone is then predicted about as well as in a full group.

    Served alone (`serve_alone`), every token forms a group with G - 1 companions, and no row of a batch influences
    another.

    Args beyond those of `Routed`:
        group_size: G. Per token, experts cost the FLOPs of a dense feed-forward of width E * F / G; see `matched`.
        normalize_mixture: divide a mixture by the 2-norm of its weights. A mean of n tokens is up to sqrt(n) times
            smaller than one token; with the division, an expert's inputs have one scale for any number of tokens.
        uniform: the paper's ablation (Fig. 4): every weight is 1 / G and there is no router.
    """

    companion: Tensor
    companion_logit: Tensor
    companion_output: Any  # a tensor, where few experts run for a token alone
    alone_at_once: int | None = None  # tokens served alone at a time, by default of the device

    def __init__(
        self,
        hidden_size: int,
        expert_size: int,
        num_experts: int,
        group_size: int,
        *,
        normalize_mixture: bool = False,
        uniform: bool = False,
        **options: Unpack[RoutedOptions],
    ):
        check("group_size", group_size, int)
        check("normalize_mixture", normalize_mixture, bool)
        check("uniform", uniform, bool)
        if group_size < 1:
            raise ValueError(f"group_size must be at least 1, not {group_size}")
        super().__init__(hidden_size, expert_size, num_experts, **options)
        self.group_size, self.normalize_mixture = group_size, normalize_mixture
        self.alone, self.num_experts_alone = False, num_experts
        if uniform:
            self.gate = None  # pyright: ignore[reportAttributeAccessIssue]
        self.register_buffer("companion", torch.zeros(num_experts, hidden_size, dtype=at_least_fp32()))
        self.register_buffer("companion_logit", torch.zeros(num_experts, dtype=at_least_fp32()))
        self.register_buffer("companion_output", None, persistent=False)
        self.register_load_state_dict_post_hook(_with_its_companions_output)

    def reset_state(self) -> None:
        nn.init.zeros_(self.companion)
        nn.init.zeros_(self.companion_logit)

    def extra_repr(self) -> str:
        return f"group_size={self.group_size}, normalize_mixture={self.normalize_mixture}"

    @classmethod
    def matched(
        cls,
        hidden_size: int,
        intermediate_size: int,
        group_size: int,
        granularity: int = 1,
        *,
        normalize_mixture: bool = False,
        uniform: bool = False,
        **options: Unpack[RoutedOptions],
    ) -> "MixtureOfTokens":
        """The layer with the FLOPs of a dense feed-forward of width `intermediate_size` and G times its parameters.

        E = G * k experts of width intermediate_size / k, where k is the granularity.
        """
        check("intermediate_size", intermediate_size, int)
        check("granularity", granularity, int)
        if granularity < 1 or intermediate_size % granularity:
            legal = divisors(intermediate_size)
            raise ValueError(f"granularity {granularity} does not divide {intermediate_size=}; legal are {legal}")
        return cls(
            hidden_size,
            intermediate_size // granularity,
            group_size * granularity,
            group_size,
            normalize_mixture=normalize_mixture,
            uniform=uniform,
            **options,
        )

    def logits(self, x_MGD: Tensor) -> Tensor:
        """The router's logits (M, G, E); zeros for uniform mixing."""
        return x_MGD.new_zeros(*x_MGD.shape[:2], self.num_experts) if self.gate is None else self.gate(x_MGD)

    def weights(self, x_MGD: Tensor, mask_MG1: Tensor | None = None, missing_M11: Tensor | None = None) -> Tensor:
        """w (M, G, E). Where tokens are missing, weights sum to less than one; companions hold the remainder."""
        logits_MGE = self.logits(x_MGD)
        if mask_MG1 is not None:  # the lowest finite number, not -inf: a group without real tokens must not become NaN
            logits_MGE = logits_MGE.masked_fill(~mask_MG1, torch.finfo(logits_MGE.dtype).min)
        if missing_M11 is not None:  # one more row for all missing tokens; -inf where none is missing
            companions_M1E = (self.companion_logit + missing_M11.log()).to(logits_MGE.dtype)
            logits_MGE = torch.cat([logits_MGE, companions_M1E], dim=1)
        weights_MGE = softmax(logits_MGE, dim=1)
        return weights_MGE if missing_M11 is None else weights_MGE[:, :-1]

    @torch.no_grad()
    def serve_alone(self, alone: bool = True, num_experts_alone: int | None = None) -> None:
        """Compute each token by itself from here on, or in its group again.

        By default every expert runs for every token, at G times the FLOPs. With `num_experts_alone` only those of the
        token's K largest weights do; the others give it what they give their companion, which is computed here, once:

            out[t] = sum_e w[t, e] * FFN_e(w[t, e] * x_t + (1 - w[t, e]) * companion[e])     for e in t's top K
                   + sum_e w[t, e] * FFN_e(companion[e])                                     for all other e

        (with `normalize_mixture` both mixtures are divided by their norms). An expert of weight w is off by about w
        squared, so with K = k, the granularity, where experts cost what a dense feed-forward does, the output is nearly
        the same. What companions get is a constant without a gradient, of the weights as they are now, or as they are
        loaded into this layer or a module that holds it; call this again when they are changed otherwise.

        Raises ValueError for a number of experts that there is not, and for few of them where all weights are the same
        or texts are not served alone.
        """
        few = self.num_experts if num_experts_alone is None else num_experts_alone
        if not isinstance(alone, bool):
            raise ValueError(f"serve_alone takes True or False, not {alone!r}; experts are num_experts_alone={alone!r}")
        if isinstance(few, bool) or not isinstance(few, int) or not 1 <= few <= self.num_experts:
            raise ValueError(f"served alone, a token can go to 1 to {self.num_experts} experts, not {few!r}")
        if not alone and few < self.num_experts:
            raise ValueError("num_experts_alone is for texts that are served alone")
        if few < self.num_experts and (self.gate is None or self.group_size == 1):
            raise ValueError("served alone, a token goes to all experts where these weigh it alike")
        self.alone, self.num_experts_alone, self.companion_output = alone, few if alone else self.num_experts, None
        if self.num_experts_alone < self.num_experts:
            mix_ED = self._beside_companions(torch.zeros_like(self.companion_logit), self.companion, self.companion)
            y_E1D = self.experts(mix_ED[:, None].to(self.experts.down_proj.dtype))
            self.companion_output = y_E1D[:, 0].to(self.companion.dtype)

    def _beside_companions(self, weight: Tensor, x: Tensor, companion: Tensor) -> Tensor:
        """Mixtures (..., D) of a token with an expert's companions, by the token's weight (...)."""
        mix = weight[..., None] * x + (1 - weight[..., None]) * companion
        if not self.normalize_mixture:
            return mix
        squares = weight.square() + (1 - weight).square() / (self.group_size - 1)
        return mix / squares.sqrt()[..., None]

    def _to_few_experts(self, x_BTD: Tensor, token_mask: Tensor | None) -> Tensor:
        """The formula of `serve_alone`."""
        check_shapes(x_BTD, token_mask)
        masked_S1 = None if token_mask is None else ~token_mask.bool().reshape(-1, 1)
        x_SD = x_BTD.flatten(0, 1) if masked_S1 is None else x_BTD.flatten(0, 1).masked_fill(masked_S1, 0)
        S, K, dtype = len(x_SD), self.num_experts_alone, torch.promote_types(x_SD.dtype, torch.float32)
        missing_S11 = x_SD.new_full((S, 1, 1), self.group_size - 1, dtype=dtype)
        weights_SE = self.weights(x_SD[:, None], None, missing_S11)[:, 0]
        weight_SK, expert_SK = highest(weights_SE, K)
        mix_SKD = self._beside_companions(weight_SK, x_SD[:, None], self.companion[expert_SK]).to(x_SD.dtype)
        each_A = torch.arange(S * K, device=x_SD.device)
        own_AD = dropless(self, mix_SKD.flatten(0, 1), each_A, expert_SK.flatten(), weight_SK.flatten())
        others_SE = weights_SE.scatter(1, expert_SK, 0)
        y_SD = own_AD.view(S, K, -1).sum(1) + others_SE @ self.companion_output.to(others_SE.dtype)
        if masked_S1 is not None:
            y_SD = y_SD.masked_fill(masked_S1, 0)
        return y_SD.view_as(x_BTD).to(x_BTD.dtype)

    def forward(self, x_BTD: Tensor, token_mask: Tensor | None = None) -> Tensor:
        if self.alone and self.companion_output is not None:
            return self._to_few_experts(x_BTD, token_mask)
        at_once = self.alone_at_once or ALONE_AT_ONCE.get(x_BTD.device.type, ALONE_AT_ONCE["cpu"])
        if self.alone and (len(x_BTD) > 1 or x_BTD.shape[1] > at_once):  # tokens as positions of one example
            mask_BT = x_BTD.new_ones(x_BTD.shape[:2], dtype=torch.bool) if token_mask is None else token_mask
            x_1SD, mask_1S = x_BTD.reshape(1, -1, x_BTD.shape[-1]), mask_BT.reshape(1, -1)
            parts = zip(x_1SD.split(at_once, dim=1), mask_1S.split(at_once, dim=1), strict=True)
            return torch.cat([self.forward(*part) for part in parts], dim=1).view_as(x_BTD)
        x_MGD, mask_MG1, missing_M11 = grouped(x_BTD, token_mask, self.group_size)
        weights_MGE = self.weights(x_MGD, mask_MG1, missing_M11)
        cast_MGE = weights_MGE.to(x_MGD.dtype)
        mixtures_EMD = dispatch(cast_MGE, x_MGD)
        rest_ME = None if missing_M11 is None else 1 - weights_MGE.sum(1)
        if rest_ME is not None:
            mixtures_EMD = mixtures_EMD + (rest_ME.T[..., None] * self.companion[:, None]).to(mixtures_EMD.dtype)
        if self.normalize_mixture:
            squares_ME = weights_MGE.square().sum(1)
            if missing_M11 is not None and rest_ME is not None:
                squares_ME = squares_ME + rest_ME.square() / missing_M11[:, 0].clamp(min=1)
            mixtures_EMD = mixtures_EMD / squares_ME.sqrt().T[..., None].to(mixtures_EMD.dtype)
        y_MGD = combine(cast_MGE, self.experts(mixtures_EMD))
        return ungrouped(y_MGD.to(x_BTD.dtype), mask_MG1, *x_BTD.shape[:2])


def _with_its_companions_output(layer: MixtureOfTokens, _: object) -> None:
    if layer.companion_output is not None:  # computed from the weights that were replaced
        layer.serve_alone(num_experts_alone=layer.num_experts_alone)
