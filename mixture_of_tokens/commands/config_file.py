"""A file of flags, `--config FILE`: read, checked, and taken for the flags that the command line leaves out."""

from collections.abc import Iterator
from json import dumps
from pathlib import Path
from typing import Any, get_args, get_origin

from cyclopts import App, ArgumentCollection, Token, UnknownOptionError

from mixture_of_tokens.utils import yaml12
from mixture_of_tokens.utils.checks import listed
from mixture_of_tokens.utils.formatting import enumerated

# Commands whose --config may be a run's config.yaml, and the fields of it that each ignores.
_OF_TRAINING = ("seed", "learning_rate", "anneal_temperature_to")  # the last of runs of earlier versions
_OF_TEXT = ("data", "field", "max_bytes", "part_bytes", "tokenizer", "near_duplicates", "evaluate_on")
_OF_TEXT += ("separate_documents", "scored_rows")
OF_A_RUN = {"train": (), "prepare": _OF_TRAINING}
OF_A_RUN |= {"plan": (*_OF_TRAINING, *_OF_TEXT, "training")}


def _flag(name: str) -> str:
    word, dot, field = name.partition(".")  # model.router_temperature, whose field keeps its name
    return f"{word.replace('_', '-')}{dot}{field}"


def _named(entries: dict[Any, Any]) -> dict[str, Any]:
    """Entries of a configuration file by flag. Raises ValueError for a flag that two of them name."""
    named: dict[str, Any] = {}
    for key, value in entries.items():
        flag = _flag(f"--{key}")
        if flag in named:
            raise ValueError(f"{flag.removeprefix('--')} stands there twice")
        named[flag] = value
    return named


def _leaves(named: dict[str, Any]) -> Iterator[tuple[str, list[str]]]:
    """Flags with their words; a field of --model or --training takes any YAML, as text. Null is what is not given."""
    for flag, value in named.items():
        if "." in flag:
            yield flag, [value if isinstance(value, str) else dumps(value, default=str)]
        elif isinstance(value, dict):
            yield from _leaves({f"{flag}.{name}": inner for name, inner in value.items()})
        elif value is not None:
            yield flag, _words_of(flag, value)


def _words_of(key: str, value: Any) -> list[str]:
    """A value, or those of a list. Raises ValueError for one that is no word of the command line."""
    words = value if isinstance(value, list) else [value]
    for word in words:
        if word is None or isinstance(word, list | dict):
            raise ValueError(f"{key.removeprefix('--')} holds {dumps(word, default=str)}, which is no single value")
    return [str(word) for word in words]


def _check_kinds(config: Path, arguments: ArgumentCollection, entries: dict[str, Any]) -> None:
    """Raises ValueError for an entry that as words of the command line would be taken for something else."""
    hints = {name: argument.hint for argument in arguments for name in argument.names}
    for flag, value in entries.items():
        hint, field = hints.get(flag), flag.removeprefix("--")
        if hint is bool and not isinstance(value, bool | None):
            raise ValueError(f"--config {config}: {field} takes true or false, not {value!r}")
        if hint not in (None, bool) and isinstance(value, bool):
            raise ValueError(f"--config {config}: {field} takes a value, not {str(value).lower()}")
        takes_several = any(get_origin(kind) in (list, tuple) for kind in (hint, *get_args(hint)))
        if hint is not None and isinstance(value, list) and not takes_several:
            raise ValueError(f"--config {config}: {field} takes one value, not {dumps(value, default=str)}")
        kinds = {get_origin(kind) or kind for part in (hint, *get_args(hint)) for kind in (part, *get_args(part))}
        takes_text = bool(kinds & {str, Path}) and not kinds & {int, float, dict}
        if takes_text and (others := [each for each in listed(value) if isinstance(each, int | float)]):
            raise ValueError(f"--config {config}: {field} takes text, and {others[0]} is a number: put it in quotes")


def read_config(config: Path) -> dict[Any, Any]:
    """What a --config file holds. Raises ValueError for what is no file of flags."""
    if not config.is_file():
        what = "it is a directory" if config.is_dir() else "there is no such file"
        raise ValueError(f"--config {config}: {what}")
    entries = yaml12.read(config, f"--config {config}")
    if not isinstance(entries, dict):
        raise ValueError(f"--config {config} is not a mapping of flags, such as `steps: 100`")
    for field in {"help", "version"} & entries.keys():  # which would be printed, and nothing be done
        raise ValueError(f"--config {config} names {field}, which is for the command line alone")
    if "format" in entries:
        from mixture_of_tokens.runs.typed import check_format

        check_format(entries["format"], config)
        inner = entries["config"] if isinstance(entries.get("config"), dict) else entries  # a run in one file
        entries = inner | {"format": entries["format"]}
    if entries.get("transition") is not None:
        raise ValueError(f"--config {config} is of a converted run: repeat it with mot transition")
    return entries


def fill_in(config: Path, entries: dict, app: App, commands: tuple[str, ...], arguments: ArgumentCollection) -> None:
    """Give arguments that the command line leaves out what a --config file has for them."""
    if not commands:
        return
    entries, given = dict(entries), {(each.name, token.keys) for each in arguments for token in each.tokens}
    if entries.pop("format", None) is not None:  # of a run, which has all fields, also those that nobody chose
        if commands[0] not in OF_A_RUN:
            what = enumerated([f"mot {each}" for each in OF_A_RUN])
            raise ValueError(
                f"--config {config} is of a run: {what} take it; mot {commands[0]} takes a file of its own flags"
            )
        name = next((token.value for each in arguments if each.name == "--name" for token in each.tokens), None)
        if "name" in entries and (("--steps", ()) in given or name not in (None, entries["name"])):
            from mixture_of_tokens.training.merging import chosen_in

            entries = chosen_in(entries)
        if isinstance(start := entries.pop("start", None), dict) and commands[0] == "train":
            entries["from"] = start.get("source")
        for field in ("micro_batch", "minutes", "first_step", "transition", *OF_A_RUN[commands[0]]):
            entries.pop(field, None)
    try:
        named = _named(entries)
        named.pop("--json", None)
        leaves = list(_leaves(named))
    except (ValueError, TypeError, RecursionError) as error:  # an entry that holds itself, or a key that is a list
        raise ValueError(f"--config {config} is no file of flags: {error}") from None
    _check_kinds(config, arguments, named)
    without_flag = {f"--{each.name.lower()}": each for each in arguments if each.name[:1] != "-"}  # such as NAMES
    for flag, words in leaves:
        token = Token(keyword=flag, source=str(config))
        try:
            argument, keys, means = (without_flag[flag], (), None) if flag in without_flag else arguments.match(flag)
        except ValueError:
            raise UnknownOptionError(token=token, argument_collection=arguments) from None
        if means is False:  # of --no-gated, say
            words = [str(word != "True") for word in words]
        if (argument.name, keys) not in given:
            for index, word in enumerate(words):
                argument.append(token.evolve(value=word, keys=keys, index=index))
