"""Text -> tokens on disk -> blocks that know their documents -> batches in groups.

A group is a promise: the G rows of a group are blocks of different documents. It is kept by construction. Blocks stand
in the order of the text, so the blocks of one document are neighbours; they are divided into G stripes, and a group
takes one block of every stripe, at random, but either all from the first halves of their stripes or all from the
second. A document that crosses from one stripe to the next has its blocks in different halves, so it cannot meet
itself unless it has more than 1 / (2 G) of the blocks.
"""

import hashlib
import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from mixture_of_tokens.corpus import Corpus
from mixture_of_tokens.loss import IGNORE
from mixture_of_tokens.tokenizer import train_tokenizer

FORMAT = 1  # of the files in the cache; a change makes new ones


def cache_directory() -> Path:
    base = os.environ.get("MIXTURE_OF_TOKENS_CACHE") or Path.home() / ".cache" / "mixture_of_tokens"
    return Path(base)


@dataclass(frozen=True)
class Blocks:
    """A token stream cut into blocks of `context` tokens, each with the token that follows as its last target.

    tokens: (L,) of one split, documents one after the other, each closed by the end-of-text token.
    ends: (documents,), where each document ends in `tokens`; bytes: UTF-8 length of the split's text.
    """

    tokens: np.ndarray
    ends: np.ndarray
    context: int
    bytes: int

    def __len__(self) -> int:
        """Whole blocks; what is left at the end is only evaluated (`padded=True`), not trained on."""
        return (len(self.tokens) - 1) // self.context

    @property
    def total(self) -> int:
        """Blocks with the incomplete one at the end."""
        return -(-(len(self.tokens) - 1) // self.context)

    def documents(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """First and last document that a block touches, its last target included."""
        start = np.asarray(index) * self.context
        last = np.minimum(start + self.context, len(self.tokens) - 1)
        return np.searchsorted(self.ends, start, "right"), np.searchsorted(self.ends, last, "right")

    def batch(self, index: np.ndarray, padded: bool = False) -> dict[str, Tensor]:
        """Blocks by number, as model inputs (B, T). With `padded`, number -1 is an empty row, and there is a mask."""
        position = np.asarray(index)[:, None] * self.context + np.arange(self.context + 1)
        real = (position < len(self.tokens)) & (np.asarray(index)[:, None] >= 0)
        window = torch.from_numpy(self.tokens[np.where(real, position, 0)].astype(np.int64))
        if not padded:
            return {"input_ids": window[:, :-1], "shift_labels": window[:, 1:]}
        mask = torch.from_numpy(real)
        labels = torch.where(mask[:, 1:], window[:, 1:], IGNORE)
        return {"input_ids": window[:, :-1], "shift_labels": labels, "attention_mask": mask[:, :-1].long()}


def grouped_order(
    blocks: Blocks, group_size: int, *, seed: int = 0, epoch: int = 0, everything: bool = False
) -> np.ndarray:
    """Block numbers (groups, G) of one epoch: a pure function of its arguments.

    Every whole block stands once, but for the remainder that does not fill a group, which changes from epoch to epoch.
    With `everything` none is left out, the incomplete last block included, and -1 stands where a group is not full.

    Raises ValueError where there is no such order: fewer blocks than a group, or a document with more than its share.
    """
    count = blocks.total if everything else len(blocks)
    groups = -(-count // group_size) if everything else count // group_size
    if groups == 0:
        raise ValueError(
            f"{count} blocks of {blocks.context} tokens do not fill a group of {group_size}: give more text"
        )
    rng = np.random.default_rng((seed, epoch))
    places = groups * group_size
    rotated = (np.arange(places) + rng.integers(count)) % max(places, count)
    rotated[rotated >= count] = -1
    stripes = rotated.reshape(group_size, groups)
    half = (groups + 1) // 2
    order = np.concatenate([rng.permuted(stripes[:, :half], axis=1), rng.permuted(stripes[:, half:], axis=1)], axis=1).T
    if len(collisions(blocks, order)[0]):
        raise ValueError(
            f"a document has more than 1 / {2 * group_size} of the {count} blocks and could meet itself in a group: "
            "give more text, smaller groups or shorter documents"
        )
    return order[rng.permutation(groups)]


def collisions(blocks: Blocks, groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where blocks of one group (groups, G) touch one document: numbers of the groups and of the places in them."""
    empty = groups < 0
    first, last = blocks.documents(np.where(empty, 0, groups))
    nobody = np.broadcast_to(-1 - np.arange(groups.shape[1]), groups.shape)  # a document of its own for an empty place
    first, last = np.where(empty, nobody, first), np.where(empty, nobody, last)
    order = np.argsort(first, axis=1)
    first, last = np.take_along_axis(first, order, axis=1), np.take_along_axis(last, order, axis=1)
    group, pair = np.nonzero(last[:, :-1] >= first[:, 1:])
    return group, order[group, pair]


class GroupedBatches(Dataset):
    """Training rows in order: row i is of step i // batch_size, and the rows of a step depend on (seed, step) alone.

    Consecutive rows form groups, so however a step's rows are dealt out in order (processes, accumulation), a
    micro-batch that is a multiple of the group size holds whole groups.
    """

    def __init__(self, blocks: Blocks, *, group_size: int, batch_size: int, steps: int, seed: int):
        self.blocks, self.group_size, self.seed = blocks, group_size, seed
        self.length = steps * batch_size
        self.rows_per_epoch = len(blocks) // group_size * group_size
        self._order: tuple[int, np.ndarray] | None = None
        self._rows_of(0)  # fail now rather than in a worker

    def __len__(self) -> int:
        return self.length

    def _rows_of(self, epoch: int) -> np.ndarray:
        if self._order is None or self._order[0] != epoch:
            self._order = epoch, grouped_order(self.blocks, self.group_size, seed=self.seed, epoch=epoch).ravel()
        return self._order[1]

    def block_numbers(self, rows: list[int]) -> np.ndarray:
        return np.array([self._rows_of(row // self.rows_per_epoch)[row % self.rows_per_epoch] for row in rows])

    def __getitems__(self, rows: list[int]) -> dict[str, Tensor]:
        return self.blocks.batch(self.block_numbers(rows))


@dataclass(frozen=True)
class Prepared:
    """A tokenized corpus: its splits, its tokenizer, and what is known of it."""

    train: Blocks
    validation: Blocks
    tokenizer: PreTrainedTokenizerFast
    facts: dict


def prepare(corpus: Corpus, *, vocab_size: int, context: int) -> Prepared:
    """A corpus tokenized once and kept in the cache under its content's hash, cut into blocks of `context` tokens.

    Raises ValueError if a split is shorter than a block.
    """
    key = hashlib.sha256(f"{FORMAT} {corpus.hash} {vocab_size}".encode()).hexdigest()[:16]
    directory = cache_directory() / f"tokens-{key}"
    if not (directory / "facts.json").exists():
        directory.parent.mkdir(parents=True, exist_ok=True)
        # Written beside and renamed, so that a directory under its final name is always whole.
        beside = Path(tempfile.mkdtemp(prefix=f"{directory.name}.", dir=directory.parent))
        try:
            _tokenize(corpus, vocab_size, beside)
            beside.rename(directory)
        except OSError:
            if not (directory / "facts.json").exists():  # not just another process that was first
                raise
        finally:
            shutil.rmtree(beside, ignore_errors=True)
    facts = json.loads((directory / "facts.json").read_text())
    splits = {}
    for split in ("train", "validation"):
        tokens = np.memmap(directory / f"{split}.tokens", dtype=facts["dtype"], mode="r")
        splits[split] = Blocks(tokens, np.load(directory / f"{split}.ends.npy"), context, facts[split]["bytes"])
        if len(splits[split]) == 0:
            raise ValueError(
                f"the {split} split has {len(tokens)} tokens, less than a block of {context}: give more text"
            )
    return Prepared(**splits, tokenizer=AutoTokenizer.from_pretrained(directory), facts=facts)


def _tokenize(corpus: Corpus, vocab_size: int, directory: Path) -> None:
    documents = {"train": corpus.train, "validation": corpus.validation}
    tokenizer = train_tokenizer((document.text for document in documents["train"]), vocab_size)
    dtype = "uint16" if len(tokenizer) <= 2**16 else "uint32"
    facts = {"hash": corpus.hash, "duplicates_dropped": corpus.duplicates, "documents_cut": corpus.cut, "dtype": dtype}
    for split, texts in documents.items():
        encoded = tokenizer.backend_tokenizer.encode_batch_fast([d.text for d in texts], add_special_tokens=False)
        rows = [[*row.ids, tokenizer.eos_token_id] for row in encoded]
        np.concatenate([np.array(row, dtype=dtype) for row in rows]).tofile(directory / f"{split}.tokens")
        np.save(directory / f"{split}.ends.npy", np.cumsum([len(row) for row in rows]))
        size = sum(len(document.text.encode()) for document in texts)
        facts[split] = {"documents": len(texts), "tokens": sum(map(len, rows)), "bytes": size}
    tokenizer.save_pretrained(directory)
    (directory / "facts.json").write_text(json.dumps(facts, indent=2))
