"""From a trained dense model: trained on as it is, and upcycled to Token Choice (../../docs/results/upcycling.md).

    python experiments/upcycle/run.py            # three quarters of an hour of one core
    python experiments/upcycle/run.py --sweep    # rates and routers, on the tuning split: 20 minutes
    python experiments/upcycle/run.py --micro    # one seed of a Micro: an hour
    python experiments/upcycle/run.py --table    # Markdown

A dense Nano of 8.2 million tokens, three seeds, becomes TC-Nano/32E/8 (`mot upcycle`), and is trained on for a quarter
of the source's steps; beside it the dense model is, for as many steps and for as much time. It goes on where it was
stopped. Micros train on the packages that are installed (packages.txt).

As measured (means of three seeds): after a quarter of the steps upcycled 2.673, the dense model 2.757, and 2.745 in
equal time.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor

from mixture_of_tokens import train, upcycle
from mixture_of_tokens.conversion import copies
from mixture_of_tokens.runs.run import read_run
from mixture_of_tokens.settings.options import Options
from mixture_of_tokens.utils.formatting import loss, markdown

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import Experiment, add_rows, directory_of, keep, read_csv, script, spread, trained

SEEDS = [1, 2, 3]
SWEEPS = Path(__file__).with_name("sweeps.csv")


class Study(NamedTuple):
    """steps: of the source; in_time: of the dense model in the time of the upcycled one for a quarter of them."""

    source: str
    child: str
    steps: int
    in_time: int
    rates: dict[str, float]  # of the dense model and the upcycled one
    options: dict[str, Any]


NANO = Study("Transformer-Nano", "TC-Nano/32E/8", 1000, 430, {"dense": 0.004, "upcycled": 0.01}, {"device": "cpu"})
MICRO_OPTIONS = {"device": "cpu", "data": ["packages"], "training": {"bf16": True}}
SCORED = 4096  # rows of the text, of which a Micro's has many
MICRO = Study("Transformer-Micro", "TC-Micro/32E/8", 1500, 0, {}, MICRO_OPTIONS)
MICRO_RUNS = (  # what is trained on, steps, rates
    ("dense", 375, (0.0016, 0.0032)),
    ("upcycled", 375, (0.004, 0.008)),
)


def drawn(x_SD: Tensor, count: int) -> Tensor:
    """In place of `copies.centres`: rows as they are drawn, of no text."""
    return torch.randn(count, x_SD.shape[1])


# Routers, by their names: the spread of their logits, and how rows are found.
ROUTERS = {
    "clusters": (copies.SPREAD, copies.centres),
    "clusters, spread 0.2": (0.2, copies.centres),
    "drawn": (copies.SPREAD, drawn),
    "drawn, spread 0.2": (0.2, drawn),
}


@contextmanager
def routers(name: str) -> Iterator[None]:
    spread, rows = ROUTERS[name]
    with patch.object(copies, "SPREAD", spread), patch.object(copies, "centres", rows):
        yield


def started(experiment: Experiment, source: Path, child: str, routed: str = "clusters") -> Path:
    """What `mot upcycle` makes of a source."""
    out = experiment.trained / directory_of(source.name, child.replace("/", "-"), routed.replace(", ", "-"), "start")
    if not out.exists():
        with routers(routed):
            upcycle(source, child, out=out)
    return out


def trained_on(
    experiment: Experiment, begin: Path, name: str, steps: int, rate: float, study: Study, **options: Any
) -> Path:
    how = {key: value for key, value in study.options.items() if key != "data"} | options
    out = experiment.trained / name
    train(start=begin, out=out, learning_rate=rate, options=Options(steps=steps, **how), resume=True)
    return out


def make(experiment: Experiment) -> None:
    """Train the Nanos that are missing, seed by seed, and keep them."""
    study, rates = NANO, NANO.rates
    quarter = study.steps // 4
    for seed in SEEDS:
        source = trained(experiment, study.source, seed, Options(steps=study.steps, **study.options))
        start = started(experiment, source, study.child)
        runs = [
            source,
            trained_on(experiment, source, f"{source.name}-{quarter}", quarter, rates["dense"], study),
            trained_on(experiment, source, f"{source.name}-{study.in_time}", study.in_time, rates["dense"], study),
            trained_on(experiment, start, f"{source.name}-upcycled-{quarter}", quarter, rates["upcycled"], study),
        ]
        keep([read_run(run) for run in runs], experiment.kept, first_seed=SEEDS[0])


def make_micro(experiment: Experiment) -> None:
    source = trained(experiment, MICRO.source, 1, Options(steps=MICRO.steps, **MICRO.options))
    starts = {"dense": source, "upcycled": started(experiment, source, MICRO.child)}
    runs = [source]
    for begin, steps, rates in MICRO_RUNS:
        for rate in rates:
            name = directory_of(source.name, begin, steps, rate)
            runs.append(trained_on(experiment, starts[begin], name, steps, rate, MICRO, scored_rows=SCORED))
    keep([read_run(run) for run in runs], experiment.kept, [str(Path(sys.prefix).parent)])


def sweep(experiment: Experiment) -> None:
    """Rates and routers after a quarter of the steps, by the loss on the tuning split; one seed of the Nano."""
    study, tuning = NANO, {"evaluate_on": "tuning"}
    source = trained(experiment, study.source, 1, Options(steps=study.steps, **study.options))
    cells = [("", rate) for rate in (0.001, 0.002, 0.004, 0.01)]
    cells += [("clusters", rate) for rate in (0.005, 0.01, 0.02)]
    cells += [(name, 0.01) for name in ROUTERS if name != "clusters"] + [("sigmoid", 0.01)]
    known = {(row["routers"], float(row["learning_rate"])) for row in read_csv(SWEEPS)}
    for routed, rate in cells:
        if (routed, rate) in known:
            continue
        begin = source
        if routed == "sigmoid":
            begin = started(experiment, source, study.child.replace("TC", "STC"))
        elif routed:
            begin = started(experiment, source, study.child, routed)
        name = directory_of("sweep", routed.replace(", ", "-").replace(" ", "-") or "dense", str(rate))
        run = read_run(trained_on(experiment, begin, name, study.steps // 4, rate, study, **tuning))
        layers = next(row.layers for row in reversed(run.rows) if row.layers)
        load = max(layer.get("largest_load", 0.0) for layer in layers.values())
        row = {"routers": routed, "learning_rate": rate, "tuning_loss": f"{run.facts.final_loss:.4f}"}
        row |= {"step_0": f"{run.evaluations[0].eval_loss:.4f}", "largest_load": f"{load:.2f}"}
        add_rows(SWEEPS, [row], ["routers", "learning_rate"])


def table(experiment: Experiment) -> str:
    """Final losses."""
    study, quarter = NANO, NANO.steps // 4
    rows = [["from", "then", "steps", "rate", "loss"]]
    ways = {"(the source)": ("", SEEDS), "dense": (f"-{quarter}", SEEDS), "upcycled": (f"-upcycled-{quarter}", SEEDS)}
    ways |= {"dense, in the time of the upcycled one": (f"-{study.in_time}", SEEDS)}
    for way, (end, seeds) in ways.items():
        rows.append(_row(experiment, study.source, way, [f"{study.source}-seed{seed}{end}" for seed in seeds]))
    source = f"{MICRO.source}-seed1"
    rows.append(_row(experiment, MICRO.source, "(the source)", [source]))
    for begin, steps, rates in MICRO_RUNS:
        for rate in rates:
            rows.append(_row(experiment, MICRO.source, begin, [directory_of(source, begin, steps, rate)]))
    return f"{markdown(rows, left=2)}\n\n{sweep_table()}"


def sweep_table() -> str:
    """Losses on the tuning split after a quarter of the steps."""
    rows = [["trained on", "rate", "loss", "busiest expert, of an even share"]]
    for row in read_csv(SWEEPS):
        what = f"upcycled, {row['routers']}" if row["routers"] else "the dense model"
        load = row["largest_load"] if row["routers"] else ""
        rows.append([what, row["learning_rate"], loss(float(row["tuning_loss"])), load])
    return markdown(rows, left=1)


def _row(experiment: Experiment, begin: str, way: str, names: list[str]) -> list[str]:
    runs = [read_run(experiment.kept / name) for name in names]
    first = runs[0].config
    losses = spread(run.facts.final_loss for run in runs)
    return [begin, way, f"{first.steps:,}", f"{first.learning_rate:g}", losses]


if __name__ == "__main__":
    experiment = Experiment.named("upcycle")
    script(
        __doc__,
        lambda: make(experiment),
        lambda: table(experiment),
        sweep=("find rates", lambda: sweep(experiment)),
        micro=("train a Micro", lambda: make_micro(experiment)),
    )
