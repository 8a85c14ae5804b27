"""The balancer: which endpoints a client knows, and how they fare.

A client stays with one worker, whose IDs ascend, until that fails or the directory is read again.  An
endpoint that does not answer is passed over for a while, longer with each failure, and then probed by one
request.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final

from zflake.core.layout import Layout
from zflake.errors import LayoutError
from zflake.wire.cluster import Hello

ROUTES: Final = ("auto", "direct", "broker")
REFRESH_S: Final = 10.0
"""How old the directory may get while calls succeed."""
EJECT_S: Final = 0.5
EJECT_MAX_S: Final = 10.0
PROBE_S: Final = 0.3
"""How long an endpoint that failed before has for an answer."""


@dataclass(slots=True)
class _Health:
    """How an endpoint fares."""

    failures: int = 0
    passed_over_until: float = 0.0


class Balancer:
    """The endpoints that a client knows, shared by its threads.

    `seeds` were given by the application.  By the route `direct` only workers are asked for IDs, by
    `broker` only delegators, which pass a request on; by `auto` workers, and delegators where no worker
    answers.  `now` is a monotonic clock in seconds, `draw` gives a number in [0, 1).
    """

    def __init__(
        self, seeds: Iterable[str], route: str, *, now: Callable[[], float], draw: Callable[[], float]
    ) -> None:
        self.seeds = tuple(seeds)
        self.route = route
        self.layout: Layout | None = None
        self.store_id: str | None = None
        self._now = now
        self._draw = draw
        self._services: dict[str, str] = {}
        self._stores: dict[str, str] = {}  # of which store each seed spoke that has not failed since
        self._workers: list[str] = []
        self._brokers: list[str] = []
        self._favourite: str | None = None
        self._health: dict[str, _Health] = {}
        self._refreshed_at = float("-inf")
        self.unlock()

    def unlock(self) -> None:
        """Begin with a fresh lock: in the child of a fork the old one may be held by nobody."""
        # Guards everything from _services to _refreshed_at.  A signal handler may come in, so it is an RLock.
        self._lock = threading.RLock()

    def favourite(self, now: float) -> str | None:
        """The endpoint that answered last; None where that is not so, or the directory has aged by `now`."""
        # No lock: two reads, of which either may be outdated as soon as they are done.
        return self._favourite if now < self._refreshed_at + REFRESH_S else None

    def pick(self, *, brokered: bool = False) -> str | None:
        """Whom to ask for IDs next; None where the directory should be read first.

        With `brokered` a delegator rather than a worker, where the route leaves the choice.
        """
        with self._lock:
            now = self._now()
            if now - self._refreshed_at >= REFRESH_S and any(self._is_fit(seed, now) for seed in self.seeds):
                return None
            if self._favourite is not None:
                return self._favourite
            for tier in reversed(self._tiers()) if brokered else self._tiers():
                if fit := [endpoint for endpoint in tier if self._is_fit(endpoint, now)]:
                    picked = fit[int(self._draw() * len(fit))]
                    health = self._health_of(picked)
                    if health.failures:
                        health.passed_over_until = now + PROBE_S  # half open: one probe at a time
                    return picked
            return None

    def is_probe(self, endpoint: str) -> bool:
        """Whether this endpoint failed when it was last asked."""
        return self._health_of(endpoint).failures > 0

    def is_worker(self, endpoint: str) -> bool:
        """Whether this endpoint is in the directory of workers."""
        return endpoint in self._workers

    def has_fit(self) -> bool:
        """Whether somebody is known to ask for IDs who is not passed over."""
        with self._lock:
            now = self._now()
            return any(self._is_fit(endpoint, now) for tier in self._tiers() for endpoint in tier)

    def silent(self) -> list[str]:
        """Who is known to ask for IDs and did not answer when last asked."""
        with self._lock:
            return [e for tier in self._tiers() for e in tier if self._health_of(e).failures]

    def last_resort(self) -> str | None:
        """Who has been passed over for longest; None where nobody is known."""
        with self._lock:
            everybody = [endpoint for tier in self._tiers() for endpoint in tier]
            return min(everybody, key=lambda e: self._health_of(e).passed_over_until, default=None)

    def succeeded(self, endpoint: str) -> None:
        """Note an answer: stay with this endpoint, if it is of the kind that the route prefers."""
        if endpoint == self._favourite:
            return
        with self._lock:
            self._health[endpoint] = _Health()
            if self._favourite is None and endpoint in self._tiers()[0]:
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
                # Whoever serves there next may be another.
                self._services.pop(endpoint, None)
                self._stores.pop(endpoint, None)
            health.passed_over_until = self._now() + for_s

    def doubt(self) -> None:
        """Have every seed say anew who it is: somebody spoke of another cluster, or nonsense."""
        with self._lock:
            self._services.clear()

    def service_of(self, endpoint: str) -> str | None:
        """What an endpoint has said it is: `delegator` or `worker`."""
        return self._services.get(endpoint)

    def introduce(self, endpoint: str, hello: Hello) -> None:
        """Note what an endpoint says it is.

        Raises `LayoutError` where its layout is another one than that of those before it.
        """
        with self._lock:
            layout, store_id = hello.layout, hello.store_id
            if layout is not None and self.layout is not None and not layout.same_ids(self.layout):
                raise LayoutError(
                    f"{endpoint} has layout {layout}, epoch {layout.epoch.isoformat()}; an endpoint before it had "
                    f"{self.layout}, epoch {self.layout.epoch.isoformat()}: they belong to two clusters"
                )
            if store_id is not None:
                self._stores[endpoint] = store_id
            self.layout = layout or self.layout
            self._services[endpoint] = hello.service

    def agree(self) -> None:
        """See to it that all seeds that said so belong to one cluster.

        One whose store was lost goes on with another: that is taken where no seed speaks of the old one.

        Raises `LayoutError` where they belong to several: IDs of two clusters are not unique together.
        """
        with self._lock:
            stores = set(self._stores.values())
            if len(stores) > 1:
                named = " and ".join(sorted(self._stores))
                raise LayoutError(f"{named} belong to two clusters, whose IDs are not unique together")
            if stores and self.store_id not in stores:
                self._workers, self._brokers, self._favourite = [], [], None
                (self.store_id,) = stores

    def refresh(self, workers: list[str], brokers: list[str]) -> None:
        """Take in a directory that was just read.

        An empty one does not wipe out what is known: a delegator that has just started knows nobody yet.
        """
        with self._lock:
            self._workers = workers or self._workers
            self._brokers = brokers
            self._refreshed_at = self._now()
            self._favourite = None
            known = {*self._workers, *self.seeds}
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

    def _tiers(self) -> list[list[str]]:
        """Whom the route allows to ask for IDs, the preferred kind first."""
        match self.route:
            case "direct":
                return [self._workers]
            case "broker":
                return [self._brokers]
            case _:
                return [self._workers, self._brokers]

    def _is_fit(self, endpoint: str, now: float) -> bool:
        return self._health_of(endpoint).passed_over_until <= now

    def _health_of(self, endpoint: str) -> _Health:
        return self._health.setdefault(endpoint, _Health())
