"""Finished runs beside each other: which model reaches which one's final loss, when, and at what cost.

What is compared at equal steps is the final loss, over the whole split. Everything else is read off the evaluations
during training, over one fixed part of the split that is the same for all:

    reached     where a run's evaluation loss first is no higher than another's at its last evaluation, on a straight
                line between two evaluations; at its first evaluation if it is there already. None: never
    of_steps    the step of that over the step of the other's last evaluation; so for time and FLOPs
    equal_time  the loss when the fastest run of the same seed ended, on a straight line between two evaluations

Where loss falls ever more slowly the line lies above the curve, so `reached` comes late rather than early. All is
computed seed by seed, against the other model's run of the same seed; a mean has the least and the greatest with it.
"""

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from mixture_of_tokens.model.cost import memory, parameters
from mixture_of_tokens.model.names import parse_name
from mixture_of_tokens.model.routings import converted_from
from mixture_of_tokens.runs.run import Run, read

ENVIRONMENT = ("hardware", "cores", "threads", "versions", "commit")


def by_model(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """The runs of each model in the order of their seeds, by its name; where settings differ, with those that do.

    Raises ValueError for runs that cannot be compared: on other text, in other groups, for other steps, or where not
    every model has the same seeds.
    """
    if not runs:
        raise ValueError("name at least one run directory")
    for what, of in {
        "saw different corpora": lambda run: (run.facts["corpus"]["hash"], run.facts["corpus"].get("tokenizer")),
        "were evaluated on different splits": lambda run: run.facts.get("evaluated_on"),
        "have contexts of different lengths": lambda run: run.config.max_position_embeddings,
        "took different batches": lambda run: run.settings["batch_size"],
        "saw their rows in different groups": lambda run: run.group_size,
        "trained for different numbers of steps": lambda run: run.facts["steps"],
    }.items():
        other = next((run for run in runs if of(run) != of(runs[0])), None)
        if other is not None:
            first, second = of(runs[0]), of(other)
            raise ValueError(
                f"these runs {what}, so they cannot be compared: {first} in {runs[0].directory}, {second} in "
                f"{other.directory}"
            )
    models: list[list[Run]] = []
    for run in runs:
        model = next((model for model in models if model[0].own_settings == run.own_settings), None)
        if model is None:
            models.append([run])
        elif run.seed in (same := {other.seed: other.directory for other in model}):
            raise ValueError(f"{same[run.seed]} and {run.directory} are the same model with the same seed")
        else:
            model.append(run)
    for model in models:
        model.sort(key=lambda run: run.seed)
    seeds = [[run.seed for run in model] for model in models]
    for model, own in zip(models, seeds, strict=True):
        if own != seeds[0]:
            raise ValueError(
                f"runs are compared seed by seed, and {models[0][0].name} has the seeds {_listed(seeds[0])}, "
                f"{model[0].name} {_listed(own)}"
            )
    labelled = {_label(model[0], [other[0] for other in models]): model for model in models}
    assert len(labelled) == len(models)  # a label has all that differs
    return labelled


def _listed(values: Iterable[Any]) -> str:
    return ", ".join(map(str, values))


def _label(run: Run, others: Sequence[Run]) -> str:
    namesakes = [other for other in others if _title(other) == _title(run)]

    def differs(key: str) -> bool:
        return any(other.own_settings.get(key) != run.own_settings.get(key) for other in namesakes)

    keys = {key: None for other in namesakes for key in other.own_settings}
    values = [f"{key.rpartition('.')[2]} {_setting(run, key)}" for key in keys if differs(key)]
    return f"{_title(run)} ({', '.join(values)})" if values else _title(run)


def _title(run: Run) -> str:
    """A switched run's name is Token Choice's, of its configuration; it is called after its source."""
    if run.switch is None:
        return run.name
    name = parse_name(run.name)
    return f"{replace(name, system=converted_from(name.routing.kind).prefix)}, switched"


def _setting(run: Run, key: str) -> Any:
    """A configuration is written without its defaults."""
    kind, _, field = key.rpartition(".")
    return getattr(run.config, field) if kind == "model" else run.own_settings.get(key)


def reached(run: Run, other: Run) -> dict[str, float] | None:
    """Where a run reaches another's last evaluation loss, as said at the top of this file."""
    end = other.curve[-1]
    losses = [point["loss"] for point in run.curve]
    index = next((i for i, loss in enumerate(losses) if loss <= end["loss"]), None)
    if index is None:
        return None
    after = run.curve[index]
    before = run.curve[max(0, index - 1)]
    share = 1.0 if index == 0 else (before["loss"] - end["loss"]) / (before["loss"] - after["loss"])
    at = {key: before[key] + share * (after[key] - before[key]) for key in ("step", "seconds", "flops")}
    return at | {f"of_{whole}": at[key] / end[key] for whole, key in RATIOS.items()}


RATIOS = {"steps": "step", "time": "seconds", "flops": "flops"}


def summary(values: Iterable[float | None]) -> dict[str, float] | None:
    """Over seeds, of those that have a value; None if none has."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    return {"mean": sum(known) / len(known), "least": min(known), "greatest": max(known), "seeds": len(known)}


def comparison(models: dict[str, list[Run]]) -> dict[str, Any]:
    """All numbers of what `by_model` returned, ready for JSON; directories are as the runs have them.

    The first model is the baseline. Losses are nats a token, memory is `cost.memory`'s estimate in bytes.
    """
    labels, baseline = list(models), next(iter(models.values()))
    ends = [min(model[i].curve[-1]["seconds"] for model in models.values()) for i in range(len(baseline))]
    described = {label: _model(label, model, models, ends) for label, model in models.items()}
    for each in described.values():
        for key in ("final_loss", "equal_time_loss"):
            pairs = zip(each["runs"], described[labels[0]]["runs"], strict=True)
            each[f"{key}_difference"] = summary(
                None if mine[key] is None or its[key] is None else mine[key] - its[key] for mine, its in pairs
            )
    facts, settings = baseline[0].facts, baseline[0].settings
    environments: list[dict[str, Any]] = []
    for run in (run for model in models.values() for run in model):
        environment = {key: run.facts.get(key) for key in ENVIRONMENT}
        if environment not in environments:
            environments.append(environment)
    return {
        "baseline": labels[0],
        "seeds": [run.seed for run in baseline],
        "steps": facts["steps"],
        "batch_size": settings["batch_size"],
        "context": baseline[0].config.max_position_embeddings,
        "group_size": baseline[0].group_size,
        "evaluated_on": facts.get("evaluated_on") or "validation",
        "equal_time_seconds": summary(ends),
        "corpus": facts["corpus"],
        "environments": environments,
        "models": list(described.values()),
    }


def _model(label: str, model: list[Run], models: dict[str, list[Run]], ends: list[float]) -> dict[str, Any]:
    first = model[0]
    parts = first.settings["training"].get("gradient_accumulation_steps", 1)
    count = parameters(first.config)
    runs = []
    for i, (run, end) in enumerate(zip(model, ends, strict=True)):
        before = run.switch or {"step": 0, "tokens": 0, "seconds": 0}  # speeds are of what came after a switch
        seconds = run.facts["seconds"] - before["seconds"]
        curve = {key: [point[key] for point in run.curve] for key in ("seconds", "loss")}
        at_end = float(np.interp(end, curve["seconds"], curve["loss"], left=np.nan))  # nan: not evaluated so early
        runs.append(
            {
                "seed": run.seed,
                "directory": str(run.directory),
                **{key: run.facts[key] for key in ("final_loss", "bits_per_byte", "seconds")},
                "regrouping_spread": run.facts.get("regrouping_spread"),  # None: its rows do not influence each other
                "seconds_per_step": seconds / (run.facts["steps"] - before["step"]),
                "tokens_per_second": (run.facts["tokens"] - before["tokens"]) / seconds,
                "equal_time_loss": None if np.isnan(at_end) else at_end,
                "reached": {other: reached(run, theirs[i]) for other, theirs in models.items()},
                "curve": run.curve,
            }
        )
    keys = ("final_loss", "bits_per_byte", "seconds", "seconds_per_step", "tokens_per_second", "equal_time_loss")
    keys += ("regrouping_spread",)
    return {
        "label": label,
        "name": first.name,
        "switched": first.switch is not None,
        "learning_rate": first.settings["learning_rate"],
        "parameters": {"total": count["total"], "active": count["active"]},
        "flops_per_token": {"forward": first.flops[0], "training": first.flops[1]},
        "memory_estimate": sum(memory(first.config, first.settings["batch_size"] // parts).values()),
        **{key: summary(run[key] for run in runs) for key in keys},
        "reached": {other: _summarised([run["reached"][other] for run in runs]) for other in models},
        "runs": runs,
    }


def _summarised(found: list[dict[str, float] | None]) -> dict[str, Any]:
    keys = [*RATIOS.values(), *(f"of_{whole}" for whole in RATIOS)]
    return {key: summary(None if each is None else each[key] for each in found) for key in keys}


def telemetry(model: list[Run]) -> dict[str, dict[str, tuple[list[int], list[float]]]]:
    """Steps and values, means over the seeds, by measure and layer. Empty where nothing was measured."""
    values: dict[str, dict[str, dict[int, list[float]]]] = {}
    for run in model:
        for row in run.rows:
            for layer, measured in row.get("layers", {}).items():
                for measure, value in measured.items():
                    if value is not None:  # what was not finite
                        at = values.setdefault(measure, {}).setdefault(layer, {})
                        at.setdefault(row["step"], []).append(value)
    return {
        measure: {
            layer: (sorted(at), [sum(at[step]) / len(at[step]) for step in sorted(at)])
            for layer, at in sorted(layers.items(), key=lambda item: int(item[0]))
        }
        for measure, layers in values.items()
    }


def runs_of(directories: Sequence[Path]) -> tuple[list[Run], str | None]:
    """The runs in run directories and comparisons' directories; the command of a comparison that is there alone."""
    runs, command = [], None
    for directory in directories:
        if (directory / "compare.json").is_file():
            written = json.loads((directory / "compare.json").read_text())
            runs += [read(directory / run["directory"]) for model in written["models"] for run in model["runs"]]
            command = written["command"] if len(directories) == 1 else None
        elif directory.is_dir() and not (directory / "run.json").is_file() and not (directory / "config.yaml").exists():
            raise ValueError(f"{directory} is no finished run or comparison: it has no run.json and no compare.json")
        else:
            runs.append(read(directory))
    return runs, command


def relative(written: dict[str, Any], to: Path) -> dict[str, Any]:
    """The same comparison, its directories relative to another, so that all of it can be moved."""
    models = []
    for model in written["models"]:
        runs = [run | {"directory": os.path.relpath(run["directory"], to)} for run in model["runs"]]
        models.append(model | {"runs": runs})
    return written | {"models": models}
