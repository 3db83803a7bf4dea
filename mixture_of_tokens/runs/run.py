"""Run directories: who may write one, and what a finished one holds."""

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from mixture_of_tokens.model.config import MixtureOfTokensConfig
from mixture_of_tokens.model.cost import flops_per_token
from mixture_of_tokens.model.names import config_from_name
from mixture_of_tokens.runs.config import CARRIED_OUT, DERIVED, data_group_size, is_configuration


def is_main() -> bool:
    """Whether this process is the first of those that torchrun started, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def check_free(out: Path) -> None:
    """Raises ValueError if something is there where a new run is to be."""
    if is_main() and not _is_empty(out):
        raise ValueError(f"{out} exists already; go on with --resume, name another with --out, or remove it")


def _is_empty(out: Path) -> bool:
    """Whether nothing is there, or no more than a kill can leave of a first file."""
    return not out.exists() or (out.is_dir() and all(path.suffix == ".partial" for path in out.iterdir()))


def check_one_process(what: str) -> None:
    """Raises ValueError under torchrun for what trains more than once."""
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise ValueError(f"{what} trains more than once, and so in one process; torchrun is for mot train")


def check_resumed(out: Path, run: dict[str, Any]) -> None:
    """Raises ValueError if a run directory, where there is one, was made with another configuration."""
    if _is_empty(out):
        return
    written = yaml.safe_load((out / "config.yaml").read_text()) if (out / "config.yaml").is_file() else None
    if not is_configuration(written):
        raise ValueError(f"{out} is no run directory to go on with: it has no config.yaml; name another with --out")

    def flat(configuration: dict[str, Any]) -> dict[str, Any]:
        nested = {"model", "training"}
        outer = {key: value for key, value in configuration.items() if key not in nested | {"transition"}}
        outer |= configuration.get("transition", {})
        inner = {f"{key}.{name}": value for key in nested for name, value in configuration[key].items()}
        inner = {key: value for key, value in inner.items() if key.removeprefix("model.") not in DERIVED}
        return outer | {k: v for k, v in inner.items() if not k.removeprefix("training.").startswith(CARRIED_OUT)}

    before, now = flat(written), flat(yaml.safe_load(yaml.safe_dump(run)))
    for key in [*before, *now]:
        if before.get(key) != now.get(key):
            flag = key.replace("_", "-") if "." not in key else key
            raise ValueError(
                f"{out} was started with --{flag} {before.get(key)}, now it is {now.get(key)}; "
                "give the same flags, or name another directory with --out"
            )


@dataclass(frozen=True)
class Run:
    """A run directory: run.json, config.yaml, the rows of metrics.jsonl and, after a transition, switch.json."""

    directory: Path
    facts: dict[str, Any]
    settings: dict[str, Any]
    rows: list[dict[str, Any]]
    switch: dict[str, Any] | None = None

    @property
    def name(self) -> str:
        return self.facts["name"]

    @property
    def seed(self) -> int:
        return self.facts["seed"]

    @cached_property
    def config(self) -> MixtureOfTokensConfig:
        # The vocabulary is as large as the tokenizer turned out, whatever the settings asked for.
        return config_from_name(self.name, **self.settings["model"] | {"vocab_size": self.facts["vocab_size"]})

    @property
    def group_size(self) -> int:
        """Rows in a group of its data."""
        return data_group_size(self.config.group_size, self.settings["batch_size"])

    @cached_property
    def flops(self) -> tuple[float, float]:
        """Per token in training: of the forward pass, of both passes."""
        forward, backward = flops_per_token(self.config, batch=self.settings["batch_size"])
        return sum(forward.values()), sum(forward.values()) + sum(backward.values())

    @cached_property
    def curve(self) -> list[dict[str, float]]:
        """The evaluations during training; after a transition the source's first, and the loss at the switch."""
        points = [row | {"flops": row["tokens"] * self.flops[1], "loss": row["eval_loss"]} for row in self.evaluations]
        if (switch := self.switch) is not None:
            for point in points:
                before = min(point["tokens"], switch["tokens"])
                point["flops"] = before * switch["flops_per_token"] + (point["tokens"] - before) * self.flops[1]
            place = sum(point["step"] <= switch["step"] for point in points)
            points.insert(place, switch | {"flops": switch["tokens"] * switch["flops_per_token"]})
            points[place]["loss"] = switch["at_the_switch"]
        return [{key: point[key] for key in ("step", "tokens", "seconds", "flops", "loss")} for point in points]

    @property
    def evaluations(self) -> list[dict[str, Any]]:
        return [row for row in self.rows if "eval_loss" in row]

    @cached_property
    def own_settings(self) -> dict[str, Any]:
        """What it was trained with, but for the seed and for how that was carried out."""
        apart = ("seed", "model", "training", "transition")
        flat = {key: value for key, value in self.settings.items() if key not in apart}
        after = self.settings.get("transition", {}).items()
        flat |= {f"transition.{key}": value for key, value in after if key != "source"}  # which differs by seed
        for kind in ("model", "training"):
            for key, value in self.settings[kind].items():
                if not key.startswith(CARRIED_OUT) and key not in DERIVED:
                    flat[f"{kind}.{key}"] = value
        return flat


def read(directory: Path) -> Run:
    """Raises ValueError for a run that is not finished or damaged, or was never evaluated while it trained."""
    if not (directory / "run.json").is_file():
        why = "it has no run.json" if directory.is_dir() else "there is no such directory"
        raise ValueError(f"{directory} is no finished run: {why}")
    try:
        facts = json.loads((directory / "run.json").read_text())
        settings = yaml.safe_load((directory / "config.yaml").read_text())
        rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
        switched = directory / "switch.json"
        switch = json.loads(switched.read_text()) if switched.is_file() else None
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{directory} is no whole run directory: {error}") from None
    if not any("eval_loss" in row for row in rows):
        raise ValueError(f"{directory} was not evaluated while it trained: its metrics.jsonl has no eval_loss")
    return Run(directory, facts, settings, rows, switch)


def through_the_switch(run: Run) -> dict[str, Any]:
    """What switch.json has, with the losses after it, and the worst layer's routing at first and at the end."""
    switch = run.switch
    assert switch is not None
    after = [row for row in run.rows if row["step"] > switch["step"]]
    evaluated = [row for row in after if "eval_loss" in row]
    routed = [row["layers"].values() for row in after if "layers" in row]
    tenth = switch["step"] + max(1, run.settings["steps"] // 10)
    first = next((row for row in evaluated if row["step"] >= tenth), evaluated[-1])

    def worst(layers: Iterable[dict[str, float]]) -> dict[str, float]:
        known = [layer for layer in layers if "largest_load" in layer]
        return {key: max(layer[key] for layer in known) for key in ("largest_load", "dropped")}

    return switch | {
        "after_a_tenth": {"step": first["step"], "loss": first["eval_loss"]},
        "at_the_end": evaluated[-1]["eval_loss"],
        "routers": {"first": worst(routed[0]), "last": worst(routed[-1])} if routed else None,
    }
