"""The command line `mot`: each command is a function, whose signature and docstring are the command's help.

A function is imported only when its command is given, so `mot --help` and `mot --version` answer at once.
"""

import io
import math
import os
import re
import signal
import sys
from collections.abc import Iterator
from functools import partial
from json import dumps
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import yaml
from cyclopts import (
    UNSET,
    App,
    ArgumentCollection,
    CoercionError,
    CycloptsError,
    MissingArgumentError,
    Parameter,
    Token,
    UnknownOptionError,
    UnusedCliTokensError,
)

from mixture_of_tokens import __version__
from mixture_of_tokens.utils import yaml12
from mixture_of_tokens.utils.checks import listed
from mixture_of_tokens.utils.formatting import enumerated
from mixture_of_tokens.utils.process import end_with_torchrun, ended_by_sigterm, is_main, is_told, process_count

# Each command's function, in a module of that name, and the first line of its docstring.
COMMANDS = {
    "train": ("train", "Train one model and write a run directory."),
    "sweep": ("sweep", "Train one model with every combination of settings, and print the best."),
    "compare": (
        "compare",
        "Train several models on the same text in the same order, and say when each reaches the first one's loss.",
    ),
    "report": (
        "report",
        "Print the runs' losses side by side, the first one as the baseline, and write a page about them.",
    ),
    "generate": ("generate", "Continue prompts."),
    "evaluate": (
        "evaluate",
        "Print the loss of a model over a whole text, each token counted once: in full groups, in smaller ones, alone.",
    ),
    "audit": (
        "audit",
        "Look for leaks from the future and from batch-mates, by changing one thing and looking at everything else.",
    ),
    "transition": (
        "transition",
        "Turn a finished Mixture of Tokens into Token Choice, which serves each text by itself, and train it on.",
    ),
    "export": (
        "export",
        "Write a model for other software: plain transformers, llama.cpp (GGUF), or the Hub with code of its own.",
    ),
    "upcycle": (
        "upcycle",
        "Make a trained dense model a sparse one that computes the same, to be trained on with mot train --from.",
    ),
    "plan": (
        "plan",
        "Print what a model costs: parameters, FLOPs per token, memory, legal micro-batches, matched models.",
    ),
    "prepare": ("prepare", "Prepare the text that mot train with the same flags would train on."),
    "data-report": ("data_report", "Prepare a corpus and print what is in it."),
}
# Commands whose --config may be a run's config.yaml, and the fields of it that each ignores.
_OF_TRAINING = ("seed", "learning_rate", "anneal_temperature_to")  # the last of runs of earlier versions
_OF_TEXT = ("data", "field", "max_bytes", "part_bytes", "tokenizer", "near_duplicates", "evaluate_on")
_OF_TEXT += ("separate_documents", "scored_rows")
OF_A_RUN = {"train": (), "prepare": _OF_TRAINING}
OF_A_RUN |= {"plan": (*_OF_TRAINING, *_OF_TEXT, "training")}
WITH_NEGATIVE_FLAGS = ("plan",)  # commands with a flag that is on by default, as in --gated and --no-gated
_IN_THE_NAME = "the model's name has it, as in MoT-Nano/16E/8: groups of 16, granularity 8"
# Where other programs' flags are to be found here, for whoever tries them.
ELSEWHERE = {"--lr": "it is --learning-rate", "--max-steps": "it is --steps", "--output-dir": "it is --out"}
ELSEWHERE |= dict.fromkeys(("--group-size", "--granularity"), _IN_THE_NAME)
WHOLE, DIGITS = re.compile(r"[+-]?[0-9]+"), 18  # whole numbers, and how long they may be to fit in 64 bits


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
    hints = {name: argument.hint for argument in arguments for name in argument.names} | {"--json": bool}
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


def _entries(config: Path) -> Any:
    try:
        with config.open(encoding="utf-8") as file:
            return yaml12.load(file)
    except RecursionError:
        raise ValueError(f"--config {config} is nested too deeply") from None
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ValueError(f"--config {config} cannot be read: {yaml12.fault(error)}") from None


def _check_words(app: App, commands: tuple[str, ...], arguments: ArgumentCollection) -> None:
    """Raises ValueError, naming the flag, for words that would be taken for something else.

    No text is the working directory as a path, and no words as a prompt; cyclopts rounds 1.5 to a whole number.
    """
    if not commands:  # all the words of a command, before they are taken apart
        return
    for argument in arguments:
        kinds = {argument.hint, *get_args(argument.hint)}
        for token in argument.tokens:
            flag, word = token.keyword or argument.name.lstrip("-").upper(), token.value
            if not word and token.implicit_value is UNSET:  # no flag without a value, as --resume
                raise ValueError(f"{flag} is empty")
            if "\0" in word:
                raise ValueError(f"{flag} holds a NUL byte")
            if int in kinds and argument.parameter.converter is None:
                if not WHOLE.fullmatch(word):
                    raise ValueError(f"{flag} takes a whole number, not {word[:40]!r}")
                if len(word) > DIGITS:
                    raise ValueError(f"{flag} {word[:40]} is too large")
            if float in kinds and argument.parameter.converter is None and not _is_finite(word):
                several = "; mot sweep and mot compare take several" if "," in word else ""
                raise ValueError(f"{flag} takes a finite number, not {word[:40]!r}{several}")


def _is_finite(word: str) -> bool:
    try:
        return math.isfinite(float(word))
    except ValueError:
        return False


def _common(
    *words: Annotated[str, Parameter(show=False, allow_leading_hyphen=True)],
    config: Path | None = None,
    json: bool = False,
) -> tuple[list[str], tuple[Path | None, dict[Any, Any]], bool]:
    """Any command.

    Args:
        config: A YAML file of flags, a line each, such as `steps: 100`; what has no flag is called as above, in small
            letters: `name: A` of mot train, `names: [A, B]` of mot compare, `runs: [A, B]` of mot report. Flags on the
            command line override it. For mot train, mot prepare and mot plan a run's config.yaml is such a file: with
            another NAME or other --steps, the defaults it holds are those of the new ones.
        json: Print the result as JSON.
    """
    entries = {} if config is None else _read(config)
    asked = entries.get("json")
    if not isinstance(asked, bool | None):
        raise ValueError(f"--config {config}: json takes true or false, not {asked!r}")
    return list(words), (config, entries), json or asked is True


def _read(config: Path) -> dict[Any, Any]:
    """What a --config file holds. Raises ValueError for what is no file of flags."""
    if not config.is_file():
        what = "it is a directory" if config.is_dir() else "there is no such file"
        raise ValueError(f"--config {config}: {what}")
    entries = _entries(config)
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


def _fill_in(config: Path, entries: dict, app: App, commands: tuple[str, ...], arguments: ArgumentCollection) -> None:
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


def _app(words: list[str]) -> App:
    app = App(
        name="mot",
        help="Mixture of Tokens: train it and compare it with dense and sparse models.",
        version=__version__,
        default_parameter=Parameter(negative=()),
        result_action="return_value",
        exit_on_error=False,
        print_error=False,
        config=_check_words,
    )
    for name, (function, help) in COMMANDS.items():
        # The help of the given command is its whole docstring, that of the others one line.
        settings: dict[str, Any] = {} if name in words[:1] else {"help": help}
        if name in WITH_NEGATIVE_FLAGS:
            settings["default_parameter"] = Parameter(negative=None)
        app.command(f"mixture_of_tokens.commands.{function}:{function}", name=name, **settings)
    app.meta.default(_common)
    return app


def _run(words: list[str]) -> None:
    if words and not words[0].startswith("-") and words[0] not in COMMANDS:
        words = words[:1]  # of an unknown command there is no help
    app = _app(words)
    try:
        common = app.meta(words)
    except SystemExit as error:  # rich's, where the reader of the help has closed it
        raise BrokenPipeError from error
    if common is None:  # help or version, printed by now
        return
    words, (config, entries), json = common
    if config is not None:
        app.config = (partial(_fill_in, config, entries), _check_words)
    command, bound, unparsed = app.parse_args(words)
    streamed = {"stream": sys.stdout} if "stream" in unparsed and not json else {}
    result = command(*bound.args, **bound.kwargs, **streamed)
    if result is None or streamed or not is_main():
        return
    print(result.to_json() if json else str(result).removesuffix("\n"))
    failure = getattr(result, "failure", None)
    if failure is not None:
        print(f"mot: {failure}", file=sys.stderr)
        sys.exit(1)


def _reworded(error: Exception, words: list[str]) -> str:
    """cyclopts' message, reworded where it names a word that the user did not write, or does not say what is legal."""
    if isinstance(error, UnknownOptionError):
        told, flag = str(error), (error.token.keyword or error.token.value).partition("=")[0]
        if flag in ELSEWHERE:
            told = told.partition(" Did you mean")[0]
        command = next((f" {word}" for word in words if word in COMMANDS), "")
        hint = "" if "Did you mean" in told else f" mot{command} --help shows what is legal."
        hint = f" Here {ELSEWHERE[flag]}." if flag in ELSEWHERE else hint
        return f"{told}{hint}"
    if isinstance(error, UnusedCliTokensError) and error.unused_tokens:
        first, *more = error.unused_tokens
        hint = "a flag with several values is repeated, and a pattern quoted"
        return f"{first!r}{f' and {len(more)} more' if more else ''}: a word too many; {hint}"
    if type(error) is MissingArgumentError and error.argument is not None and error.keyword is None:
        command = " ".join(("mot", *(error.command_chain or ())))
        return f"{error.argument.name.lstrip('-').upper()} is missing; {command} --help shows what {command} takes"
    if isinstance(error, CoercionError) and "into dict" in str(error) and error.argument is not None:
        flag = error.argument.name
        return f"{flag} is given by its fields, as {flag}.FIELD VALUE, in a file {flag.lstrip('-')}: {{FIELD: VALUE}}"
    if isinstance(error, CoercionError) and '"gpu" for --device' in str(error):  # for which cyclopts guesses cpu
        return 'Invalid value "gpu" for --device. Choose from: "cpu", "cuda". A GPU is "cuda".'
    if isinstance(error, OSError) and error.strerror:  # without the system's number
        return error.strerror if error.filename is None else f"{os.fsdecode(error.filename)}: {error.strerror}"
    return str(error)


def _flush() -> None:
    """Write what stdout has buffered, or raise OSError."""
    try:
        sys.stdout.flush()
    except OSError:  # the interpreter would try again at its end, and exit with 120
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise


def main(words: list[str] | None = None) -> None:
    """Run the command line. Errors are one line on standard error.

    The exit status is 2 for bad use, 1 for training that diverges and for a failed check.
    """
    words = sys.argv[1:] if words is None else words
    if isinstance(sys.stdout, io.TextIOWrapper):  # what its encoding lacks, such as a minus sign, becomes \u2212
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        try:
            with ended_by_sigterm():
                end_with_torchrun()
                _run(words)
        finally:
            _flush()
    except BrokenPipeError:  # the reader of the output has closed it, as in `mot generate ... | head`
        sys.exit(128 + signal.SIGPIPE)
    except (CycloptsError, yaml.YAMLError, ValueError, OSError) as error:
        if not is_told(error):
            print("mot: error:", " ".join(_reworded(error, words).split()), file=sys.stderr)
        sys.exit(2)
    except RuntimeError as error:
        kinds = {kind.__name__ for kind in type(error).__mro__}  # torch's, which is not imported for --help
        if process_count() > 1 and ("DistError" in kinds or "gloo" in str(error)):
            what = "another process has ended, or has not answered in time"
            line = f"mot: error: {what}; training goes on from its last checkpoint with --resume"
            print("\n" * (not is_main()) + line, file=sys.stderr)  # perhaps after the first process's progress bar
            sys.exit(2)
        what = str(error)
        if "OutOfMemoryError" not in kinds and "DefaultCPUAllocator" not in what:
            raise
        first = what[max(0, what.find("DefaultCPUAllocator")) :].partition(". ")[0]
        print(f"mot: error: {first}; in training, --training.gradient_accumulation_steps N needs less", file=sys.stderr)
        sys.exit(2)
    except FloatingPointError as error:  # training that diverged
        if not is_told(error):
            print("mot: error:", error, file=sys.stderr)
        sys.exit(1)
    except MemoryError as error:  # numpy's says how much
        print(f"mot: error: there is too little memory{': ' * bool(str(error))}{error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as interrupt:  # ^C, or SIGTERM where its number is given
        print("mot: stopped", file=sys.stderr)
        sys.exit(128 + next(iter(interrupt.args), signal.SIGINT))
