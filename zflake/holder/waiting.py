"""Waiting for another thread's news, also in a signal handler that interrupts its own thread's waiting.

A `Condition` has a lock that a handler may find half-taken, and news that come between a look and the
waiting are lost where a handler waits in between.  Here each who waits has a lock of his own, hung up before
he looks a last time.
"""

from __future__ import annotations

import threading
from collections import deque


class News:
    """Something that turns: `count` says how often it has."""

    __slots__ = ("_waiting", "count")

    def __init__(self) -> None:
        self.count = 0
        self._waiting: deque[threading.Lock] = deque()

    def spread(self) -> None:
        """Count one more, and wake whoever waits; by one thread only."""
        self.count += 1
        waiting = self._waiting
        while waiting:
            waiting.popleft().release()

    def wait(self, seen: int, timeout_s: float) -> None:
        """Return once `count` is no longer `seen`, or after `timeout_s` seconds."""
        alarm = threading.Lock()
        alarm.acquire()
        self._waiting.append(alarm)
        if self.count == seen and timeout_s > 0:
            alarm.acquire(timeout=min(timeout_s, threading.TIMEOUT_MAX))

    @property
    def wanted(self) -> bool:
        """Whether somebody has waited since the last news."""
        return bool(self._waiting)
