"""The envelope: what a server takes apart it can put together again, and nothing else gets in."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zflake.wire.frames import MAX_ENVELOPE, MAX_FRAMES, MAX_HOP_BYTES, split

envelopes = st.lists(st.binary(min_size=1, max_size=8), max_size=MAX_ENVELOPE)


@given(envelopes, st.binary(max_size=8))
def test_a_message_splits_into_what_goes_back_and_the_body(envelope: list[bytes], body: bytes) -> None:
    assert split([*envelope, b"", body]) == ([*envelope, b""], body)


@given(st.lists(st.binary(max_size=2), max_size=MAX_FRAMES + 2))
def test_the_split_is_at_the_first_empty_frame_or_there_is_none(frames: list[bytes]) -> None:
    message = split(frames)
    first_empty = frames.index(b"") if b"" in frames else None
    if first_empty is not None and first_empty == len(frames) - 2 and first_empty <= MAX_ENVELOPE:
        assert message == (frames[:-1], frames[-1])
    else:
        assert message is None


@pytest.mark.parametrize("length", range(MAX_ENVELOPE + 1))
def test_an_envelope_of_up_to_the_limit_is_taken(length: int) -> None:
    assert split([*[b"hop"] * length, b"", b"body"]) is not None


@pytest.mark.parametrize("length", [MAX_ENVELOPE + 1, MAX_FRAMES, 1000])
def test_a_longer_envelope_is_refused(length: int) -> None:
    assert split([*[b"hop"] * length, b"", b"body"]) is None


@pytest.mark.parametrize("at", range(MAX_ENVELOPE))
def test_a_frame_of_the_envelope_that_is_too_long_to_be_kept_is_refused(at: int) -> None:
    for length, taken in ((MAX_HOP_BYTES, True), (MAX_HOP_BYTES + 1, False)):
        frames = [b"hop"] * MAX_ENVELOPE
        frames[at] = bytes(length)
        assert (split([*frames, b"", b"body"]) is not None) is taken


def test_the_longest_message_is_told_from_a_longer_one_by_its_first_frames() -> None:
    longest = [*[b"hop"] * MAX_ENVELOPE, b"", b"body"]
    assert len(longest) < MAX_FRAMES
    for more in (1, 2, 1000):
        assert split([*longest, *[b"more"] * more][:MAX_FRAMES]) is None


@pytest.mark.parametrize(
    "frames",
    [
        [],
        [b""],
        [b"body"],
        [b"id", b"body"],
        [b"id", b""],
        [b"", b"", b"body"],
        [b"id", b"", b"", b"body"],
        [b"id", b"", b"body", b"more"],
        [b"id", b"", b"body", b""],
    ],
    ids=repr,
)
def test_other_shapes_are_refused(frames: list[bytes]) -> None:
    assert split(frames) is None


def test_an_empty_body_is_a_body() -> None:
    assert split([b"id", b"", b""]) == ([b"id", b""], b"")
