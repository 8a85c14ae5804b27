"""Single values of a message: each check gives the value back, or raises `ProtocolError` with what it should be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, TypeAlias

from zflake.core.lease import TOKEN_BYTES
from zflake.errors import ConfigError, ProtocolError
from zflake.wire.codec import show
from zflake.wire.endpoint import parse_endpoint

MAX_TEXT: Final = 255
"""Characters of a name, a host or an address."""
_MAX_NUMBER: Final = 2**63 - 1

Check: TypeAlias = Callable[[str, Any], Any]
"""Called with the name of a value, for the error, and the value."""


def taking(**checks: Check) -> Callable[[list[Any]], list[Any]]:
    """A function that takes a method's params apart and checks each under its name; made once, for each renewal calls it."""
    named = tuple(checks.items())

    def take(params: list[Any]) -> list[Any]:
        if len(params) != len(named):
            raise ProtocolError(f"params are [{', '.join(checks)}], not {len(params)} values")
        return [check(name, value) for (name, check), value in zip(named, params, strict=True)]

    return take


def pick(values: dict[str, Any], **checks: Check) -> list[Any]:
    """The values that a map has under these keys, each checked."""
    return [check(key, values.get(key)) for key, check in checks.items()]


def optional(check: Check) -> Check:
    """The check of a value that may be nil as well."""
    return lambda name, value: None if value is None else check(name, value)


def no_params(params: list[Any]) -> None:
    """Nothing, for a method that takes nothing."""
    if params:
        raise ProtocolError(f"this method takes no params, not {show(params)}")


def token(name: str, value: Any) -> bytes:
    """A lease's token."""
    if type(value) is not bytes or len(value) != TOKEN_BYTES:
        raise ProtocolError(f"{name} is {TOKEN_BYTES} bytes (MessagePack's bin), not {show(value)}")
    return value


def number(name: str, value: Any) -> int:
    """A whole number from 0 to 2**63 - 1."""
    if type(value) is not int or not 0 <= value <= _MAX_NUMBER:
        raise ProtocolError(f"{name} is a number from 0 to 2**63 - 1, not {show(value)}")
    return value


def text(name: str, value: Any) -> str:
    """A short text without anything that a terminal would obey: names end up in logs and on screens."""
    if type(value) is not str or len(value) > MAX_TEXT or not value.isprintable():
        raise ProtocolError(f"{name} is a text of at most {MAX_TEXT} printable characters, not {show(value)}")
    return value


def mapping(name: str, value: Any) -> dict[str, Any]:
    """A map; its values are not checked yet."""
    if type(value) is not dict:
        raise ProtocolError(f"{name} is a map, not {show(value)}")
    return value


def address(name: str, value: Any) -> str:
    """An endpoint that clients can connect to, or an empty text."""
    shown = text(name, value)
    try:
        if shown and parse_endpoint(shown).is_wildcard:
            raise ProtocolError(f"{name} {shown} is every interface: name a host that clients can connect to")
    except ConfigError as error:
        # An address that can't be read would make the whole directory unreadable to clients.
        raise ProtocolError(f"{name}: {error}") from error
    return shown


def timeline_us(result: Any) -> int | None:
    """The `now_us` of a delegator's result (µs since the Unix epoch); None if it carries none."""
    now_us = result.get("now_us") if type(result) is dict else None
    return now_us if type(now_us) is int and 0 <= now_us <= _MAX_NUMBER else None


def check_name(name: str) -> str:
    """Give a holder's name back; raises `ConfigError` if it can't be shown to people."""
    if not isinstance(name, str) or len(name) > MAX_TEXT or not name.isprintable():
        raise ConfigError(f"a name is at most {MAX_TEXT} printable characters, not {str(name)[:60]!a}")
    return name
