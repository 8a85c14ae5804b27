"""The transport tells what came of an ask, and raises only for what its caller did wrong."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any, Final

import pytest

from tests.conftest import Scripts
from zflake.client import transport as module
from zflake.client.conversation import Ask
from zflake.client.transport import Transport
from zflake.errors import Closed, ProtocolError
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


def test_a_socket_that_can_not_be_had_is_an_error(
    transport: Transport, script: Scripts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_SOCKETS", 1)
    assert isinstance(transport.ask(Ask(script(echo).address, "ping", (), 5.0)), Response)
    outcome = transport.ask(Ask(NOBODY, "ping", (), 0.1))
    assert isinstance(outcome, ProtocolError)
    assert "can't connect" in str(outcome)


def test_a_closed_transport_raises(transport: Transport) -> None:
    transport.close()
    with pytest.raises(Closed):
        transport.ask(Ask(NOBODY, "ping", (), 0.1))


def test_a_signal_handler_may_close_the_transport_while_it_connects(
    transport: Transport, monkeypatch: pytest.MonkeyPatch
) -> None:
    connected = sockets.connected

    def interrupted(*given: Any) -> Any:
        socket = connected(*given)
        transport.close()  # as a handler in this thread does
        return socket

    monkeypatch.setattr(module, "connected", interrupted)
    asking = threading.Thread(target=transport.ask, args=(Ask(NOBODY, "ping", (), 0.1),), daemon=True)
    asking.start()
    asking.join(10)
    assert not asking.is_alive(), "the context waits for the socket of the thread that ends it"
