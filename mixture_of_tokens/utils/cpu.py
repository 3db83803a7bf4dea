"""What makes a process fast on a CPU: how its threads wait for each other, and that it keeps freed memory."""

import ctypes
import os
import platform
import sys

# How long a thread of OpenMP spins before it sleeps: of GNU's, turns of a loop (some 10 microseconds); of LLVM's and
# Intel's, milliseconds.
BRIEFLY = {"GOMP_SPINCOUNT": "2000", "KMP_BLOCKTIME": "1"}
OWN_CHOICE = ("OMP_WAIT_POLICY", *BRIEFLY)


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


def cores() -> int:
    """Those that this process may run on, which may be fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


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
