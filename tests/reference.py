"""The layers as literal loops over group, expert and token: slow, plain, differentiable.

Written from the paper's equations and the rules in the docstrings of `layers/mixture.py`, on single vectors and with
nothing vectorised, so that a person can check each line. The tests compare the real layers with it.

Shapes as there: x (B, T, D), token_mask (B, T) or None, gate_weight (E, D). `expert_weights` is the pair of up
(E, F, D) and down (E, D, F), or, `gated`, of gate_up (E, 2F, D) and down (E, D, F). `temperature` is a number or a
scalar tensor. Everything is computed in the precision of what is given. Returns (B, T, D), zero for a masked token.
"""

import math
from fractions import Fraction

import torch
from torch import Tensor
from torch.nn import functional as F


def expert(vector: Tensor, expert_weights: tuple[Tensor, Tensor], e: int, gated: bool, activation: str) -> Tensor:
    """FFN_e of one vector (D,)."""
    first, down = expert_weights
    act = getattr(F, activation)
    hidden = first[e] @ vector
    if gated:
        width = len(hidden) // 2
        hidden = act(hidden[:width]) * hidden[width:]
    else:
        hidden = act(hidden)
    return down[e] @ hidden


def softmax(logits: list[Tensor]) -> list[Tensor]:
    largest = max(logit.item() for logit in logits)
    exponentials = [(logit - largest).exp() for logit in logits]
    total = sum(exponentials)
    return [exponential / total for exponential in exponentials]


def mixture_of_tokens(
    x: Tensor,
    token_mask: Tensor | None,
    gate_weight: Tensor | None,
    expert_weights: tuple[Tensor, Tensor],
    *,
    group_size: int,
    companion: Tensor,
    companion_logit: Tensor,
    temperature: float | Tensor = 1.0,
    gated: bool = True,
    activation: str = "silu",
    normalize_mixture: bool = False,
    uniform: bool = False,
) -> Tensor:
    """Each expert reads one mixture of a group and gives its output back with the same weights.

    n < G real tokens: G - n times the expert's companion (E, D), with its logit (E,), completes the group.
    """
    out = _zeros(x)
    for group in _groups(x, token_mask, group_size):
        for e in range(len(expert_weights[1])):
            if uniform or gate_weight is None:
                logits = [x.new_zeros(()) for _ in group]
            else:
                logits = [x[b, t] @ gate_weight[e] / temperature for b, t in group]
            missing = group_size - len(group)
            weights = softmax(logits + missing * [companion_logit[e]])
            mixture = torch.zeros_like(x[0, 0])
            for weight, vector in zip(weights, [x[b, t] for b, t in group] + missing * [companion[e]], strict=True):
                mixture = mixture + weight * vector
            if normalize_mixture:
                mixture = mixture / sum(weight**2 for weight in weights) ** 0.5
            y = expert(mixture, expert_weights, e, gated, activation)
            for weight, (b, t) in zip(weights, group, strict=False):  # what companions would get goes nowhere
                out[b][t] = out[b][t] + weight * y
    return _stacked(out)


def alone(x_SD: Tensor, layer, few: int | None = None) -> Tensor:
    """A Mixture of Tokens for a token alone, as a sparse layer: sigmoid gates over all experts, and a bias for each.

    few: experts that read the token; all others read their companion, and give that back.
    """
    out = []
    first = layer.experts.gate_up_proj if layer.experts.gated else layer.experts.up_proj
    weights, (gated, activation) = (first, layer.experts.down_proj), (layer.experts.gated, layer.experts.activation)
    for x in x_SD:
        biases = [layer.companion_logit[e] + math.log(layer.group_size - 1) for e in range(len(first))]
        logits = [x @ layer.gate.weight[e] / layer.gate.temperature for e in range(len(first))]
        gates = [1 / (1 + (bias - logit).exp()) for bias, logit in zip(biases, logits, strict=True)]
        largest = sorted(range(len(first)), key=lambda e, gates=gates: -gates[e].item())[:few]
        y = torch.zeros_like(x)
        for e, gate in enumerate(gates):
            w = gate if e in largest else torch.zeros_like(gate)  # in the mixture, as far as it is read
            mixture = w * x + (1 - w) * layer.companion[e]
            if layer.normalize_mixture:
                mixture = mixture / (w**2 + (1 - w) ** 2 / (layer.group_size - 1)) ** 0.5
            y = y + gate * expert(mixture, weights, e, gated, activation)
        out.append(y)
    return torch.stack(out)


def expert_choice(
    x: Tensor,
    token_mask: Tensor | None,
    gate_weight: Tensor,
    expert_weights: tuple[Tensor, Tensor],
    *,
    group_size: int,
    num_experts_per_tok: int = 1,
    temperature: float | Tensor = 1.0,
    gated: bool = True,
    activation: str = "silu",
) -> Tensor:
    """Each expert takes the C tokens of a group that like it most; gates are a token's softmax over the experts."""
    num_experts = len(expert_weights[1])
    capacity = max(1, round(group_size * num_experts_per_tok / num_experts))
    out = _zeros(x)
    for group in _groups(x, token_mask, group_size):
        gates = {(b, t): softmax([x[b, t] @ row / temperature for row in gate_weight]) for b, t in group}
        for e in range(num_experts):
            taken = sorted(group, key=lambda token, e=e: gates[token][e].item(), reverse=True)[:capacity]
            for b, t in taken:
                out[b][t] = out[b][t] + gates[b, t][e] * expert(x[b, t], expert_weights, e, gated, activation)
    return _stacked(out)


def token_choice(
    x: Tensor,
    token_mask: Tensor | None,
    gate_weight: Tensor,
    expert_weights: tuple[Tensor, Tensor],
    *,
    num_experts_per_tok: int = 1,
    norm_topk_prob: bool = False,
    capacity_factor: float | None = None,
    temperature: float | Tensor = 1.0,
    gated: bool = True,
    activation: str = "silu",
) -> Tensor:
    """Each token takes its top k experts; its gates are their probabilities, with `norm_topk_prob` summing to one.

    With a capacity factor an expert takes at most max(1, ceil(capacity_factor * n * k / E)) of the n real tokens:
    earlier positions first, within one position first choices, within those earlier rows. None: nothing is dropped.
    """
    (B, T, _), num_experts = x.shape, len(expert_weights[1])
    real = _real(x, token_mask)
    gates = {(b, t): softmax([x[b, t] @ row / temperature for row in gate_weight]) for b, t in real}
    capacity = len(real) * num_experts_per_tok
    if capacity_factor is not None:
        exact = Fraction(str(capacity_factor))  # 1.1 * 100 is above 110
        capacity = max(1, math.ceil(exact * len(real) * num_experts_per_tok / num_experts))
    taken = [0] * num_experts
    out = _zeros(x)
    for t in range(T):
        for choice in range(num_experts_per_tok):
            for b in [b for b in range(B) if (b, t) in gates]:
                gate = gates[b, t]
                order = sorted(range(num_experts), key=lambda e, gate=gate: gate[e].item(), reverse=True)
                e = order[choice]
                taken[e] += 1
                if taken[e] > capacity:
                    continue
                total = sum(gate[chosen] for chosen in order[:num_experts_per_tok]) if norm_topk_prob else 1
                out[b][t] = out[b][t] + gate[e] / total * expert(x[b, t], expert_weights, e, gated, activation)
    return _stacked(out)


def sigmoid_choice(
    x: Tensor,
    token_mask: Tensor | None,
    gate_weight: Tensor,
    expert_weights: tuple[Tensor, Tensor],
    *,
    selection_bias: Tensor,
    num_experts_per_tok: int = 1,
    norm_topk_prob: bool = False,
    temperature: float | Tensor = 1.0,
    gated: bool = True,
    activation: str = "silu",
) -> Tensor:
    """A token takes the k experts of the highest sigmoid plus bias; its gates are the sigmoids, whatever the bias."""
    num_experts = len(expert_weights[1])
    out = _zeros(x)
    for b, t in _real(x, token_mask):
        score = [1 / (1 + (-(x[b, t] @ row) / temperature).exp()) for row in gate_weight]
        order = sorted(range(num_experts), key=lambda e, s=score: (s[e] + selection_bias[e]).item(), reverse=True)
        total = sum(score[e] for e in order[:num_experts_per_tok]) if norm_topk_prob else 1
        for e in order[:num_experts_per_tok]:
            out[b][t] = out[b][t] + score[e] / total * expert(x[b, t], expert_weights, e, gated, activation)
    return _stacked(out)


def default_moe(
    x: Tensor,
    token_mask: Tensor | None,
    gate_weight: Tensor,
    expert_weights: tuple[Tensor, Tensor],
    *,
    default_output: Tensor,
    num_experts_per_tok: int = 1,
    temperature: float | Tensor = 1.0,
    gated: bool = True,
    activation: str = "silu",
) -> Tensor:
    """A token's top k experts read it, all others give their default output (E, D); gates are its softmax."""
    out = _zeros(x)
    for b, t in _real(x, token_mask):
        gate = softmax([x[b, t] @ row / temperature for row in gate_weight])
        chosen = sorted(range(len(gate)), key=lambda e, gate=gate: -gate[e].item())[:num_experts_per_tok]
        for e, share in enumerate(gate):
            y = expert(x[b, t], expert_weights, e, gated, activation) if e in chosen else default_output[e]
            out[b][t] = out[b][t] + share * y
    return _stacked(out)


def expert_threshold(
    x: Tensor,
    token_mask: Tensor | None,
    gate_weight: Tensor,
    expert_weights: tuple[Tensor, Tensor],
    *,
    threshold: Tensor,
    scores: str = "sigmoid",
    temperature: float | Tensor = 1.0,
    gated: bool = True,
    activation: str = "silu",
) -> Tensor:
    """Each expert takes the tokens whose score is above its threshold (E,).

    The score is the logit, and its sigmoid the gate; or the logarithm of a softmax over the experts, which is the gate.
    """
    out = _zeros(x)
    for b, t in _real(x, token_mask):
        logits = [x[b, t] @ row / temperature for row in gate_weight]
        for e, (logit, share) in enumerate(zip(logits, softmax(logits), strict=True)):
            score, gate = (logit, 1 / (1 + (-logit).exp())) if scores == "sigmoid" else (share.log(), share)
            if score.item() > threshold[e].item():
                out[b][t] = out[b][t] + gate * expert(x[b, t], expert_weights, e, gated, activation)
    return _stacked(out)


def remoe(
    x: Tensor,
    token_mask: Tensor | None,
    gate_weight: Tensor,
    expert_weights: tuple[Tensor, Tensor],
    *,
    temperature: float | Tensor = 1.0,
    gated: bool = True,
    activation: str = "silu",
) -> Tensor:
    """The gate of an expert is its logit where that is positive, and else zero."""
    out = _zeros(x)
    for b, t in _real(x, token_mask):
        for e in range(len(gate_weight)):
            logit = x[b, t] @ gate_weight[e] / temperature
            if logit.item() > 0:
                out[b][t] = out[b][t] + logit * expert(x[b, t], expert_weights, e, gated, activation)
    return _stacked(out)


def soft_moe(
    x: Tensor,
    token_mask: Tensor | None,
    gate_weight: Tensor,
    expert_weights: tuple[Tensor, Tensor],
    *,
    num_slots: int,
    temperature: float | Tensor = 1.0,
    gated: bool = True,
    activation: str = "silu",
) -> Tensor:
    """Each slot reads a mixture of all tokens of a text, and each token gets a mixture of all slots' outputs.

    gate_weight is (E * num_slots, D), the slots of an expert one after the other.
    """
    out = _zeros(x)
    for b in range(x.shape[0]):
        text = [t for t in range(x.shape[1]) if token_mask is None or token_mask[b, t]]
        logits = {(t, s): x[b, t] @ row / temperature for t in text for s, row in enumerate(gate_weight)}
        outputs = []
        for s in range(len(gate_weight)):
            slot = torch.zeros_like(x[0, 0])
            for weight, t in zip(softmax([logits[t, s] for t in text]) if text else [], text, strict=True):
                slot = slot + weight * x[b, t]
            outputs.append(expert(slot, expert_weights, s // num_slots, gated, activation))
        for t in text:
            for weight, y in zip(softmax([logits[t, s] for s in range(len(gate_weight))]), outputs, strict=True):
                out[b][t] = out[b][t] + weight * y
    return _stacked(out)


def _real(x: Tensor, token_mask: Tensor | None) -> list[tuple[int, int]]:
    return [(b, t) for b in range(x.shape[0]) for t in range(x.shape[1]) if token_mask is None or token_mask[b, t]]


def _groups(x: Tensor, token_mask: Tensor | None, group_size: int) -> list[list[tuple[int, int]]]:
    """The real tokens (b, t) of each group that has any: rows 0 .. G-1 at one position, rows G .. 2G-1, and so on."""
    groups = []
    for start in range(0, x.shape[0], group_size):
        rows = range(start, min(start + group_size, x.shape[0]))
        for t in range(x.shape[1]):
            groups.append([(b, t) for b in rows if token_mask is None or token_mask[b, t]])
    return [group for group in groups if group]


def _zeros(x: Tensor) -> list[list[Tensor]]:
    return [[torch.zeros_like(x[b, t]) for t in range(x.shape[1])] for b in range(x.shape[0])]


def _stacked(rows: list[list[Tensor]]) -> Tensor:
    return torch.stack([torch.stack(row) for row in rows])
