"""The command `mot`: a name for each function, whose signature and docstring are the command's help."""

import sys
from pathlib import Path
from typing import Annotated

from cyclopts import App, CycloptsError, Parameter
from cyclopts.config import Yaml

from mixture_of_tokens.cost import plan
from mixture_of_tokens.report import report
from mixture_of_tokens.train import train

COMMANDS = {"train": train, "plan": plan, "report": report}

app = App(name="mot", help="Mixture of Tokens: train it, weigh it against dense and sparse models.")
for command_name, function in COMMANDS.items():
    app.command(function, name=command_name)


@app.meta.default
def _with_config_file(
    *words: Annotated[str, Parameter(show=False, allow_leading_hyphen=True)], config: Path | None = None
):
    """Any command.

    Args:
        config: A YAML file of the command's flags; flags that are given win over it.
    """
    if config is not None:
        if not config.is_file():
            raise ValueError(f"--config {config}: there is no such file")
        app.config = [Yaml(config, use_commands_as_keys=False)]
    return app(words, exit_on_error=False, print_error=False)


def main() -> None:
    """Exit status 0, or 2 with one line on standard error for what the user can mend."""
    try:
        app.meta(exit_on_error=False, print_error=False)
    except (CycloptsError, ValueError, OSError) as error:
        print("mot: error:", " ".join(str(error).split()), file=sys.stderr)
        sys.exit(2)
