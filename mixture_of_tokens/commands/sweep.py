"""The command `mot sweep`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from mixture_of_tokens.commands.calling import calls
from mixture_of_tokens.commands.numbers import Rates, Seeds
from mixture_of_tokens.settings.names import parse_name
from mixture_of_tokens.settings.options import DEFAULTS, Options

if TYPE_CHECKING:
    from mixture_of_tokens.training.sweep import Plans, Sweep


@calls("training.sweep")
def sweep(
    name: str | None = None,
    *,
    learning_rate: Rates | None = None,
    seeds: Seeds | None = None,
    start: Annotated[Path | None, Parameter(name="--from")] = None,
    out: Path | None = None,
    options: Annotated[Options, Parameter(name="*")] = DEFAULTS,
    dry_run: bool = False,
) -> "Sweep | Plans | None":
    """Train one model with every combination of settings, and print the best.

    A setting is a list with commas: --learning-rate, --seeds, and any field of --model and --training. Losses are on
    the tuning split. Called again, it skips what is finished and goes on with the rest.

    Args:
        name: A model, such as MoT-Nano/32E/4. With --from it is known.
        learning_rate: Peak learning rates, as in 3e-3,1e-2,3e-2; by default the model's own.
        seeds: Seeds, as in 0,1,2; by default 0, with --from that of the run it comes from.
        start: Begin each run with trained weights, as mot train --from does.
        out: Directory of the run directories and of sweep.json; by default runs/sweep-NAME, with --from
            runs/sweep-NAME-from-SOURCE.
        dry_run: Print the runs and stop, before text or a tokenizer is looked at.

    Returns what sweep.json holds; with `dry_run` the runs that it would train; None in all processes of torchrun but
    the first. They train every run together.

    Raises ValueError for invalid settings of any run, before the first one starts.
    """
    if name is not None:
        parse_name(name)  # before anything large is imported
