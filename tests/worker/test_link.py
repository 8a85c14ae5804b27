"""A worker's link to a delegator that follows a script, in a time that only the test moves."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import pytest
import zmq

from tests.conftest import until
from zflake.holder.clock import Clock
from zflake.wire.codec import decode_bundle, decode_request, encode_error, encode_request, encode_result
from zflake.wire.endpoint import parse_endpoint
from zflake.wire.messages import LOAD, Code
from zflake.worker.link import BEAT_US, MOST_ANSWERS, Link

TOKEN: Final = bytes(range(16))
TAG: Final = b"\0tag of 16 bytes"
NOW_US: Final = 1_767_225_600_000_000


class Stage:
    """A link and the delegator at its other end, which hears and says only what the test lets it."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]]) -> None:
        self._context = context
        self.us = 1_000_000
        self.clock = Clock()
        self.load = dict.fromkeys(LOAD, 0)
        self.address = "tcp://127.0.0.1:*"
        self.open()
        self.link = Link(context, parse_endpoint(self.address), self.clock)
        self.connected()

    def open(self) -> None:
        """Let the delegator be there, or be there again."""
        self.router = self._context.socket(zmq.ROUTER)
        self.router.setsockopt(zmq.LINGER, 0)
        self.router.bind(self.address)
        address = self.router.getsockopt(zmq.LAST_ENDPOINT)
        assert isinstance(address, bytes)
        self.address = address.rstrip(b"\0").decode()

    def connected(self) -> None:
        until(lambda: self.link.socket.poll(1, zmq.POLLOUT))

    def service(
        self,
        later_us: int = 0,
        *,
        machine: int | None = 5,
        token: bytes = TOKEN,
        is_open: bool = True,
        times: int = 1,
    ) -> None:
        for _ in range(times):
            self.us += later_us
            self.link.service(self.us, machine, token, lambda: dict(self.load), is_open=is_open)

    def hear(self) -> tuple[str, list[Any]]:
        """The next thing that the link says, and whom to answer it."""
        assert self.router.poll(5000), "the link says nothing"
        *self.prefix, body = self.router.recv_multipart()
        self.msgid, method, params = decode_request(body)
        assert self.prefix[1:] == [b""]
        return method, params

    def says_nothing(self) -> bool:
        return not self.router.poll(20)

    def answer(self, body: bytes) -> None:
        """Answer what was heard last, and let the link take it in."""
        self.router.send_multipart([*self.prefix, body])
        assert self.link.socket.poll(5000)
        assert self.link.receive(step=True) is None

    def accept(self) -> None:
        self.answer(encode_result(self.msgid, {"now_us": NOW_US}))

    def refuse(self) -> None:
        self.answer(encode_error(self.msgid, Code.NOT_READY, "m"))

    def close(self) -> None:
        self.router.close(linger=0)
        self.link.socket.close(linger=0)


@pytest.fixture
def stage(context: zmq.Context[zmq.Socket[bytes]]) -> Iterator[Stage]:
    stage = Stage(context)
    yield stage
    stage.close()


def introduced(stage: Stage) -> None:
    stage.service()
    assert stage.hear() == ("worker.ready", [5, TOKEN])
    stage.accept()


def test_it_says_that_it_is_ready_then_beats_with_its_load(stage: Stage) -> None:
    introduced(stage)
    for beat in range(3):
        stage.load["ids"] = beat
        stage.service(BEAT_US)
        assert stage.hear() == ("worker.beat", [dict.fromkeys(LOAD, 0) | {"ids": beat}])
        stage.accept()


def test_between_two_beats_it_says_nothing_however_often_it_is_called(stage: Stage) -> None:
    introduced(stage)
    stage.service(1000, times=BEAT_US // 1000 - 1)
    assert stage.says_nothing()
    assert stage.link.wake_us == stage.us + 1000
    stage.service(1000)
    assert stage.hear()[0] == "worker.beat"
    assert stage.says_nothing()


def test_a_beat_that_is_not_answered_does_not_stop_the_next(stage: Stage) -> None:
    introduced(stage)
    for _ in range(5):
        stage.service(BEAT_US)
        assert stage.hear()[0] == "worker.beat"


def test_who_is_not_known_introduces_itself_again_once_a_beat_and_with_the_token_of_now(stage: Stage) -> None:
    introduced(stage)
    stage.service(BEAT_US)
    assert stage.hear()[0] == "worker.beat"
    stage.refuse()
    for attempt in range(4):
        token = bytes([attempt]) * 16
        stage.service(1000, token=token, times=BEAT_US // 1000 - 1)
        assert stage.says_nothing()
        stage.service(1000, token=token)
        assert stage.hear() == ("worker.ready", [5, token])
        stage.refuse()
    stage.service(BEAT_US)
    assert stage.hear()[0] == "worker.ready"
    stage.accept()
    stage.service(BEAT_US)
    assert stage.hear()[0] == "worker.beat"


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\xc1",
        b"\x94\x01",
        encode_result(1, None),
        encode_result(1, {"now_us": -1}),
        encode_result(1, [{"now_us": 5}]),
        b"\x94\x01\x01\xc0" + b"\x91" * 5000,
    ],
    ids=range(7),
)
def test_an_answer_that_says_nothing_sound_changes_nothing(stage: Stage, body: bytes) -> None:
    introduced(stage)
    known = stage.clock.now_us()
    stage.service(BEAT_US)
    stage.hear()
    stage.answer(body)
    stage.service(BEAT_US)
    assert stage.hear()[0] == "worker.beat"
    assert known is not None
    assert 0 <= (stage.clock.now_us() or 0) - known < 60_000_000


def test_its_answers_tell_the_clock(stage: Stage) -> None:
    assert not stage.clock.known
    introduced(stage)
    assert 0 <= (stage.clock.now_us() or 0) - NOW_US < 60_000_000


def test_without_a_window_it_says_nothing(stage: Stage) -> None:
    stage.service(is_open=False)
    stage.service(BEAT_US, is_open=False)
    stage.service(BEAT_US, machine=None)
    assert stage.says_nothing()


def test_when_its_window_closes_it_leaves_at_once_and_once(stage: Stage) -> None:
    introduced(stage)
    stage.service(1, is_open=False)
    assert stage.hear() == ("worker.leave", [])
    stage.accept()
    stage.service(BEAT_US, is_open=False, times=4)
    assert stage.says_nothing()


def test_when_its_window_opens_again_it_is_ready_at_once(stage: Stage) -> None:
    introduced(stage)
    stage.service(1, is_open=False)
    stage.service(1)
    assert [stage.hear()[0] for _ in range(2)] == ["worker.leave", "worker.ready"]


def test_with_another_machine_it_introduces_itself_as_that(stage: Stage) -> None:
    introduced(stage)
    stage.service(BEAT_US, machine=6)
    assert stage.hear() == ("worker.ready", [6, TOKEN])


def test_told_to_leave_it_says_so_where_it_is_known(stage: Stage) -> None:
    stage.link.leave()
    assert stage.says_nothing()
    introduced(stage)
    stage.link.leave()
    stage.link.leave()
    assert stage.hear() == ("worker.leave", [])
    assert stage.says_nothing()


def test_what_it_said_last_arrives_though_it_closes(stage: Stage) -> None:
    introduced(stage)
    stage.link.leave()
    stage.link.close()
    assert stage.hear() == ("worker.leave", [])


def test_a_brokered_request_comes_with_its_tag_and_its_answer_goes_under_it(stage: Stage) -> None:
    introduced(stage)
    worker = stage.prefix[0]
    requests = [encode_request(number, "ids.next", [1, 1000]) for number in range(3)]
    for number, request in enumerate(requests):
        stage.router.send_multipart([worker, TAG + b"%d" % number, b"", request])
        stage.router.send_multipart([*stage.prefix, encode_result(9, {"now_us": NOW_US})])
    for number, request in enumerate(requests):
        prefix, body = until(lambda: stage.link.receive(step=False))
        assert (prefix, body) == ([TAG + b"%d" % number, b""], request)
        assert stage.link.answer(prefix, encode_result(number, [1, 1, 1])) == 0
        assert stage.link.flush() == 0
        assert stage.router.poll(5000)
        assert stage.router.recv_multipart() == [
            worker,
            TAG + b"%d" % number,
            b"",
            encode_result(number, [1, 1, 1]),
        ]
    assert stage.link.receive(step=False) is None


def test_answers_that_wait_together_go_in_one_message(stage: Stage) -> None:
    introduced(stage)
    answers = [
        (TAG + b"%02d" % number, encode_result(number, [1, 1, 1])) for number in range(MOST_ANSWERS + 2)
    ]
    for tag, answer in answers:
        assert stage.link.answer([tag, b""], answer) == 0
    assert stage.link.flush() == stage.link.flush() == 0
    first, second = stage.router.recv_multipart(), stage.router.recv_multipart()
    assert first[1] == second[1] == b""
    assert decode_bundle(first[2]) + decode_bundle(second[2]) == answers
    assert not stage.router.poll(10)


def test_while_the_delegator_is_away_it_goes_on_and_then_introduces_itself(stage: Stage) -> None:
    introduced(stage)
    stage.router.close(linger=0)
    until(lambda: not stage.link.socket.poll(1, zmq.POLLOUT))
    stage.service(BEAT_US, times=10)
    assert stage.link.answer([TAG, b""], encode_result(1, [1, 1, 1])) == 0
    assert stage.link.flush() == 1, "it is away, and the answer is lost"
    stage.link.leave()
    stage.open()
    stage.connected()
    stage.service(BEAT_US)
    assert stage.hear() == ("worker.ready", [5, TOKEN])
    stage.accept()
    stage.service(BEAT_US)
    assert stage.hear()[0] == "worker.beat"


def test_a_delegator_that_came_back_between_two_beats_is_told_who_beats(stage: Stage) -> None:
    introduced(stage)
    stage.router.close(linger=0)
    until(lambda: not stage.link.socket.poll(1, zmq.POLLOUT))
    stage.open()
    stage.connected()
    stage.service(BEAT_US)
    assert stage.hear()[0] == "worker.beat"
    stage.refuse()
    stage.service(BEAT_US)
    assert stage.hear() == ("worker.ready", [5, TOKEN])


def test_its_numbers_go_round(stage: Stage) -> None:
    stage.link._msgid = 2**32 - 1
    introduced(stage)
    assert stage.msgid == 0
