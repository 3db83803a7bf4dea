"""Nanos: what the studies of single choices share, 1,200 steps of the standard library's source.

A Nano has no kink in its curve. A Micro has one, where it learns to copy from its context, and after 12 million tokens
its loss says most of all when that was (../LOG.md): with one seed, that hides what a single choice does.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from studies import EXPERIMENT, Row, Study, System, run_of

from mixture_of_tokens.runs.run import Run
from mixture_of_tokens.settings.names import parse_name
from mixture_of_tokens.utils.formatting import Summary, loss, markdown, ratio, with_span

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import signed
from pictures import curve_of, save_picture

STEPS, SEED = 1200, 1
DENSE, BASE = System("Transformer-Nano"), System("MoT-Nano/32E/8")


def row(system: System) -> Row:
    return Row(system, STEPS, (SEED,))


def losses_of(row: Row) -> dict[int, float]:
    """Final losses over the validation text, by seed."""
    return {seed: run.facts.final_loss for seed, run in row.runs.items()}


def against(row: Row, base: Row) -> Summary | None:
    """How much higher the loss is than another row's, seed by seed."""
    its, own = base.runs, {seed: run for seed, run in row.runs.items() if seed in base.runs}
    for seed, run in own.items():
        run.check_same_text(its[seed])
    return Summary.of(run.facts.final_loss - its[seed].facts.final_loss for seed, run in own.items())


def last_measured(system: System, field: str) -> list[float]:
    """A field of the last telemetry, layer by layer."""
    run = run_of(system, STEPS, SEED)
    layers = next((row.layers for row in reversed(run.rows) if row.layers), None) if run is not None else None
    return [layer[field] for layer in (layers or {}).values() if field in layer]


def table_of(rows: Sequence[Row], columns: Mapping[str, Callable[[System], str]] | None = None) -> str:
    """Of the rows of which a run is kept: losses and FLOPs, and how far above the first row of their size and text."""
    lines, bases = [["", "M tokens", "seeds", "loss", "over the first row", "FLOPs", *(columns or {})]], {}
    for row in rows:
        found, system = Summary.of(losses_of(row).values()), row.system
        if found is None:
            continue
        base = bases.setdefault((parse_name(system.name).size, run_in(row).facts.text), row)
        above = None if row is base else against(row, base)
        cells = [system.label, f"{run_in(row).facts.tokens / 1e6:.1f}", str(found.seeds), with_span(found, loss)]
        cells += ["" if above is None else with_span(above, signed), ratio(flops_of(row) / flops_of(base))]
        lines.append([*cells, *(of(system) for of in (columns or {}).values())])
    return markdown(lines)


def flops_of(row: Row) -> int:
    """Of a token in a forward pass."""
    return run_in(row).facts.forward_flops_per_token


def run_in(row: Row) -> Run:
    """Any of its runs."""
    return next(iter(row.runs.values()))


def draw_curves(study: Study) -> None:
    """The evaluations of the Nanos of the first one's text during training, without the first sixth."""
    curves, nanos = [], [row for row in study.rows if parse_name(row.system.name).size == "Nano" and row.runs]
    for row in nanos:
        if run_in(row).facts.text == run_in(nanos[0]).facts.text:
            runs = row.runs.values()
            curves.append(curve_of(row.system.label, runs, row.steps / 6, lambda point: point.tokens / 1e6))
    save_picture({"M tokens": curves}, "validation loss, nats a token", EXPERIMENT.kept / f"{study.id}.svg")
