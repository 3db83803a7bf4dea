"""Documents for training: the embedded corpus, and what makes a corpus fit for grouping.

Examples of one group must be independent texts: each holds, at every position, a share of its mates. Near-duplicate
documents would hand a model its own future, and so would a document large enough to meet itself in a group.
"""

import hashlib
import math
import re
import sysconfig
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from datasketch import MinHash, MinHashLSH

# Two documents are near-duplicates if they share about half of their lines; shorter lines (`else:`) say nothing.
SIMILARITY, SHORTEST_LINE = 0.5, 9
VALIDATION_SHARE = 0.1  # of the documents


@dataclass(frozen=True)
class Document:
    name: str
    text: str


@dataclass(frozen=True)
class Corpus:
    """Documents of each split in a random but fixed order, and what was left out of them."""

    train: list[Document]
    validation: list[Document]
    duplicates: int
    cut: int  # documents cut to their share

    @property
    def hash(self) -> str:
        """Runs are comparable only on equal hashes."""
        digest = hashlib.sha256()
        for document in [*self.train, *self.validation]:
            digest.update(hashlib.sha256(document.text.encode()).digest())
        return digest.hexdigest()[:16]


def standard_library() -> Iterator[Document]:
    """The source text of this Python's standard library, as far as it is installed."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        if not {"site-packages", "dist-packages"}.isdisjoint(path.relative_to(root).parts):
            continue
        try:
            yield Document(path.relative_to(root).as_posix(), path.read_text(encoding="utf-8"))
        except UnicodeDecodeError:  # test data in other encodings
            continue


def build(documents: Iterator[Document], largest_share: float = 1 / 80) -> Corpus:
    """Drop empty, exact and near duplicates, shuffle by content, split by document, and cut each to its share.

    Args:
        largest_share: of a split's text that one document may have; below 1 / (2 * group_size) it cannot meet itself.

    Raises ValueError if there are not two documents left, one for each split.
    """
    index = MinHashLSH(threshold=SIMILARITY, num_perm=64)
    kept: dict[str, Document] = {}
    duplicates = 0
    for document in documents:
        key = hashlib.sha256(document.text.encode()).hexdigest()
        lines = {line.strip().encode() for line in re.split(r"[\n\r]+", document.text)}
        lines = {line for line in lines if len(line) >= SHORTEST_LINE}
        sketch = MinHash(num_perm=64, hashfunc=zlib.crc32, seed=1)
        sketch.update_batch(lines)
        if not lines or key in kept or index.query(sketch):
            duplicates += bool(lines)
            continue
        index.insert(key, sketch)
        kept[key] = document
    if len(kept) < 2:
        raise ValueError(f"the corpus has {len(kept)} different documents; it takes at least 2")
    shuffled = [kept[key] for key in sorted(kept)]
    validation = max(1, round(VALIDATION_SHARE * len(shuffled)))
    train, held_out = _cut(shuffled[validation:], largest_share), _cut(shuffled[:validation], largest_share)
    shortened = len({id(document) for document in [*train, *held_out]} - {id(document) for document in shuffled})
    return Corpus(train, held_out, duplicates, shortened)


def _cut(documents: list[Document], largest_share: float) -> list[Document]:
    if len(documents) * largest_share < 1.25:  # so few that cutting would leave next to nothing
        return documents
    lengths = [len(document.text) for document in documents]
    longest, before = max(lengths), math.inf
    while longest < before:  # cutting lowers the total, and so what a share of it is
        before = longest
        longest = max(1, min(longest, int(largest_share * sum(min(length, longest) for length in lengths))))
    return [d if len(d.text) <= longest else Document(d.name, d.text[:longest]) for d in documents]
