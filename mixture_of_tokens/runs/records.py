"""The files of a run directory as typed records: config.yaml, run.json, switch.json, the rows of metrics.jsonl."""

import json
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Self

from transformers import TrainingArguments

from mixture_of_tokens.data.prepare import COMMON_GROUP, Prepared, prepare_text
from mixture_of_tokens.data.streaming import Parts
from mixture_of_tokens.models.config import MixtureOfTokensConfig
from mixture_of_tokens.models.names import config_from_name
from mixture_of_tokens.runs.typed import FORMAT, JsonFile, Record, is_a, without_format
from mixture_of_tokens.settings.routings import SETTINGS
from mixture_of_tokens.utils import yaml12
from mixture_of_tokens.utils.formatting import finite

SAMPLE_PROMPT = "def "  # what a run's sample continues
CONFIG, FACTS, SWITCH, METRICS = "config.yaml", "run.json", "switch.json", "metrics.jsonl"
FULL = "full groups"
IN_GROUPS, ALONE, ALONE_BY_FEW = "in_groups", "alone", "alone_by_few"  # ways to serve texts, as keys of losses
# Fields of TrainingArguments that decide how a run is carried out, not what it computes; a resumed run may change them.
CARRIED_OUT = ("dataloader_", "gradient_accumulation_steps", "per_device_eval_batch_size", "report_to", "save_", "ddp_")
CARRIED_OUT += ("gradient_checkpointing", "activation_checkpointing", "run_name", "log_level")
# TrainingArguments' defaults, by their key in `identity`.
OF_TRAINING = {f"training.{field.name}": field.default for field in fields(TrainingArguments)}
MAY_MOVE = ("data", "tokenizer", "transition.source", "start.source")  # paths, of which a resumed run may name others
# Fields of runs by earlier versions, which tell those apart; this one sets none of them, and writes those that are set.
RETIRED = ("anneal_temperature_to", "control", "anneal")
# Fields of a model's configuration that are not written: they follow from others, or nothing reads them.
DERIVED = ("transformers_version", "mlp_only_layers", "decoder_sparse_step", "initializer_range")


@dataclass(frozen=True, kw_only=True)
class Transition(Record):
    """Flags of the `mot transition` that made a run, and `RETIRED` ones; `source` is the run that it continues."""

    source: str
    calibrate: str
    optimizer: str
    control: str | None = None
    anneal: float | None = None
    distil_steps: int | None = None
    source_minutes: float | None = None  # that its steps were found for, as `minutes` of a run's configuration


@dataclass(frozen=True, kw_only=True)
class Start(Record):
    """What a run began with in place of drawn weights (`--from`).

    source: a run directory, or what `mot upcycle` wrote.
    kind: "continued", the model itself, or "copies", whose experts are slices of copies of a dense feed-forward.
    origin, origin_seed, origin_steps: the trained model that it all comes from: its name, and of a run of this library
        its seed and its steps.
    rows: of the text that have been trained on before this run; it goes on after them.
    """

    source: str
    kind: str
    origin: str
    origin_seed: int | None = None
    origin_steps: int | None = None
    rows: int = 0


@dataclass(frozen=True, kw_only=True)
class RunConfig(Record):
    """The configuration of a run: config.yaml. `str` gives the file's text.

    training, model: fields of transformers' TrainingArguments, and of the model's configuration.
    micro_batch: rows that a device takes at once.
    scored_rows: of the split, at the end and at most during training; None: all, and as many as usual.
    minutes: the budget that the number of steps was found for.
    first_step, transition: of a run that continues another one; its steps count on from there.
    start: of a run that begins with a trained model, and counts its steps from 0.
    anneal_temperature_to: one of `RETIRED`.
    """

    name: str
    seed: int
    steps: int
    batch_size: int
    learning_rate: float
    anneal_temperature_to: float | None = None
    data: list[str]
    field: str
    max_bytes: int | None
    tokenizer: str | None
    evaluate_on: str
    training: dict[str, Any]
    model: dict[str, Any]
    micro_batch: int
    first_step: int = 0
    part_bytes: int | None = None
    near_duplicates: str = "drop"
    separate_documents: bool = False
    scored_rows: int | None = None
    minutes: float | None = None
    transition: Transition | None = None
    start: Start | None = None

    @classmethod
    def read(cls, file: Path) -> Self:
        """Raises ValueError, naming the file, for what is no configuration of a run."""
        return cls.of(without_format(yaml12.read(file), file), file)

    @classmethod
    def of(cls, written: Any, file: Path) -> Self:
        if isinstance(written, dict):
            parts = {"transition": Transition, "start": Start}
            given = {key: kind.of(written[key], file) for key, kind in parts.items() if written.get(key) is not None}
            written = written | given
        return super().of(written, file)

    def check(self, file: Path) -> None:
        try:
            self.identity()
        except Exception as error:  # transformers has its own for wrong fields of a model
            raise ValueError(f"{file} describes no model: {' '.join(str(error).split())}") from None

    @property
    def directory_name(self) -> str:
        """Of its run directory, where no other is asked for."""
        return f"{self.name.replace('/', '-')}-seed{self.seed}"

    def __str__(self) -> str:
        return yaml12.dump({"format": FORMAT} | self.written())

    def written(self) -> dict[str, Any]:
        """The fields of the file."""
        return asdict(self, dict_factory=lambda own: {k: v for k, v in own if v is not None or k not in RETIRED})

    def as_read(self) -> dict[str, Any]:
        """The fields of the file as they would be read again: no tuples."""
        return json.loads(json.dumps(asdict(self), default=str))

    def to_json(self) -> str:
        return json.dumps({"format": FORMAT} | self.written(), indent=2)

    def of_training(self, field: str) -> Any:
        """A field of TrainingArguments; transformers' default where the file lacks it."""
        return self.training.get(field, OF_TRAINING[f"training.{field}"])

    @cached_property
    def model_config(self) -> MixtureOfTokensConfig:
        """The model's configuration, before its vocabulary is fitted to a tokenizer."""
        return config_from_name(self.name, **self.model)

    @property
    def reads(self) -> set[str]:
        """The fields of `SETTINGS` that the model reads."""
        return {field for routing in self.model_config.routings for field in routing.settings}

    def with_effect(self) -> Self:
        """Without settings that the model does not read."""
        unread = SETTINGS.keys() - self.reads
        read = {key: value for key, value in self.model.items() if key not in unread}
        return replace(self, model=read)

    @property
    def group_size(self) -> int:
        """Rows in a group of the data.

        COMMON_GROUP where possible, so that systems that mix fewer rows, or none, train on the same groups.
        """
        own = self.model_config.group_size
        return COMMON_GROUP if COMMON_GROUP % own == self.batch_size % COMMON_GROUP == 0 else own

    @property
    def last_step(self) -> int:
        return self.first_step + self.steps

    def identity(self) -> dict[str, Any]:
        """The fields that decide what the run computes, without those of how it is carried out.

        A resumed run must have the same ones; the runs of one model differ in the seed alone.
        """
        flat: dict[str, Any] = {}
        for key, value in self.with_effect().as_read().items():
            if key in ("training", "model", "transition", "start"):
                fields_of = (value or {}).items()
                flat |= {f"{key}.{field}": inner for field, inner in fields_of if not _carried_out(key, field)}
            elif key not in ("micro_batch", "minutes"):  # it is the steps that decide
                flat[key] = value
        return flat

    def conditions(self) -> dict[str, Any]:
        """What runs have to share to be compared, by the flag that sets it."""
        whole = -(-self.batch_size // COMMON_GROUP) * COMMON_GROUP
        batch = "" if whole == self.batch_size else f"--batch-size {whole} or "
        before = 0.0 if self.transition is None else self.transition.source_minutes or 0.0
        return {
            "--evaluate-on": self.evaluate_on,
            "--model.max_position_embeddings": self.model_config.max_position_embeddings,
            "--batch-size": self.batch_size,
            "--steps": self.last_step if self.minutes is None else f"those of {self.minutes + before:g} minutes",
            "--scored-rows": self.scored_rows,
            f"the size of their groups ({batch}--model.group_size N gives all the same batches)": self.group_size,
        }

    def prepare(self) -> Prepared:
        """The text of the run; of one in parts the first."""
        if self.parts is not None:
            return self.parts.first()
        return prepare_text(self.data or None, max_bytes=self.max_bytes, **self._how)

    @cached_property
    def parts(self) -> Parts | None:
        return None if self.part_bytes is None else Parts.of(self.data, self.part_bytes, **self._how)

    @property
    def _how(self) -> dict[str, Any]:
        """Options of `prepare_text`."""
        vocab_size = self.model_config.vocab_size if self.tokenizer is None else self.model.get("vocab_size")
        context, group_size = self.model_config.max_position_embeddings, self.group_size
        how = {"field": self.field, "tokenizer": self.tokenizer, "vocab_size": vocab_size}
        how |= {"keep_near_duplicates": self.near_duplicates == "keep", "separate_documents": self.separate_documents}
        return how | {"context": context, "group_size": group_size}


def _carried_out(kind: str, field: str) -> bool:
    if kind == "training":
        return field.startswith(CARRIED_OUT)
    return (kind == "model" and field in DERIVED) or (kind, field) == ("transition", "source_minutes")


@dataclass(frozen=True, kw_only=True)
class RunFacts(JsonFile):
    """The results of a finished run: run.json, which is written last.

    steps, tokens, seconds: of training, with those of the run that it continues.
    scored_tokens: of the split, where that is not all of it.
    final_loss: nats a token of what was scored; regrouping_spread: between ways to group it, None where rows of a
        batch do not influence each other, of the tuning split, and where not all was scored. bits_per_byte is then
        by the length of the split's tokens.
    served: losses over a part of the split, by how texts are served: `in_groups`, of models whose rows influence each
        other; `alone`; `alone_by_few`, by as many experts of a Mixture of Tokens as the granularity. None of runs by
        earlier versions, and where settings are chosen.
    parameters, forward_flops_per_token: of the model; corpus: `Prepared.facts`.
    versions, commit, hardware, cores, threads: software and machine; sample: a continuation of `SAMPLE_PROMPT`, None
        of a model that is not causal, or whose tokenizer or context the prompt does not suit.
    """

    name: str
    seed: int
    steps: int
    tokens: int
    evaluated_on: str = "validation"
    scored_tokens: int | None = None
    final_loss: float
    regrouping_spread: float | None = None
    served: dict[str, float] | None = None
    bits_per_byte: float
    seconds: float
    tokens_per_second: int
    vocab_size: int
    parameters: int
    forward_flops_per_token: int
    corpus: dict[str, Any]
    versions: dict[str, str | None]
    commit: str | None
    sample: str | None = None
    hardware: str
    cores: int | None
    threads: int

    @property
    def text(self) -> tuple[str, str | None]:
        """Hashes of the text and of the tokenizer: losses on other ones are not comparable."""
        return self.corpus["hash"], self.corpus.get("tokenizer")

    @property
    def scored(self) -> str:
        """What the final loss is of."""
        some = self.scored_tokens
        return f"all {self.evaluated_on} text" if some is None else f"{some:,} tokens of {self.evaluated_on} text"

    def check(self, file: Path) -> None:
        for name in ("steps", "tokens", "seconds"):
            if (value := getattr(self, name)) <= 0:
                raise ValueError(f"{file}: {name} cannot be {value}")
        counted = ("documents", "tokens", "bytes")
        if not isinstance(self.corpus.get("hash"), str):
            raise ValueError(f"{file}: the corpus has no hash")
        for name, part in self.corpus.items():
            if isinstance(part, dict) and not all(is_a(part.get(count), int) for count in counted):
                raise ValueError(f"{file}: {name} of the corpus has no number of {', '.join(counted)}")


@dataclass(frozen=True, kw_only=True)
class Switch(JsonFile):
    """The conversion of a Mixture of Tokens to Token Choice: switch.json.

    step, tokens, seconds, flops_per_token: of the source's training, both passes.
    source_in_groups, source_alone: losses before the switch, in `groups` and each row alone; plain_switch,
        at_the_switch: after it, with unchanged weights and as training begins. All over the text that training is
        evaluated on.
    branch_errors: by layer, the distance from the source's output as a share of its size, before and after the fit.
    fit_seconds: of the fit and of the companions that it needs, 0 where nothing is fitted; None where not measured.
    groups: as `mot evaluate` calls those of `source_in_groups`.
    """

    step: int
    tokens: int
    seconds: float
    flops_per_token: float
    source_in_groups: float
    source_alone: float
    plain_switch: float
    at_the_switch: float
    branch_errors: dict[str, Any]
    fit_seconds: float | None = None
    groups: str = FULL

    @property
    def jump_left(self) -> float | None:
        """How far the loss is above the source's as training begins, as a share of the plain switch's jump."""
        plain = self.plain_switch - self.source_in_groups
        return (self.at_the_switch - self.source_in_groups) / plain if plain > 0 else None


@dataclass(kw_only=True)
class MetricsRow(Record):
    """Measurements after a step: a line of metrics.jsonl. None: not measured at this step, or not finite.

    train_loss: mean cross-entropy since the last row; eval_loss: over a fixed part of the text; aux_loss: the
        routings' own, before its weight; tokens_per_second: since the first step, of a run that continues another since
        that one's; data_wait: share of the time since the last row in which training waited for its batches; layers:
        `telemetry.measure`, and the router's gradient norm, by layer.
    """

    step: int
    tokens: int
    seconds: float
    tokens_per_second: int
    train_loss: float | None = None
    eval_loss: float | None = None
    learning_rate: float | None = None
    grad_norm: float | None = None
    aux_loss: float | None = None
    data_wait: float | None = None
    layers: dict[str, dict[str, float]] | None = None

    def check(self, file: Path) -> None:
        if not all(layer.isdecimal() for layer in self.layers or ()):
            raise ValueError(f"{file}: layers are named by their numbers")

    def line(self) -> str:
        """JSON has no NaN: values that are not finite are left out."""
        return json.dumps(_without_none(finite(asdict(self))), allow_nan=False) + "\n"


def metrics(file: Path) -> list[MetricsRow]:
    """All rows. Raises ValueError, naming the file, for one that is damaged."""
    try:
        lines = file.read_bytes().splitlines()
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error}") from None
    return [row_of(line, number, file) for number, line in enumerate(lines, 1)]


def row_of(line: bytes, number: int, file: Path) -> MetricsRow:
    """Raises ValueError, naming file and line, for one that is damaged."""
    try:
        return MetricsRow.of(json.loads(line), file)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}, line {number}, is damaged: {error}") from None


def _without_none(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    return {key: inner for key, given in value.items() if (inner := _without_none(given)) is not None}
