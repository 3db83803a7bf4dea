"""A trained Mixture of Tokens as Token Choice, without any training, and how many experts a token needs then."""

import time
from dataclasses import dataclass
from typing import Any

import torch

from mixture_of_tokens.conversion.distil import distil
from mixture_of_tokens.conversion.switch import to_token_choice, token_choice_config
from mixture_of_tokens.data.groups import Blocks
from mixture_of_tokens.data.prepare import Prepared
from mixture_of_tokens.evaluation.losses import evaluate_blocks
from mixture_of_tokens.models.modeling import MixtureOfTokensForCausalLM
from mixture_of_tokens.planning.cost import flops_per_token
from mixture_of_tokens.settings.choices import Scores
from mixture_of_tokens.utils.formatting import aligned, loss
from mixture_of_tokens.utils.progress import say

ROWS = 1024  # of text that losses are measured on
WRITTEN, TIMES = 16, 5  # tokens that are written to time one, and how often
ENOUGH = 0.01  # nats above the lowest loss, with which fewer experts are chosen


@dataclass(frozen=True)
class TopK:
    """A model with this many experts a token.

    ms: milliseconds of a token written at batch 1, by this library; the least of some times, in turns with the others.
    """

    top_k: int
    loss: float
    flops_per_token: float
    ms: float


@dataclass(frozen=True)
class Distilled:
    """What a switch without training gives.

    split: of the text that losses are measured on, tuning, or validation where that is short.
    source: its loss in full groups, its FLOPs, and its time alone, in which all experts serve a token.
    """

    split: str
    source: TopK
    tried: list[TopK]
    chosen: TopK

    def __str__(self) -> str:
        named = [("Mixture of Tokens (its loss is in groups)", self.source)]
        named += [(f"top {each.top_k}", each) for each in self.tried]
        rows = [[name, loss(row.loss), f"{row.flops_per_token:,.0f}", f"{row.ms:.1f}"] for name, row in named]
        table = aligned([["", "loss", "FLOPs/token", "ms/token alone"], *rows])
        whole = "the whole validation text" if self.split != "validation" else "all of it"
        part = f"at most {ROWS:,} rows of the {self.split} text"
        table += f"\n\nLosses are of {part}: they do not compare with mot train's, by default of {whole}."
        if len(self.tried) == 1:
            return f"{table}\n\nTop {self.chosen.top_k} is written."
        why = f"the fewest experts with a loss at most {ENOUGH:g} nats above the lowest of these"
        return f"{table}\n\nTop {self.chosen.top_k} is written: {why}. --top-k chooses another."


def switch_and_distil(
    source: MixtureOfTokensForCausalLM, text: Prepared, *, top_k: int | None, scores: Scores, distil_steps: int
) -> tuple[MixtureOfTokensForCausalLM, Distilled]:
    """Switch and distil a trained Mixture of Tokens.

    Args:
        source: with calibrated companions, as `mot train` saves it.
        text: that it was trained on.
        top_k: experts a token; by default the fewest of k, k / 2 and k / 4, k being the granularity, that are as good
            as the best of these.
        distil_steps: for the first k; for fewer experts a quarter as many follow.

    Raises ValueError for what cannot be switched.
    """
    first = token_choice_config(source.config, top_k=top_k, scores=scores).num_experts_per_tok
    fewer = [] if top_k is not None else [k for k in (first // 2, first // 4) if k]
    split = "tuning" if len(text.tuning) >= source.config.group_size else "validation"
    blocks = getattr(text, split)
    if fewer:
        tops = " and ".join(map(str, fewer))
        say(f"Distilling for {first} experts a token; then for {tops}, each in a quarter of that time")
    made: list[MixtureOfTokensForCausalLM] = []
    for k in (first, *fewer):
        config = token_choice_config(source.config, top_k=k, scores=scores)
        target: Any = MixtureOfTokensForCausalLM(config).eval()
        target.to(source.device)
        if made:  # with a few experts less it is a short way
            target.load_state_dict(made[-1].state_dict())
            distil(source, target, text.train, steps=max(1, distil_steps // 4), again=True)
        else:
            to_token_choice(source, target)
            distil(source, target, text.train, steps=distil_steps)
        made.append(target)
    models, counts = [source, *made], [source.config.num_experts, first, *fewer]
    flops = [sum(flops_per_token(model.config, training=False).forward.values()) for model in models]
    each = zip(counts, models, flops, _milliseconds(models), strict=True)
    before, *tried = [TopK(k, loss_of(model, blocks), cost, ms) for k, model, cost, ms in each]
    best = best_of(tried)
    return made[tried.index(best)], Distilled(split, before, tried, best)


def best_of(tried: list[TopK]) -> TopK:
    """The fewest experts with a loss that is close enough to the lowest."""
    lowest = min(each.loss for each in tried)
    return min((each for each in tried if each.loss <= lowest + ENOUGH), key=lambda each: each.top_k)


def loss_of(model: MixtureOfTokensForCausalLM, blocks: Blocks) -> float:
    """Of at most `ROWS` rows, in full groups unless they are served alone."""
    size = model.config.group_size
    return evaluate_blocks(model, blocks, group_size=size, batch_size=size, groups=max(1, ROWS // size))["loss"]


def _milliseconds(models: list[MixtureOfTokensForCausalLM]) -> list[float]:
    """Of a token of a lone text, written with the cache of keys and values; the least of some texts, model by model."""
    new = max(1, min(WRITTEN, models[0].config.max_position_embeddings - 1))
    prompt: Any = torch.zeros(1, 1, dtype=torch.long, device=models[0].device)
    seen: Any = torch.ones_like(prompt)  # token 0 may be the one that pads
    seconds: list[list[float]] = [[] for _ in models]
    for _ in range(TIMES):
        for model, own in zip(models, seconds, strict=True):
            begun = time.perf_counter()
            model.generate(prompt, attention_mask=seen, max_new_tokens=new, min_new_tokens=new, do_sample=False)
            own.append(time.perf_counter() - begun)
    return [1000 * min(own) / new for own in seconds]
