"""Whom to ask for IDs, and what to do about the answer: the client without its sockets.

A conversation is a generator.  It yields what is to be done (`Ask` an endpoint, or `Pause`) and is sent what
came of it: a `Response`, None where nothing came in time, or a `ProtocolError` for an answer that is none.
Whoever drives it brings the sockets and the clock, be they real or a test's.

The balancer remembers between conversations which endpoints there are and how they fare.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any, Final, NamedTuple, TypeAlias

from zflake.client.balancer import PROBE_S, Balancer
from zflake.core.mint import Run
from zflake.errors import (
    ConfigError,
    LeaseExpired,
    Overloaded,
    ProtocolError,
    Timeout,
    Unavailable,
    ZflakeError,
)
from zflake.wire.cluster import check_hello
from zflake.wire.codec import Response
from zflake.wire.endpoint import parse_endpoint
from zflake.wire.ids import MAX_COUNT, check_run
from zflake.wire.methods import Method, exception_of

ATTEMPT_S: Final = 1.0
"""How long one endpoint has for an answer, at most; less where the budget is small."""
ATTEMPTS: Final = 4
"""Over how many endpoints, or tries, a budget is spread."""
CONNECT_S: Final = 0.5
"""How long an endpoint has to take a connection."""
REFRESH_WAIT_S: Final = 0.2
PAUSE_S: Final = 0.05
WAIT_S: Final = 0.5
"""The longest pause that a refusal can impose: whoever refused may have recovered earlier than it thought."""


class Ask(NamedTuple):
    """Send this request to that endpoint, and wait `timeout_s` for the answer."""

    endpoint: str
    method: str
    params: tuple[Any, ...]
    timeout_s: float


class Pause(NamedTuple):
    """Let time pass."""

    seconds: float


Outcome: TypeAlias = Response | ProtocolError | None
Conversation: TypeAlias = Generator[Ask | Pause, Outcome, Any]


class Budget:
    """The time of one call: all of it, retries included."""

    __slots__ = ("_attempt_s", "_deadline", "_now", "total_s")

    def __init__(self, total_s: float, now: Callable[[], float], started_at: float) -> None:
        self._now = now
        self.total_s = total_s
        self._deadline = started_at + total_s
        self._attempt_s = attempt_s(total_s)

    def left_s(self) -> float:
        """What is left, in seconds, 0 at the least."""
        return max(0.0, self._deadline - self._now())

    def attempt_s(self) -> float:
        """What the next attempt may take; the last one takes all that is left."""
        left = self.left_s()
        return left if left < 1.5 * self._attempt_s else self._attempt_s


def attempt_s(total_s: float) -> float:
    """What one attempt may take of a budget of `total_s` seconds."""
    return min(ATTEMPT_S, total_s / ATTEMPTS)


def ask_ids(endpoint: str, count: int, timeout_s: float, store_id: str | None) -> Ask:
    """The request for up to `count` IDs of the cluster whose store that is."""
    count = min(count, MAX_COUNT)
    timeout_ms = int(timeout_s * 1000) or 1
    params = (count, timeout_ms) if store_id is None else (count, timeout_ms, store_id)
    return Ask(endpoint, "ids.next", params, timeout_s)


def take(
    balancer: Balancer, count: int, budget: Budget, begun: tuple[Ask, Run | ZflakeError | None] | None = None
) -> Conversation:
    """Ask for exactly `count` IDs; returns their runs, in the order in which they were minted.

    `begun` is a first request that was sent already, and what `run_of` says came of it.

    Raises the error that stood in the way last once the budget is spent: `Timeout` where nobody answered,
    `LeaseExpired`, `Overloaded` or `Unavailable` where somebody did.  Raises `AuthError` at once, since no
    other try would go better, `ProtocolError` where all that answer are not zflake's, and `LayoutError`
    where they belong to two clusters.
    """
    runs: list[Run] = []
    missing = count
    reason: ZflakeError | None = None
    brokered = False
    while missing:
        if begun is None:
            if budget.left_s() <= 0:
                raise _spent(balancer, count, missing, budget, reason)
            endpoint = yield from _choose(balancer, budget, brokered=brokered)
            if not isinstance(endpoint, str):
                reason = endpoint or reason
                continue
            attempt = PROBE_S if balancer.is_probe(endpoint) and balancer.has_fit() else ATTEMPT_S
            ask = ask_ids(endpoint, missing, min(attempt, budget.attempt_s()), balancer.store_id)
            begun = ask, run_of((yield ask), ask)
        (ask, run), begun = begun, None
        if isinstance(run, tuple):
            runs.append(run)
            missing -= run[2]
            balancer.succeeded(ask.endpoint)
        elif run is None:
            balancer.failed(ask.endpoint)
            # One worker that is out of reach may mean that all are.
            brokered = brokered or balancer.is_worker(ask.endpoint)
        else:
            reason = run
            wait_s = min(reason.retry_after or PAUSE_S, WAIT_S)
            # One that talks nonsense is not what the directory takes it for: as good as away.
            if isinstance(reason, ProtocolError):
                balancer.failed(ask.endpoint)
                balancer.doubt()
            else:
                balancer.failed(ask.endpoint, for_s=wait_s)
            if balancer.pick() is None:
                yield Pause(min(wait_s, budget.left_s()))
    return runs


def _choose(
    balancer: Balancer, budget: Budget, *, brokered: bool
) -> Generator[Ask | Pause, Outcome, str | ZflakeError | None]:
    """Whom to ask for IDs; where there is nobody, what stood in the way, after a pause."""
    if (endpoint := balancer.pick(brokered=brokered)) is not None:
        return endpoint
    reason = yield from _refresh(balancer, budget)
    if (endpoint := balancer.pick(brokered=brokered) or balancer.last_resort()) is not None:
        return endpoint
    if isinstance(reason, ProtocolError):
        raise reason
    yield Pause(min(PAUSE_S, budget.left_s()))
    return reason


def run_of(outcome: Outcome, ask: Ask) -> Run | ZflakeError | None:
    """The run that came, or the error that stands in its place; None where nothing came."""
    if outcome is None or isinstance(outcome, ProtocolError):
        return outcome
    if outcome.error is None:
        try:
            return check_run(outcome.result, ask.params[0])
        except ProtocolError as nonsense:
            return nonsense
    error = exception_of(outcome.error)
    if isinstance(error, LeaseExpired | Overloaded | Unavailable | Timeout | ProtocolError):
        return error
    raise error


def introduce(balancer: Balancer, budget: Budget) -> Conversation:
    """Learn the layout of the cluster's IDs; returns it.  Raises `Timeout` where nobody can tell."""
    while balancer.layout is None:
        reason = yield from _refresh(balancer, budget)
        if balancer.layout is None:
            if isinstance(reason, ProtocolError):
                raise reason
            if budget.left_s() <= 0:
                raise _spent(balancer, 0, 0, budget, reason)
            yield Pause(min(PAUSE_S, budget.left_s()))
    return balancer.layout


def _refresh(balancer: Balancer, budget: Budget) -> Generator[Ask | Pause, Outcome, ZflakeError | None]:
    """Read the directory anew; returns what stood in the way where it gave no worker."""
    workers: list[str] = []
    brokers: list[str] = []
    reason: ZflakeError | None = None
    answered = False
    asked = balancer.route == "broker"  # by which nobody needs to know the workers
    # Who can be served must not wait long for a delegator that is away.
    most_s = REFRESH_WAIT_S if balancer.has_fit() else ATTEMPT_S
    for seed in balancer.in_order():
        try:
            if balancer.service_of(seed) is None or balancer.layout is None:
                _introduce(
                    balancer, seed, (yield Ask(seed, Method.HELLO, (), min(most_s, budget.attempt_s())))
                )
            if balancer.service_of(seed) == "worker":
                workers.append(seed)
            else:
                brokers.append(seed)
            if not asked and seed in brokers:
                ask = Ask(seed, Method.CLUSTER_WORKERS, (), min(most_s, budget.attempt_s()))
                workers += _addresses((yield ask))
                asked = bool(workers)  # a delegator that has just started may know of nobody yet
            answered = True
            balancer.succeeded(seed)
        except Timeout:
            balancer.failed(seed)
        except ProtocolError as error:
            balancer.failed(seed)
            reason = ProtocolError(f"{seed}: {error}")
    balancer.agree()
    if not answered:
        balancer.keep()
        return reason
    balancer.refresh(workers, brokers)
    if balancer.route == "broker":
        return None if brokers else reason or Unavailable("the route broker needs a delegator's endpoint")
    return None if workers else reason or Unavailable("no worker is ready: start one")


def _introduce(balancer: Balancer, seed: str, outcome: Outcome) -> None:
    response = _answer(outcome)
    hello = check_hello(response.error, response.result)
    balancer.introduce(seed, hello)


def _addresses(outcome: Outcome) -> list[str]:
    response = _answer(outcome)
    if response.error is not None:
        raise exception_of(response.error)
    try:
        addresses = [worker["address"] for worker in response.result["workers"]]
        return list(dict.fromkeys(parse_endpoint(address).text for address in addresses))
    except (KeyError, TypeError, ConfigError) as error:
        raise ProtocolError(f"it sent a directory that can't be read: {error}") from error


def _answer(outcome: Outcome) -> Response:
    if outcome is None:
        raise Timeout("no answer")
    if isinstance(outcome, ProtocolError):
        raise outcome
    return outcome


def _spent(
    balancer: Balancer, count: int, missing: int, budget: Budget, reason: ZflakeError | None
) -> ZflakeError:
    seeds = ", ".join(balancer.seeds)
    got = f"{count - missing} of {count} IDs" if missing < count else "no answer"
    if reason is None or missing < count:
        # A delegator may be fine, and the workers that it names out of reach.
        silent = [endpoint for endpoint in balancer.silent() if endpoint not in balancer.seeds]
        whom = f"{', '.join(silent[:3])}, which {seeds} named," if silent else seeds
        return Timeout(
            f"{got} from {whom} within {budget.total_s:g} s; is it running, and is the timeout enough?"
        )
    return type(reason)(f"{reason} (asked {seeds} for {budget.total_s:g} s)", retry_after=reason.retry_after)
