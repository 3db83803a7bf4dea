"""From a trained dense model: trained on as it is, and upcycled to Token Choice (../../docs/results/upcycling.md).

    python experiments/upcycle/run.py            # Nanos: an hour of one core
    python experiments/upcycle/run.py --micro    # Micros: an hour and a half
    python experiments/upcycle/run.py --long     # a Micro whose source has read four times as much: three hours
    python experiments/upcycle/run.py --early    # ten minutes, of which a tenth is of another model: two hours
    python experiments/upcycle/run.py --sweep    # rates, routers and starts, on the tuning split: an hour
    python experiments/upcycle/run.py --time     # a step of dense models and upcycled ones, in turns
    python experiments/upcycle/run.py --table    # Markdown

A dense model of three seeds becomes Token Choice of 8 of 256 experts (`mot upcycle`), and is trained on for a quarter
of the source's steps, a Nano also for as many again; beside it the dense model is, for as many steps and for as much
time (timings.csv). Models that are trained from the start have all of these steps. It goes on where it was stopped. All
train on the packages that are installed (packages.txt). Rates are the best of sweeps.csv, of one seed.

As measured (means of three seeds): after a quarter of the steps upcycled Nanos 2.669, dense ones 2.757.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor

from mixture_of_tokens import MixtureOfTokensForCausalLM, train, upcycle
from mixture_of_tokens.conversion import copies
from mixture_of_tokens.runs.run import read_run
from mixture_of_tokens.settings.names import SIZES
from mixture_of_tokens.settings.options import Options
from mixture_of_tokens.training.merging import merge
from mixture_of_tokens.utils.formatting import loss, markdown

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import Experiment, add_rows, directory_of, keep, once, read_csv, script, spread, step_times

HERE = Path(__file__).parent
SWEEPS, TIMINGS = HERE / "sweeps.csv", HERE / "timings.csv"
ROUNDS, TIMED = 7, 3  # rounds of timings, and steps of a model in one
AS_UPCYCLED = {"capacity_factor": None, "norm_topk_prob": True}


class Study(NamedTuple):
    """steps: of the source; lengths: what is trained on, in steps; rates: by that and what is trained."""

    size: str
    child: str
    steps: int
    options: Options
    lengths: tuple[int, ...]
    rates: dict[tuple[str, int], float]
    scratch: tuple[str, ...] = ()  # trained from the start, in the steps of source and child together
    scored_rows: int | None = None  # of what is trained on; a source is scored on all of the text
    seeds: tuple[int, ...] = (1, 2, 3)
    label: str = ""  # in the names of its runs

    @property
    def source(self) -> str:
        return f"Transformer-{self.size}"

    def run(self, seed: int | str) -> str:
        """The directory of its source."""
        return directory_of(f"{self.source}{self.label}", f"seed{seed}")

    def in_time(self, steps: int) -> int:
        """Steps of the dense model in the time of so many of the upcycled one."""
        (share,) = (float(row["share_of_dense"]) for row in read_csv(TIMINGS) if row["system"] == self.child)
        return round(steps * share)


NANO = Study(
    "Nano",
    "TC-Nano/32E/8",
    1000,
    Options(device="cpu"),
    (250, 1000),
    {("dense", 250): 0.004, ("upcycled", 250): 0.01}
    | {("dense", 1000): 0.008, ("upcycled", 1000): 0.02}
    | {("TC-Nano/32E/8", 2000): 0.02, ("MoT-Nano/32E/8", 2000): 0.02},
    ("TC-Nano/32E/8", "MoT-Nano/32E/8"),
)
MICRO = Study(
    "Micro",
    "TC-Micro/32E/8",
    1500,
    Options(device="cpu", data=["packages"], training={"bf16": True}),
    (375,),
    {("dense", 375): 0.0016, ("upcycled", 375): 0.004},
    scored_rows=4096,
)
LONG = MICRO._replace(
    steps=6000,
    lengths=(1500,),
    rates={("dense", 1500): 0.0016, ("upcycled", 1500): 0.004},  # of shorter runs
    seeds=(1,),
    label="-long",
)
STUDIES = (NANO, MICRO, LONG)
# Ten minutes, which are 7,000 dense steps: a tenth of them dense, 150 to upcycle, then Token Choice, a step of which
# takes 1.493 of a dense one (../verdict/fresh-timings.csv). The rate falls after the start alone, as in the recipe.
EARLY = Study(
    "Nano",
    "TC-Nano/32E/4",
    700,
    Options(device="cpu", data=["packages"], training={"lr_scheduler_type": "constant_with_warmup"}),
    (4118,),
    {},
    label="-early",
)
EARLY_RATES = {0.005: (1,), 0.01: (1, 2, 3)}  # with their seeds
# The same time, begun as that Token Choice too: a restart by a new optimizer and a new warm-up, and nothing else.
RESTARTED = EARLY._replace(
    steps=469, options=replace(EARLY.options, model=AS_UPCYCLED), rates={("upcycled", 4118): 0.01}, label="-restarted"
)


def drawn(x_SD: Tensor, count: int) -> Tensor:
    """In place of `copies.centres`: rows as they are drawn, of no text."""
    return torch.randn(count, x_SD.shape[1])


@torch.no_grad()
def partly_drawn(share: float, dense: dict[str, Tensor], model: MixtureOfTokensForCausalLM) -> dict[str, Tensor]:
    """In place of `copies.upcycled_weights`: a share of each expert's hidden units is drawn anew (Drop-Upcycling,
    arXiv 2502.19261), by mean and standard deviation of the expert's own weights."""
    weights = copies.upcycled_weights(dense, model)
    for i, block in enumerate(model.model.layers):
        if not model.config.routings[i].sparse:
            continue
        place, experts = f"model.layers.{i}.mlp.experts", block.mlp.experts
        count, _, width = experts.down_proj.shape
        anew_EF = torch.rand(count, width).argsort(1) < round(share * width)
        for name, units_EF in (("gate_up_proj", anew_EF.repeat(1, 2)), ("down_proj", anew_EF)):
            old = weights[f"{place}.{name}"]
            mean, std = old.mean((1, 2), keepdim=True), old.std((1, 2), keepdim=True)
            units = units_EF[:, :, None] if name == "gate_up_proj" else units_EF[:, None, :]
            weights[f"{place}.{name}"] = torch.where(units, mean + std * torch.randn_like(old), old)
    return weights


# Starts, by their names: the spread of the routers' logits, how their rows are found, and how experts are made.
STARTS: dict[str, tuple[float, Callable[..., Tensor], Callable[..., dict[str, Tensor]]]] = {
    "clusters": (copies.SPREAD, copies.centres, copies.upcycled_weights),
    "clusters, spread 0.2": (0.2, copies.centres, copies.upcycled_weights),
    "drawn": (copies.SPREAD, drawn, copies.upcycled_weights),
    "drawn, spread 0.2": (0.2, drawn, copies.upcycled_weights),
    "clusters, a quarter of the units anew": (copies.SPREAD, copies.centres, partial(partly_drawn, 0.25)),
    "clusters, half of the units anew": (copies.SPREAD, copies.centres, partial(partly_drawn, 0.5)),
}
SIGMOID = "sigmoid"


@contextmanager
def begun_as(start: str) -> Iterator[None]:
    spread, rows, weights = STARTS[start]
    module = "mixture_of_tokens.conversion.upcycle"
    exact = weights is copies.upcycled_weights
    with (
        patch.object(copies, "SPREAD", spread),
        patch.object(copies, "centres", rows),
        patch(f"{module}.upcycled_weights", weights),
        patch(f"{module}.TOLERANCE", 1e-3 if exact else 10.0),
    ):
        yield


def started(experiment: Experiment, source: Path, child: str, start: str = "clusters") -> Path:
    """What `mot upcycle` makes of a source."""
    out = experiment.trained / directory_of(source.name, child.replace("/", "-"), start.replace(", ", "-"), "start")
    out = out.with_name(out.name.replace(" ", "-"))
    if not out.exists():
        with begun_as(start):
            upcycle(source, child, out=out)
    return out


def source_of(experiment: Experiment, study: Study, seed: int) -> Path:
    out = experiment.trained / study.run(seed)
    train(study.source, out=out, seed=seed, options=replace(study.options, steps=study.steps), resume=True)
    return out


def trained_on(
    experiment: Experiment, begin: Path, name: str, steps: int, rate: float, study: Study, **options: Any
) -> Path:
    """A run that goes on with another; its text is that run's."""
    out = experiment.trained / name
    options = {"steps": steps, "data": [], "scored_rows": study.scored_rows} | options
    train(start=begin, out=out, learning_rate=rate, options=replace(study.options, **options), resume=True)
    return out


def from_the_start(experiment: Experiment, study: Study, name: str, seed: int, steps: int, rate: float) -> Path:
    model = AS_UPCYCLED if name == study.child else {}
    out = experiment.trained / directory_of(name, f"seed{seed}")
    train(
        name, out=out, seed=seed, learning_rate=rate, resume=True,
        options=replace(study.options, steps=steps, model=model),
    )  # fmt: skip
    return out


def make(experiment: Experiment, study: Study) -> None:
    """Train what is missing, seed by seed, and keep it."""
    for seed in study.seeds:
        source = source_of(experiment, study, seed)
        start = started(experiment, source, study.child)
        runs = [source]
        for steps in study.lengths:
            dense, upcycled = study.rates["dense", steps], study.rates["upcycled", steps]
            for own in (steps, study.in_time(steps)):
                runs.append(trained_on(experiment, source, f"{source.name}-{own}", own, dense, study))
            runs.append(trained_on(experiment, start, f"{source.name}-upcycled-{steps}", steps, upcycled, study))
        for name in study.scratch:
            steps = study.steps + study.lengths[-1]
            runs.append(from_the_start(experiment, study, name, seed, steps, study.rates[name, steps]))
        keep([read_run(run) for run in runs], experiment.kept, first_seed=1)


def make_early(experiment: Experiment) -> None:
    """A dense start in place of the mixture that `../verdict/fresh.py` begins with."""
    (steps,) = EARLY.lengths
    for rate, seed in early_runs():
        start = started(experiment, source_of(experiment, EARLY, seed), EARLY.child)
        run = trained_on(experiment, start, early_name(rate, seed), steps, rate, EARLY, training={})
        keep([read_run(run)], experiment.kept, first_seed=1)


def make_restarted(experiment: Experiment) -> None:
    (steps,) = RESTARTED.lengths
    rate = RESTARTED.rates["upcycled", steps]
    for seed in RESTARTED.seeds:
        source = experiment.trained / directory_of(f"{RESTARTED.child}-begun", f"seed{seed}")
        options = replace(RESTARTED.options, steps=RESTARTED.steps)
        train(RESTARTED.child, out=source, seed=seed, learning_rate=rate, options=options, resume=True)
        own = RESTARTED._replace(options=replace(RESTARTED.options, model={}))
        run = trained_on(experiment, source, restarted_name(seed), steps, rate, own, training={})
        keep([read_run(run)], experiment.kept, first_seed=1)


def restarted_name(seed: int | str) -> str:
    return directory_of(RESTARTED.child, f"seed{seed}{RESTARTED.label}")


def early_runs() -> list[tuple[float, int]]:
    return [(rate, seed) for rate, seeds in EARLY_RATES.items() for seed in seeds]


def early_name(rate: float, seed: int | str) -> str:
    return f"{EARLY.run(seed)}-upcycled-{rate}"


def sweep(experiment: Experiment) -> None:
    """Rates, and starts of Nanos, by the loss on the tuning split; one seed."""
    rates = {"": (0.001, 0.002, 0.004, 0.01), "clusters": (0.005, 0.01, 0.02)}
    cells = [(NANO, 250, start, rate) for start, some in rates.items() for rate in some]
    others = [start for start in STARTS if start != "clusters"]
    cells += [(NANO, 250, start, 0.01) for start in others] + [(NANO, 250, SIGMOID, rate) for rate in (0.005, 0.01)]
    cells += [(NANO, 1000, "", rate) for rate in (0.004, 0.008, 0.016)]
    cells += [(NANO, 1000, "clusters", rate) for rate in (0.005, 0.01, 0.02, 0.04)]
    cells += [(NANO, 1000, start, 0.01) for start in others if start.endswith("anew")]
    cells += [(MICRO, 375, "", rate) for rate in (0.0008, 0.0016, 0.0032)]
    cells += [(MICRO, 375, "clusters", rate) for rate in (0.001, 0.002, 0.004, 0.008)]
    for study, steps, start, rate in cells:
        key = {"source": study.source, "steps": steps, "start": start, "learning_rate": rate}
        once(SWEEPS, key, swept, experiment, study, steps, start, rate)


def swept(experiment: Experiment, study: Study, steps: int, start: str, rate: float) -> list[dict[str, str]]:
    source = source_of(experiment, study, 1)
    begin = source
    if start == SIGMOID:
        begin = started(experiment, source, study.child.replace("TC", "STC"))
    elif start:
        begin = started(experiment, source, study.child, start)
    words = (start or "dense").replace(", ", "-").replace(" ", "-")
    name = directory_of("sweep", study.size, words, steps, rate)
    run = read_run(trained_on(experiment, begin, name, steps, rate, study, evaluate_on="tuning"))
    layers = next(row.layers for row in reversed(run.rows) if row.layers)
    load = max(layer.get("largest_load", 0.0) for layer in layers.values())
    row = {"tuning_loss": f"{run.facts.final_loss:.4f}", "step_0": f"{run.evaluations[0].eval_loss:.4f}"}
    return [row | {"largest_load": f"{load:.2f}"}]


def time_steps() -> None:
    """A step of each study's dense model and of the upcycled one, in turns."""
    for study in (NANO, MICRO):
        models = {}
        for name, model in ((study.source, {}), (study.child, AS_UPCYCLED)):
            config = merge(name, 0, None, replace(study.options, model=model)).config
            models[name] = MixtureOfTokensForCausalLM(config.model_config)
        text, bf16 = config.prepare().train, bool(study.options.training)
        rows = step_times(
            models, text, rows=SIZES[study.size].batch, group=32, rounds=ROUNDS, turns=2, steps=TIMED, bf16=bf16
        )
        add_rows(TIMINGS, rows, ["system"])


def table(experiment: Experiment) -> str:
    """Final losses."""
    rows = [["from", "then", "steps", "rate", "loss"]]
    for study in STUDIES:
        rows.append(_row(experiment, study, study.source, "(the source)", study.run("{}")))
        for steps in study.lengths:
            ways = {"dense": f"-{steps}", "dense, in the time of the upcycled one": f"-{study.in_time(steps)}"}
            ways |= {"upcycled": f"-upcycled-{steps}"}
            rows += [_row(experiment, study, study.source, way, study.run("{}") + end) for way, end in ways.items()]
        rows += [_row(experiment, study, "the start", name, directory_of(name, "seed{}")) for name in study.scratch]
    way = f"{EARLY.child} in the rest of ten minutes"
    rows += [_row(experiment, EARLY, EARLY.source, way, early_name(rate, "{}")) for rate in EARLY_RATES]
    rows.append(_row(experiment, RESTARTED, RESTARTED.child, way, restarted_name("{}")))
    return f"{gains_table(experiment)}\n\n{markdown([row for row in rows if row], left=2)}\n\n{sweep_table()}"


def gains_table(experiment: Experiment) -> str:
    """How far the upcycled models end below the dense ones, seed by seed."""
    rows = [["from", "its steps", "trained on", "lower after equal steps", "lower after equal time", "seeds"]]
    for study in STUDIES:
        for steps in study.lengths:
            gains = [_gains(experiment, study, steps, dense) for dense in (steps, study.in_time(steps))]
            if any(gains):
                seeds = str(max(map(len, gains)))
                rows.append([study.source, f"{study.steps:,}", f"{steps:,}", *map(spread, gains), seeds])
    return markdown(rows)


def _gains(experiment: Experiment, study: Study, steps: int, dense: int) -> list[float]:
    """The dense model's loss after so many steps, less that of the upcycled one: of the seeds that have both."""
    ends = (f"-{dense}", f"-upcycled-{steps}")
    pairs = [[experiment.kept / f"{study.run(seed)}{end}.json" for end in ends] for seed in study.seeds]
    losses = [[read_run(file).facts.final_loss for file in pair] for pair in pairs if all(map(Path.is_file, pair))]
    return [before - after for before, after in losses]


def sweep_table() -> str:
    """Losses on the tuning split."""
    rows = [["from", "steps", "trained on", "rate", "loss", "busiest expert, of an even share"]]
    starts = ["", *STARTS, SIGMOID]
    found = read_csv(SWEEPS)
    found.sort(key=lambda row: (row["source"] != NANO.source, int(row["steps"]), starts.index(row["start"])))
    for row in found:
        what = f"upcycled, {row['start']}" if row["start"] else "the dense model"
        load = row["largest_load"] if row["start"] else ""
        loss_of_it = loss(float(row["tuning_loss"]))
        rows.append([row["source"], f"{int(row['steps']):,}", what, row["learning_rate"], loss_of_it, load])
    return markdown(rows, left=3)


def _row(experiment: Experiment, study: Study, begin: str, way: str, name: str) -> list[str]:
    files = [experiment.kept / f"{name.format(seed)}.json" for seed in study.seeds]
    runs = [read_run(file) for file in files if file.is_file()]
    if not runs:
        return []
    first = runs[0].config
    losses = spread(run.facts.final_loss for run in runs)
    return [begin, way, f"{first.steps:,}", f"{first.learning_rate:g}", losses]


if __name__ == "__main__":
    experiment = Experiment.named("upcycle")
    script(
        __doc__,
        lambda: make(experiment, NANO),
        lambda: table(experiment),
        micro=("train Micros", lambda: make(experiment, MICRO)),
        long=("train a Micro with a longer source", lambda: make(experiment, LONG)),
        early=(
            "train a tenth of ten minutes as something else",
            lambda: (make_early(experiment), make_restarted(experiment)),
        ),
        sweep=("find rates", lambda: sweep(experiment)),
        time=("time steps", time_steps),
    )
