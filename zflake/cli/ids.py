"""IDs as text: the formats of `--format`, and what an ID says."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from typing import Any, Final

from zflake.core.layout import Decomposed, Layout, iso
from zflake.errors import ConfigError

CROCKFORD: Final = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"
BASE32_DIGITS: Final = 13
MAX_DIGITS: Final = 20
"""Digits of a decimal ID, zeros in front aside."""


def formatter(format_: str, layout: Layout) -> Callable[[int], str]:
    """The function that shows one ID."""
    match format_:
        case "hex":
            return "0x{:016x}".format
        case "base32":
            return to_base32
        case "json":
            return lambda id_: json.dumps(as_object(layout.decompose(id_)))
        case _:
            return str


def to_base32(id_: int) -> str:
    """13 digits of Crockford's base 32: short, in order, and safe to read out."""
    return "".join(CROCKFORD[id_ >> shift & 31] for shift in range(60, -1, -5))


def read_id(text: str) -> int:
    """The ID that one of the formats shows.  Raises `ConfigError` for anything else."""
    if text.isascii() and text.removeprefix("-").isdecimal():
        if len(text.lstrip("-0")) > MAX_DIGITS:  # Python itself refuses to read thousands of them
            raise ConfigError(f"no ID {text[:MAX_DIGITS]}...: IDs have 64 bits, {MAX_DIGITS} digits, at most")
        return int(text)
    if text[:2].lower() == "0x":
        digits, alphabet = text[2:].lower(), "0123456789abcdef"
    else:
        digits, alphabet = text.upper().translate(str.maketrans("OIL", "011")), CROCKFORD
    known = len(digits) == BASE32_DIGITS or alphabet is not CROCKFORD
    if not digits or not known or any(digit not in alphabet for digit in digits):
        raise ConfigError(
            f"no ID {text!r}: write a decimal number, 0x and hexadecimal, or 13 digits of Crockford's base 32"
        )
    value = 0
    for digit in digits:
        value = value * len(alphabet) + alphabet.index(digit)
    return value


def show_id(fields: Decomposed) -> str:
    """A line that shows an ID with its fields."""
    machine = f"machine {fields.machine}{show_parts(fields.parts.items())}"
    return f"{fields.id}  {iso(fields.time)}  {machine}  sequence {fields.sequence}"


def show_parts(parts: Iterable[tuple[str, int]]) -> str:
    """The parts of a machine ID, or of its bits, in brackets, if it has any."""
    listed = ", ".join(f"{name} {value}" for name, value in parts)
    return f" ({listed})" if listed else ""


def as_object(fields: Decomposed) -> dict[str, Any]:
    """An ID's fields for JSON, whose numbers may end at 2**53: the ID is a string."""
    return {
        "id": str(fields.id),
        "time": iso(fields.time),
        "tick": fields.tick,
        "machine": fields.machine,
        "sequence": fields.sequence,
        **fields.parts,
    }


def spell_out(layout: Layout) -> str:
    """A layout in words."""
    parts = show_parts(layout.machine_parts)
    fields = ", ".join(f"{name} {bits}{parts if name == 'machine' else ''}" for name, bits in layout.fields)
    return f"{fields} bits; tick {layout.tick_ms} ms; epoch {iso(layout.epoch)}"
