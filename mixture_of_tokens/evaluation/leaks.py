"""What a causal language model leaks: from later tokens, and from the other rows of its batch.

The model is a black box: token ids (B, T) and a mask in, logits (B, T, V) out, in float32. Three questions in order:

    noise   how far are logits from float64 logits of the same batch? Other batch shapes, and experts that get more or
            fewer tokens, change the rounding by about as much
    future  do logits up to position k move when all later tokens are replaced: in a row, in the other rows, or in both?
    mates   do the logits of a row move when all other rows of the batch are replaced?

A fourth is for models whose rows hold several documents that are not to see each other: do logits of the second half of
all rows move when the first halves are replaced, where positions begin anew at the second? Where positions go on they
must, or the model does not look back at all.

A change counts as a leak where it is more than MARGIN times the noise. The replaced part itself must move: otherwise a
model that ignores its input would pass, and so would an audit that replaces nothing.
"""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mixture_of_tokens.utils.progress import progress_bar

MARGIN = 10
QUARTERS = 4


@dataclass(frozen=True)
class Leaks:
    """The largest changes of logits over some batches, in absolute numbers; `logits_std` is their scale.

    noise: of rounding; future: by what was replaced; moved: the least that a replaced part itself moved; mates: of a
        row when all other rows were replaced, and of these when it alone was.
    kl_mean, kl_largest, top1_flips: how that changes the distributions, by quarters of the positions:
        Kullback-Leibler divergence in nats, and the share of positions with another likeliest token.
    layers: how far it moves the residual stream after each block, as a share of its size; of models whose blocks are
        `model.layers`, as in most of transformers.
    """

    logits_std: float
    noise: float
    future: dict[str, float]
    moved: float
    mates: float
    kl_mean: list[float]
    kl_largest: list[float]
    top1_flips: list[float]
    layers: list[float]

    @property
    def allowed(self) -> float:
        """The change that rounding explains."""
        return MARGIN * self.noise

    @property
    def none_from_the_future(self) -> bool:
        """False also where nothing was tested."""
        return self.moved > self.allowed and all(change <= self.allowed for change in self.future.values())

    @property
    def tests_nothing(self) -> bool:
        """Whether not even the replaced part itself moved."""
        return all(change <= self.allowed for change in (self.moved, *self.future.values()))


@torch.no_grad()
def leaks(model, texts: list[tuple[Tensor, Tensor]], seed: int = 0) -> Leaks:
    """Replace parts of some batches, and measure how far all other logits move.

    Args:
        texts: For each batch token ids (B, T), and others that replace them, different everywhere.

    Raises ValueError for texts of one token.
    """
    if texts[0][0].shape[1] < 2:
        raise ValueError("texts of one token have no later ones to look for leaks from; the context must be at least 2")
    generator = torch.Generator().manual_seed(seed)
    noise, std, moved, by_other_rows, layers = [], [], [], [], []
    future: dict[str, list[float]] = {"its own": [], "the other rows'": [], "both": []}
    divergence, flips = [], []
    for number, (ids, others) in enumerate(texts):
        logits, states = look(model, ids)
        std.append(float(logits.std()))
        noise.append(_noise(model, ids, logits))
        rows, length = ids.shape
        own = torch.arange(rows) == int(torch.randint(rows, (), generator=generator))
        some = {0, length // 4, min(length // 2, length - 2), length - 2}
        every = range(number % (length - 1), length - 1, len(texts))  # all positions, over the batches
        what = f"Looking at batch {number + 1} of {len(texts)}"
        for k in progress_bar(what, sorted({*some, *every}), unit="position", delay=2, leave=False):
            for what, where in zip(future, (own, ~own, torch.ones_like(own)), strict=True):
                if where.any() and (k in some or what == "both"):
                    changed = ids.clone()
                    changed[where, k + 1 :] = others[where, k + 1 :]
                    apart = (look(model, changed)[0] - logits).abs()
                    future[what].append(float(apart[:, : k + 1].max()))
                    moved.append(float(apart[where, k + 1 :].max()))
        with_others, states_with_others = look(model, torch.where(own[:, None], ids, others))
        before, after = logits[own][0].log_softmax(-1), with_others[own][0].log_softmax(-1)
        by_other_rows.append(float((logits[own] - with_others[own]).abs().max()))
        if not own.all():
            with_another = look(model, torch.where(own[:, None], others, ids))[0]
            by_other_rows.append(float((logits[~own] - with_another[~own]).abs().max()))
        divergence.append((before.exp() * (before - after)).sum(-1))
        flips.append((before.argmax(-1) != after.argmax(-1)).float())
        pairs = zip(states, states_with_others, strict=True)
        layers.append([float((b[own] - a[own]).norm() / b[own].norm()) for b, a in pairs])
    quarters = _by_quarters(divergence)
    return Leaks(
        logits_std=max(std),
        noise=_largest(noise),
        future={what: _largest(changes) for what, changes in future.items()},
        moved=min(moved),
        mates=_largest(by_other_rows),
        kl_mean=[float(quarter.mean()) for quarter in quarters],
        kl_largest=[float(quarter.max()) for quarter in quarters],
        top1_flips=[float(quarter.mean()) for quarter in _by_quarters(flips)],
        layers=[max(layer) for layer in zip(*layers, strict=True)],
    )


@torch.no_grad()
def between_documents(model: PreTrainedModel, texts: list[tuple[Tensor, Tensor]]) -> tuple[float, float]:
    """How far logits of a row's second half move when all first halves are replaced: as documents apart, and as one.

    In all rows, at one position: what a row's first document gives to others of its group may come back from a later
    position of these, which is what being mixed means, and no attention across documents.
    """
    apart, together = [], []
    for ids, others in texts:
        half = ids.shape[1] // 2
        changed = torch.cat([others[:, :half], ids[:, half:]], dim=1)
        places = torch.cat([torch.arange(half), torch.arange(ids.shape[1] - half)]).expand_as(ids)
        for moved, positions in ((apart, places), (together, None)):
            before, after = (look(model, each, positions)[0] for each in (ids, changed))
            moved.append(float((before - after)[:, half:].abs().max()))
    return _largest(apart), _largest(together)


def _largest(changes: list[float]) -> float:
    """NaN where one is: what cannot be compared is no small change."""
    return float(torch.tensor(changes, dtype=torch.float64).max()) if changes else 0.0


def _by_quarters(of_positions: list[Tensor]) -> list[Tensor]:
    """The first quarters of some texts (T,), their second ones, and so on; of T parts where a text is shorter."""
    parts = (each.tensor_split(min(QUARTERS, len(each))) for each in of_positions)
    return [torch.cat(quarter) for quarter in zip(*parts, strict=True)]


def look(model, ids: Tensor, positions: Tensor | None = None) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Logits (B, T, V) and the residual stream (B, T, D) after each block.

    Args:
        positions: of tokens in their documents (B, T), for a model of transformers; by default a row is one text.
    """
    if not isinstance(model, PreTrainedModel):
        weight = next(model.parameters(), None)
        outputs = model(ids if weight is None else ids.to(weight.device))
        logits = outputs if isinstance(outputs, Tensor) else getattr(outputs, "logits", None)
        if logits is None:
            raise ValueError(
                f"{type(model).__name__} gives a {type(outputs).__name__}, which neither is logits nor has them"
            )
        if logits.dim() != 3 or logits.shape[:2] != ids.shape or not logits.is_floating_point():
            gives = f"{type(model).__name__} gives {tuple(logits.shape)} of {logits.dtype}"
            raise ValueError(f"{gives} for tokens {tuple(ids.shape)}: logits are (B, T, V), floating point")
        return logits.cpu(), ()
    ids = ids.to(model.device)
    states: list[Tensor] = []

    def keep(block: nn.Module, inputs: Any, output: Any) -> None:  # `output_hidden_states` has the last one normalized
        states.append((output if isinstance(output, Tensor) else output[0]).cpu())

    hooks = [block.register_forward_hook(keep) for block in getattr(getattr(model, "model", None), "layers", ())]
    try:
        how = (
            {"attention_mask": torch.ones_like(ids)}
            if positions is None
            else {"position_ids": positions.to(ids.device)}
        )
        logits = model(input_ids=ids, **how, use_cache=False).logits
    finally:
        for hook in hooks:
            hook.remove()
    return logits.cpu(), tuple(states)


def _noise(model, ids: Tensor, logits: Tensor) -> float:
    """The largest change of logits when the batch is computed again, and in float64; where a model casts to float32 by
    itself, with all weights moved to the next number instead."""
    again = (look(model, ids)[0] - logits).abs().max()
    fast = getattr(getattr(model, "config", None), "_experts_implementation", None)
    if fast is not None:  # transformers' fast experts do not take float64
        model.set_experts_implementation("eager")
    try:
        exact = look(model.double(), ids)[0]
    except RuntimeError:
        moved = copy.deepcopy(model.float())
        for weight in moved.parameters():
            weight.copy_(torch.nextafter(weight, weight.new_tensor(torch.inf)))
        exact = look(moved, ids)[0]
    model.float()
    if fast is not None:
        model.set_experts_implementation(fast)
    return max(float(again), float((exact - logits).abs().max()), torch.finfo(logits.dtype).eps * float(logits.std()))
