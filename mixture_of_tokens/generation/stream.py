"""A continuation as text: after its prompt, and as it is written."""

import itertools
from typing import Any, TextIO

import torch
from transformers.generation.streamers import BaseStreamer


def text_after(tokenizer: Any, prompt: list[int], new: list[int]) -> str:
    """Decoded together with the prompt, as some tokenizers drop a space at the beginning of a text."""
    before, both = (tokenizer.decode(tokens, skip_special_tokens=True) for tokens in (prompt, prompt + new))
    return both[len(before) :] if both.startswith(before) else tokenizer.decode(new, skip_special_tokens=True)


class Streamer(BaseStreamer):
    """Writes the text after one prompt as it grows, and at the end it is what `text_after` gives."""

    def __init__(self, tokenizer: Any, stream: TextIO, ends: list[int]):
        self.tokenizer, self.stream, self.ends = tokenizer, stream, ends
        self.prompt: list[int] | None = None
        self.new: list[int] = []
        self.shown = ""

    def put(self, value: torch.Tensor) -> None:
        if self.prompt is None:
            self.prompt = value.flatten().tolist()
            return
        self.new += itertools.takewhile(lambda token: token not in self.ends, value.flatten().tolist())
        text = text_after(self.tokenizer, self.prompt, self.new)
        if text.startswith(self.shown) and not text.endswith("\N{REPLACEMENT CHARACTER}"):  # of half a character
            self._show(text)

    def end(self) -> None:
        self._show(text_after(self.tokenizer, self.prompt or [], self.new))
        print(flush=True, file=self.stream)

    def _show(self, text: str) -> None:
        print(text[len(self.shown) :], end="", flush=True, file=self.stream)
        self.shown = text
