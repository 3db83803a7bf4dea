"""Memory that is kept: glibc told not to return large blocks to the system at every step."""

import ctypes
import platform
import sys


def keep_large_blocks() -> bool:
    """Keep glibc from returning large blocks to the system. Returns whether it could be set.

    Gradients and mixtures of a granular layer are hundreds of megabytes, which glibc maps and unmaps at every step: a
    third of a training step on the CPU was page faults.
    """
    if sys.platform != "linux" or platform.libc_ver()[0] != "glibc":
        return False
    m_trim_threshold, m_mmap_threshold, largest = -1, -3, 2**31 - 1  # malloc.h
    libc = ctypes.CDLL(None)
    return bool(libc.mallopt(m_mmap_threshold, largest) and libc.mallopt(m_trim_threshold, largest))
