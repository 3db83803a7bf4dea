"""Flags that take several numbers, with commas between them."""

import typing
from collections.abc import Sequence
from typing import Annotated, Any

from cyclopts import Parameter


def _numbers(kind: Any, tokens: Sequence[Any]) -> list[Any]:
    """The numbers of a flag, separated by commas or given by several flags."""
    number = int if int in typing.get_args(kind) else float
    found = []
    for word in (word for token in tokens for word in token.value.split(",")):
        try:
            found.append(number(word))
        except ValueError:
            what = "whole number" if number is int else "number"
            raise ValueError(f"{word!r} is no {what}; give numbers with commas between") from None
    return found


Rates = Annotated[list[float], Parameter(converter=_numbers, n_tokens=1)]
Seeds = Annotated[list[int], Parameter(converter=_numbers, n_tokens=1)]
