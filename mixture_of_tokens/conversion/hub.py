"""A model as a folder for the Hub that brings its own code, for forms that no architecture of transformers has.

transformers loads such a folder with `trust_remote_code=True`, and runs the Python files in it. They are this library's
own, laid flat, with imports made relative: transformers follows no others.
"""

import ast
import json
import re
from pathlib import Path

from mixture_of_tokens import __version__
from mixture_of_tokens.conversion.choice_of_top_k import loss_of
from mixture_of_tokens.models.modeling import MixtureOfTokensForCausalLM
from mixture_of_tokens.runs.loading import text_of
from mixture_of_tokens.settings.routings import MIXTURE

PACKAGE, ROOT = "mixture_of_tokens", Path(__file__).parents[1]
MODEL, ALONE = "models.modeling", "models.served_alone"
OPERATORS = f'"{PACKAGE}::'  # names of torch's custom operators, which a process knows once


def serve_as_written(run: str, model: MixtureOfTokensForCausalLM, top_k: int | None) -> dict[str, float]:
    """Have a model serve as it will be loaded: a Mixture of Tokens alone, by few experts.

    Returns its losses on a part of the run's text, by what they are of; none where that text is not here.

    Raises ValueError for experts of a model that mixes nothing, and for a number that there is not.
    """
    try:
        text = text_of(run)
        blocks = text.tuning if len(text.tuning) >= model.config.group_size else text.validation
    except (ValueError, OSError):
        blocks = None
    before = {} if blocks is None else {"with texts in groups" if model.shares_batch else "": loss_of(model, blocks)}
    if not any(routing.kind == MIXTURE.kind for routing in model.config.routings):
        if top_k is not None:
            raise ValueError(f"--top-k is for a Mixture of Tokens, and {run} is none")
        return before
    model.config.num_experts_per_tok = top_k or model.config.num_experts_per_tok
    model.serve_alone(num_experts_alone=model.config.num_experts_per_tok)
    return before if blocks is None else before | {"as it is served here, each alone": loss_of(model, blocks)}


def write_code(directory: Path, model: MixtureOfTokensForCausalLM) -> None:
    """Write the Python files of a model, and name its classes in config.json."""
    entry = ALONE if model.config.shares_batch and not model.shares_batch else MODEL
    modules = _needed(entry)
    assert len({*map(_flat, modules)}) == len(modules)  # else two files would have one name
    for module in modules:
        text = _relative(_source(module).read_text(encoding="utf-8"))
        (directory / f"{_flat(module)}.py").write_text(text, encoding="utf-8")
    kind = {ALONE: "ServedAloneForCausalLM", MODEL: "MixtureOfTokensForCausalLM"}[entry]
    config = json.loads((directory / "config.json").read_text())
    config["architectures"] = [kind]
    # Both from one file: transformers copies the files that it needs for each, and classes of two copies are not one.
    config["auto_map"] = {"AutoConfig": f"{_flat(entry)}.MixtureOfTokensConfig"}
    config["auto_map"]["AutoModelForCausalLM"] = f"{_flat(entry)}.{kind}"
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def _source(module: str) -> Path:
    return ROOT / f"{module.replace('.', '/')}.py"


def _flat(module: str) -> str:
    return module.rpartition(".")[2]


def _needed(entry: str) -> list[str]:
    """A module of the package, and all that it imports of it."""
    found: list[str] = []
    left = [entry]
    while left:
        module = left.pop()
        if module not in found:
            found.append(module)
            for node in ast.walk(ast.parse(_source(module).read_text(encoding="utf-8"))):
                if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(f"{PACKAGE}."):
                    left.append((node.module or "").removeprefix(f"{PACKAGE}."))
    return found


def _relative(text: str) -> str:
    """Imports as `from .experts import`, and operators of its own."""
    text = re.sub(rf"^(\s*)from {PACKAGE}\.(?:\w+\.)*(\w+) import", r"\1from .\2 import", text, flags=re.MULTILINE)
    head = f"# Of {PACKAGE.replace('_', '-')} {__version__}, Apache-2.0; written by mot export.\n"
    return head + text.replace(OPERATORS, f'"{PACKAGE}_hub::')
