"""`zflake up`: delegators and workers as child processes, for as long as this process lives.

Each child's standard input is a pipe whose other end only this process holds.  However it ends, by Ctrl-C
or by SIGKILL, the pipes close, and the children stop by themselves.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Final, Self

from rich.live import Live

from zflake.cli.status import LOOK_S, Rates, ask_status, live_view
from zflake.client.sync import Client
from zflake.core.layout import Layout
from zflake.errors import ConfigError, StoreError, Unavailable, ZflakeError
from zflake.wire.endpoint import DEFAULT_DELEGATOR, parse_endpoint

START_S: Final = 20.0
STOP_S: Final = 5.0
REPORT_S: Final = 10.0
"""How often they are printed where there is no terminal to redraw."""
CALM_S: Final = 10.0
"""A child that ran for this long before it ended is started again at once."""


class Child:
    """One daemon and what it logs."""

    def __init__(
        self, name: str, module: str, arguments: Sequence[str], events: queue.SimpleQueue[Event]
    ) -> None:
        self.name = name
        self.address: str | None = None
        """Where it serves, once it does."""
        self.last_words: list[str] = []
        """What it printed beside its log: why it ended, or a traceback."""
        self._events = events
        self.started_at = time.monotonic()
        # Its own process group: Ctrl-C goes to us alone, and we stop the children in order.
        self.process = subprocess.Popen(  # noqa: S603
            [sys.executable, "-m", module, *arguments, "--follow-stdin", "--log-format", "json"],
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
                self.last_words.append(line.decode(errors="replace").strip())
                continue
            self._events.put((self.name, event))
        self.process.wait()
        self._events.put((self.name, None))


Event = tuple[str, dict[str, Any] | None]
"""A child's name and a line of its log, or None when it has ended."""


class Cluster:
    """Delegators and workers; a context manager that leaves no process behind.

    The store is at the URL `store`, or an SQLite file in the folder `data`, made where it is missing, or in
    a temporary one.  With `new` a store at a URL is known to replace none.  An `ephemeral` cluster takes free
    ports, another one the default and those that follow.

    Raises `ConfigError` where the store takes one delegator only, `StoreError` where the folder can't be made,
    `Unavailable` where a daemon does not start.
    """

    def __init__(
        self,
        workers: int,
        data: Path | None,
        *,
        ephemeral: bool,
        store: str | None = None,
        delegators: int = 1,
        new: bool = False,
    ) -> None:
        self._workers = workers
        self._temporary = (
            tempfile.TemporaryDirectory(prefix="zflake-") if data is None and store is None else None
        )
        self._data = Path(self._temporary.name) if self._temporary else data
        self._store = store or f"sqlite:///{self._data and self._data.absolute()}/zflake.db"
        if delegators > 1 and self._store.startswith(("sqlite:", "memory:")):
            raise ConfigError(
                "several delegators need a store that they can share: say --store etcd://..., postgresql://... or"
                " redis://..."
            )
        port = parse_endpoint(DEFAULT_DELEGATOR).port or 0
        names = ["delegator", *(f"delegator-{number}" for number in range(2, delegators + 1))]
        self._binds = {
            name: f"tcp://127.0.0.1:{'*' if ephemeral else port + i}" for i, name in enumerate(names)
        }
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._children: dict[str, Child] = {}
        self._stopping = False
        self._fresh = new
        self._client: Client | None = None

    def __enter__(self) -> Self:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self._signalled)
        if self._data is not None:
            try:
                self._data.mkdir(parents=True, exist_ok=True)
                # Only then nothing can have been lost: a folder that has something in it may have had a store.
                self._fresh = not any(self._data.iterdir())
            except OSError as error:
                raise StoreError(f"can't make the folder {self._data}: {error.strerror}") from error
        try:
            self._start_all()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    @property
    def address(self) -> str:
        """Where the first delegator serves."""
        return self._binds["delegator"]

    @property
    def addresses(self) -> list[str]:
        """Where all delegators serve."""
        return list(self._binds.values())

    @property
    def layout(self) -> Layout:
        """The layout of the cluster's IDs."""
        return self._ids().layout()

    def take(self, count: int) -> list[int]:
        """IDs from this cluster."""
        return self._ids().next_ids(count)

    def wait_until_ready(self) -> None:
        """Return once every worker holds a machine ID; raises `Unavailable` where that takes too long."""
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline and not self._stopping:
            facts = self._look()
            workers = [lease for lease in facts.get("leases", ()) if lease.get("worker")]
            if len(workers) >= self._workers:
                return
            if facts.get("granting_in_ms"):  # it says so itself, in its log
                deadline = time.monotonic() + START_S
            self._tend(0.02)
        raise Unavailable("stopped" if self._stopping else "the workers did not get machine IDs in time")

    def run(self) -> None:
        """Show the cluster until it is told to stop; start again what ends."""
        self.wait_until_ready()
        facts = self._look()
        for address in self.addresses:
            print(f"delegator  {address}")
        print(f"layout     {self.layout.name}: {self.layout}, epoch {self.layout.epoch:%FT%TZ}")
        print(f"store      {facts.get('store')}{' (temporary)' if self._temporary else ''}")
        for lease in facts.get("leases", ()):
            print(f"worker     {lease['address']}  machine {lease['machine']}  {lease['name']}")
        print("Take IDs with: zflake next -n 5      Stop with Ctrl-C.", flush=True)
        show = _Live() if sys.stdout.isatty() else _Lines()
        with show:
            while not self._stopping:
                self._tend(LOOK_S)
                if not self._stopping:
                    show.show(self._look())

    # --- children ---

    def _start_all(self) -> None:
        first, *others = self._binds
        self._start(first, new=self._fresh)
        if self._fresh:
            self._await_address(
                first
            )  # it makes the store; of several at once another might, and have it rest
        for name in others:
            self._start(name)
        for name in self._binds:
            self._await_address(name)
        for number in range(1, self._workers + 1):
            self._start(f"worker-{number}")

    def _await_address(self, name: str) -> None:
        delegator = self._children[name]
        deadline = time.monotonic() + START_S
        while delegator.address is None:
            self._tend(0.01)
            if delegator.process.poll() is not None or time.monotonic() > deadline:
                self._tend(0.1)
                raise Unavailable(f"the {name} did not start")
        self._binds[name] = delegator.address

    def _start(self, name: str, *, new: bool = False) -> None:
        if name in self._binds:
            arguments = ["--bind", self._binds[name], "--store", self._store, *(["--new"] if new else [])]
            self._children[name] = Child(name, "zflake.cli.delegator", arguments, self._events)
        else:
            arguments = ["--name", name]
            for address in self.addresses:
                arguments += ["--delegator", address]
            self._children[name] = Child(name, "zflake.cli.worker", arguments, self._events)

    def _tend(self, seconds: float) -> None:
        """Take in what the children say, for some time or until there is reason to stop."""
        deadline = time.monotonic() + seconds
        while not self._stopping:
            try:
                name, event = self._events.get(timeout=max(0.0, min(0.2, deadline - time.monotonic())))
            except queue.Empty:
                if time.monotonic() >= deadline:
                    return
                continue
            if event is not None:
                if event.get("level") in ("warning", "error", "critical"):
                    print(f"{name}: {event.get('message')}", file=sys.stderr, flush=True)
                continue
            self._restart(name)

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
        self._start(name)

    def _stop(self) -> None:
        self._stopping = True
        if self._client is not None:
            self._client.close()
        delegators = [child for name, child in self._children.items() if name in self._binds]
        workers = [child for name, child in self._children.items() if name not in self._binds]
        for children in (workers, delegators):
            deadline = time.monotonic() + STOP_S
            for child in children:
                child.stop()
            for child in children:
                child.wait(deadline)
        if self._temporary is not None:
            self._temporary.cleanup()

    def _signalled(self, number: int, _frame: FrameType | None) -> None:
        if self._stopping:
            os._exit(128 + number)  # the children see their pipes close
        self._stopping = True

    # --- figures ---

    def _ids(self) -> Client:
        if self._client is None:
            self._client = Client(self.addresses, timeout=START_S)
        return self._client

    def _look(self) -> dict[str, Any]:
        for address in self.addresses:
            with contextlib.suppress(ZflakeError):
                return ask_status(address, LOOK_S)
        return {}


class _Lines:
    """Figures for a log: a line now and then."""

    def __init__(self) -> None:
        self._rates = Rates()
        self._said_at = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def show(self, facts: dict[str, Any]) -> None:
        if not facts or time.monotonic() - self._said_at < REPORT_S:
            return
        first, self._said_at = not self._said_at, time.monotonic()
        self._rates.update(facts)
        if not first:
            minted = sum(lease["worker"]["ids"] for lease in facts["leases"] if lease["worker"])
            rate = sum(self._rates.ids.values())
            print(
                f"{facts['broker']['workers']} workers, {minted:,} IDs minted, {rate:,.0f} a second",
                flush=True,
            )


class _Live:
    """Figures for a terminal, redrawn in place."""

    def __init__(self) -> None:
        self._rates = Rates()
        self._live = Live(auto_refresh=False, redirect_stdout=False)

    def __enter__(self) -> Self:
        self._live.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.__exit__(None, None, None)

    def show(self, facts: dict[str, Any]) -> None:
        if facts:
            self._rates.update(facts)
            self._live.update(live_view(facts, self._rates), refresh=True)
