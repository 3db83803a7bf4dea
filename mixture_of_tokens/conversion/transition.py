"""Transition tuning: a trained Mixture of Tokens becomes a Token Choice model. The command `mot transition`."""

import math
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

from mixture_of_tokens.conversion.after_switch import begin_switched
from mixture_of_tokens.conversion.distil import STEPS
from mixture_of_tokens.conversion.switch import default_scores, token_choice_config
from mixture_of_tokens.models.config import MixtureOfTokensConfig
from mixture_of_tokens.models.names import FIELDS
from mixture_of_tokens.parallel.optimizer_state import OPTIMIZER
from mixture_of_tokens.parallel.placement import Placement
from mixture_of_tokens.runs import checkpoints, records
from mixture_of_tokens.runs.loading import model_directory, text_of
from mixture_of_tokens.runs.preconditions import check_free
from mixture_of_tokens.runs.records import DERIVED, RunConfig, Switch, Transition
from mixture_of_tokens.runs.run import Run, Stages, read_run
from mixture_of_tokens.settings.choices import Device, Schedule, Scores
from mixture_of_tokens.settings.names import parse_name
from mixture_of_tokens.settings.options import Options
from mixture_of_tokens.training.merging import Merged, merge
from mixture_of_tokens.training.room import tell_room
from mixture_of_tokens.training.timing import check_minutes
from mixture_of_tokens.training.train import of_minutes, run_merged
from mixture_of_tokens.utils import manifest
from mixture_of_tokens.utils.checks import LARGEST, at_least_one
from mixture_of_tokens.utils.formatting import Result, aligned, duration
from mixture_of_tokens.utils.process import process_count

# Fields that are copied from the source.
GIVEN = ("data", "field", "max_bytes", "part_bytes", "tokenizer", "near_duplicates", "batch_size", "evaluate_on")
GIVEN += ("separate_documents", "scored_rows")
# Fields of the model that a switch sets.
SWITCHED = ("mlp_layer_types", "num_experts_per_tok", "norm_topk_prob", "capacity_factor", "router_temperature")
# By --schedule, fields of TrainingArguments; own has the defaults of a new run.
SCHEDULES = {
    "own": {},
    "continued": {"lr_scheduler_type": "constant", "lr_scheduler_kwargs": {}, "warmup_steps": 0},
    "decay": {
        "lr_scheduler_type": "cosine_with_min_lr",
        "lr_scheduler_kwargs": {"min_lr_rate": 0.1},
        "warmup_steps": 0,
    },
}
# Fields of TrainingArguments that depend on the source's number of steps, and of evaluations, which a switch needs.
OF_THE_SOURCE = ("lr_scheduler_", "warmup_", "logging_steps", "eval_", "save_steps", "per_device_eval_batch_size")
ADAM = ("adamw_torch", "adamw_torch_fused")  # whose moments can be carried over


@dataclass(frozen=True)
class Transitioned(Result):
    """A run after a switch.

    switch, stages: losses over the part of the text that training is evaluated on.
    source_final_loss, final_loss: losses over all of it, or over `scored_tokens` of it.
    """

    source: str
    directory: str
    switch: Switch
    stages: Stages
    steps: int
    source_final_loss: float
    final_loss: float
    scored_tokens: int | None
    seconds_after: float

    @classmethod
    def of(cls, source: Run, run: Run) -> "Transitioned":
        assert run.switch is not None
        return cls(
            source=str(source.directory),
            directory=str(run.directory),
            switch=run.switch,
            stages=run.stages,
            steps=run.config.steps,
            source_final_loss=source.facts.final_loss,
            final_loss=run.facts.final_loss,
            scored_tokens=run.facts.scored_tokens,
            seconds_after=run.facts.seconds - source.facts.seconds,
        )

    def __str__(self) -> str:
        switch, stages = self.switch, self.stages
        scored = "all of it" if self.scored_tokens is None else f"{self.scored_tokens:,} tokens of it"
        before = switch.source_in_groups
        rows = [
            (f"{Path(self.source).name}, in {switch.groups}", before),
            ("the same, each row alone", switch.source_alone),
            ("switched, unchanged weights", switch.plain_switch),
            ("switched, as training begins" if self.steps else "switched", switch.at_the_switch),
        ]
        if self.steps:
            done = stages.tenth_step - switch.step
            rows.append((f"step {stages.tenth_step}, after {done} of {self.steps}", stages.tenth_loss))
            rows.append((f"step {switch.step + self.steps}, the end", stages.end_loss))
        shown = [["", "loss", "vs first"], *([what, f"{loss:.4f}", f"{loss - before:+.4f}"] for what, loss in rows)]
        lines = [
            aligned(shown),
            "",
            "These losses are over the part of the text that training is evaluated on.",
            f"Over {scored} the first is {self.source_final_loss:.4f}, this run's {self.final_loss:.4f}.",
        ]
        if stages.first is not None and stages.last is not None:
            lines.append(
                f"In the worst layer, the busiest expert gets {stages.first.largest_load:.1f} times its even share at "
                f"first and {stages.last.largest_load:.1f} times at the end; {stages.first.dropped:.1%} and "
                f"{stages.last.dropped:.1%} of tokens are dropped."
            )
        times = f"{duration(switch.fit_seconds or 0)} of fitting, {duration(self.seconds_after)} of training after it."
        lines.append(f"{times} Everything is in {self.directory}; mot report {self.directory} draws the curve.")
        return "\n".join(lines)


def transition(
    run: Path,
    *,
    out: Path | None,
    steps: int | None,
    top_k: int | None,
    capacity: float | None,
    scores: Scores | None,
    norm_topk_prob: bool,
    calibrate: Literal["distil", "none"],
    distil_steps: int | None,
    optimizer: Literal["carried", "fresh"],
    schedule: Schedule,
    learning_rate: float | None,
    minutes: float | None,
    device: Device | None,
    shard: int | None,
    replicate: int | None,
    expert_parallel: int | None,
    resume: bool,
    dry_run: bool,
) -> Transitioned | RunConfig | None:
    """As the function of `commands/transition.py`, which explains its arguments."""
    at_least_one(top_k=top_k, distil_steps=distil_steps)
    check_minutes(minutes, steps=steps, dry_run=dry_run)
    Placement.of(shard, replicate, expert_parallel, process_count())
    if steps is not None and steps < 0:
        raise ValueError(f"--steps must be 0 or more, not {steps}")
    if capacity is not None and not 0 < capacity < math.inf:
        raise ValueError(f"--capacity must be positive and finite, not {capacity}")
    if steps == 0 and (learning_rate is not None or schedule != "own"):
        raise ValueError("--steps 0 leaves nothing for --learning-rate or --schedule to change")
    if distil_steps is not None and calibrate != "distil":
        raise ValueError(f"--calibrate {calibrate} leaves nothing for --distil-steps to change")
    run, out = _places(run, out)
    source = read_run(run)
    scores = scores or default_scores(source.model_config)
    if capacity is not None and scores == "sigmoid":
        raise ValueError(f"--capacity {capacity} is for --scores softmax: with sigmoid gates no token is dropped")
    steps = max(1, source.facts.steps // 10) if steps is None else steps
    asked = Transition(
        source=str(run.resolve()),
        calibrate=calibrate,
        optimizer=optimizer,
        distil_steps=(distil_steps or STEPS) if calibrate == "distil" else None,
        source_minutes=source.config.minutes,
    )
    target = token_choice_config(
        source.model_config, top_k=top_k, capacity_factor=capacity, scores=scores, norm_topk_prob=norm_topk_prob
    )
    where = Options(steps=steps, device=device, shard=shard, replicate=replicate, expert_parallel=expert_parallel)
    with_options = partial(_merged, source, asked, target, schedule, learning_rate)
    merged = with_options(where)
    if dry_run:
        tell_room(merged)
        return merged.config
    if not resume:
        check_free(out)
    if minutes is not None:
        scored = source.config.scored_rows or LARGEST  # as many as of the source
        merged = of_minutes(minutes, merged, with_options, where, out, resume, scored)
    # Once there is a checkpoint to go on from, the source is no longer needed.
    begun = out.is_dir() and ((out / records.FACTS).exists() or checkpoints.has_any(out))
    carried = _moments_of(source) if optimizer == "carried" and merged.config.steps and not begun else None
    if not begun:
        model_directory(str(run))
        text_of(str(run))  # raises ValueError if it has changed
    made = run_merged(merged, out, resume=resume, begin=partial(begin_switched, source, asked, carried, out))
    return None if made is None else Transitioned.of(source, made)


def _places(run: Path, out: Path | None) -> tuple[Path, Path]:
    """The source's directory, with a name, and the new run's. Raises ValueError for one inside the other."""
    run = run.resolve() if run.name in ("", "..") else run
    out = out or run.parent / f"{run.name}-transition"
    if run.resolve() in (out.resolve(), *out.resolve().parents):
        raise ValueError(f"--out {out} is the source itself, or inside it; name another")
    return run, out


def _merged(
    source: Run,
    asked: Transition,
    target: MixtureOfTokensConfig,
    schedule: Schedule,
    learning_rate: float | None,
    where: Options,
    minutes: float | None = None,
) -> Merged:
    """The source's configuration, with its text and batches, the new routing and the new schedule.

    Args:
        where: has the steps, and where they are trained.
    """
    given = {field: getattr(target, field, value) for field, value in source.config.model.items() if field in FIELDS}
    given |= {field: getattr(target, field) for field in SWITCHED}
    model = {field: value for field, value in given.items() if field not in DERIVED}
    # What does not depend on the source's number of steps.
    training = {k: v for k, v in source.config.training.items() if not k.startswith(OF_THE_SOURCE)}
    own = {key: getattr(source.config, key) for key in GIVEN}
    options = replace(where, model=model, training=training | SCHEDULES[schedule], **own)
    if learning_rate is None:
        learning_rate = source.config.learning_rate / 4 if schedule == "own" else _last_rate(source)
    name = str(replace(parse_name(source.name), system=target.sparse_routings[0].prefix))
    first = source.facts.steps
    return merge(name, source.seed, learning_rate, options, first_step=first, transition=asked, minutes=minutes)


def _last_rate(source: Run) -> float:
    rate = next((row.learning_rate for row in reversed(source.rows) if row.learning_rate), None)
    if rate is None:
        what = f"metrics.jsonl of {source.directory} has no learning rate, as no step was logged"
        raise ValueError(f"{what}: --learning-rate names one")
    return rate


def _moments_of(source: Run) -> Path:
    if source.model_config.learnable_temperature:
        raise ValueError("the optimizer state of a learned temperature cannot be carried: --optimizer fresh")
    optim = source.config.of_training("optim")
    if optim not in ADAM:
        raise ValueError(f"only {', '.join(ADAM)} can be carried, not the state of {optim}: --optimizer fresh")
    last = checkpoints.at(source.directory, source.config.steps)
    problem = manifest.fault(last) if last.is_dir() else "it is not there"
    if problem is not None or not (last / OPTIMIZER).is_dir():
        raise ValueError(f"{last} has no optimizer state to carry: {problem or 'it was removed'}; --optimizer fresh")
    return last
