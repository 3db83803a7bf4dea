"""The command `mot train`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from mixture_of_tokens.commands.calling import calls
from mixture_of_tokens.settings.names import parse_name
from mixture_of_tokens.settings.options import DEFAULTS, Options

if TYPE_CHECKING:
    from mixture_of_tokens.runs.records import RunConfig
    from mixture_of_tokens.runs.run import Run


@calls("training.train")
def train(
    name: str | None = None,
    *,
    out: Path | None = None,
    seed: int | None = None,
    learning_rate: float | None = None,
    start: Annotated[Path | None, Parameter(name="--from")] = None,
    options: Annotated[Options, Parameter(name="*")] = DEFAULTS,
    minutes: float | None = None,
    resume: bool = False,
    dry_run: bool = False,
) -> "Run | RunConfig | None":
    """Train one model and write a run directory.

    For example: mot train MoT-Nano/32E/8 --steps 300 --data my-texts --out runs/mine

    A name is SYSTEM-SIZE, with experts SYSTEM-SIZE/GE/K: G texts in a group, and G x K experts, each 1/K as wide as the
    dense feed-forward. Systems: Transformer (dense), MoT (Mixture of Tokens), Uniform (without a router), TC (Token
    Choice), STC (with sigmoid gates), DMoE (Default MoE), EC (Expert Choice), ET (Expert Threshold), ReMoE, SoftMoE
    (not causal). Sizes: Nano (minutes on a CPU), Micro (an hour or two), Mini, Medium and Base (for GPUs).

    It can be stopped (^C, SIGTERM) and killed at any time; the same command with --resume goes on.

    Args:
        name: A model, such as Transformer-Nano or MoT-Nano/32E/8; /K may be left out, and is 1 then. With --from it is
            known.
        out: The run directory; by default runs/NAME-seedSEED.
        seed: Of the weights and of the order of the text; by default 0, with --from that of the run it comes from.
        learning_rate: Peak rate, reached after the warm-up, then a cosine down to a tenth; by default the model's own,
            with --from a fifth of it, or after mot upcycle half of the dense model's.
        start: Begin with trained weights: of a finished run, or of what mot upcycle made of a dense model. Of a run of
            this library the same text goes on where it stopped, unless --data names another; the steps are by default a
            quarter of its.
        minutes: In place of --steps: as many steps as fit beside evaluations and the scoring at the end, by a few that
            are timed first. Preparing text comes before. A resumed run keeps the number that was found.
        resume: Go on from the newest valid checkpoint of the run directory, or start where there is none.
        dry_run: Print the merged configuration, and how much memory it takes, and stop, before text or a tokenizer is
            looked at.

    Returns the finished run; with `dry_run` its configuration; None in all processes of torchrun but the first.

    Raises ValueError for bad settings or too little memory, FloatingPointError for a run that diverges, and at a
    signal, after saving, KeyboardInterrupt with the run's `directory`.
    """
    if name is not None:
        parse_name(name)  # before anything large is imported
    options.check_single()
