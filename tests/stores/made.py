"""A store as a delegator's start leaves it, and what tests put into it."""

from __future__ import annotations

from dataclasses import replace
from typing import Final, TypeVar

from zflake.core.layout import PRESETS
from zflake.core.lease import Meta, Record, Swap
from zflake.delegator.moves import meta_of
from zflake.stores import Store
from zflake.stores.contract import Contents

META: Final = Meta("store-1", PRESETS["snowcloud"], ttl=30_000, first_machine=0, last_machine=1023)
S = TypeVar("S", bound=Store)


def made(store: S, meta: Meta = META, *contents: Contents) -> S:
    """The store, initialised in its own incarnation."""
    store.initialise(replace(meta, incarnation=store.incarnation()), *contents)
    return store


def is_as_it_was(store: Store) -> bool:
    """Whether the store takes itself for what its meta says."""
    return store.incarnation() == meta_of(store).incarnation


def token(number: int) -> bytes:
    return number.to_bytes(16, "big")


def leased(machine: int, fence: int = 10) -> Record:
    """The first record of a machine ID."""
    return Record(machine, fence, gen=1, token=token(machine))


def write(store: Store, *records: Record, version: int = 1) -> list[bool]:
    """Try to put each record in place of the one of its machine with the gen before."""
    read = {record.machine: store.by_machine(record.machine) for record in records}
    swaps = []
    for record in records:
        swaps.append(Swap(replace(read[record.machine], gen=record.gen - 1), record, version))
        if read[record.machine].gen == record.gen - 1:
            read[record.machine] = record
    return store.swap(swaps)
