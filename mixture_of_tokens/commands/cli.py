"""The command line `mot`: each command is a function, whose signature and docstring are the command's help.

A function is imported only when its command is given, so `mot --help` and `mot --version` answer at once.
"""

import io
import math
import os
import re
import signal
import sys
import threading
import time
from functools import partial
from pathlib import Path
from typing import Annotated, Any, get_args

import yaml
from cyclopts import (
    UNSET,
    App,
    ArgumentCollection,
    CoercionError,
    CycloptsError,
    MissingArgumentError,
    Parameter,
    UnknownOptionError,
    UnusedCliTokensError,
)

from mixture_of_tokens import __version__
from mixture_of_tokens.commands.config_file import fill_in, read_config
from mixture_of_tokens.utils.process import (
    TORCHRUN,
    Interrupted,
    ended_by_sigterm,
    is_main,
    is_told,
    place_of_machine,
    process_count,
)
from mixture_of_tokens.utils.wording import by_flags

# The first line of each command's docstring. Its function has its name, in a module of that name beside this one.
COMMANDS = {
    "train": "Train one model and write a run directory.",
    "sweep": "Train one model with every combination of settings, and print the best.",
    "compare": (
        "Train several models on the same text in the same order, and say when each reaches the first one's loss."
    ),
    "report": "Print the runs' losses side by side, the first one as the baseline, and write a page about them.",
    "generate": "Continue prompts.",
    "evaluate": (
        "Print the loss of a model over a whole text, each token counted once: in full groups, in smaller ones, alone."
    ),
    "audit": (
        "Look for leaks from the future and from batch-mates, by changing one thing and looking at everything else."
    ),
    "transition": (
        "Turn a finished Mixture of Tokens into Token Choice, which serves each text by itself, and train it on."
    ),
    "export": (
        "Write a model for other software: plain transformers, llama.cpp (GGUF), or the Hub with code of its own."
    ),
    "upcycle": (
        "Make a trained dense model a sparse one that computes the same, to be trained on with mot train --from."
    ),
    "plan": "Print what a model costs: parameters, FLOPs per token, memory, legal micro-batches, matched models.",
    "prepare": "Prepare the text that mot train with the same flags would train on.",
    "data-report": "Prepare a corpus and print what is in it.",
}
WITH_NEGATIVE_FLAGS = ("plan",)  # commands with a flag that is on by default, as in --gated and --no-gated
_IN_THE_NAME = "the model's name has it, as in MoT-Nano/16E/8: groups of 16, granularity 8"
# Where other programs' flags are to be found here, for whoever tries them.
ELSEWHERE = {"--lr": "it is --learning-rate", "--max-steps": "it is --steps", "--output-dir": "it is --out"}
ELSEWHERE |= dict.fromkeys(("--group-size", "--granularity"), _IN_THE_NAME)
TRACEBACK = "MOT_TRACEBACK"  # where this is set, an error shows where it was raised
WATCHED_EVERY = 5.0  # seconds
WHOLE, DIGITS = re.compile(r"[+-]?[0-9]+"), 18  # whole numbers, and how long they may be to fit in 64 bits


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
            if len(token.keys) > 1:
                raise ValueError(f"{flag}: a field is given whole, as in --model.rope_parameters '{{rope_theta: 1e6}}'")
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
        config: A YAML file of flags, a line each, such as `steps: 100`; `name: A`, `names: [A, B]` and `runs: [A, B]`
            are the words without a flag. Flags on the command line override it. mot train, mot prepare and mot plan
            take a run's config.yaml too.
        json: Print the result as JSON.
    """
    entries = {} if config is None else read_config(config)
    asked = entries.get("json")
    if not isinstance(asked, bool | None):
        raise ValueError(f"--config {config}: json takes true or false, not {asked!r}")
    return list(words), (config, entries), json or asked is True


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
    for name, help in COMMANDS.items():
        function = name.replace("-", "_")
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
        app.config = (partial(fill_in, config, entries), _check_words)
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


def _end_with_torchrun() -> None:
    """Give this process SIGTERM when torchrun, which started it, is gone: killed, it can tell nobody."""
    if TORCHRUN in os.environ:
        threading.Thread(target=_watch, args=(os.getppid(),), daemon=True).start()


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(WATCHED_EVERY)
    if place_of_machine()[2]:
        print("\nmot: torchrun is gone, and its processes end as by SIGTERM", file=sys.stderr)  # perhaps after a bar
    os.kill(os.getpid(), signal.SIGTERM)


def main(words: list[str] | None = None) -> None:
    """Run the command line. Errors are one line on standard error.

    The exit status is 2 for bad use, 1 for training that diverges and for a failed check.
    """
    words = sys.argv[1:] if words is None else words
    if isinstance(sys.stdout, io.TextIOWrapper):  # what its encoding lacks, such as a minus sign, becomes \u2212
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        try:
            with ended_by_sigterm(), by_flags():
                _end_with_torchrun()
                _run(words)
        finally:
            _flush()
    except BrokenPipeError:  # the reader of the output has closed it, as in `mot generate ... | head`
        sys.exit(128 + signal.SIGPIPE)
    except (CycloptsError, yaml.YAMLError, ValueError, OSError) as error:
        if os.environ.get(TRACEBACK):
            raise
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
    except Interrupted as interrupted:
        if is_main():
            print("mot:", interrupted, file=sys.stderr)
        sys.exit(128 + interrupted.number)
    except KeyboardInterrupt as interrupt:  # ^C, or SIGTERM where its number is given
        print("mot: stopped", file=sys.stderr)
        sys.exit(128 + next(iter(interrupt.args), signal.SIGINT))
