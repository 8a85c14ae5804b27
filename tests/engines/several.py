"""Several delegators on one store, each with a network of its own to it, and tests that take turns on them.

A *site* is one engine's server and what runs on it.  The tests of one engine share its site, so one worker of
pytest-xdist runs them all, one after another.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Final, Self

import pytest

from tests.jobs.checker import Verdict, leases_in, windows_of
from tests.places import SERVED
from tests.proxy import Mode, Proxy
from tests.servers import Etcd, Postgres, Redis, Server
from tests.system.daemons import Daemon, Daemons, children_of, ready_at, status_of, until

TTL_MS: Final = 20_000
"""Milliseconds of a window of the shared cluster: an outage of 6 s ends no window, by far."""
HEALTHY_MS: Final = TTL_MS * 6 // 10
SOON_S: Final = 1.0
"""Seconds for what waits for no store; generous, for a machine with other work."""


def several(*engines: str) -> pytest.MarkDecorator:
    """Try a test on each of these engines (all of them by default); those of one engine take turns on its site."""
    sites = [
        pytest.param(
            engine,
            marks=[
                pytest.mark.xdist_group(f"several-{engine}"),
                *([pytest.mark.long] * (engine != SERVED[0])),
            ],
        )
        for engine in engines or SERVED
    ]
    return pytest.mark.parametrize("site", sites, indirect=True)


@pytest.fixture(scope="module")
def site(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """The site of an engine, which a module's tests share."""
    for folder in (sites := tmp_path_factory.mktemp("several"), *sites.parents[:3]):
        folder.chmod(0o711)  # PostgreSQL's server is not root
    with Site(request.param, sites / request.param) as site:
        yield site


class Site:
    """A server, and what runs on it; entered, it ends all of that at last."""

    def __init__(self, engine: str, folder: Path) -> None:
        self.engine = engine
        self.folder = folder
        self._numbers = itertools.count(1)
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        self.folder.mkdir(mode=0o711)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @cached_property
    def daemons(self) -> Daemons:
        return self._stack.enter_context(Daemons(self.folder))

    @cached_property
    def server(self) -> Server:
        kinds: dict[str, type[Server]] = {"redis": Redis, "etcd": Etcd, "postgresql": Postgres}
        if self.engine == "etcd":
            Etcd.need_durable()
        server = kinds[self.engine](self.folder / "server")
        self._stack.callback(server.kill)
        server.start()
        return server

    @cached_property
    def shared(self) -> Pair:
        """A pair with two workers; scenarios leave it serving, or it is served again by `heal`."""
        pair = self._stack.enter_context(Pair(self, ttl_ms=TTL_MS))
        pair.add_workers(2)
        return pair

    def healthy(self) -> Pair:
        """The shared pair, with all in order, whatever was done to it before."""
        self.shared.heal()
        return self.shared

    def pair(self, *, ttl_ms: int) -> Pair:
        """Two more delegators, on a store of their own."""
        return Pair(self, ttl_ms=ttl_ms)

    def new_store(self) -> str:
        """The URL of a store that never was, on the server."""
        if isinstance(self.server, Postgres):
            return self.server.url_of_new_database()
        assert isinstance(self.server, Redis | Etcd)
        number = next(self._numbers)
        return (
            f"{self.server.url}?prefix=z{number}:" if self.engine == "redis" else f"{self.server.url}{number}"
        )

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        """Meanwhile the server's processes are stopped."""
        assert self.server._popen is not None
        pid = self.server._popen.pid
        pids = [pid, *children_of(pid)]
        for each in pids:
            os.kill(each, signal.SIGSTOP)
        try:
            yield
        finally:
            for each in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(each, signal.SIGCONT)


class Pair:
    """Two delegators on one store, each behind a proxy, started at once; more of them, and workers, as wanted."""

    def __init__(self, site: Site, *, ttl_ms: int) -> None:
        self.site = site
        self.url = site.new_store()
        self.ttl = f"{ttl_ms}ms"
        self.delegators: list[Daemon] = []
        self.proxies: list[Proxy] = []
        self.addresses: list[str] = []
        """Where the delegators serve."""
        self.workers: list[Daemon] = []
        self.retired: list[Daemon] = []
        """Delegators that were replaced."""
        self._lost_before = 0
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        starting = [self._begin("--new") for _ in range(2)]
        self.addresses = [delegator.address for delegator in starting]
        return self

    def __exit__(self, *_: object) -> None:
        for daemon in [*self.workers, *self.delegators]:
            daemon.kill()
        self._stack.close()

    def add_delegator(self, *flags: str, env: dict[str, str] | None = None) -> Daemon:
        """One more, behind one more proxy."""
        delegator = self._begin(*flags, env=env)
        self.addresses.append(delegator.address)
        return delegator

    def drop_delegator(self) -> None:
        """End the last one."""
        self.delegators[-1].kill()
        self.retired.append(self.delegators.pop())
        self.addresses.pop()
        self.proxies.pop()

    def restart(self, number: int, env: dict[str, str] | None = None) -> Daemon:
        """Start a delegator again that has ended, at the address that it had."""
        self.retired.append(self.delegators[number])
        self.delegators[number] = self._start(number, bind=self.addresses[number], env=env)
        return self.delegators[number]

    def add_workers(self, count: int) -> None:
        """Workers that know all delegators; every other one begins with the last."""
        for number in range(count):
            order = self.addresses if number % 2 else self.addresses[::-1]
            flags = [flag for address in order for flag in ("--delegator", address)]
            self.workers.append(self.site.daemons.worker(*flags))
        self.await_workers()

    def await_workers(self) -> None:
        """Wait until all workers are ready at all delegators."""
        names = {worker.name for worker in self.workers}
        for delegator in self.delegators:
            until(partial(_has_all, delegator, names), f"all workers to be ready at {delegator.name}")

    def heal(self) -> None:
        """See to it that all is in order, with most of each window ahead."""
        for proxy in self.proxies:
            proxy.become(Mode.PASS)
        for number, delegator in enumerate(self.delegators):
            if delegator.alive:
                delegator.signal(signal.SIGCONT)
            else:
                self.restart(number)
        self.await_workers()
        until(self._is_healthy, f"the pair on {self.site.engine} to be well")
        self._lost_before += self.lost()

    def lost(self) -> int:
        """How often a worker was told that its lease is lost, or ran out of windows, since `heal`."""
        words = ("lost machine", "the window has run out")
        return sum(worker.said(each) for worker in self.workers for each in words) - self._lost_before

    def check(self) -> None:
        """Fail if a lease was lost since `heal`, or the delegators' logs are not sound together."""
        assert self.lost() == 0
        self.check_logs()

    def check_logs(self) -> None:
        verdict = Verdict()
        logs = [delegator.log_path for delegator in [*self.retired, *self.delegators]]
        windows_of(leases_in(logs), verdict)
        assert verdict.violations == []

    def _begin(self, *flags: str, env: dict[str, str] | None = None) -> Daemon:
        self.proxies.append(self._stack.enter_context(Proxy(self.site.server.port)))
        self.delegators.append(self._start(len(self.proxies) - 1, *flags, env=env))
        return self.delegators[-1]

    def _start(
        self,
        number: int,
        *flags: str,
        bind: str = "tcp://127.0.0.1:*",
        env: dict[str, str] | None = None,
    ) -> Daemon:
        store = ("--store", self.proxies[number].url(self.url))
        return self.site.daemons.delegator(*store, *flags, bind=bind, ttl=self.ttl, new=False, env=env)

    def _is_healthy(self) -> bool:
        for delegator in self.delegators:
            status = status_of(delegator.address)
            marks = [mark["marked_ms_ago"] for mark in status.get("delegators", ())]
            leases = [lease for lease in status.get("leases", ()) if lease["worker"]]
            if sum(ago < 2_000 for ago in marks) < len(self.delegators) or len(leases) < len(self.workers):
                return False
            if any(lease["ends_in_ms"] < HEALTHY_MS for lease in leases):
                return False
        return True


def _has_all(delegator: Daemon, names: set[str]) -> bool:
    return ready_at(delegator) >= names


def complaints(daemon: Daemon, since: int = 0) -> list[dict[str, Any]]:
    """Lines of level warning or above that a daemon logged, without its first `since` lines."""
    return [event for event in daemon.events()[since:] if event.get("level") != "info"]


class Watch:
    """Calls that are made over and over in threads, each timed; none is to fail."""

    def __init__(self, calls: dict[str, Callable[[], object]], *, pause_s: float = 0.02) -> None:
        self.made = dict.fromkeys(calls, 0)
        self.errors: list[str] = []
        self.slowest: dict[str, float] = dict.fromkeys(calls, 0.0)
        self._pause_s = pause_s
        self._stopping = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=item) for item in calls.items()]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        for thread in self._threads:
            thread.join()

    def go_on(self) -> None:
        """Wait until each call was made again, twice from begin to end."""
        before = dict(self.made)
        until(lambda: all(self.made[name] > n + 1 for name, n in before.items()), "calls to be made")

    def _run(self, name: str, call: Callable[[], object]) -> None:
        while not self._stopping.wait(self._pause_s):
            begun = time.monotonic()
            try:
                call()
            except Exception as error:  # noqa: BLE001  (whatever it is, it must not be)
                self.errors.append(f"{name}: {error!r}")
            self.slowest[name] = max(self.slowest[name], time.monotonic() - begun)
            self.made[name] += 1
