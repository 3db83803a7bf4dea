"""Checks before a run directory is written, gone on with, or compared with others."""

import os
from pathlib import Path
from typing import Any

from mixture_of_tokens.parallel.sharding import broadcast
from mixture_of_tokens.runs import checkpoints, records
from mixture_of_tokens.runs.locking import LOCK
from mixture_of_tokens.runs.records import RunConfig
from mixture_of_tokens.runs.typed import as_fields
from mixture_of_tokens.settings.routings import BY_A_LOSS
from mixture_of_tokens.utils.process import is_main, of_all


def check_seed(seed: int) -> None:
    """Raises ValueError for a seed that numpy would not take."""
    if not 0 <= seed < 2**32:
        raise ValueError(f"--seed must be 0 to {2**32 - 1}, not {seed}")


def check_free(out: Path) -> None:
    """Raises ValueError if the directory of a new run is not empty.

    In all processes of torchrun, by what the first one sees.
    """
    if (said := broadcast(_taken(out) if is_main() else None)) is not None:
        raise of_all(ValueError(said))


def _taken(out: Path) -> str | None:
    if out.is_file():
        return f"{out} is a file; name a directory with --out"
    if _is_empty(out):
        return None
    what = "; go on with --resume" if (out / records.CONFIG).is_file() else " and is no run directory"
    if (out / records.FACTS).is_file():
        what = " and is a finished run; see it by mot report"
    return f"{out} exists already{what}, name another with --out, or remove it"


def check_writable(out: Path) -> None:
    """Raises ValueError where no directory can be made, or written to."""
    try:
        str(out).encode()
    except UnicodeEncodeError:  # a byte that is no UTF-8, which files inside could not write down
        raise ValueError(f"--out {os.fsencode(out)!r} is not UTF-8: name another directory") from None
    existing = next(path for path in (out, *out.absolute().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise ValueError(f"--out {out}: {existing} is no directory that can be written to")


def check_holds_runs(out: Path) -> None:
    """Raises ValueError if the directory of several runs is itself a run."""
    if (out / records.CONFIG).is_file():
        raise ValueError(f"{out} is a run of its own; name another directory for several with --out")


def check_resumed(out: Path, config: RunConfig) -> None:
    """Raises ValueError if a run directory, where there is one, was made with another configuration."""
    if _is_empty(out):
        return
    if not (out / records.CONFIG).is_file():
        raise ValueError(f"{out} is no run directory to go on with: it has no config.yaml; name another with --out")
    started = RunConfig.read(out / records.CONFIG)
    before, now = started.identity(), config.identity()
    # While there are checkpoints, which hold hashes of the text.
    may_move = () if (out / records.FACTS).is_file() or not checkpoints.has_any(out) else records.MAY_MOVE
    for key in [*before, *now]:
        if key not in may_move and before.get(key) != now.get(key):
            flag = key if key.startswith(("model.", "training.")) else key.removeprefix("transition.").replace("_", "-")
            flag, same = (f"--{flag}", "flags") if key != "transition.source" else ("the run", "run")
            was, wanted = getattr(started, key, before.get(key)), getattr(config, key, now.get(key))
            if key.startswith("start."):
                flag, was, wanted = "--from", *(run.start and run.start.source for run in (started, config))
            raise ValueError(
                f"{out} was started with {flag} {was}, now it is {wanted}; "
                f"give the same {same}, or name another directory with --out"
            )
    routings = config.model_config.routings
    balanced = [routing.title for routing in routings if routing.balance == BY_A_LOSS or routing.varies]
    if balanced and started.micro_batch != config.micro_batch and not (out / records.FACTS).is_file():
        raise ValueError(
            f"{out} was started with micro-batches of {started.micro_batch} rows, now they have {config.micro_batch}: "
            f"{balanced[0]}'s balance is of a micro-batch; keep processes x accumulation"
        )


def check_comparable(conditions: dict[str, dict[str, Any]]) -> None:
    """Raises ValueError where the conditions of runs, by run, are not the same for all."""
    first, *_ = conditions
    for who, own in conditions.items():
        for what, value in own.items():
            if value != conditions[first][what]:
                apart = f"{conditions[first][what]} and {value}"
                raise ValueError(f"{first} and {who} cannot be compared, they differ in {what}: {apart}")


def check_planned(configs: dict[str, RunConfig]) -> None:
    """Raises ValueError where runs that are to be trained could not be compared afterwards."""
    vocabularies = {who: {"--model.vocab_size": config.model.get("vocab_size")} for who, config in configs.items()}
    check_comparable({who: config.conditions() | vocabularies[who] for who, config in configs.items()})


def names_listed_in(file: Path, kind: str) -> set[str]:
    """Directories' names of the runs in compare.json ("models") or sweep.json ("cells"); none of a damaged file."""
    try:
        return {Path(run["directory"]).name for each in as_fields(file)[kind] for run in each["runs"]}
    except (ValueError, KeyError, TypeError):  # also where there is none
        return set()


def _is_empty(out: Path) -> bool:
    """Whether nothing is there but parts of a first file, which a kill can leave, and a lock."""
    if not out.is_dir():
        return not out.exists()
    return all(path.suffix == ".partial" or path.name == LOCK for path in out.iterdir())
