"""The command `mot data-report`."""

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from mixture_of_tokens.commands.calling import calls

if TYPE_CHECKING:
    from mixture_of_tokens.data.report import DataReport


@calls("data.report")
def data_report(
    *data: str | Path,
    field: str = "text",
    max_bytes: int | None = None,
    tokenizer: str | None = None,
    vocab_size: int | None = None,
    context: int = 64,
    group_size: int = 32,
    near_duplicates: Literal["drop", "keep"] = "drop",
) -> "DataReport":
    """Prepare a corpus and print what is in it.

    A collision is a block in a group with another block of the same document, or of the same segment, where segments of
    long documents count as documents. Three epochs of training and an evaluation are searched; there should be none.
    Where there are segments, a share of the rows are in a group with another part of their document.

    Args:
        data: Files, folders or globs of text, .jsonl (each also .gz or .zst) or .parquet; hf:NAME[:CONFIG][@REVISION]
            for a data set of the Hub; or packages, all that are installed here. By default the source text of Python's
            standard library.
        field: The field of .jsonl, .parquet and Hub rows that holds the text.
        max_bytes: Bytes of text to read at most; by default all.
        tokenizer: A tokenizer.json, a folder or a Hub name; by default one is trained on the data.
        vocab_size: Size of the tokenizer that is trained, by default 512. With `tokenizer`, at least its length.
        context: Tokens in a block.
        group_size: Blocks in a group. mot train deals in 32, unless the model's group size does not divide that, or the
            batch is no multiple of it.
        near_duplicates: What is done with documents that share about half of their lines with others.

    Raises ValueError for bad sources or options.
    """
    ...
