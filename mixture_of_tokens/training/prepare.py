"""The command `mot prepare`: the text of a run, before it, by as many processes as there are."""

from dataclasses import dataclass, replace

from mixture_of_tokens.data.groups import grouped_order
from mixture_of_tokens.data.prepare import Prepared
from mixture_of_tokens.settings.options import Options
from mixture_of_tokens.training.merging import check_settings, merge
from mixture_of_tokens.utils.checks import at_least_one
from mixture_of_tokens.utils.formatting import Result
from mixture_of_tokens.utils.process import by_itself, process_count, process_number
from mixture_of_tokens.utils.progress import LOGGER


@dataclass(frozen=True)
class PreparedText(Result):
    """Parts of a text, their training tokens in all, and where each part is kept."""

    parts: int
    tokens: int
    directories: list[str]

    def __str__(self) -> str:
        parts = "one part" if self.parts == 1 else f"{self.parts} parts"
        return f"{self.tokens:,} tokens for training in {parts}. They are in {self.directories[0]} and beside it."


def prepare(name: str, *, options: Options) -> PreparedText | None:
    """As the function of `commands/prepare.py`, which explains its arguments."""
    at_least_one(shard=options.shard, replicate=options.replicate, expert_parallel=options.expert_parallel)
    options = replace(options, device=None, shard=None, replicate=None, expert_parallel=None)  # they decide no text
    with by_itself():
        merged = merge(name, 0, None, options)
    check_settings(merged)
    run, rank = merged.config, process_number()
    if (parts := run.parts) is None:
        if rank != 0:
            return None
        made = run.prepare()
        grouped_order(made.train, run.group_size)  # or why a training would refuse it
        return _found([made])
    count = len(parts.files)
    for number in range(rank, count, process_count()):
        parts.prepare(number)
        LOGGER.info(f"Part {number + 1} of {count} is ready")
    # Of the others too, when they are ready.
    return _found([parts.prepare(number) for number in range(count)]) if rank == 0 else None


def _found(made: list[Prepared]) -> PreparedText:
    tokens = sum(len(each.train.tokens) for each in made)
    return PreparedText(len(made), tokens, [str(each.directory) for each in made])
