"""What belongs to a whole process: its place among those of torchrun, and which of them speaks for all; one training at
a time; its end with its parent's; and how threads wait and freed memory is kept, which make it fast on a CPU."""

import ctypes
import importlib.util
import multiprocessing
import os
import platform
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, TypeVar

# How long a thread of OpenMP spins before it sleeps: of GNU's, turns of a loop (some 10 microseconds); of LLVM's and
# Intel's, milliseconds.
BRIEFLY = {"GOMP_SPINCOUNT": "2000", "KMP_BLOCKTIME": "1"}
Failure = TypeVar("Failure", bound=BaseException)
OWN_CHOICE = ("OMP_WAIT_POLICY", *BRIEFLY)


_TRAINING = threading.RLock()


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


def place_of_machine() -> tuple[int, int, bool]:
    """This machine's number, how many there are, and whether this is its first process."""
    here = max(1, _of_torchrun("LOCAL_WORLD_SIZE", process_count()))
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


@cache
def say_once(what: str) -> None:
    """A line on standard error, of the first process."""
    if is_main():
        print(what, file=sys.stderr)


def end_with_parent() -> None:
    """End this process, which multiprocessing has started, when its parent ends, also when that is killed."""

    def wait(parent: Any) -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, args=(multiprocessing.parent_process(),), daemon=True).start()


def leave_processes() -> None:
    """At the end of a process of torchrun: threads of torch that still wait for others would end it by a signal."""
    torch: Any = sys.modules.get("torch")
    if torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def of_all(error: Failure) -> Failure:
    """Mark an error that all processes raise together, so that one of them tells it."""
    vars(error)["of_all"] = True
    return error


def is_told(error: BaseException) -> bool:
    """Whether another process tells of this error."""
    return getattr(error, "of_all", False) and not is_main()


def spin_briefly() -> bool:
    """Let threads that wait for each other sleep soon. Returns whether it has set anything.

    It must be called before torch is loaded, as that is when OpenMP reads these variables. Who has set one of them
    keeps their own choice.

    Threads of OpenMP spin for milliseconds by default. When another process uses one of the cores, they spin for a
    thread that does not run, at every matrix product: a step of training then takes 10 to 30 times as long.
    """
    if any(name in os.environ for name in OWN_CHOICE):
        return False
    os.environ |= BRIEFLY
    return True


def keep_large_blocks() -> bool:
    """Keep glibc from returning large blocks to the system. Returns whether it could be set.

    At high granularity, gradients and mixtures take hundreds of megabytes, which glibc maps and unmaps at every step.
    Page faults were a third of a training step on the CPU.
    """
    if sys.platform != "linux" or platform.libc_ver()[0] != "glibc":
        return False
    m_trim_threshold, m_mmap_threshold, largest = -1, -3, 2**31 - 1  # malloc.h
    libc = ctypes.CDLL(None)
    return bool(libc.mallopt(m_mmap_threshold, largest) and libc.mallopt(m_trim_threshold, largest))
