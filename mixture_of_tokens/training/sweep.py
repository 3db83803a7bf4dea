"""A grid of settings for one model, compared on a split that no result is reported on."""

import copy
import dataclasses
import itertools
import math
import shlex
import statistics
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

from mixture_of_tokens.data.sources import located
from mixture_of_tokens.data.tokenizer import ids_of, load_tokenizer
from mixture_of_tokens.planning.cost import training_flops
from mixture_of_tokens.runs import records
from mixture_of_tokens.runs.locking import owned
from mixture_of_tokens.runs.preconditions import check_holds_runs, check_planned, check_resumed, names_listed_in
from mixture_of_tokens.runs.run import Run
from mixture_of_tokens.runs.warm_start import Beginning
from mixture_of_tokens.settings.fields import Several, as_word
from mixture_of_tokens.settings.options import Options, as_flags, check_seeds
from mixture_of_tokens.training.merging import Merged, check_settings
from mixture_of_tokens.training.room import check_room, estimate
from mixture_of_tokens.training.starting import begin_with, begun, merged_with
from mixture_of_tokens.training.train import run_merged
from mixture_of_tokens.utils.files import write_text
from mixture_of_tokens.utils.formatting import Result, aligned, few_of, short
from mixture_of_tokens.utils.process import is_main
from mixture_of_tokens.utils.progress import say, warn

FILE, DIVERGED = "sweep.json", "diverged.txt"
ANOTHER_OUT = "; take another --out"  # where a run in it saw other text


@dataclasses.dataclass(frozen=True)
class PlannedRun:
    """A run that a command would train; flops: of all its training; memory: bytes of a device, estimated."""

    directory: str
    steps: int
    learning_rate: float
    flops: float
    memory: int

    @classmethod
    def of(cls, directory: Path, merged: Merged) -> "PlannedRun":
        run = merged.config
        config = copy.copy(run.model_config)
        # Of a tokenizer on the Hub, which a plan does not fetch, as many ids are counted as by default.
        if run.tokenizer is not None and "vocab_size" not in run.model and located(run.tokenizer).exists():
            config.vocab_size = _ids_in(run.tokenizer)
        flops = run.steps * training_flops(config, run.batch_size)
        return cls(str(directory), run.steps, run.learning_rate, flops, round(estimate(merged)))


@cache
def _ids_in(tokenizer: str) -> int:
    return ids_of(load_tokenizer(tokenizer))


@dataclasses.dataclass(frozen=True)
class Plans(Result):
    """The runs that a command would train."""

    runs: list[PlannedRun]

    def __str__(self) -> str:
        return "\n".join(
            f"{run.directory}: {run.steps} steps, learning rate {run.learning_rate:g}, {short(run.flops)}FLOPs in all, "
            f"about {run.memory / 2**30:.1f} GiB"
            for run in self.runs
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """What one run of a sweep ended with: a loss, or why it diverged."""

    seed: int
    directory: str
    loss: float | None = None
    seconds: float | None = None
    diverged: str | None = None


@dataclasses.dataclass(frozen=True)
class Cell:
    """One setting (flags and values) and its runs. Where a seed diverged it has no loss, and is never the best."""

    settings: dict[str, Any]
    runs: list[Outcome]
    loss: float | None
    spread: float | None

    @classmethod
    def of(cls, settings: dict[str, Any], runs: list[Outcome]) -> "Cell":
        losses = [run.loss for run in runs if run.loss is not None]
        if len(losses) < len(runs):
            return cls(settings, runs, None, None)
        apart = max(losses) - min(losses) if len(losses) > 1 else None
        return cls(settings, runs, statistics.mean(losses), apart)


@dataclasses.dataclass(frozen=True)
class Sweep(Result):
    """A sweep's cells, the best first, and the command that trains with the best; None where all diverged."""

    name: str
    evaluated_on: str
    cells: list[Cell]
    best: str | None

    @property
    def failure(self) -> str | None:
        return None if self.best else "every setting diverged: try lower learning rates"

    def __str__(self) -> str:
        flags = list(self.cells[0].settings)
        table = [[*(flag.lstrip("-") for flag in flags), "seeds", "loss", "spread", "seconds"]]
        for cell in self.cells:
            seconds = [run.seconds for run in cell.runs if run.seconds is not None]
            loss = "diverged" if cell.loss is None else f"{cell.loss:.4f}"
            spread = "" if cell.spread is None else f"{cell.spread:.4f}"
            time = f"{statistics.mean(seconds):.0f}" if seconds else ""
            table.append([*map(as_word, cell.settings.values()), str(len(cell.runs)), loss, spread, time])
        what = f"Losses are nats a token of all {self.evaluated_on} text, means over seeds; spread is largest - least."
        lines = [aligned(table, left=0), "", what]
        if self.best is None:
            return "\n".join(lines)
        lines.append(f"Best: {self.best}")
        rates = sorted({float(cell.settings[RATE]) for cell in self.cells if RATE in flags})
        if len(rates) > 1 and float(self.cells[0].settings[RATE]) in (rates[0], rates[-1]):
            lines.append("Its rate is at the edge of the grid: the best one may lie beyond.")
        lines.append(f"mot report {shlex.quote(str(Path(self.cells[0].runs[0].directory).parent))} draws the curves.")
        return "\n".join(lines)


RATE = "--learning-rate"


class _Planned(NamedTuple):
    """A run of the sweep, before it is trained."""

    settings: dict[str, Any]
    merged: Merged
    directory: Path


def sweep(
    name: str | None,
    *,
    learning_rate: list[float] | None,
    seeds: list[int] | None,
    start: Path | None,
    out: Path | None,
    options: Options,
    dry_run: bool,
) -> Sweep | Plans | None:
    """As the function of `commands/sweep.py`, which explains its arguments."""
    name, beginning = begun(name, start)
    if learning_rate == []:
        raise ValueError("--learning-rate takes at least one rate")
    if seeds is not None:
        check_seeds(seeds)
    if out is None:
        source = "" if beginning is None else f"-from-{Path(beginning.start.source).name}"
        out = Path("runs") / f"sweep-{name.replace('/', '-')}{source}"
    check_holds_runs(out)
    if options.evaluate_on is None:
        options = dataclasses.replace(options, evaluate_on="tuning")
    cells = _grid(learning_rate, options)
    planned: list[_Planned] = []
    for settings in cells:
        for seed in [None] if seeds is None else seeds:
            chosen, rate = _apply(options, settings)
            merged = merged_with(beginning, name, seed, rate, chosen)
            check_settings(merged)
            seed = merged.config.seed
            directory = out / _directory(settings, seed)
            check_resumed(directory, merged.config)
            planned.append(_Planned(settings, merged, directory))
    check_planned({plan.directory.name: plan.merged.config for plan in planned})
    if dry_run:
        return Plans([PlannedRun.of(plan.directory, plan.merged) for plan in planned])
    for plan in planned:
        if not any((plan.directory / file).exists() for file in (records.FACTS, DIVERGED)):
            check_room(plan.merged)
    with owned(out):
        gone = names_listed_in(out / FILE, "cells") - {plan.directory.name for plan in planned}
        if gone:
            what = f"{out / FILE} now has this sweep alone, without {few_of(sorted(gone))}"
            warn(f"{what}; given together, what is finished is not trained again")
        return _swept(name, beginning, options, cells, planned, out)


def _swept(
    name: str,
    beginning: Beginning | None,
    options: Options,
    cells: list[dict[str, Any]],
    planned: list[_Planned],
    out: Path,
) -> Sweep | None:
    begins = [name] if beginning is None else ["--from", beginning.start.source]
    runs: dict[str, list[Outcome]] = {}
    trained: list[Run] = []
    result = Sweep(name, options.evaluate_on or "tuning", [], None)
    for done, (settings, merged, directory) in enumerate(planned):
        say(f"Run {done + 1} of {len(planned)}: {directory}")
        made = _trained(merged, directory, beginning)
        if not is_main():
            continue
        outcome = Outcome(seed=merged.config.seed, directory=str(directory))
        if isinstance(made, Run):
            trained.append(made)
            trained[0].check_same_text(made, ANOTHER_OUT)  # as when files have changed between two calls
            outcome = dataclasses.replace(outcome, loss=made.facts.final_loss, seconds=made.facts.seconds)
        else:
            warn(f"it diverged: {made}; it is not trained again")
            outcome = dataclasses.replace(outcome, diverged=made)
        runs.setdefault(_directory(settings, None), []).append(outcome)
        found = [Cell.of(settings, own) for settings in cells if (own := runs.get(_directory(settings, None)))]
        found.sort(key=lambda cell: math.inf if cell.loss is None else cell.loss)
        result = Sweep(name, result.evaluated_on, found, _train_command(begins, found[0], options))
        write_text(out / FILE, result.to_json() + "\n")
    return result if is_main() else None


def _train_command(begins: list[str], best: Cell, options: Options) -> str | None:
    if best.loss is None:
        return None
    chosen, _ = _apply(dataclasses.replace(options, evaluate_on=None), best.settings)
    rate = [RATE, as_word(best.settings[RATE])] if RATE in best.settings else []
    return shlex.join(["mot", "train", *begins, *rate, *as_flags(chosen)])


def _grid(rates: list[float] | None, options: Options) -> list[dict[str, Any]]:
    """Every combination of the settings that are lists, as flags and their values."""
    lists: dict[str, list[Any]] = {} if rates is None else {RATE: list(dict.fromkeys(rates))}
    for kind, fields in (("model", options.model), ("training", options.training)):
        for field, value in fields.items():
            if isinstance(value, Several):
                lists[f"--{kind}.{field}"] = list(value)
    return [dict(zip(lists, values, strict=True)) for values in itertools.product(*lists.values())]


def _apply(options: Options, settings: dict[str, Any]) -> tuple[Options, float | None]:
    fields = {"model": dict(options.model), "training": dict(options.training)}
    for flag, value in settings.items():
        if flag != RATE:
            kind, field = flag.removeprefix("--").split(".", 1)
            fields[kind][field] = value
    return dataclasses.replace(options, **fields), settings.get(RATE)


def _directory(settings: dict[str, Any], seed: int | None) -> str:
    names = [f"{flag.rpartition('.')[2].lstrip('-')}={as_word(value)}" for flag, value in settings.items()]
    return "-".join([*names, *([] if seed is None else [f"seed={seed}"])]).replace("/", "_")


def _trained(merged: Merged, directory: Path, beginning: Beginning | None) -> Run | str | None:
    """The run, trained if need be, or why it diverged; it is then not trained again. None in other processes."""
    diverged = directory / DIVERGED
    if not diverged.exists():
        try:
            begin = None if beginning is None else partial(begin_with, beginning, directory)
            return run_merged(merged, directory, resume=True, begin=begin, again="the same command")
        except FloatingPointError as error:  # in all processes
            if is_main():
                write_text(diverged, str(error))
    return diverged.read_text() if is_main() else None
