"""The command `mot upcycle`."""

from pathlib import Path
from typing import TYPE_CHECKING

from mixture_of_tokens.commands.calling import calls

if TYPE_CHECKING:
    from mixture_of_tokens.conversion.upcycle import UpcycledModel


@calls("conversion.upcycle")
def upcycle(
    source: str | Path,
    name: str,
    *,
    out: Path,
    data: list[str | Path] | None = None,
    field: str = "text",
    seed: int = 0,
) -> "UpcycledModel":
    """Make a trained dense model a sparse one that computes the same, to be trained on with mot train --from.

    For example: mot upcycle runs/dense TC-Nano/32E/8 --out runs/start

    The experts are slices of the dense feed-forwards, in as many copies as the group size; a token goes to all slices
    of one copy (arXiv 2410.07524). Of a dense model of L blocks the later L / 2 become sparse, as the name's would be.
    Routers begin with clusters of what the layers read on text. What is written has the source's loss, or nothing is
    written.

    Args:
        source: A dense model: a run of this library, or a Qwen3 or Llama of transformers, as a directory or a name on
            the Hub.
        name: The new model: TC (softmax gates) or STC (sigmoid gates), with the size of the source or without one:
            TC-Nano/32E/8 or TC/32E/8, which is 32 copies in 8 slices. Transformer keeps the model dense: as a model of
            this library, to go on with.
        out: The directory to write.
        data: Text that routers are made by and both losses are measured on: such as the model is to be trained on. By
            default the source's own, of a model from elsewhere some Python.
        field: The field of --data's rows that holds the text.
        seed: Of the clusters.

    Returns what was written. Raises ValueError for a source that is not dense or of another architecture, and for a
    name that does not fit it.
    """
    ...
