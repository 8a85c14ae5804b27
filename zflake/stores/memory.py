"""The store that forgets: the reference for the others' tests, and for demonstrations."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Mapping, Sequence
from typing import Any

from zflake.core.lease import Meta
from zflake.stores.keyed import Found, Key, KeyedStore, Stamp, Step, Thing, stamp_of


class MemoryStore(KeyedStore):
    """Values in a dict; everything is lost with the process."""

    def __init__(self) -> None:
        super().__init__("memory:")
        self._things: dict[Key, Thing] = {}
        self._order: list[Key] = []

    def incarnation(self, meta: Meta | None = None) -> str:  # noqa: ARG002
        return ""  # it has one life

    def close(self) -> None:
        self._things.clear()
        self._order.clear()

    def _get(self, keys: Sequence[Key]) -> list[Any]:
        return list(map(self._things.get, keys))

    def _keys(self, low: Key, high: Key, *, limit: int = 0, last: bool = False) -> list[Key]:
        begin, end = bisect_left(self._order, low), bisect_left(self._order, high)
        if last:
            begin = max(begin, end - 1)
        return self._order[begin : min(end, begin + limit) if limit else end]

    def _commit(self, first: Step, steps: Sequence[Step] = ()) -> list[bool] | None:
        if not self._holds(first.conditions):
            return None
        self._write(first.writes)
        outcomes = []
        for step in steps:
            holds = self._holds(step.conditions)
            if holds:
                self._write(step.writes)
            outcomes.append(holds)
        return outcomes

    def _holds(self, conditions: Mapping[Key, Stamp | Found]) -> bool:
        for key, wanted in conditions.items():
            thing = self._things.get(key)
            if thing is None:
                if wanted is not Found.NOTHING:
                    return False
            elif wanted is not Found.ANYTHING and stamp_of(key, thing) != wanted:
                return False
        return True

    def _write(self, writes: Mapping[Key, Thing | None]) -> None:
        things, order = self._things, self._order
        for key, thing in writes.items():
            if thing is None:
                if things.pop(key, None) is not None:
                    del order[bisect_left(order, key)]
            else:
                if key not in things:
                    insort(order, key)
                things[key] = thing
