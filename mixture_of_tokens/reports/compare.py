"""Several models on the same data, trained one after the other and set side by side."""

import json as json_module
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from cyclopts import Parameter

from mixture_of_tokens.formatting import duration, listed, short
from mixture_of_tokens.model.cost import flops_per_token
from mixture_of_tokens.reports.comparison import by_model, comparison, relative
from mixture_of_tokens.reports.report import show
from mixture_of_tokens.runs import checkpoints
from mixture_of_tokens.runs.config import data_group_size
from mixture_of_tokens.runs.run import check_one_process, check_resumed, read
from mixture_of_tokens.training.options import DEFAULTS, Options, as_flags
from mixture_of_tokens.training.recipes import merge
from mixture_of_tokens.training.sweep import check_text, number, trained_on
from mixture_of_tokens.training.train import run_training


class Plan(NamedTuple):
    name: str
    seed: int
    rate: float | None
    directory: Path
    settings: dict[str, Any]  # the run's, as `merge` gives them
    group_size: int  # of its data
    flops: float  # of the whole training


def compare(
    *names: str,
    seeds: str = "0",
    lr: str | None = None,
    out: Path | None = None,
    options: Annotated[Options, Parameter(name="*")] = DEFAULTS,
    json: bool = False,
    dry_run: bool = False,
) -> None:
    """Train several models on the same text in the same order, and say which reaches the first one's loss, and when.

    All are trained with every seed, and seeds take turns, so that a comparison that is stopped is even. Called again,
    it skips what is finished and goes on with the rest. It leaves compare.json, report.html and the run directories.

    Args:
        names: Models, such as Transformer-Nano MoT-Nano/32E/4; the first is the baseline.
        seeds: Seeds, as in 0,1,2.
        lr: Peak learning rates: one for all models, or one for each in their order, as in 1e-2,2e-2; by default the
            size's own.
        out: Directory for all of it; by default runs/compare.
        json: Print what compare.json holds in place of the table.
        dry_run: Print the runs and stop.
    """
    check_one_process("mot compare")
    out = Path("runs/compare") if out is None else out
    numbers = list(dict.fromkeys(number(seed, int, "--seeds") for seed in seeds.split(",")))
    plans = _plans(names, numbers, _rates(lr, len(names)), options, out)
    if dry_run:
        for plan in plans:
            steps, rate = plan.settings["steps"], plan.settings["learning_rate"]
            print(f"{plan.directory}: {steps} steps, learning rate {rate:g}, {short(plan.flops)}FLOPs")
        return
    trained: list[dict[str, Any]] = []
    try:
        for done, plan in enumerate(plans):
            what = f"{plan.name}, seed {plan.seed}{_time_left(plans, done)}"
            print(f"Run {done + 1} of {len(plans)}: {what}", file=sys.stderr)
            facts = run_training(plan.name, plan.seed, plan.rate, options, plan.directory, resume=True)
            trained.append({"directory": str(plan.directory), "text": trained_on(facts)})
            check_text(trained)  # said now, not after the last run
    except (SystemExit, KeyboardInterrupt):
        print("mot: the same command goes on with the comparison", file=sys.stderr)
        raise
    models = by_model([read(plan.directory) for plan in plans])
    command = _command(names, seeds, lr, out, options)
    result = {"command": command} | comparison(models)
    checkpoints.write_text(out / "compare.json", json_module.dumps(relative(result, out), indent=2) + "\n")
    show(relative(result, out), models, [command], out / "report.html", as_json=json)


def _rates(text: str | None, models: int) -> list[float | None]:
    if text is None:
        return [None] * models
    rates = [number(rate, float, "--lr") for rate in text.split(",")]
    if len(rates) not in (1, models):
        raise ValueError(f"--lr: {len(rates)} rates for {models} models; give one for all, or one for each")
    return [*(rates if len(rates) == models else rates * models)]


def _plans(
    names: tuple[str, ...], seeds: list[int], rates: list[float | None], options: Options, out: Path
) -> list[Plan]:
    """The runs in their order. Raises ValueError for whatever is wrong with any of them."""
    if not names:
        raise ValueError("name at least one model, such as Transformer-Nano")
    if len(set(names)) < len(names):
        raise ValueError("a model is named twice; its runs would be the same")
    plans = []
    for seed in seeds:
        for name, rate in zip(names, rates, strict=True):
            config, settings, _ = merge(name, seed, rate, options)
            batch = settings["batch_size"]
            flops = sum(sum(parts.values()) for parts in flops_per_token(config, batch=batch))
            flops *= settings["steps"] * batch * config.max_position_embeddings
            directory = out / f"{name.replace('/', '-')}-seed{seed}"
            check_resumed(directory, settings)
            group_size = data_group_size(config.group_size, batch)
            plans.append(Plan(name, seed, rate, directory, settings, group_size, flops))
    if any(plan.settings["training"]["eval_strategy"] == "no" for plan in plans):
        raise ValueError("--training.eval_strategy no leaves no curves to compare; steps or epoch would")
    for what, of in {
        "--batch-size": lambda plan: plan.settings["batch_size"],
        "--steps": lambda plan: plan.settings["steps"],
        "--model.max_position_embeddings": lambda plan: plan.settings["model"]["max_position_embeddings"],
        "--model.vocab_size": lambda plan: plan.settings["model"].get("vocab_size"),
        "how their rows are grouped, and so in what they are evaluated on": lambda plan: plan.group_size,
    }.items():
        each = {plan.name: of(plan) for plan in plans}
        if len(set(each.values())) > 1:
            differ = listed([f"{value} in {name}" for name, value in each.items()])
            way = "; --model.group_size N gives all groups of N" * what.startswith("how")
            raise ValueError(f"these models cannot be compared, they differ in {what}: {differ}{way}")
    return plans


def _time_left(plans: list[Plan], done: int) -> str:
    """Of the training time that is known so far: a model's own, or else by the FLOPs of the others."""
    known: dict[str, float] = {}
    for plan in plans:
        if (plan.directory / "run.json").is_file():
            known[plan.name] = json_module.loads((plan.directory / "run.json").read_text())["seconds"]
    if not known:
        return ""
    each = {plan.name: plan.flops for plan in plans}
    pace = sum(known.values()) / sum(each[name] for name in known)
    left = [plan for plan in plans[done:] if not (plan.directory / "run.json").is_file()]
    seconds = sum(known.get(plan.name, plan.flops * pace) for plan in left)
    return f"; about {duration(seconds)} of training left" if left else ""


def _command(names: tuple[str, ...], seeds: str, lr: str | None, out: Path, options: Options) -> str:
    """What makes the same comparison again."""
    rates = [] if lr is None else ["--lr", lr]
    return shlex.join(["mot", "compare", *names, "--seeds", seeds, *rates, "--out", str(out), *as_flags(options)])
