"""Near-duplicate documents, found by MinHash: documents that share about half of their lines.

In a group, a near-duplicate would show the model its own future. For large texts several processes make the sketches.
Each runs this file as a script, so that it imports neither torch nor the rest of the package.

MinHash is written out here: which documents are dropped decides the hash of a corpus, and a library's next version may
draw other permutations.
"""

import os
import signal
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

# Two documents are duplicates if they agree in one of 16 bands of 4 hashes. With a share s of common lines they do so
# with the probability 1 - (1 - s^4)^16, which is 0.12 for 0.3, 0.64 for 0.5 and 0.99 for 0.7. Of many documents from
# one template nearly every one agrees with some other where the template has half of its lines.
BANDS, ROWS = 16, 4
# Random odd numbers: the hashes of a band times these, added up modulo 2^64, are one number for the band.
FACTORS = np.array([0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0xD6E8FEB86659FD93, 0xA0761D6478BD642F], dtype=np.uint64)
SHORTEST_LINE = 9  # bytes; shorter lines (`else:`) do not count, unless the others are next to nothing of a document
NEXT_TO_NOTHING = 0.03
CHUNK = 2**26  # bytes per process, which takes half a second to start and a second or two to sketch them
PART = 2**20  # bytes held at once


def _permutations() -> tuple[np.ndarray, np.ndarray]:
    """Factors, which are odd, and summands (BANDS * ROWS,), uint32, of permutations h -> factor * h + summand mod 2^32.

    NumPy promises that this generator's stream never changes.
    """
    generator, count = np.random.RandomState(1), BANDS * ROWS
    factors = generator.randint(0, 2**31, count, dtype=np.uint32) * np.uint32(2) + np.uint32(1)
    return factors, generator.randint(0, 2**32, count, dtype=np.uint32)


FACTOR, SUMMAND = _permutations()
HIGHEST = np.full(BANDS * ROWS, 2**32 - 1, dtype=np.uint32)  # what no line has lowered


def lowered(lowest: np.ndarray, lines: Iterable[bytes]) -> np.ndarray:
    """The lowest permuted hash (BANDS * ROWS,), uint32, of these lines and of those that `lowest` was made of."""
    hashes = np.array([zlib.crc32(line) for line in lines], dtype=np.uint32)
    if not len(hashes):
        return lowest
    # CRC is linear: without this finalizer of MurmurHash3, lines that differ in a bit would stay near each other.
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        hashes = (hashes ^ hashes >> np.uint32(shift)) * np.uint32(factor)
    hashes = hashes ^ hashes >> np.uint32(16)
    return np.minimum(lowest, (hashes[:, None] * FACTOR + SUMMAND).min(axis=0))


def sketch(file: int, offset: int, length: int, *, part: int = PART) -> np.ndarray:
    """Hashes of the bands (BANDS,) of a text: `length` bytes from `offset` of an open file. Zeros if it is blank.

    The text is read in parts of `part` bytes, which the result depends on only where a line is longer.
    """
    for shortest in (SHORTEST_LINE, 1):
        lowest, rest, counted = HIGHEST, b"", 0
        for start in range(offset, offset + length, part):
            text = rest + os.pread(file, min(part, offset + length - start), start)
            last = max(text.rfind(b"\n"), text.rfind(b"\r")) + 1
            if last == 0 and len(text) > part:  # a very long line
                last = len(text)
            rest = text[last:]
            lines = [line for line in map(bytes.strip, text[:last].splitlines()) if len(line) >= shortest]
            counted += sum(map(len, lines))
            lowest = lowered(lowest, set(lines))
        if len(rest.strip()) >= shortest:
            counted += len(rest)
            lowest = lowered(lowest, [rest.strip()])
        if (lowest < HIGHEST).any() and (shortest == 1 or counted >= NEXT_TO_NOTHING * length):
            bands = lowest.astype(np.uint64).reshape(BANDS, ROWS) * FACTORS
            return np.maximum(bands.sum(axis=1, dtype=np.uint64), np.uint64(1))
    return np.zeros(BANDS, dtype=np.uint64)


def _sketches(text: Path, places: np.ndarray, *, part: int = PART) -> np.ndarray:
    """Bands (documents, BANDS) of the documents at `places` (documents, 2), offset and length, of a file."""
    file = os.open(text, os.O_RDONLY)
    try:
        return np.array([sketch(file, int(offset), int(length), part=part) for offset, length in places])
    finally:
        os.close(file)


def _sketches_elsewhere(text: Path, places: np.ndarray) -> np.ndarray:
    command = [sys.executable, "-P", __file__, str(text)]  # -P: no module beside this file is imported
    done = subprocess.run(command, input=places.tobytes(), stdout=subprocess.PIPE, check=False)
    if done.returncode:
        raise OSError(f"looking for duplicates, a process ended with status {done.returncode}: out of memory?")
    return np.frombuffer(done.stdout, dtype=np.uint64).reshape(-1, BANDS)


def _chunks(text: Path, places: np.ndarray, chunk: int) -> Iterator[tuple[slice, np.ndarray]]:
    """Bands of all documents, chunk by chunk, in order."""
    read = np.cumsum(places[:, 1])
    edges = np.unique([0, *np.searchsorted(read, np.arange(chunk, read[-1], chunk)), len(places)])
    parts = [slice(a, b) for a, b in pairwise(edges.tolist())]
    from mixture_of_tokens.utils.cpu import cores  # not by the processes that run this file

    workers = min(cores(), len(parts), 8)
    if workers == 1:
        yield from ((part, _sketches(text, places[part])) for part in parts)
        return
    with ThreadPoolExecutor(workers) as pool:
        yield from zip(parts, pool.map(lambda part: _sketches_elsewhere(text, places[part]), parts), strict=True)


def unlike(
    text: Path,
    places: np.ndarray,
    digests: np.ndarray,
    work: Path,
    progress: Callable[[int], Any],
    *,
    keep_near: bool = False,
    chunk: int = CHUNK,
) -> tuple[np.ndarray, int]:
    """The numbers of the documents to keep, in an order set by their content alone, and the number of duplicates.

    A document is a duplicate if it agrees in a band with an earlier one, whether that one is kept or not; with
    `keep_near` if it is the same as an earlier one. Blank documents are left out too, but not counted.

    Args:
        text, places: A file and the offset and length (documents, 2), int64, of each document in it.
        digests: (documents,), uint64, hashes of their content.
        work: A folder for the bands, which take 128 bytes a document.
        progress: Called with the number of bytes sketched.
        chunk: Bytes per process; for a shorter text no other process is started.
    """
    # In a file: in memory, the bands of short documents would be as large as their text. Written, not mapped, as on a
    # full disk writing is an error, and changing a mapped page ends the process.
    file = work / "bands"
    with file.open("wb") as made:
        for part, found in _chunks(text, places, chunk):
            for number in range(BANDS):
                made.seek((number * len(places) + part.start) * 8)
                made.write(found[:, number].tobytes())
            progress(int(places[part, 1].sum()))

    def band(number: int) -> np.ndarray:
        return np.fromfile(file, np.uint64, len(places), offset=number * len(places) * 8)

    order = np.argsort(digests, kind="stable")
    order = order[band(0)[order] > 0]
    first = np.ones(len(order), dtype=bool)
    if keep_near:
        first[1:] = np.diff(digests[order]) != 0
    for number in range(0 if keep_near else BANDS):
        here = np.zeros(len(order), dtype=bool)
        here[np.unique(band(number)[order], return_index=True)[1]] = True
        first &= here
    file.unlink()
    return order[first], int(len(order) - first.sum())


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # ^C reaches the parent too, which then stops
    asked = np.frombuffer(sys.stdin.buffer.read(), dtype=np.int64).reshape(-1, 2)
    sys.stdout.buffer.write(_sketches(Path(sys.argv[1]), asked).tobytes())
