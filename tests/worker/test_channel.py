"""The socket under a worker's link: brokered requests in, answers out, and a delegator that goes and comes back."""

from __future__ import annotations

from typing import Any, Final

import pytest
import zmq

from tests.conftest import until
from tests.worker.test_link import HEARTBEAT, LEAVE, NOW_US, READY, TAG, TOKEN, Stage
from zflake.wire.codec import decode_request, encode_error, encode_request, encode_result
from zflake.wire.dispatch import Requests
from zflake.wire.endpoint import parse_endpoint
from zflake.wire.methods import Code
from zflake.wire.sockets import address_of
from zflake.worker.channel import LinkChannel
from zflake.worker.link import HEARTBEAT_US

ANSWER: Final = encode_result(1, [1, 1, 1])


class Scene(Stage):
    """A link over a socket, and the ROUTER of a delegator that says only what the test lets it."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]]) -> None:
        super().__init__()
        self._context = context
        self.address = "tcp://127.0.0.1:*"
        self.open()
        self.requests = Requests()
        self.channel = LinkChannel(context, parse_endpoint(self.address), self.link, self.requests)
        self.connected()

    def open(self) -> None:
        """Let the delegator be there, or be there again."""
        self.router = self._context.socket(zmq.ROUTER)
        self.router.setsockopt(zmq.LINGER, 0)
        until(self._binds)
        self.address = address_of(self.router)

    def _binds(self) -> bool:
        try:
            self.router.bind(self.address)
        except zmq.ZMQError:  # the system has not let go of the port yet
            return False
        return True

    def connected(self) -> None:
        until(lambda: self.channel.socket.poll(1, zmq.POLLOUT))

    def gone(self) -> None:
        """Let the delegator go."""
        self.router.close(linger=0)
        until(lambda: not self.channel.socket.poll(1, zmq.POLLOUT))

    def service(self, us: int = 0) -> None:
        self.us += us
        self.channel.service(self.us)

    def heard(self) -> tuple[str, list[Any]]:
        """The next thing that the delegator hears."""
        assert self.router.poll(5000), "the link says nothing"
        *self.prefix, body = self.router.recv_multipart()
        self._msgid, method, params = decode_request(body)
        return method, params

    def answer(self, body: bytes) -> None:
        """Answer what was heard last, and let the link take it in."""
        self.router.send_multipart([*self.prefix, body])
        assert self.channel.socket.poll(5000)
        assert self.channel.receive() is None


@pytest.fixture
def scene(context: zmq.Context[zmq.Socket[bytes]]) -> Scene:
    """One whose worker is registered."""
    scene = Scene(context)
    scene.service()
    assert scene.heard() == READY
    scene.answer(encode_result(scene._msgid, {"now_us": NOW_US}))
    return scene


def test_its_last_word_arrives_though_it_closes(scene: Scene) -> None:
    scene.channel.leave()
    scene.channel.socket.close()
    assert scene.heard() == LEAVE


def test_a_brokered_request_comes_with_its_tag_and_its_answer_goes_under_it(scene: Scene) -> None:
    worker = scene.prefix[0]
    requests = [encode_request(number, "ids.next", [1, 1000]) for number in range(3)]
    for number, request in enumerate(requests):
        scene.router.send_multipart([worker, TAG + b"%d" % number, b"", request])
        scene.router.send_multipart([*scene.prefix, encode_result(9, {"now_us": NOW_US})])
    for number, request in enumerate(requests):
        assert until(scene.channel.receive) == [TAG + b"%d" % number, b"", request]
        scene.channel.answer([TAG + b"%d" % number, b""], ANSWER)
        scene.channel.flush()
        assert scene.router.poll(5000)
        assert scene.router.recv_multipart() == [worker, TOKEN + TAG + b"%d" % number, b"", ANSWER]
    assert scene.channel.receive() is None


def test_while_the_delegator_is_away_it_goes_on_and_then_registers(scene: Scene) -> None:
    scene.gone()
    for _ in range(10):
        scene.service(HEARTBEAT_US)
    scene.channel.answer([TAG, b""], ANSWER)
    scene.channel.flush()
    assert scene.requests.dropped == 1, "the delegator is away, and the answer is lost"
    scene.channel.leave()
    scene.open()
    scene.connected()
    scene.service(HEARTBEAT_US)
    assert scene.heard() == READY


def test_a_delegator_that_came_back_between_two_heartbeats_is_told_who_sends_them(scene: Scene) -> None:
    scene.gone()
    scene.open()
    scene.connected()
    scene.service(HEARTBEAT_US)
    assert scene.heard() == HEARTBEAT
    scene.answer(encode_error(scene._msgid, Code.NOT_READY, "m"))
    scene.service(HEARTBEAT_US)
    assert scene.heard() == READY
