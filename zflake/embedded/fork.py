"""Memory that a fork wipes: how a generator knows, before each ID, that it is still in its own process.

A forked child has its parent's generators, and would hand out the very IDs that the parent does.  Python's
own fork hooks don't run if foreign code forks.  So the time until which a generator may hand out IDs without
looking around lies in memory that the kernel gives to a child as zeros: in a child, the time is always up.  To
read it costs no more than to read any list.
"""

from __future__ import annotations

import mmap
import os
from typing import Final, Protocol

UNTIL: Final = 0
"""Index of the time until which IDs may be handed out without looking around (monotonic clock, ns)."""
MINE: Final = 1
"""Index of the number that is 0 in a forked child."""

_WIPE_ON_FORK: Final = 18  # MADV_WIPEONFORK, Linux 4.14; the mmap module does not name it
_BYTES: Final = 16


class Page(Protocol):
    """Two numbers, `UNTIL` and `MINE`, both 0 in every forked child."""

    def __getitem__(self, at: int, /) -> int: ...

    def __setitem__(self, at: int, number: int, /) -> None: ...


class PidPage:
    """A page for kernels that wipe nothing: it asks for the process ID each time, which is slower."""

    __slots__ = ("_numbers", "_pid")

    def __init__(self) -> None:
        self._pid = os.getpid()
        self._numbers = [0, 0]

    def __getitem__(self, at: int) -> int:
        return self._numbers[at] if os.getpid() == self._pid else 0

    def __setitem__(self, at: int, number: int) -> None:
        self._numbers[at] = number


def new_page() -> Page:
    """A page of this process: `MINE` is 1, `UNTIL` is in the past."""
    page = _wiped_page() or PidPage()
    page[MINE] = 1
    return page


def own_page() -> Page:
    """The page of this process, always the same; a forked child has a new one.

    Its `MINE` tells a caller that looks later whether that is still the same process.
    """
    global _own  # noqa: PLW0603
    page = _own
    if page is None or not page[MINE]:
        page = _own = new_page()
    return page


def _wiped_page() -> Page | None:
    try:
        memory = mmap.mmap(-1, _BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        memory.madvise(_WIPE_ON_FORK)
    except (AttributeError, OSError):  # another system, or an old kernel
        return None
    return memoryview(memory).cast("q")


_own: Page | None = None
