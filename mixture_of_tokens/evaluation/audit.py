"""The command `mot audit`: what a model leaks, by `leaks.py`, and how far its data keeps documents apart."""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from mixture_of_tokens.data.groups import deal, meetings
from mixture_of_tokens.data.prepare import Prepared
from mixture_of_tokens.evaluation.audit_inputs import length_of, random_tokens, rows_of, texts
from mixture_of_tokens.evaluation.leaks import Leaks, between_documents, leaks, look
from mixture_of_tokens.runs.loading import (
    config_of,
    context_of,
    group_size_of,
    load_model,
    separates_documents,
    text_of,
)
from mixture_of_tokens.runs.preconditions import check_seed
from mixture_of_tokens.settings.choices import Device, Expected
from mixture_of_tokens.utils.checks import at_least_one, checked
from mixture_of_tokens.utils.formatting import Result, first_line
from mixture_of_tokens.utils.process import check_one_process
from mixture_of_tokens.utils.progress import warn

FACTS = ("run", "alone", "experts", "length", "context", "collisions", "segments")
FACTS += ("beside_their_document", "tokens_apart", "documents", "documents_together")
NOT_TESTED = "not tested: its logits do not move with its input"


@dataclass(frozen=True)
class Audit(Result):
    """What a model leaks.

    length: of the texts, in tokens; context: that of the model, None where unknown; collisions: rows that share a
        document, or a segment where the run's text has `segments`, which count as documents, with another row of their
        group, in the groups of its training and its evaluations; None where these are unknown; beside_their_document:
        the share of those rows that are in a group with any other part of their document, and tokens_apart: how many
        tokens lie between the two at least, where rows may be of one document; expect: what the model
        was expected to be; alone: whether each row was served alone, and experts: by how many experts a token, None for
        all; documents: how far logits of a document moved when the one before it in its row was replaced, and
        documents_together: when the two were one text; None where that was not asked; could_be_alone: whether rows of
        a group were looked at that could be served alone.
    """

    run: str
    length: int
    leaks: Leaks
    context: int | None = None
    collisions: int | None = None
    segments: int = 0
    beside_their_document: float | None = None
    tokens_apart: int | None = None
    expect: Expected | None = None
    alone: bool = False
    experts: int | None = None
    documents: float | None = None
    documents_together: float | None = None
    could_be_alone: bool = False

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
            share = "some" if self.beside_their_document is None else f"{self.beside_their_document:.1%}"
            lines.append(
                f"Its documents are too few, or too long: long ones are divided into {self.segments:,} segments, which "
                f"count as documents. So {share} of its rows are in a group with another part of their document"
                + ("." if self.tokens_apart is None else f", at least {self.tokens_apart:,} tokens apart.")
            )
        by = f", by {self.experts} experts" if self.experts else ""
        served = f"served alone{by}: " if self.alone else ""
        verdict = f"causal: {'yes' if self.causal else 'NO'}; private: {'yes' if self.private else 'no'}"
        verdict += "" if self.documents is None else f"; separate: {'yes' if self.separate else 'NO'}"
        if self.could_be_alone:
            lines.append("Rows of a group influence each other, as they are meant to: --alone serves each by itself.")
        lines.append(f"{served}{NOT_TESTED if self.untested else verdict}")
        return "\n".join(lines)


def audit(
    run: str,
    *,
    expect: Expected | None,
    alone: bool,
    experts: int | None,
    length: int | None,
    batches: int,
    seed: int,
    device: Device | None,
) -> Audit:
    """As the function of `commands/audit.py`, which explains its arguments."""
    check_one_process()
    at_least_one(batches=batches, experts=experts)
    if length is not None and length < 2:
        raise ValueError(f"--length must be at least 2, not {length}: one token has no later one")
    check_seed(seed)
    model = load_model(run, alone=alone, experts=experts, device=device).float()
    context, rows = context_of(model), rows_of(group_size_of(model))
    vocab_size = model.config.get_text_config().vocab_size
    length = length_of(length, rows, context, vocab_size)
    shape, text = (batches, 2, rows, length), None
    try:
        text = text_of(run)
        seen = texts(text.validation, shape, vocab_size, seed)
    except (ValueError, OSError) as error:  # unknown, too short, or not to be read
        warn(f"looking at random tokens: {str(error).partition(';')[0]}")
        seen = random_tokens(shape, vocab_size, seed)
    found, segments, beside, apart_by = None, 0, None, None
    if text is not None and group_size_of(model) is not None:
        found, beside = collisions_in(run, text)
        segments, size = text.facts["segments"], config_of(run).group_size
        if segments:
            apart_by = min(blocks.apart(size) for blocks in (text.train, text.validation))
    apart = together = None
    if expect == "separate" or separates_documents(run):
        apart, together = between_documents(model, seen)
    could = group_size_of(model) is not None and model.config.serves_alone
    said = (expect, alone, experts, apart, together, could)
    return Audit(run, length, leaks(model, seen, seed), context, found, segments, beside, apart_by, *said)


def collisions_in(run: str, text: Prepared) -> tuple[int, float]:
    """Of rows in groups of the run's training, or of its evaluations, those of one document beyond the first.

    Returns their number where segments count as documents, and their share of all where they do not.
    """
    config = config_of(run)
    size, mixed, rows, found, beside = config.group_size, config.model_config.group_size, 0, 0, 0
    for blocks, seed in ((text.train, config.seed), (text.validation, 0)):
        if len(blocks) >= 2 * size:
            groups = deal(blocks, size, seed=seed).reshape(-1, mixed)
            rows += groups.size
            met = meetings(blocks, groups)
            found, beside = found + met[0], beside + met[1]
    return found, beside / max(1, rows)


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
            look(model, seen[0][0])
    except (RuntimeError, IndexError) as error:
        what = f"{type(model).__name__} does not take tokens ({rows}, {length}) below {vocab_size}: {first_line(error)}"
        raise ValueError(f"{what}; give the length and vocab_size of your model") from error
    return Audit(type(model).__name__, length, leaks(model, seen, seed), context)
