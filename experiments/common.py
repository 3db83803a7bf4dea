"""What the scripts of the folders here share.

Runs are trained into runs/experiments/NAME, which git ignores, and kept in experiments/NAME without their weights, a
file a run (`mixture_of_tokens.runs.run.pack`): evaluations of all seeds, and of the first one the telemetry too.
"""

import argparse
import csv
import io
import itertools
import math
import os
import random
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import torch

from mixture_of_tokens import compare, sweep, train
from mixture_of_tokens.data.blocks import Blocks
from mixture_of_tokens.data.groups import grouped_order
from mixture_of_tokens.evaluation.losses import evaluate_blocks
from mixture_of_tokens.models.modeling import MixtureOfTokensForCausalLM
from mixture_of_tokens.reports import comparison
from mixture_of_tokens.reports.comparison import ComparedModel, Comparison, by_model, runs_of
from mixture_of_tokens.reports.findings import seeds_of
from mixture_of_tokens.runs import provenance
from mixture_of_tokens.runs.loading import load_model, text_of
from mixture_of_tokens.runs.locking import owned_file
from mixture_of_tokens.runs.records import MetricsRow, RunConfig
from mixture_of_tokens.runs.run import Run, pack, read_run
from mixture_of_tokens.settings.options import Options
from mixture_of_tokens.utils.cpu import keep_large_blocks
from mixture_of_tokens.utils.files import write_text
from mixture_of_tokens.utils.formatting import Summary, loss, markdown, with_span

HERE = Path(__file__).resolve().parent
RUNS = HERE.parent / "runs"
COMPARISONS = ("nano", "prose", "long")
NANO = Options(steps=1200, device="cpu")  # of the runs of nano, which several folders go on with, and of prose
MEASURED = 60  # rows of telemetry that are kept of a run, beside its evaluations

Row = Mapping[str, Any]  # of a csv


class Experiment(NamedTuple):
    """kept: its folder here; trained: where its run directories are."""

    kept: Path
    trained: Path

    @classmethod
    def named(cls, name: str) -> Self:
        """As seen from the current directory, since commands that runs record have these paths."""
        return cls(Path(os.path.relpath(HERE / name)), Path(os.path.relpath(RUNS / "experiments" / name)))


def script(
    doc: str | None, make: Callable[[], object], table: Callable[[], str], **others: tuple[str, Callable[[], object]]
) -> None:
    """Make what is missing, and print the table; with --table print it alone.

    Args:
        others: by their names, flags that make something else, as their help says.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, (meaning, _) in others.items():
        parser.add_argument(f"--{name}", action="store_true", help=f"{meaning}, and print the table")
    parser.add_argument("--table", action="store_true", help="print the table, and stop")
    given = parser.parse_args()
    if not given.table:
        keep_large_blocks()
        next((other for name, (_, other) in others.items() if getattr(given, name)), make)()
    print(table())


def directory_of(name: str, *parts: object) -> str:
    """A mapping's fields stand with their values, and what is empty is left out."""
    words = [name.replace("/", "-")]
    for part in parts:
        words += [f"{field}={value}" for field, value in part.items()] if isinstance(part, Mapping) else [str(part)]
    return "-".join(filter(None, words))


def trained(experiment: Experiment, name: str, seed: int, options: Options) -> Path:
    """The run directory that `compare` would make."""
    out = experiment.trained / directory_of(name, f"seed{seed}")
    train(name, out=out, seed=seed, options=options, resume=True)
    return out


def compared(
    experiment: Experiment, names: Sequence[str], seeds: list[int], options: Options, without: Sequence[str] = ()
) -> None:
    """Train what is missing of a comparison, and keep its runs and its compare.json.

    Args:
        without: as `keep` takes it.
    """
    made = compare(*names, seeds=seeds, out=experiment.trained, options=options)
    runs, command = runs_of([experiment.trained])
    for prefix in without:
        command = command and command.replace(prefix, "")
    comparison.write(comparison.comparison(by_model(keep(runs, experiment.kept, without)), command), experiment.kept)
    print(made, file=sys.stderr)


def keep(runs: Sequence[Run], kept: Path, without: Sequence[str] = (), *, first_seed: int | None = None) -> list[Run]:
    """Write a file of each run, and read it again.

    Args:
        without: Beginnings of paths on this machine, which are cut off wherever they stand.
        first_seed: whose telemetry is kept; by default the least of these runs.
    """
    kept.mkdir(parents=True, exist_ok=True)
    first, again = min(run.seed for run in runs) if first_seed is None else first_seed, []
    for run in runs:
        file = kept / f"{run.directory.name}.json"
        if file.is_file() and read_run(file).facts.text != run.facts.text:
            print(f"{file} was of another text: its losses are not comparable with the new ones", file=sys.stderr)
        with tempfile.TemporaryDirectory() as folder:
            pack(thinned(run), packed := Path(folder) / file.name, telemetry=run.seed == first)
            text = packed.read_text()
        for prefix in (*without, f"{RUNS}/", f"{RUNS.resolve()}/"):
            text = text.replace(prefix, "")
        write_text(file, text)
        again.append(read_run(file))
    return again


def check_text(config: RunConfig, files: Iterable[Path]) -> None:
    """Raises SystemExit where a run would see another text, or tokens, than those of these kept ones.

    Text of this machine comes with Python and its packages, which differ; what is trained on it would compare with
    nothing here.
    """
    texts = {read_run(file).facts.text: file for file in files}
    if not texts:
        return
    here = config.prepare().facts
    for there, file in texts.items():
        if (here["hash"], here["tokenizer"]) != there:
            others = f"the runs beside {file}"
            sys.exit(f"the text of {others} ({there[0]}) is not that of this machine ({here['hash']}): move them away")


def thinned(run: Run) -> Run:
    """All evaluations, and up to MEASURED of the rows with telemetry: in even steps to the last, and after a switch.

    A row's `train_loss` still is the mean since the row that stood before it.
    """
    measured = [row for row in run.rows if row.layers is not None]
    kept = {row.step for row in measured[:: -max(1, math.ceil(len(measured) / MEASURED))]}
    kept |= {row.step for row in after_switch(run, measured)[:1]}
    return replace(run, rows=[row for row in run.rows if row.step in kept or row.eval_loss is not None])


def after_switch(run: Run, rows: Sequence[MetricsRow]) -> list[MetricsRow]:
    return [] if run.switch is None else [row for row in rows if row.step > run.switch.step]


def spread(values: Iterable[str | float], shown: Callable[[float], str] = loss) -> str:
    """The mean and, of several, the least and the greatest; nothing of none."""
    summary = Summary.of(map(float, values))
    return "" if summary is None else with_span(summary, shown)


def signed(value: float) -> str:
    return f"{value:+.3f}"


Sweep = tuple[str, list[float], dict[str, str]]  # a name, peak rates, and fields of the model with values to try


def swept(file: Path, sweeps: Iterable[Sweep], options: Options, out: Path, **own: object) -> None:
    """Sweep, with seed 1 on the tuning split, what a sweeps.csv does not have, and add it there.

    Args:
        out: where the runs are.
        own: more cells of each new row.
    """
    for name, rates, model in sweeps:
        if is_swept(read_csv(file), name, rates, model):
            continue
        there = out / directory_of(f"sweep-{name}", model)
        cells = sweep(name, learning_rate=rates, seeds=[1], out=there, options=replace(options, model=model))
        made = [(settings_of(cell["settings"], model), cell["loss"]) for cell in cells.as_dict()["cells"]]
        new = (
            {"name": name, **own, "settings": settings, "tuning_loss": math.inf if found is None else found}
            for settings, found in made  # of a rate at which training diverged there is none
        )
        add_rows(file, new, ("name", "settings"))


def is_swept(rows: Iterable[Mapping[str, str]], name: str, rates: Iterable[float], model: Mapping[str, str]) -> bool:
    """Whether rows of a sweeps.csv have every cell of a sweep: each rate with each of a field's values."""
    known = {row["settings"] for row in rows if row["name"] == name}
    cells = itertools.product(rates, *(values.split(",") for values in model.values()))
    wanted = [{f"--learning-rate {rate:g}", *map("--model.{} {}".format, model, values)} for rate, *values in cells]
    return all(any(set(re.findall(r"--\S+ \S+", settings)) == cell for settings in known) for cell in wanted)


def settings_of(cell: Mapping[str, str], model: Mapping[str, str]) -> str:
    """The flags of a cell of a sweep, with those of the model's fields that were not swept."""
    fixed = {f"--model.{field}": value for field, value in model.items() if "," not in value}
    return " ".join(f"{flag} {value}" for flag, value in (cell | fixed).items())


def steps_of_early_switch(budget: float, share: float, *, before: float, after: float, fit: float) -> tuple[int, int]:
    """Steps in groups, in a share of a budget, and those after the switch, in what the fit leaves of it.

    All in steps of the dense model: what a step takes before and after the switch, and the fit.
    """
    steps = int(share * budget / before)
    return steps, int((budget - steps * before - fit) / after)


def loss_alone(run: Path, split: str) -> float:
    """Of each row of "tuning" or "validation" by itself, by as many of its experts as the granularity says."""
    model, blocks = load_model(str(run)), getattr(text_of(str(run)), split)
    size = model.config.group_size
    model.serve_alone(num_experts_alone=model.config.num_experts_per_tok)
    return evaluate_blocks(model, blocks, group_size=size, batch_size=size, progress="Evaluating alone")["loss"]


def step_times(
    models: Mapping[str, MixtureOfTokensForCausalLM],
    blocks: Blocks,
    *,
    rows: int,
    group: int,
    rounds: int,
    steps: int,
    turns: int = 1,
    bf16: bool = False,
    compiled: bool = False,
) -> list[dict[str, object]]:
    """Forward, backward and a fused AdamW of every model in turns, in an order that is shuffled every round.

    Shares are of the first model's time in the same round; their median, least and greatest are given, with the commit
    and the machine that they are of.

    Args:
        rows, group: rows of a step, and of a group in it.
        steps, turns: of a model in a turn, and of it in a round. Many short turns fare alike on a machine whose speed
            changes from second to second.
    """
    keep_large_blocks()
    batches = [blocks.batch(part) for part in np.split(grouped_order(blocks, group, seed=0).ravel()[: 8 * rows], 8)]
    made = {label: _step_of(model, batches, bf16, compiled) for label, model in models.items()}
    seconds: dict[str, list[float]] = {label: [] for label in made}
    # The first two are warm-ups: once a model was not compiled in one piece, torch compiles all the others again.
    for number in range(-1, 1 + rounds):
        spent = dict.fromkeys(made, 0.0)
        for label in (label for _ in range(turns) for label in random.sample(list(made), len(made))):
            start = time.perf_counter()
            # By default the ninth model of a class is silently not compiled.
            with torch._dynamo.config.patch(recompile_limit=64, fail_on_recompile_limit_hit=True):
                for _ in range(steps):
                    made[label]()
            spent[label] += time.perf_counter() - start
        if number > 0:
            for label, own in spent.items():
                seconds[label].append(own / (turns * steps))
        print(f"round {max(0, number)} of {rounds} timed", file=sys.stderr)
    first, times = next(iter(seconds)), []
    where = {"commit": provenance.commit(), "torch": torch.__version__, **provenance.hardware("cpu")}
    for label, own in seconds.items():
        shares = [mine / its for mine, its in zip(own, seconds[first], strict=True)]
        row = {"system": label, "milliseconds": 1e3 * statistics.median(own)}
        row |= {"share_of_dense": statistics.median(shares), "share_low": min(shares), "share_high": max(shares)}
        times.append(row | {"rounds": rounds} | where)
    return times


def _step_of(
    model: MixtureOfTokensForCausalLM, batches: Sequence[dict[str, torch.Tensor]], bf16: bool, compiled: bool
) -> Callable[[], None]:
    model.train()
    forward, turn = torch.compile(model) if compiled else model, itertools.cycle(batches)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = forward(**next(turn), use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        model.balance()

    return step


def write_csv(file: Path, columns: Sequence[str], rows: Iterable[Mapping[str, object]]) -> None:
    """In one step: a stopped script leaves the old rows or the new ones."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(file, text.getvalue())


def once(
    file: Path, key: Row, measured: Callable[..., Iterable[Row]], *given: object, settings: Row | None = None
) -> None:
    """Add to a csv what is measured of a key, the other columns of one row or several, unless it has a row of it.

    Args:
        settings: columns that decide what is measured. Raises SystemExit where a row of the key has others: it could
            not stand beside those that would be added.
    """
    settings = settings or {}
    wanted = {column: str(value) for column, value in key.items()}
    found = [row for row in read_csv(file) if wanted.items() <= row.items()]
    for row in found:
        if other := [column for column, value in settings.items() if row.get(column) != str(value)]:
            then, now = ({column: str(one.get(column)) for column in other} for one in (row, settings))
            sys.exit(
                f"{file}: {wanted} was measured with {then}, and would be with {now}: undo that, or remove the row"
            )
    if not found:
        add_rows(file, [{**key, **settings, **row} for row in measured(*given)], list(key))


def add_rows(file: Path, made: Iterable[Row], key: Sequence[str]) -> None:
    """Add to a csv what has a key that it lacks; another process may add some at the same time."""
    with owned_file(file):
        rows: list[Row] = list(read_csv(file))
        known = {tuple(str(row[column]) for column in key) for row in rows}
        rows += [row for row in made if tuple(str(row[column]) for column in key) not in known]
        write_csv(file, list(rows[0]), rows)


def read_csv(file: Path) -> list[dict[str, str]]:
    """No rows where the file is missing."""
    if not file.is_file():
        return []
    with file.open() as opened:
        return list(csv.DictReader(opened))


def machine_of(timings: Path) -> str:
    """The processors that a file of timings is of, as a table's head has them."""
    names = sorted({row["hardware"] for row in read_csv(timings)})
    return " and ".join(re.sub(r"\(R\)| Processor", "", name) for name in names)


def comparison_of(experiment: Experiment) -> Comparison:
    return comparison.comparison(by_model(runs_of([experiment.kept])[0]))


def reached_table(names: Iterable[str] = COMPARISONS) -> str:
    """How early models reach each other's final losses, in several comparisons.

    Rows are a comparison's losses and two targets, its first model and its last one; a cell the share of the target's
    steps after which a model is at the target's last loss.
    """
    comparisons = {name: comparison_of(Experiment.named(name)) for name in names}
    labels = list(dict.fromkeys(model.label for found in comparisons.values() for model in found.models))
    rows = [["", "", *labels]]
    for name, found in comparisons.items():
        models = {model.label: model for model in found.models}
        first, *_, last = models
        losses = [with_span(models[label].final_loss, loss) if label in models else "" for label in labels]
        rows.append([f"{name}, {found.steps:,} steps, {seeds_of(found)}", "loss", *losses])
        for target in (first, last):
            cells = [_reaching(models[label], target, found) if label in models else "" for label in labels]
            rows.append(["", f"reaches {target}'s in", *cells])
    return markdown(rows, left=2)


def _reaching(model: ComparedModel, target: str, found: Comparison) -> str:
    if model.label == target:
        return "1"
    steps = model.reached[target].of_steps
    if steps is None:
        return "never"
    some = f" on {steps.seeds} of {len(found.seeds)}" if steps.seeds < len(found.seeds) else ""
    return f"{with_span(steps)}{some}"
