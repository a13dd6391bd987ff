"""The memory of training on the CPU: kept between steps, which all need the same amount."""

import ctypes

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3  # of malloc.h
_KEPT, _AHEAD, _MAPPED = 2**31 - 1, 64 * 2**20, 32 * 2**20
"""Bytes: free ones that are kept, taken at once from the system, and from which a block is mapped (at most that)."""


def keep_freed_memory() -> bool:
    """Let this process keep the memory that it frees; return whether the C library could be told so (glibc can).

    Usually memory of large tensors goes back to the system after every layer and is handed out again, page by page and
    zeroed, in the next, which takes a twentieth of a step of ResNet-20 in float32. It concerns the whole process and
    cannot be taken back, so only a process that is there to train should call it.
    """
    try:
        tell = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return False
    return all(
        tell(what, size) == 1
        for what, size in ((_M_MMAP_THRESHOLD, _MAPPED), (_M_TRIM_THRESHOLD, _KEPT), (_M_TOP_PAD, _AHEAD))
    )
