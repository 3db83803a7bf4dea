"""What belongs to a whole process: its place among those of torchrun, and which of them speaks for all; one training at
a time; and its end, by SIGTERM, with its parent's or with torchrun's."""

import importlib.util
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

Failure = TypeVar("Failure", bound=BaseException)
_TRAINING = threading.RLock()
TORCHRUN = "TORCHELASTIC_RUN_ID"  # in the environment of its processes


@contextmanager
def the_only_training() -> Iterator[None]:
    """Of this process: others would draw from the same random numbers, and reset what accelerate knows of this one.

    Raises ValueError while another thread is training.
    """
    if not _TRAINING.acquire(blocking=False):
        raise ValueError("another thread of this process is training: wait for it, or start a process for each")
    try:
        yield
    finally:
        _TRAINING.release()


def missing_package(error: ModuleNotFoundError) -> str | None:
    """The package that is not installed; None where an installed one lacks a module: a fault, or another version."""
    package = (error.name or "").partition(".")[0]
    return package if package and importlib.util.find_spec(package) is None else None


def process_count() -> int:
    """Of those that torchrun started."""
    return max(1, _of_torchrun("WORLD_SIZE", 1))


def check_one_process() -> None:
    """Raises ValueError for several, which would each do all of the work."""
    if process_count() > 1:
        raise ValueError(f"{process_count()} processes would each do all of the work: leave out torchrun")


def process_number() -> int:
    """This process's, among those of torchrun."""
    return _of_torchrun("RANK", 0) if process_count() > 1 else 0


def _of_torchrun(name: str, alone: int) -> int:
    """A number of the environment. Raises ValueError for what is none."""
    word = os.environ.get(name) or str(alone)
    if not word.isdecimal():
        raise ValueError(f"{name}={word} in the environment is no whole number: torchrun sets it, so leave it unset")
    return int(word)


def processes_here() -> int:
    """Of those that torchrun started, on this machine."""
    return max(1, _of_torchrun("LOCAL_WORLD_SIZE", process_count()))


def place_of_machine() -> tuple[int, int, bool]:
    """This machine's number, how many there are, and whether this is its first process."""
    here = processes_here()
    return process_number() // here, max(1, process_count() // here), process_number() % here == 0


@contextmanager
def by_itself() -> Iterator[None]:
    """As if torchrun had started no other process."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    before = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ |= before


def is_main() -> bool:
    """Whether this process is the first of those that torchrun started, or the only one."""
    return process_number() == 0


class Interrupted(KeyboardInterrupt):
    """A training that a signal has ended.

    number: the signal's; directory: of the run, which can be gone on with.
    """

    def __init__(self, what: str, number: int, directory: Path):
        super().__init__(what)
        self.number, self.directory = number, directory


@contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """Until the end of the block SIGTERM raises KeyboardInterrupt, as ^C does, but with its number."""

    def end(number: int, frame: object) -> None:
        raise KeyboardInterrupt(number)

    with answered(end, signal.SIGTERM):
        yield


@contextmanager
def answered(handler: Callable[[int, Any], None], *numbers: int) -> Iterator[None]:
    """Signals of these numbers go to a handler until the end of the block; only the main thread can ask for them."""
    numbers = numbers if threading.current_thread() is threading.main_thread() else ()
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, earlier in before.items():  # None is of one that was not set from Python, which cannot set it again
            signal.signal(number, signal.SIG_DFL if earlier is None else earlier)


def end_with_parent() -> None:
    """End this process, which multiprocessing has started, when its parent ends, also when that is killed."""

    def wait(parent: Any) -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, args=(multiprocessing.parent_process(),), daemon=True).start()


def have_met() -> bool:
    """Whether this process and the others of torchrun exchange anything yet."""
    torch: Any = sys.modules.get("torch")
    return torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized()


def leave_processes() -> None:
    """At the end of a process of torchrun: threads of torch that still wait for others would end it by a signal."""
    if have_met():
        sys.modules["torch"].distributed.destroy_process_group()


def of_all(error: Failure) -> Failure:
    """Mark an error that all processes raise together, so that one of them tells it."""
    vars(error)["of_all"] = True
    return error


def is_told(error: BaseException) -> bool:
    """Whether another process tells of this error."""
    return getattr(error, "of_all", False) and not is_main()
