"""Memory of a server that stays up.

glibc gives every thread a heap of its own, up to eight a core, and each keeps what it was freed of: after some hundred
requests such a server holds twice the memory that it uses. Elsewhere than on glibc nothing here does anything.
"""

import ctypes
import sys
from contextlib import suppress

M_ARENA_MAX = -8  # of malloc.h
HEAPS = 2


def share_heaps() -> None:
    """From now on threads share a few heaps. To be called before there are many threads."""
    if sys.platform == "linux":
        with suppress(AttributeError, OSError):
            ctypes.CDLL(None).mallopt(M_ARENA_MAX, HEAPS)


def give_back() -> None:
    """Return to the system what is free; takes a few milliseconds."""
    if sys.platform == "linux":
        with suppress(AttributeError, OSError):
            ctypes.CDLL(None).malloc_trim(0)
