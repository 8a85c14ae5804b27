"""How a poll loop is interrupted.

Both daemons are one poll loop.  A signal, another thread or the end of a supervisor interrupts it by a byte in a
socket pair that the loop polls: a handler that only set a flag would not wake it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import time
from types import FrameType
from typing import Final, Self

import zmq

AGAIN_S: Final = 0.5
"""Seconds in which a second signal counts as the first one again: a service manager signals all processes, and
so does a supervisor that it signalled."""


class Waker:
    """Wakes a poll loop from signal handlers and other threads, and says when to stop.

    The first SIGTERM or SIGINT asks the loop to drain, a second one, at least `AGAIN_S` later, ends the
    process at once (exit code 128 + signal).  With `follow_stdin` the end of standard input counts as a first signal:
    a supervisor holds the other end of that pipe, and its death, of whatever kind, closes it.

    Used as a context manager, in the main thread; the signals' old handlers come back at the end.
    """

    def __init__(self, *, follow_stdin: bool = False) -> None:
        self.stopping = False
        """Whether the loop should drain and end."""
        self._follow_stdin = follow_stdin
        self._signalled_at: float | None = None
        self._read, self._write = socket.socketpair()
        self._read.setblocking(False)  # noqa: FBT003
        self._write.setblocking(False)  # noqa: FBT003
        self._undo = contextlib.ExitStack()

    def __enter__(self) -> Self:
        old_fd = signal.set_wakeup_fd(self._write.fileno(), warn_on_full_buffer=False)
        self._undo.callback(signal.set_wakeup_fd, old_fd)
        for number in (signal.SIGTERM, signal.SIGINT):
            self._undo.callback(signal.signal, number, signal.signal(number, self._signalled))
        return self

    def __exit__(self, *_: object) -> None:
        self._undo.close()
        self._read.close()
        self._write.close()

    def register(self, poller: zmq.Poller) -> None:
        """Have `poller` watch this waker."""
        poller.register(self._read, zmq.POLLIN)
        if self._follow_stdin:
            poller.register(sys.stdin.fileno(), zmq.POLLIN)

    def wake(self) -> None:
        """Wake the loop; from any thread."""
        with contextlib.suppress(BlockingIOError):  # the pipe is full of bytes that wake the loop already
            self._write.send(b"!")

    def take(self, events: dict[object, int]) -> None:
        """Take in what a poll found."""
        if self._read.fileno() in events:
            with contextlib.suppress(BlockingIOError):
                while self._read.recv(4096):
                    pass
        if self._follow_stdin and sys.stdin.fileno() in events and not os.read(sys.stdin.fileno(), 4096):
            self._follow_stdin = False
            self.stopping = True

    def _signalled(self, number: int, _frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._signalled_at is None:
            self._signalled_at = now
        elif now - self._signalled_at >= AGAIN_S:
            os._exit(128 + number)
        self.stopping = True
