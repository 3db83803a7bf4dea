"""Results of a benchmark: its conditions, its rows in a CSV file, and these as tables."""

import argparse
import csv
import datetime
import os
import random
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np

from mixture_of_tokens.runs import provenance
from mixture_of_tokens.utils.cpu import BRIEFLY, OWN_CHOICE, spin_briefly

MACHINE = ("date", "commit", "torch", "transformers", "python", "hardware", "cores", "threads", "onednn_isa", "waiting")
ENDS = ("", "_low", "_high")  # of the columns of a figure: its median and its quartiles
Key = TypeVar("Key", bound=tuple)


def with_brief_spinning() -> None:
    """Start the script again with OpenMP's threads as in `mot`: torch, which reads how they wait, is loaded by now."""
    if spin_briefly():
        os.execv(sys.executable, sys.orig_argv)


def surroundings(device: str | None) -> dict:
    """What a result depends on besides its flags."""
    versions = provenance.versions()
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": provenance.commit() or "unknown",
        **{name: versions[name] for name in ("torch", "transformers", "python")},
        **provenance.hardware(device),
        "onednn_isa": os.environ.get("ONEDNN_MAX_CPU_ISA") or ("all with AMX" if has_amx() else "all"),
        "waiting": waiting(),
    }


def waiting() -> str:
    """How OpenMP's threads wait for each other: as `mot` sets it, as OpenMP does, or as the environment says."""
    own = {name: os.environ[name] for name in OWN_CHOICE if name in os.environ}
    if own.items() <= BRIEFLY.items():
        return "mot" if own else "openmp"
    return " ".join(f"{name}={value}" for name, value in own.items())


def threads_of(row: dict) -> str:
    """How many a row had, and how they waited if not as `mot` sets it."""
    how = {"mot": "", "openmp": " that wait as OpenMP has them"}.get(row["waiting"], f", {row['waiting']}")
    return f"{row['threads']} threads{how}"


def has_amx() -> bool:
    """Whether the processor has units for products of matrices; two of one name may differ in that."""
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.exists() and "amx_tile" in cpuinfo.read_text().split()


def check_columns(path: Path, columns: Sequence[str]) -> None:
    """Raises ValueError or OSError if rows with these columns could not be appended to the file."""
    if not path.exists():
        path.touch()
        path.unlink()
        return
    with path.open("r+", newline="") as file:
        header = next(csv.reader(file), None)
    if header not in (None, list(columns)):
        raise ValueError(f"{path} has other columns than these results")


def append(path: Path, columns: Sequence[str], rows: Iterable[dict]) -> None:
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        if file.tell() == 0:
            writer.writeheader()
        writer.writerows(rows)


def run(
    parser: argparse.ArgumentParser,
    results: Path,
    columns: Sequence[str],
    measure: Callable[[argparse.Namespace], list[dict]],
    table: Callable[[list[dict]], str],
    by: Sequence[str],
) -> None:
    """Measure, append to --results, print; with --table print its latest rows by these columns and measure nothing."""
    parser.add_argument("--results", type=Path, default=results)
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    try:
        if args.table:
            found = latest(read(args.results), by)
        else:
            check_columns(args.results, columns)
            found = [measure(args)]
            append(args.results, columns, found[0])
    except (OSError, ValueError) as error:
        parser.error(str(error))
    print("\n\n".join(map(table, found)))


def in_turns(keys: Sequence[Key], rounds: int, seconds: Callable[..., float], of: str = "") -> dict[Key, np.ndarray]:
    """Seconds (rounds,) by key, in an order that is shuffled every round."""
    times: dict[Key, list[float]] = {key: [] for key in keys}
    for number in range(rounds):
        print(f"round {number + 1} of {rounds}{of}", file=sys.stderr)
        for key in random.sample(keys, len(keys)):
            times[key].append(seconds(*key))
    return {key: np.array(own) for key, own in times.items()}


def columns_of(*figures: str) -> tuple[str, ...]:
    return tuple(f"{figure}{end}" for figure in figures for end in ENDS)


def quartiles(**figures: np.ndarray) -> dict[str, float]:
    """The columns of figures, as `columns_of` names them."""
    found = [round(value, 4) for values in figures.values() for value in np.quantile(values, (0.5, 0.25, 0.75))]
    return dict(zip(columns_of(*figures), found, strict=True))


def with_quartiles(row: dict, figure: str, form: str = ".2f") -> str:
    middle, low, high = (format(float(row[column]), form) for column in columns_of(figure))
    return f"{middle} ({low} to {high})"


def read(path: Path) -> list[dict]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def latest(rows: Iterable[dict], columns: Sequence[str]) -> list[list[dict]]:
    """The rows of the latest run for each combination of values in `columns`."""
    runs: dict[tuple, dict[str, list[dict]]] = {}
    for row in rows:
        key = tuple(str(row[column]) for column in columns)
        runs.setdefault(key, {}).setdefault(row["date"], []).append(row)
    return [dates[max(dates)] for dates in runs.values()]
