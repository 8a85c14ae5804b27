"""The store that forgets: the reference for the others' tests, and for demonstrations."""

from __future__ import annotations

from collections.abc import Sequence
from heapq import nsmallest

from zflake.core.lease import Mark, Meta, Record, Swap, Token
from zflake.errors import StoreError
from zflake.stores.contract import Store


class MemoryStore(Store):
    """Records in a dict; everything is lost with the process."""

    url = "memory:"

    def __init__(self) -> None:
        self._meta: Meta | None = None
        self._records: dict[int, Record] = {}
        self._tokens: dict[Token, int] = {}
        self._marks: dict[str, int] = {}

    def meta(self) -> Meta | None:
        return self._meta

    def initialise(self, meta: Meta) -> None:
        if self._meta is not None:
            raise StoreError("this store is initialised already")
        self._meta = meta

    def swap_meta(self, new: Meta) -> bool:
        old = self._meta
        if old is None or (old.store_id, old.version) != (new.store_id, new.version - 1):
            return False
        self._meta = new
        return True

    def by_machine(self, machine: int) -> Record:
        return self._records.get(machine) or Record(machine)

    def by_token(self, token: Token) -> Record | None:
        machine = self._tokens.get(token)
        return None if machine is None else self._records[machine]

    def lowest(self, first: int, last: int, limit: int) -> Sequence[Record]:
        # The plain statement of the contract; only the real engines need an index.
        machines = (self.by_machine(machine) for machine in range(first, last + 1))
        return nsmallest(limit, machines, key=lambda record: (record.fence, record.machine))

    def held(self, now: int) -> Sequence[Record]:
        return [r for _, r in sorted(self._records.items()) if r.token is not None and r.fence > now]

    def marks(self) -> Sequence[Mark]:
        return [Mark(delegator, now_us) for delegator, now_us in sorted(self._marks.items())]

    def set_marks(self, now_us: int) -> None:
        self._marks = dict.fromkeys(self._marks, now_us)

    def swap(self, swaps: Sequence[Swap], mark: Mark | None = None) -> list[bool]:
        if mark is not None:
            self._marks[mark.delegator] = mark.now_us
        return [self._swap(swap) for swap in swaps]

    def _swap(self, swap: Swap) -> bool:
        new = swap.new
        old = self.by_machine(new.machine)
        if self._meta is None or self._meta.version != swap.version or old.gen != new.gen - 1:
            return False
        if new.token is not None and self._tokens.get(new.token, new.machine) != new.machine:
            return False
        if old.token is not None:
            del self._tokens[old.token]
        if new.token is not None:
            self._tokens[new.token] = new.machine
        self._records[new.machine] = new
        return True

    def close(self) -> None:
        self._meta = None
        self._records.clear()
        self._tokens.clear()
        self._marks.clear()
