"""Memory of a server that stays up.

glibc gives every thread a heap of its own, up to eight a core, and each keeps what it was freed of: after some hundred
requests such a server holds twice the memory that it uses. Elsewhere than on glibc nothing here does anything.
"""

import ctypes
import sys
import time
from collections.abc import Callable
from contextlib import suppress

M_ARENA_MAX = -8  # of malloc.h
HEAPS = 2
GIVE_BACK_EVERY = 2.0  # s


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


def give_back_for_ever(count: Callable[[], int]) -> None:
    """Do so soon after every piece of work. count: of the pieces so far"""
    before = 0
    while True:
        time.sleep(GIVE_BACK_EVERY)
        if (now := count()) != before:
            before = now
            give_back()
