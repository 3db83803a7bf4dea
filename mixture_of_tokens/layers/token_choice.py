"""The sparse routings that Mixture of Tokens is compared with, over the same experts. Letters as in `mixture.py`."""

from collections.abc import Sequence
from fractions import Fraction
from typing import Any, Unpack

import torch
from torch import Tensor
from torch.nn import functional as F

from mixture_of_tokens.layers.dispatch import Slots, dropless
from mixture_of_tokens.layers.experts import (
    Routed,
    RoutedOptions,
    check_choices,
    highest,
    softmax,
    summed_over_processes,
)
from mixture_of_tokens.layers.grouping import at_least_fp32, check_full, check_shapes, grouped, ungrouped
from mixture_of_tokens.layers.losses import AuxiliaryLoss, LoadBalancingLoss, RouterZLoss
from mixture_of_tokens.utils.checks import check, check_range, check_sizes


def tokens_of_an_expert(group_size: int, num_experts_per_tok: int, num_experts: int) -> int:
    """How many tokens of a group an expert takes in Expert Choice."""
    return max(1, round(group_size * num_experts_per_tok / num_experts))


class ExpertChoice(Routed):
    """Each expert takes its top tokens of a group (Zhou et al., arXiv 2202.09368), at one position of G examples.

    Choosing along the sequence would leak the future, so experts choose across the batch, as in the code of the MoT
    authors. An expert takes C = max(1, round(G * num_experts_per_tok / E)) tokens. A token gets `num_experts_per_tok`
    experts on average, possibly none, and more in a group of n < G tokens. Gates are each token's softmax over experts.
    """

    def __init__(
        self,
        hidden_size: int,
        expert_size: int,
        num_experts: int,
        group_size: int,
        *,
        num_experts_per_tok: int = 1,
        **options: Unpack[RoutedOptions],
    ):
        super().__init__(hidden_size, expert_size, num_experts, **options)
        check_sizes(group_size=group_size, num_experts_per_tok=num_experts_per_tok)
        self.group_size = group_size
        self.capacity = tokens_of_an_expert(group_size, num_experts_per_tok, num_experts)

    def extra_repr(self) -> str:
        return f"group_size={self.group_size}, capacity={self.capacity}"

    def forward(self, x_BTD: Tensor, token_mask: Tensor | None = None, return_weights: bool = False) -> Any:
        x_MGD, mask_MG1, _ = grouped(x_BTD, token_mask, self.group_size)
        if self.training:
            check_full(x_BTD, self.group_size)
        M, G, D = x_MGD.shape
        scores_MGE = softmax(self.gate(x_MGD), dim=-1)
        if mask_MG1 is not None:  # masked tokens are taken last, and with gate 0
            scores_MGE = scores_MGE.masked_fill(~mask_MG1, 0)
        gate_MCE, token_MCE = scores_MGE.topk(min(self.capacity, G), dim=1)
        row_MCE = token_MCE + torch.arange(0, M * G, G, device=x_MGD.device)[:, None, None]
        gate_ER, row_ER = gate_MCE.flatten(0, 1).T, row_MCE.flatten(0, 1).T  # R = M * C
        token_A, slot_A = row_ER.flatten().sort(stable=True)
        slots = Slots.of(token_A, slot_A, slot_A.shape[0], M * G)
        y_ND = self.experts(slots.dispatch(x_MGD.flatten(0, 1)).view(*row_ER.shape, D)).flatten(0, 1)
        y_MGD = slots.combine(y_ND, gate_ER.flatten().index_select(0, slot_A)).view(M, G, D)
        y_BTD = ungrouped(y_MGD.to(x_BTD.dtype), mask_MG1, *x_BTD.shape[:2])
        if not return_weights:
            return y_BTD
        weights_MGE = torch.zeros_like(scores_MGE).scatter(1, token_MCE, gate_MCE)
        return y_BTD, ungrouped(weights_MGE, mask_MG1, *x_BTD.shape[:2])


def capacity_ratio(factor: float, num_experts: int) -> tuple[int, int]:
    """A capacity factor in whole numbers; from E on it drops nothing.

    1.1 * 100 is above 110, and the compiler would take a float for one that varies.
    """
    return Fraction(str(min(factor, num_experts))).limit_denominator(10**6).as_integer_ratio()


class TokenChoice(Routed):
    """Each token takes its top-k experts (Switch, arXiv 2101.03961); its gates are their probabilities.

    In training an expert takes at most max(1, ceil(capacity_factor * n * k / E)) of the n real tokens; the rest are
    dropped: they get no update from it. Earlier positions have priority, then first choices, then earlier rows, so
    dropping never depends on what a later token is, only on how many there are. In evaluation, and with
    `capacity_factor=None`, nothing is dropped.
    """

    def __init__(
        self,
        hidden_size: int,
        expert_size: int,
        num_experts: int,
        *,
        num_experts_per_tok: int = 1,
        norm_topk_prob: bool = False,
        capacity_factor: float | None = 1.25,
        router_aux_loss_coef: float = 0.01,
        router_z_loss_coef: float = 0.0,
        **options: Unpack[RoutedOptions],
    ):
        super().__init__(hidden_size, expert_size, num_experts, **options)
        check_choices(num_experts_per_tok, num_experts)
        check("norm_topk_prob", norm_topk_prob, bool)
        check_range("router_aux_loss_coef", router_aux_loss_coef, ge=0)
        check_range("router_z_loss_coef", router_z_loss_coef, ge=0)
        self.num_experts_per_tok, self.norm_topk_prob = num_experts_per_tok, norm_topk_prob
        self.capacity_factor = capacity_factor
        self.router_aux_loss_coef, self.router_z_loss_coef = router_aux_loss_coef, router_z_loss_coef
        self.auxiliary_loss, self.z_loss = LoadBalancingLoss(), RouterZLoss()

    @property
    def capacity_factor(self) -> float | None:
        return self._capacity_factor

    @capacity_factor.setter
    def capacity_factor(self, factor: float | None) -> None:
        if factor is not None:
            check_range("capacity_factor", factor, gt=0)
        self._capacity_factor, self._capacity_ratio = factor, capacity_ratio(factor or 0.0, self.num_experts)

    def extra_repr(self) -> str:
        return f"num_experts_per_tok={self.num_experts_per_tok}, capacity_factor={self.capacity_factor}"

    def scores(self, logits: Tensor) -> Tensor:
        return softmax(logits, dim=-1)

    def choose(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Scores and numbers of each token's K experts, by its scores (..., E)."""
        return highest(scores, self.num_experts_per_tok)

    def gates(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Gates and numbers of each token's K experts (..., K)."""
        gate, expert = self.choose(scores)
        if self.norm_topk_prob:
            gate = gate / (gate.sum(-1, keepdim=True) + 1e-20)  # sigmoids may all be 0; as Dots1 has it
        return gate, expert

    def auxiliary_losses(self) -> list[tuple[AuxiliaryLoss, float | Tensor]]:
        weighted = (self.z_loss, self.router_z_loss_coef), (self.auxiliary_loss, self.router_aux_loss_coef)
        return [(loss, weight) for loss, weight in weighted if weight]

    def note(self, scores: Tensor, expert: Tensor, real: Tensor | None) -> None:
        """Called in training: scores (..., E), the experts of tokens (..., K), and which tokens are real (...)."""
        if self.router_aux_loss_coef:
            self.auxiliary_loss(scores, expert, real)

    def forward(self, x_BTD: Tensor, token_mask: Tensor | None = None, return_weights: bool = False) -> Any:
        check_shapes(x_BTD, token_mask)
        (B, T, D), E, K = x_BTD.shape, self.num_experts, self.num_experts_per_tok
        x_TBD, masked_TB1 = x_BTD.transpose(0, 1), None
        if token_mask is not None:
            masked_TB1 = ~token_mask.bool().T[..., None]
            x_TBD = x_TBD.masked_fill(masked_TB1, 0)
        logits_TBE = self.gate(x_TBD)
        scores_TBE = self.scores(logits_TBE)
        gate_TBK, expert_TBK = self.gates(scores_TBE)
        if self.training:
            real_TB = None if masked_TB1 is None else ~masked_TB1[..., 0]
            if self.router_z_loss_coef:
                self.z_loss(logits_TBE, real_TB)
            self.note(scores_TBE, expert_TBK, real_TB)
        if masked_TB1 is not None:  # masked tokens go to no expert
            gate_TBK, expert_TBK = gate_TBK.masked_fill(masked_TB1, 0), expert_TBK.masked_fill(masked_TB1, E)
        x_SD, kept_A = x_TBD.flatten(0, 1), None
        if self.training and self.capacity_factor is not None:
            token_A = torch.arange(x_SD.shape[0], device=x_SD.device).repeat_interleave(K)
            slots = Slots.of(token_A, *self._slots_within_capacity(expert_TBK), x_SD.shape[0])
            y_ND = self.experts(slots.dispatch(x_SD).unflatten(0, (E, -1))).flatten(0, 1)
            y_SD, kept_A = slots.combine(y_ND, gate_TBK.flatten()), slots.kept_A
        else:
            y_SD = self.without_limit(x_SD, *(each.flatten(0, 1) for each in (expert_TBK, gate_TBK, scores_TBE)))
        y_BTD = y_SD.view(T, B, D).transpose(0, 1).to(x_BTD.dtype)
        if not return_weights:
            return y_BTD
        gate_TBK = gate_TBK if kept_A is None else gate_TBK * kept_A.view_as(gate_TBK)
        weights_TBE = gate_TBK.new_zeros(T, B, E + 1).scatter(2, expert_TBK, gate_TBK)[..., :E]
        return y_BTD, weights_TBE.transpose(0, 1)

    def without_limit(self, x_SD: Tensor, expert_SK: Tensor, gate_SK: Tensor, scores_SE: Tensor) -> Tensor:
        """What tokens (S, D) get from all their experts."""
        return dropless(self, x_SD, expert_SK, gate_SK)

    def _slots_within_capacity(self, expert_TBK: Tensor) -> tuple[Tensor, int]:
        """The slot of each assignment, N where it is dropped, and N = E * R."""
        _, B, K = expert_TBK.shape
        A, E, (times, over) = expert_TBK.numel(), self.num_experts, self._capacity_ratio
        # In order of priority (position, choice, row), then by expert with that order kept.
        expert_A, order_A = expert_TBK.transpose(1, 2).flatten().sort(stable=True)
        ends_E = torch.searchsorted(expert_A, torch.arange(E, device=expert_A.device), right=True)
        R = min(A // K, max(1, -(-times * A // (over * E))))  # no expert is chosen twice by a token
        capacity = (-(-times * ends_E[-1] // (over * E))).clamp(min=1, max=R)  # below R where tokens are masked
        rank_A = torch.arange(A, device=expert_A.device) - F.pad(ends_E, (1, 0))[expert_A]
        kept_A = (rank_A < capacity) & (expert_A < E)
        slot_A = torch.where(kept_A, expert_A * R + rank_A, E * R)
        slot_TKB = torch.empty_like(slot_A).index_copy(0, order_A, slot_A).view(-1, K, B)
        return slot_TKB.transpose(1, 2).flatten(), E * R


class SigmoidChoice(TokenChoice):
    """Token Choice with independent gates, balanced without a loss (DeepSeek-V3, arXiv 2412.19437, section 2.1.2).

        score[t, e] = sigmoid(x_t . c_e / temperature)
        chosen      = the k experts of the highest score[t, e] + selection_bias[e]
        gate[t, e]  = score[t, e]               the bias decides the choice alone

    In training each step moves the bias towards the experts that are chosen less than others (Wang et al., arXiv
    2408.15664, algorithm 1). `balance`, after the optimizer's step, adds to each layer's

        balance_rate * sign(mean number of choices - number of choices of e)

    counted over all micro-batches and processes since the last call. Nothing is dropped.
    """

    selection_bias: Tensor

    def __init__(
        self,
        hidden_size: int,
        expert_size: int,
        num_experts: int,
        *,
        num_experts_per_tok: int = 1,
        norm_topk_prob: bool = False,
        balance_rate: float = 1e-3,
        router_z_loss_coef: float = 0.0,
        **options: Unpack[RoutedOptions],
    ):
        super().__init__(
            hidden_size,
            expert_size,
            num_experts,
            num_experts_per_tok=num_experts_per_tok,
            norm_topk_prob=norm_topk_prob,
            capacity_factor=None,
            router_aux_loss_coef=0.0,
            router_z_loss_coef=router_z_loss_coef,
            **options,
        )
        check_range("balance_rate", balance_rate, ge=0)
        self.balance_rate = balance_rate
        self.register_buffer("selection_bias", torch.zeros(num_experts, dtype=at_least_fp32()))

    def scores(self, logits: Tensor) -> Tensor:
        return logits.to(at_least_fp32(logits.dtype)).sigmoid()

    def choose(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        _, expert = highest(scores.detach() + self.selection_bias, self.num_experts_per_tok)
        return scores.gather(-1, expert), expert

    def note(self, scores: Tensor, expert: Tensor, real: Tensor | None) -> None:
        if torch.is_grad_enabled():  # not of telemetry
            counted = torch.ones_like(expert) if real is None else real[..., None].expand_as(expert).to(expert.dtype)
            self.note_more(expert.new_zeros(self.num_experts).index_add(0, expert.flatten(), counted.flatten()))

    def reset_state(self) -> None:
        torch.nn.init.zeros_(self.selection_bias)

    def extra_repr(self) -> str:
        return f"num_experts_per_tok={self.num_experts_per_tok}, balance_rate={self.balance_rate}"

    @staticmethod
    @torch.no_grad()
    def balance(layers: "Sequence[SigmoidChoice]", group: "torch.distributed.ProcessGroup | None" = None) -> None:
        for layer in layers:
            load_E = layer.taken(torch.zeros_like(layer.selection_bias, dtype=torch.long))
            load_E = summed_over_processes(load_E, group).to(layer.selection_bias.dtype)
            layer.selection_bias += layer.balance_rate * (load_E.mean() - load_E).sign()


class DefaultMoE(TokenChoice):
    """Token Choice in which the other experts give what they give on average (Panda et al., arXiv 2504.12463).

        p[t, e] = softmax over the experts of x_t . c_e / temperature
        out[t]  = sum_e p[t, e] * FFN_e(x_t)              for t's top K
                + sum_e p[t, e] * default_output[e]       for all other e

    So the router hears of every expert from every token. The averages, which have no gradient and begin at zero, are
    those of earlier steps, and no output depends on other texts of its batch. `balance`, after the optimizer's step,
    moves each towards the mean of what its expert gave, over all micro-batches and processes since the last call:

        default_output[e] = default_decay * default_output[e] + (1 - default_decay) * mean

    That of an expert which no token chose stays. Nothing is dropped.
    """

    default_output: Tensor

    def __init__(
        self,
        hidden_size: int,
        expert_size: int,
        num_experts: int,
        *,
        num_experts_per_tok: int = 1,
        default_decay: float = 0.99,
        router_aux_loss_coef: float = 0.01,
        router_z_loss_coef: float = 0.0,
        **options: Unpack[RoutedOptions],
    ):
        super().__init__(
            hidden_size,
            expert_size,
            num_experts,
            num_experts_per_tok=num_experts_per_tok,
            capacity_factor=None,
            router_aux_loss_coef=router_aux_loss_coef,
            router_z_loss_coef=router_z_loss_coef,
            **options,
        )
        check_range("default_decay", default_decay, ge=0, lt=1)
        self.default_decay = default_decay
        self.register_buffer("default_output", torch.zeros(num_experts, hidden_size, dtype=at_least_fp32()))

    def without_limit(self, x_SD: Tensor, expert_SK: Tensor, gate_SK: Tensor, scores_SE: Tensor) -> Tensor:
        E, noting = self.num_experts, self.training and torch.is_grad_enabled()  # not of telemetry
        # Sums of what experts give, and of how many tokens; the last row is of masked tokens, which go to no expert.
        noted_EX = F.pad(torch.zeros_like(self.default_output), (0, 1, 0, 1))

        def seen(y_ND: Tensor, expert_N: Tensor) -> None:
            noted_EX[:, :-1].index_add_(0, expert_N, y_ND.detach().to(noted_EX.dtype))

        own_SD = dropless(self, x_SD, expert_SK, gate_SK, seen=seen if noting else None)
        if noting:
            noted_EX[:, -1].index_add_(0, expert_SK.flatten(), noted_EX.new_ones(expert_SK.numel()))
            self.note_more(noted_EX[:-1])
        others_SE = F.pad(scores_SE, (0, 1)).scatter(1, expert_SK, 0)[:, :-1].masked_fill(expert_SK[:, :1] == E, 0)
        return torch.addmm(own_SD.to(others_SE.dtype), others_SE, self.default_output.to(others_SE.dtype))

    def reset_state(self) -> None:
        torch.nn.init.zeros_(self.default_output)

    def extra_repr(self) -> str:
        return f"num_experts_per_tok={self.num_experts_per_tok}, default_decay={self.default_decay}"

    @staticmethod
    @torch.no_grad()
    def balance(layers: "Sequence[DefaultMoE]", group: "torch.distributed.ProcessGroup | None" = None) -> None:
        for layer in layers:
            noted_EX = summed_over_processes(layer.taken(F.pad(torch.zeros_like(layer.default_output), (0, 1))), group)
            mean_ED = noted_EX[:, :-1] / noted_EX[:, -1:].clamp(min=1)
            moved_ED = layer.default_output.lerp(mean_ED, 1 - layer.default_decay)
            layer.default_output.copy_(torch.where(noted_EX[:, -1:] > 0, moved_ED, layer.default_output))
