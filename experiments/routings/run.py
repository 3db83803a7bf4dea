"""Routings side by side, three seeds: the losses of docs/results/systems.md, and when each reaches the dense model's.

    python experiments/routings/run.py            # some three hours of one core; goes on where it was stopped
    python experiments/routings/run.py --sweep    # peak rates and settings on the tuning split; three hours of one core
    python experiments/routings/run.py --time     # a step of the trained models; four minutes of an idle machine
    python experiments/routings/run.py --load     # how evenly the trained models' experts are used; some minutes
    python experiments/routings/run.py --table    # the tables: Markdown

1,200 steps of 8,192 tokens of the standard library's source (of Python 3.11.7, for the text that is committed). Every
system has the dense model's FLOPs in its experts, on average where the number of experts a token varies; FLOPs count it
as it was measured. The dense model, Mixture of Tokens and Token Choice are those of `../nano`, with the same text and
steps. Rates are those of `SYSTEMS`, by `sweeps.csv` (one seed), in which 0.04 is better than what sigmoid Token Choice
of 8 of 256 experts has here, by 0.006, and Soft MoE, by 0.05. Times are interleaved rounds of all models on an idle
machine.
"""

import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from mixture_of_tokens import train
from mixture_of_tokens.data.blocks import Blocks
from mixture_of_tokens.data.groups import grouped_order
from mixture_of_tokens.layers.experts import Routed
from mixture_of_tokens.models.modeling import MixtureOfTokensForCausalLM
from mixture_of_tokens.models.telemetry import measure, watch_weights
from mixture_of_tokens.reports.comparison import reached
from mixture_of_tokens.runs.loading import load_model, text_of
from mixture_of_tokens.runs.run import Run, experts_per_token, read_run
from mixture_of_tokens.settings.options import Options
from mixture_of_tokens.utils.formatting import markdown, ratio

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import (
    Experiment,
    Sweep,
    directory_of,
    keep,
    machine_of,
    read_csv,
    script,
    spread,
    step_times,
    swept,
    write_csv,
)

STEPS, SEEDS = 1200, [1, 2, 3]
UNTRAINED = ", untrained"
ALL_AT_FIRST = "ReMoE-"  # of which nearly all experts answer before it is trained
TIMES = ("share_of_dense", "share_low", "share_high")
TIMINGS = "timings.csv"
ROUNDS, TIMED = 7, 15  # of a timing, and steps of each model in a round
ROWS, GROUP = 128, 32  # of a step
LOADS, LOAD_ROWS = "loads.csv", 4096  # of 64 tokens each, by which the load of experts is measured


class System(NamedTuple):
    """A model with settings of its configuration; `nano`: it is one of that folder's."""

    name: str
    model: Mapping[str, str] = {}
    rate: float | None = None
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
        return directory_of(self.name, self.model, f"seed{seed}")


SHARED, SIGMOID, DROPLESS = {"shared_experts": "1"}, {"threshold_scores": "sigmoid"}, {"capacity_factor": "null"}
SYSTEMS = (
    System("Transformer-Nano", nano=True),
    System("MoT-Nano/32E/8", nano=True),
    System("TC-Nano/32E", nano=True),
    System("TC-Nano/32E/8", DROPLESS, rate=2e-2),
    System("STC-Nano/32E"),
    System("STC-Nano/32E/8", rate=2e-2),
    System("EC-Nano/32E"),
    System("EC-Nano/32E", {"group_size": "128"}),
    System("ET-Nano/32E"),
    System("ET-Nano/32E", SIGMOID, rate=2e-2),
    System("ReMoE-Nano/32E"),
    System("SoftMoE-Nano/32E"),
    System("MoT-Nano/32E/2", SHARED),
    System("TC-Nano/32E/2", SHARED),
    System("STC-Nano/32E/2", SHARED),
    System("ET-Nano/32E/2", SHARED),
    System("ReMoE-Nano/32E/2", SHARED),
)
# Peak rates and settings that were tried, with seed 1.
SWEEPS: tuple[Sweep, ...] = (
    ("STC-Nano/32E", [5e-3, 1e-2, 2e-2, 4e-2], {}),
    ("EC-Nano/32E", [5e-3, 1e-2, 2e-2, 4e-2], {}),
    ("ET-Nano/32E", [5e-3, 1e-2, 2e-2], {}),
    ("ET-Nano/32E", [1e-2, 2e-2, 4e-2], SIGMOID),
    ("ET-Nano/32E", [2e-2], SIGMOID | {"threshold_decay": "0.5,0.99"}),
    ("ET-Nano/32E", [2e-2], SIGMOID | {"router_temperature": "0.25,4"}),
    ("ReMoE-Nano/32E", [1e-2, 2e-2, 4e-2], {}),
    ("ReMoE-Nano/32E", [2e-2], {"router_temperature": "0.25,4"}),
    ("SoftMoE-Nano/32E", [1e-2, 2e-2, 4e-2], {}),
    ("STC-Nano/32E", [1e-2], {"router_temperature": "0.25,4"}),
    ("TC-Nano/32E", [1e-2], {"router_temperature": "0.25,1,4"}),
    ("TC-Nano/32E/8", [5e-3, 1e-2, 2e-2, 4e-2], DROPLESS),
    ("STC-Nano/32E/8", [5e-3, 1e-2, 2e-2, 4e-2], {}),
    ("EC-Nano/32E", [2e-2], {"router_temperature": "0.25,4"}),
)


def trained(experiment: Experiment) -> None:
    """Seed by seed, so that what was stopped is balanced."""
    for seed in SEEDS:
        for system in SYSTEMS:
            if not system.nano:
                out = experiment.trained / system.directory(seed)
                train(system.name, out=out, seed=seed, learning_rate=system.rate, options=system.options, resume=True)
                keep([read_run(out)], experiment.kept, first_seed=SEEDS[0])


def runs_of(experiment: Experiment, system: System) -> list[Run]:
    """Those of its runs that are finished, by seed."""
    folder = Experiment.named("nano").kept if system.nano else experiment.kept
    files = [folder / f"{system.directory(seed)}.json" for seed in SEEDS]
    return [read_run(file) for file in files if file.is_file()]


def timed(experiment: Experiment) -> None:
    models, (first, *_) = {}, weights_of(experiment, SEEDS[:1])
    for system in SYSTEMS:
        if system.nano:  # whose weights are not kept; they do not decide what a step costs
            models[system.label] = MixtureOfTokensForCausalLM(runs_of(experiment, system)[0].model_config)
            continue
        models[system.label] = load_model(str(experiment.trained / system.directory(SEEDS[0])))
        if system.name.startswith(ALL_AT_FIRST):
            models[system.label + UNTRAINED] = MixtureOfTokensForCausalLM(models[system.label].config)
    blocks = text_of(str(first)).train
    rows = step_times(models, blocks, rows=ROWS, group=GROUP, rounds=ROUNDS, steps=TIMED)
    for row, model in zip(rows, models.values(), strict=True):
        row["experts_per_token"] = _experts_of(model, blocks)
    write_csv(experiment.kept / TIMINGS, list(rows[0]), rows)


def weights_of(experiment: Experiment, seeds: Sequence[int] = SEEDS) -> list[Path]:
    """Run directories of all systems that are trained here. Raises SystemExit, naming the first one that is missing."""
    runs = [experiment.trained / system.directory(seed) for system in SYSTEMS if not system.nano for seed in seeds]
    for run in runs:
        if not (run / "model").is_dir():
            sys.exit(f"run.py: {run} has no weights; train what is missing first, by run.py without a flag")
    return runs


def _experts_of(model: MixtureOfTokensForCausalLM, blocks: Blocks) -> float:
    """Experts a token, mean over the layers with experts; 0 without."""
    measured = measure(model, blocks.batch(grouped_order(blocks, GROUP, seed=1).ravel()[:ROWS]))
    found = [layer["experts_per_token"] for layer in measured.values() if "experts_per_token" in layer]
    return sum(found) / len(found) if found else 0.0


@torch.no_grad()
def loaded(experiment: Experiment) -> None:
    """How the choices of trained models are spread over their experts, on text of training and of validation."""
    weights_of(experiment)
    rows = []
    for system in SYSTEMS:
        for seed in () if system.nano else SEEDS:
            run = experiment.trained / system.directory(seed)
            rows += [{"system": system.label, "seed": seed, **row} for row in _loads(str(run))]
            print(system.label, seed, file=sys.stderr)
    write_csv(experiment.kept / LOADS, list(rows[0]), rows)


def load_table(kept: Path) -> str:
    """The least and the greatest of all seeds and layers, of sparse routings whose load may be uneven."""
    heads = ["experts a token, training", "validation", "an expert's load, of an even one, training", "validation"]
    table, rows = [["", *heads]], read_csv(kept / LOADS)
    for system in ("STC-Nano/32E", "ET-Nano/32E", "ReMoE-Nano/32E"):
        cells: list[str] = []
        for least, greatest in (("experts_per_token", "experts_per_token"), ("least_load", "greatest_load")):
            for split in ("train", "validation"):
                own = [row for row in rows if (row["system"], row["split"]) == (system, split)]
                ends = min(float(row[least]) for row in own), max(float(row[greatest]) for row in own)
                cells.append("{:.2f} to {:.2f}".format(*ends))
        table.append([system, *cells])
    return markdown(table)


def _loads(run: str) -> list[dict[str, object]]:
    model, text, rows = load_model(run), text_of(run), []
    layers = [(i, block.mlp) for i, block in enumerate(model.model.layers) if isinstance(block.mlp, Routed)]
    chosen: dict[int, torch.Tensor] = {}

    def note(i: int, weights: torch.Tensor) -> None:
        chosen[i] = chosen.get(i, 0.0) + (weights > 0).sum((0, 1)).double()

    for i, layer in layers:
        watch_weights(layer, partial(note, i))
    for split in ("train", "validation"):
        blocks, tokens = getattr(text, split), 0
        chosen.clear()
        order = grouped_order(blocks, model.config.group_size, seed=0).ravel()
        for part in np.array_split(order[:LOAD_ROWS], LOAD_ROWS // ROWS):
            ids = blocks.batch(part)["input_ids"]
            model(ids, logits_to_keep=1, use_cache=False)
            tokens += ids.numel()
        for i, count in chosen.items():
            load = count / count.mean()
            row = {"split": split, "layer": i, "experts_per_token": float(count.sum()) / tokens}
            rows.append(row | {"least_load": float(load.min()), "greatest_load": float(load.max())})
    return rows


def table(experiment: Experiment) -> str:
    dense = {run.seed: run for run in runs_of(experiment, SYSTEMS[0])}
    times = _times_of(experiment)
    rows = [["", "seeds", "loss", "alone", "steps", "FLOPs", f"time ({machine_of(experiment.kept / TIMINGS)})"]]
    for system in SYSTEMS:
        runs = runs_of(experiment, system)
        if not runs:
            continue
        another = any(run.facts.text != dense[run.seed].facts.text for run in runs)  # no loss of it can be compared
        found = [None if another else reached(run, dense[run.seed]) for run in runs]
        at = [each for each in found if each is not None]
        time_of = times.get(system.label)
        share = float(time_of[TIMES[0]]) if time_of else None
        took = []
        if share is not None:
            varies = any(routing.varies for routing in runs[0].model_config.routings)
            each_more = _each_more(times, system) if varies else 0.0
            took = [
                _steps_of_dense(run, each.step, share, each_more) / STEPS
                for run, each in zip(runs, found, strict=True)
                if each
            ]
        cells = [
            f"{system.label}, another text" if another else system.label,
            str(len(runs)),
            spread(run.facts.final_loss for run in runs),
            _alone(system, runs[0]),
            spread((each.of_steps for each in at), ratio) or ("" if another else "never"),
            spread((each.of_flops for each in at), ratio) or ("" if another else "never"),
            spread(took, ratio),
        ]
        rows.append(cells)
    return markdown(rows)


def use_table(experiment: Experiment) -> str:
    """What a step takes, and how experts are used at the end of the first seed's run, layer by layer."""
    times = _times_of(experiment)
    rows = [
        [
            "",
            f"step time, of dense ({machine_of(experiment.kept / TIMINGS)})",
            "experts a token",
            "largest load",
            "dead experts",
        ]
    ]
    for system in SYSTEMS[1:]:
        if not (runs := runs_of(experiment, system)):
            continue
        time, layers = times.get(system.label), _last_layers(runs[0])
        cells = ["{:.2f} ({:.2f} to {:.2f})".format(*(float(time[key]) for key in TIMES)) if time else ""]
        for key, shown in (("experts_per_token", ".2f"), ("largest_load", ".2f"), ("dead_experts", ".0%")):
            values = [layer[key] for layer in layers if key in layer]
            cells.append(" and ".join(format(value, shown) for value in values))
        rows.append([system.label, *cells])
    return markdown(rows)


def _times_of(experiment: Experiment) -> dict[str, dict[str, str]]:
    """Rows of timings.csv by system."""
    return {row["system"]: row for row in read_csv(experiment.kept / TIMINGS)}


def _alone(system: System, run: Run) -> str:
    """The loss of each row by itself; where it is another one, as `../switch/few.py` has it of the runs of `nano`."""
    routings = run.model_config.routings
    if not any(routing.shares_batch for routing in routings):
        return "the same"
    if not all(routing.serves_alone for routing in routings):
        return "cannot"
    rows = read_csv(Experiment.named("switch").kept / "few.csv") if system.nano else []
    return spread(row["loss"] for row in rows if (row["source"], row["experts"]) == (system.name, "all"))


def _each_more(times: Mapping[str, Mapping[str, str]], system: System) -> float:
    """What one expert a token more costs, in steps of the dense model: as timed of the ReMoE of the same size."""
    shared = SHARED if "shared_experts" in system.model else {}
    remoe = system._replace(name=ALL_AT_FIRST + system.name.partition("-")[2], model=shared).label
    trained, untrained = times[remoe], times[remoe + UNTRAINED]
    apart = [float(untrained[key]) - float(trained[key]) for key in ("share_of_dense", "experts_per_token")]
    return apart[0] / apart[1]


def _steps_of_dense(run: Run, step: float, share: float, each_more: float) -> float:
    """The time of so many steps, in steps of the dense model.

    A step takes `share` of the dense one's time once training has settled, and `each_more` for each expert a token that
    telemetry has measured beyond the last one.
    """
    known = [(row.step, experts_per_token(row)) for row in run.rows]
    known = [(at, experts) for at, experts in known if experts is not None]
    if not each_more or not known:
        return share * step
    at, experts = np.array([(0, known[0][1]), *known]).T
    beyond = np.interp(np.arange(step), at, experts - experts[-1])
    return share * step + each_more * float(np.trapezoid(beyond))


def _last_layers(run: Run) -> list[dict[str, float]]:
    measured = [row.layers for row in run.rows if row.layers is not None]
    return [layer for layer in measured[-1].values() if "largest_load" in layer] if measured else []


if __name__ == "__main__":
    experiment = Experiment.named("routings")
    options = Options(steps=STEPS, device="cpu")
    script(
        __doc__,
        lambda: trained(experiment),
        lambda: "\n\n".join([table(experiment), use_table(experiment), load_table(experiment.kept)]),
        sweep=(
            "try rates and settings",
            lambda: swept(experiment.kept / "sweeps.csv", SWEEPS, options, experiment.trained),
        ),
        time=("time steps of the trained models", lambda: timed(experiment)),
        load=("measure the load of the trained models' experts", lambda: loaded(experiment)),
    )
