"""The command `mot compare`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from mixture_of_tokens.commands.calling import calls
from mixture_of_tokens.commands.numbers import Rates, Seeds
from mixture_of_tokens.settings.names import parse_name
from mixture_of_tokens.settings.options import DEFAULTS, Options

if TYPE_CHECKING:
    from mixture_of_tokens.reports.report import Report
    from mixture_of_tokens.training.sweep import Plans


@calls("training.compare")
def compare(
    *names: str,
    seeds: Seeds = [0],  # noqa: B006, it is only read
    learning_rate: Rates | None = None,
    out: Path | None = None,
    options: Annotated[Options, Parameter(name="*")] = DEFAULTS,
    minutes: float | None = None,
    dry_run: bool = False,
) -> "Report | Plans | None":
    """Train several models on the same text in the same order, and say when each reaches the first one's loss.

    All models are trained with the first seed, then with the next, so that an interrupted comparison is balanced.
    Called again, it skips what is finished and goes on with the rest. It writes compare.json, report.html and the run
    directories; with other names or seeds compare.json and report.html are of those alone, and the other runs stay.
    `mot report --help` explains the table.

    Args:
        names: Models, such as Transformer-Nano MoT-Nano/32E/4; the first is the baseline. `mot train --help` says what
            there is.
        seeds: Seeds, as in 0,1,2.
        learning_rate: Peak learning rates: one for all models, or one for each in their order, as in 1e-2,2e-2; by
            default each model's own.
        out: Directory for all of it; by default runs/compare.
        minutes: In place of --steps: each model gets as many steps as fit beside evaluations and the scoring at the
            end, by a few that are timed first. Preparing text comes before.
        dry_run: Print the runs and stop, before text or a tokenizer is looked at.

    Returns the comparison with its page; with `dry_run` the runs that it would train; None in all processes of torchrun
    but the first. They train every run together.

    Raises ValueError for invalid settings of any run, before the first one starts.
    """
    for name in names:
        parse_name(name)  # before anything large is imported
    options.check_single()
