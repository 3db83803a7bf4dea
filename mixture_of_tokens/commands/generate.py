"""The command `mot generate`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TextIO

from cyclopts import Parameter

from mixture_of_tokens.commands.calling import calls
from mixture_of_tokens.settings.choices import TEMPERATURE, Device, Dtype

if TYPE_CHECKING:
    from mixture_of_tokens.generation.generate import Generated


@calls("generation.generate")
def generate(
    run: str | Path,
    *,
    prompt: list[str] | None = None,
    prompts_file: Path | None = None,
    out: Path | None = None,
    max_new_tokens: int | None = None,
    temperature: float = TEMPERATURE,
    top_p: float = 1.0,
    samples: int = 1,
    batch_size: int = 32,
    alone: bool = False,
    experts: int | None = None,
    seed: int = 0,
    device: Device | None = None,
    dtype: Dtype | None = None,
    shard: int | None = None,
    expert_parallel: int | None = None,
    stream: Annotated[TextIO | None, Parameter(parse=False)] = None,
) -> "Generated | None":
    """Continue prompts.

    The text after a single prompt is streamed. Several prompts form batches of similar lengths, and a Mixture of Tokens
    mixes the prompts of a batch, unless --alone is given. Text goes to standard output, everything else to standard
    error.

    Args:
        run: A run directory, a checkpoint, nano (a small model that comes with the library), or the name of a causal
            language model on the Hub.
        prompt: A text to continue; may be repeated.
        prompts_file: A file of prompts: one a line, or, if it ends in .jsonl, objects with the field "prompt".
        out: The file of JSON lines for --prompts-file, in its order; by default NAME.continued.jsonl beside it. The
            same command goes on where it was stopped.
        max_new_tokens: Tokens to write, by default 64; fewer where a text ends or the context is full. Prompts that
            are mixed end together, when the context of the longest is full.
        temperature: Of sampling; 0 always takes the likeliest token.
        top_p: Sample among the likeliest tokens that together have this probability.
        samples: Continuations of each prompt, at most a million. Those of one prompt are never in one batch.
        batch_size: Prompts in a batch; rounded up to complete groups.
        alone: Serve each prompt by itself: each expert's typical companions replace the other prompts.
        experts: With --alone, experts that a token goes to, those of its largest weights; by default all. As many as
            the granularity cost what a dense feed-forward does, and give nearly the same loss.
        seed: Of sampling; what is drawn depends on the number of prompts in a batch too, also with --alone.
        device: cpu or cuda; by default cuda where there is one.
        dtype: float32 or bfloat16, in which all is computed; by default that of the saved weights.
        shard: Processes of torchrun that hold a part of every weight each, of a model that is too large for one.
        expert_parallel: Of these processes, so many divide the experts.
        stream: Where the text goes as it is written.

    Returns the continuations; None in all processes of torchrun but the first.

    Raises ValueError for bad options, prompts that are empty or too long, a run without a model, and a model whose
    logits are not finite.
    """
    ...
