"""The command `mot`: a name for each function, whose signature and docstring are the command's help."""

import os
import signal
import sys
from collections.abc import Iterator
from json import dumps
from pathlib import Path
from typing import Annotated, Any

import yaml
from cyclopts import App, CycloptsError, Parameter

from mixture_of_tokens.convert.export import export
from mixture_of_tokens.convert.transition import transition
from mixture_of_tokens.data.inspect import data_report
from mixture_of_tokens.inference.audit import audit
from mixture_of_tokens.inference.evaluate import evaluate
from mixture_of_tokens.inference.generate import generate
from mixture_of_tokens.model.cost import plan
from mixture_of_tokens.reports.compare import compare
from mixture_of_tokens.reports.report import report
from mixture_of_tokens.training.sweep import sweep
from mixture_of_tokens.training.train import train

COMMANDS = {
    "train": train,
    "sweep": sweep,
    "compare": compare,
    "report": report,
    "generate": generate,
    "evaluate": evaluate,
    "audit": audit,
    "transition": transition,
    "export": export,
    "plan": plan,
    "data-report": data_report,
}


def _flags(key: str, value: Any) -> Iterator[list[str]]:
    """An entry of a configuration file as the words that say the same on the command line."""
    if isinstance(value, dict):  # --model and --training, whose fields take any YAML
        yield from (
            [f"{key}.{name}", inner if isinstance(inner, str) else dumps(inner, default=str)]
            for name, inner in value.items()
        )
    elif isinstance(value, bool):
        yield from [[key]] if value else []
    elif value is not None:
        yield from ([key, str(item)] for item in (value if isinstance(value, list) else [value]))


def _with_config_file(
    *words: Annotated[str, Parameter(show=False, allow_leading_hyphen=True)], config: Path | None = None
) -> list[str]:
    """Any command.

    Args:
        config: A YAML file of the command's flags; flags that are given win over it.
    """
    if config is None:
        return list(words)
    if not config.is_file():
        raise ValueError(f"--config {config}: there is no such file")
    entries = yaml.safe_load(config.read_text())
    if not isinstance(entries, dict):
        raise ValueError(f"--config {config} does not hold flags, as in `steps: 100`")
    given = {word.partition("=")[0] for word in words if word.startswith("--")}
    if len(words) > 1 and not words[1].startswith("-"):  # a positional word is the model's name
        given.add("--name")
    flags = [flag for key, value in entries.items() for flag in _flags(f"--{str(key).replace('_', '-')}", value)]
    return [*words, *(word for flag in flags if flag[0] not in given for word in flag)]


def main(words: list[str] | None = None) -> None:
    """Run the command line. One line on standard error and exit status 2 for bad use, 1 for training that diverges."""
    about = "Mixture of Tokens: train it, weigh it against dense and sparse models."
    app = App(
        name="mot",
        help=about,
        default_parameter=Parameter(negative=()),
        result_action="return_value",
        exit_on_error=False,
        print_error=False,
    )
    for name, function in COMMANDS.items():
        app.command(function, name=name)
    app.meta.default(_with_config_file)
    try:
        merged = app.meta(sys.argv[1:] if words is None else words)
        if merged is not None:  # None: help or version, printed by now
            app(merged)
    except BrokenPipeError:  # whoever read the output has enough, as in `mot generate ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
    except (CycloptsError, yaml.YAMLError, ValueError, OSError) as error:
        print("mot: error:", " ".join(str(error).split()), file=sys.stderr)
        sys.exit(2)
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's, which is not imported for --help
            raise
        first = str(error).partition(". ")[0]
        print(f"mot: error: {first}; in training, --training.gradient_accumulation_steps N takes less", file=sys.stderr)
        sys.exit(2)
    except FloatingPointError as error:  # training that diverged
        print("mot: error:", error, file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("mot: stopped", file=sys.stderr)
        sys.exit(130)
