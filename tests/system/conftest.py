"""Clusters of real processes: each test's own, and one that tests which leave it as it was share."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.system.daemons import Daemon, Daemons, ready_at, until


@dataclass(frozen=True)
class Cluster:
    """A delegator and its workers, which get requests from it."""

    delegator: Daemon
    workers: list[Daemon]

    @property
    def all(self) -> list[Daemon]:
        return [self.delegator, *self.workers]


def start_cluster(daemons: Daemons, *flags: str, workers: int = 2, ttl: str = "30s") -> Cluster:
    """A delegator with these flags and its workers, once all of them serve."""
    delegator = daemons.delegator(*flags, ttl=ttl)
    started = [daemons.worker(to=delegator) for _ in range(workers)]
    until(lambda: len(ready_at(delegator)) == workers, "all workers to be ready")
    return Cluster(delegator, started)


@pytest.fixture
def daemons(tmp_path: Path) -> Iterator[Daemons]:
    """Starts processes, and ends them after the test, whatever came of it."""
    with Daemons(tmp_path) as daemons:
        yield daemons


@pytest.fixture(scope="package")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A cluster that is shared: tests must leave it serving."""
    with Daemons(tmp_path_factory.mktemp("cluster")) as daemons:
        yield start_cluster(daemons)
