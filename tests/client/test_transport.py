"""The transport tells what came of an ask, and raises only for what its caller did wrong."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

import pytest

from tests.conftest import Script, Scripts, until
from zflake.client import transport as module
from zflake.client.conversation import CONNECT_S, Ask
from zflake.client.transport import Transport
from zflake.errors import Closed, ProtocolError, Unavailable
from zflake.wire import sockets
from zflake.wire.codec import Response, encode_result

NOBODY: Final = "tcp://127.0.0.1:1"


@pytest.fixture
def transport() -> Iterator[Transport]:
    transport = Transport()
    yield transport
    transport.close()


def echo(method: str, params: list[Any], msgid: int) -> bytes:
    return encode_result(msgid, params)


def test_an_answer_is_a_response(transport: Transport, script: Scripts) -> None:
    outcome = transport.ask(Ask(script(echo).address, "ping", (7,), 5.0))
    assert isinstance(outcome, Response)
    assert outcome.result == [7]


def test_no_answer_is_none(transport: Transport, script: Scripts) -> None:
    assert transport.ask(Ask(script(lambda *_: None).address, "ping", (), 0.1)) is None
    assert transport.ask(Ask(NOBODY, "ping", (), 0.1)) is None


@pytest.mark.parametrize(
    "answer",
    [lambda *_: b"hello yourself", lambda *asked: encode_result(asked[2] + 1, None)],
    ids=["no response", "another request's"],
)
def test_an_answer_that_is_not_zflakes_is_an_error_and_the_next_ask_has_a_new_socket(
    transport: Transport, script: Scripts, answer: Callable[[str, list[Any], int], bytes]
) -> None:
    peer = script(answer)
    for _ in range(2):
        assert isinstance(transport.ask(Ask(peer.address, "ping", (), 5.0)), ProtocolError)
        assert not transport._sockets._open


def test_a_socket_that_can_not_be_had_is_no_fault_of_the_endpoint_s(
    transport: Transport, script: Scripts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_SOCKETS", 3)  # a socket, and two for its monitor
    assert isinstance(transport.ask(Ask(script(echo).address, "ping", (), 5.0)), Response)
    with pytest.raises(Unavailable, match="this process"):
        transport.ask(Ask(NOBODY, "ping", (), 0.1))


def pooled(transport: Transport, peer: Script, lines: int) -> None:
    """Have so many lines to a peer lie idle."""
    with ThreadPoolExecutor(lines) as pool:
        while len(transport._idle[peer.address]) < lines:
            list(pool.map(transport.ask, [Ask(peer.address, "ping", (), 5.0)] * lines))


def test_one_silent_line_closes_those_that_lay_idle_beside_it(transport: Transport, script: Scripts) -> None:
    said: list[bool] = []
    peer = script(lambda *asked: None if said else echo(*asked))
    other = script(echo)
    pooled(transport, other, 2)
    pooled(transport, peer, 4)
    said.append(True)
    assert transport.ask(Ask(peer.address, "ping", (), CONNECT_S / 2)) is None
    assert len(transport._idle[peer.address]) == 3, "it may have been too short a time"
    assert transport.ask(Ask(peer.address, "ping", (), CONNECT_S)) is None
    assert not transport._idle[peer.address]
    assert len(transport._idle[other.address]) == len(transport._sockets._open) == 2


def test_a_line_that_was_used_since_is_kept(transport: Transport, script: Scripts) -> None:
    asked: list[str] = []

    def answer(method: str, params: list[Any], msgid: int) -> bytes | None:
        asked.append(method)
        return None if params == ["silent"] else echo(method, params, msgid)

    peer = script(answer)
    pooled(transport, peer, 2)
    asked.clear()
    with ThreadPoolExecutor(1) as pool:
        silent = pool.submit(transport.ask, Ask(peer.address, "ping", ("silent",), 2 * CONNECT_S))
        until(lambda: asked, "the silent one to be under way")
        assert isinstance(transport.ask(Ask(peer.address, "ping", (), 5.0)), Response)
        assert silent.result() is None
    assert len(transport._idle[peer.address]) == 1


def test_the_lines_of_an_endpoint_that_is_not_used_any_more_are_closed(
    transport: Transport, script: Scripts, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second, third = (script(echo) for _ in range(3))
    pooled(transport, first, 3)
    pooled(transport, second, 1)
    assert len(transport._sockets._open) == 4
    monkeypatch.setattr(module, "UNUSED_S", 0.0)
    pooled(transport, third, 1)
    assert list(transport._idle) == [third.address]
    assert len(transport._sockets._open) == 1


def test_ever_new_host_names_keep_no_context(transport: Transport) -> None:
    for number in range(20):
        assert transport.ask(Ask(f"tcp://host-{number}.invalid:7410", "ping", (), 0.01)) is None
    assert not transport._sockets._contexts
    assert not transport._idle


def test_a_closed_transport_raises(transport: Transport) -> None:
    transport.close()
    with pytest.raises(Closed):
        transport.ask(Ask(NOBODY, "ping", (), 0.1))


def test_a_signal_handler_may_close_the_transport_while_it_connects(
    transport: Transport, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*given: Any) -> Any:
        dialer = sockets.Dialer(*given)
        transport.close()  # as a handler in this thread does
        return dialer

    monkeypatch.setattr(module, "Dialer", interrupted)
    asking = threading.Thread(target=transport.ask, args=(Ask(NOBODY, "ping", (), 0.1),), daemon=True)
    asking.start()
    asking.join(10)
    assert not asking.is_alive(), "the context waits for the socket of the thread that ends it"
