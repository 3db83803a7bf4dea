"""Words of errors: settings as whoever called writes them (--batch-size, or batch_size in Python), nearest names."""

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from difflib import get_close_matches

_BY_FLAGS = ContextVar("by_flags", default=False)
# A flag, with the command line that it belongs to, if there is one, as in `mot train --from DIR`.
FLAG = re.compile(r"(?P<command>\b(?:mot|torchrun)\b[^;:,]*)?(?<![\w-])--(?P<name>[a-z][a-z-]*)(?P<field>\.\w+)?")
OTHERWISE = {"from": "start"}  # a word of Python


@contextmanager
def by_flags() -> Iterator[None]:
    """Within it, settings keep the names that the command line has for them."""
    token = _BY_FLAGS.set(True)
    try:
        yield
    finally:
        _BY_FLAGS.reset(token)


@contextmanager
def as_called() -> Iterator[None]:
    """Name settings in an error or an `Interrupted` as arguments, unless it is the command line that called."""
    try:
        yield
    except (ValueError, KeyboardInterrupt) as error:
        if not _BY_FLAGS.get() and error.args and isinstance(error.args[0], str):
            error.args = (FLAG.sub(_argument, error.args[0]), *error.args[1:])
        raise


def _argument(flag: re.Match[str]) -> str:
    if flag["command"]:
        return flag[0]
    name = OTHERWISE.get(flag["name"], flag["name"].replace("-", "_"))
    return name + (flag["field"] or "")


def nearest(word: str, legal: Iterable[str]) -> str:
    """'; did you mean WORD?' for the legal word closest to a mistyped one, '' where none is close."""
    by_lower = {each.lower(): each for each in legal}
    close = get_close_matches(word.lower(), by_lower, n=1)
    return f"; did you mean {by_lower[close[0]]}?" if close else ""
