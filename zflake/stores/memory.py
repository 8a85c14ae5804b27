"""The store that forgets: the reference for the others' tests, and for demonstrations."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import Any

from zflake.core.lease import Mark, Meta, Record
from zflake.stores.keyed import Found, Key, KeyedStore, Stamp, Step, Thing


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
        return [self._try(step) for step in steps] if self._try(first) else None

    def _try(self, step: Step) -> bool:
        holds = all(self._holds(key, wanted) for key, wanted in step.conditions.items())
        if holds:
            for key, thing in step.writes.items():
                self._write(key, thing)
        return holds

    def _holds(self, key: Key, wanted: Stamp | Found) -> bool:
        thing = self._things.get(key)
        if thing is None or isinstance(wanted, Found):
            return (wanted is Found.NOTHING) == (thing is None)
        return _stamp_of(thing) == wanted

    def _write(self, key: Key, thing: Thing | None) -> None:
        if thing is None:
            if self._things.pop(key, None) is not None:
                del self._order[bisect_left(self._order, key)]
            return
        if key not in self._things:
            insort(self._order, key)
        self._things[key] = thing


def _stamp_of(thing: Thing) -> object:
    """The part of a value that a condition compares: of most kinds, the value itself."""
    match thing:
        case Meta(version=stamp) | Record(gen=stamp) | Mark(timeline_us=stamp):
            return stamp
    return thing
