"""The contract of every store: its calls, and its promises.

- `swap` is atomic and durable: when it says True, the record survives any crash of this process and, but
  for `memory:`, of this machine.
- Every read sees every swap that was answered before.
- A machine ID that was never used reads as `Record(machine)`, all zeros.
- Every failure is a `StoreError`.  A swap that failed so is *unknown*: it may have happened or may still
  happen; the caller reads again.

A store is used by one thread at a time.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import ClassVar, TypeVar

from zflake.core.lease import OLDEST, SCHEMA, Mark, Meta, Record, Span, Swap, Token, Traced
from zflake.errors import LayoutError, StoreError

T = TypeVar("T")


def check_schema(url: str, schema: int, reader: int, advice: str) -> None:
    """Raise `StoreError` for a store that this zflake can't read; `advice` is what to do about one too old."""
    if reader > SCHEMA:
        raise StoreError(
            f"{url} has schema {schema}, which asks for a zflake that knows schema {reader}; this one knows"
            f" {SCHEMA}: upgrade zflake"
        )
    if schema < OLDEST:
        raise StoreError(f"{url} has schema {schema}, which is older than the first release: {advice}")


def check_current(url: str, schema: int) -> None:
    """Raise `StoreError` for a store that must be brought to this schema first."""
    if schema < SCHEMA:
        raise StoreError(
            f"{url} has schema {schema}, of an older zflake: stop the older delegators and start one of this"
            f" version on it, which brings it to schema {SCHEMA}"
        )


def outdated(ends: Sequence[int], count: int, before: int, keep: int) -> int:
    """How many of the spans that end first to forget; `ends` are their ends, ascending.

    These are the ones that ended by `before`, and those of all `count` that are too many to `keep`.
    """
    return max(bisect_right(ends, before), min(len(ends), count - keep))


def surplus(spans: Sequence[Span], keep: int) -> list[Span]:
    """Which spans of a machine, given oldest first, to forget so that `keep` are left, 1 or more.

    The newest half of these stays, and of the others the longest.  So it takes tenancies as long to push one out of the
    record: a stranger that acquires and releases without end pushes its own out.
    """
    older = spans[: -max(1, keep // 2)]
    return sorted(older, key=lambda span: span.end - span.start)[: max(0, len(spans) - keep)]


def traced(latest: Span | None, tick: int, since: int) -> Traced:
    """The answer about a tick; `latest` is the last span of its machine that begins at the tick or before."""
    return Traced(latest if latest is not None and tick < latest.end else None, since)


def batched(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """The items, in lists of `size`; the last list may be shorter."""
    rest = iter(items)
    while batch := list(islice(rest, size)):
        yield batch


@dataclass(frozen=True, slots=True)
class Contents:
    """All that a store holds, beside its meta."""

    records: Sequence[Record] = ()
    """One for each machine ID that was ever used."""
    spans: Sequence[Span] = ()
    since: int = 0
    """The tick from which on the spans are complete."""
    marks: Sequence[Mark] = ()


class Store(ABC):
    """Records by machine ID and by token, and one `Meta` for the whole."""

    advice: ClassVar[str] = "name another"
    """The operator is told to do this about a place that holds something else than a store."""
    exclusive: bool = True
    """Whether no other process can use it meanwhile."""
    half_filled: bool = False
    """Whether a copy into this store was broken off: it has no meta, and what it has is not all."""
    had_data: bool = False
    """Whether something beside the data shows that there was a store here before."""

    def __init__(self, url: str) -> None:
        """`url` names the store to people."""
        self.url = url
        # For the first machine of each range: the first one that may be unused.
        self._unused_from: dict[int, int] = {}

    def _foreign(self) -> StoreError:
        """The error for a place that holds what zflake does not write."""
        return StoreError(
            f"{self.url} holds something that is not zflake's; nothing was changed: {self.advice}"
        )

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        """Raise `_foreign` if what was read can't be understood."""
        try:
            yield
        except (KeyError, IndexError, TypeError, ValueError, LayoutError) as error:
            raise self._foreign() from error

    @abstractmethod
    def meta(self) -> Meta | None:
        """The meta of the whole store; None if the store was never initialised."""

    @abstractmethod
    def incarnation(self, meta: Meta | None = None) -> str:
        """Name this life of the data.

        If it is not meta's, the store may have lost what it promised: it is new, or older than it was.
        It stays the same until a `swap_meta` or `initialise` has written it into meta.

        `meta` is what `meta()` has just given; with it some engines need not read it again.
        """

    @abstractmethod
    def initialise(self, meta: Meta, contents: Contents = Contents()) -> None:
        """Make this store's first meta, and fill it; `StoreError` if it has one."""

    @abstractmethod
    def contents(self) -> Contents:
        """All that the store holds, to be read before anything is written."""

    @abstractmethod
    def swap_meta(self, old: Meta, new: Meta) -> bool:
        """Put `new` in place of the meta that has the `store_id` and the `version` of `old`.

        False if there is no such meta; then nothing is written.
        """

    @abstractmethod
    def by_machines(self, machines: Sequence[int]) -> list[Record]:
        """The record of each of these machine IDs, in as few round trips as possible."""

    @abstractmethod
    def by_tokens(self, tokens: Sequence[Token]) -> list[Record | None]:
        """The record with each of these tokens; None for a token of no record."""

    def by_machine(self, machine: int) -> Record:
        """The record of one machine ID."""
        return self.by_machines([machine])[0]

    def by_token(self, token: Token) -> Record | None:
        """The record with this token."""
        return self.by_tokens([token])[0]

    def lowest(self, first: int, last: int, limit: int) -> Sequence[Record]:
        """Up to `limit` records of the machines `first` to `last` with the lowest fences, ascending.

        Never-used machines have the lowest of all.  The time this takes must not grow with the number of
        machines.
        """
        begin = self._unused_from.get(first, first)
        unused = self._unused(begin, last, limit)
        if limit > 0:
            self._unused_from[first] = unused[0] if unused else max(begin, last + 1)
        return [*map(Record, unused), *self._lowest_used(first, last, limit - len(unused))]

    def look_anew(self) -> None:
        """Have `lowest` look again at machines that it has seen used: a store that was rolled back knows less."""
        self._unused_from.clear()

    @abstractmethod
    def _unused(self, first: int, last: int, limit: int) -> list[int]:
        """Up to `limit` of the machines `first` to `last` that were never used, ascending."""

    @abstractmethod
    def _lowest_used(self, first: int, last: int, limit: int) -> Sequence[Record]:
        """As `lowest`, of the machines that were used."""

    @abstractmethod
    def held(self, now: int) -> Sequence[Record]:
        """The records of leases that are held: with a token, and a fence above tick `now`; by machine ID."""

    @abstractmethod
    def marks(self) -> Sequence[Mark]:
        """Every delegator's mark."""

    @abstractmethod
    def forget_marks(self, before_us: int) -> None:
        """Forget the marks below `before_us`."""

    @abstractmethod
    def set_marks(self, timeline_us: int) -> None:
        """Set every delegator's mark to `timeline_us`, in one commit."""

    @abstractmethod
    def swap(self, swaps: Sequence[Swap], mark: Mark | None = None) -> list[bool]:
        """Try all swaps in one commit, each for itself, in order; write the delegator's `mark` with them.

        If there is no meta (any more), nothing is written at all.

        The span `[span_start, fence)` of a record with a token is put in place of one with the same start;
        if the record has none, the machine's spans are cut at the swap's `cut`.

        True for each that found its record at the gen of `old` and meta at its version, and is durable now.
        If the store can change its incarnation while it is used, meta must be of the present one.  False for
        each that lost the race, or whose token a record holds already; that one wrote nothing.
        """

    @abstractmethod
    def trace(self, machine: int, tick: int) -> Traced:
        """The holder to which a tick of a machine ID was granted."""

    @abstractmethod
    def prune(self, before: int, keep: int, limit: int) -> int:
        """Forget the spans that ended by tick `before`, and the oldest of those above the number `keep`.

        At most `limit` at a time, oldest first.  Gives how many were forgotten; `Traced.since` is at or above
        the end of each.
        """

    @abstractmethod
    def thin(self, machines: Iterable[int], keep: int) -> None:
        """Forget the `surplus` spans of these machines; `Traced.since` is at or above the end of each."""

    @abstractmethod
    def close(self) -> None:
        """Let go of the store; what was swapped stays.  Closing it again does nothing."""
