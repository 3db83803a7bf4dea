"""Nanos: what the studies of single choices share, 1,200 steps of the standard library's source, two seeds."""

from collections.abc import Callable, Mapping, Sequence

from studies import Row, System, runs_of

from mixture_of_tokens.formatting import Summary, loss, markdown, with_span
from mixture_of_tokens.runs.run import Run

STEPS, SEEDS = 1200, (2, 3)
BASE = System("MoT-Nano/32E/8")


def row(system: System) -> Row:
    return Row(system, STEPS, SEEDS)


def losses_of(system: System) -> dict[int, float]:
    """Final losses over the validation text, by seed."""
    return {seed: run.facts.final_loss for seed, run in runs_of(system, STEPS).items() if seed in SEEDS}


def against(system: System, base: System) -> Summary | None:
    """How much higher the loss is than of another system, seed by seed."""
    its, own = losses_of(base), losses_of(system)
    return Summary.of(own[seed] - its[seed] for seed in own if seed in its)


def last_measured(system: System, field: str) -> list[float]:
    """A field of the last telemetry, layer by layer, of the first seed whose telemetry is kept."""
    for run in runs_of(system, STEPS).values():
        layers = next((row.layers for row in reversed(run.rows) if row.layers), None)
        if layers is not None:
            return [layer[field] for layer in layers.values() if field in layer]
    return []


def run_named(system: System) -> Run | None:
    """Any of its runs."""
    return next(iter(runs_of(system, STEPS).values()), None)


def table_of(rows: Sequence[Row], columns: Mapping[str, Callable[[System], str]]) -> str:
    """Losses, and their distance to the first system's, of the systems of which a run is kept."""
    base, lines = rows[0].system, [["", "seeds", "loss", f"over {rows[0].system.label}", *columns]]
    for system, _, _ in rows:
        found, above = Summary.of(losses_of(system).values()), against(system, base)
        if found is not None:
            over = "" if above is None or system == base else with_span(above, signed)
            lines.append(
                [system.label, str(found.seeds), with_span(found, loss), over, *(of(system) for of in columns.values())]
            )
    return markdown(lines)


def signed(value: float) -> str:
    return f"{value:+.3f}"
