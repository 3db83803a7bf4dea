"""The command `mot evaluate`."""

from pathlib import Path
from typing import TYPE_CHECKING

from mixture_of_tokens.commands.calling import calls
from mixture_of_tokens.settings.choices import Device, Dtype

if TYPE_CHECKING:
    from mixture_of_tokens.evaluation.evaluate import Evaluation


@calls("evaluation.evaluate")
def evaluate(
    run: str | Path,
    *,
    data: list[str | Path] | None = None,
    field: str = "text",
    context: int | None = None,
    regroupings: int = 3,
    sweep_tokens: int = 1_000_000,
    max_tokens: int | None = None,
    experts: int | None = None,
    separate_documents: bool | None = None,
    device: Device | None = None,
    dtype: Dtype | None = None,
    shard: int | None = None,
    expert_parallel: int | None = None,
) -> "Evaluation":
    """Print the loss of a model over a whole text, each token counted once: in full groups, in smaller ones, alone.

    In a group of n < G rows each expert's typical companions, averages measured after training, replace the missing
    rows. Alone is each row by itself, as `mot generate --alone` serves it: by all experts, by as many as the
    granularity, and by twice that. Times are medians of a forward pass over one group, alone over one row; tokens/s are
    from them.

    Args:
        run: A run directory, a checkpoint, nano (a small model that comes with the library), or the name of a causal
            language model on the Hub.
        data: Files, folders, globs or hf:NAME[:CONFIG][@REVISION] (its split train), of which all text is used; may
            be repeated. By default the validation text of the run.
        field: The field of --data's rows that holds the text.
        context: Tokens in a block; by default the model's, at most 1,024.
        regroupings: Ways to form full groups; the loss is their mean, the spread largest - least.
        sweep_tokens: Smaller groups are made from the first full groups, which hold at most this many tokens, but from
            one at least.
        max_tokens: Score groups that hold at most this many tokens, but one at least, spread over the text and grouped
            in one way; by default all.
        experts: Alone, these many experts a token in place of the granularity and twice as many.
        separate_documents: Documents of a row do not see each other; by default as in the training of the run, and off
            for a model without its run directory, such as an export.
        device: cpu or cuda; by default cuda where there is one.
        dtype: float32 or bfloat16, in which all is computed; by default that of the saved weights.
        shard: Processes of torchrun that hold a part of every weight each, of a model that is too large for one.
        expert_parallel: Of these processes, so many divide the experts.

    Raises ValueError for bad options, a run without a model, and an unknown text.
    """
    ...
