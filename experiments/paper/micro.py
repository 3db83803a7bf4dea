"""Micros: the systems of figures 4 to 7, their rates, the time of a step, and when each reaches the dense loss.

    python experiments/paper/micro.py --sweep    # peak rates and temperatures, on the tuning split
    python experiments/paper/micro.py --time     # a step of every system with a run, in turns; an idle machine
    python experiments/paper/micro.py --table    # both as Markdown

A Micro is 128 wide, with four blocks, of which the later two are sparse, 64 rows of 128 tokens a step, and a
vocabulary of 1,024.

Runs may train beside other work, so their own clocks say little: the time of a run is its steps times the time of a
step, which `--time` takes on an idle machine, over the dense model's in the same round.
"""

import sys
import tempfile
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from studies import EXPERIMENT, Row, Study, System, runs_of
from transformers import TrainingArguments

from mixture_of_tokens import sweep
from mixture_of_tokens.formatting import Summary, loss, markdown, ratio, with_span
from mixture_of_tokens.model.names import SIZES
from mixture_of_tokens.reports.comparison import reached
from mixture_of_tokens.training.recipes import merge
from mixture_of_tokens.training.train import build

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import Curve, asked, directory_of, read_csv, save_picture, settings_of, step_times, write_csv

TOKENS = SIZES["Micro"].batch * SIZES["Micro"].context  # of a step
SHORT = 1500  # steps of the figures that compare many systems: 12.3 M tokens
LENGTHS = (SHORT, 2 * SHORT, 4 * SHORT, 8 * SHORT)  # of figure 7
SWEPT_STEPS = 1500  # at 750, rates differed by whether a model had already learned to copy (../LOG.md)
ROUNDS, TIMED = 7, 6  # of a timing, and steps of each system in a round
# How a step is carried out, by its name: whether compiled, and settings of the model.
WAYS = {
    "compiled": (True, {}),
    "not compiled": (False, {}),
    "torch's attention": (False, {"attn_implementation": "sdpa"}),
}


# Token Choice's router is sharper than its default, which at Nano was 0.020 better (../routings/sweeps.csv).
SHARP = {"router_temperature": "0.25"}
DENSE, UNIFORM = System("Transformer-Micro"), System("Uniform-Micro/32E")
MIXTURES = {k: System(f"MoT-Micro/32E/{k}".removesuffix("/1")) for k in (1, 2, 4, 8, 16)}
BEST_MIXTURE = MIXTURES[8]
EXPERTS = {8: System("MoT-Micro/8E"), 32: MIXTURES[1], 64: System("MoT-Micro/64E")}
TOKEN_CHOICE = System("TC-Micro/32E", SHARP)
SPARSE = (
    TOKEN_CHOICE,
    System("TC-Micro/32E/8", SHARP),
    *(System(f"{name}-Micro/32E{k}") for name, k in (("STC", "/8"), ("EC", ""), ("ET", ""), ("ReMoE", ""))),
)
SYSTEMS = (DENSE, *MIXTURES.values(), EXPERTS[8], EXPERTS[64], UNIFORM, *SPARSE)

# Peak rates and temperatures that were tried, with seed 1; a list is a grid.
SWEEPS: tuple[tuple[str, list[float], dict[str, str]], ...] = (
    ("Transformer-Micro", [4e-3, 8e-3], {}),
    ("MoT-Micro/32E/8", [8e-3, 4e-3], {}),
    ("TC-Micro/32E", [4e-3, 8e-3], SHARP),
)
SWEPT, TIMES = EXPERIMENT.kept / "sweeps.csv", EXPERIMENT.kept / "timings.csv"


class Result(NamedTuple):
    """A system after so many steps: its loss, and what it needs to reach the dense model's, as shares; by seed.

    equal_time: the loss on its curve when the dense model ends.
    """

    loss: Summary
    equal_time: Summary | None
    steps: Summary | None
    flops: Summary | None
    time: Summary | None


def result_of(system: System, steps: int) -> Result | None:
    """Over the seeds of which both a run and the dense model's are kept; None without any."""
    share = share_of_step(system)
    losses, found, then = [], [], []
    runs, denses = runs_of(system, steps), runs_of(DENSE, steps)
    for seed, run in runs.items():
        if seed in denses:
            losses.append(run.facts.final_loss)
            found.append(reached(run, denses[seed]))
            if share is not None:
                x, y = zip(*((point.step * share, point.loss) for point in run.curve), strict=True)
                then.append(float(np.interp(steps, x, y)))
    over = Summary.of(losses)
    if over is None:
        return None
    some = [each for each in found if each is not None]
    in_steps, in_flops = Summary.of(each.of_steps for each in some), Summary.of(each.of_flops for each in some)
    in_time = None if share is None else Summary.of(each.of_steps * share for each in some)
    return Result(over, Summary.of(then), in_steps, in_flops, in_time)


def share_of_step(system: System) -> float | None:
    """The time of a step over the dense model's, both compiled; None if it was not taken."""
    rows = [row for row in read_csv(TIMES) if row["way"] == "compiled"] if TIMES.is_file() else []
    return next((float(row["share_of_dense"]) for row in rows if row["system"] == system.label), None)


def table_of(rows: Iterable[Row]) -> str:
    """Those of which a run is kept."""
    lines = [["", "M tokens", "seeds", "loss", "at equal time", "steps", "FLOPs", "time", "a step, of dense"]]
    for system, steps, _ in rows:
        found, share = result_of(system, steps), share_of_step(system)
        if found is None:
            continue
        shares = [with_span(each) if each else "never" for each in (found.steps, found.flops)]
        time = with_span(found.time) if found.time else "" if share is None and found.steps else "never"
        cells = [system.label, f"{steps * TOKENS / 1e6:.1f}", str(found.loss.seeds), with_span(found.loss, loss)]
        cells.append("" if found.equal_time is None else with_span(found.equal_time, loss))
        lines.append([*cells, *shares, time, "" if share is None else ratio(share)])
    return markdown(lines)


def draw_curves(study: Study, drawn: int = SHORT) -> None:
    """The evaluations during training, without the first sixth, of the runs of so many steps."""
    panels: dict[str, list[Curve]] = {"M tokens": [], "time, in steps of the dense model": []}
    for system, steps, _ in study.rows:
        runs = runs_of(system, steps).values()
        if steps != drawn or not runs:
            continue
        share = share_of_step(system)
        points = [[point for point in run.curve if 6 * point.step >= steps] for run in runs]
        losses = np.array([[point.loss for point in each] for each in points])
        at = np.array([point.step for point in points[0]])
        x = (at * TOKENS / 1e6, None if share is None else at * share)
        for curves, its in zip(panels.values(), x, strict=True):
            if its is not None:
                curves.append(Curve(system.label, its, losses))
    save_picture(panels, "validation loss, nats a token", EXPERIMENT.kept / f"{study.id}.svg")


def swept() -> None:
    rows = []
    for name, rates, model in SWEEPS:
        options = System(name, model).options(SWEPT_STEPS)
        out = EXPERIMENT.trained / directory_of(
            f"sweep-{name}", *(f"{field}={value}" for field, value in model.items())
        )
        for cell in sweep(name, learning_rate=rates, seeds=[1], out=out, options=options).as_dict()["cells"]:
            settings = settings_of(cell["settings"], model)
            rows.append({"name": name, "settings": settings, "steps": SWEPT_STEPS, "tuning_loss": cell["loss"]})
    write_csv(SWEPT, list(rows[0]), rows)


def timed() -> None:
    rows = []
    for way, (compiled, settings) in WAYS.items():
        models, blocks = {}, None
        for system in SYSTEMS:
            if system != DENSE and not any(runs_of(system, steps) for steps in LENGTHS):
                continue
            options = replace(system.options(SHORT), model=dict(system.model) | settings)
            run, arguments, placement = merge(system.name, 2, None, options)
            with tempfile.TemporaryDirectory() as out:
                trainer, prepared = build(run, TrainingArguments(out, **arguments), placement)
            models[system.label], blocks = trainer.causal_lm, prepared.train
        sizes = {"rows": SIZES["Micro"].batch, "group": 64, "rounds": ROUNDS, "steps": TIMED}
        times = step_times(models, blocks, bf16=True, compiled=compiled, **sizes)
        rows += [{"way": way} | row for row in times]
    write_csv(TIMES, list(rows[0]), rows)


def sweeps_table() -> str:
    rows = [["model", "settings", "loss"]]
    for row in read_csv(SWEPT):
        rows.append([row["name"], f"`{row['settings']}`", f"{float(row['tuning_loss']):.4f}"])
    return markdown(rows, left=2)


def times_table() -> str:
    cells: dict[str, list[str]] = {}
    for row in read_csv(TIMES):
        share, low, high = (float(row[key]) for key in ("share_of_dense", "share_low", "share_high"))
        times = [f"{float(row['milliseconds']):.0f}", f"{share:.2f} ({low:.2f} to {high:.2f})"]
        cells.setdefault(row["system"], []).extend(times)
    head = ["", *(title for way in WAYS for title in (f"{way}, ms a step", "of dense"))]
    return markdown([head, *([system, *its] for system, its in cells.items())])


def main() -> None:
    given = asked(
        __doc__,
        sweep="try rates and temperatures, and stop",
        time="time steps, and stop",
        table="print what was swept and timed, and stop",
    )
    if given.sweep:
        swept()
    elif given.time:
        timed()
    if SWEPT.is_file():
        print(sweeps_table(), end="\n\n")
    if TIMES.is_file():
        print(times_table())


if __name__ == "__main__":
    main()
