"""The family of stores that keep values under keys: memory, Redis and etcd.

Each guard of these stores stands here, once.  An engine gives what `KeyedStore` asks of it: reads of keys, a
range of keys in order, and one atomic commit of independent steps, each a few conditions with what is written
if they hold.  The keys, in the order of their parts:

    meta                      the `Meta`
    store                     the store's ID, which never changes
    machine MACHINE           a `Record`
    token TOKEN               the machine whose record has this token
    fence FENCE MACHINE       empty: the order of the fences
    span MACHINE START        a `Span`
    end END MACHINE START     empty: the order in which spans end, for pruning
    mark DELEGATOR            a `Mark`
    since                     the tick from which on the spans are complete
    filling                   a random text, while the store is filled for the first time
"""

from __future__ import annotations

import secrets
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from enum import Enum
from operator import attrgetter
from typing import Any, Final, NamedTuple, TypeAlias

from zflake.core.lease import Mark, Meta, Record, Span, Swap, Token, Traced
from zflake.errors import StoreError
from zflake.stores.contract import Contents, Store, batched, check_current, outdated, surplus, traced

Key: TypeAlias = tuple[str | int | Token, ...]
Thing: TypeAlias = Meta | Record | Span | Mark | int | str
Items: TypeAlias = Iterable[tuple[Key, Thing | None]]

META: Final[Key] = ("meta",)
STORE: Final[Key] = ("store",)
SINCE: Final[Key] = ("since",)
FILLING: Final[Key] = ("filling",)
CHUNK: Final = 100
"""Keys that a store writes at a time while it is filled, converted or pruned."""


class Found(Enum):
    """The conditions on a key that ask for no stamp."""

    NOTHING = 0
    ANYTHING = 1


Stamp: TypeAlias = int | str
"""The part of a value that a condition compares; it differs between any two values that a key ever has."""


class Step(NamedTuple):
    """A part of a commit: if the conditions hold, everything is written, else nothing."""

    conditions: Mapping[Key, Stamp | Found]
    writes: Mapping[Key, Thing | None]
    """Each key with its new value; None removes the key."""


class KeyedStore(Store):
    """A store whose engine compares and writes keys."""

    batch: int = 1 << 20
    """Steps that the engine can commit at once."""
    page: int = 256
    """Keys that a walk reads at a time."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        # This delegator's mark, as it was last written.
        self._own_mark: Mark | None = None

    # --- what an engine gives ---

    @abstractmethod
    def _get(self, keys: Sequence[Key]) -> list[Any]:
        """The value of each key; None if there is none.  In as few round trips as can be."""

    @abstractmethod
    def _keys(self, low: Key, high: Key, *, limit: int = 0, last: bool = False) -> list[Key]:
        """The keys from `low` to below `high`, ascending; with `last` no more than the last one.

        `limit` is the largest number of keys; 0 stands for all.
        """

    def _items(self, low: Key, high: Key) -> list[tuple[Key, Any]]:
        """The keys from `low` to below `high`, with their values."""
        keys = self._keys(low, high)
        return [(key, thing) for key, thing in zip(keys, self._get(keys), strict=True) if thing is not None]

    def _count(self, low: Key, high: Key) -> int:
        """The number of keys from `low` to below `high`."""
        return len(self._keys(low, high))

    @abstractmethod
    def _commit(self, first: Step, steps: Sequence[Step] = ()) -> list[bool] | None:
        """Write `first`, and each of `steps` whose conditions hold, in one atomic and durable commit.

        Gives for each of `steps` whether its conditions held; gives None and writes nothing if those of `first`
        did not hold.  The caller sees to it that no step compares or writes a key that another one writes.  If
        the store is not of meta's incarnation, the engine writes `first` alone.
        """

    # --- meta ---

    def meta(self) -> Meta | None:
        meta: Meta | None
        (meta,) = self._get([META])
        if meta is not None:
            check_current(self.url, meta.schema)
        return meta

    def swap_meta(self, old: Meta, new: Meta) -> bool:
        conditions: dict[Key, Stamp | Found] = {META: old.version, STORE: old.store_id}
        return self._commit(Step(conditions, {META: new})) is not None

    def initialise(self, meta: Meta, contents: Contents = Contents()) -> None:
        filling = secrets.token_hex(16)
        head: dict[Key, Thing | None] = {("mark", mark.delegator): mark for mark in contents.marks}
        head[SINCE] = contents.since
        end: dict[Key, Thing | None] = {META: meta, STORE: meta.store_id, FILLING: None}
        items = [item for record in contents.records for item in items_of(record)]
        items += [item for span in contents.spans for item in items_of_span(span)]
        left = [*self._keys(("end",), ("mark",)), *self._keys(("span",), ("token~",))]
        fresh: dict[Key, Stamp | Found] = {META: Found.NOTHING}
        if not items and not left:
            done = self._commit(Step(fresh, {**head, **end})) is not None
        else:
            # The meta comes last, since what is half filled is no store yet; first goes what a copy left behind
            # that was broken off.
            mine = {**fresh, FILLING: filling}
            done = (
                self._commit(Step(fresh, {**head, FILLING: filling})) is not None
                and self._fill(mine, [*((key, None) for key in left if key != FILLING), *items])
                and self._commit(Step(mine, end)) is not None
            )
        if not done:
            raise StoreError(f"{self.url} is initialised already, or another process has just begun to")

    def _fill(self, conditions: Mapping[Key, Stamp | Found], items: Items) -> bool:
        """Write all items in small pieces; stop and give False if the conditions do not hold any more."""
        return all(self._commit(Step(conditions, dict(some))) is not None for some in batched(items, CHUNK))

    def contents(self) -> Contents:
        records = [thing for _, thing in self._items(("machine",), ("machine~",))]
        spans = [thing for _, thing in self._items(("span",), ("span~",))]
        (since,) = self._get([SINCE])
        return Contents(records, spans, since or 0, self._marks())

    # --- records ---

    def by_machines(self, machines: Sequence[int]) -> list[Record]:
        records = self._get([("machine", machine) for machine in machines])
        return [record or Record(machine) for machine, record in zip(machines, records, strict=True)]

    def by_tokens(self, tokens: Sequence[Token]) -> list[Record | None]:
        machines = [
            machine for machine in self._get([("token", token) for token in tokens]) if machine is not None
        ]
        found = {record.token: record for record in self.by_machines(machines)} if machines else {}
        return [found.get(token) for token in tokens]

    def _unused(self, first: int, last: int, limit: int) -> list[int]:
        unused: list[int] = []
        while len(unused) < limit and first <= last:
            stop = min(first + self.page, last + 1)
            used = {key[1] for key in self._keys(("machine", first), ("machine", stop))}
            unused += [machine for machine in range(first, stop) if machine not in used]
            first = stop
        return unused[:limit]

    def _lowest_used(self, first: int, last: int, limit: int) -> list[Record]:
        records: list[Record] = []
        at: Key = ("fence",)
        while len(records) < limit:
            keys = self._keys(at, ("fence~",), limit=self.page)
            machines: list[Any] = [key[2] for key in keys if first <= key[2] <= last]  # type: ignore[operator]
            records += self.by_machines(machines[: limit - len(records)])
            if len(keys) < self.page:
                break
            at = (*keys[-1], 0)
        return sorted(records, key=lambda record: (record.fence, record.machine))

    def held(self, now: int) -> Sequence[Record]:
        machines: list[Any] = sorted(key[2] for key in self._keys(("fence", now + 1), ("fence~",)))
        return [r for r in self.by_machines(machines) if r.token is not None and r.fence > now]

    def swap(self, swaps: Sequence[Swap], mark: Mark | None = None) -> list[bool]:
        outcomes: list[bool] = []
        while True:
            steps = self._independent(swaps[len(outcomes) :])
            first, later = self._first(mark)
            self._own_mark = None  # if the commit fails, it is unknown
            tried = self._commit(first, steps) if steps or mark else []
            if tried is None:
                # The mark is not what it was.  Either this delegator's last write is lost, or it came late.
                return outcomes + [False] * (len(swaps) - len(outcomes))
            self._own_mark = later
            outcomes += tried
            if len(outcomes) == len(swaps):
                return outcomes

    def _first(self, mark: Mark | None) -> tuple[Step, Mark | None]:
        """The first step of a commit, and the mark that it writes.

        The step requires that the store holds this delegator's mark as it was last written, and never moves it
        back.  A store that has gone back to an earlier state holds an earlier mark, so the commit fails.
        """
        if mark is None:
            return Step({}, {}), None
        key: Key = ("mark", mark.delegator)
        own = self._own_mark
        if own is None or own.delegator != mark.delegator:
            (own,) = self._get([key])
        later = mark if own is None else max(mark, own, key=attrgetter("timeline_us"))
        return Step(
            {META: Found.ANYTHING, key: Found.NOTHING if own is None else own.timeline_us}, {key: later}
        ), later

    def _independent(self, swaps: Sequence[Swap]) -> list[Step]:
        """The steps of as many of the swaps, from the first on, as do not depend on each other."""
        steps: list[Step] = []
        written: set[Key] = set()
        for swap in swaps[: self.batch]:
            # No machine twice: the spans that a release cuts are read here.
            if not written.isdisjoint([("machine", swap.new.machine), ("token", swap.new.token or b"")]):
                break
            steps.append(step := self._step(swap))
            written.update(step.writes)
        return steps

    def _step(self, swap: Swap) -> Step:
        old, new = swap.old, swap.new
        machine = new.machine
        conditions: dict[Key, Stamp | Found] = {
            META: swap.version,
            ("machine", machine): old.gen or Found.NOTHING,
        }
        # A key that stays is written after it was to go.
        writes: dict[Key, Thing | None] = dict.fromkeys(key for key, _ in items_of(old)) if old.gen else {}
        writes.update(items_of(new))
        if new.token is None:
            writes.update(self._cut(old, new.fence if swap.cut is None else swap.cut))
        else:
            conditions["token", new.token] = Found.NOTHING
            if old.gen and old.span_start == new.span_start:
                writes["end", old.fence, machine, old.span_start] = None
            writes.update(items_of_span(Span(machine, new.span_start, new.fence, new.holder)))
        return Step(conditions, writes)

    def _cut(self, old: Record, at: int) -> dict[Key, Thing | None]:
        """The writes after which no span of a machine reaches above a tick."""
        spans = [Span(old.machine, old.span_start, old.fence, old.holder)]
        if at < old.span_start:  # else those before end below
            spans = self._spans(old.machine)
        writes: dict[Key, Thing | None] = {}
        for span in spans:
            if span.end > at:
                writes |= dict.fromkeys(key for key, _ in items_of_span(span))
                if span.start < at:
                    writes.update(items_of_span(replace(span, end=at)))
        return writes

    def _spans(self, machine: int) -> list[Span]:
        """The spans of a machine, oldest first."""
        return [span for _, span in self._items(("span", machine), ("span", machine + 1))]

    # --- marks ---

    def marks(self) -> Sequence[Mark]:
        return self._marks()

    def _marks(self) -> list[Mark]:
        return [thing for _, thing in self._items(("mark",), ("mark~",))]

    def forget_marks(self, before_us: int) -> None:
        gone: list[Key] = [("mark", mark.delegator) for mark in self._marks() if mark.timeline_us < before_us]
        self._own_mark = None
        if gone:
            self._commit(Step({}, dict.fromkeys(gone)))

    def set_marks(self, timeline_us: int) -> None:
        marks = [replace(mark, timeline_us=timeline_us) for mark in self._marks()]
        self._own_mark = None
        if marks:
            self._commit(Step({}, {("mark", mark.delegator): mark for mark in marks}))

    # --- provenance ---

    def trace(self, machine: int, tick: int) -> Traced:
        below = self._keys(("span", machine), ("span", machine, tick + 1), last=True)
        since, *spans = self._get([SINCE, *below])
        return traced(spans[0] if spans else None, tick, since or 0)

    def prune(self, before: int, keep: int, limit: int) -> int:
        oldest: list[Any] = self._keys(("end",), ("end~",), limit=limit)
        forgotten = oldest[
            : outdated([key[1] for key in oldest], self._count(("end",), ("end~",)), before, keep)
        ]
        return self._forget(forgotten)

    def thin(self, machines: Iterable[int], keep: int) -> None:
        forgotten = [span for machine in machines for span in surplus(self._spans(machine), keep)]
        self._forget(sorted(("end", span.end, span.machine, span.start) for span in forgotten))

    def _forget(self, ends: Sequence[Any]) -> int:
        """Forget the spans with these keys of their ends, ascending; gives how many there were still."""
        pruned = 0
        for some in batched(ends, min(CHUNK // 2, self.batch)):
            (since,) = self._get([SINCE])
            later = Step(
                {SINCE: Found.NOTHING if since is None else since}, {SINCE: max(since or 0, some[-1][1])}
            )
            # A span that was renewed since ends elsewhere, and stays.
            steps = [Step({key: Found.ANYTHING}, {key: None, ("span", *key[2:]): None}) for key in some]
            pruned += sum(self._commit(later, steps) or ())
        return pruned


def items_of(record: Record) -> list[tuple[Key, Thing]]:
    """All keys of a record's own, with their values."""
    items: list[tuple[Key, Thing]] = [
        (("machine", record.machine), record),
        (("fence", record.fence, record.machine), ""),
    ]
    if record.token is not None:
        items.append((("token", record.token), record.machine))
    return items


def items_of_span(span: Span) -> list[tuple[Key, Thing]]:
    """All keys of a span, with their values."""
    return [
        (("span", span.machine, span.start), span),
        (("end", span.end, span.machine, span.start), ""),
    ]
