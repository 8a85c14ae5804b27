"""Tools that tests of several folders need: daemons in threads, peers that follow a script, waiting."""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from functools import partial
from typing import Any, Protocol, TypeVar

import pytest
import zmq

from tests.servers import Servers
from zflake.daemon import Waker
from zflake.wire.codec import Response, decode_request, decode_response, encode_request
from zflake.wire.sockets import Curve

WAIT_S = 10.0


def until(condition: Callable[[], Any], what: str = "the condition") -> Any:
    """Poll `condition` until it gives something true, which is returned; fail after `WAIT_S`."""
    deadline = time.monotonic() + WAIT_S
    tick = threading.Event()
    while not (result := condition()):
        assert time.monotonic() < deadline, f"{what} did not come true"
        tick.wait(0.002)
    return result


def brief(values: Iterable[Any], usual: Collection[Any]) -> list[Any]:
    """Parameters of a test of which `./scripts/test` tries the usual ones, and `-m long` the others."""
    return [
        value
        if value in usual
        else pytest.param(*(value if isinstance(value, tuple) else [value]), marks=pytest.mark.long)
        for value in values
    ]


class Bell(Waker):
    """A waker without signals, for a daemon that runs in a thread."""

    def stop(self) -> None:
        self.stopping = True
        self.wake()

    def close(self) -> None:
        self._read.close()
        self._write.close()


class Daemon(Protocol):
    @property
    def address(self) -> str: ...

    def run(self) -> None: ...


D = TypeVar("D", bound=Daemon)


@contextlib.contextmanager
def serving(make: Callable[[Waker], D]) -> Iterator[D]:
    """Run a daemon in a thread; at the end it is told to drain, and must end without an exception."""
    bell = Bell()
    crashes: list[BaseException] = []

    def run(daemon: D) -> None:
        try:
            daemon.run()
        except BaseException as error:  # noqa: BLE001
            crashes.append(error)

    try:
        daemon = make(bell)
        thread = threading.Thread(target=run, args=(daemon,))
        thread.start()
        try:
            yield daemon
        finally:
            bell.stop()
            thread.join(WAIT_S)
    finally:
        bell.close()
    assert not thread.is_alive(), "the daemon does not stop"
    assert not crashes, f"the daemon crashed: {crashes[0]!r}"


class Peer:
    """A socket of a test's own to a server: whole messages out, responses in."""

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        address: str,
        kind: int = zmq.DEALER,
        identity: bytes = b"",
        curve: Curve | None = None,
    ) -> None:
        self.socket = context.socket(kind)
        self.socket.setsockopt(zmq.LINGER, 0)
        if identity:
            self.socket.setsockopt(zmq.ROUTING_ID, identity)
        if curve is not None:
            self.socket.setsockopt_string(zmq.CURVE_PUBLICKEY, curve.public)
            self.socket.setsockopt_string(zmq.CURVE_SECRETKEY, curve.secret)
            self.socket.setsockopt_string(zmq.CURVE_SERVERKEY, curve.server)
        self.socket.connect(address)
        self._msgid = 0

    def send(self, *frames: bytes) -> None:
        self.socket.send_multipart(frames)

    def receive(self, wait_s: float = WAIT_S) -> Response | None:
        """The next response; None if none comes."""
        if not self.socket.poll(int(wait_s * 1000)):
            return None
        return decode_response(self.socket.recv_multipart()[-1])

    def request(self, method: str, *params: Any) -> int:
        """Send a request without waiting; gives its msgid."""
        self._msgid += 1
        self.send(b"", encode_request(self._msgid, method, params))
        return self._msgid

    def ask(self, method: str, *params: Any) -> Response:
        """Send a request and wait for its own response; others are passed by."""
        msgid = self.request(method, *params)
        while True:
            response = self.receive()
            assert response is not None, f"no answer to {method}"
            if response.msgid == msgid:
                return response


class Script:
    """A ROUTER in a thread that answers by a function, and remembers what it was asked.

    The function is given method, params and msgid; None leaves a request without an answer.
    """

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        answer: Callable[[str, list[Any], int], bytes | None],
        address: str = "tcp://127.0.0.1:*",
    ) -> None:
        self.asked: list[tuple[str, list[Any]]] = []
        self._answer = answer
        self._router = context.socket(zmq.ROUTER)
        self._router.setsockopt(zmq.LINGER, 0)
        try:
            self._router.bind(address)
        except zmq.ZMQError:
            self._router.close()
            raise
        self.address: str = self._router.getsockopt(zmq.LAST_ENDPOINT).rstrip(b"\0").decode()  # type: ignore[union-attr]
        self._stopping = False
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def calls(self, method: str) -> list[list[Any]]:
        """The params of all requests of that method, so far."""
        return [params for asked, params in list(self.asked) if asked == method]

    def stop(self) -> None:
        self._stopping = True
        self._thread.join(WAIT_S)

    def _run(self) -> None:
        while not self._stopping:
            if not self._router.poll(5):
                continue
            *prefix, body = self._router.recv_multipart()
            msgid, method, params = decode_request(body)
            self.asked.append((method, params))
            answer = self._answer(method, params, msgid)
            if answer is not None:
                self._router.send_multipart([*prefix, answer])
        self._router.close()


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the tests that may take longest, so that none of them is left for the end."""

    def longest(item: pytest.Item) -> float:
        mark = item.get_closest_marker("timeout")
        return -float(mark.args[0]) if mark else 0.0

    items.sort(key=longest)


@pytest.fixture(scope="session")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    """A server of each engine, started when a test first needs it; tests leave it as it was."""
    servers = Servers(tmp_path_factory.mktemp("servers"))
    yield servers
    for server in servers.started:
        server.kill()


class Connect(Protocol):
    def __call__(
        self, address: str, kind: int = ..., identity: bytes = ..., curve: Curve | None = ..., /
    ) -> Peer: ...


class Scripts(Protocol):
    def __call__(
        self, answer: Callable[[str, list[Any], int], bytes | None], address: str = ..., /
    ) -> Script: ...


@pytest.fixture
def context() -> Iterator[zmq.Context[zmq.Socket[bytes]]]:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    yield context
    context.destroy(linger=0)


@pytest.fixture
def connect(context: zmq.Context[zmq.Socket[bytes]]) -> Iterator[Connect]:
    """Makes peers, and closes them at the end."""
    made: list[Peer] = []

    def make(
        address: str, kind: int = zmq.DEALER, identity: bytes = b"", curve: Curve | None = None, /
    ) -> Peer:
        made.append(Peer(context, address, kind, identity, curve))
        return made[-1]

    yield make
    for peer in made:
        peer.socket.close(linger=0)


@pytest.fixture
def script(context: zmq.Context[zmq.Socket[bytes]]) -> Iterator[Scripts]:
    """Makes scripted peers, and stops them at the end."""
    made: list[Script] = []

    def make(
        answer: Callable[[str, list[Any], int], bytes | None], address: str = "tcp://127.0.0.1:*", /
    ) -> Script:
        made.append(Script(context, answer, address))
        return made[-1]

    yield make
    for peer in made:
        peer.stop()


@pytest.fixture
def tell(record_property: Callable[[str, object], None]) -> Callable[[str], None]:
    """Says a line in the summary of the run."""
    return partial(record_property, "tell")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    reports = [
        each for each in itertools.chain(*terminalreporter.stats.values()) if hasattr(each, "user_properties")
    ]
    lines = dict.fromkeys(
        str(line) for each in reports for name, line in each.user_properties if name == "tell"
    )
    if lines:
        terminalreporter.section("figures")
        for line in lines:
            terminalreporter.write_line(line)
