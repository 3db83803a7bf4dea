"""What a causal language model leaks: from later tokens, and from the other rows of its batch. `mot audit`.

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
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel

from mixture_of_tokens.checks import at_least_one, checked
from mixture_of_tokens.data.groups import collisions, deal
from mixture_of_tokens.data.prepare import Prepared
from mixture_of_tokens.formatting import Result, first_line
from mixture_of_tokens.inference.probes import length_of, random_tokens, rows_of, texts
from mixture_of_tokens.model.placement import Device
from mixture_of_tokens.process import check_one_process
from mixture_of_tokens.runs.admission import check_seed
from mixture_of_tokens.runs.loading import (
    config_of,
    context_of,
    group_size_of,
    load_model,
    separates_documents,
    text_of,
)

MARGIN = 10
QUARTERS = 4
FACTS = ("run", "alone", "experts", "length", "context", "collisions", "segments", "documents", "documents_together")
Expected = Literal["causal", "private", "separate"]
NOT_TESTED = "not tested: its logits do not move with its input"


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


@dataclass(frozen=True)
class Audit(Result):
    """What a model leaks.

    length: of the texts, in tokens; context: that of the model, None where unknown; collisions: rows that share a
        document, or a segment where the run's text has `segments`, which count as documents, with another row of their
        group, in the groups of its training and its evaluations; None where these are unknown; expect: what the model
        was expected to be; alone: whether each row was served alone, and experts: by how many experts a token, None for
        all; documents: how far logits of a document moved when the one before it in its row was replaced, and
        documents_together: when the two were one text; None where that was not asked.
    """

    run: str
    length: int
    leaks: Leaks
    context: int | None = None
    collisions: int | None = None
    segments: int = 0
    expect: Expected | None = None
    alone: bool = False
    experts: int | None = None
    documents: float | None = None
    documents_together: float | None = None

    @property
    def causal(self) -> bool:
        return self.leaks.none_from_the_future and not self.collisions

    @property
    def private(self) -> bool:
        return self.causal and self.leaks.mates <= self.leaks.allowed

    @property
    def separate(self) -> bool:
        """Whether documents of a row do not see each other; False also where that was not asked, or tests nothing."""
        if self.documents is None or self.documents_together is None:
            return False
        return self.documents <= self.leaks.allowed < self.documents_together

    @property
    def untested(self) -> bool:
        return self.leaks.tests_nothing and not self.collisions

    @property
    def failure(self) -> str | None:
        """What is wrong where the model is not what was expected."""
        if self.expect is None or getattr(self, self.expect):
            return None
        return f"{self.run} is {NOT_TESTED if self.untested else f'not {self.expect}'}"

    def as_dict(self) -> dict[str, Any]:
        written = super().as_dict()
        verdicts = {"allowed": self.leaks.allowed, "causal": self.causal, "private": self.private}
        facts = {name: written[name] for name in FACTS}
        verdicts |= {} if self.documents is None else {"separate": self.separate}
        return facts | written["leaks"] | verdicts

    def __str__(self) -> str:
        leaks = self.leaks
        rows = [("nothing: rounding in float32", leaks.noise)]
        rows += [(f"later tokens, {what}", change) for what, change in leaks.future.items()]
        rows += [("all other rows of the batch", leaks.mates)]
        if self.documents is not None and self.documents_together is not None:
            rows += [("the document before, in all rows", self.documents)]
            rows += [("the same as one text with it", self.documents_together)]
        width = max(len(what) for what, _ in rows)
        lines = [f"{'What is replaced':<{width}}  largest change of a logit in the rest"]
        lines += [f"{what:<{width}}  {value:.1e}" for what, value in rows]
        lines += ["", f"Logits have a standard deviation of {leaks.logits_std:.1f}."]
        if self.context is not None and self.length < self.context:
            lines.append(f"Of the {self.context} positions the first {self.length} were looked at.")
        lines.append("")
        if leaks.mates > leaks.allowed:
            positions = f"by quarters of the {self.length} positions"
            lines.append(f"Other rows change the distribution of the next token by (nats, share), {positions}:")
            quarters = {"KL mean": leaks.kl_mean, "KL largest": leaks.kl_largest, "top 1 flips": leaks.top1_flips}
            for what, values in quarters.items():
                lines.append(f"  {what:<12}" + "".join(f"{value:>10.4f}" for value in values))
            if leaks.layers:
                shares = "".join(f"{value:>10.1%}" for value in leaks.layers)
                where = f"after blocks 1 to {len(leaks.layers)}"
                lines.append(f"They move the residual stream by this share of its size, {where}:\n  {'':<12}{shares}")
            lines.append("")
        if self.collisions is not None:
            unit = "segment" if self.segments else "document"
            lines.append(f"Rows of its text in a group with another of their {unit}: {self.collisions}")
        if self.segments:
            lines.append(
                f"Its documents are too few, or too long: {self.segments} far-apart segments count as documents, so "
                "rows of a group may be of one document."
            )
        by = f", by {self.experts} experts" if self.experts else ""
        served = f"served alone{by}: " if self.alone else ""
        verdict = f"causal: {'yes' if self.causal else 'NO'}; private: {'yes' if self.private else 'no'}"
        verdict += "" if self.documents is None else f"; separate: {'yes' if self.separate else 'NO'}"
        lines.append(f"{served}{NOT_TESTED if self.untested else verdict}")
        return "\n".join(lines)


@checked
def audit(
    run: str | Path,
    *,
    expect: Expected | None = None,
    alone: bool = False,
    experts: int | None = None,
    length: int | None = None,
    batches: int = 3,
    seed: int = 0,
    device: Device | None = None,
) -> Audit:
    """Look for leaks from the future and from batch-mates, by changing one thing and looking at everything else.

    Causal: no logit moves when later tokens change, in its own row or in others. Private: causal, and no logit moves
    when other rows of the batch change. Separate: no logit of a document moves when the one before it in its row
    changes; looked for where a run was trained so, or where it is expected. All positions of the texts are looked at.
    These are of the run where its text is known, or else random tokens.

    Args:
        run: A run directory, a checkpoint, or the name of a causal language model on the Hub.
        expect: Exit with status 1 unless the model is this; from Python, `failure` of what is returned says so.
        alone: Audit a Mixture of Tokens as `mot generate --alone` serves it.
        experts: With --alone, experts that a token goes to; by default all.
        length: Tokens of a text, at most the model's context; by default 64, or fewer where logits would take much
            memory. Time grows with its square.
        batches: Number of batches.
        seed: Seed of the batches and of the replaced tokens.
        device: cpu or cuda; by default cuda where there is one.

    Raises ValueError for bad options and for a run without a model.
    """
    check_one_process()
    at_least_one(batches=batches, experts=experts)
    if length is not None and length < 2:
        raise ValueError(f"--length must be at least 2, not {length}: one token has no later one")
    check_seed(seed)
    run = str(run)
    model = load_model(run, alone=alone, experts=experts, device=device).float()
    context, rows = context_of(model), rows_of(group_size_of(model))
    vocab_size = model.config.get_text_config().vocab_size
    length = length_of(length, rows, context, vocab_size)
    shape, text = (batches, 2, rows, length), None
    try:
        text = text_of(run)
        seen = texts(text.validation, shape, vocab_size, seed)
    except (ValueError, OSError) as error:  # unknown, too short, or not to be read
        print(f"mot: looking at random tokens: {str(error).partition(';')[0]}", file=sys.stderr)
        seen = random_tokens(shape, vocab_size, seed)
    found, segments = None, 0
    if text is not None and group_size_of(model) is not None:
        found, segments = collisions_in(run, text), text.facts["segments"]
    apart = together = None
    if expect == "separate" or separates_documents(run):
        apart, together = between_documents(model, seen)
    said = (expect, alone, experts, apart, together)
    return Audit(run, length, leaks(model, seen, seed), context, found, segments, *said)


def collisions_in(run: str, text: Prepared) -> int:
    """Rows that a group of the run's training, or of its evaluations, has of one document, beyond the first."""
    config = config_of(run)
    size, mixed, found = config.group_size, config.model_config.group_size, 0
    for blocks, seed in ((text.train, config.seed), (text.validation, 0)):
        if len(blocks) >= 2 * size:
            found += len(collisions(blocks, deal(blocks, size, seed=seed).reshape(-1, mixed))[0])
    return found


@checked
def audit_model(
    model: nn.Module,
    *,
    vocab_size: int | None = None,
    length: int | None = None,
    group_size: int | None = None,
    batches: int = 3,
    seed: int = 0,
) -> Audit:
    """As `audit`, for a causal language model of one's own with the layer inside, on random tokens.

    It says what the model does with any batch. It does not see in which batches the model is trained: rows of a group
    that are parts of one document are not found.

    Args:
        model: called with token ids (B, T) alone; gives logits (B, T, V), or an object that has them as `logits`.
            transformers' models get an attention mask too. A copy of it is looked at, in evaluation mode, float32 and
            float64.
        vocab_size: numbers of tokens are below this; by default that of the model's `config`, if it has one.
        length: tokens of a row, all positions of which are looked at; by default 64, or fewer where logits would take
            much memory or the model takes fewer.
        group_size: of its layers; a batch has two groups. None where rows do not meet.

    Raises ValueError for numbers that are too small, where `vocab_size` is missing and there is no `config`, and for a
    model that does not take such tokens.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"audit_model takes a module, not {type(model).__name__}; audit takes a run")
    least = {"vocab_size": (vocab_size, 2), "length": (length, 2)}
    least |= {"group_size": (group_size, 1), "batches": (batches, 1)}
    for what, (value, smallest) in least.items():
        if value is not None and value < smallest:
            raise ValueError(f"{what} must be at least {smallest}, not {value}")
    check_seed(seed)
    context = None
    if isinstance(model, PreTrainedModel):
        vocab_size, context = vocab_size or model.config.get_text_config().vocab_size, context_of(model)
    vocab_size = vocab_size or getattr(getattr(model, "config", None), "vocab_size", None)
    if vocab_size is None:
        raise ValueError(f"give vocab_size: {type(model).__name__} has no config that says it")
    rows = rows_of(group_size)
    length = length_of(length, rows, context, vocab_size)
    model = copy.deepcopy(model).float().eval()
    seen = random_tokens((batches, 2, rows, length), vocab_size, seed)
    try:
        with torch.no_grad():
            _look(model, seen[0][0])
    except (RuntimeError, IndexError) as error:
        what = f"{type(model).__name__} does not take tokens ({rows}, {length}) below {vocab_size}: {first_line(error)}"
        raise ValueError(f"{what}; give the length and vocab_size of your model") from error
    return Audit(type(model).__name__, length, leaks(model, seen, seed), context)


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
        logits, states = _look(model, ids)
        std.append(float(logits.std()))
        noise.append(_noise(model, ids, logits))
        rows, length = ids.shape
        own = torch.arange(rows) == int(torch.randint(rows, (), generator=generator))
        some = {0, length // 4, min(length // 2, length - 2), length - 2}
        every = range(number % (length - 1), length - 1, len(texts))  # all positions, over the batches
        what = f"Looking at batch {number + 1} of {len(texts)}"
        for k in tqdm(sorted({*some, *every}), what, unit="position", delay=2, dynamic_ncols=True, leave=False):
            for what, where in zip(future, (own, ~own, torch.ones_like(own)), strict=True):
                if where.any() and (k in some or what == "both"):
                    changed = ids.clone()
                    changed[where, k + 1 :] = others[where, k + 1 :]
                    apart = (_look(model, changed)[0] - logits).abs()
                    future[what].append(float(apart[:, : k + 1].max()))
                    moved.append(float(apart[where, k + 1 :].max()))
        with_others, states_with_others = _look(model, torch.where(own[:, None], ids, others))
        before, after = logits[own][0].log_softmax(-1), with_others[own][0].log_softmax(-1)
        by_other_rows.append(float((logits[own] - with_others[own]).abs().max()))
        if not own.all():
            with_another = _look(model, torch.where(own[:, None], others, ids))[0]
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
            before, after = (_look(model, each, positions)[0] for each in (ids, changed))
            moved.append(float((before - after)[:, half:].abs().max()))
    return _largest(apart), _largest(together)


def _largest(changes: list[float]) -> float:
    """NaN where one is: what cannot be compared is no small change."""
    return float(torch.tensor(changes, dtype=torch.float64).max()) if changes else 0.0


def _by_quarters(of_positions: list[Tensor]) -> list[Tensor]:
    """The first quarters of some texts (T,), their second ones, and so on; of T parts where a text is shorter."""
    parts = (each.tensor_split(min(QUARTERS, len(each))) for each in of_positions)
    return [torch.cat(quarter) for quarter in zip(*parts, strict=True)]


def _look(model, ids: Tensor, positions: Tensor | None = None) -> tuple[Tensor, tuple[Tensor, ...]]:
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
    again = (_look(model, ids)[0] - logits).abs().max()
    fast = getattr(getattr(model, "config", None), "_experts_implementation", None)
    if fast is not None:  # transformers' fast experts do not take float64
        model.set_experts_implementation("eager")
    try:
        exact = _look(model.double(), ids)[0]
    except RuntimeError:
        moved = copy.deepcopy(model.float())
        for weight in moved.parameters():
            weight.copy_(torch.nextafter(weight, weight.new_tensor(torch.inf)))
        exact = _look(moved, ids)[0]
    model.float()
    if fast is not None:
        model.set_experts_implementation(fast)
    return max(float(again), float((exact - logits).abs().max()), torch.finfo(logits.dtype).eps * float(logits.std()))
