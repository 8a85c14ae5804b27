"""The servers that engines are tested on, each started where a test first needs it."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import pytest

from tests.servers import Etcd, Postgres, Redis, Server

T = TypeVar("T", bound=Server)


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


@pytest.fixture(scope="session")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    servers = Servers(tmp_path_factory.mktemp("servers"))
    yield servers
    for server in servers.started:
        server.kill()
