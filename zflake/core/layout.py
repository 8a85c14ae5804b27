"""Layouts: the bit fields of an ID, its epoch and its tick.

    snowcloud, the default

     63                                        22 21       12 11         0
    +--------------------------------------------+-----------+------------+
    |          time, 42 bits, in ticks           |  machine  |  sequence  |
    +--------------------------------------------+-----------+------------+
                                                    10 bits     12 bits

A layout lists its fields from the high bits to the low ones.  Time always comes first, so that IDs sort
by time; machine and sequence may come in either order.  A tick is a whole number of milliseconds.

Nothing here masks: a number that does not fit its field is a `LayoutError`, never an ID.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from types import MappingProxyType
from typing import Any, Final, NamedTuple

from zflake.errors import LayoutError

UNIX_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
# `datetime` ends with the year 9999, and so does every layout: a time that can't be shown can't be minted.
CALENDAR_END_MS: Final = 253_402_300_800_000
EPOCH_2020_MS: Final = 1_577_836_800_000
MAX_TICK_MS: Final = 86_400_000


class Field(NamedTuple):
    """One run of bits: its name and its width."""

    name: str
    bits: int


@dataclass(frozen=True, slots=True)
class Decomposed:
    """The fields of one ID, as its layout reads them."""

    id: int
    time: datetime
    """When the ID's tick began, UTC."""
    tick: int
    """Ticks since the layout's epoch."""
    machine: int
    sequence: int
    parts: Mapping[str, int]
    """The machine field's own parts, high to low, if the layout names any (Discord: worker, process)."""


@dataclass(frozen=True, slots=True)
class Layout:
    """An ordered list of bit fields (high to low), an epoch and a tick.

    `fields` holds `time`, `machine` and `sequence`, 64 bits at most in all, time first.
    `epoch_ms` is in milliseconds since the Unix epoch, `tick_ms` in milliseconds (1 to 86,400,000).
    `machine_parts` may divide the machine field for people to read (Discord: worker and process).

    Raises `LayoutError` if these do not hold.
    """

    name: str
    fields: tuple[Field, ...]
    epoch_ms: int = 0
    tick_ms: int = 1
    machine_parts: tuple[Field, ...] = ()

    # Derived once, because minting reads them for every ID.
    time_shift: int = field(init=False, repr=False, compare=False)
    machine_shift: int = field(init=False, repr=False, compare=False)
    sequence_shift: int = field(init=False, repr=False, compare=False)
    machines: int = field(init=False, repr=False, compare=False)
    """The number of machine IDs, which go from 0 to machines - 1."""
    ids_per_tick: int = field(init=False, repr=False, compare=False)
    """IDs that one machine can mint in one tick."""
    epoch_us: int = field(init=False, repr=False, compare=False)
    tick_us: int = field(init=False, repr=False, compare=False)
    end_tick: int = field(init=False, repr=False, compare=False)
    """The exclusive upper bound of the ticks: the layout's overflow."""

    def __post_init__(self) -> None:
        bits = {f.name: f.bits for f in self.fields}
        if len(self.fields) != 3 or set(bits) != {"time", "machine", "sequence"}:  # noqa: PLR2004
            raise LayoutError("a layout has the fields time, machine and sequence, each once")
        if self.fields[0].name != "time":
            raise LayoutError("a layout's first field is time, or its IDs would not sort by time")
        if any(type(f.bits) is not int or f.bits < 1 for f in (*self.fields, *self.machine_parts)):
            raise LayoutError("every field of a layout has at least one bit")
        if self.bits > 64:  # noqa: PLR2004
            raise LayoutError(f"a layout has 64 bits at most, not {self.bits}")
        if self.machine_parts and sum(p.bits for p in self.machine_parts) != bits["machine"]:
            raise LayoutError("the parts of the machine field do not add up to its bits")
        if type(self.tick_ms) is not int or not 1 <= self.tick_ms <= MAX_TICK_MS:
            raise LayoutError(f"a tick lasts 1 to {MAX_TICK_MS} ms, not {self.tick_ms!r}")
        if type(self.epoch_ms) is not int or not 0 <= self.epoch_ms < CALENDAR_END_MS:
            raise LayoutError(f"an epoch lies between the years 1970 and 9999, not at {self.epoch_ms!r} ms")
        object.__setattr__(self, "epoch_us", self.epoch_ms * 1000)
        object.__setattr__(self, "tick_us", self.tick_ms * 1000)
        shift = 0
        for name, width in reversed(self.fields):
            object.__setattr__(self, f"{name}_shift", shift)
            shift += width
        object.__setattr__(self, "machines", 1 << bits["machine"])
        object.__setattr__(self, "ids_per_tick", 1 << bits["sequence"])
        calendar = (CALENDAR_END_MS - self.epoch_ms) // self.tick_ms
        object.__setattr__(self, "end_tick", min(1 << bits["time"], calendar))

    # --- its limits ---

    @property
    def bits(self) -> int:
        """Bits of its IDs, at most 64."""
        return sum(f.bits for f in self.fields)

    @property
    def epoch(self) -> datetime:
        """The origin of its time field, UTC."""
        return _instant(self.epoch_ms)

    @property
    def overflows(self) -> datetime:
        """The first instant, UTC, that the time field can't hold; nothing is minted from then on."""
        return self.time_of(self.end_tick)

    @property
    def signed_until(self) -> datetime:
        """The first instant, UTC, whose IDs do not fit a signed 64-bit column."""
        return self.fits_until(63)

    def fits_until(self, bits: int) -> datetime:
        """The first instant, UTC, whose IDs need more than `bits` bits (53: a JavaScript `Number`).

        If that never comes, the answer is `overflows`.
        """
        return self.time_of(min(self.end_tick, (1 << bits) >> self.time_shift))

    def time_of(self, tick: int) -> datetime:
        """When `tick` begins, UTC (0 to `end_tick`)."""
        if not 0 <= tick <= self.end_tick:
            raise LayoutError(f"layout {self.name} has the ticks 0 to {self.end_tick - 1}, not {tick}")
        return _instant(min(self.epoch_ms + tick * self.tick_ms, CALENDAR_END_MS - 1))

    def tick_of(self, time: datetime) -> int:
        """The tick that `time` (with a time zone) falls in, rounded down; negative before the epoch."""
        return (_unix_us(time) - self.epoch_us) // self.tick_us

    def ms_to_ticks(self, ms: int) -> int:
        """The ticks that `ms` milliseconds take, rounded up."""
        return -(-ms // self.tick_ms)

    def ticks_to_ms(self, ticks: int) -> int:
        """The milliseconds that `ticks` last; 0 if they have passed."""
        return max(0, ticks) * self.tick_ms

    # --- fields <-> integer ---

    def compose(self, tick: int, machine: int, sequence: int) -> int:
        """The ID of these fields.

        Raises `LayoutError` if one of them is not a whole number or does not fit its field.
        """
        self._check("time", tick, self.end_tick)
        self._check("machine", machine, self.machines)
        self._check("sequence", sequence, self.ids_per_tick)
        return tick << self.time_shift | machine << self.machine_shift | sequence << self.sequence_shift

    def decompose(self, id_: int) -> Decomposed:
        """The fields of an ID.

        Raises `LayoutError` if the number can't be an ID of this layout.
        """
        if type(id_) is not int or not 0 <= id_ < 1 << self.bits:
            negative = isinstance(id_, int) and id_ < 0
            hint = "; a negative one came out of a signed column: add 2**64" if negative else ""
            raise LayoutError(
                f"{id_!r} is no ID of layout {self.name}, whose IDs have {self.bits} bits{hint}"
            )
        tick = id_ >> self.time_shift
        if tick >= self.end_tick:
            raise LayoutError(f"{id_} lies after the end of layout {self.name}, {self.overflows.isoformat()}")
        machine = id_ >> self.machine_shift & self.machines - 1
        return Decomposed(
            id=id_,
            time=self.time_of(tick),
            tick=tick,
            machine=machine,
            sequence=id_ >> self.sequence_shift & self.ids_per_tick - 1,
            parts=_divide(machine, self.machine_parts),
        )

    def range(self, start: datetime, end: datetime) -> tuple[int, int]:
        """The half-open range `(low, high)` of the IDs whose time lies in `[start, end)`.

        For queries: `WHERE id >= low AND id < high`.  A span that reaches beyond the layout is cut to it.
        `high` may be 2**64, one more than any ID.  Both ends need a time zone.

        Raises `LayoutError` if `end` comes before `start`, or one has no time zone.
        """
        if _unix_us(end) < _unix_us(start):
            raise LayoutError("a range's end lies before its start")
        first, last = (self._tick_at_or_after(instant) for instant in (start, end))
        return first << self.time_shift, last << self.time_shift

    def check_machine(self, machine: int) -> int:
        """Give `machine` back, or raise `LayoutError` if the machine field can't hold it."""
        self._check("machine", machine, self.machines)
        return machine

    def with_epoch(self, epoch_ms: int) -> Layout:
        """The same fields with another origin of time (milliseconds since the Unix epoch)."""
        return replace(self, epoch_ms=epoch_ms)

    def _check(self, name: str, value: int, limit: int) -> None:
        if type(value) is not int or not 0 <= value < limit:
            raise LayoutError(
                f"{name} {value!r} does not fit layout {self.name}, which takes 0 to {limit - 1}"
            )

    def _tick_at_or_after(self, time: datetime) -> int:
        tick = -((self.epoch_us - _unix_us(time)) // self.tick_us)
        return min(max(tick, 0), self.end_tick)

    # --- as a text and as a map ---

    def __str__(self) -> str:
        """`time:42,machine:10,sequence:12`, the form that `parse` reads, with `@10ms` behind another tick."""
        fields = ",".join(f"{name}:{bits}" for name, bits in self.fields)
        return fields if self.tick_ms == 1 else f"{fields}@{self.tick_ms}ms"

    def to_map(self) -> dict[str, Any]:
        """The layout as plain values, for the wire, a store or JSON."""
        return {
            "name": self.name,
            "fields": [list(f) for f in self.fields],
            "epoch_ms": self.epoch_ms,
            "tick_ms": self.tick_ms,
            "machine_parts": [list(p) for p in self.machine_parts],
        }

    @classmethod
    def from_map(cls, values: Mapping[str, Any]) -> Layout:
        """The layout of a map that `to_map` made; raises `LayoutError` if it is not one."""
        try:
            name, epoch_ms, tick_ms = values["name"], values["epoch_ms"], values["tick_ms"]
            fields, parts = (
                tuple(Field(text, bits) for text, bits in values[key]) for key in ("fields", "machine_parts")
            )
        except (KeyError, TypeError, ValueError) as error:
            raise LayoutError("not the map of a layout") from error
        texts = [name, *(f.name for f in fields + parts)]
        numbers = [epoch_ms, tick_ms, *(f.bits for f in fields + parts)]
        if not all(type(text) is str and text.isprintable() for text in texts) or not all(
            type(n) is int for n in numbers
        ):
            raise LayoutError(
                "not the map of a layout: its names are printable strings, the rest are whole numbers"
            )
        return cls(name, fields, epoch_ms, tick_ms, parts)

    def same_ids(self, other: Layout) -> bool:
        """Whether both read every ID alike, whatever their names."""
        return (self.fields, self.epoch_ms, self.tick_ms) == (other.fields, other.epoch_ms, other.tick_ms)


def iso(time: datetime) -> str:
    """ISO 8601 with milliseconds and a Z, of a UTC time."""
    return time.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def iso_us(us: int) -> str:
    """The same of microseconds since the Unix epoch."""
    return iso(UNIX_EPOCH + timedelta(microseconds=us))


_SPEC = re.compile(r"(?P<fields>[a-z]+:\d{1,2}(?:,[a-z]+:\d{1,2})*)(?:@(?P<tick>\d{1,8})ms)?")


def parse(text: str) -> Layout:
    """The preset of that name, or a layout of one's own: `time:41,machine:13,sequence:10`.

    A tick other than 1 ms stands behind an @: `time:39,sequence:8,machine:16@10ms`.  The epoch of such a
    layout is the Unix epoch until `with_epoch` gives it another.

    Raises `LayoutError` for anything else.
    """
    if text in PRESETS:
        return PRESETS[text]
    match = _SPEC.fullmatch(text.replace(" ", ""))
    if match is None:
        raise LayoutError(
            f"no layout {text!r}: take one of {', '.join(PRESETS)}, or spell one out, "
            "such as time:41,machine:13,sequence:10@1ms"
        )
    return Layout("custom", _fields(match["fields"]), tick_ms=int(match["tick"] or 1))


def parse_epoch(text: str) -> int:
    """An epoch in milliseconds since the Unix epoch, from that very number or from an ISO 8601 time.

    A time without a zone is UTC.  Raises `LayoutError` for anything else.
    """
    if re.fullmatch(r"\d{1,15}", text):
        return int(text)
    try:
        instant = datetime.fromisoformat(text)
    except ValueError as error:
        raise LayoutError(
            f"no epoch {text!r}: give milliseconds since 1970 or an ISO 8601 time such as 2020-01-01T00:00Z"
        ) from error
    if instant.tzinfo is None:
        instant = instant.replace(tzinfo=UTC)
    return _unix_us(instant) // 1000


def _fields(text: str) -> tuple[Field, ...]:
    pairs = (part.split(":") for part in text.split(","))
    return tuple(Field(name, int(bits)) for name, bits in pairs)


_PRESETS: Final = (
    Layout("snowcloud", _fields("time:42,machine:10,sequence:12"), EPOCH_2020_MS),
    Layout("clawflake", _fields("time:45,sequence:12,machine:7")),
    Layout("twitter", _fields("time:41,machine:10,sequence:12"), 1_288_834_974_657),
    Layout(
        "discord",
        _fields("time:42,machine:10,sequence:12"),
        1_420_070_400_000,
        machine_parts=_fields("worker:5,process:5"),
    ),
    Layout("sonyflake", _fields("time:39,sequence:8,machine:16"), 1_409_529_600_000, tick_ms=10),
    Layout("instagram", _fields("time:41,machine:13,sequence:10"), 1_314_220_021_721),
    Layout("wide", _fields("time:42,machine:14,sequence:8"), EPOCH_2020_MS),
    # 53 bits: until 2089, 64 machines, 64,000 IDs a second each.
    Layout("javascript", _fields("time:41,machine:6,sequence:6"), EPOCH_2020_MS),
)
PRESETS: Final[Mapping[str, Layout]] = MappingProxyType({layout.name: layout for layout in _PRESETS})
"""The layouts that have a name."""

DEFAULT: Final = PRESETS["snowcloud"]


def _instant(unix_ms: int) -> datetime:
    # Not fromtimestamp(): a float would round the milliseconds, and some platforms stop at 2038.
    return UNIX_EPOCH + timedelta(milliseconds=unix_ms)


def _unix_us(time: datetime) -> int:
    if time.tzinfo is None:
        raise LayoutError(f"{time.isoformat()} has no time zone; say which, such as tzinfo=datetime.UTC")
    return (time - UNIX_EPOCH) // timedelta(microseconds=1)


def _divide(value: int, parts: tuple[Field, ...]) -> dict[str, int]:
    divided = {}
    for name, bits in reversed(parts):
        divided[name] = value & (1 << bits) - 1
        value >>= bits
    return dict(reversed(divided.items()))
