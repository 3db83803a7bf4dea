"""Token files: written once, one split after the other, and read like an array."""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice, takewhile
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from mixture_of_tokens.data.splits import Splits, cut_by_tokens, pieces_of
from mixture_of_tokens.data.tokenizer import hash_of, ids_of, refuse
from mixture_of_tokens.utils.files import opened
from mixture_of_tokens.utils.formatting import first_line
from mixture_of_tokens.utils.progress import progress_bar

FORMAT = 6  # of the files in the cache; after a change they are made anew
# Encoding takes some hundred bytes of memory per token, so tokenizers get small batches of small pieces of text.
BATCH, PIECE, TRAINING_PIECE = 2**21, 2**20, 2**16
TRAINING_BYTES = 10**8  # of text that a tokenizer is trained on
TRIED, CHARACTERS_TRIED = 100, 2_000  # pieces of text that a given tokenizer is to give back
SHOWN = 20  # characters of what it alters


def bar_of_bytes(what: str, total: int | None = None) -> tqdm:
    return progress_bar(what, total=total, unit="B", unit_scale=True, delay=2)


def tokenize(text: Path, splits: Splits, tokenizer: PreTrainedTokenizerFast, directory: Path, group_size: int) -> dict:
    """Write the tokenizer, the tokens of all documents, each closed by the end-of-text token, and where they end.

    Args:
        text: The file that holds the text of the documents.

    Returns a manifest without `files` and hashes.
    """
    dtype = "uint16" if ids_of(tokenizer) <= 2**16 else "uint32"
    facts: dict[str, Any] = {"dtype": dtype, "tokenizer": hash_of(tokenizer)}
    cut, digest = 0, hashlib.sha256()
    with (
        bar_of_bytes("Tokenizing", sum(int(part[:, 1].sum()) for part in splits.places.values())) as bar,
        opened(text) as file,
    ):
        for name, part in splits.places.items():
            shortened = splits.cut[name]
            while True:
                done, hashed = bar.n, digest.copy()
                hashed.update(f"{name} {len(part)}".encode() + part[:, 1].tobytes())
                ends = _write(file, part, tokenizer, directory / f"{name}.tokens", dtype, hashed, bar)
                shorter = cut_by_tokens(file, part, np.diff(ends, prepend=0), group_size)
                if np.array_equal(shorter, part):
                    break
                some = shorter[:, 1] > 0  # of a single character nothing may be left
                shortened = (shortened | (shorter != part).any(axis=1))[some]
                part = shorter[some]
                bar.update(done - bar.n)
            digest = hashed
            cut += int(shortened.sum())
            np.save(directory / f"{name}.ends.npy", ends)
            tokens = int(ends[-1]) if len(ends) else 0
            facts[name] = {"documents": len(part), "tokens": tokens, "bytes": int(part[:, 1].sum())}
    try:
        tokenizer.save_pretrained(directory)
    except Exception as error:  # on a full disk tokenizers raises the bare class
        raise OSError(f"the tokenizer cannot be written to {directory}: {first_line(error)}") from error
    facts |= {"hash": digest.hexdigest()[:16], "duplicates_dropped": splits.duplicates, "documents_cut": cut}
    facts["bytes_cut"] = splits.bytes - sum(facts[name]["bytes"] for name in splits.places)
    return {"format": FORMAT, "facts": facts}


def _write(
    file: int, places: np.ndarray, tokenizer: PreTrainedTokenizerFast, path: Path, dtype: str, digest, bar: tqdm
) -> np.ndarray:
    """Write the tokens of one split. Returns where its documents end (documents,)."""
    ends = np.zeros(len(places), dtype=np.int64)
    document = total = 0
    with path.open("wb") as out:
        for batch in batches(file, places):
            for tokens, closes in encoded(tokenizer, batch):
                out.write(np.array(tokens, dtype=dtype).tobytes())
                total += len(tokens)
                if closes:
                    ends[document] = total
                    document += 1
            for piece, _ in batch:
                digest.update(piece)
                bar.update(len(piece))
    return ends


def batches(file: int, places: np.ndarray) -> Iterator[list[tuple[bytes, bool]]]:
    """Batches of a few megabytes of pieces of documents, each with whether it is the last of its document."""
    batch, size = [], 0
    for offset, length in places:
        left = int(length)
        for piece in pieces_of(file, int(offset), int(length), PIECE):
            left -= len(piece)
            batch.append((piece, left == 0))
            size += len(piece)
            if size >= BATCH:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch


def training_text(text: Path, places: np.ndarray, progress: Callable[[int], Any]) -> Iterator[str]:
    left = TRAINING_BYTES
    with opened(text) as file:
        for offset, length in places:
            for piece in pieces_of(file, int(offset), int(length), TRAINING_PIECE):
                yield piece.decode()
                progress(len(piece))
                left -= len(piece)
                if left < 0:
                    return


def encoded(tokenizer: PreTrainedTokenizerFast, batch: list[tuple[bytes, bool]]) -> Iterator[tuple[list, bool]]:
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ValueError(f"a {type(tokenizer).__name__} cannot be used: it is not a fast tokenizer")
    backend = tokenizer.backend_tokenizer
    before, backend.encode_special_tokens = backend.encode_special_tokens, True  # `<|endoftext|>` in a text is text
    try:
        rows = backend.encode_batch_fast([piece.decode() for piece, _ in batch], add_special_tokens=False)
    except BaseException as error:
        refuse(error, f"the tokenizer {tokenizer.name_or_path} cannot encode the text".replace("  ", " "))
    finally:
        backend.encode_special_tokens = before
    for row, (_, closes) in zip(rows, batch, strict=True):
        yield (row.ids if not closes or tokenizer.eos_token_id is None else [*row.ids, tokenizer.eos_token_id]), closes


def altered(tokenizer: PreTrainedTokenizerFast, pieces: Iterable[str]) -> tuple[str, str] | None:
    """Where tokens do not give a piece of text back: some characters of it, and what comes in their place. Else None.

    Whitespace at the ends does not count, as some tokenizers begin every text with a space.
    """
    for piece in islice(pieces, TRIED):
        text = piece[:CHARACTERS_TRIED].strip()
        [(ids, _)] = encoded(tokenizer, [(text.encode(), False)])
        given_back = tokenizer.backend_tokenizer.decode(ids, skip_special_tokens=False).strip()
        if given_back != text:
            equal = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(text, given_back, strict=False)))
            return text[equal : equal + SHOWN], given_back[equal : equal + SHOWN]
    return None


@dataclass(frozen=True)
class TokenFile:
    """A token stream in a file, read like an array: by `len` and by an array of positions in square brackets.

    Every reading maps the file anew, which costs some 30 microseconds. A lasting map would keep its pages, and this
    process's memory would grow to the size of the corpus.
    """

    path: Path
    dtype: str
    length: int

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, position: np.ndarray) -> np.ndarray:
        return np.memmap(self.path, dtype=self.dtype, mode="r")[position]
