"""Experts and their router, which Mixture of Tokens and the sparse routings share. Letters as in `mixture.py`."""

import math
from collections.abc import Callable, Sequence
from typing import Any, TypedDict

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mixture_of_tokens.layers.grouping import at_least_fp32, expert_linear, full_precision, is_autocast, precise_linear
from mixture_of_tokens.layers.losses import AuxiliaryLoss
from mixture_of_tokens.utils.checks import check, check_choice, check_range, check_sizes, shown

INITIALIZER_SCALE = math.sqrt(0.1)  # the authors' configuration files
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "relu": F.relu, "gelu": F.gelu}


def truncated_normal_(weight: Tensor, scale: float) -> None:
    """Fill with a normal of std = scale / sqrt(last dimension), cut at two std, so that 0.88 of the std remains.

    The std before the cut is the authors'. Their code cuts at 0.2 instead, which removes next to nothing.
    """
    check_range("initializer_scale", scale, gt=0)
    std = scale / math.sqrt(weight.shape[-1])
    nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)


def softmax(logits: Tensor, dim: int) -> Tensor:
    """In fp32 or better, whatever the router's precision."""
    return logits.softmax(dim, dtype=at_least_fp32(logits.dtype))


def highest(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k highest of the last dimension, and where they are."""
    if k == 1:
        return scores.max(dim=-1, keepdim=True)  # six times as fast as a top 1
    quarter, rest = divmod(scores.shape[-1], 4)
    if rest or quarter < 4 * k or scores.numel() < 2**14 or scores.device.type != "cpu":
        return scores.topk(k, dim=-1)
    # Faster than a top k of all, on a CPU: of sets of four, take the k whose own highest are highest, and look among
    # those alone.
    known = scores.detach()
    sets = known.unflatten(-1, (4, quarter)).amax(-2).topk(k, dim=-1).indices
    among = (sets[..., None, :] + torch.arange(0, 4 * quarter, quarter, device=sets.device)[:, None]).flatten(-2)
    where = among.gather(-1, known.gather(-1, among).topk(k, dim=-1).indices)
    return scores.gather(-1, where), where


def check_choices(num_experts_per_tok: int, num_experts: int, name: str = "num_experts_per_tok") -> None:
    check(name, num_experts_per_tok, int)
    if not 1 <= num_experts_per_tok <= num_experts:
        raise ValueError(f"{name} must be 1 to {num_experts}, not {num_experts_per_tok}")


def summed_over_processes(counts: Tensor, group: "torch.distributed.ProcessGroup | None" = None) -> Tensor:
    """Over the processes of a group, by default all of them, which all call it."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(counts, group=group)
    return counts


class Experts(nn.Module):
    """E feed-forward networks without biases: gated, down(act(gate(x)) * up(x)), or plain, down(act(up(x))).

    Weights are drawn with `initializer_scale`, by `truncated_normal_`.
    """

    def __init__(
        self,
        hidden_size: int,
        expert_size: int,
        num_experts: int,
        *,
        gated: bool = True,
        activation: str = "silu",
        initializer_scale: float = INITIALIZER_SCALE,
    ):
        super().__init__()
        check_sizes(hidden_size=hidden_size, expert_size=expert_size, num_experts=num_experts)
        check("gated", gated, bool)
        check_choice("activation", activation, ACTIVATIONS)
        self.gated, self.activation, self.initializer_scale = gated, activation, initializer_scale
        if gated:
            self.gate_up_proj = nn.Parameter(torch.empty(num_experts, 2 * expert_size, hidden_size))
        else:
            self.up_proj = nn.Parameter(torch.empty(num_experts, expert_size, hidden_size))
        self.down_proj = nn.Parameter(torch.empty(num_experts, hidden_size, expert_size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all weights (`truncated_normal_`)."""
        for weight in self.parameters():
            truncated_normal_(weight, self.initializer_scale)

    def forward(self, x_ERD: Tensor, linear: Callable[[Tensor, Tensor], Tensor] = expert_linear) -> Tensor:
        """Row r of x[e] goes through expert e. `linear(x, weight)` multiplies every expert's rows by its matrix."""
        act, own = ACTIVATIONS[self.activation], self.down_proj.dtype
        if x_ERD.shape[-1] != (hidden_size := self.down_proj.shape[1]):
            raise ValueError(f"x has rows of width {x_ERD.shape[-1]}, and hidden_size is {hidden_size}")
        if x_ERD.dtype != own and not is_autocast(x_ERD.device.type):
            raise ValueError(f"x is {x_ERD.dtype} and the experts are {own}: convert one of them, or use autocast")
        if self.gated:
            # Copied apart, since on narrow strided rows an activation takes three times as long.
            gate_ERF, up_ERF = (half.contiguous() for half in linear(x_ERD, self.gate_up_proj).chunk(2, dim=-1))
            hidden_ERF = act(gate_ERF) * up_ERF
        else:
            hidden_ERF = act(linear(x_ERD, self.up_proj))
        return linear(hidden_ERF, self.down_proj)

    def extra_repr(self) -> str:
        num_experts, hidden_size, expert_size = self.down_proj.shape
        return f"{hidden_size=}, {expert_size=}, {num_experts=}, gated={self.gated}, activation={self.activation!r}"


class Router(nn.Module):
    """Logits x . c_e / temperature, computed in `router_dtype` or in the input's type, whichever is more precise.

    The temperature is a setting outside the state dict; a schedule may change it between steps (`set_temperature`). For
    the compiler it is a constant, and varies from the first change on; with `dynamic=False` each value compiles anew.
    With `learnable_temperature` it is exp of the parameter `log_temperature`, which is not for weight decay: that would
    draw the temperature to 1. Weights are drawn as those of `Experts`.
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        *,
        temperature: float = 1.0,
        learnable_temperature: bool = False,
        router_dtype: torch.dtype = torch.float32,
        initializer_scale: float = INITIALIZER_SCALE,
    ):
        super().__init__()
        check_sizes(hidden_size=hidden_size, num_experts=num_experts)
        check("learnable_temperature", learnable_temperature, bool)
        if not isinstance(router_dtype, torch.dtype) or not router_dtype.is_floating_point:
            raise ValueError(f"router_dtype takes a floating-point torch.dtype, not {shown(router_dtype)}")
        self.router_dtype, self.temperature_setting = router_dtype, temperature
        self.initializer_scale = initializer_scale
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))
        self.log_temperature = nn.Parameter(torch.empty(())) if learnable_temperature else None
        self.reset_parameters()

    def set_temperature(self, temperature: float | Tensor) -> None:
        if isinstance(temperature, Tensor) and temperature.numel() == 1:  # of a schedule
            temperature = float(temperature)
        check_range("temperature", temperature, ge=1e-20, le=1e20)  # beyond it logits of fp32 vanish, or are infinite
        self.temperature_setting = float(temperature)
        if self.log_temperature is not None:
            nn.init.constant_(self.log_temperature, math.log(temperature))

    def reset_parameters(self) -> None:
        """Draw the weight anew, and set the temperature back to its setting."""
        truncated_normal_(self.weight, self.initializer_scale)
        self.set_temperature(self.temperature_setting)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Router":
        """As a module's; but `to(torch.bfloat16)` does not round the temperature, and `to_empty` does not lose it."""

        def but_precise(tensor: Tensor) -> Tensor:
            now = fn(tensor)
            dtype = at_least_fp32(now.dtype)
            if now.dim() or now.dtype == dtype:  # the weight, or no rounding
                return now
            return torch.empty_like(now, dtype=dtype) if tensor.is_meta else tensor.to(now.device, dtype)

        return super()._apply(but_precise, recurse)

    @property
    def temperature(self) -> Tensor | float:
        return self.temperature_setting if self.log_temperature is None else self.log_temperature.exp()

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., E)"""
        if x.shape[-1] != self.weight.shape[1]:
            raise ValueError(f"x has rows of width {x.shape[-1]}, and hidden_size is {self.weight.shape[1]}")
        dtype = torch.promote_types(self.router_dtype, x.dtype)
        with full_precision(x.device):
            weight = self.weight.to(dtype) / self.temperature
        return precise_linear(x, weight)

    def extra_repr(self) -> str:
        num_experts, hidden_size = self.weight.shape
        # Not what is learned, which would wait for the device, and has no value without memory.
        temperature = "learned" if self.log_temperature is not None else f"{self.temperature_setting:g}"
        return f"{hidden_size=}, {num_experts=}, temperature={temperature}, {self.router_dtype}"


class RoutedOptions(TypedDict, total=False):
    """Keywords of `Routed`, which every routing passes on."""

    gated: bool
    activation: str
    temperature: float
    learnable_temperature: bool
    router_dtype: torch.dtype
    initializer_scale: float


class Routed(nn.Module):
    """What Mixture of Tokens and the sparse routings share: experts and a router.

    Args:
        hidden_size, expert_size, num_experts: D, F and E.
        gated, activation: SwiGLU experts by default; `gated=False, activation="relu"` are the paper's.
        temperature, learnable_temperature, router_dtype: see `Router`.
        initializer_scale: see `truncated_normal_`.

    Raises ValueError for a size below 1, a temperature that is not positive and finite, an unknown activation, or an
    argument of another type.
    """

    # What training counted since the last `balance`, over micro-batches; no buffer, which DDP would overwrite.
    noted: Tensor | None = None

    def __init__(
        self,
        hidden_size: int,
        expert_size: int,
        num_experts: int,
        *,
        gated: bool = True,
        activation: str = "silu",
        temperature: float = 1.0,
        learnable_temperature: bool = False,
        router_dtype: torch.dtype = torch.float32,
        initializer_scale: float = INITIALIZER_SCALE,
        _logits_per_expert: int = 1,
    ):
        super().__init__()
        scale = {"initializer_scale": initializer_scale}
        self.num_experts = num_experts
        self.experts = Experts(hidden_size, expert_size, num_experts, gated=gated, activation=activation, **scale)
        self.gate = Router(
            hidden_size,
            num_experts * _logits_per_expert,
            temperature=temperature,
            learnable_temperature=learnable_temperature,
            router_dtype=router_dtype,
            **scale,
        )
        self.weights_of_an_expert = sum(weight[0].numel() for weight in self.experts.parameters())

    def forward(self, x_BTD: Tensor, token_mask: Tensor | None = None, return_weights: bool = False) -> Any:
        """What the layer adds to a residual stream.

        Args:
            x_BTD: (B, T, D), floating point; B examples of T positions.
            token_mask: (B, T), bool or integer, true where a token is real. Masked tokens influence nothing, and get 0.
            return_weights: also return the combine weights w (B, T, E), in fp32 or better: the output of expert e is
                multiplied by w[t, e] and added to token t's. They are 0 for experts that a token does not go to.

        Returns (B, T, D), in the type of x. Where rows form groups, these are rows 0 to G - 1, G to 2G - 1 and so on.

        Raises ValueError for other shapes and types.
        """
        raise NotImplementedError

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Routed":
        """As a module's; but `to(torch.bfloat16)` leaves in fp32 what is measured or moves by small steps."""
        before = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            now = getattr(self, name)
            precise = at_least_fp32(now.dtype)
            if now.dtype != precise:
                setattr(self, name, buffer.to(now.device, precise))
        return self

    def reset_parameters(self) -> None:
        """Draw all weights anew, and forget what was measured: after `to_empty`, for one."""
        self.experts.reset_parameters()
        if self.gate is not None:
            self.gate.reset_parameters()
        self.reset_state()

    def auxiliary_losses(self) -> list[tuple[AuxiliaryLoss, float | Tensor]]:
        """What training adds to the loss, in the order in which they are called, and what each is multiplied by."""
        return []

    def note_more(self, counted: Tensor) -> None:
        self.noted = counted if self.noted is None else self.noted + counted

    def taken(self, nothing: Tensor) -> Tensor:
        """What was noted, which is then forgotten; `nothing` in a process that saw no batch."""
        noted, self.noted = nothing if self.noted is None else self.noted, None
        return noted

    def reset_state(self) -> None:
        """Set what a layer keeps beside its weights as at the beginning of training."""

    @staticmethod
    def balance(layers: Sequence[Any], group: "torch.distributed.ProcessGroup | None" = None) -> None:
        """To be called after each step of training with all layers of this class; some routings change their state.

        Args:
            group: the processes that have these layers, and all call this; by default all that train.
        """
