"""A worker's link to a delegator that follows a script, in a time that only the test moves."""

from __future__ import annotations

from typing import Any, Final

import pytest

from zflake.core.layout import PRESETS
from zflake.core.mint import Mint
from zflake.holder.clock import HolderClock
from zflake.wire.cluster import LOAD
from zflake.wire.codec import decode_bundle, decode_request, encode_error, encode_result
from zflake.wire.methods import Code
from zflake.worker.link import HEARTBEAT_US, MAX_BUNDLE, PATIENCE, Link

TOKEN: Final = bytes(range(16))
TAG: Final = b"\0tag of 16 bytes"
NOW_US: Final = 1_767_225_600_000_000


class Stage:
    """A link, the machine ID that it speaks of, and the delegator that it speaks to."""

    store_id: str | None = "here"
    state = "HELD"

    def __init__(self) -> None:
        self.us = 1_000_000
        self.clock = HolderClock(lambda: self.us)
        self.mint: Mint | None = Mint(PRESETS["snowcloud"], 5)
        self.is_open = True
        self.token = TOKEN
        self.load = dict.fromkeys(LOAD, 0)
        self.link = Link(self, lambda: dict(self.load))
        self._msgid = 0

    def retry_after_ms(self, _local_us: int) -> int:
        return 50

    def later(self, us: int = 0) -> tuple[str, list[Any]] | None:
        """What the link says after so long."""
        self.us += us
        return self.said(self.link.poll(self.us))

    def said(self, body: bytes | None) -> tuple[str, list[Any]] | None:
        if body is None:
            return None
        self._msgid, method, params = decode_request(body)
        return method, params

    def accept(self) -> None:
        self.link.receive(encode_result(self._msgid, {"now_us": NOW_US}), self.us)

    def refuse(self) -> None:
        self.link.receive(encode_error(self._msgid, Code.NOT_READY, "m"), self.us)


HEARTBEAT: Final = ("worker.beat", [dict.fromkeys(LOAD, 0), TOKEN])
READY: Final = ("worker.ready", [5, TOKEN])
LEAVE: Final = ("worker.leave", [TOKEN])


@pytest.fixture
def stage() -> Stage:
    """One whose worker is registered."""
    stage = Stage()
    assert stage.later() == READY
    stage.accept()
    return stage


def test_it_says_that_it_is_ready_then_sends_heartbeats_with_its_load(stage: Stage) -> None:
    for ids in range(3):
        stage.load["ids"] = ids
        assert stage.later(HEARTBEAT_US) == ("worker.beat", [dict.fromkeys(LOAD, 0) | {"ids": ids}, TOKEN])
        stage.accept()


def test_between_two_heartbeats_it_says_nothing_however_often_it_is_asked(stage: Stage) -> None:
    for _ in range(HEARTBEAT_US // 1000 - 1):
        assert stage.later(1000) is None
    assert stage.link.wake_us == stage.us + 1000
    assert stage.later(1000) == HEARTBEAT
    assert stage.later() is None


def test_a_heartbeat_without_an_answer_does_not_stop_the_next(stage: Stage) -> None:
    assert [stage.later(HEARTBEAT_US) for _ in range(PATIENCE)] == [HEARTBEAT] * PATIENCE


def test_a_worker_that_is_not_known_registers_again_with_the_token_of_now(stage: Stage) -> None:
    assert stage.later(HEARTBEAT_US) == HEARTBEAT
    for attempt in range(4):
        stage.refuse()
        stage.token = bytes([attempt]) * 16
        assert stage.later(HEARTBEAT_US - 1) is None, "once a heartbeat"
        assert stage.later(1) == ("worker.ready", [5, stage.token])
    stage.accept()
    registered = stage.token
    stage.token = bytes(16)  # a renewal: the delegator knows the one before
    assert stage.later(HEARTBEAT_US) == ("worker.beat", [stage.load, registered])
    stage.link.answer([TAG, b""], b"answer")
    assert stage.link.flush() == ([registered + TAG, b""], b"answer", 1)
    assert stage.said(stage.link.leave()) == ("worker.leave", [registered])


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
    stage.link.receive(body, stage.us)
    assert stage.clock.timeline_us() == NOW_US
    assert stage.later(HEARTBEAT_US) == HEARTBEAT


def test_its_answers_tell_the_clock(stage: Stage) -> None:
    assert not Stage().clock.known
    assert stage.clock.timeline_us() == NOW_US


def test_the_clock_steps_back_only_while_no_window_is_open(stage: Stage) -> None:
    back = encode_result(1, {"now_us": NOW_US - 5_000_000})
    stage.us += 2_500_000  # what was heard before counts no more
    stage.link.receive(back, stage.us)
    assert (stage.clock.timeline_us() or 0) > NOW_US
    stage.is_open = False
    stage.link.receive(back, stage.us)
    assert stage.clock.timeline_us() == NOW_US - 5_000_000


def test_without_a_window_it_says_nothing() -> None:
    stage = Stage()
    stage.is_open = False
    assert stage.later() is None
    assert stage.later(HEARTBEAT_US) is None
    stage.is_open, stage.mint = True, None
    assert stage.later(HEARTBEAT_US) is None


def test_when_its_window_closes_it_leaves_at_once_and_once(stage: Stage) -> None:
    stage.is_open = False
    assert stage.later(1) == LEAVE
    assert [stage.later(HEARTBEAT_US) for _ in range(4)] == [None] * 4


def test_when_its_window_opens_again_it_is_ready_at_once(stage: Stage) -> None:
    stage.is_open = False
    assert stage.later(1) == LEAVE
    stage.is_open = True
    assert stage.later(1) == READY


def test_with_another_machine_it_registers_as_that(stage: Stage) -> None:
    stage.mint = Mint(PRESETS["snowcloud"], 6)
    assert stage.later(HEARTBEAT_US) == ("worker.ready", [6, TOKEN])


def test_told_to_leave_it_says_so_once_if_it_is_known(stage: Stage) -> None:
    assert Stage().link.leave() is None
    assert stage.said(stage.link.leave()) == LEAVE
    assert stage.link.leave() is None


def test_a_heartbeat_that_could_not_be_sent_makes_it_register_again(stage: Stage) -> None:
    assert stage.later(HEARTBEAT_US) == HEARTBEAT
    stage.link.unsent()
    assert stage.link.leave() is None, "the delegator knows of no worker that could leave"
    assert stage.later(HEARTBEAT_US) == READY


def test_one_answer_goes_under_its_tag_and_the_worker_s_token(stage: Stage) -> None:
    assert stage.link.answer([TAG, b""], b"answer") is None
    message = stage.link.flush()
    assert message == ([TOKEN + TAG, b""], b"answer", 1)
    assert stage.link.flush() is None


def test_answers_that_wait_together_go_in_one_message(stage: Stage) -> None:
    answers = [(TAG + b"%02d" % number, encode_result(number, [1, 1, 1])) for number in range(MAX_BUNDLE + 2)]
    sent = [stage.link.answer([tag, b""], answer) for tag, answer in answers]
    sent.append(stage.link.flush())
    first, second = (message for message in sent if message is not None)
    assert (first.prefix, first.answers, second.prefix, second.answers) == ([b""], MAX_BUNDLE, [b""], 2)
    bundled = decode_bundle(first.body) + decode_bundle(second.body)
    assert bundled == [(TOKEN + tag, answer) for tag, answer in answers]
    assert stage.link.flush() is None


def test_a_request_of_another_shape_is_answered_as_it_came(stage: Stage) -> None:
    prefix = [b"a", b"b", b""]
    assert stage.link.answer(prefix, b"answer") == (prefix, b"answer", 1)


def test_its_numbers_go_round(stage: Stage) -> None:
    stage.link._msgid = 2**32 - 1
    assert stage.later(HEARTBEAT_US) == HEARTBEAT


def turns_until_a_new_connection(stage: Stage) -> int:
    """How many heartbeats stay unanswered before the link gives its connection up."""
    before, turns = stage.link.connection, 0
    while stage.link.connection == before:
        said = stage.later(HEARTBEAT_US)
        turns += 1
        assert turns < 1000, "it never does"
    assert stage.link.connection == before + 1
    assert said == READY, "the delegator does not know the new connection yet"
    return turns - 1


def test_a_connection_on_which_no_heartbeat_is_answered_is_given_up_later_each_time(stage: Stage) -> None:
    assert [turns_until_a_new_connection(stage) for _ in range(6)] == [4, 7, 15, 31, 31, 31]


def test_a_connection_that_could_not_even_be_sent_over_is_given_up_as_well(stage: Stage) -> None:
    for _ in range(PATIENCE + 1):
        assert stage.later(HEARTBEAT_US) is not None
        stage.link.unsent()
    assert stage.link.connection == 1


def test_an_answer_of_any_kind_keeps_the_connection(stage: Stage) -> None:
    turns_until_a_new_connection(stage)
    for turn in range(4 * PATIENCE):
        if turn % PATIENCE == 0:
            stage.refuse()
        assert stage.later(HEARTBEAT_US) is not None
    assert stage.link.connection == 1
    stage.accept()
    assert turns_until_a_new_connection(stage) == PATIENCE, "patience is what it was at first"


def test_a_worker_that_has_nothing_to_say_needs_no_answer(stage: Stage) -> None:
    stage.is_open = False
    for _ in range(5 * PATIENCE):
        stage.later(HEARTBEAT_US)
    assert stage.link.connection == 0
