"""A corpus in parts, each of some files and prepared by itself: training begins with the first part, the others follow.

Parts are in the order of the files, and no file is in two. Each is what `prepare_text` makes of its files alone, with
the first one's tokenizer. Duplicates are dropped within a part, which is where groups are made; what a part holds out
stays unused, but for the first one's. Whoever needs a part makes it, under a lock, or waits for who does. Processes
that go before training make different parts (`prepare_ahead`), on one machine or on several that share the cache.
"""

import contextlib
import hashlib
import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor, cat
from tqdm import tqdm

from mixture_of_tokens.data import sources as corpus
from mixture_of_tokens.data.blocks import Blocks
from mixture_of_tokens.data.groups import GroupedBatches
from mixture_of_tokens.data.prepare import Prepared, prepare_text
from mixture_of_tokens.utils.formatting import few_of
from mixture_of_tokens.utils.process import end_with_parent, place_of_machine

READ_AHEAD = 3  # steps whose rows a loader may have asked for; several workers, which may be further, wait themselves


@dataclass(frozen=True)
class Parts:
    """sources: as they were named; files: of each part, in order; options: of `prepare_text`."""

    sources: list[str]
    files: list[list[str]]
    options: dict[str, Any]

    @classmethod
    def of(cls, sources: Sequence[str], part_bytes: int, **options: Any) -> "Parts":
        """Parts of at least so many bytes of files, the last one of at least half as many.

        Raises ValueError for text that is not in files.
        """
        if part_bytes < 1:
            raise ValueError(f"--part-bytes must be positive, not {part_bytes}")
        if not sources or corpus.PACKAGES in sources or any(source.startswith("hf:") for source in sources):
            raise ValueError("--part-bytes is for files: name them, their folders or globs with --data")
        parts: list[list[str]] = [[]]
        size = 0
        once: dict[Path, Path] = {}
        for path in (path for source in sources for path in corpus.files(source)):
            once.setdefault(path.resolve(), path)
        for path in once.values():
            if size >= part_bytes:
                parts.append([])
                size = 0
            parts[-1].append(str(path))
            size += path.stat().st_size
        if len(parts) > 1 and size < part_bytes / 2:  # what is left over
            parts[-2:] = [parts[-2] + parts[-1]]
        return cls(list(sources), parts, options)

    def first(self) -> Prepared:
        """The first part, whose facts stand for all: their hash is of its text, and of all names and sizes."""
        made = self._first
        sizes = [[Path(file).name, Path(file).stat().st_size] for part in self.files for file in part]
        whole = hashlib.sha256(json.dumps([made.facts["hash"], sizes]).encode()).hexdigest()[:16]
        return replace(made, facts=made.facts | {"hash": whole, "source": self.sources, "parts": len(self.files)})

    def prepare(self, number: int) -> Prepared:
        """Any part, by its number. Raises ValueError for a first one that is too short to train and to evaluate on."""
        if number == 0:
            return self._first
        options = self.options | {"tokenizer": self.tokenizer, "vocab_size": None}
        return prepare_text(self.files[number], **options, together=True)

    @cached_property
    def _first(self) -> Prepared:
        made = prepare_text(self.files[0], **self.options, together=True)
        made.check()
        return made

    @cached_property
    def tokenizer(self) -> str:
        """Of all parts: the one that was given, or the first part's."""
        return self.options.get("tokenizer") or str(self._first.directory)


class PartedBatches(GroupedBatches):
    """`GroupedBatches` of one part after the other, and then from the first part again, in another order.

    rows_of_parts: how many rows the first parts have, as far as it is known; hashes: of the text of parts that were
    read. A run that goes on gets both from its checkpoint, so that it needs no part that it has left behind. `ready` is
    called before every step, so all processes wait for a part at the same time and outside of what they do together,
    and the main process knows all rows.
    """

    def __init__(self, parts: Parts, **options: Any):
        self.parts, self.rows_of_parts = parts, []
        self.hashes: dict[int, str] = {}
        self._open: dict[int, Blocks] = {}
        self._ahead: Any = None
        super().__init__(self._part(0), **options)
        self.rows_of_parts = [self.rows_per_epoch]

    def _part(self, number: int) -> Blocks:
        """Raises ValueError for one whose text is another than when it was read before."""
        if number not in self._open:
            made = self.parts.prepare(number)
            if self.hashes.setdefault(number, made.facts["hash"]) != made.facts["hash"]:
                what = f"part {number + 1} of the text ({few_of(self.parts.files[number])}) has changed"
                raise ValueError(f"{what} since it was trained on: put it back, or name another directory with --out")
            self._open[number] = made.train
            for earlier in list(self._open)[:-2]:  # two, as the next one is asked for before this one's last rows
                del self._open[earlier]
        return self._open[number]

    def place(self, row: int) -> tuple[int, int, int]:
        """Of a row of all steps: how often all parts were read before, the part, and the row in it."""
        row += self.gone
        count, turn = len(self.parts.files), 0
        while True:
            for part in range(count):
                if part == len(self.rows_of_parts):
                    self.rows_of_parts.append(_rows_in(self._part(part), self.group_size))
                if row < self.rows_of_parts[part]:
                    return turn, part, row
                row -= self.rows_of_parts[part]
            turn += 1

    def position(self, step: int) -> dict[str, Any]:
        self.place(max(0, step * self.batch_size - 1))
        return {"rows_of_parts": self.rows_of_parts, "hashes_of_parts": self.hashes}

    def go_on_from(self, facts: dict[str, Any]) -> None:
        self.rows_of_parts = list(facts.get("rows_of_parts", self.rows_of_parts))
        self.hashes |= {int(number): its for number, its in facts.get("hashes_of_parts", {}).items()}

    def begin(self, step: int) -> None:
        needed = self.gone + self.length
        self._ahead = prepare_ahead(self.parts, len(self.rows_of_parts), needed, self.group_size)
        self.ready(step)

    def ready(self, step: int) -> None:
        last = min(self.length, (step + READ_AHEAD) * self.batch_size) - 1
        self._part(self.place(last)[1])

    def end(self) -> None:
        if self._ahead is not None:
            self._ahead.kill()

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_ahead": None}  # for the loader's workers

    def _batch(self, rows: list[int]) -> dict[str, Tensor]:
        batches: list[dict[str, Tensor]] = []
        places = [self.place(row) for row in rows]
        for key in dict.fromkeys(place[:2] for place in places):
            turn, part = key
            order = self._rows_of(turn * len(self.parts.files) + part)  # an epoch, so that no two orders are alike
            batches.append(self._part(part).batch(order[[row for *which, row in places if tuple(which) == key]]))
        return {name: cat([batch[name] for batch in batches]) for name in batches[0]}

    def _blocks_of(self, epoch: int) -> Blocks:
        return self._part(epoch % len(self.parts.files))


def _rows_in(part: Blocks, group_size: int) -> int:
    """Of its complete groups; 0 of a part that is too short to make groups of different documents."""
    groups = len(part) // group_size
    return groups * group_size if groups >= min(2, group_size) else 0


def prepare_ahead(parts: Parts, start: int, rows: int, group_size: int) -> Any:
    """Prepare the parts from `start` on in a process of its own, which ends with this one, and is returned.

    Of every machine the first process does, each other parts, the nearest ones first, as long as parts like those that
    it has made are needed for so many rows.
    """
    machine, machines, first = place_of_machine()
    mine = list(range(start + machine, len(parts.files), machines))
    if not (mine and first):
        return None
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=_prepare_all, args=(parts, mine, rows, group_size), daemon=True)
    process.start()
    return process


def _prepare_all(parts: Parts, numbers: list[int], rows: int, group_size: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it is for the one that trains
    end_with_parent()
    os.nice(10)
    tqdm.set_lock(threading.RLock())  # its own is shared by processes, and would be left over by one that is killed
    with (
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stderr(nowhere),
        contextlib.suppress(ValueError, OSError),  # who needs the part meets the error too, and tells it
    ):
        prepare_needed(parts, numbers, rows, group_size)


def prepare_needed(parts: Any, numbers: Iterable[int], rows: int, group_size: int) -> None:
    """Prepare these, one after the other, until so many rows would be there if all parts had their mean."""
    made = 0
    for count, number in enumerate(numbers, 1):
        made += _rows_in(parts.prepare(number).train, group_size)
        if number * made / count > rows:  # one more than is needed, as parts differ
            break
