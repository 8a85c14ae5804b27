"""The balancer: which endpoints a client knows, and how each of them fares.

A client stays with one worker, whose IDs ascend, until that worker fails or the directory is read again.  The
balancer ejects an endpoint that does not answer, for longer with each failure, and then lets one request
probe it.  One caller at a time reads the directory; other callers use what is known, or wait for the reader.

Times are seconds of one monotonic clock.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

from zflake.core.layout import Layout
from zflake.errors import LayoutError, ZflakeError
from zflake.wire.cluster import Hello

ROUTES: Final = ("auto", "direct", "broker")
REFRESH_S: Final = 10.0
"""Seconds after which a client reads the directory again although its calls succeed."""
EJECT_S: Final = 0.5
"""Seconds of a first ejection, on average; each further failure doubles them."""
EJECT_MAX_S: Final = 10.0
"""Seconds of the longest ejection, on average."""
PROBE_S: Final = 0.3
"""Seconds that an endpoint which failed before has for an answer."""
_MAX_FAILURES: Final = 10


@dataclass(slots=True)
class _Health:
    failures: int = 0
    ejected_until: float = float("-inf")
    settled_at: float = float("-inf")
    """When the endpoint last answered or was ejected; `failed` says which asks that began earlier still count."""


@dataclass(slots=True, eq=False)
class Refresh:
    """One caller's reading of the directory; other callers may wait until it is over."""

    caller: object
    until: float
    """When the caller's budget is spent: if the caller has not ended by then, another one takes its place."""
    error: ZflakeError | None = None
    """The error that the read met, or None; the callers that wait take it too."""
    is_over: bool = False
    wakes: list[Callable[[], object]] = field(default_factory=list)


class Balancer:
    """The endpoints that a client knows, shared by all its callers.

    The application gave `seeds`.  With the route `direct` the client asks only workers for IDs; with `broker`
    it asks only delegators, which pass a request on; with `auto` it asks workers, and delegators when no
    worker answers.  `now` is the monotonic clock, `draw` gives a number in [0, 1), and `caller` identifies
    the thread or task that calls: a signal handler must not wait for the very thread that it interrupted.
    """

    def __init__(
        self,
        seeds: Iterable[str],
        route: str,
        *,
        now: Callable[[], float],
        draw: Callable[[], float],
        caller: Callable[[], object],
    ) -> None:
        self.seeds = tuple(seeds)
        self.route = route
        self.layout: Layout | None = None
        self.store_id: str | None = None
        self.now = now
        self._draw = draw
        self._caller = caller
        self._services: dict[str, str] = {}
        self._stores: dict[str, str] = {}  # the store that each seed named; a seed that fails is dropped
        self._workers: list[str] = []
        self._keys: Mapping[str, str] = {}
        self._brokers: list[str] = []
        self._sticky: str | None = None
        self._health: defaultdict[str, _Health] = defaultdict(_Health)
        self._refreshed_at = float("-inf")
        self.after_fork()

    def after_fork(self) -> None:
        """Drop the lock and the refresh, which may belong to a thread that a forked child does not have."""
        # Guards everything from _services on.  A signal handler may come in, so it is an RLock.
        self._lock = threading.RLock()
        self._refresh: Refresh | None = None

    # --- choosing an endpoint ---

    def sticky(self, now: float) -> str | None:
        """The endpoint that calls stay with; None if there is none, or if the directory is old."""
        # No lock: two reads, either of which may be outdated as soon as it is done.
        return self._sticky if now < self._refreshed_at + REFRESH_S else None

    def pick(self, *, brokered: bool = False) -> str | None:
        """The endpoint to ask for IDs next; None if the directory should be read first.

        With `brokered` a delegator goes before a worker, if the route leaves the choice.
        """
        with self._lock:
            now = self.now()
            is_old = now >= self._refreshed_at + REFRESH_S and not self._is_refreshing(now)
            if is_old and any(self._is_fit(seed, now) for seed in self.seeds):
                return None
            if self._sticky is not None:
                return self._sticky
            for tier in reversed(self._tiers()) if brokered else self._tiers():
                if fit := [endpoint for endpoint in tier if self._is_fit(endpoint, now)]:
                    picked = fit[int(self._draw() * len(fit))]
                    health = self._health[picked]
                    if health.failures:
                        health.ejected_until = now + PROBE_S  # half open: one probe at a time
                    return picked
            return None

    def last_resort(self) -> str | None:
        """The endpoint whose ejection ends first; None if none is known."""
        with self._lock:
            known = [endpoint for tier in self._tiers() for endpoint in tier]
            return min(known, key=lambda endpoint: self._health[endpoint].ejected_until, default=None)

    def is_probe(self, endpoint: str) -> bool:
        """Whether this endpoint failed when it was last asked."""
        return self._health[endpoint].failures > 0

    def is_worker(self, endpoint: str) -> bool:
        """Whether the directory lists this endpoint as a worker."""
        return endpoint in self._workers

    def key_of(self, endpoint: str) -> str:
        """The key of a worker that the directory lists; empty for other endpoints, and in a cluster without keys."""
        return self._keys.get(endpoint, "")

    def has_fit(self) -> bool:
        """Whether an endpoint that could give IDs is not ejected."""
        with self._lock:
            now = self.now()
            return any(self._is_fit(endpoint, now) for tier in self._tiers() for endpoint in tier)

    def silent(self) -> list[str]:
        """The endpoints that could give IDs and did not answer when last asked."""
        with self._lock:
            return [e for tier in self._tiers() for e in tier if self._health[e].failures]

    # --- how endpoints fare ---

    def succeeded(self, endpoint: str) -> None:
        """Note an answer: calls stay with this endpoint if it is of the kind that the route prefers."""
        if endpoint == self._sticky:
            self._health[endpoint].settled_at = self.now()  # no lock: it is every call's
            return
        with self._lock:
            self._health[endpoint] = _Health(settled_at=self.now())
            if self._sticky is None and endpoint in self._tiers()[0]:
                self._sticky = endpoint

    def refused(self, endpoint: str, for_s: float) -> None:
        """Note an answer without IDs: leave this endpoint alone for `for_s` seconds."""
        with self._lock:
            self._eject(endpoint, for_s)

    def failed(self, endpoint: str, began: float) -> None:
        """Eject an endpoint that gave no sound answer to an ask, for longer with each failure.

        `began` is when the ask began.  Of many asks that were under way when an endpoint died only the first
        to fail counts; and none counts if the endpoint answered another one in the latter half of its time.
        """
        with self._lock:
            health, now = self._health[endpoint], self.now()
            is_ejected = health.ejected_until > health.settled_at
            if began < health.settled_at and (is_ejected or began + now < 2 * health.settled_at):
                return
            self._eject(endpoint, min(EJECT_MAX_S, EJECT_S * 2**health.failures) * (0.5 + self._draw()))
            health.failures = min(health.failures + 1, _MAX_FAILURES)
            # The next daemon to serve there may be another one.
            self._services.pop(endpoint, None)
            self._stores.pop(endpoint, None)

    # --- the directory ---

    def join_refresh(self, until: float) -> tuple[Refresh, bool]:
        """The refresh that is to be waited for, and False; or a new one, and True if the caller is to do it.

        The caller ends a new one by `end_refresh`, whatever happens, and before `until`.
        """
        with self._lock:
            caller, refresh = self._caller(), self._refresh
            if refresh is not None and self._is_refreshing(self.now()) and refresh.caller != caller:
                return refresh, False
            self._refresh = refresh = Refresh(caller, until)
            return refresh, True

    def end_refresh(self, refresh: Refresh) -> None:
        """Make room for the next refresh, and wake the callers that wait for this one."""
        with self._lock:
            refresh.is_over = True
            if self._refresh is refresh:
                self._refresh = None
            wakes, refresh.wakes = refresh.wakes, []
        for wake in wakes:
            wake()

    def when_over(self, refresh: Refresh, wake: Callable[[], object]) -> None:
        """Call `wake` once this refresh is over, from the thread that ends it; at once if it is over."""
        with self._lock:
            if not refresh.is_over:
                refresh.wakes.append(wake)
                return
        wake()

    def seeds_by_health(self) -> list[str]:
        """The seeds: the ones that are not ejected first, equals in random order."""
        with self._lock:
            now = self.now()
            rank = {s: (max(0.0, self._health[s].ejected_until - now), self._draw()) for s in self.seeds}
            return sorted(self.seeds, key=rank.__getitem__)

    def service_of(self, endpoint: str) -> str | None:
        """The service that an endpoint named in its hello: `delegator` or `worker`; None before it did."""
        return self._services.get(endpoint)

    def introduce(self, endpoint: str, hello: Hello) -> None:
        """Note what an endpoint's hello says.

        Raises `LayoutError` if its layout is not that of the endpoints before it.
        """
        with self._lock:
            layout, store_id = hello.layout, hello.store_id
            if layout is not None and self.layout is not None and not layout.same_ids(self.layout):
                raise LayoutError(
                    f"these endpoints belong to two clusters: {endpoint} has layout {layout}, epoch "
                    f"{layout.epoch.isoformat()}; an endpoint before it had {self.layout}, epoch "
                    f"{self.layout.epoch.isoformat()}; name endpoints of one cluster only"
                )
            if store_id is not None:
                self._stores[endpoint] = store_id
            self.layout = layout or self.layout
            self._services[endpoint] = hello.service

    def forget_services(self) -> None:
        """Have every seed say hello again: an endpoint spoke of another cluster, or nonsense."""
        with self._lock:
            self._services.clear()

    def check_one_cluster(self) -> None:
        """Check that all seeds that named a store named the same one.

        A cluster whose store was lost goes on with another one; the client follows once no seed names the
        old one.  Raises `LayoutError` if the seeds name several: IDs of two clusters are not unique together.
        """
        with self._lock:
            stores = set(self._stores.values())
            if len(stores) > 1:
                named = " and ".join(sorted(self._stores))
                raise LayoutError(
                    f"{named} belong to two clusters, whose IDs are not unique together; "
                    "name endpoints of one cluster only"
                )
            if stores and self.store_id not in stores:
                self._workers, self._brokers, self._sticky = [], [], None
                (self.store_id,) = stores

    def update(self, workers: Mapping[str, str], brokers: list[str]) -> None:
        """Take in a directory that was just read: the workers' keys by address, and the delegators.

        An empty one leaves the known workers: a delegator that has just started knows none yet.
        """
        with self._lock:
            self._workers = list(workers) or self._workers
            self._keys = workers or self._keys
            self._brokers = brokers
            self._refreshed_at = self.now()
            self._sticky = None
            known = {*self._workers, *self.seeds}
            for endpoint in self._health.keys() - known:
                del self._health[endpoint]

    def keep(self) -> None:
        """Go on with the directory as it is: no seed could be asked for a newer one."""
        with self._lock:
            self._refreshed_at = self.now()

    def _tiers(self) -> list[list[str]]:
        """The endpoints that the route allows to be asked for IDs, the preferred kind first."""
        if self.route == "broker":
            return [self._brokers]
        return [self._workers] if self.route == "direct" else [self._workers, self._brokers]

    def _is_fit(self, endpoint: str, now: float) -> bool:
        return self._health[endpoint].ejected_until <= now

    def _is_refreshing(self, now: float) -> bool:
        return self._refresh is not None and now < self._refresh.until

    def _eject(self, endpoint: str, for_s: float) -> None:
        health, now = self._health[endpoint], self.now()
        health.settled_at, health.ejected_until = now, now + for_s
        if self._sticky == endpoint:
            self._sticky = None
