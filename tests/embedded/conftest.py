"""What tests of generators need: delegators in threads, code that is interrupted, lists of calls."""

from __future__ import annotations

import ctypes
import dis
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from types import FrameType
from typing import Any, Final, TypeAlias

import pytest

import zflake
from tests.conftest import serving
from zflake.core.layout import DEFAULT, Layout
from zflake.delegator.server import Delegator, DelegatorConfig
from zflake.delegator.start import Wishes
from zflake.embedded.generator import LeasedGenerator, StaticGenerator
from zflake.wire.endpoint import parse_endpoint

ANY: Final = parse_endpoint("tcp://127.0.0.1:*", to_bind=True)
PACKAGE: Final = Path(zflake.__file__).parent
TRACED: Final = tuple(str(PACKAGE / part) for part in ("embedded", "holder", "core/ticks.py"))
"""The code in which a call is interrupted."""

AnyGenerator: TypeAlias = LeasedGenerator | StaticGenerator


@contextmanager
def delegator(
    store: str = "memory:",
    bind: str = "tcp://127.0.0.1:*",
    *,
    new: bool = True,
    ttl_ms: int | None = None,
    machines: tuple[int, int] | None = None,
    layout: Layout | None = None,
) -> Iterator[Delegator]:
    """A delegator in a thread."""
    wishes = Wishes(layout=layout, ttl_ms=ttl_ms, machines=machines, new=new)
    config = DelegatorConfig(parse_endpoint(bind, to_bind=True), store, wishes)
    with serving(lambda waker: Delegator(config, waker)) as serves:
        yield serves


@pytest.fixture(scope="module")
def shared() -> Iterator[str]:
    """The endpoint of a delegator with plenty of machine IDs."""
    with delegator() as serves:
        yield serves.address


@pytest.fixture(params=["static", "leased"])
def either(request: pytest.FixtureRequest, shared: str) -> Iterator[AnyGenerator]:
    """A generator of each kind, in use."""
    static = request.param == "static"
    with StaticGenerator(DEFAULT, 5) if static else LeasedGenerator(shared) as ids:
        ids.next_id()
        yield ids


class Calls:
    """IDs, with what came before what: of two calls, the one that ended before the other began is first."""

    def __init__(self) -> None:
        self.made: list[tuple[int, int, int, int]] = []  # begun, ended, lowest, highest
        self.ids: list[int] = []
        self._clock = count()

    def make(self, call: Callable[[], int | list[int]]) -> None:
        begun = next(self._clock)
        ids = call()
        ended = next(self._clock)
        ids = ids if isinstance(ids, list) else [ids]
        self.made.append((begun, ended, ids[0], ids[-1]))
        self.ids.extend(ids)
        assert ids == sorted(ids)

    def check(self) -> None:
        """No ID twice, and no call gave less than one that had ended before it began."""
        assert len(set(self.ids)) == len(self.ids)
        highest = -1
        ended = sorted((end, high) for _, end, _, high in self.made)
        at = 0
        for begun, _, low, _ in sorted(self.made):
            while at < len(ended) and ended[at][0] < begun:
                highest = max(highest, ended[at][1])
                at += 1
            assert low > highest


def interrupt(call: Callable[[], Any], at: int, handler: Callable[[], Any], *, real: bool = False) -> bool:
    """Run `call`, and in it, before the step numbered `at` of the generators' code, `handler`.

    It is what a signal does, at the place of the test's choice; with `real` only where the interpreter looks
    for signals.  False where there was no such step.
    """
    steps = count()
    done = False
    before_frame: FrameType | None = None
    before_step = ""

    def trace(frame: FrameType, event: str, _arg: Any) -> Any:
        nonlocal done, before_frame, before_step
        if not frame.f_code.co_filename.startswith(TRACED):
            return None
        frame.f_trace_opcodes = True
        if event != "opcode":
            return trace
        # That is after a call of a C function, at the start of a Python one, and where a loop jumps back.
        looks = before_frame is frame and before_step in ("RESUME", "CALL", "JUMP_BACKWARD")
        before_frame, before_step = frame, dis.opname[frame.f_code.co_code[frame.f_lasti]]
        if (looks or not real) and next(steps) == at:
            done = True
            sys.settrace(None)
            handler()
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(before)
    return done


_fork: Final[Callable[[], int]] = ctypes.PyDLL(None).fork  # PyDLL: the child must have the GIL


def libc_fork() -> int:
    """A fork that Python does not hear of.

    A thread that has waited a switch interval for the GIL asks its owner to hand it over.  A child that inherits such
    a request hands it to a thread that the child does not have, and hangs; so no thread asks at the moment of the fork.
    """
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1)
    time.sleep(2 * interval)  # the threads that wait already have their turn
    pid = _fork()
    sys.setswitchinterval(interval)
    return pid


def in_child(fork: Callable[[], int], work: Callable[[], list[int]]) -> list[int]:
    """What `work` gives in a forked child; `AssertionError` where it fails there."""
    read, write = os.pipe()
    pid = fork()
    if pid == 0:  # pragma: no cover
        status = 1
        signal.signal(
            signal.SIGALRM, signal.SIG_DFL
        )  # which ends a child that hangs, whatever pytest-timeout wants
        signal.alarm(30)
        try:
            os.write(write, " ".join(map(str, work())).encode())
            status = 0
        finally:
            os._exit(status)
    os.close(write)
    with os.fdopen(read) as pipe:
        numbers = [int(text) for text in pipe.read().split()]
    assert os.waitpid(pid, 0)[1] == 0
    return numbers


@contextmanager
def taking(ids: AnyGenerator) -> Iterator[list[int]]:
    """Three threads that take IDs all the time, into the list that this gives."""
    taken: list[int] = []
    stop = threading.Event()

    def take() -> None:
        while not stop.is_set():
            taken.append(ids.next_id())

    threads = [threading.Thread(target=take) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        yield taken
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def storm(calls: Calls, ids: AnyGenerator, *, times: int) -> int:
    """Mint while a signal handler that mints as well comes every 50 us, until it came `times` times; gives how often."""
    handled = 0

    def handler(*_: Any) -> None:
        nonlocal handled
        calls.make(ids.next_id if handled % 2 == 0 else lambda: ids.next_ids(5))
        handled += 1

    before = signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, 50e-6, 50e-6)
    try:
        deadline = time.monotonic() + 10
        while handled < times and time.monotonic() < deadline:
            calls.make(ids.next_id)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    return handled
