"""How a command's function, which has the signature and the help, comes to the one that does the work."""

import functools
import importlib
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from mixture_of_tokens.utils.checks import checked

P = ParamSpec("P")
R = TypeVar("R")


def calls(module: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """A function that gives its arguments, checked, to the function of its name in a module of the library.

    The module, and torch with it, is imported only then. The function's own body is what comes before that.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @checked
        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            function(*args, **kwargs)
            does = getattr(importlib.import_module(f"mixture_of_tokens.{module}"), function.__name__)
            return does(*args, **kwargs)

        return call

    return decorate
