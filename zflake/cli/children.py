"""Daemons as child processes, for as long as this process lives.

Each child's standard input is a pipe whose other end only this process holds.  However this process ends, by Ctrl-C
or by SIGKILL, the pipes close, and the children stop by themselves.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import FrameType
from typing import Any, Final, NamedTuple, TypeAlias

from zflake.errors import Unavailable
from zflake.wire.codec import printable

START_S: Final = 20.0
"""Seconds that a daemon may take to start."""
STOP_S: Final = 5.0
"""Seconds that daemons may take to drain before they are killed."""
CALM_S: Final = 10.0
"""Seconds after whose run a child that ended is started again at once."""


class Command(NamedTuple):
    """How a daemon is started."""

    module: str
    arguments: Sequence[str]
    environment: Mapping[str, str] = {}
    """Variables beside this process's own: unlike arguments, `ps` does not show them to other users."""


LogEvent: TypeAlias = tuple[str, dict[str, Any] | None]
"""A child's name and a line of its log, or None when it has ended."""


class Child:
    """One daemon and its log."""

    def __init__(self, name: str, command: Command, events: queue.SimpleQueue[LogEvent]) -> None:
        self.name = name
        self.address: str | None = None
        """Where it serves, once it does."""
        self.last_words: list[str] = []
        """Its output beside its log: why it ended, or a traceback."""
        self._events = events
        self.started_at = time.monotonic()
        # Its own process group: Ctrl-C goes to this process alone, which stops the children in order.
        self.process = subprocess.Popen(  # noqa: S603
            [
                sys.executable,
                "-m",
                command.module,
                *command.arguments,
                "--follow-stdin",
                "--log-format",
                "json",
            ],
            env={**os.environ, **command.environment},
            stdin=subprocess.PIPE,
            stderr=subprocess.PIPE,
            process_group=0,
        )
        threading.Thread(target=self._listen, name=f"listen-{name}", daemon=True).start()

    def stop(self) -> None:
        """Ask it to drain."""
        if self.process.stdin is not None:
            self.process.stdin.close()

    def wait(self, until: float) -> None:
        """Wait for its end; past `until` (monotonic) end it."""
        try:
            self.process.wait(max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def _listen(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            try:
                event = json.loads(line)
                self.address = event.get("address") or self.address
            except (ValueError, AttributeError):
                self.last_words.append(printable(line.decode(errors="replace").strip()))
                continue
            self._events.put((self.name, event))
        self.process.wait()
        self._events.put((self.name, None))


class Children:
    """Starts daemons, repeats their complaints, starts again what ends, and stops all in order.

    `command_of` gives the command of the daemon of a name, anew for each start.
    """

    def __init__(self, command_of: Callable[[str], Command]) -> None:
        self.stopping = False
        """Whether a signal asked this process to stop, or `stop` did."""
        self._command_of = command_of
        self._events: queue.SimpleQueue[LogEvent] = queue.SimpleQueue()
        self._children: dict[str, Child] = {}

    def heed_signals(self) -> None:
        """Stop at the first SIGTERM, SIGINT or SIGHUP; end this process at the second."""
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self._signalled)

    def start(self, name: str, *extra: str) -> None:
        """Start the daemon of that name, this time with `extra` arguments."""
        command = self._command_of(name)
        command = command._replace(arguments=[*command.arguments, *extra])
        self._children[name] = Child(name, command, self._events)

    def await_address(self, name: str) -> str:
        """Where the daemon of that name serves; raises `Unavailable` if it does not start."""
        child = self._children[name]
        deadline = time.monotonic() + START_S
        while child.address is None:
            self.tend(0.01)
            if child.process.poll() is not None or time.monotonic() > deadline:
                self.tend(0.1)
                raise Unavailable(f"the {name} did not start")
        return child.address

    def tend(self, seconds: float) -> None:
        """Take in what the children log, for some time or until there is reason to stop."""
        deadline = time.monotonic() + seconds
        while not self.stopping:
            try:
                name, event = self._events.get(timeout=max(0.0, min(0.2, deadline - time.monotonic())))
            except queue.Empty:
                if time.monotonic() >= deadline:
                    return
                continue
            if event is None:
                self._restart(name)
            elif event.get("level") in ("warning", "error", "critical"):
                print(f"{name}: {printable(str(event.get('message')))}", file=sys.stderr, flush=True)

    def stop(self, *groups: Iterable[str]) -> None:
        """Stop all children, one group of names after the other."""
        self.stopping = True
        for names in groups:
            children = [self._children[name] for name in names if name in self._children]
            deadline = time.monotonic() + STOP_S
            for child in children:
                child.stop()
            for child in children:
                child.wait(deadline)

    def _restart(self, name: str) -> None:
        child = self._children[name]
        ran_s = time.monotonic() - child.started_at
        *traceback, reason = child.last_words or [f"exit code {child.process.returncode}"]
        for line in traceback:
            print(f"{name}: {line}", file=sys.stderr)
        if child.address is None:
            raise Unavailable(f"{name} did not start: {reason}")
        print(f"{name} ended ({reason}); starting it again", file=sys.stderr, flush=True)
        if ran_s < CALM_S:
            time.sleep(1.0)
        self.start(name)

    def _signalled(self, number: int, _frame: FrameType | None) -> None:
        if self.stopping:
            os._exit(128 + number)  # the children see their pipes close
        self.stopping = True
