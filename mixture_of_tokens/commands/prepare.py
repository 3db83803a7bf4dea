"""The command `mot prepare`."""

from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from mixture_of_tokens.commands.calling import calls
from mixture_of_tokens.settings.names import parse_name
from mixture_of_tokens.settings.options import DEFAULTS, Options

if TYPE_CHECKING:
    from mixture_of_tokens.training.prepare import PreparedText


@calls("training.prepare")
def prepare(name: str, *, options: Annotated[Options, Parameter(name="*")] = DEFAULTS) -> "PreparedText | None":
    """Prepare the text that mot train with the same flags would train on.

    With --part-bytes each process of torchrun makes other parts. Stopped, the same command goes on.

    Args:
        name: The model; its context and groups decide how text is cut.

    Returns what there is then; None in all processes of torchrun but the first.

    Raises ValueError for bad settings or text.
    """
    parse_name(name)  # before anything large is imported
    options.check_single()
