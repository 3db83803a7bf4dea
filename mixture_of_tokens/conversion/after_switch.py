"""What a run after a switch begins with: weights, moments of Adam, the clock and the rows of its source."""

import copy
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from mixture_of_tokens.conversion.distil import distil
from mixture_of_tokens.conversion.switch import Errors, Scales, rescale_moments, sparse_layers, to_token_choice
from mixture_of_tokens.data.groups import training_groups
from mixture_of_tokens.data.prepare import Prepared
from mixture_of_tokens.evaluation.losses import evaluated_groups, label_of_groups
from mixture_of_tokens.layers.token_choice import TokenChoice
from mixture_of_tokens.models.companions import calibrate_companions
from mixture_of_tokens.models.forward_hooks import serving_alone
from mixture_of_tokens.models.modeling import MixtureOfTokensForCausalLM
from mixture_of_tokens.parallel.optimizer_state import load_optimizer
from mixture_of_tokens.parallel.sharding import whole
from mixture_of_tokens.runs import checkpoints, records
from mixture_of_tokens.runs.loading import load_model
from mixture_of_tokens.runs.records import Switch, Transition
from mixture_of_tokens.runs.run import Run
from mixture_of_tokens.training.trainer import RunTrainer
from mixture_of_tokens.utils import manifest
from mixture_of_tokens.utils.files import write_text
from mixture_of_tokens.utils.process import is_main
from mixture_of_tokens.utils.progress import say


def begin_switched(
    source: Run, asked: Transition, optimizer: Path | None, out: Path, trainer: RunTrainer, prepared: Prepared
) -> None:
    """Give the trainer of the new run, at `out`, all that it begins with; `optimizer` is a checkpoint's, or None."""
    with whole(trainer.causal_lm) as target:
        switch, scales, new = _switched(source, asked, trainer, prepared, target)
    if optimizer is not None:
        carry_moments(trainer, optimizer, scales, without=new)
    go_on_from(source, trainer, out)
    if is_main():
        switch.write(out / records.SWITCH)


def _switched(
    source: Run, asked: Transition, trainer: RunTrainer, prepared: Prepared, target: MixtureOfTokensForCausalLM
) -> tuple[Switch, Scales, list[str]]:
    """Give the target its weights. Also returns the weights that Adam has to begin anew with."""
    say("Measuring losses before the switch and at it")
    model = load_model(str(source.directory), device="cpu").to(target.device)
    size = trainer.rows.group_size
    groups = list(training_groups(prepared.train, size))
    order, _ = evaluated_groups(trainer.evaluated, size, trainer.groups_at_once)  # of `trainer.loss_of`
    started = time.perf_counter()
    calibrate_companions(model, groups)
    fit_seconds = time.perf_counter() - started
    losses = {"source_in_groups": trainer.loss_of(model)}
    with serving_alone(model):
        losses["source_alone"] = trainer.loss_of(model)
    scales = to_token_choice(model, target)
    losses["plain_switch"] = trainer.loss_of(target)
    errors: Errors = {}
    new: list[str] = []
    started = time.perf_counter()
    if asked.distil_steps is not None:
        # In bf16 the layers would end a sixth further from the source's.
        fitted = target if torch.finfo(target.dtype).bits >= 32 else copy.deepcopy(target).float()
        errors = distil(model.to(fitted.dtype), fitted, prepared.train, steps=asked.distil_steps)
        if fitted is not target:
            target.load_state_dict(fitted.state_dict())
        layers = [f"model.layers.{i}.mlp." for i, _ in sparse_layers(target, TokenChoice)]
        new = [name for name, _ in target.named_parameters() if name.startswith(tuple(layers))]
    fit_seconds += time.perf_counter() - started
    losses["at_the_switch"] = trainer.loss_of(target)
    facts = source.facts
    switch = Switch(
        step=facts.steps,
        tokens=facts.tokens,
        seconds=facts.seconds,
        flops_per_token=source.flops,
        **losses,
        branch_errors=errors,
        fit_seconds=0.0 if asked.calibrate == "none" else round(fit_seconds, 1),
        groups=label_of_groups(order.reshape(-1, model.config.group_size)),
    )
    return switch, scales, new


def go_on_from(source: Run, trainer: RunTrainer, out: Path) -> None:
    """Give the run at `out` the clock and metrics.jsonl of its source."""
    trainer.clock.before = source.facts.seconds
    last = checkpoints.at(source.directory, source.config.steps)
    if source.config.part_bytes is not None and last.is_dir() and manifest.fault(last) is None:
        trainer.rows.go_on_from(manifest.read(last))  # it need not count the rows of the parts behind it
    if is_main():
        write_text(out / records.METRICS, (source.directory / records.METRICS).read_text())


def carry_moments(trainer: RunTrainer, moments: Path, scales: Scales, without: Sequence[str]) -> None:
    """Load the source's optimizer state, for a model with parameters of the same names."""
    optimizer = trainer.create_optimizer()
    groups = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    load_optimizer(trainer.causal_lm, optimizer, moments)
    for group, own in zip(optimizer.param_groups, groups, strict=True):
        group.update(own)  # such as the new learning rate
    names = {id(parameter): name for name, parameter in trainer.causal_lm.named_parameters()}
    rescale_moments(optimizer, names, scales)
    for parameter in [p for p in optimizer.state if names[id(p)] in without]:
        del optimizer.state[parameter]
