"""How a run is configured: the recipe of its size (`settings/recipes.py`), overridden by options, and checked."""

import math
import os
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from transformers import TrainingArguments

from mixture_of_tokens.data.tokenizer import check_vocab_size
from mixture_of_tokens.models.config import MixtureOfTokensConfig
from mixture_of_tokens.models.fields import config_of, names_the_flag
from mixture_of_tokens.models.modeling import MixtureOfTokensForCausalLM
from mixture_of_tokens.models.names import FIELDS, other_sizes
from mixture_of_tokens.parallel.placement import Placement, check_device
from mixture_of_tokens.runs.preconditions import check_seed
from mixture_of_tokens.runs.records import DERIVED, RunConfig, Start, Transition
from mixture_of_tokens.settings.layers import LATER
from mixture_of_tokens.settings.names import Name, parse_name
from mixture_of_tokens.settings.options import Options
from mixture_of_tokens.settings.recipes import FROM_ELSEWHERE, LEARNING_RATES, OF_A_START, RECIPES, TRAINING, Recipe
from mixture_of_tokens.settings.routings import SETTINGS
from mixture_of_tokens.settings.training import FIXED
from mixture_of_tokens.training.arguments import check_environment, check_here, try_out
from mixture_of_tokens.utils.checks import check_number
from mixture_of_tokens.utils.formatting import enumerated, in_words
from mixture_of_tokens.utils.process import by_itself, process_count, the_only_training
from mixture_of_tokens.utils.progress import warn_once

RECOMMENDED = ("learning_rate", "batch_size", "steps", "scored_rows")  # options that a name has a default for
SHORT = 100  # steps: of a run of fewer, the evaluations of a longer one would take most of the time
FEWEST_SCORED = 128  # rows, of a short run
# Attention that reads documents off positions. Flash attention of transformers does so in batches of one row alone.
APART = (None, "eager", "sdpa", "flex_attention")


class Merged(NamedTuple):
    """A run's configuration, and how it is carried out: keywords of TrainingArguments, and where the weights lie.

    unread: settings that were given and that the model does not read, by the flag; `config` does not have them.
    """

    config: RunConfig
    arguments: dict[str, Any]
    placement: Placement
    unread: dict[str, str]


def merge(
    name: str,
    seed: int,
    learning_rate: float | None,
    options: Options,
    *,
    first_step: int = 0,
    transition: Transition | None = None,
    start: Start | None = None,
    minutes: float | None = None,
) -> Merged:
    """A name's recipe, overridden by the options and checked.

    Args:
        first_step, transition: of a run that continues another; start: of one that begins with a trained model.
        minutes: for which the options' steps and rows that are scored were found.

    Raises ValueError for invalid settings.
    """
    check_environment()
    options.check_single()
    parsed = parse_name(name)
    name, size = str(parsed), parsed.size  # /1 is left out
    config, overrides = _model_of(name, options), options.model
    steps, batch_size, learning_rate = _amounts(parsed, learning_rate, options, start)
    positive = {"steps": steps, "batch-size": batch_size, "learning-rate": learning_rate}
    positive |= {"max-bytes": options.max_bytes, "part-bytes": options.part_bytes}
    positive |= {"scored-rows": options.scored_rows}
    if transition is not None and steps == 0:
        del positive["steps"]
    _check(positive, seed=seed, batch_size=batch_size, group_size=config.group_size)
    if options.part_bytes is not None and options.max_bytes is not None:
        raise ValueError("--max-bytes is for text that is prepared at once; with --part-bytes name fewer files")
    check_device(options.device)
    on_cpu = options.device == "cpu" or not torch.cuda.is_available()  # Apple's GPUs have no float64, which this needs
    if on_cpu and overrides.get("attn_implementation") == "flex_attention":
        what = "has no backward pass on a CPU; legal there are eager and sdpa"
        raise ValueError(f"--model.attn_implementation flex_attention {what}")
    if "/" in str(attention := overrides.get("attn_implementation")):  # which transformers would load, and run
        raise ValueError(f"--model.attn_implementation {attention}: a configuration names no code on the Hub")
    if options.separate_documents and attention not in APART:
        what = f"takes the documents of a row for one; with --separate-documents {enumerated(APART[1:])} are legal"
        raise ValueError(f"--model.attn_implementation {attention} {what}")
    micro_batch, training = _training_fields(options.training, _recipe(size), steps, batch_size, config.group_size)
    training.setdefault("dataloader_pin_memory", not on_cpu)
    run = RunConfig(
        name=name,
        seed=seed,
        steps=steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        data=options.data,
        field=options.field,
        max_bytes=options.max_bytes,
        part_bytes=options.part_bytes,
        tokenizer=options.tokenizer,
        near_duplicates=options.near_duplicates,
        separate_documents=options.separate_documents,
        scored_rows=options.scored_rows or (None if minutes or first_step else _of_a_short_run(steps, batch_size)),
        minutes=minutes,
        evaluate_on=options.evaluate_on or "validation",
        training=training,
        model=_written(config, overrides, own_tokenizer=options.tokenizer is not None),
        micro_batch=micro_batch,
        first_step=first_step,
        transition=transition,
        start=start,
    )
    with names_the_flag(name, overrides), torch.device("meta"):  # invalid fields are reported before the run starts
        MixtureOfTokensForCausalLM(config)
    placement = Placement.of(options.shard, options.replicate, options.expert_parallel, process_count())
    placement.check(config, on_cpu=on_cpu)
    # Of 0 steps, which are not trained, Trainer could make no schedule. Not TF32, which a compiled model's Trainer else
    # turns on for the whole process: routers are in fp32.
    taken = {"max_steps": max(1, steps), "seed": seed, "learning_rate": learning_rate, "use_cpu": on_cpu}
    taken |= {"per_device_train_batch_size": micro_batch, "tf32": False}
    _check_training(taken | training, on_cpu)
    kept = run.with_effect()
    anyway = kept.model_config.to_dict()
    unread = {f"--model.{key}": key for key in SETTINGS if key in run.model and run.model[key] != anyway[key]}
    return Merged(kept, taken | training, placement, unread)


def chosen_in(entries: dict[str, Any]) -> dict[str, Any]:
    """A run's config.yaml without what its name and steps give by themselves: for another name, or other steps."""
    name, steps = str(entries["name"]), entries.get("steps")
    with by_itself():
        plain = merge(name, 0, None, Options(steps=steps if type(steps) is int else None)).config
    own, chosen = plain.as_read(), dict(entries)
    if type(steps) is int and type(rows := entries.get("batch_size")) is int:
        own["scored_rows"] = _of_a_short_run(steps, rows)
    own["steps"] = _recipe(parse_name(name).size).steps
    own["training"]["per_device_eval_batch_size"] = entries.get("micro_batch")  # its default
    for kind in ("training", "model"):
        if isinstance(given := entries.get(kind), dict):
            chosen[kind] = {field: value for field, value in given.items() if value != own[kind].get(field, ...)}
    if isinstance(model := chosen.get("model"), dict):
        chosen["model"] = _without_what_follows(name, model)
    return {key: value for key, value in chosen.items() if key not in RECOMMENDED or value != own[key]}


def _without_what_follows(name: str, model: dict[str, Any]) -> dict[str, Any]:
    """Fields of the model without those that the others give, such as the kinds of its blocks by their number."""
    for field in tuple(model):
        others = {other: value for other, value in model.items() if other != field}
        with suppress(ValueError):
            if (
                _written(_model_of(name, Options(model=others)), others, own_tokenizer=False).get(field, ...)
                == model[field]
            ):
                model = others
    return model


def check_settings(*runs: Merged) -> None:
    """Raises ValueError for a setting that no model of these runs reads, but with the value that it has anyway.

    `merge` does not: a comparison's models have their settings in common, and `mot transition` takes its source's.
    """
    names = ", ".join(dict.fromkeys(run.config.name for run in runs))
    read = set().union(*(run.config.reads for run in runs))
    for run in runs:
        for flag, field in run.unread.items():
            if field not in read:
                raise ValueError(f"{flag} would do nothing in {names}; it is of {', '.join(SETTINGS[field])}")
    for run in runs:
        if sizes := other_sizes(run.config.name, run.config.model_config):
            what = ", ".join(f"{field} is {own}, not {named}" for field, (own, named) in sizes.items())
            warn_once(f"{run.config.name} keeps its name, but {what}; a report shows that in brackets")


def _written(config: MixtureOfTokensConfig, overrides: Mapping[str, Any], *, own_tokenizer: bool) -> dict[str, Any]:
    """Fields of the model, as a run records them."""
    written = config.to_diff_dict() | {"num_experts": config.num_experts}  # upstream writes it under another name
    if "attn_implementation" in overrides:  # which upstream does not write
        written["attn_implementation"] = overrides["attn_implementation"]
    if own_tokenizer and "vocab_size" not in overrides:
        written["vocab_size"] = None  # the tokenizer's
    # Null is a value here: with capacity null nothing is dropped. A null vocabulary is the default.
    nothing = {field for field, value in overrides.items() if value is None} - {"vocab_size"}
    written = {field: value for field, value in written.items() if value is not None or field in nothing}
    left_out = {*DERIVED, *(field for field, value in LATER.items() if written.get(field) == value)}
    return {field: value for field, value in written.items() if field in FIELDS and field not in left_out}


def _check_training(arguments: Mapping[str, Any], on_cpu: bool) -> None:
    """Raises ValueError where Trainer does not take them, or something else would fail only later."""
    with the_only_training():
        try:  # also before it starts
            made = TrainingArguments(output_dir=os.devnull, **arguments)
        except Exception as error:
            raise ValueError(f"--training: {in_words(error)}") from error
    if made.fp16 and on_cpu:
        raise ValueError("--training.fp16 needs a GPU; --training.bf16 does not")
    try_out(made)


def _model_of(name: str, options: Options) -> MixtureOfTokensConfig:
    """A name's configuration with the options' fields. Raises ValueError where they are no model."""
    config = config_of(name, options.model)
    if options.tokenizer is None:
        with names_the_flag(name, options.model):
            check_vocab_size(config.vocab_size)
    return config


def _amounts(name: Name, learning_rate: float | None, options: Options, start: Start | None) -> tuple[int, int, float]:
    """Steps, rows a step and peak rate: those of the options, or the recipe's."""
    recipe, steps = _recipe(name.size), options.steps
    batch_size = name.dimensions.batch if options.batch_size is None else options.batch_size
    if steps is None:
        before = None if start is None else start.origin_steps
        steps = recipe.steps if before is None else max(1, before // 4)
    if learning_rate is None:
        learning_rate = LEARNING_RATES.get((name.size, name.system), recipe.learning_rate)
        if start is not None:
            # What was a dense model goes on by a rate of that, whichever sparse model it has become.
            learning_rate = OF_A_START[start.kind] * (recipe.learning_rate if start.kind == "copies" else learning_rate)
    return steps, batch_size, learning_rate


def _recipe(size: str) -> Recipe:
    return RECIPES.get(size, FROM_ELSEWHERE)


def _of_a_short_run(steps: int, batch_size: int) -> int | None:
    """Rows to score: all evaluations, ten at most and the last, have about as many as the run; None of a longer one."""
    return max(FEWEST_SCORED, steps * batch_size // (min(steps, 10) + 1)) if steps < SHORT else None


def _check(positive: dict[str, float | None], *, seed: int, batch_size: int, group_size: int) -> None:
    check_seed(seed)
    for what, value in positive.items():
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"--{what} must be positive, not {value}")
        if what not in ("max-bytes", "part-bytes"):
            check_number(f"--{what}", value)
    if batch_size % group_size:
        low = batch_size // group_size * group_size
        legal = " or ".join(str(n) for n in (low, low + group_size) if n)
        raise ValueError(
            f"a batch of {batch_size} is no multiple of the group size {group_size}; {legal} would be, by --batch-size"
        )


def _training_fields(
    given: Mapping[str, Any], recipe: Recipe, steps: int, batch_size: int, group_size: int
) -> tuple[int, dict[str, Any]]:
    """Rows of a micro-batch, and fields of TrainingArguments: our defaults, overridden by the user's."""
    check_here(given)
    rows = given.get("per_device_eval_batch_size", group_size)
    if rows < 1 or rows % group_size:
        raise ValueError(
            f"--training.per_device_eval_batch_size {rows} must be a multiple of the group size, {group_size}"
        )
    kind = given.get("lr_scheduler_type", TRAINING["lr_scheduler_type"])
    parts = given.get("gradient_accumulation_steps", 1) * process_count()
    micro_batch, rest = divmod(batch_size, parts)
    if rest or micro_batch % group_size or not micro_batch:
        raise ValueError(
            f"a batch of {batch_size} rows does not split into {parts} parts (processes x accumulation) that are "
            f"multiples of the group size {group_size}; give a multiple of {group_size * parts} as --batch-size"
        )
    return micro_batch, {
        "per_device_eval_batch_size": micro_batch,
        **TRAINING,
        "lr_scheduler_kwargs": {"min_lr_rate": 0.1} if "min_lr" in kind else None,
        "warmup_steps": 0 if kind == "constant" else min(recipe.warmup_steps, steps // 10),
        "logging_steps": max(1, min(20, steps // 20)),
        "eval_steps": max(1, min(recipe.eval_every, steps // 10)),
        "save_steps": max(1, min(recipe.save_every, steps // 3)),
        **FIXED,
        **given,
    }
