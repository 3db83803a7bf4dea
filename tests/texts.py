"""Pseudo-text for the tests of data."""

import numpy as np


def sentences(seed: int, lines: int) -> str:
    """Lines of six six-letter words, hardly one of which stands in another text."""
    words = np.random.default_rng(seed).integers(0, 26**3, size=(lines, 6))
    return "\n".join(" ".join(chr(97 + w % 26) * 2 + chr(97 + w // 26 % 26) for w in line) for line in words)


def texts(count: int = 60, lines: int = 40) -> list[str]:
    return [sentences(i, lines + i % 7) for i in range(count)]
