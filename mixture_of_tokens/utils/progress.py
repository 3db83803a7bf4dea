"""What long calls say on standard error while they work: lines, warnings and progress bars.

All of it goes by one logger. `logging.getLogger("mixture_of_tokens.progress").setLevel("WARNING")` leaves warnings
alone, "ERROR" nothing.
"""

import logging
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from mixture_of_tokens.utils.process import is_main


class _Lines(logging.Handler):
    """On what is standard error by then."""

    def emit(self, record: logging.LogRecord) -> None:
        print(record.getMessage(), file=sys.stderr)


LOGGER = logging.getLogger("mixture_of_tokens.progress")  # every process of torchrun speaks by it
LOGGER.setLevel(logging.INFO)
LOGGER.propagate = False
LOGGER.addHandler(_Lines())


def say(what: str) -> None:
    """A line of the first process."""
    if is_main():
        LOGGER.info(what)


def warn(what: str) -> None:
    """The same of what a person may want to change."""
    if is_main():
        LOGGER.warning(f"mot: {what}")


say_once, warn_once = cache(say), cache(warn)


@contextmanager
def warned_if_slow(what: str, seconds: float = 2.0) -> Iterator[None]:
    """A warning once the block has taken so long; what fails at once has an error alone."""
    timer = threading.Timer(seconds, warn_once, [what])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def progress_bar(what: str | None, items: Iterable[Any] | None = None, *, hidden: bool = False, **how: Any) -> Any:
    """tqdm's bar of this process, with its arguments."""
    from tqdm import tqdm

    hidden = hidden or not LOGGER.isEnabledFor(logging.INFO)
    return tqdm(items, what, dynamic_ncols=True, disable=hidden, **how)
