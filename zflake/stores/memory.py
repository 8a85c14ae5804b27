"""The store that forgets: the reference for the others' tests, and for demonstrations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from heapq import nsmallest

from zflake.core.lease import Mark, Meta, Record, Span, Swap, Token, Traced
from zflake.errors import StoreError
from zflake.stores.contract import Contents, Store


class MemoryStore(Store):
    """Records in a dict; everything is lost with the process."""

    url = "memory:"

    def __init__(self) -> None:
        self._meta: Meta | None = None
        self._records: dict[int, Record] = {}
        self._tokens: dict[Token, int] = {}
        self._marks: dict[str, Mark] = {}
        self._spans: dict[tuple[int, int], Span] = {}  # by machine and start
        self._since = 0

    def meta(self) -> Meta | None:
        return self._meta

    def incarnation(self) -> str:
        return ""  # it has one life

    def initialise(self, meta: Meta, contents: Contents = Contents()) -> None:
        if self._meta is not None:
            raise StoreError("this store is initialised already")
        self._meta = meta
        self._records = {record.machine: record for record in contents.records}
        self._tokens = {r.token: machine for machine, r in self._records.items() if r.token is not None}
        self._spans = {(span.machine, span.start): span for span in contents.spans}
        self._since = contents.since
        self._marks = {mark.delegator: mark for mark in contents.marks}

    def contents(self) -> Contents:
        spans = [span for _, span in sorted(self._spans.items())]
        return Contents([r for _, r in sorted(self._records.items())], spans, self._since, self.marks())

    def swap_meta(self, old: Meta, new: Meta) -> bool:
        now = self._meta
        if now is None or (now.store_id, now.version) != (old.store_id, old.version):
            return False
        self._meta = new
        return True

    def by_machines(self, machines: Sequence[int]) -> list[Record]:
        return [self._records.get(machine) or Record(machine) for machine in machines]

    def by_tokens(self, tokens: Sequence[Token]) -> list[Record | None]:
        machines = map(self._tokens.get, tokens)
        return [None if machine is None else self._records[machine] for machine in machines]

    def lowest(self, first: int, last: int, limit: int) -> Sequence[Record]:
        # The plain statement of the contract; only the real engines need an index.
        machines = self.by_machines(range(first, last + 1))
        return nsmallest(limit, machines, key=lambda record: (record.fence, record.machine))

    def held(self, now: int) -> Sequence[Record]:
        return [r for _, r in sorted(self._records.items()) if r.token is not None and r.fence > now]

    def marks(self) -> Sequence[Mark]:
        return [mark for _, mark in sorted(self._marks.items())]

    def forget_marks(self, before_us: int) -> None:
        self._marks = {name: mark for name, mark in self._marks.items() if mark.now_us >= before_us}

    def set_marks(self, now_us: int) -> None:
        self._marks = {name: replace(mark, now_us=now_us) for name, mark in self._marks.items()}

    def swap(self, swaps: Sequence[Swap], mark: Mark | None = None) -> list[bool]:
        if mark is not None and self._meta is not None:
            before = self._marks.get(mark.delegator, mark)
            self._marks[mark.delegator] = max(mark, before, key=lambda m: m.now_us)
        return [self._swap(swap) for swap in swaps]

    def _swap(self, swap: Swap) -> bool:
        new = swap.new
        old = self._records.get(new.machine) or Record(new.machine)
        if self._meta is None or self._meta.version != swap.version or old.gen != new.gen - 1:
            return False
        if new.token is not None and self._tokens.get(new.token, new.machine) != new.machine:
            return False
        if old.token is not None:
            del self._tokens[old.token]
        if new.token is not None:
            self._tokens[new.token] = new.machine
        self._records[new.machine] = new
        self._note(new)
        return True

    def _note(self, new: Record) -> None:
        if new.token is not None:
            span = Span(new.machine, new.span_start, new.fence, new.holder)
            self._spans[new.machine, new.span_start] = span
            return
        for key, span in list(self._spans.items()):
            if key[0] == new.machine and span.start >= new.fence:
                del self._spans[key]
            elif key[0] == new.machine and span.end > new.fence:
                self._spans[key] = replace(span, end=new.fence)

    def trace(self, machine: int, tick: int) -> Traced:
        spans = self._spans.values()
        holding = [span for span in spans if span.machine == machine and span.start <= tick < span.end]
        return Traced(holding[0] if holding else None, self._since)

    def prune(self, before: int, keep: int, limit: int) -> int:
        oldest_first = sorted(self._spans.items(), key=lambda item: item[1].end)
        surplus = len(oldest_first) - keep
        forgotten = [
            (key, span) for i, (key, span) in enumerate(oldest_first) if i < surplus or span.end <= before
        ][:limit]
        for key, span in forgotten:
            del self._spans[key]
            self._since = max(self._since, span.end)
        return len(forgotten)

    def close(self) -> None:
        self._meta = None
        self._records.clear()
        self._tokens.clear()
        self._marks.clear()
        self._spans.clear()
