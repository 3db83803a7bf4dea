"""The options that all commands that train have in common."""

import dataclasses
import os
from typing import Any, Literal

from mixture_of_tokens.settings.choices import Device
from mixture_of_tokens.settings.fields import Several, as_word, check_single
from mixture_of_tokens.settings.model import model_fields
from mixture_of_tokens.settings.training import training_fields
from mixture_of_tokens.utils.checks import check, listed, plain
from mixture_of_tokens.utils.wording import as_called


def check_seeds(seeds: list[int]) -> None:
    """Raises ValueError for none, and for a seed that is there twice, as it is one run."""
    if not seeds:
        raise ValueError("--seeds takes at least one seed")
    for seed in seeds:
        if seeds.count(seed) > 1:
            raise ValueError(f"--seeds has {seed} twice; each seed is one run")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Options of all commands that train.

    Args:
        steps: Optimizer steps; by default the size's own number.
        batch_size: Rows a step, a multiple of the group size; by default the size's own: 128 for Nano, 64 for Micro,
            256 for the others.
        data: Files, folders or globs of text, .jsonl (each also .gz or .zst) or .parquet; hf:NAME[:CONFIG][@REVISION]
            for a data set of the Hub; or packages, the source text of all Python packages that are installed beside
            this library. May be given several times. By default the source text of Python's standard library.
        field: The field of a .jsonl, .parquet or Hub row that holds the text.
        max_bytes: Read at most this many bytes of text.
        part_bytes: Prepare the files in parts of at least this many bytes on the disk, and begin to train when the
            first is ready. For text that is too much to prepare at once; duplicates are then found within a part. Not
            with --max-bytes. Another process prepares ahead, so a script needs `if __name__ == "__main__":`.
        tokenizer: A tokenizer.json, a folder or a Hub name; by default one is trained on the data.
        near_duplicates: What is done with documents that share about half of their lines with others: drop, as in a
            group one would show the other's future, or keep, for documents that are made from one template.
        separate_documents: Attention stays within a document where a row holds parts of several, and positions begin
            anew at each. By default a row is one text, whose later documents see the earlier ones.
        evaluate_on: The split for losses: by default validation, in mot sweep tuning, so that settings are not chosen
            on the split that is reported.
        scored_rows: Rows of the split to score at the end, and at most during training. By default all at the end,
            grouped in three ways, and 1,024 during training; runs of fewer than 100 steps score about as many rows as
            they train on.
        device: cpu or cuda; by default cuda where there is one.
        shard: Processes of torchrun that hold one copy of the model together, a part of every weight each (FSDP2); by
            default each process has a whole copy (DDP).
        replicate: Copies of a sharded model; by default as many as there are processes for. A resumed run may have
            another number of processes, shards and copies.
        expert_parallel: Of the processes of a copy, so many divide the experts, and exchange what these read. Without
            --shard all processes hold one copy.
        model: Fields of the model's configuration, as in --model.router_temperature 0.25.
        training: Fields of transformers' TrainingArguments, as in --training.weight_decay 0.05.
    """

    steps: int | None = None
    batch_size: int | None = None
    data: list[str] = dataclasses.field(default_factory=list)
    field: str = "text"
    max_bytes: int | None = None
    part_bytes: int | None = None
    tokenizer: str | None = None
    near_duplicates: Literal["drop", "keep"] = "drop"
    separate_documents: bool = False
    evaluate_on: Literal["validation", "tuning"] | None = None
    scored_rows: int | None = None
    device: Device | None = None
    shard: int | None = None
    replicate: int | None = None
    expert_parallel: int | None = None
    model: dict[str, Any] = dataclasses.field(default_factory=dict)
    training: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        """From Python: one source may stand alone, sources may be paths, numbers numpy's, other fields of any type.

        Raises ValueError for what a field does not take.
        """
        sources = [os.fspath(each) if isinstance(each, os.PathLike) else each for each in listed(self.data)]
        object.__setattr__(self, "data", sources)
        if isinstance(self.tokenizer, os.PathLike):
            object.__setattr__(self, "tokenizer", os.fspath(self.tokenizer))
        for field in dataclasses.fields(self):
            check(field.name, getattr(self, field.name), field.type)
            object.__setattr__(self, field.name, plain(getattr(self, field.name)))
        with as_called():
            object.__setattr__(self, "model", model_fields(self.model))
            object.__setattr__(self, "training", training_fields(self.training))

    def check_single(self) -> None:
        """Raises ValueError for a setting with several values, which only a sweep takes."""
        check_single("model", self.model)
        check_single("training", self.training)


DEFAULTS = Options()


def as_flags(options: Options) -> list[str]:
    """The options that are not the defaults, as words of a command line."""
    words: list[str] = []
    for field in dataclasses.fields(options):
        flag, value = f"--{field.name.replace('_', '-')}", getattr(options, field.name)
        if value == getattr(DEFAULTS, field.name):
            continue
        if value is True:
            words.append(flag)
        elif isinstance(value, dict):
            for key, inner in value.items():
                several = inner if isinstance(inner, Several) else [inner]
                words += _flagged(f"{flag}.{key}", ",".join(map(as_word, several)))
        else:
            words += [word for each in listed(value) for word in _flagged(flag, str(each))]
    return words


def _flagged(flag: str, word: str) -> list[str]:
    """A flag and its value as words of a command line; in one, if the value would be taken for a flag."""
    return [f"{flag}={word}"] if word.startswith("-") else [flag, word]
