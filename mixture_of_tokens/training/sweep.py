"""A grid of settings for one model, compared on text that no result is reported on."""

import dataclasses
import itertools
import json
import math
import shlex
import statistics
import sys
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from mixture_of_tokens.runs import checkpoints
from mixture_of_tokens.runs.run import check_one_process, check_resumed
from mixture_of_tokens.training.options import DEFAULTS, Options, as_flags
from mixture_of_tokens.training.recipes import merge
from mixture_of_tokens.training.train import run_training


def sweep(
    name: str,
    *,
    lr: str | None = None,
    seeds: str = "0",
    out: Path | None = None,
    options: Annotated[Options, Parameter(name="*")] = DEFAULTS,
    json: bool = False,
    dry_run: bool = False,
) -> None:
    """Train one model with every combination of settings, and print the best.

    A setting is a list with commas: --lr, --seeds, and any field of --model and --training. Losses are of the tuning
    split. Called again, it skips what is finished and goes on with the rest.

    Args:
        name: A model, such as MoT-Nano/32E/4.
        lr: Peak learning rates, as in 3e-3,1e-2,3e-2; by default the size's own.
        seeds: Seeds, as in 0,1,2.
        out: Directory of the run directories and of sweep.json; by default runs/sweep-NAME.
        json: Print what sweep.json holds in place of the table.
        dry_run: Print the run directories and stop.
    """
    check_one_process("mot sweep")
    out = Path("runs") / f"sweep-{name.replace('/', '-')}" if out is None else out
    if options.evaluate_on is None:
        options = dataclasses.replace(options, evaluate_on="tuning")
    cells = _grid(lr, options)
    numbers = list(dict.fromkeys(number(seed, int, "--seeds") for seed in seeds.split(",")))
    plans = []
    for settings in cells:
        for seed in numbers:
            chosen, rate = _apply(options, settings)
            directory = out / _directory(settings, seed)
            check_resumed(directory, merge(name, seed, rate, chosen)[1])  # of all, before the first hour is spent
            plans.append((settings, seed, chosen, rate, directory))
    if any("--model.vocab_size" in settings for settings in cells):
        raise ValueError("--model.vocab_size: losses a token of different vocabularies cannot be compared; give one")
    if dry_run:
        print(*(plan[-1] for plan in plans), sep="\n")
        return
    results: dict[str, dict[str, Any]] = {}
    written: dict[str, Any] = {"name": name, "evaluated_on": options.evaluate_on, "cells": []}
    for done, (settings, seed, chosen, rate, directory) in enumerate(plans):
        print(f"run {done + 1} of {len(plans)}: {directory}", file=sys.stderr)
        cell = results.setdefault(_directory(settings, None), {"settings": settings, "runs": []})
        try:
            outcome = _outcome(name, seed, rate, chosen, directory)
        except (SystemExit, KeyboardInterrupt):
            print("mot: the same command goes on with the sweep", file=sys.stderr)
            raise
        cell["runs"].append({"seed": seed, "directory": str(directory)} | outcome)
        check_text([run for each in results.values() for run in each["runs"]])
        _summarise(cell)
        written["cells"] = sorted(results.values(), key=lambda cell: math.inf if cell["loss"] is None else cell["loss"])
        checkpoints.write_text(out / "sweep.json", _dumps(written))
    _print(written, options, as_json=json)


def _dumps(value: Any) -> str:
    return json.dumps(value, indent=2) + "\n"


def number(text: str, kind: type, flag: str) -> Any:
    """One of the numbers of a flag that takes several."""
    try:
        return kind(text)
    except ValueError:
        raise ValueError(f"{flag}: {text!r} is no {kind.__name__}; give numbers with commas between") from None


def _grid(lr: str | None, options: Options) -> list[dict[str, str]]:
    """Every combination of the settings that are lists, as flags and their values."""
    lists = {"--learning-rate": lr.split(",")} if lr is not None else {}
    for kind, fields in (("model", options.model), ("training", options.training)):
        for field, value in fields.items():
            if "," in value and value[:1] not in "[{":  # those are one YAML value
                lists[f"--{kind}.{field}"] = value.split(",")
    return [dict(zip(lists, values, strict=True)) for values in itertools.product(*lists.values())]


def _apply(options: Options, settings: dict[str, str]) -> tuple[Options, float | None]:
    fields = {"model": dict(options.model), "training": dict(options.training)}
    rate = None
    for flag, value in settings.items():
        if flag == "--learning-rate":
            rate = number(value, float, "--lr")
        else:
            kind, field = flag.removeprefix("--").split(".", 1)
            fields[kind][field] = value
    return dataclasses.replace(options, **fields), rate


def _directory(settings: dict[str, str], seed: int | None) -> str:
    names = [f"{flag.rpartition('.')[2].lstrip('-')}={value.strip()}" for flag, value in settings.items()]
    return "-".join([*names, *([] if seed is None else [f"seed={seed}"])]).replace("/", "_")


def _outcome(name: str, seed: int, rate: float | None, options: Options, directory: Path) -> dict[str, Any]:
    """What a run ended with. One that diverged is not tried again."""
    diverged = directory / "diverged.txt"
    if diverged.exists():
        return {"diverged": diverged.read_text()}
    try:
        facts = run_training(name, seed, rate, options, directory, resume=True)
    except FloatingPointError as error:
        diverged.write_text(str(error))
        return {"diverged": str(error)}
    return {"loss": facts["final_loss"], "seconds": facts["seconds"], "text": trained_on(facts)}


def trained_on(facts: dict[str, Any]) -> str:
    return f"{facts['corpus']['hash']}, tokenizer {facts['corpus']['tokenizer']}"


def check_text(runs: list[dict[str, Any]]) -> None:
    """Raises ValueError for losses on different texts, as when files have changed between two sittings."""
    trained = [run for run in runs if "text" in run]
    other = next((run for run in trained if run["text"] != trained[0]["text"]), None)
    if other is not None:
        raise ValueError(
            f"{trained[0]['directory']} was trained on text {trained[0]['text']}, and {other['directory']} on "
            f"{other['text']}: they cannot be compared; take another --out"
        )


def _summarise(cell: dict[str, Any]) -> None:
    losses = [run["loss"] for run in cell["runs"] if "loss" in run]
    whole = len(losses) == len(cell["runs"])  # settings with which a seed diverges are never the best
    cell["loss"] = statistics.mean(losses) if whole else None
    cell["spread"] = max(losses) - min(losses) if whole else None


def _print(written: dict[str, Any], options: Options, *, as_json: bool) -> None:
    if as_json:
        print(_dumps(written), end="")
        return
    ranked = written["cells"]
    flags = list(ranked[0]["settings"])
    heads = [*(flag.lstrip("-") for flag in flags), "seeds", "loss", "spread", "s"]
    table = [heads]
    for cell in ranked:
        seconds = [run["seconds"] for run in cell["runs"] if "seconds" in run]
        loss = "diverged" if cell["loss"] is None else f"{cell['loss']:.4f}"
        spread = "" if cell["spread"] is None else f"{cell['spread']:.4f}"
        time = f"{statistics.mean(seconds):.0f}" if seconds else ""
        table.append([*cell["settings"].values(), str(len(cell["runs"])), loss, spread, time])
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for line in table:
        print("  ".join(text.rjust(width) for text, width in zip(line, widths, strict=True)))
    best = ranked[0]
    print(
        f"\nLosses are nats a token of all {written['evaluated_on']} text, means over seeds; spread is largest - least."
    )
    if best["loss"] is None:
        print("Every setting diverged: try lower learning rates.")
        return
    chosen, rate = _apply(dataclasses.replace(options, evaluate_on=None), best["settings"])
    words = [] if rate is None else ["--learning-rate", best["settings"]["--learning-rate"]]
    print(f"Best: {shlex.join(['mot', 'train', written['name'], *words, *as_flags(chosen)])}")
    rates = sorted({float(cell["settings"]["--learning-rate"]) for cell in ranked if "--learning-rate" in flags})
    if len(rates) > 1 and float(best["settings"]["--learning-rate"]) in (rates[0], rates[-1]):
        print("Its rate is at the edge of the grid: the best one may lie beyond.")
