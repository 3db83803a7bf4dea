"""Sparse routings in which a token goes to every expert whose score is above a threshold. Letters as in `mixture.py`.

How many experts a token gets varies; the average is kept at `num_experts_per_tok`, K. Nothing is dropped, a token's
experts depend on that token alone, and training and evaluation choose by the same rule. After each step of training
`balance` moves the threshold (Expert Threshold), or the weight of the penalty on gates (ReMoE).
"""

from collections.abc import Sequence
from statistics import NormalDist
from typing import Any, Literal, Unpack

import torch
from torch import Tensor

from mixture_of_tokens.layers.dispatch import dropless
from mixture_of_tokens.layers.experts import Routed, RoutedOptions, check_choices, summed_over_processes
from mixture_of_tokens.layers.grouping import at_least_fp32, check_shapes
from mixture_of_tokens.layers.losses import AuxiliaryLoss, L1Loss
from mixture_of_tokens.utils.checks import check_choice, check_range

SCORES = ("softmax", "sigmoid")


class _Above(Routed):
    """What ReMoE and Expert Threshold share: an expert computes the tokens for which its gate is above zero."""

    def __init__(
        self,
        hidden_size: int,
        expert_size: int,
        num_experts: int,
        *,
        num_experts_per_tok: int = 1,
        **options: Unpack[RoutedOptions],
    ):
        super().__init__(hidden_size, expert_size, num_experts, **options)
        check_choices(num_experts_per_tok, num_experts)
        self.num_experts_per_tok = num_experts_per_tok

    def extra_repr(self) -> str:
        return f"num_experts_per_tok={self.num_experts_per_tok}"

    def gates(self, logits_SE: Tensor) -> Tensor:
        """The gates (S, E) by the router's logits, zero for the experts that a token does not go to."""
        raise NotImplementedError

    def note(self, logits_SE: Tensor) -> None:
        """Called with the logits of a training batch's real tokens."""
        raise NotImplementedError

    @torch.compiler.disable(reason="the number of pairs differs in every batch, and each would be compiled anew")
    def forward(self, x_BTD: Tensor, token_mask: Tensor | None = None, return_weights: bool = False) -> Any:
        check_shapes(x_BTD, token_mask)
        B, T, D = x_BTD.shape
        mask_BT = x_BTD.new_ones(B, T, dtype=torch.bool) if token_mask is None else token_mask.bool()
        real_S = mask_BT.T.flatten()  # positions first, as in `TokenChoice`
        x_SD = x_BTD.transpose(0, 1).flatten(0, 1).masked_fill(~real_S[:, None], 0)
        logits_SE = self.gate(x_SD.view(T, B, D)).flatten(0, 1)
        gate_SE = self.gates(logits_SE).masked_fill(~real_S[:, None], 0)
        token_A, expert_A = (~(gate_SE <= 0)).nonzero(as_tuple=True)  # also those that are not finite, to be seen
        if self.training:
            for loss, _ in self.auxiliary_losses():
                loss(gate_SE, None if token_mask is None else real_S)
        if self.training and torch.is_grad_enabled():  # not of telemetry
            noted_SE = logits_SE.detach()
            self.note(noted_SE if token_mask is None else noted_SE[real_S])
        y_SD = dropless(self, x_SD, expert_A, gate_SE[token_A, expert_A], token_A)
        y_BTD = y_SD.view(T, B, D).transpose(0, 1).to(x_BTD.dtype)
        return (y_BTD, gate_SE.view(T, B, -1).transpose(0, 1)) if return_weights else y_BTD


class ReMoE(_Above):
    """Gates are the positive logits, and a penalty on them makes them few (Wang et al., arXiv 2412.14711, ICLR 2025).

        gate[t, e] = relu(x_t . c_e / temperature)

    The gates are continuous: an expert comes in and goes out with weight zero. The loss adds `l1_weight` times the mean
    over layers of `auxiliary_loss` (`L1Loss`), the L1 norm of the gates in which each expert counts by its load (their
    equation 9). After each step `balance` multiplies the weight, the same in all layers, by `l1_factor` where tokens go
    to more than K experts on average, over all layers, and divides it where they go to fewer (their equation 7). It
    starts at `l1_start`, next to nothing: at first half of the experts are active and then most of them, so the first
    steps cost more than the others.
    """

    l1_weight: Tensor

    def __init__(
        self,
        hidden_size: int,
        expert_size: int,
        num_experts: int,
        *,
        num_experts_per_tok: int = 1,
        l1_start: float = 1e-8,
        l1_factor: float = 1.2,
        **options: Unpack[RoutedOptions],
    ):
        super().__init__(hidden_size, expert_size, num_experts, num_experts_per_tok=num_experts_per_tok, **options)
        check_range("l1_start", l1_start, gt=0, le=1e38)  # they are kept in fp32
        check_range("l1_factor", l1_factor, gt=1, le=1e38)
        self.l1_start, self.l1_factor, self.auxiliary_loss = l1_start, l1_factor, L1Loss(num_experts_per_tok)
        self.register_buffer("l1_weight", torch.empty((), dtype=at_least_fp32()))
        self.reset_state()

    def reset_state(self) -> None:
        torch.nn.init.constant_(self.l1_weight, self.l1_start)

    def auxiliary_losses(self) -> list[tuple[AuxiliaryLoss, float | Tensor]]:
        return [(self.auxiliary_loss, self.l1_weight)]

    def gates(self, logits_SE: Tensor) -> Tensor:
        return logits_SE.to(at_least_fp32(logits_SE.dtype)).relu()

    def note(self, logits_SE: Tensor) -> None:
        choices = (logits_SE > 0).sum()
        self.note_more(torch.stack([choices, torch.full_like(choices, len(logits_SE))]))

    @staticmethod
    @torch.no_grad()
    def balance(layers: "Sequence[ReMoE]", group: "torch.distributed.ProcessGroup | None" = None) -> None:
        if not layers:
            return
        device = layers[0].l1_weight.device  # a model may lie on several
        nothing = torch.zeros(2, dtype=torch.long, device=device)
        total = torch.stack([layer.taken(nothing).to(device) for layer in layers]).sum(0)
        choices, tokens = summed_over_processes(total, group)  # of all layers
        for layer in layers:
            step = torch.sign(choices - layer.num_experts_per_tok * tokens)
            layer.l1_weight *= layer.l1_factor ** step.to(layer.l1_weight.device)
            # From beyond these it would not come back.
            limits = torch.finfo(layer.l1_weight.dtype)
            layer.l1_weight.clamp_(min=limits.tiny, max=limits.max)


class ExpertThreshold(_Above):
    """Each expert takes the tokens whose score is above its running threshold (Sun et al., arXiv 2603.11535).

        score[t, e] = log softmax over the experts of logit[t], or, with `scores="sigmoid"`, logit[t, e]
        gate[t, e]  = exp(score[t, e]), or sigmoid(score[t, e]), where score[t, e] > threshold[e]; else 0

    The threshold follows the score that the expert's even share of tokens, K / E of them, is above. After each step
    `balance` moves it there, by an exponential average over steps with the factor `threshold_decay`. So the load is
    even without a loss, once the logits have settled: while they grow, thresholds lag behind them. As in Expert Choice,
    experts choose the tokens; but nothing depends on the other tokens of the batch. Thresholds start where they would
    be for inputs whose elements are normal with variance one. A batch in which an even share is less than half a token
    does not move them. The authors' runs begin with Expert Choice over the whole batch, which is not causal; ours do
    not.
    """

    threshold: Tensor

    def __init__(
        self,
        hidden_size: int,
        expert_size: int,
        num_experts: int,
        *,
        num_experts_per_tok: int = 1,
        threshold_decay: float = 0.9,
        scores: Literal["softmax", "sigmoid"] = "softmax",
        **options: Unpack[RoutedOptions],
    ):
        super().__init__(hidden_size, expert_size, num_experts, num_experts_per_tok=num_experts_per_tok, **options)
        check_range("threshold_decay", threshold_decay, ge=0, lt=1)
        check_choice("scores", scores, SCORES)
        self.threshold_decay, self.competing = threshold_decay, scores == "softmax"
        self.register_buffer("threshold", torch.empty(num_experts, dtype=at_least_fp32()))
        self.reset_state()

    @torch.no_grad()
    def reset_state(self) -> None:
        share = self.num_experts_per_tok / self.num_experts
        quantile = NormalDist().inv_cdf(1 - share) if share < 1 else -torch.inf
        deviation_E = self.gate.weight.norm(dim=1) / self.gate.temperature  # of the logits
        # The log of the mean of sum_e exp(logit[e]).
        total = (deviation_E**2 / 2).logsumexp(0) if self.competing else 0.0
        self.threshold.copy_(quantile * deviation_E - total)

    def scores(self, logits_SE: Tensor) -> Tensor:
        logits_SE = logits_SE.to(at_least_fp32(logits_SE.dtype))
        return logits_SE.log_softmax(-1) if self.competing else logits_SE

    def gates(self, logits_SE: Tensor) -> Tensor:
        scores_SE = self.scores(logits_SE)
        return (scores_SE.exp() if self.competing else scores_SE.sigmoid()) * (scores_SE > self.threshold)

    def note(self, logits_SE: Tensor) -> None:
        count = len(logits_SE)
        share = round(count * self.num_experts_per_tok / self.num_experts)
        # The thresholds that batches want, and the number of batches, summed in the thresholds' own precision. All
        # processes note something.
        noted = logits_SE.new_zeros(self.num_experts + 1, dtype=self.threshold.dtype)
        if 0 < share < count:  # else too few tokens, or an even share is all of them
            noted[:-1] = self.scores(logits_SE).topk(share + 1, dim=0).values[-1]
            noted[-1] = 1
        self.note_more(noted)

    def move_threshold(self, by: float, noted: Tensor) -> None:
        """By this share towards the mean of the thresholds that batches wanted, if any did: their sum, and number."""
        mean_E = (noted[:-1] / noted[-1].clamp(min=1)).to(self.threshold.dtype)
        # Without asking whether there were any: a step would wait for the device.
        moves = (noted[-1] > 0) & mean_E.isfinite()
        self.threshold.copy_(torch.where(moves, self.threshold.lerp(mean_E, by), self.threshold))

    @staticmethod
    @torch.no_grad()
    def balance(layers: "Sequence[ExpertThreshold]", group: "torch.distributed.ProcessGroup | None" = None) -> None:
        for layer in layers:
            noted = layer.taken(layer.threshold.new_zeros(layer.num_experts + 1))
            layer.move_threshold(1 - layer.threshold_decay, summed_over_processes(noted, group))
