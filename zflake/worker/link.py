"""A worker's link to one delegator: says that the worker is there, and takes brokered requests.  It knows no socket.

While a window is open the worker is registered at the delegator: by `worker.ready`, which shows the lease's token,
then by a heartbeat every `HEARTBEAT_US`.  When the window has run out, or the worker ends, `worker.leave` says so.
Heartbeats and answers show the token that the worker registered with, which a stranger in its place can't.
A delegator that answers with an error was restarted, or has not seen the lease yet: the worker says `worker.ready`
again.  If none of `PATIENCE` heartbeats in a row is answered, the connection may have died without a word (a router
forgot it, the name has moved on to another machine): the link gives it up, and the owner makes another.

In a cluster with keys the delegator tells the worker who may ask it for IDs: before the first `worker.ready`, and again
when the answer to a sign of life has another version of that list.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple

from zflake.core.lease import Token
from zflake.errors import ProtocolError
from zflake.holder.hold import Hold
from zflake.wire import fields
from zflake.wire.callers import Caller
from zflake.wire.cluster import callers_version, check_callers
from zflake.wire.codec import MAX_MSGID, decode_response, encode_bundle, encode_request
from zflake.wire.methods import Method

HEARTBEAT_US: Final = 250_000
"""Microseconds between heartbeats."""
PATIENCE: Final = 4
"""Heartbeats without an answer after which a connection is given up; twice as many after each that gave none."""
MAX_PATIENCE: Final = 32
"""The same at most, so that a delegator that is merely away is not given a connection every second."""
MAX_BUNDLE: Final = 64
"""Answers in one message."""


class Answers(NamedTuple):
    """A message to the delegator: one answer, or several in a bundle."""

    prefix: list[bytes]
    body: bytes
    answers: int


class Link:
    """The worker's side of the talk with one delegator.

    `load` gives what a heartbeat says of the worker.  The owner sends what the methods give, over a new connection
    whenever `connection` has changed, and calls `poll` at `wake_us` and whenever the hold may have opened or closed.
    With `keyed` the cluster has keys.
    """

    def __init__(self, hold: Hold, load: Callable[[], dict[str, int]], *, keyed: bool = False) -> None:
        self.callers: Mapping[str, Caller] | None = None
        """Who may ask this worker for IDs, by key, as the delegator said last."""
        self.wake_us = 0
        """When `poll` is due (local clock)."""
        self.connection = 0
        """Number of the connection that `poll` speaks of; one more after each that was given up."""
        self._silences = 0  # heartbeats in a row that had no answer yet
        self._patience = PATIENCE
        self._hold = hold
        self._load = load
        self._answers: list[tuple[bytes, bytes]] = []
        self._msgid = 0
        self._was_open = False
        self._known_as: int | None = None
        """The machine ID under which the delegator knows this worker."""
        self._token: Token = b""
        """The token that it was shown."""
        self.keyed = keyed
        """Whether the cluster has keys."""
        self._version: int | None = None  # of the callers

    def poll(self, local_us: int) -> bytes | None:
        """The message that is due now, if one is: that this worker is ready, that it lives, or that it leaves."""
        mint, is_open = self._hold.mint, self._hold.is_open
        opened, self._was_open = is_open and not self._was_open, is_open
        due = opened or local_us >= self.wake_us
        if due:
            self.wake_us = local_us + HEARTBEAT_US
        if mint is None or not is_open:
            return self.leave()
        if not due:
            return None
        if self._silences >= self._patience:
            self.connection += 1
            self._silences, self._patience = 0, min(2 * self._patience, MAX_PATIENCE)
            self._known_as = None
        self._silences += 1
        if self.keyed and self._version is None:
            return self._say(Method.WORKER_CALLERS)
        if self._known_as == mint.machine:
            return self._say(Method.WORKER_HEARTBEAT, self._load(), self._token)
        self._known_as, self._token = mint.machine, self._hold.token
        return self._say(Method.WORKER_READY, mint.machine, self._token)

    @property
    def hears(self) -> bool:
        """Whether the delegator answers."""
        return self._silences < PATIENCE

    def leave(self) -> bytes | None:
        """The `worker.leave` to send; None if the delegator does not count on this worker."""
        if self._known_as is None:
            return None
        self._known_as = None
        return self._say(Method.WORKER_LEAVE, self._token)

    def unsent(self) -> None:
        """Note that what `poll` gave could not be sent: the delegator is away."""
        self._known_as = None

    def receive(self, body: bytes, local_us: int) -> None:
        """Take in an answer of the delegator's."""
        with contextlib.suppress(ProtocolError):
            response = decode_response(body)
            self._silences, self._patience = 0, PATIENCE
            if response.error is not None:
                self._known_as = None
                return
            if (timeline_us := fields.timeline_us(response.result)) is not None:
                self._hold.clock.exchange(timeline_us, local_us, step=not self._hold.is_open)
            if self.keyed:
                self._follow_callers(response.result, local_us)

    def _follow_callers(self, result: Any, local_us: int) -> None:
        version, callers = callers_version(result), check_callers(result)
        if callers is not None:
            self.callers, self._version = callers, version
        elif version != self._version:
            self._version = None
        else:
            return
        self.wake_us = local_us

    def answer(self, prefix: list[bytes], answer: bytes) -> Answers | None:
        """Answer a brokered request, at the next `flush` at the latest; gives what is to be sent now.

        The delegator reads its peers' messages in turn.  With many peers, a worker must bundle its answers, or each
        of them waits for a turn of its own.
        """
        if len(prefix) != 2:  # noqa: PLR2004  (the tag and the empty frame; anything else goes back as it came)
            return Answers(prefix, answer, 1)
        self._answers.append((self._token + prefix[0], answer))
        return self.flush() if len(self._answers) == MAX_BUNDLE else None

    def flush(self) -> Answers | None:
        """The answers that wait, if any do."""
        answers = self._answers
        if not answers:
            return None
        self._answers = []
        if len(answers) == 1:
            ((tag, answer),) = answers
            return Answers([tag, b""], answer, 1)
        return Answers([b""], encode_bundle(answers), len(answers))

    def _say(self, method: Method, *params: object) -> bytes:
        self._msgid = (self._msgid + 1) & MAX_MSGID
        return encode_request(self._msgid, method, params)
