"""Finished runs side by side: the command `mot report`, its table and its page."""

import json as json_module
import shlex
from pathlib import Path
from textwrap import fill, indent
from typing import Any

from mixture_of_tokens.formatting import aligned
from mixture_of_tokens.reports.comparison import by_model, comparison, runs_of
from mixture_of_tokens.reports.page import page
from mixture_of_tokens.reports.prose import MIXED, findings
from mixture_of_tokens.reports.samples import continued
from mixture_of_tokens.runs import checkpoints
from mixture_of_tokens.runs.run import Run

WIDTH = 110  # of sentences beside the table


def report(*runs: Path, out: Path | None = None, json: bool = False) -> None:
    """Print the runs' losses side by side, the first one as the baseline, and write a page about them.

    Runs of one model with several seeds are one line, its means. "reached" is the step, and the seconds, at which the
    evaluation loss comes down to the baseline's last one, on a straight line between two evaluations; evaluations
    during training are over one fixed part of the text, the losses in the table over all of it.

    Args:
        runs: Run directories of mot train, or a directory of mot compare.
        out: The page; by default report.html, in a run or comparison that is given alone, or else beside the runs.
        json: Print the numbers and the curves as JSON in place of the table.
    """
    found, command = runs_of(runs)
    models = by_model(found)
    here = ["mot", "report", *map(str, runs), *([] if out is None else ["--out", str(out)])]
    again = [command] if command else [line for run in found for line in _train_commands(run)]
    commands = [*dict.fromkeys(again), shlex.join(here)]
    if out is None:
        out = (runs[0] if len(runs) == 1 else runs[0].parent) / "report.html"
    show(comparison(models), models, commands, out, as_json=json)


def show(
    result: dict[str, Any], models: dict[str, list[Run]], commands: list[str], out: Path, *, as_json: bool
) -> None:
    """Write the page of a comparison, with samples of each model's first seed, and print the comparison.

    Args:
        result: of `results.comparison`; models: the runs that it is of.
        commands: That made this.
        as_json: Print all of `result` and nothing else, in place of the table, a sample of each and where the page is.
    """
    samples = continued({label: model[0].directory for label, model in models.items()})
    out.parent.mkdir(parents=True, exist_ok=True)
    checkpoints.write_text(out, page(result, models, samples, commands))
    if as_json:
        print(json_module.dumps(result, indent=2))
        return
    print(text(result))
    for prompt, written in list(samples.items())[:1]:
        for label, continuation in written.items():
            print(f"{label} continues {prompt!r}:\n\n{indent(prompt + continuation, '    ')}\n")
    print(f"The page: {out}")


def _train_commands(run: Run) -> list[str]:
    """What makes such a run again."""
    after, config = run.settings.get("transition"), run.config
    if after is None:
        return [_train_again(run.directory)]
    if run.switch is None:  # the part before the switch, with --anneal, of which the rest has its own rate
        return [_train_again(Path(after["source"])), _annealed(run, after)]
    steps, rate = run.settings["steps"], run.settings["learning_rate"]
    source = Path(after["source"])
    out = run.directory.name if run.directory.name != source.name else f"{source.name}-transition"
    words = ["mot", "transition", f"again/{source.name}", "--out", f"again/{out}"]
    words += ["--top-k", str(config.num_experts_per_tok), "--learning-rate", f"{rate:g}"]
    words += ["--steps", str(2 * steps if "anneal" in after else steps)]
    words += [] if config.capacity_factor is None else ["--capacity", f"{config.capacity_factor:g}"]
    words += ["--schedule", "continued"] if run.settings["training"]["lr_scheduler_type"] == "constant" else []
    given = {key: after.get(key) for key in ("calibrate", "optimizer", "control", "anneal")}
    words += [word for key, value in given.items() if value is not None for word in (f"--{key}", str(value))]
    return [_train_again(source), shlex.join(words)]


def _annealed(run: Run, after: dict[str, Any]) -> str:
    out = f"again/{run.directory.name.removesuffix('-annealed')}"
    words = ["mot", "transition", f"again/{Path(after['source']).name}", "--out", out]
    words += ["--steps", str(2 * run.settings["steps"]), "--anneal", str(after["anneal"])]
    return shlex.join([*words, "--optimizer", after["optimizer"]])


def _train_again(directory: Path) -> str:
    return shlex.join(["mot", "train", "--config", str(directory / "config.yaml"), "--out", f"again/{directory.name}"])


def text(result: dict[str, Any]) -> str:
    """The table, and what it comes to in sentences."""
    columns = ["model", "loss", "vs first", "reached", "bits/byte", "parameters", "FLOPs/token", "s", "tokens/s"]
    baseline, count = result["baseline"], len(result["seeds"])
    table = []
    for model in result["models"]:
        reached = model["reached"][baseline]
        when = "never"
        if reached["step"] is not None:
            some = f" ({reached['step']['seeds']} of {count})" if reached["step"]["seeds"] < count else ""
            when = f"{reached['step']['mean']:.0f}, {reached['seconds']['mean']:.0f} s{some}"
        row = [
            model["label"],
            f"{model['final_loss']['mean']:.4f}",
            f"{model['final_loss_difference']['mean']:+.4f}",
            when,
            f"{model['bits_per_byte']['mean']:.4f}",
            f"{model['parameters']['total']:,}",
            f"{model['flops_per_token']['forward']:,.0f}",
            f"{model['seconds']['mean']:.0f}",
            f"{model['tokens_per_second']['mean']:,.0f}",
        ]
        if count > 1:
            row.insert(2, f"{model['final_loss']['greatest'] - model['final_loss']['least']:.4f}")
        table.append(row)
    if count > 1:
        columns.insert(2, "spread")
    told = [fill(" ".join(sentences), WIDTH) for sentences in findings(result).values()]
    told += [MIXED] if len(result["environments"]) > 1 else []
    return "\n".join([aligned([columns, *table]), "", *told]) + "\n"
