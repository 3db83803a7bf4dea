"""Arguments that come from Python, checked against annotations, as the command line checks its words."""

import dataclasses
import functools
import inspect
import os
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Literal, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")
# What is taken for a kind, and how it is called. A kind that is not here is its owner's to check.
KINDS: dict[Any, tuple[type | tuple[type, ...], str]] = {
    bool: (bool, "True or False"),
    int: (Integral, "a whole number"),
    float: (Real, "a number"),
    str: (str, "text"),
    Path: ((str, os.PathLike), "a path"),
}


def checked(function: Callable[P, R]) -> Callable[P, R]:
    """The function, which raises ValueError, naming the argument, for a value that its annotation does not take."""
    signature, hints = inspect.signature(function), typing.get_type_hints(function)
    inner: Callable[..., R] = function

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        bound = signature.bind(*args, **kwargs)
        for name, value in bound.arguments.items():
            if signature.parameters[name].kind is inspect.Parameter.VAR_POSITIONAL:
                check(name, [each for one in value for each in listed(one)], list[hints[name]])
            else:
                check(name, value, hints[name])
                bound.arguments[name] = plain(value)
        return inner(*bound.args, **bound.kwargs)

    return call


def plain(value: Any) -> Any:
    """Numbers of numpy as Python's, which can be written to a file; other values as they are."""
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    if isinstance(value, bool) or not isinstance(value, Real):
        return value
    return int(value) if isinstance(value, Integral) else float(value)


def listed(given: Any) -> list[Any]:
    """A list from Python, or one value of it."""
    return list(given) if isinstance(given, Sequence) and not isinstance(given, str) else [given]


def check(name: str, value: Any, hint: Any) -> None:
    """Raises ValueError for a value that is none of the annotation's; a list's may stand alone."""
    options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    wanted = [what for option in options if (what := _refusal(value, option))]
    if len(wanted) == len(options):
        legal = [what for option, what in zip(options, wanted, strict=True) if option is not types.NoneType]
        raise ValueError(f"{name} takes {' or '.join(legal)}, not {value!r}")


def _refusal(value: Any, option: Any) -> str | None:
    """What an option takes, where that is something else than the value."""
    if typing.get_origin(option) is Literal:
        choices = typing.get_args(option)
        return None if value in choices else " or ".join(choices)
    if typing.get_origin(option) is list:
        (kind,) = typing.get_args(option)
        what = next((what for one in listed(value) if (what := _refusal(one, kind))), None)
        return what and f"{what}, or a list of such"
    if typing.get_origin(option) is dict:
        return None if isinstance(value, Mapping) else "a dictionary"
    if option is types.NoneType:
        return None if value is None else "None"
    if inspect.isclass(option) and dataclasses.is_dataclass(option):
        return None if isinstance(value, option) else f"{option.__name__}(...)"
    if option not in KINDS:
        return None
    taken, what = KINDS[option]
    return None if isinstance(value, taken) and not (isinstance(value, bool) and option is not bool) else what
