"""Training one named model: the command `mot train` and its run directory."""

import gc
import logging
import math
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from mixture_of_tokens.data.groups import GROUPS, training_groups
from mixture_of_tokens.data.prepare import Prepared
from mixture_of_tokens.generation.sampling import continue_prompts
from mixture_of_tokens.models.companions import calibrate_companions
from mixture_of_tokens.models.hf_internals import local_torch_dtype
from mixture_of_tokens.models.modeling import MixtureOfTokensForCausalLM
from mixture_of_tokens.models.threshold_calibration import calibrate_thresholds
from mixture_of_tokens.parallel.placement import Placement
from mixture_of_tokens.parallel.sharding import IN_ONE_FILE, broadcast, is_sharded, unsharded, whole_state
from mixture_of_tokens.planning.cost import flops_per_token
from mixture_of_tokens.runs import checkpoints, provenance, records
from mixture_of_tokens.runs.loading import model_directory, without_progress_bars
from mixture_of_tokens.runs.locking import owned
from mixture_of_tokens.runs.preconditions import check_free, check_resumed, check_writable
from mixture_of_tokens.runs.records import SAMPLE_PROMPT, RunConfig, RunFacts, Switch
from mixture_of_tokens.runs.run import Run, read_run
from mixture_of_tokens.settings.options import Options
from mixture_of_tokens.training.building import arguments_of, build
from mixture_of_tokens.training.merging import Merged, check_settings
from mixture_of_tokens.training.room import check_room, tell_room
from mixture_of_tokens.training.served import losses_as_served
from mixture_of_tokens.training.signals import StopOnSignal, seconds_after_signal
from mixture_of_tokens.training.starting import begin_with, begun, merged_with
from mixture_of_tokens.training.timing import MergedWith, check_minutes, fitting, found_before
from mixture_of_tokens.training.trainer import RunTrainer
from mixture_of_tokens.utils import manifest
from mixture_of_tokens.utils.files import plain_errors, published, write_text
from mixture_of_tokens.utils.formatting import duration
from mixture_of_tokens.utils.process import Interrupted, ended_by_sigterm, is_main, process_number, the_only_training
from mixture_of_tokens.utils.progress import say, say_once, warn_once
from mixture_of_tokens.utils.rendering import card_of

REGROUPINGS = 3
USED = 0.75  # of the minutes that were asked for; less is told

Begin = Callable[[RunTrainer, Prepared], None]


def train(
    name: str | None,
    *,
    out: Path | None,
    seed: int | None,
    learning_rate: float | None,
    start: Path | None,
    options: Options,
    minutes: float | None,
    resume: bool,
    dry_run: bool,
) -> Run | RunConfig | None:
    """As the function of `commands/train.py`, which explains its arguments."""
    check_minutes(minutes, steps=options.steps, dry_run=dry_run)
    name, beginning = begun(name, start)
    with_options = partial(merged_with, beginning, name, seed, learning_rate)
    merged = with_options(options)
    check_settings(merged)
    if dry_run:
        tell_room(merged)
        return merged.config
    out = out or Path("runs") / merged.config.directory_name
    if minutes is not None:
        merged = of_minutes(minutes, merged, with_options, options, out, resume)
    if resume and not out.exists():
        say(f"{out} is not there yet: training begins at step 0")
    begin = None if beginning is None else partial(begin_with, beginning, out)
    return run_merged(merged, out, resume=resume, begin=begin)


def of_minutes(
    minutes: float,
    merged: Merged,
    with_options: MergedWith,
    options: Options,
    out: Path,
    resume: bool,
    scored: int | None = None,
) -> Merged:
    """The run with as many steps as fit, or as were found when it was started.

    Args:
        scored: rows, where that is decided; by default as many as there is time for.
    """
    if not resume:
        check_free(out)
    check_writable(out)
    check_room(merged)
    found = found_before(out, minutes, options) if resume else None
    if found is None:
        (found,) = fitting(minutes, {merged.config.name: with_options}, options, scored).values()
    return with_options(found, minutes=minutes)


def run_merged(
    merged: Merged, out: Path, *, resume: bool, begin: Begin | None = None, again: str = "--resume"
) -> Run | None:
    """Train as `train` does; with `resume`, a run that is finished is only read.

    Args:
        begin: called before the first step, unless there is a checkpoint to go on from. It gives the trainer the
            weights that it begins with, and in a run with a `first_step` the rows and the clock of that step.
        again: what goes on with a run that was stopped.
    """
    _check(out, merged, resume)
    if resume and (out / records.FACTS).exists():
        if not is_main():
            return None
        finished = read_run(out)
        try:
            model_directory(str(out))
        except ValueError as error:
            what = f"put it back, or remove {out / records.FACTS}, and {again} makes it again from its last checkpoint"
            raise ValueError(f"{error}; {what}") from None
        say(f"{out} is finished already")
        return finished
    check_room(merged)
    check_writable(out)
    if (seconds := seconds_after_signal()) is not None:
        what = f"{seconds} s for its processes: a step and a checkpoint have to fit, or the last steps are lost"
        warn_once(f"after a signal torchrun waits {what}; --shutdown-timeout N of torch 2.12 sets it")
    fp32 = local_torch_dtype(torch.float32)  # whatever torch's default type is, which no file of the run would tell
    with the_only_training(), owned(out), without_progress_bars(), _without_comparisons(), fp32:
        _check(out, merged, resume)  # another process may have begun meanwhile
        return _run(merged.config, arguments_of(merged, out), merged.placement, out, begin, again)


@contextmanager
def _without_comparisons() -> Iterator[None]:
    """Of a checkpoint's micro-batch with the run's: `check_resumed` knows what a resumed run may change."""

    def is_none(record: logging.LogRecord) -> bool:
        return "trainer_state.json" not in record.getMessage()

    logger = logging.getLogger("transformers.trainer_utils")
    logger.addFilter(is_none)
    try:
        yield
    finally:
        logger.removeFilter(is_none)


def _check(out: Path, merged: Merged, resume: bool) -> None:
    if resume:
        check_resumed(out, merged.config)
    else:
        check_free(out)


def _run(
    run: RunConfig, arguments: TrainingArguments, placement: Placement, out: Path, begin: Begin | None, again: str
) -> Run | None:
    made_by = {"versions": provenance.versions(), "commit": provenance.commit()}  # now, as they may change
    if arguments.torch_compile:  # else torch counts the models of earlier runs, and compiles no ninth one
        torch.compiler.reset()
    if torch.cuda.is_initialized():  # an earlier run's model, which is in a circle with its trainer's callbacks
        gc.collect()
        torch.cuda.empty_cache()
    with _saying_where(out, f"before the first step; {again} goes on"):
        trainer, prepared = build(run, arguments, placement)
    checkpoint = _newest(out)
    if checkpoint is not None:
        trainer.facts_of(checkpoint)  # or why not, before anything is written
    if is_main():
        out.mkdir(parents=True, exist_ok=True)
        if checkpoint is not None:
            say(f"Going on from {checkpoint}")
        elif (out / records.CONFIG).exists():
            say(f"{out} has no checkpoint yet: training begins anew")
        write_text(out / records.CONFIG, str(run))
    if begin is not None and checkpoint is None:
        with _saying_where(out, f"before the first step; {again} begins anew"):
            begin(trainer, prepared)
    stop = StopOnSignal(trainer.wait_for_rows)
    trainer.add_callback(stop)
    with stop.installed():
        try:
            if run.steps:  # none after a switch that is all
                trainer.train(checkpoint)
        finally:
            _end_reports(arguments)
    if stop.received is not None:
        step, name = trainer.state.global_step, signal.Signals(stop.received).name
        where = f"stopped by {name} after step {step}{_saved(out, step)}; {again} goes on"
        raise Interrupted(where, stop.received, out)
    with _saying_where(out, f"after the last step{_saved(out, trainer.state.global_step)}; {again} goes on"):
        return _finish(trainer, prepared, run, out, made_by)


def _saved(out: Path, step: int) -> str:
    """With --training.save_strategy no, a signal in the last evaluation comes too late for a checkpoint."""
    return ", which is saved" if checkpoints.at(out, step).is_dir() else ""


@contextmanager
def _saying_where(out: Path, stopped: str) -> Iterator[None]:
    """Raises Interrupted, which says where the run was stopped, at ^C and SIGTERM."""
    try:
        with ended_by_sigterm():
            yield
    except KeyboardInterrupt as interrupt:
        number = next(iter(interrupt.args), signal.SIGINT)
        raise Interrupted(f"stopped {stopped}", number, out) from interrupt


def _newest(out: Path) -> Path | None:
    """The checkpoint to go on from, which the first process chooses.

    Raises ValueError where there are some, and none is whole: to begin anew would remove them. Raises OSError where
    another process lacks it.
    """
    checkpoint, damaged = None, False
    if is_main() and out.exists():
        checkpoint = checkpoints.newest(out)
        damaged = checkpoint is None and checkpoints.has_any(out)
    checkpoint, damaged = broadcast((checkpoint, damaged))
    if damaged:
        what = f"{out} cannot go on: none of its checkpoints is whole"
        raise ValueError(f"{what}; put back what is missing, or name another directory with --out")
    if checkpoint is not None and not checkpoint.is_dir():
        what = "all processes need the run directory on a file system that they share"
        raise OSError(f"{checkpoint} is not there for process {process_number()}: {what}")
    return checkpoint


def _end_reports(arguments: TrainingArguments) -> None:
    """Close W&B's run, or the next run of this process, as in a sweep, would report to it."""
    wandb = sys.modules.get("wandb")
    if "wandb" in (arguments.report_to or ()) and wandb is not None and wandb.run is not None:
        wandb.finish()


def _finish(trainer: RunTrainer, prepared: Prepared, run: RunConfig, out: Path, made_by: dict[str, Any]) -> Run | None:
    """Evaluate, by all processes, and write `model/` and, last, `run.json`, which marks the run as finished."""
    model, config, seconds = trainer.causal_lm, trainer.causal_lm.config, trainer.clock.seconds
    before = 0.0 if run.transition is None else Switch.read(out / records.SWITCH).seconds
    if run.minutes is not None and run.minutes >= 1 and seconds - before < USED * 60 * run.minutes:
        what = f"of {run.minutes:g} minutes training took {duration(seconds - before)}"
        warn_once(f"{what}: steps were faster than when they were timed, as where another process was busy then")
    tokens = run.last_step * trainer.run_log.tokens_per_step
    # A sweep's runs are compared with one another alone, and a split may take minutes.
    text, groups = trainer.evaluated, trainer.groups_at_end
    how_much = "all" if groups is None else f"{groups * run.group_size:,} rows"
    several = model.shares_batch and len(text) > run.group_size and run.evaluate_on == "validation"
    seeds = range(REGROUPINGS if several and groups is None else 1)
    ways = f", grouped in {len(seeds)} ways" * (len(seeds) > 1)
    say_once(f"Evaluating on {how_much} of the {run.evaluate_on} text{ways}")
    calibrate_companions(model, training_groups(prepared.train, trainer.rows.group_size))
    calibrate_thresholds(model, training_groups(prepared.train, trainer.rows.group_size, 2 * GROUPS))
    final, *others = [trainer.evaluate_all(seed) for seed in seeds]
    served = losses_as_served(trainer, run.last_step * run.batch_size) if run.evaluate_on == "validation" else None
    if is_sharded(model):
        state = whole_state(model)
        model = unsharded(model, state).eval() if is_main() else model
    trainer.accelerator.wait_for_everyone()  # the others may end now
    if not is_main():
        return None
    losses = [final["loss"], *(other["loss"] for other in others)]
    beside = out / "model.partial"
    with published(beside, out / "model"), plain_errors(out / "model"):
        model.save_pretrained(beside, max_shard_size=IN_ONE_FILE)
        # Not before, or it would warn of every longer document.
        prepared.tokenizer.model_max_length = config.max_position_embeddings
        prepared.tokenizer.save_pretrained(beside)
        manifest.write(beside)
        (beside / "README.md").write_text(card_of("run.md.j2", name=run.name, config=config))  # which people edit
    facts = RunFacts(
        name=run.name,
        seed=run.seed,
        steps=run.last_step,
        tokens=tokens,
        evaluated_on=run.evaluate_on,
        scored_tokens=None if "bits_per_byte" in final else int(final["tokens"]),
        final_loss=final["loss"],
        regrouping_spread=max(losses) - min(losses) if others else None,
        served=served,
        bits_per_byte=final.get("bits_per_byte", final["loss"] / math.log(2) * (len(text.tokens) - 1) / text.bytes),
        seconds=round(seconds, 3),  # as rows have them
        tokens_per_second=round(tokens / seconds),
        vocab_size=config.vocab_size,
        parameters=model.num_parameters(),
        forward_flops_per_token=round(sum(flops_per_token(config, batch=run.batch_size).forward.values())),
        corpus=prepared.facts,
        **made_by,
        sample=_sample(model, prepared.tokenizer),
        **provenance.hardware("cpu" if trainer.args.use_cpu else None),
    )
    facts.write(out / records.FACTS)
    return read_run(out)


def _sample(model: MixtureOfTokensForCausalLM, tokenizer: Any) -> str | None:
    """None where the model is not causal or finite, or the prompt is no text of its tokenizer, or fills its context."""
    try:
        return continue_prompts(model, tokenizer, [SAMPLE_PROMPT])[0] if model.config.causal else None
    except ValueError:
        return None
