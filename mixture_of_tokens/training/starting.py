"""A run that begins with trained weights: `mot train --from`."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from mixture_of_tokens.data.prepare import Prepared
from mixture_of_tokens.data.tokenizer import hash_of, load_tokenizer
from mixture_of_tokens.models.companions import forget_companions
from mixture_of_tokens.parallel.sharding import whole
from mixture_of_tokens.runs import records
from mixture_of_tokens.runs.loading import load_model
from mixture_of_tokens.runs.records import MetricsRow
from mixture_of_tokens.runs.warm_start import TEXT, Beginning, beginning_of
from mixture_of_tokens.settings.layers import OF_TRAINING
from mixture_of_tokens.settings.names import parse_name
from mixture_of_tokens.settings.options import DEFAULTS, Options
from mixture_of_tokens.training.merging import Merged, merge
from mixture_of_tokens.training.trainer import RunTrainer
from mixture_of_tokens.utils.formatting import enumerated
from mixture_of_tokens.utils.process import is_main
from mixture_of_tokens.utils.progress import warn_once

# Fields of a model that a run may choose anew; all others decide what its weights are, or what it computes of them.
FREE = (*OF_TRAINING, "attention_dropout", "max_position_embeddings")
LONGEST = 1024  # tokens in a row, of a model from elsewhere that takes more


def begun(name: str | None, start: str | Path | None) -> tuple[str, Beginning | None]:
    """The model's name, and what it begins with. Raises ValueError for no name, or another than that of the start."""
    if start is None:
        if name is None:
            raise ValueError("NAME is missing, such as MoT-Nano/32E/8; without it, --from begins with a trained model")
        return str(parse_name(name)), None
    beginning = beginning_of(start)
    if name is not None and str(parse_name(name)) != beginning.name:
        raise ValueError(f"{name} is not what --from begins with: that is {beginning.name}, and need not be named")
    return beginning.name, beginning


def merged_with(
    beginning: Beginning | None, name: str, seed: int | None, learning_rate: float | None, options: Options, **own: Any
) -> Merged:
    """As `merge`, of a run that begins with something or anew; by default the seed is that of the beginning, or 0.

    Raises ValueError also for settings with which the trained weights are another model's.
    """
    if beginning is None:
        return merge(name, seed or 0, learning_rate, options, **own)
    seed = beginning.start.origin_seed or 0 if seed is None else seed
    merged = merge(name, seed, learning_rate, options_with(beginning, options), start=beginning.start, **own)
    check_same_model(beginning, merged)
    return merged


def options_with(beginning: Beginning, options: Options) -> Options:
    """The options with the model of a beginning and, unless other text is named, with the text of its run.

    Raises ValueError for another tokenizer than the model's.
    """
    source = beginning.start.source
    if options.tokenizer not in (None, str(beginning.directory)):
        raise ValueError(f"--tokenizer {options.tokenizer}: the model of --from {source} has its own")
    own: dict[str, Any] = {"tokenizer": str(beginning.directory)}
    if beginning.text is not None and not options.data:
        own = {key: beginning.text[key] for key in TEXT if getattr(options, key) == getattr(DEFAULTS, key)}
    fields = dict(beginning.fields_with(own.get("tokenizer")))
    if beginning.text is None:
        longest = fields["max_position_embeddings"]
        if longest > LONGEST and "max_position_embeddings" not in options.model:
            fields["max_position_embeddings"] = LONGEST
            how = "--model.max_position_embeddings N gives others"
            warn_once(f"rows have {LONGEST:,} tokens, of the {longest:,} that the model takes; {how}")
    return replace(options, **own, model=fields | options.model)


def check_same_model(beginning: Beginning, merged: Merged) -> None:
    """Raises ValueError where fields were given with which the trained weights are another model's."""
    for field, value in beginning.fields_with(merged.config.tokenizer).items():
        if field not in FREE and (now := getattr(merged.config.model_config, field)) != value:
            raise ValueError(
                f"--model.{field} {now}: the model of --from {beginning.start.source} has {value}; "
                f"of its fields {enumerated(FREE)} can be chosen"
            )


def begin_with(beginning: Beginning, out: Path, trainer: RunTrainer, prepared: Prepared) -> None:
    """Give the trainer of the new run, at `out`, its weights, and write down their loss as that of step 0.

    Raises ValueError where the text was prepared with another tokenizer than the model's.
    """
    source = beginning.start.source
    if hash_of(load_tokenizer(str(beginning.directory))) != hash_of(prepared.tokenizer):
        what = "a tokenizer trained on the text as it is now is not the model's"
        raise ValueError(f"the text of {source} has changed: {what}; put it back, or name text with --data")
    with whole(trainer.causal_lm) as target:
        target.load_state_dict(load_model(str(beginning.directory), device="cpu").state_dict())
    forget_companions(trainer.causal_lm)  # as in all evaluations during training
    if trainer.args.eval_strategy == "no":
        return
    loss = trainer.loss_of(trainer.causal_lm)
    if is_main():
        row = MetricsRow(step=0, tokens=0, seconds=0.0, tokens_per_second=0, eval_loss=loss)
        (out / records.METRICS).write_text(row.line())
