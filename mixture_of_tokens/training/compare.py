"""Several models on the same data, trained one after the other and set side by side."""

import shlex
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

from mixture_of_tokens.reports.comparison import COMPARISON, by_model, comparison, write
from mixture_of_tokens.reports.report import PAGE, Report, check_no_other_file, write_page
from mixture_of_tokens.runs import records
from mixture_of_tokens.runs.locking import owned
from mixture_of_tokens.runs.preconditions import (
    check_holds_runs,
    check_planned,
    check_resumed,
    check_writable,
    names_listed_in,
)
from mixture_of_tokens.runs.records import RunFacts
from mixture_of_tokens.runs.run import Run
from mixture_of_tokens.settings.choices import Device
from mixture_of_tokens.settings.names import parse_name
from mixture_of_tokens.settings.options import Options, as_flags, check_seeds
from mixture_of_tokens.training.merging import Merged, check_settings, merge
from mixture_of_tokens.training.room import check_room
from mixture_of_tokens.training.sweep import ANOTHER_OUT, PlannedRun, Plans
from mixture_of_tokens.training.timing import check_minutes, fitting, found_before
from mixture_of_tokens.training.train import run_merged
from mixture_of_tokens.utils.formatting import duration
from mixture_of_tokens.utils.process import is_main, of_all
from mixture_of_tokens.utils.progress import say, warn, warn_once


class _Planned(NamedTuple):
    """A run of the comparison, before it is trained."""

    merged: Merged
    directory: Path
    flops: float  # of the whole training

    @property
    def name(self) -> str:
        return self.merged.config.name


def compare(
    *names: str,
    seeds: list[int],
    learning_rate: list[float] | None,
    out: Path | None,
    options: Options,
    minutes: float | None,
    dry_run: bool,
) -> Report | Plans | None:
    """As the function of `commands/compare.py`, which explains its arguments."""
    names = tuple(str(parse_name(name)) for name in names)
    check_seeds(seeds)
    out = out or Path("runs/compare")
    check_holds_runs(out)
    check_minutes(minutes, steps=options.steps, dry_run=dry_run)
    rates = _rates(learning_rate, len(names))
    own = {} if minutes is None else _of_minutes(minutes, names, seeds, rates, options, out)
    plans = _plans(names, seeds, rates, options, out, own, minutes)
    for plan in plans:
        check_resumed(plan.directory, plan.merged.config)
    if dry_run:
        _say_if_alone(names)
        return Plans([PlannedRun.of(plan.directory, plan.merged) for plan in plans])
    for plan in plans:
        if not (plan.directory / records.FACTS).exists():
            check_room(plan.merged)
    check_no_other_file(out / PAGE)
    if is_main() and (gone := names_listed_in(out / COMPARISON, "models") - {plan.directory.name for plan in plans}):
        what = f"{out} will compare these runs, and no longer {', '.join(str(out / name) for name in sorted(gone))}"
        warn(f"{what}; mot report compares any runs")
    with owned(out):
        _say_if_alone(names)
        return _compared(plans, out, _command(names, seeds, learning_rate, out, options, minutes), options.device)


def _compared(plans: list[_Planned], out: Path, command: str, device: Device | None) -> Report | None:
    runs: list[Run] = []
    took: dict[str, float] = {}
    for done, plan in enumerate(plans):
        if is_main():
            what = f"{plan.name}, seed {plan.merged.config.seed}{_time_left(plans, done, took)}"
            say(f"Run {done + 1} of {len(plans)}: {what}")
        whole, started = not plan.directory.exists(), time.perf_counter()
        try:
            run = run_merged(plan.merged, plan.directory, resume=True, again="the same command")
        except FloatingPointError as error:  # in all processes
            what = f"{plan.directory}: {error}, and remove that directory; finished runs stay"
            raise of_all(FloatingPointError(what)) from None
        if run is None:  # in all processes but the first
            continue
        if whole:
            took[plan.name] = time.perf_counter() - started
        runs.append(run)
        runs[0].check_same_text(run, ANOTHER_OUT)  # now, not after the last run
    if not is_main():
        return None
    models = by_model(runs)
    result = comparison(models, command)
    write(result, out)
    return write_page(result.relative(out), models, [command], out / PAGE, device)


def _say_if_alone(names: tuple[str, ...]) -> None:
    if len(names) == 1:
        warn_once(f"{names[0]} is compared with nothing: name two models or more, the baseline first")


def _rates(rates: list[float] | None, models: int) -> list[float | None]:
    if rates is None:
        return [None] * models
    if len(rates) not in (1, models):
        raise ValueError(f"--learning-rate: {len(rates)} rates for {models} models; give one for all, or one for each")
    return [*(rates if len(rates) == models else rates * models)]


def _of_minutes(
    minutes: float, names: tuple[str, ...], seeds: list[int], rates: list[float | None], options: Options, out: Path
) -> dict[str, Options]:
    """The options of each model, with as many steps as fit, or as were found when one of its runs was started."""
    plans = _plans(names, seeds, rates, options, out)
    for plan in plans:
        check_room(plan.merged)
    check_writable(out)
    known: dict[str, Options] = {}
    for plan in plans:
        if plan.name not in known and (found := found_before(plan.directory, minutes, options)) is not None:
            known[plan.name] = found
    new = {name: partial(merge, name, seeds[0], rate) for name, rate in zip(names, rates, strict=True)}
    new = {name: merged_with for name, merged_with in new.items() if name not in known}
    scored = next((found.scored_rows for found in known.values()), None)
    return known | (fitting(minutes, new, options, scored) if new else {})


def _plans(
    names: tuple[str, ...],
    seeds: list[int],
    rates: list[float | None],
    options: Options,
    out: Path,
    own: Mapping[str, Options] = {},
    minutes: float | None = None,
) -> list[_Planned]:
    """The runs in their order. Raises ValueError for invalid settings of any of them.

    Args:
        own: options by the names of models that do not have the common ones.
    """
    if not names:
        raise ValueError("name at least one model, such as Transformer-Nano")
    if len(set(names)) < len(names):
        raise ValueError("a model is named twice; its runs would be the same")
    plans = []
    for seed in seeds:
        for name, rate in zip(names, rates, strict=True):
            merged = merge(name, seed, rate, own.get(name, options), minutes=minutes)
            directory = out / merged.config.directory_name
            plans.append(_Planned(merged, directory, PlannedRun.of(directory, merged).flops))
    check_settings(*(plan.merged for plan in plans))
    configs = [plan.merged.config for plan in plans]
    if any(config.training["eval_strategy"] == "no" for config in configs):
        raise ValueError("--training.eval_strategy no leaves no curves to compare; steps would")
    if any(config.training.get("eval_delay", 0) > config.steps for config in configs):
        raise ValueError("--training.eval_delay is beyond the last step, which leaves no curves to compare")
    check_planned({config.name: config for config in configs})
    return plans


def _time_left(plans: list[_Planned], done: int, took: dict[str, float]) -> str:
    """An estimate from finished runs: the time of the same model, or else of the others, scaled by FLOPs.

    Args:
        took: by name, the seconds of a run that this command has made. Runs of earlier ones know those of training.
    """
    known, what = dict(took), "left"
    if not known:
        what = "of training left"
        for plan in plans:
            if (plan.directory / records.FACTS).is_file():
                known[plan.name] = RunFacts.read(plan.directory / records.FACTS).seconds
    if not known:
        return ""
    each = {plan.name: plan.flops for plan in plans}
    pace = sum(known.values()) / sum(each[name] for name in known)
    left = [plan for plan in plans[done:] if not (plan.directory / records.FACTS).is_file()]
    seconds = sum(known.get(plan.name, plan.flops * pace) for plan in left)
    return f"; about {duration(seconds)} {what}" if left else ""


def _command(
    names: tuple[str, ...],
    seeds: list[int],
    rates: list[float] | None,
    out: Path,
    options: Options,
    minutes: float | None,
) -> str:
    """The command that makes the same comparison again."""
    given = [] if rates is None else ["--learning-rate", ",".join(map(repr, rates))]
    words = ["mot", "compare", *names, "--seeds", ",".join(map(str, seeds)), *given, "--out", str(out)]
    words += [] if minutes is None else ["--minutes", f"{minutes:g}"]
    return shlex.join([*words, *as_flags(options)])
