"""The command `mot report`."""

from pathlib import Path
from typing import TYPE_CHECKING

from mixture_of_tokens.commands.calling import calls

if TYPE_CHECKING:
    from mixture_of_tokens.reports.report import Report


@calls("reports.report")
def report(*runs: Path, out: Path | None = None) -> "Report":
    """Print the runs' losses side by side, the first one as the baseline, and write a page about them.

    Runs of one model with several seeds are one line of means; spread is the largest loss less the least. "Reached"
    is the step, and the seconds, at which the evaluation loss falls to the baseline's last one, on a straight line
    between two evaluations. Evaluations during training are over one fixed part of the text, the losses in the table
    over all of it. Runs that began with one trained model (mot train --from) are counted from there; its own run beside
    them is the curve before. A mixture's losses alone, by as many experts as the granularity and by all, stand beside
    that in groups, over a part of the text. Seconds are of training, FLOPs a token of the forward pass. A run of mot
    transition may stand beside its source, though it has more steps.

    Args:
        runs: Run directories of mot train, the directory of mot compare or of mot sweep, or another folder of runs.
        out: The page; by default report.html, in a run or comparison that is given alone, or else beside the runs.

    Raises ValueError for runs that are not finished, damaged, or cannot be compared.
    """
    ...
