"""`zflake up`: a whole cluster on this machine, of delegators and workers as child processes."""

from __future__ import annotations

import contextlib
import sys
import tempfile
import time
from functools import cached_property
from pathlib import Path
from typing import Any, Self

from zflake.cli.children import START_S, Children, Command
from zflake.cli.display import Lines, redrawn
from zflake.cli.keygen import make_cluster
from zflake.cli.status import LOOK_S, ask_status
from zflake.client.sync import Client
from zflake.core.layout import Layout
from zflake.errors import ConfigError, StoreError, Unavailable, ZflakeError
from zflake.files import close_to_others
from zflake.keys import open_keys
from zflake.wire.callers import Role
from zflake.wire.endpoint import DEFAULT_DELEGATOR, parse_endpoint


class Cluster:
    """Delegators and workers; a context manager that leaves no process behind.

    The store is at the URL `store`, or an SQLite file in the folder `data`, made if it is missing, or in
    a temporary one.  `keys` is a folder of the cluster's keys, made if it is missing.  With `new` a store at a URL is known to replace none.  An `ephemeral` cluster takes free
    ports, another one the default and those that follow.

    Raises `ConfigError` if the store takes one delegator only, `StoreError` if the folder can't be made,
    `Unavailable` if a daemon does not start.
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
        keys: Path | None = None,
    ) -> None:
        self._stack = contextlib.ExitStack()
        self._is_temporary = data is None and store is None
        if self._is_temporary:
            data = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="zflake-")))
        self._data = data
        self._store = store or f"sqlite:///{data and data.absolute()}/zflake.db"
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
        self._worker_names = [f"worker-{number}" for number in range(1, workers + 1)]
        self._children = Children(self._command_of)
        self._stack.callback(self._children.stop, self._worker_names, self._binds)
        self._fresh = new
        self._keys = keys

    def __enter__(self) -> Self:
        self._children.heed_signals()
        if self._data is not None:
            try:
                self._data.mkdir(0o700, parents=True, exist_ok=True)
                close_to_others(self._data)
                # Only then nothing can have been lost: a folder that has something in it may have had a store.
                self._fresh = not any(self._data.iterdir())
            except OSError as error:
                raise StoreError(f"can't make the folder {self._data}: {error.strerror}") from error
        if self._keys is not None and not (self._keys / Role.DELEGATOR).exists():
            make_cluster(self._keys)
        try:
            self._start_all()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def addresses(self) -> list[str]:
        """Where all delegators serve."""
        return list(self._binds.values())

    @property
    def layout(self) -> Layout:
        """The layout of the cluster's IDs."""
        return self._client.layout()

    def take(self, count: int) -> list[int]:
        """IDs from this cluster."""
        return self._client.next_ids(count)

    def wait_until_ready(self) -> None:
        """Return once every worker holds a machine ID; raises `Unavailable` if that takes too long."""
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline and not self._children.stopping:
            facts = self._look()
            workers = [lease for lease in facts.get("leases", ()) if lease.get("worker")]
            if len(workers) >= len(self._worker_names):
                return
            if facts.get("granting_in_ms"):  # the delegator says so itself, in its log
                deadline = time.monotonic() + START_S
            self._children.tend(0.02)
        raise Unavailable(
            "stopped" if self._children.stopping else "the workers did not get machine IDs in time"
        )

    def run(self) -> None:
        """Show the cluster until it is told to stop; start again what ends."""
        self.wait_until_ready()
        facts = self._look()
        for address in self.addresses:
            print(f"delegator  {address}")
        print(f"layout     {self.layout.name}: {self.layout}, epoch {self.layout.epoch:%FT%TZ}")
        print(f"store      {facts.get('store')}{' (temporary)' if self._is_temporary else ''}")
        for lease in facts.get("leases", ()):
            print(f"worker     {lease['address']}  machine {lease['machine']}  {lease['name']}")
        keys = "" if self._keys is None else f" --keys {self._keys / Role.CLIENT}"
        print(f"Take IDs with: zflake next -n 5{keys}      Stop with Ctrl-C.", flush=True)
        with redrawn() if sys.stdout.isatty() else contextlib.nullcontext(Lines().show) as show:
            while not self._children.stopping:
                self._children.tend(LOOK_S)
                if not self._children.stopping and (facts := self._look()):
                    show(facts)

    def _start_all(self) -> None:
        first, *others = self._binds
        self._children.start(first, *(["--new"] if self._fresh else []))
        if self._fresh:
            # It makes the store; of several at once another might, and have it rest.
            self._binds[first] = self._children.await_address(first)
        for name in others:
            self._children.start(name)
        for name in self._binds:
            self._binds[name] = self._children.await_address(name)
        for name in self._worker_names:
            self._children.start(name)

    def _command_of(self, name: str) -> Command:
        if name in self._binds:
            environment = {"ZFLAKE_DELEGATOR_STORE": self._store}  # it may have a password in it
            bind = ["--bind", self._binds[name], *self._keys_of(Role.DELEGATOR)]
            return Command("zflake.cli.delegator", bind, environment)
        delegators = [word for address in self.addresses for word in ("--delegator", address)]
        return Command("zflake.cli.worker", ["--name", name, *self._keys_of(Role.WORKER), *delegators])

    def _keys_of(self, role: Role) -> list[str]:
        return [] if self._keys is None else ["--keys", str(self._keys / role)]

    @cached_property
    def _admin(self) -> str:
        """Its own folder of keys; empty in a cluster without keys, whatever the environment says."""
        return "" if self._keys is None else str(self._keys / Role.ADMIN)

    @cached_property
    def _client(self) -> Client:
        return self._stack.enter_context(Client(self.addresses, timeout=START_S, keys=self._admin))

    def _look(self) -> dict[str, Any]:
        for address in self.addresses:
            with contextlib.suppress(ZflakeError):
                return ask_status(address, LOOK_S, open_keys(self._admin))
        return {}
