"""The words of the lease protocol: a holder's requests, a delegator's records, its answers.

Requests travel from holder to delegator, `Record` and `Meta` lie in the store, answers travel back.  All
are immutable.  Ticks count from the layout's epoch; tokens are 16 random bytes, drawn by the holder.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Final, TypeAlias

from zflake.core.layout import Layout

TOKEN_BYTES: Final = 16
SCHEMA: Final = 4
"""Schema of what this zflake writes into a store."""
READER: Final = 4
"""Oldest schema whose zflake may use what this one writes.  It rises with each change that such a zflake would
misread or lose."""
OLDEST: Final = 3
"""Oldest schema that this zflake can bring to its own."""
VERSIONS: Final = 1 << 48
"""Exclusive upper bound of the random version of a new incarnation's meta."""

Token: TypeAlias = bytes


@dataclass(frozen=True, slots=True)
class Holder:
    """The holder of a lease: its `key` is what rules go by, the rest is for people and for the directory."""

    name: str = ""
    host: str = ""
    pid: int = 0
    address: str = ""
    """The endpoint at which the holder serves ID requests; empty if it serves none."""
    key: str = ""
    """The public key that the holder proved to have, to which the lease is bound; empty in a cluster without keys."""


# --- requests ---


@dataclass(frozen=True, slots=True)
class Acquire:
    """Asks for any free machine ID."""

    next: Token
    holder: Holder = field(default_factory=Holder)


@dataclass(frozen=True, slots=True)
class Renew:
    """Asks for the next window on a machine ID that the holder has."""

    machine: int
    token: Token
    gen: int
    next: Token
    end: int | None = None
    """The end of the holder's last window.  If the store knows less, the renewal is a witness of a loss."""
    store_id: str | None = None
    """The store that granted the lease: of another one it bears no witness."""
    key: str = ""
    """The key that the asker proved to have."""


@dataclass(frozen=True, slots=True)
class Release:
    """Gives a machine ID back.

    `next` is the token of a renewal that was never answered, or None.  `last` is the last tick minted in,
    as the mint says and no clock, or None if nothing was minted.
    """

    machine: int
    token: Token
    next: Token | None
    last: int | None
    key: str = ""
    """The key that the asker proved to have."""


@dataclass(frozen=True, slots=True)
class Trace:
    """Asks which holder was granted tick `tick` on a machine ID."""

    machine: int
    tick: int


Request: TypeAlias = Acquire | Renew | Release


def bound(request: Request, key: str) -> Request:
    """The same request of a peer that proved to have this key."""
    if isinstance(request, Acquire):
        return replace(request, holder=replace(request.holder, key=key))
    return replace(request, key=key)


# --- records ---


@dataclass(frozen=True, slots=True)
class Meta:
    """The settings and the state of the whole store."""

    store_id: str
    layout: Layout
    ttl: int
    """How far ahead of now a window ends when it is granted, in ticks."""
    first_machine: int
    last_machine: int
    """The machine IDs that are leased: first to last, both included."""
    floor: int = 0
    """No window begins below this tick, on any machine."""
    version: int = 1
    """+1 with every change of this record.  It begins anew at a number drawn at random when the store is made,
    and when it may have forgotten something, so that none comes twice: a `Swap` names it."""
    incarnation: str = ""
    """The life of the store.  If the store says another one, it may have lost what it promised."""
    moved: str = ""
    """The store that this cluster was moved to: nothing is granted from here any more.  Empty if it was not."""
    schema: int = SCHEMA
    """Latest schema that was written into this store.  The first delegator with a later one raises it."""
    reader: int = READER
    """Oldest schema whose zflake may use this store."""


@dataclass(frozen=True, slots=True)
class Record:
    """The durable state of one machine ID.  One that was never used is all zeros."""

    machine: int
    fence: int = 0
    """The exclusive upper bound of every tick granted on this machine and not given back."""
    gen: int = 0
    """+1 with every write of this record."""
    token: Token | None = None
    """The token that the next renewal must show; None after a release."""
    start: int = 0
    """The start of the newest window, which ends at the fence."""
    tenancy_start: int = 0
    """The start of the first window of this tenancy."""
    holder: Holder = field(default_factory=Holder)
    span_start: int = 0
    """The start of the unbroken row of windows that ends at the fence."""


@dataclass(frozen=True, slots=True)
class Span:
    """Provenance: `[start, end)` on a machine ID was granted to this holder, window after window."""

    machine: int
    start: int
    end: int
    holder: Holder


@dataclass(frozen=True, slots=True)
class Swap:
    """A write: put `new` in place of `old`, under meta's `version`.

    The machine's provenance goes with it: the span `[new.span_start, new.fence)`, and none above the fence; after a
    release none above `cut`.
    """

    old: Record
    """The record as it was read; the store compares its gen with what it holds."""
    new: Record
    """The record as it is to be, with the next gen."""
    version: int
    cut: int | None = None
    """Where a release ends the machine's provenance; None: at the fence."""


@dataclass(frozen=True, slots=True)
class Mark:
    """The latest now that a delegator used, in microseconds since the Unix epoch."""

    delegator: str
    """Names the process; the next one after a restart may have another name."""
    timeline_us: int
    lead_us: int = 0
    """Microseconds that the timeline was ahead of that delegator's wall clock."""
    address: str = ""
    """The endpoint at which it serves."""


# --- answers ---


@dataclass(frozen=True, slots=True)
class Grant:
    """The window `[start, end)` on a machine ID.

    It answers the request that drew `token`, which is also what the next renewal shows.
    """

    machine: int
    gen: int
    start: int
    end: int
    token: Token
    layout: Layout
    ttl: int
    """Ticks; a holder renews when a third of it has passed."""
    store_id: str = ""
    """Which store the lease is recorded in."""


@dataclass(frozen=True, slots=True)
class Released:
    """The release stands; `fence` is the first tick that the machine's next holder may have."""

    machine: int
    fence: int


@dataclass(frozen=True, slots=True)
class Traced:
    """The holder that was granted a tick: the span that holds it, or None if the record knows of none."""

    span: Span | None
    since: int
    """The record is complete from this tick on; what ended earlier may have been forgotten."""


class Refused(StrEnum):
    """Why a request was not granted; the values are the wire's error codes."""

    LOST = "lost"
    """The record has moved on: this tenancy is over."""
    TOO_EARLY = "too_early"
    """The holder has a whole ttl ahead already; ask again after `retry_after_ms`."""
    NO_FREE_MACHINE = "no_free_machine"
    """Every machine is inside a window; the first may fall free after `retry_after_ms`."""
    EXHAUSTED = "exhausted"
    """The layout has no ticks left, ever."""
    DENIED = "denied"
    """The key may not have this."""
    UNAVAILABLE = "unavailable"
    """The store did not settle the request; ask again, with the same token."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """A request that was not granted.  Nothing was written for it."""

    reason: Refused
    message: str
    retry_after_ms: int | None = None


Answer: TypeAlias = Grant | Released | Refusal
