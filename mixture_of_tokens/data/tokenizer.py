"""Tokenizers: a byte-level BPE trained on the corpus, or an existing one; as transformers tokenizers."""

import hashlib
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from mixture_of_tokens.data.sources import located
from mixture_of_tokens.utils.files import naming
from mixture_of_tokens.utils.formatting import first_line
from mixture_of_tokens.utils.progress import warned_if_slow

END_OF_TEXT = "<|endoftext|>"
SMALLEST = 257  # 256 bytes and the end of text
# Its trainer takes memory for all of them at once, and ends the process where there is too little.
LARGEST_VOCABULARY = 2**22


def check_vocab_size(vocab_size: int | None) -> int:
    """Raises ValueError if a tokenizer of this size cannot be trained."""
    if vocab_size is None or vocab_size < SMALLEST:
        raise ValueError(f"vocab_size must be at least 257 (256 bytes and the end of text), not {vocab_size}")
    if vocab_size > LARGEST_VOCABULARY:
        raise ValueError(f"vocab_size must be at most {LARGEST_VOCABULARY}, not {vocab_size}")
    return vocab_size


def train_tokenizer(texts: Iterable[str], vocab_size: int | None) -> PreTrainedTokenizerFast:
    """Train on `texts`. The end-of-text token, number 0, separates documents and pads.

    Raises ValueError if `vocab_size` leaves no room for the 256 bytes and the end-of-text token.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=check_vocab_size(vocab_size),
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    special = {"eos_token": END_OF_TEXT, "pad_token": END_OF_TEXT, "padding_side": "left"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **special)


def load_tokenizer(name: str) -> PreTrainedTokenizerFast:
    """A tokenizer from a tokenizer.json, from a folder that holds one, or from the Hub; it pads on the left.

    Raises ValueError if it is missing or no tokenizer, or names no end-of-text token.
    """
    path = located(name)
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file() and (path.is_dir() or path.suffix == ".json"):
        raise ValueError(f"--tokenizer {name}: there is no {file}")
    try:
        if (file.parent / "tokenizer_config.json").is_file() and file.name == "tokenizer.json":
            tokenizer = PreTrainedTokenizerFast.from_pretrained(file.parent)
        elif file.is_file():
            tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_file(str(file)))
        else:
            # Which takes half a minute where there is no connection.
            with warned_if_slow(f"--tokenizer {name} is no file here, so it is a name on the Hub"):
                tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except OSError as error:
        if not path.exists():
            what = "there is no such file, and as a name on the Hub it cannot be loaded"
            raise ValueError(f"--tokenizer {name}: {what}: {first_line(error)}") from None
        raise naming(error, file) from error
    except BaseException as error:  # of many kinds
        refuse(error, f"{name} is no tokenizer")
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ValueError(f"{name} is no fast tokenizer: it has no tokenizer.json")
    if tokenizer.eos_token_id is None and END_OF_TEXT in tokenizer.get_vocab():
        tokenizer.eos_token = END_OF_TEXT
    if tokenizer.eos_token_id is None:
        ways = f"call it {END_OF_TEXT}, or put the file into a folder beside a tokenizer_config.json with an eos_token"
        raise ValueError(f"{name} names no end-of-text token: {ways}")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"
    tokenizer.name_or_path = name  # for messages; it is not saved
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    return tokenizer


def ids_of(tokenizer: PreTrainedTokenizerFast) -> int:
    """Rows that an embedding needs: the highest id and one more, as ids may have gaps."""
    return max(tokenizer.get_vocab().values()) + 1


def refuse(error: BaseException, what: str) -> NoReturn:
    """Raise ValueError in place of an error of tokenizers: the bare class, or, where its Rust panics, no Exception."""
    if isinstance(error, Exception) or type(error).__name__ == "PanicException":
        raise ValueError(f"{what}: {first_line(error)}") from error
    raise error


def hash_of(tokenizer: PreTrainedTokenizerFast) -> str:
    """A hash of all that determines how a tokenizer encodes text."""
    content = f"{tokenizer.backend_tokenizer.to_str()} {tokenizer.eos_token_id}"
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def tokenizer_in(directory: Path) -> PreTrainedTokenizerFast:
    """The one of prepared text. Raises ValueError where it cannot be read."""
    try:
        return PreTrainedTokenizerFast.from_pretrained(directory)
    except Exception as error:  # its file is as it was written, but perhaps by a newer version of tokenizers
        raise ValueError(f"the tokenizer in {directory} cannot be read: {first_line(error)}") from error


@contextmanager
def parallel_tokenizers() -> Iterator[None]:
    """Let tokenizers use all cores, whatever the environment variable was."""
    name = "TOKENIZERS_PARALLELISM"
    before = os.environ.get(name)
    os.environ[name] = "true"
    try:
        yield
    finally:
        del os.environ[name]
        if before is not None:
            os.environ[name] = before
