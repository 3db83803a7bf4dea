"""Routings side by side, three seeds: the losses of docs/results.md, and when each reaches the dense model's.

    python experiments/routings/run.py            # some three hours of one core; goes on where it was stopped
    python experiments/routings/run.py --sweep    # peak rates and settings on the tuning split; two hours of one core
    python experiments/routings/run.py --time     # a step of the trained models; four minutes of an idle machine
    python experiments/routings/run.py --table    # the tables: Markdown

1,200 steps of 8,192 tokens of the standard library's source (of Python 3.11.7, for the text that is committed). Every
system has the dense model's FLOPs in its experts, on average where the number of experts a token varies; FLOPs count it
as it was measured. The dense model, Mixture of Tokens and Token Choice are those of `../nano`, with the same text and
steps. Rates are the best of `sweeps.csv`, one seed. Times are interleaved rounds of all models on an idle machine.
"""

import random
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from mixture_of_tokens import sweep, train
from mixture_of_tokens.data.groups import grouped_order
from mixture_of_tokens.formatting import loss, markdown, ratio
from mixture_of_tokens.model.routings import PROPERTIES, properties
from mixture_of_tokens.process import keep_large_blocks
from mixture_of_tokens.reports.comparison import reached
from mixture_of_tokens.runs.loading import load_model, text_of
from mixture_of_tokens.runs.records import FACTS
from mixture_of_tokens.runs.run import Run, read
from mixture_of_tokens.training.options import Options

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import Experiment, asked, directory_of, keep, read_csv, spread, write_csv

STEPS, SEEDS = 1200, [1, 2, 3]
TIMES = ("share_of_dense", "share_low", "share_high")
ROUNDS, TIMED = 7, 15  # of a timing, and steps of each model in a round


class System(NamedTuple):
    """A model with settings of its configuration; `nano`: it is one of that folder's."""

    name: str
    model: Mapping[str, str] = {}
    nano: bool = False

    @property
    def label(self) -> str:
        if "shared_experts" in self.model:
            return f"{self.name}, {self.model['shared_experts']} of the experts shared"
        return self.name + "".join(f", {field} {value}" for field, value in self.model.items())

    @property
    def options(self) -> Options:
        return Options(steps=STEPS, device="cpu", model=dict(self.model))

    def directory(self, seed: int) -> str:
        return directory_of(self.name, *(f"{field}={value}" for field, value in self.model.items()), f"seed{seed}")


SHARED = {"shared_experts": "1"}
SYSTEMS = (
    System("Transformer-Nano", nano=True),
    System("MoT-Nano/32E/8", nano=True),
    System("TC-Nano/32E", nano=True),
    System("STC-Nano/32E"),
    System("EC-Nano/32E"),
    System("EC-Nano/32E", {"group_size": "128"}),
    System("ET-Nano/32E"),
    System("ReMoE-Nano/32E"),
    System("SoftMoE-Nano/32E"),
    System("MoT-Nano/32E/2", SHARED),
    System("TC-Nano/32E/2", SHARED),
    System("STC-Nano/32E/2", SHARED),
    System("ET-Nano/32E/2", SHARED),
    System("ReMoE-Nano/32E/2", SHARED),
)
# Peak rates and settings that were tried, with seed 1.
SWEEPS: tuple[tuple[str, list[float], dict[str, str]], ...] = (
    ("STC-Nano/32E", [5e-3, 1e-2, 2e-2, 4e-2], {}),
    ("EC-Nano/32E", [5e-3, 1e-2, 2e-2, 4e-2], {}),
    ("ET-Nano/32E", [1e-2, 2e-2, 4e-2], {}),
    ("ET-Nano/32E", [2e-2], {"threshold_decay": "0.5,0.99"}),
    ("ReMoE-Nano/32E", [1e-2, 2e-2, 4e-2], {}),
    ("SoftMoE-Nano/32E", [1e-2, 2e-2, 4e-2], {}),
)


def swept(experiment: Experiment) -> None:
    rows = []
    for name, rates, model in SWEEPS:
        out = experiment.trained / directory_of("sweep", name, *model)
        options = Options(steps=STEPS, device="cpu", model=model)
        for cell in sweep(name, learning_rate=rates, seeds=[1], out=out, options=options).as_dict()["cells"]:
            settings = " ".join(f"{flag} {value}" for flag, value in cell["settings"].items())
            rows.append({"name": name, "settings": settings, "tuning_loss": cell["loss"]})
    write_csv(experiment.kept / "sweeps.csv", list(rows[0]), rows)


def trained(experiment: Experiment) -> None:
    """Seed by seed, so that what was stopped is balanced."""
    for seed in SEEDS:
        for system in SYSTEMS:
            if not system.nano:
                out = experiment.trained / system.directory(seed)
                train(system.name, out=out, seed=seed, options=system.options, resume=True)
        keep(finished(experiment), experiment.kept)


def finished(experiment: Experiment) -> list[Run]:
    directories = [experiment.trained / system.directory(seed) for system in SYSTEMS for seed in SEEDS]
    return [read(directory) for directory in directories if (directory / FACTS).is_file()]


def runs_of(experiment: Experiment, system: System) -> list[Run]:
    """Those of its runs that are finished, by seed."""
    folder = Experiment.named("nano").kept if system.nano else experiment.kept
    files = [folder / f"{system.directory(seed)}.json" for seed in SEEDS]
    return [read(file) for file in files if file.is_file()]


def timed(experiment: Experiment) -> None:
    """Forward, backward and a fused AdamW on the trained models, in an order that is shuffled every round."""
    keep_large_blocks()
    steps = {}
    for system in SYSTEMS:
        folder = Experiment.named("nano").trained if system.nano else experiment.trained
        run = folder / system.directory(SEEDS[0])
        if (run / "model").is_dir():
            steps[system.label] = _step_of(str(run))
    seconds: dict[str, list[float]] = {label: [] for label in steps}
    for number in range(1 + ROUNDS):  # the first one is a warm-up
        for label in random.sample(list(steps), len(steps)):
            start = time.perf_counter()
            for _ in range(TIMED):
                steps[label]()
            if number:
                seconds[label].append((time.perf_counter() - start) / TIMED)
    first = next(iter(seconds))
    rows = []
    for label, own in seconds.items():
        shares = [mine / its for mine, its in zip(own, seconds[first], strict=True)]
        row = {
            "system": label,
            "milliseconds": 1e3 * statistics.median(own),
            "share_of_dense": statistics.median(shares),
        }
        rows.append(row | {"share_low": min(shares), "share_high": max(shares), "rounds": ROUNDS})
    write_csv(experiment.kept / "timings.csv", list(rows[0]), rows)


def _step_of(run: str) -> Callable[[], None]:
    model = load_model(run).train()
    blocks, rows = text_of(run).train, read(Path(run)).config.batch_size
    order = grouped_order(blocks, model.config.group_size, seed=0).ravel()
    batches = [blocks.batch(part) for part in np.split(order[: 8 * rows], 8)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)

    def step() -> None:
        batches.append(batches.pop(0))
        model(**batches[0], use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        model.balance()

    return step


def table(experiment: Experiment) -> str:
    dense = {run.seed: run for run in runs_of(experiment, SYSTEMS[0])}
    times = {row["system"]: row for row in read_csv(experiment.kept / "timings.csv")}
    columns = ["seeds", "loss", "steps", "FLOPs", "time", "a step, of dense", "experts a token", "largest load", "dead"]
    rows = [["", *columns]]
    for system in SYSTEMS:
        runs = runs_of(experiment, system)
        if not runs:
            continue
        found = [reached(run, dense[run.seed]) for run in runs]
        at = [each for each in found if each is not None]
        time_of = times.get(system.label)
        share, low, high = (float(time_of[key]) for key in TIMES) if time_of else (None, None, None)
        layers = _last_layers(runs[0])
        cells = [
            system.label,
            str(len(runs)),
            spread(run.facts.final_loss for run in runs),
            spread((each.of_steps for each in at), ratio) or "never",
            spread((each.of_flops for each in at), ratio) or "never",
            "" if share is None or not at else spread((share * each.of_steps for each in at), ratio),
            "" if share is None else f"{share:.2f} ({low:.2f} to {high:.2f})",
        ]
        for measure, shown in (("experts_per_token", ".2f"), ("largest_load", ".2f"), ("dead_experts", ".0%")):
            values = [layer[measure] for layer in layers if measure in layer]
            cells.append(" and ".join(format(value, shown) for value in values))
        rows.append(cells)
    return markdown(rows, left=1)


def _last_layers(run: Run) -> list[dict[str, float]]:
    measured = [row.layers for row in run.rows if row.layers is not None]
    return [layer for layer in measured[-1].values() if "largest_load" in layer] if measured else []


def promises(experiment: Experiment) -> str:
    rows = [["", *PROPERTIES]]
    for system in SYSTEMS:
        if runs := runs_of(experiment, system):
            rows.append([system.label, *properties(runs[0].model_config.routings).values()])
    return markdown(rows, left=5)


def sweeps(experiment: Experiment) -> str:
    rows = read_csv(experiment.kept / "sweeps.csv")
    cells = [[row["name"], row["settings"], loss(float(row["tuning_loss"]))] for row in rows]
    return markdown([["", "settings", "loss, tuning"], *cells], left=2)


def main() -> None:
    given = asked(
        __doc__,
        sweep="try rates and settings, and stop",
        time="time steps of the trained models, and stop",
        table="print the tables, and stop",
    )
    experiment = Experiment.named("routings")
    if given.sweep:
        swept(experiment)
    elif given.time:
        timed(experiment)
    elif not given.table:
        trained(experiment)
    print("\n\n".join(part(experiment) for part in (table, promises, sweeps)))


if __name__ == "__main__":
    main()
