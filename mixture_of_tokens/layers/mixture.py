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

Served alone, every token forms a group with G - 1 companions. By default every expert runs for every token, at G times
the FLOPs. With `num_experts_alone` only those of the token's K largest weights do; the others give it what they give
their companion, a constant:

    out[t] = sum_e w[t, e] * FFN_e(w[t, e] * x_t + (1 - w[t, e]) * companion[e])     for e in t's top K
           + sum_e w[t, e] * FFN_e(companion[e])                                     for all other e

(with `normalize_mixture` both mixtures are divided by their norms). An expert of weight w is off by about w squared, so
with K = k, the granularity, where experts cost what a dense feed-forward does, the output is nearly the same.
"""

import itertools
import math
from numbers import Integral
from typing import Any, Unpack

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mixture_of_tokens.layers.dispatch import dropless
from mixture_of_tokens.layers.experts import Experts, Routed, RoutedOptions, highest, softmax
from mixture_of_tokens.layers.grouping import (
    at_least_fp32,
    check_full,
    check_shapes,
    combine,
    dispatch,
    grouped,
    never_measured,
    ungrouped,
    warn_once,
)
from mixture_of_tokens.utils.checks import check, check_sizes, divisors

# Tokens served alone by all experts at a time. Each has E mixtures, which a CPU's cache is to hold and a GPU's memory;
# the GPU's number is no measured one.
AT_ONCE = {"cpu": 64, "cuda": 1024}


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
    measuring = False  # while `calibrate_companions` runs
    # Empty unless few experts run for a token alone.
    companion_output: Tensor  # (E, D)
    rest_logit: Tensor  # (E,), of the G - 1 companions together

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
        check_sizes(group_size=group_size)
        check("normalize_mixture", normalize_mixture, bool)
        check("uniform", uniform, bool)
        super().__init__(hidden_size, expert_size, num_experts, **options)
        self.group_size, self.normalize_mixture = group_size, normalize_mixture
        self.alone, self.num_experts_alone = False, num_experts
        self._looked_at: set[int] = set()  # numbers of rows, as on a GPU each look at companions waits for it
        if uniform:
            self.gate = None  # pyright: ignore[reportAttributeAccessIssue]
        self.register_buffer("companion", torch.zeros(num_experts, hidden_size, dtype=at_least_fp32()))
        self.register_buffer("companion_logit", torch.zeros(num_experts, dtype=at_least_fp32()))
        for name in ("companion_output", "rest_logit"):
            self.register_buffer(name, torch.empty(0, dtype=at_least_fp32()), persistent=False)
        self.register_load_state_dict_post_hook(MixtureOfTokens._renew_alone)

    def reset_state(self) -> None:
        nn.init.zeros_(self.companion)
        nn.init.zeros_(self.companion_logit)
        self._renew_alone()

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
        """The layer whose experts have the FLOPs of a dense feed-forward of this width, and G times its parameters.

        E = G * k experts of width intermediate_size / k, where k is the granularity; router and mixing come on top. Of
        a SwiGLU feed-forward, or with `gated=False, activation="relu"`, the paper's, of a plain one; `options` are
        those of `Routed`.
        """
        check("intermediate_size", intermediate_size, int)
        check("granularity", granularity, int)
        if granularity < 1 or intermediate_size % granularity:
            legal = ", ".join(map(str, divisors(intermediate_size)))
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
        return self._weights_and_rest(x_MGD, mask_MG1, missing_M11)[0]

    def _weights_and_rest(
        self, x_MGD: Tensor, mask_MG1: Tensor | None, missing_M11: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """w (M, G, E), and the weight (M, E) of all companions together; None where no token can be missing."""
        logits_MGE = self.logits(x_MGD)
        if mask_MG1 is not None:  # the lowest finite number, not -inf: a group without real tokens must not become NaN
            logits_MGE = logits_MGE.masked_fill(~mask_MG1, torch.finfo(logits_MGE.dtype).min)
        if missing_M11 is not None:  # one more row for all missing tokens; -inf where none is missing
            precise = at_least_fp32(logits_MGE.dtype)
            companions_M1E = (self.companion_logit + missing_M11.log()).to(precise)
            logits_MGE = torch.cat([logits_MGE.to(precise), companions_M1E], dim=1)
        weights_MGE = softmax(logits_MGE, dim=1)
        return (weights_MGE, None) if missing_M11 is None else (weights_MGE[:, :-1], weights_MGE[:, -1])

    def forward(self, x_BTD: Tensor, token_mask: Tensor | None = None, return_weights: bool = False) -> Any:
        if not self.alone:
            return self._in_groups(x_BTD, token_mask, return_weights)
        if return_weights:
            raise ValueError("return_weights is for texts in groups: serve_alone(False) first")
        few = self.num_experts_alone < self.num_experts
        return (self._alone_by_few if few else self._alone_by_all)(x_BTD, token_mask)

    def _check_measured(self, x_BTD: Tensor) -> None:
        """Warn, once for a number of rows, where companions that were never measured stand for rows that are missing.

        Of what is served in groups, as a Trainer evaluates; alone, `serve_alone` has looked.
        """
        if torch.compiler.is_compiling() or self.alone or self.measuring:  # sizes that vary have no number
            return
        if (rows := len(x_BTD)) % self.group_size == 0 or rows in self._looked_at:
            return
        self._looked_at.add(rows)
        if never_measured(self.companion, self.group_size):
            warn_once(
                f"Outside of training, a batch of {rows} rows is no multiple of the group size, {self.group_size}, and "
                f"the companions that replace the missing rows were never measured: its loss is another one than in "
                f"complete groups. Take batches of a multiple of {self.group_size}, or call calibrate_companions first."
            )

    def _in_groups(self, x_BTD: Tensor, token_mask: Tensor | None = None, return_weights: bool = False) -> Any:
        """The equations of the module's docstring."""
        x_MGD, mask_MG1, missing_M11 = grouped(x_BTD, token_mask, self.group_size)
        if self.training and not self.alone:
            check_full(x_BTD, self.group_size)
        else:
            self._check_measured(x_BTD)
        weights_MGE, rest_ME = self._weights_and_rest(x_MGD, mask_MG1, missing_M11)
        cast_MGE = weights_MGE.to(x_MGD.dtype)
        mixtures_EMD = dispatch(cast_MGE, x_MGD)
        if rest_ME is not None:
            mixtures_EMD = mixtures_EMD + (rest_ME.T[..., None] * self.companion[:, None]).to(mixtures_EMD.dtype)
        if self.normalize_mixture:
            squares_ME = weights_MGE.square().sum(1)
            if missing_M11 is not None and rest_ME is not None:
                squares_ME = squares_ME + rest_ME.square() / missing_M11[:, 0].clamp(min=1)
            mixtures_EMD = mixtures_EMD / squares_ME.sqrt().T[..., None].to(mixtures_EMD.dtype)
        y_MGD = combine(cast_MGE, self.experts(mixtures_EMD))
        y_BTD = ungrouped(y_MGD.to(x_BTD.dtype), mask_MG1, *x_BTD.shape[:2])
        return (y_BTD, ungrouped(weights_MGE, mask_MG1, *x_BTD.shape[:2])) if return_weights else y_BTD

    # Served alone

    @torch.inference_mode(False)  # what is made here is for training too
    @torch.no_grad()
    def serve_alone(self, alone: bool = True, num_experts_alone: int | None = None) -> None:
        """Compute each token by itself from here on, or in its group again.

        By default every expert runs for every token, at G times the FLOPs; with `num_experts_alone` only those of the
        token's largest weights do, which gives nearly the same where they are as many as the granularity. What the
        others give is computed here, and again when weights are drawn anew or loaded; after any other change of the
        weights, call this again.

        Raises ValueError for a number of experts that there is not, and for few of them where all weights are the same
        or texts are not served alone.
        """
        few = self.num_experts if num_experts_alone is None else num_experts_alone
        if not isinstance(alone, bool):
            raise ValueError(f"serve_alone takes True or False, not {alone!r}; experts are num_experts_alone={alone!r}")
        if isinstance(few, bool) or not isinstance(few, Integral) or not 1 <= few <= self.num_experts:
            raise ValueError(f"served alone, a token can go to 1 to {self.num_experts} experts, not {few!r}")
        if not alone and few < self.num_experts:
            raise ValueError("num_experts_alone is for texts that are served alone")
        if few < self.num_experts and (self.gate is None or self.group_size == 1):
            raise ValueError("served alone, a token goes to all experts where these weigh it alike")
        self.alone, self.num_experts_alone = alone, int(few) if alone else self.num_experts
        if alone and never_measured(self.companion, self.group_size):
            warn_once(
                "Served alone, companions stand for the other texts, and those of this layer were never measured: call "
                "calibrate_companions first, or the loss is much higher."
            )
        self.companion_output, self.rest_logit = (self.companion.new_empty(0) for _ in range(2))
        if self.num_experts_alone < self.num_experts:
            (experts,) = (
                module for module in self.experts.modules() if isinstance(module, Experts)
            )  # below an adapter
            each_E, no_E = torch.arange(self.num_experts, device=self.companion.device), 0 * self.companion_logit
            mix_ED = self._with_companions(self.companion.to(experts.down_proj.dtype), each_E, no_E)
            y_E1D = self.experts(mix_ED[:, None])
            self.companion_output = y_E1D[:, 0].to(self.companion.dtype)
            self.rest_logit = self.companion_logit + math.log(self.group_size - 1)

    def _renew_alone(self, _: object = None) -> None:
        if self.num_experts_alone < self.num_experts:
            self.serve_alone(True, self.num_experts_alone)

    def _with_companions(self, x: Tensor, expert: Tensor, weight: Tensor) -> Tensor:
        """Mixtures of tokens (..., D) with the companions of experts (...), by the tokens' weights (...)."""
        companion = F.embedding(expert, self.companion)
        mix = companion.lerp(x.to(companion.dtype), weight[..., None].to(companion.dtype))
        if self.normalize_mixture:
            squares = weight.square() + (1 - weight).square() / (self.group_size - 1)
            mix = mix / squares.sqrt()[..., None]
        return mix.to(x.dtype)

    def _alone_by_all(self, x_BTD: Tensor, token_mask: Tensor | None) -> Tensor:
        check_shapes(x_BTD, token_mask)
        at_once = AT_ONCE.get(x_BTD.device.type, AT_ONCE["cpu"])
        if len(x_BTD) == 1 and x_BTD.shape[1] <= at_once:
            return self._in_groups(x_BTD, token_mask)
        # Tokens as positions of one example.
        x_1SD = x_BTD.reshape(1, -1, x_BTD.shape[-1])
        masks = itertools.repeat(None) if token_mask is None else token_mask.reshape(1, -1).split(at_once, dim=1)
        parts = zip(x_1SD.split(at_once, dim=1), masks, strict=False)
        return torch.cat([self._in_groups(*part) for part in parts], dim=1).view_as(x_BTD)

    def _alone_by_few(self, x_BTD: Tensor, token_mask: Tensor | None) -> Tensor:
        """The last formula of the module's docstring."""
        check_shapes(x_BTD, token_mask)
        masked_S1 = None if token_mask is None else ~token_mask.bool().reshape(-1, 1)
        x_SD = x_BTD.flatten(0, 1) if masked_S1 is None else x_BTD.flatten(0, 1).masked_fill(masked_S1, 0)
        assert self.gate is not None  # or `serve_alone` has refused
        logits_SE = self.gate(x_SD)
        # The softmax over a token and its companions, of which all have the same logit.
        weights_SE = (logits_SE.to(at_least_fp32(logits_SE.dtype)) - self.rest_logit).sigmoid()
        weight_SK, expert_SK = highest(weights_SE, self.num_experts_alone)
        own_SD = dropless(self, x_SD, expert_SK, weight_SK, read=self._with_companions)
        others_SE = weights_SE.scatter(1, expert_SK, 0)
        y_SD = torch.addmm(own_SD.to(others_SE.dtype), others_SE, self.companion_output.to(others_SE.dtype))
        if masked_S1 is not None:
            y_SD = y_SD.masked_fill(masked_S1, 0)
        return y_SD.view_as(x_BTD).to(x_BTD.dtype)
