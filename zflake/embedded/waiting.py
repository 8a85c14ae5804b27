"""Waiting for another thread's news, also in a signal handler that interrupts its own thread's waiting.

A `Condition` has a lock that a handler may find half-taken, and news that come between a look and the wait are
lost if a handler waits in between.  Here each waiter has a lock of its own, hung up before it looks a last time.
"""

from __future__ import annotations

import threading
from collections import deque


class News:
    """News of one thread for others; `count` says how often there were any."""

    __slots__ = ("_waiting", "count")

    def __init__(self) -> None:
        self.count = 0
        self._waiting: deque[threading.Lock] = deque()

    def spread(self) -> None:
        """Count one more, and wake all waiters; by one thread only."""
        self.count += 1
        waiting = self._waiting
        while waiting:
            waiting.popleft().release()

    def wait(self, seen: int, timeout_s: float) -> None:
        """Return once `count` is no longer `seen`, or after `timeout_s` seconds."""
        waker = threading.Lock()
        waker.acquire()
        self._waiting.append(waker)
        if self.count == seen and timeout_s > 0:
            waker.acquire(timeout=min(timeout_s, threading.TIMEOUT_MAX))

    @property
    def wanted(self) -> bool:
        """Whether a thread has waited since the last news."""
        return bool(self._waiting)
