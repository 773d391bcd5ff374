"""Keep freed memory in the process.

A forward pass on a CPU asks for the same few hundred MiB again and again. glibc's `malloc` gives each large block back to the
system as soon as it is free, which then hands out empty pages anew, one fault for 4 KiB: a quarter of the pass on a virtual
machine (docs/performance.md). With `keep_freed_memory` freed blocks below `LARGE` stay with the process and are used again.
The command `elsteer` calls it; a program of your own may.

Two settings of glibc (mallopt(3)): M_MMAP_THRESHOLD, from which size on a block is mapped by itself and so given back when freed,
and M_TRIM_THRESHOLD, how much may lie free at the end of the heap.
"""

from __future__ import annotations

import ctypes
import os
import sys

__all__ = ["LARGE", "keep_freed_memory"]

LARGE = 1 << 30  # bytes; a larger block is given back when it is freed
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_NEVER = -1


def keep_freed_memory() -> bool:
    """Let glibc keep freed blocks below `LARGE` bytes; for the whole process, and for good.

    Returns whether it does. It does not where the C library is another one (macOS, Windows, musl), and where the user
    has set `MALLOC_..._` variables or `GLIBC_TUNABLES`, which stand.
    """
    chosen = [name for name in os.environ if name.startswith("MALLOC_") or name == "GLIBC_TUNABLES"]
    if chosen or not sys.platform.startswith("linux"):
        return False
    library = ctypes.CDLL(None)
    if not hasattr(library, "gnu_get_libc_version") or not hasattr(library, "mallopt"):
        return False
    return bool(library.mallopt(_M_MMAP_THRESHOLD, LARGE)) and bool(library.mallopt(_M_TRIM_THRESHOLD, _NEVER))
