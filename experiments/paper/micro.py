"""Micros: the systems of figures 5 to 7, their rates, the time of a step, and when each reaches the dense loss.

    python experiments/paper/micro.py --sweep    # rates, temperatures, on the tuning split; of 26 runs of 20 min
    python experiments/paper/micro.py --time     # a step of every system with a run, in turns; 8 min of an idle machine
    python experiments/paper/micro.py --table    # both as Markdown

A Micro is 128 wide, with four blocks, of which the later two are sparse, 64 rows of 128 tokens a step, and a
vocabulary of 1,024.

Runs may share the machine, so their own clocks are not used. The time of a run is its number of steps times the time of
one step, which `--time` measures on an idle machine, as a share of a dense step in the same round.
"""

import re
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import replace
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple

import numpy as np
from studies import EXPERIMENT, FIRST_SEEDS, Row, Study, System, run_of
from transformers import TrainingArguments

from mixture_of_tokens.planning.cost import training_flops
from mixture_of_tokens.reports.comparison import reached
from mixture_of_tokens.settings.names import SIZES
from mixture_of_tokens.training.merging import merge
from mixture_of_tokens.training.train import build
from mixture_of_tokens.utils.formatting import Summary, loss, markdown, ratio, with_span

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import Sweep, machine_of, read_csv, script, step_times, swept, write_csv
from pictures import Curve, curve_of, save_picture

TOKENS = SIZES["Micro"].batch * SIZES["Micro"].context  # of a step
SHORT = 1500  # steps of the figures that compare many systems, and of sweeps: 12.3 M tokens; fewer mislead (../LOG.md)
LENGTHS = (SHORT, 2 * SHORT, 4 * SHORT, 8 * SHORT)  # of figure 7
SEEDS = (2, 3, 4)  # of systems that have three
ROUNDS, TIMED = 7, 6  # of a timing, and steps of each system in a round
# How a step is carried out, by its name: whether compiled, and settings of the model.
WAYS = {
    "compiled": (True, {}),
    "not compiled": (False, {}),
    "torch's attention": (False, {"attn_implementation": "sdpa"}),
}


# Token Choice's router is sharper than its default, which at Nano was 0.020 better (../routings/sweeps.csv).
SHARP = {"router_temperature": "0.25"}
DENSE = System("Transformer-Micro")
MIXTURES = {k: System(f"MoT-Micro/32E/{k}".removesuffix("/1")) for k in (1, 4, 8)}
BEST_MIXTURE = MIXTURES[8]
TOKEN_CHOICE = System("TC-Micro/32E", SHARP)
THE_PAPERS = (TOKEN_CHOICE, System("TC-Micro/32E/8", SHARP), System("EC-Micro/32E"))
DROPLESS = System("TC-Micro/32E/8", {"capacity_factor": "null"})
# What a temperature is worth, with a capacity and without.
OTHER_TOKEN_CHOICES = (System("TC-Micro/32E"), System("TC-Micro/32E/8", DROPLESS.model | SHARP))
YOUNGER = (System("STC-Micro/32E/8"), System("ET-Micro/32E"), System("ReMoE-Micro/32E"))
SYSTEMS = (DENSE, *MIXTURES.values(), *THE_PAPERS, DROPLESS, *YOUNGER)

# Peak rates and temperatures, tried with seed 1.
SWEEPS: tuple[Sweep, ...] = (
    ("Transformer-Micro", [4e-3, 8e-3, 1.6e-2], {}),
    ("MoT-Micro/32E/8", [4e-3, 8e-3, 1.6e-2], {}),
    ("MoT-Micro/32E/8", [8e-3], {"router_temperature": "0.125,0.5"}),
    ("TC-Micro/32E", [4e-3, 8e-3], SHARP),
    ("TC-Micro/32E", [8e-3], {"router_temperature": "1"}),
    ("TC-Micro/32E/8", [4e-3, 8e-3], DROPLESS.model),
    ("STC-Micro/32E/8", [4e-3, 8e-3], {}),
    ("EC-Micro/32E", [4e-3, 8e-3], {}),
    ("ET-Micro/32E", [4e-3, 8e-3], {}),
    ("ReMoE-Micro/32E", [4e-3, 8e-3], {}),
    # The greater of two rates was the best of these, so a third.
    ("TC-Micro/32E", [1.6e-2], SHARP),
    ("TC-Micro/32E/8", [1.6e-2], DROPLESS.model),
    ("STC-Micro/32E/8", [1.6e-2], {}),
    ("EC-Micro/32E", [1.6e-2], {}),
    ("ReMoE-Micro/32E", [1.6e-2], {}),
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


def result_of(row: Row) -> Result | None:
    """Over the row's seeds of which both a run and the dense model's are kept; None without any.

    Where a seed never reaches the dense loss, the shares of steps, FLOPs and time are None.
    """
    share, denses = share_of_step(row.system), Row(DENSE, row.steps, row.seeds).runs
    runs = {seed: run for seed, run in row.runs.items() if seed in denses}
    over = Summary.of(run.facts.final_loss for run in runs.values())
    if over is None:
        return None
    then = []
    for run in runs.values():
        if share is None:
            break
        x, y = zip(*((point.step * share, point.loss) for point in run.curve), strict=True)
        then.append(float(np.interp(row.steps, x, y)))
    at = [found for seed, run in runs.items() if (found := reached(run, denses[seed])) is not None]
    if len(at) < len(runs):
        return Result(over, Summary.of(then), None, None, None)
    in_time = None if share is None else Summary.of(each.of_steps * share for each in at)
    in_steps, in_flops = Summary.of(each.of_steps for each in at), Summary.of(each.of_flops for each in at)
    return Result(over, Summary.of(then), in_steps, in_flops, in_time)


def share_of_step(system: System) -> float | None:
    """The time of a step over the dense model's, both compiled; None if it was not taken.

    A temperature is taken to cost no time.
    """
    rows = [row for row in read_csv(TIMES) if row["way"] == "compiled"]
    label = _without_temperature(system.label)
    return next((float(row["share_of_dense"]) for row in rows if _without_temperature(row["system"]) == label), None)


def _without_temperature(label: str) -> str:
    return re.sub(r", router_temperature [^,]+", "", label)


def table_of(rows: Iterable[Row], *, lengths: bool = True) -> str:
    """Those of which a run is kept; `lengths`: with how long each was trained."""
    columns = ["seeds", "loss", "at equal time", "steps", "FLOPs", f"time ({machine_of(TIMES)})", "step time, of dense"]
    lines = [["", *(["M tokens"] if lengths else []), *columns]]
    for row in rows:
        found, share = result_of(row), share_of_step(row.system)
        if found is None:
            continue
        shares = [with_span(each) if each else "never" for each in (found.steps, found.flops)]
        time = with_span(found.time) if found.time else "" if share is None and found.steps else "never"
        cells = [row.system.label, *([f"{row.steps * TOKENS / 1e6:.1f}"] if lengths else [])]
        cells += [str(found.loss.seeds), with_span(found.loss, loss)]
        cells.append("" if found.equal_time is None else with_span(found.equal_time, loss))
        lines.append([*cells, *shares, time, "" if share is None else ratio(share)])
    return markdown(lines)


def draw_curves(study: Study, drawn: int = SHORT, since: float = 1 / 6) -> None:
    """Evaluations of runs of so many steps, since this share of them. Dotted: the dense model's last."""
    in_tokens: list[Curve] = []
    in_time: list[Curve] = []
    for row in study.rows:
        if row.steps != drawn or not row.runs:
            continue
        curve = curve_of(row.system.label, row.runs.values(), since * drawn, attrgetter("step"))
        in_tokens.append(curve._replace(x=curve.x * TOKENS / 1e6))
        if (share := share_of_step(row.system)) is not None:
            in_time.append(curve._replace(x=curve.x * share))
    level = next((curve.losses[:, -1].mean() for curve in in_tokens if curve.label == DENSE.label), None)
    panels = {"M tokens": in_tokens, "time, as a number of dense steps": in_time}
    save_picture(panels, "validation loss, nats a token", EXPERIMENT.kept / f"{study.id}.svg", level)


def timed() -> None:
    """Compiled steps of every system with a run; those of figure 7 in all ways.

    Not of ReMoE, of which nearly all experts answer before it is trained.
    """
    rows = []
    for way, (compiled, settings) in WAYS.items():
        models, blocks = {}, None
        for system in SYSTEMS if compiled else (DENSE, BEST_MIXTURE, TOKEN_CHOICE):
            if system != DENSE and not any(run_of(system, steps, FIRST_SEEDS["Micro"]) for steps in LENGTHS):
                continue
            if system.name.startswith("ReMoE-"):
                continue
            options = replace(system.options(SHORT), model=dict(system.model) | settings)
            run, arguments, placement, _ = merge(system.name, 2, None, options)
            with tempfile.TemporaryDirectory() as out:
                trainer, prepared = build(run, TrainingArguments(out, **arguments), placement)
            models[system.label], blocks = trainer.causal_lm, prepared.train
        assert blocks is not None
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
    head = ["", "FLOPs, of dense", *(title for way in WAYS for title in (f"{way}, ms a step", "of dense"))]
    width = 2 * len(WAYS)  # compiled alone are those that are not figure 7's
    lines = [
        [system, ratio(_flops_of_dense(system)), *its, *[""] * (width - len(its))] for system, its in cells.items()
    ]
    return markdown([head, *lines])


def _flops_of_dense(label: str) -> float:
    """Of a step."""
    (system,) = (each for each in SYSTEMS if each.label == label)
    flops = []
    for each in (system, DENSE):
        plain = replace(each.options(SHORT), training={})  # compiled or not
        config = merge(each.name, 2, None, plain).config
        flops.append(training_flops(config.model_config, config.batch_size))
    its, dense = flops
    return its / dense


def sweep() -> None:
    swept(SWEPT, SWEEPS, DENSE.options(SHORT), EXPERIMENT.trained, steps=SHORT)


if __name__ == "__main__":
    script(
        __doc__,
        lambda: None,
        lambda: f"{sweeps_table()}\n\n{times_table()}",
        sweep=("try rates and temperatures", sweep),
        time=("time steps on an idle machine", timed),
    )
