from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq

from tests.conftest import Connect, Peer, serving, until
from tests.daemon.tools import ANY, delegating
from zflake.cli.keygen import make_cluster
from zflake.delegator.server import Delegator
from zflake.keys import Keys
from zflake.wire.endpoint import parse_endpoint
from zflake.worker.server import Worker, WorkerConfig


class Secure:
    """A delegator and a worker with keys, in threads, and peers by the keys of their folders."""

    def __init__(self, folder: Path, connect: Connect, delegator: Delegator, worker: Worker) -> None:
        self.folder = folder
        self.authorized = folder / "delegator" / "authorized"
        self.delegator = delegator
        self.worker = worker
        self._connect = connect

    def peer(self, name: str, *, at: str = "delegator", identity: bytes = b"") -> Peer:
        """A socket to a daemon by that party's key."""
        server = Keys(self.folder / at).public
        address = self.worker.address if at == "worker" else self.delegator.address
        (curve,) = Keys(self.folder / name).to(server)
        return self._connect(address, zmq.DEALER, identity, curve)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The keys of a cluster."""
    make_cluster(tmp_path / "keys")
    return tmp_path / "keys"


@pytest.fixture
def secure(folder: Path, connect: Connect) -> Iterator[Secure]:
    with delegating(keys=Keys(folder / "delegator")) as delegator:
        config = WorkerConfig(
            [parse_endpoint(delegator.address)], ANY, name="w1", keys=Keys(folder / "worker")
        )
        with serving(lambda waker: Worker(config, waker)) as worker:
            until(lambda: delegator.service.broker.open, "the worker to be ready")
            yield Secure(folder, connect, delegator, worker)
