"""Continuations of one batch of prompts, by any causal language model."""

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from mixture_of_tokens.generation.stream import text_after
from mixture_of_tokens.models.forward_hooks import evaluating
from mixture_of_tokens.runs.loading import context_of, group_size_of
from mixture_of_tokens.runs.preconditions import check_seed
from mixture_of_tokens.settings.choices import TEMPERATURE
from mixture_of_tokens.utils.checks import at_least_one

SHARPEST, FLATTEST = 1e-6, 1e6  # temperatures: logits divided by them are finite in float32, and not 0


class Sampling(NamedTuple):
    """How continuations are drawn. Temperature 0 takes the likeliest token, whatever the seed."""

    max_new_tokens: int = 64
    temperature: float = TEMPERATURE
    top_p: float = 1.0
    seed: int = 0

    def check(self) -> None:
        """Raises ValueError for what cannot be sampled with."""
        at_least_one(max_new_tokens=self.max_new_tokens)
        if self.temperature != 0 and not SHARPEST <= self.temperature <= FLATTEST:
            raise ValueError(f"--temperature must be 0 or {SHARPEST:g} to {FLATTEST:g}, not {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"--top-p must be above 0 and at most 1, not {self.top_p}")
        check_seed(self.seed)

    def of_batch(self, number: int) -> "Sampling":
        """With a seed of its own for each batch but the first, which no other seed's batch is likely to have."""
        seed = int(np.random.SeedSequence((self.seed, number)).generate_state(1)[0]) if number else self.seed
        return self._replace(seed=seed)

    def checked(self, _: Tensor, logits: Tensor) -> Tensor:
        """Raises ValueError for logits (B, V) that cannot be sampled from; -inf rules a token out."""
        if not (logits.amax(-1) / (self.temperature or 1)).isfinite().all():
            raise ValueError("the model's logits are not finite: there is nothing to sample from")
        return logits


DEFAULT = Sampling()


def continue_prompts(
    model, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], sampling: Sampling = DEFAULT
) -> list[str]:
    """What the model writes after each prompt. The prompts are one batch, so a Mixture of Tokens mixes them.

    Raises ValueError for a prompt that is empty or as long as the context, and for logits that are not finite.
    """
    encoded = encode(tokenizer, prompts, context_of(model))
    return [text for text, _ in draw(model, tokenizer, encoded, sampling)]


def encode(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], context: int, *, add_special_tokens: bool = False
) -> list[list[int]]:
    """Tokens of each prompt. Raises ValueError for one that is empty or leaves no room in the context."""
    for number, prompt in enumerate(prompts, 1):
        if any("\ud800" <= character <= "\udfff" for character in prompt):
            raise ValueError(f"prompt {number} is no text: it has bytes or escapes that are no Unicode character")
    encoded = tokenizer(list(prompts), add_special_tokens=add_special_tokens, verbose=False)["input_ids"]
    for number, (prompt, tokens) in enumerate(zip(prompts, encoded, strict=True), 1):
        if not tokens or not prompt:
            raise ValueError(f"prompt {number} is empty; give at least one character")
        if len(tokens) >= context:
            what = f"prompt {number}, {prompt[:40]!r}, has {len(tokens)} tokens"
            raise ValueError(f"{what} and leaves no room in the context of {context}")
    return encoded


def ends_of(model: Any, tokenizer: Any) -> list[int]:
    """The tokens that end a text: the tokenizer's own, and those of the model's generation_config."""
    theirs = getattr(model.generation_config, "eos_token_id", None)
    known = [tokenizer.eos_token_id, *(theirs if isinstance(theirs, list) else [theirs])]
    return list(dict.fromkeys(token for token in known if token is not None))


def draw(
    model, tokenizer: Any, encoded: list[list[int]], sampling: Sampling, streamer: BaseStreamer | None = None
) -> list[tuple[str, int]]:
    """Texts and numbers of tokens that continue a batch of prompts, as far as the context reaches.

    Rows that are mixed end together. Others do when each has filled the context: without the longest, they go on.
    """
    new: list[list[int]] = [[] for _ in encoded]
    going, done = list(range(len(encoded))), 0
    devices = [] if model.device.type == "cpu" else [model.device]
    with torch.random.fork_rng(devices, device_type=model.device.type):  # the caller's own numbers go on
        torch.manual_seed(sampling.seed)
        while going:
            rows = [encoded[i] + new[i] for i in going]
            room = min(sampling.max_new_tokens - done, context_of(model) - max(map(len, rows)))
            written = _written(model, tokenizer, rows, room, sampling, streamer)
            for i, tokens in zip(going, written, strict=True):
                new[i] += tokens
            done += room
            if group_size_of(model) is not None or done == sampling.max_new_tokens:
                break
            whole = [i for i, tokens in zip(going, written, strict=True) if len(tokens) == room]
            going = [i for i in whole if len(encoded[i]) + done < context_of(model)]
    return [(text_after(tokenizer, tokens, row), len(row)) for tokens, row in zip(encoded, new, strict=True)]


@torch.no_grad()
def _written(
    model, tokenizer: Any, encoded: list[list[int]], most: int, sampling: Sampling, streamer: BaseStreamer | None
) -> list[list[int]]:
    """So many tokens after each row, fewer after one that ends."""
    pad = next(token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if token is not None)
    width = max(map(len, encoded))
    ids = torch.tensor([[pad] * (width - len(tokens)) + tokens for tokens in encoded], device=model.device)
    mask = torch.tensor([[0] * (width - len(tokens)) + [1] * len(tokens) for tokens in encoded], device=model.device)
    ends = ends_of(model, tokenizer)
    with evaluating(model), _no_defaults(model):
        written = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=most,
            do_sample=sampling.temperature > 0,
            temperature=sampling.temperature or None,
            top_p=sampling.top_p if sampling.temperature else None,
            top_k=None,
            pad_token_id=pad,
            eos_token_id=ends or None,
            logits_processor=[sampling.checked],  # pyright: ignore[reportArgumentType]
            streamer=streamer,
        )
    return [list(itertools.takewhile(lambda token: token not in ends, row)) for row in written[:, width:].tolist()]


@contextmanager
def _no_defaults(model: Any) -> Iterator[None]:
    """A model without its generation_config, whose penalties and beams would replace what was asked for."""
    own = model.generation_config
    model.generation_config = GenerationConfig(cache_implementation=own.cache_implementation)
    try:
        yield
    finally:
        model.generation_config = own
