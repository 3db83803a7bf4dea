"""Memory allocation on the CPU: keep large blocks from one step to the next."""

import ctypes
import platform
import sys


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
