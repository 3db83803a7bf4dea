"""Text -> token files with a manifest, made once, kept in a cache under a hash of content and options.

A cache entry is made in a folder beside it, under a lock, and renamed when it is complete and on the disk. The next
process that prepares data deletes what a killed one has left.

The manifest holds the SHA-256 of every file and of itself. A process checks all of them when it first takes an entry
from the cache. Token files are rarely larger than their text, so this takes no longer than hashing local sources, by
which the entry is found. A damaged entry is made again. What is damaged after the check is not noticed.
"""

import hashlib
import json
import platform
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from transformers import PreTrainedTokenizerFast

from mixture_of_tokens.data import sources as corpus
from mixture_of_tokens.data.blocks import Blocks, say_segments
from mixture_of_tokens.data.files import Document
from mixture_of_tokens.data.splits import SPLITS, longest_share, split, spool
from mixture_of_tokens.data.tokenizer import (
    check_vocab_size,
    hash_of,
    ids_of,
    load_tokenizer,
    parallel_tokenizers,
    tokenizer_in,
    train_tokenizer,
)
from mixture_of_tokens.data.tokens import FORMAT, TokenFile, altered, bar_of_bytes, tokenize, training_text
from mixture_of_tokens.utils import manifest
from mixture_of_tokens.utils.checks import at_least_one, check_number, checked
from mixture_of_tokens.utils.files import held, naming, published
from mixture_of_tokens.utils.formatting import few_of
from mixture_of_tokens.utils.progress import LOGGER, say_once

MUCH = 0.2  # of the text is cut away, or of the documents left out: worth a word
PARTIAL, LOCK = ".partial", ".lock"
KEEP_NEAR = "near-duplicates are kept"  # in the key of the cache
COMMON_GROUP = 32  # or more is what documents are cut for, and batches are dealt in, so that models share their data


@dataclass(frozen=True)
class Prepared:
    """A tokenized corpus: its splits, its tokenizer, and what is known of it.

    Settings are chosen on `tuning`, results reported on `validation`. `tuning` may be shorter than a block.
    facts: `hash` (of the kept text), `source`, `duplicates_dropped`, `documents_cut` and what they lost, `bytes_cut`,
    `segments` (how many far-apart parts of documents count as documents), `dtype`, `tokenizer` (a hash) and, by split,
    documents, tokens and bytes.
    """

    train: Blocks
    tuning: Blocks
    validation: Blocks
    tokenizer: PreTrainedTokenizerFast
    facts: dict
    directory: Path

    def __repr__(self) -> str:
        splits = ", ".join(f"{name}={getattr(self, name)}" for name in SPLITS)
        return f"Prepared({splits}, of {few_of(self.facts.get('source', []))}, in {self.directory})"

    def check(self) -> None:
        """Raises ValueError for a training or validation split that is shorter than a block."""
        for name in ("train", "validation"):
            blocks: Blocks = getattr(self, name)
            if not len(blocks):
                dropped = self.facts["duplicates_dropped"]
                why = f" ({dropped:,} documents were dropped as duplicates)" if dropped else ""
                raise ValueError(
                    f"the {name} split has {len(blocks.tokens)} tokens, less than a block of {blocks.context}: give "
                    f"more text{why}"
                )


@checked
def prepare_text(
    sources: Sequence[str | Path] | None = None,
    *,
    field: str = "text",
    max_bytes: int | None = None,
    vocab_size: int | None = None,
    context: int = 64,
    tokenizer: str | Path | None = None,
    group_size: int = 32,
    keep_near_duplicates: bool = False,
    together: bool = False,
    separate_documents: bool = False,
) -> Prepared:
    """Text without near-duplicates, split by document and tokenized; read from the cache if it is there.

    Args:
        sources: See `documents` in `sources.py`; by default the source text of Python's standard library.
        field: The field of .jsonl, .parquet and Hub rows that holds the text.
        max_bytes: Bytes of text to read at most.
        vocab_size: Size of the tokenizer to be trained, by default 512. With `tokenizer`, at least its length.
        context: Tokens in a block.
        tokenizer: A tokenizer.json, a folder with one or a Hub name.
        group_size: Documents are cut, or divided into segments, such that groups of this size, or smaller ones, can
            be made of different documents.
        keep_near_duplicates: Drop exact duplicates only, not documents that share many lines.
        together: The sources are parts of one, of which some may be empty, or shorter than a block.
        separate_documents: Documents of a row do not see each other; batches then have `position_ids`.

    Raises ValueError for bad sources or options, and if the training or validation split is shorter than a block.
    """
    at_least_one(context=context, group_size=group_size, max_bytes=max_bytes)
    for flag, number in {"--context": context, "--group-size": group_size}.items():
        check_number(flag, number)
    if sources is not None and not sources:  # as of a pattern that no file fits
        raise ValueError("there are no sources; give none at all for the source text of Python's standard library")
    named = [str(source) for source in sources or []]
    given, vocab_size = _given(None if tokenizer is None else str(tokenizer), vocab_size)
    group_size = max(COMMON_GROUP, group_size)
    before = [corpus.state_of(source) for source in named or [None]]
    # Sizes of files: their text is somewhat shorter, or longer if they are compressed.
    sizes = [None if states is None else sum(size for _, size, *_ in states.values()) for states in before]
    total = None if None in sizes else sum(size or 0 for size in sizes)
    with bar_of_bytes("Looking for the data in the cache", total) as bar:
        content = [corpus.fingerprint(source, bar.update) for source in named or [None]]
    options = [FORMAT, content, field, max_bytes, group_size, vocab_size if given is None else hash_of(given)]
    options += [KEEP_NEAR] * keep_near_duplicates
    key = hashlib.sha256(json.dumps(options).encode()).hexdigest()[:16]
    directory = corpus.cache_directory() / f"tokens-{key}"

    # As the key says: another process may learn of a newer one meanwhile.
    commits = {source: mark[-1] for source, size, mark in zip(named, sizes, content, strict=False) if size is None}

    def check_unchanged() -> None:
        for source, states in zip(named or [None], before, strict=True):
            states, now = states or {}, corpus.state_of(source) or {}
            if changed := [path for path in [*states, *now] if states.get(path) != now.get(path)]:
                raise ValueError(f"{changed[0]} was changed while it was read: prepare the text again")

    make = partial(
        _make,
        directory,
        corpus.documents(named, field, together=together, commits=commits),
        check_unchanged,
        max_bytes=max_bytes,
        total=min((each for each in (total, max_bytes) if each is not None), default=None),
        group_size=group_size,
        tokenizer=given,
        vocab_size=vocab_size,
        keep_near=keep_near_duplicates,
        may_be_empty=together,
    )
    in_cache = directory.exists()
    entry = _entry(directory, make)
    facts = entry["facts"]
    splits = _splits(directory, entry, context, group_size, separate_documents)
    named = named or [f"the standard library of Python {platform.python_version()}"]
    lost = facts.pop("altered", None)
    kept = given or tokenizer_in(directory)
    made = Prepared(
        **splits,
        tokenizer=kept,
        facts=facts | {"source": named, "segments": sum(blocks.segments for blocks in splits.values())},
        directory=directory,
    )
    if not together:
        made.check()
    if not in_cache:
        say_segments(named, group_size, *splits.values())
        _say_what_is_missing(named, facts, group_size, duplicates=not keep_near_duplicates)
    if lost:
        what = f"--tokenizer {tokenizer} does not keep text as it is: {lost[0]!r} becomes {lost[1]!r}"
        say_once(f"{what}. Bits a byte will be too low by what is lost")
    return made


def _given(tokenizer: str | None, vocab_size: int | None) -> tuple[PreTrainedTokenizerFast | None, int | None]:
    """The tokenizer that is named, if any, and the size of the vocabulary of one that is to be trained.

    Raises ValueError for a size that no tokenizer can have, or that the given one exceeds.
    """
    if tokenizer is None:
        return None, check_vocab_size(512 if vocab_size is None else vocab_size)
    given = load_tokenizer(tokenizer)
    if vocab_size is not None and vocab_size < (ids := ids_of(given)):
        raise ValueError(f"vocab_size {vocab_size} is less than the {ids} ids of {tokenizer}")
    return given, vocab_size


def _entry(directory: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The manifest of the entry of the cache, which is made if it is not there or damaged."""
    entry, _ = _whole(directory)
    if entry is None:
        with _one_at_a_time(directory):
            entry, damage = _whole(directory)  # another process may have made it meanwhile
            if damage is not None:
                LOGGER.info(f"{damage}: the prepared text is made again.")
            entry = make() if entry is None else entry
    return entry


def _splits(directory: Path, entry: dict[str, Any], context: int, group_size: int, separate: bool) -> dict[str, Blocks]:
    splits, facts = {}, entry["facts"]
    for name in SPLITS:
        tokens = TokenFile(directory / f"{name}.tokens", facts["dtype"], facts[name]["tokens"])
        ends = np.load(directory / f"{name}.ends.npy")
        how = {"bytes": facts[name]["bytes"], "separate": separate}
        splits[name] = Blocks.of(tokens, ends, context, group_size, **how)
    return splits


def _say_what_is_missing(sources: Sequence[str], facts: dict, group_size: int, *, duplicates: bool) -> None:
    """Once for a text, where much of it was cut or left out; `duplicates`: near-duplicates were left out."""
    cut = facts["bytes_cut"]
    whole = cut + sum(facts[name]["bytes"] for name in SPLITS)
    if cut > MUCH * whole:
        what = f"{cut:,} of {whole:,} bytes are cut from the ends of documents"
        why = f"no document may be more than {longest_share(group_size):.1%} of its split, or it is in a group twice"
        say_once(f"{few_of(sources)}: {what}: {why}; with more documents, or shorter ones, less is cut")
    dropped, trained = facts["duplicates_dropped"], facts["train"]["documents"]
    if duplicates and dropped > MUCH * (dropped + trained):
        what = f"{dropped:,} documents are left out, as they equal others or share many lines with them"
        left = f"{trained:,} are for training. --near-duplicates keep drops exact duplicates only"
        say_once(f"{few_of(sources)}: {what}; {left}")


@contextmanager
def _one_at_a_time(directory: Path) -> Iterator[None]:
    waiting = "Another process is preparing the same data: waiting for it."
    with ExitStack() as stack:
        try:
            directory.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(held(directory.with_suffix(LOCK), waiting))
        except OSError as error:
            what = f"prepared text is kept in {directory.parent}, which cannot be written: {error.strerror}"
            raise ValueError(f"{what}; MIXTURE_OF_TOKENS_CACHE names another folder") from None
        yield


def _whole(directory: Path) -> tuple[dict | None, str | None]:
    """The manifest of a cache entry whose every file is as it was written; or None, and what is damaged if it exists.

    Raises OSError if a file cannot be read.
    """
    try:
        with _hashing("Checking the cache", directory) as hash_of:
            damage = manifest.fault(directory, hash_of)
    except (FileNotFoundError, NotADirectoryError):  # there is none, or another process is making it again
        return None, None
    return (manifest.read(directory), None) if damage is None else (None, f"{directory} is damaged: {damage}")


# SHA-256 of files of the cache that this process has hashed, by inode, size and time of change: once is enough.
_HASHED: dict[tuple[int, ...], str] = {}


@contextmanager
def _hashing(what: str, directory: Path) -> Iterator[Callable[[Path], str]]:
    """A function that hashes the files of a directory, with one progress bar for all of them."""
    with bar_of_bytes(what, sum(path.stat().st_size for path in directory.iterdir())) as bar:

        def hash_of(path: Path) -> str:
            status = path.stat()
            known = status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
            if known in _HASHED:
                bar.update(status.st_size)
            else:
                _HASHED[known] = manifest.hash_of_file(path, bar.update)
            return _HASHED[known]

        yield hash_of


def _make(
    directory: Path,
    documents: Iterable[Document],
    check_unchanged: Callable[[], None],
    *,
    max_bytes: int | None,
    total: int | None,
    group_size: int,
    tokenizer: PreTrainedTokenizerFast | None,
    vocab_size: int | None,
    keep_near: bool,
    may_be_empty: bool,
) -> dict:
    """Make a cache entry; one that is there is damaged. Returns its manifest.

    Args:
        check_unchanged: Raises ValueError where what was read need not be what the directory is named after.
        total: Approximate bytes to read.
        vocab_size: Of the tokenizer to train if none is given.
    """
    if directory.exists():
        shutil.rmtree(directory)
    beside = directory.with_suffix(PARTIAL)
    _clear(beside)
    try:
        with published(beside, directory):
            beside.mkdir()
            text = beside / "text"
            with bar_of_bytes("Reading", total) as bar:
                places, digests = spool(documents, text, max_bytes, bar.update)
            check_unchanged()
            with bar_of_bytes("Looking for duplicates", int(places[:, 1].sum())) as bar:
                parts = split(
                    text,
                    places,
                    digests,
                    group_size=group_size,
                    work=beside,
                    progress=bar.update,
                    keep_near=keep_near,
                    may_be_empty=may_be_empty and tokenizer is not None,
                )
            with parallel_tokenizers():
                if tokenizer is None:
                    with bar_of_bytes("Training the tokenizer") as bar:
                        pieces = training_text(text, parts.places["train"], bar.update)
                        tokenizer = train_tokenizer(pieces, vocab_size)
                    lost = None
                else:
                    lost = altered(tokenizer, training_text(text, parts.places["train"], int))
                made = tokenize(text, parts, tokenizer, beside, group_size)
                if lost is not None:
                    made["facts"]["altered"] = lost
            text.unlink()
            with _hashing("Hashing the tokens", beside) as hash_of:
                manifest.write(beside, hash_of, **made)
    except OSError as error:  # errors of reading name the file; those of a full disk name none
        raise naming(error, directory.parent) from error
    return manifest.read(directory)


def _clear(own: Path) -> None:
    """Delete what killed processes have left in the cache beside `own`, which we hold: files whose lock nobody holds.

    Without this, half of a text that nobody prepares again would stay for ever.
    """
    for left in {path.stem for suffix in (PARTIAL, LOCK) for path in own.parent.glob(f"tokens-*{suffix}")} - {own.stem}:
        path = own.with_name(f"{left}{LOCK}")
        with suppress(Timeout, OSError), FileLock(path).acquire(timeout=0):
            shutil.rmtree(path.with_suffix(PARTIAL), ignore_errors=True)
            path.unlink()
