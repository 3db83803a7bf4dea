"""What a run was asked to do."""

from typing import Any, TypeGuard

from mixture_of_tokens.data.prepare import Prepared, prepare
from mixture_of_tokens.model.config import MixtureOfTokensConfig

COMMON_GROUP = 32
# Fields of TrainingArguments that say how a run is carried out, not what it computes; a resumed run may change them.
CARRIED_OUT = ("dataloader_", "gradient_accumulation_steps", "per_device_eval_batch_size", "report_to", "save_", "ddp_")
DERIVED = ("transformers_version", "mlp_only_layers")  # fields of a model's configuration that are not written


def check_seed(seed: int) -> None:
    """Raises ValueError for a seed that numpy would not take."""
    if not 0 <= seed < 2**32:
        raise ValueError(f"--seed must be 0 to {2**32 - 1}, not {seed}")


def is_configuration(written: Any) -> TypeGuard[dict[str, Any]]:
    """Whether this, read from a config.yaml, is what `merge` gives."""
    nested = isinstance(written, dict) and all(isinstance(written.get(key), dict) for key in ("model", "training"))
    return nested and isinstance(written.get("name"), str)


def data_group_size(group_size: int, batch_size: int) -> int:
    """Rows in a group of the data of a model with this group size.

    COMMON_GROUP where it can be: systems that mix none or fewer see the same groups as the others.
    """
    return COMMON_GROUP if COMMON_GROUP % group_size == batch_size % COMMON_GROUP == 0 else group_size


def prepared_data(run: dict[str, Any], config: MixtureOfTokensConfig) -> Prepared:
    """The text of a run, as config.yaml has its settings, before any of the configuration is fitted to a tokenizer."""
    return prepare(
        run["data"],
        field=run["field"],
        max_bytes=run["max_bytes"],
        vocab_size=config.vocab_size if run["tokenizer"] is None else run["model"].get("vocab_size"),
        context=config.max_position_embeddings,
        tokenizer=run["tokenizer"],
        group_size=data_group_size(config.group_size, run["batch_size"]),
    )
