"""Pseudo-text and tokens for the tests, and which texts meet in a group."""

import random
from pathlib import Path

import numpy as np

from mixture_of_tokens.data.blocks import Blocks


def sentences(seed: int, lines: int) -> str:
    """Lines of six six-letter words, hardly one of which stands in another text."""
    words = np.random.default_rng(seed).integers(0, 26**3, size=(lines, 6))
    return "\n".join(" ".join(chr(97 + w % 26) * 2 + chr(97 + w // 26 % 26) for w in line) for line in words)


def texts(count: int = 60, lines: int = 40) -> list[str]:
    return [sentences(i, lines + i % 7) for i in range(count)]


def write_texts(folder: Path, lines: int) -> None:
    """300 texts with some structure to learn, in files."""
    choose = random.Random(0)
    words = ["".join(choose.choices("abcdefghijklmnop", k=choose.randint(2, 7))) for _ in range(400)]
    folder.mkdir()
    for number in range(300):
        own = choose.sample(words, 60)
        written = (" ".join(choose.choices(own, k=8)) for _ in range(lines))
        (folder / f"{number}.txt").write_text("\n".join(written))


def blocks_of(lengths: list[int], context: int) -> Blocks:
    """Token 1000 * d + i is number i of document d, so that a block tells where it comes from."""
    tokens = np.concatenate([1000 * d + np.arange(n) for d, n in enumerate(lengths)]).astype(np.uint32)
    return Blocks(tokens, np.cumsum(lengths), context, bytes=len(tokens))


def in_segments(lengths: list[int], context: int, group_size: int) -> Blocks:
    tokens = np.zeros(sum(lengths), dtype=np.uint16)
    return Blocks.of(tokens, np.cumsum(lengths), context, group_size, bytes=sum(lengths))


def groups_with_a_document_twice(blocks: Blocks, groups: np.ndarray) -> int:
    """How many there are (groups, G), counted document by document; -1 is no block."""
    found = 0
    for group in groups:
        first = group[group >= 0] * blocks.context
        begins, ends = (np.searchsorted(blocks.ends, at, side="right") for at in (first, first + blocks.context - 1))
        met = [document for begin, end in zip(begins, ends, strict=True) for document in range(begin, end + 1)]
        found += len(met) > len(set(met))
    return found
