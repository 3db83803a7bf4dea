"""Finished runs side by side: the command `mot report`, its table and its page."""

import shlex
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from textwrap import fill, indent
from typing import Any

from mixture_of_tokens.reports.comparison import COMPARISON, WAYS, Comparison, by_model, comparison, runs_of
from mixture_of_tokens.reports.findings import OF_WAYS, SERVED, differing, findings, way_of, why_no_time
from mixture_of_tokens.reports.origins import without_origins
from mixture_of_tokens.reports.page import page
from mixture_of_tokens.reports.reproduce import Places, commands_of
from mixture_of_tokens.reports.samples import continued
from mixture_of_tokens.runs.preconditions import check_writable
from mixture_of_tokens.runs.run import Run
from mixture_of_tokens.settings.choices import Device
from mixture_of_tokens.settings.routings import PROPERTIES
from mixture_of_tokens.utils.files import write_text
from mixture_of_tokens.utils.formatting import Result, aligned, duration, loss
from mixture_of_tokens.utils.process import check_one_process
from mixture_of_tokens.utils.rendering import START

PAGE = "report.html"
WIDTH = 110  # of sentences beside the table


@dataclass(frozen=True)
class Report(Result):
    """A comparison, samples by prompt and label, and the path of its page. JSON has the comparison alone."""

    comparison: Comparison
    samples: dict[str, dict[str, str]]
    page: str

    def as_dict(self) -> dict[str, Any]:
        return self.comparison.as_dict()

    def __str__(self) -> str:
        lines = [summary_of(self.comparison)]
        for prompt, written in list(self.samples.items())[:1]:
            for label, continuation in written.items():
                lines.append(f"{label} continues {prompt!r}:\n\n{indent(prompt + continuation, '    ')}\n")
        lines.append(f"The page: {self.page}")
        return "\n".join([*lines, *map(partial(fill, width=WIDTH), why_no_time(self.comparison))])


def report(*runs: Path, out: Path | None) -> Report:
    """As the function of `commands/report.py`, which explains its arguments."""
    check_one_process()
    found, command = runs_of(runs)
    compared, origins = without_origins(found)
    models = by_model(compared)
    places = Places()
    again = [command] if command else [line for run in found for line in commands_of(run, places)]
    here = ["mot", "report", *(map(str, runs) if command else (places.of(run.directory) for run in found))]
    commands = [*dict.fromkeys(again), shlex.join([*here, *([] if out is None else ["--out", str(out)])])]
    if out is None:
        place = runs[0] if len(runs) == 1 and runs[0].is_dir() else runs[0].parent
        out = place / PAGE
        if place not in runs and (place / COMPARISON).is_file():
            raise ValueError(f"{out} is the page of the comparison there: name another file with --out")
    check_writable(out.parent)
    check_no_other_file(out)
    return write_page(comparison(models, command, origins), models, commands, out)


def check_no_other_file(out: Path) -> None:
    """Raises ValueError for a directory, and for a file that is no page, such as one of a run."""
    if out.is_dir():
        raise ValueError(f"--out {out} is a directory: name a file, such as {out / PAGE}")
    if out.is_file():
        with out.open("rb") as file:
            if file.read(len(START)) != START.encode():
                raise ValueError(f"--out {out} is there already, and is no page of a report: name another file")


def write_page(
    result: Comparison, models: dict[str, list[Run]], commands: list[str], out: Path, device: Device | None = None
) -> Report:
    """Write the page of a comparison, with samples of each model's first seed.

    Args:
        models: The runs that `result` compares; commands: those that make it again; device: for the samples.
    """
    samples = continued({label: model[0].directory for label, model in models.items()}, device)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, page(result, models, samples, commands))
    return Report(result, samples, str(out))


def summary_of(result: Comparison) -> str:
    """The table, and the findings in sentences."""
    count, own_steps = len(result.seeds), not result.at_equal_steps
    beside = ["vs first", "reached at"] if len(result.models) > 1 else []
    columns = ["model", *["steps"] * own_steps, "loss", *["spread"] * (count > 1), *beside]
    columns += ["bits/byte", "parameters", "FLOPs/token", "seconds", "tokens/s"]
    table = []
    for model in result.models:
        reached = model.reached[result.baseline]
        when = "never"
        if reached.step is not None and reached.seconds is not None:
            some = f" ({reached.step.seeds} of {count})" if reached.step.seeds < count else ""
            when = f"step {reached.step.mean:.0f}, {duration(reached.seconds.mean)}{some}"
        row = [
            model.label,
            *[f"{model.steps:,}"] * own_steps,
            f"{model.final_loss.mean:.4f}",
            *[f"{model.final_loss.greatest - model.final_loss.least:.4f}"] * (count > 1),
            *([f"{model.final_loss_difference.mean:+.4f}", when] if beside else []),
            f"{model.bits_per_byte.mean:.4f}",
            f"{model.parameters['total']:,}",
            f"{model.flops_per_token['forward']:,.0f}",
            f"{model.seconds.mean:.0f}",
            f"{model.tokens_per_second.mean:,.0f}",
        ]
        table.append(row)
    kinds = [[model.label, *model.properties.values()] for model in result.models]
    split = result.evaluated_on
    paragraphs = [] if split == "validation" else [f"Losses are of the {split} text."]
    if result.scored_tokens is not None:
        paragraphs.append(f"Final losses are of {result.scored_tokens:,} tokens of {split} text, not of all.")
    paragraphs += [fill(" ".join(sentences), WIDTH) for sentences in findings(result).values()]
    if (origin := result.origin) is not None:
        what = (
            f"All began with {origin.label}, which had a loss of {loss(origin.final_loss.mean)} after {origin.steps:,}"
        )
        other = origin.scored_tokens != result.scored_tokens
        of_other = ", of other tokens than these losses" if other else ""
        paragraphs.append(f"{what} steps{of_other}; steps, seconds and FLOPs are counted from there.")
    apart = differing(result.environments)
    paragraphs += [] if apart is None else [apart]
    if any(model.switched for model in result.models):
        what = "Seconds of a switched model are with its source's, and without the fit at the switch"
        paragraphs.append(fill(f"{what} (switch.json has it); its tokens/s are those after the switch.", WIDTH))
    properties = aligned([["model", *PROPERTIES], *kinds])
    ways = [["loss, of a part of the text", *(OF_WAYS[way] for way in WAYS)]]
    ways += [[model.label, *(way_of(model, way, ".4f") or "" for way in WAYS)] for model in result.models]
    served = [aligned(ways), "", fill(SERVED, WIDTH), ""] if any(model.shows_ways for model in result.models) else []
    return "\n".join([aligned([columns, *table]), "", properties, "", *served, *paragraphs]) + "\n"
