"""Transition tuning: a trained Mixture of Tokens becomes a Token Choice model. The command `mot transition`."""

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from mixture_of_tokens.convert.distil import STEPS, check_flags, distil, distillation_text
from mixture_of_tokens.convert.scales import fit_scales
from mixture_of_tokens.convert.switch import (
    Errors,
    Scores,
    default_scores,
    kind_of,
    rescale_moments,
    sparse_layers,
    to_token_choice,
    token_choice_config,
)
from mixture_of_tokens.data.groups import training_groups
from mixture_of_tokens.data.prepare import Prepared
from mixture_of_tokens.formatting import Result, aligned
from mixture_of_tokens.layers import Router
from mixture_of_tokens.model.companions import calibrate_companions
from mixture_of_tokens.model.names import FIELDS, parse_name
from mixture_of_tokens.model.routings import ROUTINGS
from mixture_of_tokens.runs import checkpoints, records
from mixture_of_tokens.runs.loading import load_model, model_directory, text_of
from mixture_of_tokens.runs.records import DERIVED, RunConfig, Switch, Transition
from mixture_of_tokens.runs.run import Run, Stages, check_free, check_one_process, is_main, read
from mixture_of_tokens.sparse import TokenChoice
from mixture_of_tokens.training.options import Options
from mixture_of_tokens.training.recipes import Merged, merge
from mixture_of_tokens.training.train import run_merged
from mixture_of_tokens.training.trainer import GroupedTrainer

GIVEN = ("data", "field", "max_bytes", "tokenizer", "batch_size", "evaluate_on")  # copied from the source
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
# Fields of TrainingArguments that depend on the source's number of steps.
OF_THE_SOURCE = ("lr_scheduler_", "warmup_", "logging_steps", "eval_steps", "save_steps", "per_device_eval_batch_size")
ADAM = ("adamw_torch", "adamw_torch_fused")  # whose moments can be carried over

Schedule = Literal["continued", "decay", "own"]
Device = Literal["cpu", "cuda"] | None


@dataclass(frozen=True)
class Transitioned(Result):
    """A run after a switch.

    switch, stages: losses over the part of the text that training is evaluated on.
    source_final_loss, final_loss: losses over all of it.
    """

    source: str
    directory: str
    switch: Switch
    stages: Stages
    steps: int
    source_final_loss: float
    final_loss: float
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
            seconds_after=run.facts.seconds - source.facts.seconds,
        )

    def __str__(self) -> str:
        switch, stages = self.switch, self.stages
        before = switch.source_in_groups
        rows = [
            ("source, in full groups", before),
            ("source, each row alone", switch.source_alone),
            ("switched, unchanged weights", switch.plain_switch),
            ("switched, as training begins" if self.steps else "switched", switch.at_the_switch),
        ]
        if self.steps:
            rows.append((f"step {stages.tenth_step}, after a tenth of them", stages.tenth_loss))
            rows.append((f"step {switch.step + self.steps}, the end", stages.end_loss))
        shown = [["", "loss", "vs source"], *([what, f"{loss:.4f}", f"{loss - before:+.4f}"] for what, loss in rows)]
        lines = [
            aligned(shown),
            "",
            "These losses are over the part of the text that training is evaluated on.",
            f"Over all of it the source's loss is {self.source_final_loss:.4f}, this run's {self.final_loss:.4f}.",
        ]
        if stages.first is not None and stages.last is not None:
            lines.append(
                f"In the worst layer, the busiest expert gets {stages.first.largest_load:.1f} times its even share at "
                f"first and {stages.last.largest_load:.1f} times at the end; {stages.first.dropped:.1%} and "
                f"{stages.last.dropped:.1%} of tokens are dropped."
            )
        times = f"{switch.fit_seconds or 0:.0f} s of fitting, {self.seconds_after:.0f} s of training after it."
        lines.append(f"{times} Everything is in {self.directory}; mot report {self.directory} draws the curve.")
        return "\n".join(lines)


def transition(
    run: Path,
    *,
    out: Path | None = None,
    steps: int | None = None,
    top_k: int | None = None,
    capacity: float | None = None,
    scores: Scores | None = None,
    calibrate: Literal["distil", "scales", "none"] = "distil",
    distil_steps: int = STEPS,
    anneal: float | None = None,
    optimizer: Literal["carried", "fresh"] = "carried",
    schedule: Schedule = "own",
    learning_rate: float | None = None,
    control: Literal["router", "scratch"] | None = None,
    device: Device = None,
    resume: bool = False,
    dry_run: bool = False,
) -> Transitioned | Run | RunConfig | None:
    """Turn a finished Mixture of Tokens into Token Choice, which serves one prompt at a time, and train it on.

    All weights carry over, and training goes on in the text where the source stopped. The new run inherits its source's
    metrics, clock and step count, so that mot report plots one curve; its checkpoints count from 0.

    Args:
        run: The source, a finished run directory of mot train. It is only read.
        out: The new run directory; by default RUN-transition beside it, with the control's name where there is one.
        steps: Steps of training, by default a tenth of the source's; all come after the switch, unless with --anneal.
            0 switches and trains nothing.
        top_k: Experts a token goes to; by default the granularity, at equal FLOPs.
        capacity: Capacity factor in training: an expert drops tokens beyond this many times its even share. The paper
            has 1.25; by default nothing is dropped.
        scores: Gates of the new model: softmax over the experts, the default (exports as Qwen3-MoE), or a sigmoid each
            (Dots1), the default where there are shared experts.
        calibrate: What is fitted at the switch, so that the loss does not jump. distil fits all weights of the sparse
            layers to what these give for a text alone; scales fits biases and scales; none is the paper's plain switch.
        distil_steps: Steps of distillation for each layer; a source that was trained longer may need more.
        anneal: Before the switch train in groups for half of the steps, while the router's temperature falls to this.
            That run is written beside the new one, as OUT-annealed.
        optimizer: carried takes the optimizer's moments from the source's last checkpoint, but for distilled weights.
        schedule: continued holds the source's last learning rate; decay falls from there to a tenth of it, for sources
            with a constant rate; own warms up for a tenth of the steps to the peak, and falls to a tenth of that.
        learning_rate: The peak, or what is held; by default a quarter of the source's peak if own, else its last one.
        control: For comparison. router starts with new routers; scratch trains Token Choice from scratch, for the
            source's steps and these, at its own rate.
        device: cpu or cuda; by default cuda where there is one.
        resume: Go on from the newest valid checkpoint of the new run.
        dry_run: Print the merged configuration and stop.

    Returns the run's stages; with `control` scratch the run, with `dry_run` its configuration; None in all
    processes of torchrun but the first.

    Raises ValueError for a source that cannot be switched, or whose text or optimizer state is missing.
    """
    check_flags(top_k, distil_steps)
    if steps is not None and steps < 0:
        raise ValueError(f"--steps must be 0 or more, not {steps}")
    run = Path(run)
    run = run.resolve() if run.name in ("", "..") else run  # a new run needs a name
    source = read(run)
    label = f"{run.name}-{'transition' if control is None else control}"
    out = run.parent / label if out is None else Path(out)
    if out.absolute() == run.absolute():
        raise ValueError(f"--out {out} is the source itself; name another")
    steps = max(1, source.facts.steps // 10) if steps is None else steps
    asked = Transition(
        source=str(run.resolve()),
        calibrate="none" if control == "router" else calibrate,
        optimizer=optimizer,
        control=control,
        anneal=anneal,
        distil_steps=distil_steps if calibrate == "distil" and control is None else None,
    )
    mixing = 0 if anneal is None else steps // 2
    if anneal is not None:
        _check_anneal(source, anneal, steps, control)
    chosen = (top_k, capacity, scores or default_scores(source.model_config), schedule, device)
    merged = _merged(source, asked, steps - mixing, *chosen, learning_rate)
    if control == "scratch":
        merged = _from_scratch(source, merged.config, steps, device, learning_rate)
    if dry_run:
        return merged.config
    if control == "scratch":
        return run_merged(merged, out, resume=resume)
    if not resume:
        check_free(out)
    # Once there is a checkpoint to go on from, the source is no longer needed.
    begun = out.is_dir() and ((out / records.FACTS).exists() or checkpoints.newest(out) is not None)
    carried = _optimizer_file(source) if optimizer == "carried" and not begun else None
    if not begun:
        model_directory(str(run))
        text_of(str(run))  # raises ValueError if it has changed
    if anneal is not None:
        source = _annealed(source, asked, mixing, carried, device, out.with_name(f"{out.name}-annealed"), resume)
        merged = _merged(source, asked, steps - mixing, *chosen, merged.config.learning_rate)
        carried = _optimizer_file(source) if optimizer == "carried" and not begun else None
    made = run_merged(merged, out, resume=resume, begin=_Beginning(source, asked, carried, out))
    return None if made is None else Transitioned.of(source, made)


def _check_anneal(source: Run, end: float, steps: int, control: str | None) -> None:
    """Raises ValueError where --anneal cannot be used."""
    before = source.config.anneal_temperature_to or source.model_config.router_temperature
    if steps < 2:
        raise ValueError(f"--steps must be at least 2 with --anneal, not {steps}")
    if control is not None or not 0 < end < before:
        legal = f"be above 0 and below the source's temperature, {before:g}"
        raise ValueError(f"--anneal {end:g} must {legal}, and is not for controls")
    if source.model_config.learnable_temperature:
        raise ValueError(f"--anneal {end:g} would replace the temperatures that {source.directory} has learned")
    check_one_process("--anneal")


def _merged(
    source: Run,
    asked: Transition,
    steps: int,
    top_k: int | None,
    capacity: float | None,
    scores: Scores,
    schedule: Schedule,
    device: Device,
    learning_rate: float | None,
) -> Merged:
    """The source's configuration with the new routing and schedule."""
    target = token_choice_config(source.model_config, top_k=top_k, capacity_factor=capacity, scores=scores)
    model = {field: getattr(target, field) for field in source.config.model if field in FIELDS}
    model |= {field: getattr(target, field) for field in ("mlp_layer_types", "num_experts_per_tok", "capacity_factor")}
    model["router_temperature"] = target.router_temperature
    training = _training(source) | SCHEDULES[schedule]
    if learning_rate is None:
        learning_rate = source.config.learning_rate / 4 if schedule == "own" else _last_rate(source)
    options = _options(source, steps, model, training, device)
    name, first = _token_choice_name(source, kind_of(scores)), source.facts.steps
    return merge(name, source.seed, learning_rate, options, first_step=first, transition=asked)


def _options(
    source: Run, steps: int, model: dict[str, Any], training: dict[str, Any], device: Device, **others: Any
) -> Options:
    """The source's text and batches, with these fields of the model and of TrainingArguments."""
    given = {key: getattr(source.config, key) for key in GIVEN}
    model = {field: value for field, value in model.items() if field not in DERIVED}
    return Options(steps=steps, model=_words(model), training=_words(training), device=device, **given, **others)


def _training(source: Run) -> dict[str, Any]:
    """The source's fields of TrainingArguments that do not depend on its number of steps."""
    return {k: v for k, v in source.config.training.items() if not k.startswith(OF_THE_SOURCE)}


def _last_rate(source: Run) -> float:
    return [row.learning_rate for row in source.rows if row.learning_rate][-1]


def _words(fields: dict[str, Any]) -> dict[str, str]:
    """Values as they would stand on a command line."""
    return {field: json.dumps(value) for field, value in fields.items()}


def _annealed(
    source: Run, asked: Transition, steps: int, optimizer: Path | None, device: Device, out: Path, resume: bool
) -> Run:
    """The source trained on in groups, at its last learning rate, while the routers' temperature falls."""
    temperature = source.config.anneal_temperature_to or source.model_config.router_temperature
    model = source.config.model | {"router_temperature": temperature}
    options = _options(
        source, steps, model, _training(source) | SCHEDULES["continued"], device, anneal_temperature_to=asked.anneal
    )
    first = source.facts.steps
    merged = merge(source.name, source.seed, _last_rate(source), options, first_step=first, transition=asked)

    def begin(trainer: GroupedTrainer, prepared: Prepared) -> None:
        trainer.causal_lm.load_state_dict(load_model(str(source.directory)).state_dict())
        if optimizer is not None:
            _carry_moments(trainer, optimizer, {}, without=())
        _go_on_from(source, trainer, out)

    run_merged(merged, out, resume=resume, begin=begin)
    return read(out)


def _token_choice_name(source: Run, kind: str) -> str:
    return str(replace(parse_name(source.name), system=ROUTINGS[kind].prefix))


def _from_scratch(source: Run, switched: RunConfig, steps: int, device: Device, learning_rate: float | None) -> Merged:
    """The control that is Token Choice from the first step: the same model, all the steps, by default its own rate."""
    options = _options(source, source.facts.steps + steps, switched.model, _training(source), device)
    return merge(switched.name, source.seed, learning_rate, options)


def _optimizer_file(source: Run) -> Path:
    if source.model_config.learnable_temperature:
        raise ValueError("the optimizer state of a learned temperature cannot be carried: --optimizer fresh")
    optim = source.config.training["optim"]
    if optim not in ADAM:
        raise ValueError(f"only {', '.join(ADAM)} can be carried, not the state of {optim}: --optimizer fresh")
    last = source.directory / f"checkpoint-{source.config.steps}"
    problem = checkpoints.fault(last) if last.is_dir() else "it is not there"
    if problem is not None or not (last / "optimizer.pt").is_file():
        raise ValueError(f"{last} has no optimizer state to carry: {problem or 'no optimizer.pt'}; --optimizer fresh")
    return last / "optimizer.pt"


class _Beginning:
    """What a run after the switch begins with: weights, moments, the clock and the rows of the source."""

    def __init__(self, source: Run, asked: Transition, optimizer: Path | None, out: Path):
        self.source, self.asked, self.optimizer, self.out = source, asked, optimizer, out

    def __call__(self, trainer: GroupedTrainer, prepared: Prepared) -> None:
        if is_main():
            print("Measuring losses before the switch and at it", file=sys.stderr)
        target = trainer.causal_lm
        model = load_model(str(self.source.directory)).to(target.device)
        groups = list(training_groups(prepared.train, trainer.rows.group_size))
        started = time.perf_counter()
        calibrate_companions(model, groups)
        fit_seconds = time.perf_counter() - started
        losses = {"source_in_groups": trainer.loss_of(model)}
        model.serve_alone()
        losses["source_alone"] = trainer.loss_of(model)
        model.serve_alone(False)
        scales = to_token_choice(model, target)
        losses["plain_switch"] = trainer.loss_of(target)
        errors: Errors = {}
        new: list[str] = []  # weights that Adam has to begin anew with
        started = time.perf_counter()
        if self.asked.calibrate == "scales":
            errors = fit_scales(model, target, groups, scales)
        elif (steps := self.asked.distil_steps) is not None:
            errors = distil(model, target, distillation_text(model, prepared.train, steps), steps=steps)
            layers = [f"model.layers.{i}.mlp." for i, _ in sparse_layers(target, TokenChoice)]
            new += [name for name, _ in target.named_parameters() if name.startswith(tuple(layers))]
        fit_seconds += time.perf_counter() - started
        if self.asked.control == "router":
            for name, router in target.named_modules():
                if isinstance(router, Router):  # drawn anew: the seed has made them as the source's were at first
                    router.reset_parameters(target.config.initializer_scale)
                    new.append(f"{name}.weight")
        losses["at_the_switch"] = trainer.loss_of(target)
        if self.optimizer is not None:
            _carry_moments(trainer, self.optimizer, scales, without=new)
        _go_on_from(self.source, trainer, self.out)
        facts = self.source.facts
        switch = Switch(
            step=facts.steps,
            tokens=facts.tokens,
            seconds=facts.seconds,
            flops_per_token=self.source.flops[1],
            **losses,
            branch_errors=errors,
            fit_seconds=round(fit_seconds, 1),
        )
        if is_main():
            switch.write(self.out / records.SWITCH)


def _go_on_from(source: Run, trainer: GroupedTrainer, out: Path) -> None:
    """Give the run at `out` the clock and metrics.jsonl of its source."""
    trainer.clock.before = source.facts.seconds
    if is_main():
        checkpoints.write_text(out / records.METRICS, (source.directory / records.METRICS).read_text())


def _carry_moments(trainer: GroupedTrainer, file: Path, scales: dict[str, Tensor], without: Sequence[str]) -> None:
    """Load the source's optimizer state, for a model with the same parameters in the same order."""
    optimizer = trainer.create_optimizer()
    kept = torch.load(file, map_location="cpu", weights_only=True)
    now = optimizer.state_dict()
    sizes = [[len(group["params"]) for group in state["param_groups"]] for state in (kept, now)]
    assert sizes[0] == sizes[1]
    optimizer.load_state_dict(now | {"state": kept["state"]})  # groups have the new learning rate
    names = {id(parameter): name for name, parameter in trainer.causal_lm.named_parameters()}
    rescale_moments(optimizer, names, scales)
    for parameter in [p for p in optimizer.state if names[id(p)] in without]:
        del optimizer.state[parameter]
