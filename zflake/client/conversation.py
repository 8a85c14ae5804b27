"""Which endpoint to ask for IDs, and what to do about the answer: the client without its sockets.

A conversation is a generator.  It yields a step (`Ask` an endpoint, `Pause`, or `Wait` for another caller); the
driver, which brings sockets and clocks, does it, and sends in the `Outcome` of an `Ask`, or None after any
other step.  A driver that gives a conversation up closes it.

The balancer remembers between conversations which endpoints there are and how they fare.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator
from typing import Any, Final, NamedTuple, TypeAlias, TypeVar

from zflake.client.balancer import PROBE_S, Balancer, Refresh
from zflake.core.layout import Layout
from zflake.core.mint import Run
from zflake.errors import (
    AuthError,
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
from zflake.wire.fields import text
from zflake.wire.ids import MAX_COUNT, check_run
from zflake.wire.methods import Method, exception_of

ATTEMPT_S: Final = 1.0
"""Seconds that one endpoint has for an answer at most; less if the budget is small."""
ATTEMPTS: Final = 4
"""Divisor of a budget: one attempt may take that part of it, and `ATTEMPT_S` at most."""
CONNECT_S: Final = 0.5
"""Seconds that an endpoint has to take a connection."""
REFRESH_WAIT_S: Final = 0.2
"""Seconds that a seed has for an answer while an endpoint that could give IDs is known."""
PAUSE_S: Final = 0.05
"""Seconds between two tries when no endpoint is left and none said how long to wait."""
WAIT_S: Final = 0.5
"""Seconds of the longest pause that a refusal can impose: the endpoint may recover earlier than it thought."""

_PASSING: Final = (LeaseExpired, Overloaded, Unavailable, Timeout, ProtocolError)
"""The errors that another try, or another endpoint, may mend."""


class Ask(NamedTuple):
    """Send this request to that endpoint, and wait `timeout_s` seconds for the answer."""

    endpoint: str
    method: str
    params: tuple[Any, ...]
    timeout_s: float
    began: float = 0.0
    """When the ask began, by the balancer's clock; the balancer compares it with what it has learned since."""
    key: str = ""
    """The endpoint's public key, as the directory says; empty for one that is to have a trusted delegator's."""


class Pause(NamedTuple):
    """Let time pass."""

    seconds: float


class Wait(NamedTuple):
    """Wait until this refresh is over, for `timeout_s` seconds at most; the balancer tells when it is."""

    refresh: Refresh
    timeout_s: float


T = TypeVar("T")
Action: TypeAlias = Ask | Pause | Wait
Outcome: TypeAlias = Response | AuthError | ProtocolError | None
"""An ask's end: an answer, an error (the key is refused, or the answer is not zflake's), or None if nothing came."""
Conversation: TypeAlias = Generator[Action, Outcome, T]


class Ascent:
    """Checks the runs of one call: what an endpoint gives of one machine ID ascends.

    A machine ID's (tick, sequence) only grows, in a tenancy and from one to the next, and a call asks for a run after it
    has the one before.  So a run that does not lie wholly above the last one repeats IDs, or is made up.

    Runs of two machine IDs are not compared.  A delegator passes a call's requests on to several workers, and a worker
    that was restarted during the call may have another machine ID.  Their clocks may be apart by a message's flight, so
    the later run may be lower even in time, and yet be right.
    """

    def __init__(self) -> None:
        self._last: dict[tuple[str, int], int] = {}

    def check(self, endpoint: str, run: Run, layout: Layout | None) -> None:
        """Take in the next run.  Raises `ProtocolError` if it does not lie above those before."""
        first, step, count = run
        # Without a layout, a worker has just got its first lease; time is the highest field of any.
        machine = -1 if layout is None else first >> layout.machine_shift & layout.machines - 1
        if first <= self._last.get((endpoint, machine), -1):
            raise ProtocolError(
                f"it gave IDs from {first} on after higher ones: they may have been given before"
            )
        self._last[endpoint, machine] = first + step * (count - 1)


class Budget:
    """The time of one call, retries included: `total_s` seconds from `began` on, by the clock `now`."""

    def __init__(self, total_s: float, began: float, now: Callable[[], float]) -> None:
        self.total_s = total_s
        self.deadline = began + total_s
        self._now = now

    def left_s(self) -> float:
        """The seconds that are left, 0 or more."""
        return max(0.0, self.deadline - self._now())

    def attempt_s(self) -> float:
        """The seconds that an attempt which begins now may take; the last one takes all that is left."""
        attempt_s, left_s = _attempt_s(self.total_s), self.left_s()
        return left_s if left_s < 1.5 * attempt_s else attempt_s


def begin(balancer: Balancer, count: int, timeout_s: float) -> Ask | None:
    """The first ask of a call for `count` IDs; None if the call begins by choosing an endpoint.

    Nearly every call is this ask alone: the endpoint that answered last answers again.  So the driver makes it
    without a generator, which would cost the call 15 % more of its thread's time, and hands the outcome to
    `proceed`.
    """
    began = balancer.now()
    endpoint = balancer.sticky(began)
    if endpoint is None:
        return None
    return _ask_ids(balancer, endpoint, count, began, _attempt_s(timeout_s))


def proceed(
    balancer: Balancer, count: int, timeout_s: float, ask: Ask, outcome: Outcome
) -> list[Run] | Conversation[list[Run]]:
    """Go on after the first ask: gives the runs if it gave all `count` IDs, or the conversation that takes the rest.

    Raises what `take` raises.
    """
    run = _settle(balancer, ask, outcome)
    if type(run) is tuple and run[2] == count:
        return [run]
    return take(balancer, count, timeout_s, ask, run)


def take(
    balancer: Balancer,
    count: int,
    timeout_s: float,
    ask: Ask | None = None,
    run: Run | ZflakeError | None = None,
) -> Conversation[list[Run]]:
    """Take exactly `count` IDs within `timeout_s` seconds; returns their runs in the order of minting.

    `run` is what came of a first `ask`, if there was one.

    Raises, once the budget is spent, the last error that stood in the way: `Timeout` if no endpoint answered,
    `LeaseExpired`, `Overloaded` or `Unavailable` if one did, `ProtocolError` if the answers are not zflake's.
    Raises `AuthError` and `LayoutError` (the endpoints belong to two clusters) at once, since no other try
    would go better.
    """
    budget = Budget(timeout_s, balancer.now() if ask is None else ask.began, balancer.now)
    runs: list[Run] = []
    ascent = Ascent()
    if ask is not None and isinstance(run, tuple):
        ascent.check(ask.endpoint, run, balancer.layout)
    missing = count
    reason: ZflakeError | None = None
    brokered = False
    while missing:
        if ask is None:
            if not budget.left_s():
                raise _spent(balancer, count, missing, budget, reason)
            endpoint = yield from _choose(balancer, budget, brokered=brokered)
            if not isinstance(endpoint, str):
                reason = endpoint or reason
                continue
            most_s = PROBE_S if balancer.is_probe(endpoint) and balancer.has_fit() else ATTEMPT_S
            began = balancer.now()
            ask = _ask_ids(balancer, endpoint, missing, began, min(most_s, budget.attempt_s()))
            run = _settle(balancer, ask, (yield ask), ascent)
        if isinstance(run, tuple):
            runs.append(run)
            missing -= run[2]
        elif run is None:
            # One worker that is out of reach may mean that all are.
            brokered = brokered or balancer.is_worker(ask.endpoint)
        else:
            reason = run
            if not balancer.has_fit():
                yield Pause(min(_wait_s(run), budget.left_s()))
        ask = None
    return runs


def fetch_layout(balancer: Balancer, timeout_s: float) -> Conversation[Layout]:
    """Learn the layout of the cluster's IDs within `timeout_s` seconds.

    Raises `Timeout` if no seed can tell, `ProtocolError` if the answers are not zflake's.
    """
    budget = Budget(timeout_s, balancer.now(), balancer.now)
    while balancer.layout is None:
        reason = yield from _refresh(balancer, budget)
        if balancer.layout is None:
            if isinstance(reason, ProtocolError):
                raise reason
            left_s = budget.left_s()
            if left_s <= 0:
                raise _spent(balancer, 0, 0, budget, reason)
            yield Pause(min(PAUSE_S, left_s))
    return balancer.layout


def _ask_ids(balancer: Balancer, endpoint: str, count: int, began: float, timeout_s: float) -> Ask:
    """Ask for up to `count` IDs of the balancer's cluster."""
    timeout_ms = int(timeout_s * 1000) or 1
    count = min(count, MAX_COUNT)
    store_id = balancer.store_id
    params = (count, timeout_ms) if store_id is None else (count, timeout_ms, store_id)
    return Ask(endpoint, "ids.next", params, timeout_s, began, balancer.key_of(endpoint))


def _settle(
    balancer: Balancer, ask: Ask, outcome: Outcome, ascent: Ascent | None = None
) -> Run | ZflakeError | None:
    """The run that came of an ask for IDs, or the error in its place; None if nothing came.

    The balancer learns how the endpoint fared.  Raises the errors that no other try would mend.
    """
    endpoint = ask.endpoint
    if outcome is None:
        balancer.failed(endpoint, ask.began)
        return None
    try:
        run = check_run(_result(outcome), ask.params[0])
        if ascent is not None:
            ascent.check(endpoint, run, balancer.layout)
    except ProtocolError as nonsense:
        # The endpoint is not what the directory takes it for: as good as away.
        balancer.failed(endpoint, ask.began)
        balancer.forget_services()
        return _of(endpoint, nonsense)
    except AuthError as denied:
        if endpoint in balancer.seeds:
            raise _of(endpoint, denied) from denied
        # Whether that holds, the delegator knows: the worker may have a new key, or not know of the client's yet.
        balancer.refused(endpoint, WAIT_S)
        return _of(endpoint, denied)
    except _PASSING as error:
        balancer.refused(endpoint, _wait_s(error))
        return error
    balancer.succeeded(endpoint)
    return run


def _wait_s(error: ZflakeError) -> float:
    """The seconds for which an endpoint that gave this error is left alone."""
    return min(error.retry_after or PAUSE_S, WAIT_S)


def _attempt_s(total_s: float) -> float:
    return min(ATTEMPT_S, total_s / ATTEMPTS)


def _choose(balancer: Balancer, budget: Budget, *, brokered: bool) -> Conversation[str | ZflakeError | None]:
    """The endpoint to ask for IDs; if there is none, the error that explains why, after a pause."""
    if (endpoint := balancer.pick(brokered=brokered)) is not None:
        return endpoint
    reason = yield from _refresh(balancer, budget)
    if (endpoint := balancer.pick(brokered=brokered) or balancer.last_resort()) is not None:
        return endpoint
    if isinstance(reason, ProtocolError):
        raise reason
    yield Pause(min(PAUSE_S, budget.left_s()))
    return reason


def _refresh(balancer: Balancer, budget: Budget) -> Conversation[ZflakeError | None]:
    """Have the directory read, once for all callers that need it; returns what stood in the way.

    Raises the errors that no other try would mend, in every caller.
    """
    refresh, is_ours = balancer.join_refresh(budget.deadline)
    if is_ours:
        try:
            refresh.error = yield from _read_directory(balancer, budget)
        except ZflakeError as error:
            refresh.error = error
            raise
        finally:
            balancer.end_refresh(refresh)
        return refresh.error
    yield Wait(refresh, budget.attempt_s())
    if refresh.error is None or isinstance(refresh.error, _PASSING):
        return refresh.error
    raise _copy(refresh.error, str(refresh.error))  # the traceback of each caller is its own


def _read_directory(balancer: Balancer, budget: Budget) -> Conversation[ZflakeError | None]:
    """Read the directory anew; returns what stood in the way of finding a worker."""
    workers: dict[str, str] = {}  # their keys, by address
    brokers: list[str] = []
    reason: ZflakeError | None = None
    answered = False
    asked = balancer.route == "broker"  # then the workers need not be known
    # A call that could be served must not wait long for a delegator that is away.
    most_s = REFRESH_WAIT_S if balancer.has_fit() else ATTEMPT_S
    for seed in balancer.seeds_by_health():
        began = balancer.now()
        try:
            if balancer.service_of(seed) is None or balancer.layout is None:
                hello = yield from _ask_seed(seed, Method.HELLO, most_s, budget)
                balancer.introduce(seed, check_hello(hello.error, hello.result))
            if balancer.service_of(seed) == "worker":
                workers.setdefault(seed, "")
            else:
                brokers.append(seed)
                if not asked:
                    began = balancer.now()
                    listed = yield from _ask_seed(seed, Method.CLUSTER_WORKERS, most_s, budget)
                    workers |= _addresses(listed)
                    asked = bool(workers)  # a delegator that has just started may know none yet
            answered = True
            balancer.succeeded(seed)
        except (*_PASSING, AuthError) as error:
            balancer.failed(seed, began)
            reason = reason if isinstance(error, Timeout) else _of(seed, error)
    balancer.check_one_cluster()
    if not answered:
        if isinstance(reason, AuthError):
            raise reason
        balancer.keep()
        return reason
    balancer.update(workers, brokers)
    wanted: Collection[str] = workers
    advice = "no worker is ready: start one, or wait for one to get its lease"
    if balancer.route == "broker":
        wanted = brokers
        advice = "the route broker needs a delegator's endpoint: name one, or use another route"
    return None if wanted else reason or Unavailable(advice)


def _ask_seed(seed: str, method: Method, most_s: float, budget: Budget) -> Conversation[Response]:
    """The answer of a seed that has `most_s` seconds at most; raises the error in its place."""
    outcome = yield Ask(seed, method, (), min(most_s, budget.attempt_s()))
    if isinstance(outcome, Response):
        return outcome
    raise outcome or Timeout("no answer")


def _addresses(listed: Response) -> dict[str, str]:
    """The keys of the workers that a directory lists, by address; empty ones in a cluster without keys."""
    try:
        workers = _result(listed)["workers"]
        return {parse_endpoint(w["address"]).text: text("key", w.get("key", "")) for w in workers}
    except (KeyError, TypeError, ConfigError) as error:
        raise ProtocolError(f"the directory that it sent can't be read: {error}") from error


def _result(outcome: Response | AuthError | ProtocolError) -> Any:
    """The result in an answer; raises the error that came in its place."""
    if isinstance(outcome, AuthError | ProtocolError):
        raise outcome
    if outcome.error is not None:
        raise exception_of(outcome.error)
    return outcome.result


def _of(endpoint: str, error: ZflakeError) -> ZflakeError:
    """The error, with the name of the endpoint if it is one of the endpoint's making."""
    return type(error)(f"{endpoint}: {error}") if isinstance(error, AuthError | ProtocolError) else error


def _copy(error: ZflakeError, message: str) -> ZflakeError:
    return type(error)(message, retry_after=error.retry_after)


def _spent(
    balancer: Balancer, count: int, missing: int, budget: Budget, reason: ZflakeError | None
) -> ZflakeError:
    seeds = ", ".join(balancer.seeds)
    if reason is not None and missing == count:
        return _copy(reason, f"{reason} (asked {seeds} for {budget.total_s:g} s)")
    got = f"{count - missing} of {count} IDs" if missing < count else "no answer"
    # A delegator may be fine although the workers that it lists are out of reach.
    silent = [endpoint for endpoint in balancer.silent() if endpoint not in balancer.seeds]
    asked = f"{', '.join(silent[:3])} (listed by {seeds})" if silent else seeds
    return Timeout(
        f"{got} from {asked} within {budget.total_s:g} s; check that it is running, or raise the timeout"
    )
