"""What a run begins with in place of drawn weights: a finished run, or what `mot upcycle` wrote."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mixture_of_tokens.models.config import MixtureOfTokensConfig
from mixture_of_tokens.models.names import FIELDS
from mixture_of_tokens.runs import records
from mixture_of_tokens.runs.loading import model_directory
from mixture_of_tokens.runs.records import RunConfig, Start
from mixture_of_tokens.runs.run import Run, read_run
from mixture_of_tokens.runs.typed import JsonFile
from mixture_of_tokens.settings.routings import SETTINGS
from mixture_of_tokens.utils.files import no_directory

UPCYCLED = "upcycled.json"
# Fields of a run's configuration that say what text it reads, and in what batches.
TEXT = ("data", "field", "max_bytes", "part_bytes", "tokenizer", "near_duplicates", "separate_documents", "batch_size")
# Fields of a model's configuration that are not a start's to say: how it is stored, and what the tokenizer knows.
NOT_OF_A_START = (*records.DERIVED, "dtype", "bos_token_id", "eos_token_id", "pad_token_id", "use_cache")
NOT_OF_A_START += ("output_router_logits", "attn_implementation")


@dataclass(frozen=True, kw_only=True)
class Upcycled(Start, JsonFile):
    """How `mot upcycle` made a model: upcycled.json beside it.

    Beside the fields of `Start`, whose source is here as it was given, name: of the model.
    source_loss, loss: of the source and of the model, over `scored_tokens` tokens of `scored`.
    largest_load: of the tokens, that a copy of the experts has, over an even share; 0 of a dense model.
    seed: of what is new; text: of a run, as of `text_of_run`.
    """

    name: str
    source_loss: float
    loss: float
    scored: str
    scored_tokens: int
    largest_load: float
    seed: int
    text: dict[str, Any] | None = None


@dataclass(frozen=True)
class Beginning:
    """A model to begin a run with.

    directory: of its weights; name: that it has as a model; fields: of its configuration, by which it is made again.
    text: of the run that it comes from, as of `text_of_run`; None of models from elsewhere.
    """

    directory: Path
    name: str
    fields: dict[str, Any]
    start: Start
    text: dict[str, Any] | None

    def fields_with(self, tokenizer: str | None) -> dict[str, Any]:
        """`fields` in a run with a tokenizer, or that trains one again on the text of the source."""
        if tokenizer is not None or self.text is None:
            return self.fields
        return self.fields | {"vocab_size": self.text["vocab_size"]}


def beginning_of(source: str | Path) -> Beginning:
    """Raises ValueError for what is neither a finished run nor written by `mot upcycle`, or is damaged."""
    source = Path(source)
    if (source / UPCYCLED).is_file():
        directory, made = Path(model_directory(str(source))), Upcycled.read(source / UPCYCLED)
        known = {key: getattr(made, key) for key in ("kind", "origin", "origin_seed", "origin_steps", "rows")}
        start = Start(source=str(source.resolve()), **known)
        return Beginning(directory, made.name, _fields(directory), start, made.text)
    if not source.exists():
        raise ValueError(f"--from {source}: {no_directory(source)}")
    if not (source / records.FACTS).is_file():
        what = (
            "a model from elsewhere becomes one of this library by mot upcycle, also as it is, by the name Transformer"
        )
        raise ValueError(f"--from {source} is no finished run, and mot upcycle did not write it: {what}")
    run, directory = read_run(source), Path(model_directory(str(source)))
    start = Start(source=str(source.resolve()), kind="continued", **origin_of(run))
    return Beginning(directory, run.name, _fields(directory), start, text_of_run(run.config))


def origin_of(run: Run) -> dict[str, Any]:
    """Fields of the `Start` of what begins with a run; its rows are counted with those before it."""
    before = 0 if run.config.start is None else run.config.start.rows
    rows = before + run.config.last_step * run.config.batch_size
    return {"origin": run.name, "origin_seed": run.seed, "origin_steps": run.config.last_step, "rows": rows}


def began_with(run: Run, other: Run) -> bool:
    """Whether a run began with what another ended with, or with what was made of that."""
    start = run.config.start
    return start is not None and all(getattr(start, key) == value for key, value in origin_of(other).items())


def text_of_run(config: RunConfig) -> dict[str, Any]:
    """Fields of a run's configuration, `TEXT`, and the vocabulary that it asked for."""
    return {key: getattr(config, key) for key in TEXT} | {"vocab_size": config.model_config.vocab_size}


def _fields(directory: Path) -> dict[str, Any]:
    """Of the saved configuration, as it says what model this is."""
    config = MixtureOfTokensConfig.from_pretrained(directory)
    fields = config.to_diff_dict() | {"num_experts": config.num_experts}  # upstream writes it under another name
    read = {field for routing in config.routings for field in routing.settings}
    left_out = {*NOT_OF_A_START, *(SETTINGS.keys() - read)}
    return {key: value for key, value in fields.items() if key in FIELDS and key not in left_out}
