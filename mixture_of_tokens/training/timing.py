"""How long a step takes on this machine, and how many of them fit in minutes: `--minutes`, `mot plan --measure`.

Steps are timed on a model of their own and on random tokens, before the run begins with its own seed, so they change
nothing of it. The budget is for training, its evaluations and the scoring at the end; what comes before (reading text,
these timed steps) is not in it, nor are checkpoints.
"""

import copy
import math
import statistics
import tempfile
import time
import timeit
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from transformers import TrainerCallback

from mixture_of_tokens.data.blocks import Blocks
from mixture_of_tokens.data.groups import GroupedBatches
from mixture_of_tokens.models.hf_internals import local_torch_dtype
from mixture_of_tokens.parallel.sharding import broadcast
from mixture_of_tokens.runs.loading import without_progress_bars
from mixture_of_tokens.runs.records import CONFIG, RunConfig
from mixture_of_tokens.settings.options import Options
from mixture_of_tokens.training.building import arguments_of, order_of, trainer_of, vocabulary_of
from mixture_of_tokens.training.merging import FEWEST_SCORED, Merged
from mixture_of_tokens.training.trainer import EVALUATION_ROWS
from mixture_of_tokens.utils.process import the_only_training
from mixture_of_tokens.utils.progress import say

LONGEST = 60 * 24 * 366  # minutes
SECONDS, MOST_STEPS = 3.0, 20  # of a timing, after one step that warms up
GROUPS_TIMED = 4  # of an evaluation
FOR_SCORES = 0.2  # of a budget, at most, for evaluations and the scoring at the end
WITHOUT = {"eval_strategy": "no", "save_strategy": "no", "logging_strategy": "no", "report_to": "none"}

MergedWith = Callable[..., Merged]  # of options, and the minutes that they were found for


@dataclass(frozen=True)
class Pace:
    """Seconds on this machine: of a step, and of a row that is scored."""

    step: float
    row: float


class _Stopwatch(TrainerCallback):
    """Seconds of steps, from the end of one to the end of the next, until there are enough."""

    def __init__(self):
        self.ends: list[float] = []

    @property
    def seconds(self) -> list[float]:
        return np.diff(self.ends).tolist()

    def on_step_end(self, args, state, control, **kwargs):
        if args.device.type != "cpu":
            torch.accelerator.synchronize()
        self.ends.append(time.perf_counter())
        control.should_training_stop |= broadcast(sum(self.seconds) >= SECONDS)


def check_minutes(minutes: float | None, *, steps: int | None, dry_run: bool) -> None:
    """Raises ValueError for a budget that none can be, and for one beside what it would decide."""
    if minutes is None:
        return
    if not 0 < minutes <= LONGEST:
        raise ValueError(f"--minutes must be above 0 and at most {LONGEST}, not {minutes:g}")
    if steps is not None:
        raise ValueError("--minutes finds the number of steps: leave out --steps, or --minutes")
    if dry_run:
        raise ValueError("--minutes times steps, and --dry-run makes none: mot plan NAME --measure says what one takes")


def pace_of(merged: Merged, vocab_size: int | None = None) -> Pace:
    """Time a few steps of a run, and an evaluation; all processes of torchrun call it, and get the first one's times.

    Args:
        vocab_size: by default the configuration's.
    """
    run, config = merged.config, copy.deepcopy(merged.config.model_config)
    config.vocab_size = config.vocab_size if vocab_size is None else vocab_size
    context, watch = config.max_position_embeddings, _Stopwatch()
    # A document a block, so that no two rows of a group are of one.
    blocks = 2 * max(run.batch_size, GROUPS_TIMED * run.group_size)
    tokens = np.random.default_rng(0).integers(config.vocab_size, size=blocks * context + 1)
    ends = np.append(np.arange(1, blocks) * context, len(tokens))
    text = Blocks(tokens, ends, context, len(tokens), run.separate_documents)
    fp32 = local_torch_dtype(torch.float32)  # as runs are
    with tempfile.TemporaryDirectory() as folder, the_only_training(), without_progress_bars(), fp32:
        taken = arguments_of(merged, Path(folder), **WITHOUT, max_steps=1 + MOST_STEPS)
        rows = GroupedBatches(text, **order_of(run) | {"steps": 1 + MOST_STEPS, "first_step": 0})
        trainer = trainer_of(run, config, taken, merged.placement, rows=rows, evaluated=text, corpus="")
        trainer.remove_callback(trainer.run_log)  # and its progress bar
        trainer.add_callback(watch)
        trainer.train()
        evaluations = timeit.repeat(lambda: trainer.loss_of(trainer.causal_lm, GROUPS_TIMED), repeat=2, number=1)
    # The first warms up.
    return broadcast(Pace(statistics.median(watch.seconds), evaluations[-1] / (GROUPS_TIMED * run.group_size)))


def found_before(out: Path, minutes: float, options: Options) -> Options | None:
    """What was found for a run that was started; None of a directory without.

    Raises ValueError where it was started for other minutes, or for a number of steps.
    """
    if not (out / CONFIG).is_file():
        return None
    before = RunConfig.read(out / CONFIG)
    if before.minutes != minutes:
        was = f"--steps {before.steps}" if before.minutes is None else f"--minutes {before.minutes:g}"
        raise ValueError(
            f"{out} was started with {was}, now it is --minutes {minutes:g}; give the same flags, or name another "
            "directory with --out"
        )
    return replace(options, steps=before.steps, scored_rows=before.scored_rows)


def fitting(
    minutes: float, runs: Mapping[str, MergedWith], options: Options, scored: int | None = None
) -> dict[str, Options]:
    """The options of each of some runs that are compared, with its steps and the rows that all of them score.

    Args:
        runs: by their models' names, what merges options.
        scored: rows, where others that they are compared with were found before.

    Raises ValueError where no step fits.
    """
    planned = {name: merged_with(options) for name, merged_with in runs.items()}
    paces, totals = {}, []
    for name, merged in planned.items():
        run = merged.config
        prepared = run.prepare()
        totals.append(getattr(prepared, run.evaluate_on).total)
        paces[name] = pace_of(merged, vocabulary_of(run, prepared))
    total = max(totals)
    scored = scored or options.scored_rows or rows_to_score(minutes, max(pace.row for pace in paces.values()), total)
    found = {}
    for name, pace in paces.items():
        own = replace(options, scored_rows=scored)
        steps = steps_within(minutes, pace, scored, total, lambda n: runs[name](replace(own, steps=n), minutes=minutes))  # noqa: B023
        found[name] = replace(own, steps=steps)
        say(f"A step of {name} takes {pace.step:.3g} s here: {steps:,} steps in {minutes:g} min")
    return found


def rows_to_score(minutes: float, row: float, total: int) -> int:
    """All rows of a split, which are scored in three ways, where the budget has the time for it; or fewer.

    Args:
        row: seconds of one, of the slowest of the models that are compared.
    """
    time = FOR_SCORES * 60 * minutes
    return total if 3 * total * row <= time else max(FEWEST_SCORED, int(time / row / 11))  # ten times, and at the end


def steps_within(minutes: float, pace: Pace, scored: int, total: int, merged_with: Callable[[int], Merged]) -> int:
    """How many steps fit beside what is scored; `merged_with` is the run of so many.

    Raises ValueError where none does.
    """
    ways = 3 if scored >= total else 1
    left = 60 * minutes - ways * min(scored, total) * pace.row
    each = min(scored, total, EVALUATION_ROWS) * pace.row
    steps = max(1, int(left / pace.step))
    for _ in range(3):  # how often is evaluated follows from the steps
        steps = int((left - _evaluations(merged_with(max(1, steps))) * each) / pace.step)
    if steps < 1:
        raise ValueError(
            f"--minutes {minutes:g}: no step fits; one takes {pace.step:.2g} s here, and an evaluation {each:.2g} s"
        )
    return steps


def _evaluations(merged: Merged) -> int:
    training, steps = merged.config.training, merged.config.steps
    every = training["eval_steps"]
    return 0 if training["eval_strategy"] == "no" else math.ceil(steps / (every if every >= 1 else every * steps))
