"""Arguments that come from Python, checked against annotations, as the command line checks its words."""

import dataclasses
import functools
import inspect
import math
import operator
import os
import sys
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Literal, ParamSpec, TypeVar

from mixture_of_tokens.utils.wording import as_called

MOST_SHOWN = 200  # characters of a value in a message
LARGEST = 2**31 - 1  # of whole numbers: steps times rows are counted in 64 bits
P = ParamSpec("P")
R = TypeVar("R")
# By annotation, the types that are accepted and their name in messages. Other annotations are not checked here.
KINDS: dict[Any, tuple[type | tuple[type, ...], str]] = {
    bool: (bool, "True or False"),
    int: (Integral, "a whole number"),
    float: (Real, "a number"),
    str: (str, "text"),
    Path: ((str, os.PathLike), "a path"),
}


def divisors(number: int) -> list[int]:
    """In ascending order; all of a number below 2**32."""
    lower = [k for k in range(1, min(math.isqrt(number), 2**16) + 1) if number % k == 0]
    return sorted({*lower, *(number // k for k in lower)})


def checked(function: Callable[P, R]) -> Callable[P, R]:
    """The function, called with values that are `typed`, also the defaults.

    Raises ValueError, naming the argument, for a value that its annotation does not take.

    TypeError for an argument that it does not have says where that belongs, if it is a field of its `options`.
    """
    signature = inspect.signature(function)
    hints = {name: _without_notes(parameter.annotation) for name, parameter in signature.parameters.items()}
    inside = getattr(hints.get("options"), "__dataclass_fields__", {})
    inner: Callable[..., R] = function

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError as error:
            given = ", ".join(f"{key}={value!r}" for key, value in kwargs.items() if key in inside and key not in hints)
            raise TypeError(
                f"{function.__name__}() {error}" + f"; give options=Options({given})" * bool(given)
            ) from None
        bound.apply_defaults()
        with as_called():
            for name, value in bound.arguments.items():
                hint = hints[name]
                if signature.parameters[name].kind is inspect.Parameter.VAR_POSITIONAL:  # each may be a list of them
                    value, hint = [each for one in value for each in listed(one)], list[hint]
                check(name, value, hint)
                bound.arguments[name] = typed(value, hint)
            return inner(*bound.args, **bound.kwargs)

    # What it returns may be a name that only type checkers import, and whoever reads annotations would look for it.
    call.__annotations__ = {name: kind for name, kind in function.__annotations__.items() if name != "return"}
    return call


def typed(value: Any, hint: Any) -> Any:
    """A value that an annotation takes, as that type: in a list where it may stand alone, numpy's number as Python's.

    Of a path, ~ is the home directory also where no shell has seen it. What may be a path or a name of the Hub is text.
    """
    kinds = [_without_notes(kind) for kind in (hint, *typing.get_args(hint))]
    for kind in kinds:
        if typing.get_origin(kind) in (list, Sequence) and value is not None:
            return [typed(each, *typing.get_args(kind)) for each in listed(value)]
    if Path in kinds and isinstance(value, str | os.PathLike):
        path = os.path.expanduser(value)
        return path if str in kinds else Path(path)
    return plain(value)


def _without_notes(kind: Any) -> Any:
    return typing.get_args(kind)[0] if typing.get_origin(kind) is typing.Annotated else kind


def plain(value: Any) -> Any:
    """Numbers of numpy as Python's, which can be written to a file; other values as they are."""
    if isinstance(value, Mapping):
        return {key: plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    if isinstance(value, bool) or not isinstance(value, Real):
        return value
    return int(value) if isinstance(value, Integral) else float(value)


def listed(given: Any) -> list[Any]:
    """A list from Python, or one value of it."""
    return list(given) if isinstance(given, Sequence) and not isinstance(given, str) else [given]


def shown(value: Any) -> str:
    """What was given, as a message of one line shows it: a tensor or a whole text by its type alone."""
    if isinstance(value, int) and _is_beyond_floats(value):  # Python refuses to print some of them
        return f"one of {value.bit_length()} bits"
    text = repr(value)
    return text if len(text) <= MOST_SHOWN and "\n" not in text else f"a {type(value).__name__}"


def check(name: str, value: Any, hint: Any) -> None:
    """Raises ValueError for a value that is none of the annotation's; a list's may stand alone."""
    if legal := _refusal(value, hint):
        raise ValueError(f"{name} takes {legal}, not {shown(value)}")
    if Path in (hint, *typing.get_args(hint)) and isinstance(value, str | os.PathLike):
        if not str(value):  # the current directory, as a path
            raise ValueError(f"{name} is empty")
        if "\0" in str(value):
            raise ValueError(f"{name} takes a path, and {str(value)!r} has a NUL in it")


def check_sizes(**sizes: Any) -> None:
    """Raises ValueError for what is no whole number from 1 on, as widths and numbers of experts are."""
    for name, size in sizes.items():
        check(name, size, int)
        check_range(name, int(size), ge=1)


def check_choice(name: str, value: Any, legal: Iterable[str]) -> None:
    """Raises ValueError for what is none of the legal texts."""
    check(name, value, str)
    if value not in (choices := list(legal)):
        raise ValueError(f"{name} {shown(value)} is unknown; legal are {', '.join(choices)}")


def check_range(name: str, value: Any, **bounds: float) -> None:
    """Raises ValueError for what is no finite number, or beyond the bounds: gt, ge, lt, le, as pydantic calls them."""
    check(name, value, float)
    check_number(name, value)
    for bound, limit in bounds.items():
        if not getattr(operator, bound)(value, limit):
            raise ValueError(f"{name} {beyond(bound, limit)}, not {value}")


def beyond(bound: str, limit: float) -> str:
    """What a value must be that is beyond one of its bounds."""
    if limit == 0 and bound in ("gt", "ge"):
        return "must be positive" if bound == "gt" else "must be 0 or more"
    words = {"gt": "above", "ge": "at least", "lt": "below", "le": "at most"}
    return f"must be {words[bound]} {limit:g}"


def check_number(flag: str, value: Any) -> None:
    """Raises ValueError for a number that is not finite, or of which sums do not fit in 64 bits."""
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{flag} takes a finite number, not {value}")
    if isinstance(value, int) and abs(value) > LARGEST:
        raise ValueError(f"{flag} is more than {LARGEST}" if value > 0 else f"{flag} is less than -{LARGEST}")


def at_least_one(**numbers: int | None) -> None:
    """Raises ValueError, naming the flag, for a number below 1."""
    for name, number in numbers.items():
        if number is not None and number < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, not {number}")


def _refusal(value: Any, option: Any) -> str | None:
    """What an option takes, where that is something else than the value."""
    if typing.get_origin(option) in (typing.Union, types.UnionType):
        wanted = {kind: _refusal(value, kind) for kind in typing.get_args(option)}
        legal = [what for kind, what in wanted.items() if what and kind is not types.NoneType]
        return " or ".join(legal) if all(wanted.values()) else None
    if typing.get_origin(option) is Literal:
        choices = typing.get_args(option)
        return None if isinstance(value, str) and value in choices else " or ".join(choices)
    if typing.get_origin(option) in (list, Sequence):
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
    if not isinstance(value, taken) or (isinstance(value, bool) and option is not bool):
        return what
    return f"{what} below {sys.float_info.max:.1g}" if _is_beyond_floats(value) else None


def _is_beyond_floats(value: Any) -> bool:
    """A whole number of any size, which overflows where it meets a float."""
    return isinstance(value, Integral) and abs(int(value)) > sys.float_info.max
