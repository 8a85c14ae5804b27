"""Whom to ask for IDs, and what to do about the answer: the client without its sockets.

A conversation is a generator.  It yields what is to be done (`Ask` an endpoint, or `Pause`) and is sent what
came of it: a `Response`, None where nothing came in time, or a `ProtocolError` for an answer that is none.  Blocking code, asyncio and a simulator drive
the same one.

The roster remembers between conversations which endpoints there are and how they fare.  A client stays with
one worker, whose IDs ascend, until that fails or the directory is read again.  An endpoint that does not
answer is passed over for a while, longer with each failure, and then probed by one request.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, TypeAlias

from zflake.core.layout import Layout
from zflake.core.mint import Run
from zflake.errors import (
    ConfigError,
    LayoutError,
    LeaseExpired,
    Overloaded,
    ProtocolError,
    Timeout,
    Unavailable,
    ZflakeError,
)
from zflake.wire.codec import Response
from zflake.wire.endpoint import parse_endpoint
from zflake.wire.messages import MAX_COUNT, Method, check_hello, check_run, exception_of

ATTEMPT_S: Final = 1.0
"""How long one endpoint has for an answer, at most; less where the budget is small."""
ATTEMPTS: Final = 4
"""Over how many endpoints, or tries, a budget is spread."""
CONNECT_S: Final = 0.5
"""How long an endpoint has to take a connection."""
REFRESH_S: Final = 10.0
"""How old the directory may get while calls succeed."""
REFRESH_WAIT_S: Final = 0.2
EJECT_S: Final = 0.5
EJECT_MAX_S: Final = 10.0
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


@dataclass(slots=True)
class _Health:
    """How an endpoint fares."""

    failures: int = 0
    passed_over_until: float = 0.0


class Roster:
    """The endpoints that a client knows, shared by its threads.

    `seeds` were given by the application.  `now` is a monotonic clock in seconds, `draw` gives a number in
    [0, 1).
    """

    def __init__(self, seeds: Iterable[str], *, now: Callable[[], float], draw: Callable[[], float]) -> None:
        self.seeds = tuple(seeds)
        self.layout: Layout | None = None
        self._now = now
        self._draw = draw
        self._services: dict[str, str] = {}
        self._workers: list[str] = []
        self._favourite: str | None = None
        self._health: dict[str, _Health] = {}
        self._refreshed_at = float("-inf")
        self.unlock()

    def unlock(self) -> None:
        """Begin with a fresh lock: in the child of a fork the old one may be held by nobody."""
        self._lock = threading.Lock()  # guards everything from _services to _refreshed_at

    def favourite(self, now: float) -> str | None:
        """The worker that answered last; None where that is not so, or the directory has aged by `now`."""
        # No lock: two reads, of which either may be outdated as soon as they are done.
        return self._favourite if now < self._refreshed_at + REFRESH_S else None

    def pick(self) -> str | None:
        """The worker to ask next; None where the directory should be read first."""
        with self._lock:
            now = self._now()
            if now - self._refreshed_at >= REFRESH_S and any(self._is_fit(seed, now) for seed in self.seeds):
                return None
            if self._favourite is not None:
                return self._favourite
            fit = [worker for worker in self._workers if self._is_fit(worker, now)]
            if not fit:
                return None
            picked = fit[int(self._draw() * len(fit))]
            health = self._health_of(picked)
            if health.failures:
                health.passed_over_until = now + ATTEMPT_S  # half open: one probe at a time
            return picked

    def has_fit_worker(self) -> bool:
        """Whether some worker is known that is not passed over."""
        with self._lock:
            now = self._now()
            return any(self._is_fit(worker, now) for worker in self._workers)

    def probe(self) -> str | None:
        """The worker that has been passed over for longest; None where none is known."""
        with self._lock:
            return min(self._workers, key=lambda w: self._health_of(w).passed_over_until, default=None)

    def succeeded(self, endpoint: str) -> None:
        """Note an answer: stay with this worker, if it is one."""
        if endpoint == self._favourite:
            return
        with self._lock:
            self._health[endpoint] = _Health()
            if self._favourite is None and endpoint in self._workers:
                self._favourite = endpoint

    def failed(self, endpoint: str, *, for_s: float | None = None) -> None:
        """Pass an endpoint over: for `for_s` seconds where it said so itself, longer each time otherwise."""
        with self._lock:
            if self._favourite == endpoint:
                self._favourite = None
            health = self._health_of(endpoint)
            if for_s is None:
                for_s = min(EJECT_MAX_S, EJECT_S * 2**health.failures) * (0.5 + self._draw())
                health.failures = min(health.failures + 1, 10)
            health.passed_over_until = self._now() + for_s

    def service_of(self, endpoint: str) -> str | None:
        """What an endpoint has said it is: `delegator` or `worker`."""
        return self._services.get(endpoint)

    def introduce(self, endpoint: str, service: str, layout: Layout | None) -> None:
        """Note what an endpoint says it is.  Raises `LayoutError` where its layout is not the others'."""
        with self._lock:
            if layout is not None:
                if self.layout is not None and not layout.same_ids(self.layout):
                    raise LayoutError(
                        f"{endpoint} has layout {layout}, epoch {layout.epoch.isoformat()}; an endpoint before it had "
                        f"{self.layout}, epoch {self.layout.epoch.isoformat()}: they belong to two clusters"
                    )
                self.layout = layout
            self._services[endpoint] = service

    def refresh(self, workers: list[str]) -> None:
        """Take in a directory that was just read."""
        with self._lock:
            self._workers = workers
            self._refreshed_at = self._now()
            self._favourite = None
            known = {*workers, *self.seeds}
            self._health = {e: health for e, health in self._health.items() if e in known}

    def keep(self) -> None:
        """Go on with the directory as it is: nobody could be asked for a newer one."""
        with self._lock:
            self._refreshed_at = self._now()

    def in_order(self) -> list[str]:
        """The seeds, the ones that fare best first, equals in random order."""
        with self._lock:
            now = self._now()
            rank = {
                s: (max(0.0, self._health_of(s).passed_over_until - now), self._draw()) for s in self.seeds
            }
            return sorted(self.seeds, key=rank.__getitem__)

    def _is_fit(self, endpoint: str, now: float) -> bool:
        return self._health_of(endpoint).passed_over_until <= now

    def _health_of(self, endpoint: str) -> _Health:
        return self._health.setdefault(endpoint, _Health())


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


def ask_ids(worker: str, count: int, timeout_s: float) -> Ask:
    """The request for up to `count` IDs."""
    return Ask(worker, "ids.next", (min(count, MAX_COUNT), int(timeout_s * 1000) or 1), timeout_s)


def take(
    roster: Roster, count: int, budget: Budget, begun: tuple[Ask, Outcome] | None = None
) -> Conversation:
    """Ask for exactly `count` IDs; returns their runs, in the order in which they were minted.

    `begun` is a first request that was sent already, and what came of it.

    Raises the error that stood in the way last once the budget is spent: `Timeout` where nobody answered,
    `LeaseExpired`, `Overloaded` or `Unavailable` where somebody did.  Raises `AuthError` at once, since no
    other try would go better, `ProtocolError` where all that answer are not zflake's, and `LayoutError`
    where they belong to two clusters.
    """
    runs: list[Run] = []
    missing = count
    reason: ZflakeError | None = None
    while missing:
        if begun is None:
            if budget.left_s() <= 0:
                raise _spent(roster, count, missing, budget, reason)
            worker = yield from _choose(roster, budget)
            if not isinstance(worker, str):
                reason = worker or reason
                continue
            ask = ask_ids(worker, missing, budget.attempt_s())
            begun = ask, (yield ask)
        (ask, outcome), begun = begun, None
        run = _run_of(outcome, ask)
        if isinstance(run, tuple):
            runs.append(run)
            missing -= run[2]
            roster.succeeded(ask.endpoint)
        elif run is None:
            roster.failed(ask.endpoint)
        else:
            reason = run
            wait_s = min(reason.retry_after or PAUSE_S, WAIT_S)
            # One that talks nonsense is not what the directory takes it for: as good as away.
            roster.failed(ask.endpoint, for_s=None if isinstance(reason, ProtocolError) else wait_s)
            if roster.pick() is None:
                yield Pause(min(wait_s, budget.left_s()))
    return runs


def _choose(roster: Roster, budget: Budget) -> Generator[Ask | Pause, Outcome, str | ZflakeError | None]:
    """The worker to ask; where there is none, what stood in the way, after a pause."""
    if (worker := roster.pick()) is not None:
        return worker
    reason = yield from _refresh(roster, budget)
    if (worker := roster.pick() or roster.probe()) is not None:
        return worker
    if isinstance(reason, ProtocolError):
        raise reason
    yield Pause(min(PAUSE_S, budget.left_s()))
    return reason


def _run_of(outcome: Outcome, ask: Ask) -> Run | ZflakeError | None:
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


def introduce(roster: Roster, budget: Budget) -> Conversation:
    """Learn the layout of the cluster's IDs; returns it.  Raises `Timeout` where nobody can tell."""
    while roster.layout is None:
        reason = yield from _refresh(roster, budget)
        if roster.layout is None:
            if isinstance(reason, ProtocolError):
                raise reason
            if budget.left_s() <= 0:
                raise _spent(roster, 0, 0, budget, reason)
            yield Pause(min(PAUSE_S, budget.left_s()))
    return roster.layout


def _refresh(roster: Roster, budget: Budget) -> Generator[Ask | Pause, Outcome, ZflakeError | None]:
    """Read the directory anew; returns what stood in the way where it gave no worker."""
    workers: list[str] = []
    reason: ZflakeError | None = None
    answered = asked_delegator = False
    # Who has workers that serve must not wait long for a delegator that is away.
    most_s = REFRESH_WAIT_S if roster.has_fit_worker() else ATTEMPT_S
    for seed in roster.in_order():
        if asked_delegator and roster.service_of(seed) == "delegator":
            continue
        try:
            if roster.service_of(seed) is None or roster.layout is None:
                _introduce(roster, seed, (yield Ask(seed, Method.HELLO, (), min(most_s, budget.attempt_s()))))
            if roster.service_of(seed) == "worker":
                workers.append(seed)
            elif not asked_delegator:
                ask = Ask(seed, Method.CLUSTER_WORKERS, (), min(most_s, budget.attempt_s()))
                workers += _addresses((yield ask))
                asked_delegator = True
            answered = True
            roster.succeeded(seed)
        except Timeout:
            roster.failed(seed)
        except ProtocolError as error:
            roster.failed(seed)
            reason = ProtocolError(f"{seed}: {error}")
    if answered:
        roster.refresh(workers)
        return None if workers else reason or Unavailable("no worker holds a lease: start one")
    roster.keep()
    return reason


def _introduce(roster: Roster, seed: str, outcome: Outcome) -> None:
    response = _answer(outcome)
    hello = check_hello(response.error, response.result)
    roster.introduce(seed, hello.service, hello.layout)


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
    roster: Roster, count: int, missing: int, budget: Budget, reason: ZflakeError | None
) -> ZflakeError:
    seeds = ", ".join(roster.seeds)
    got = f"{count - missing} of {count} IDs" if missing < count else "no answer"
    if reason is None or missing < count:
        return Timeout(
            f"{got} from {seeds} within {budget.total_s:g} s; is it running, and is the timeout enough?"
        )
    return type(reason)(f"{reason} (asked {seeds} for {budget.total_s:g} s)", retry_after=reason.retry_after)
