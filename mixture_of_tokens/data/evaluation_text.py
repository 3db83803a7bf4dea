"""A whole text in memory, as it is: what `mot evaluate --data` scores."""

import itertools
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerFast

from mixture_of_tokens.data.blocks import Blocks, say_segments
from mixture_of_tokens.data.files import Document
from mixture_of_tokens.data.sources import documents
from mixture_of_tokens.data.splits import spool
from mixture_of_tokens.data.tokenizer import parallel_tokenizers
from mixture_of_tokens.data.tokens import bar_of_bytes, batches, encoded
from mixture_of_tokens.utils.files import naming, opened


def whole_text(
    sources: Sequence[str],
    tokenizer: PreTrainedTokenizerFast,
    *,
    field: str = "text",
    context: int = 64,
    group_size: int = 32,
) -> Blocks:
    """All tokens of the sources, in memory: no document is dropped, cut or split off, but for blank ones.

    Raises ValueError for bad sources, and OSError where the disk has no room for their text in a temporary file.
    """
    rows, ends, length = [], [], 0
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "text"
        with bar_of_bytes("Reading") as bar:
            try:
                places, _ = spool(_not_blank(documents(sources, field)), text, None, bar.update)
            except OSError as error:  # errors of reading name the file
                raise naming(error, text) from error
        count = int(places[:, 1].sum())
        with bar_of_bytes("Tokenizing", count) as bar, opened(text) as file, parallel_tokenizers():
            for batch in batches(file, places):
                for tokens, closes in encoded(tokenizer, batch):
                    rows.append(np.array(tokens, dtype=np.int64))
                    length += len(tokens)
                    if closes:
                        ends.append(length)
                bar.update(sum(len(piece) for piece, _ in batch))
    blocks = Blocks.of(np.concatenate(rows), np.array(ends), context, group_size, bytes=count)
    say_segments(sources, group_size, blocks)
    return blocks


def _not_blank(given: Iterable[Document]) -> Iterator[Document]:
    for document in given:
        parts, blank = iter(document), []
        for part in parts:
            if part.strip():
                yield itertools.chain(blank, [part], parts)
                break
            blank.append(part)
