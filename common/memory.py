"""Memory of the process."""

from __future__ import annotations

import ctypes
import os

#: Parameters of glibc's `mallopt`, by number, and what they are set to: nothing is mapped by itself, and the heap keeps its end.
KEEPING = {-4: 0, -1: 2**31 - 1}


def keep_freed_memory() -> bool:
    """Have the C library keep large pieces of memory that are freed, instead of giving them back and asking for them anew.

    A training on a CPU frees and needs the same pieces in each step, and each page that is new takes the system a while. For
    the rest of the process; without effect where there is no glibc, or where the environment sets its allocator.

    Returns:
        whether it does now.
    """
    if any(name.startswith("MALLOC_") for name in os.environ):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library, or none that can be asked
        return False
    taken = [mallopt(number, value) for number, value in KEEPING.items()]  # all of them, also after one that is refused
    return all(taken)
