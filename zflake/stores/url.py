"""The URLs of stores on a server: `scheme://[user[:password]@]host[:port][,host...][/path][?option=value&...]`."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Final
from urllib.parse import unquote

from zflake.errors import ConfigError

_HOST: Final = re.compile(r"(\[[0-9a-fA-F:.%]+\]|[^\[\]:]+)(?::(\d+))?")
_BAD_ESCAPE: Final = re.compile("%(?![0-9a-fA-F]{2})")
MAX_PORT: Final = 65_535


@dataclass(frozen=True, slots=True)
class StoreUrl:
    """A URL's parts.  Only `shown` may be shown: it has neither the login nor the options."""

    shown: str
    user: str | None
    password: str | None
    hosts: tuple[tuple[str, int | None], ...]
    """Names or addresses, without the brackets of IPv6, and ports; none if the URL names no host."""
    path: str
    """With its first slash; empty if there is none."""
    options: dict[str, str]

    @property
    def name(self) -> str:
        """The store's name for people: what may be shown, with the option that says where in a database it is."""
        inside = [f"{name}={self.options[name]}" for name in ("prefix", "schema") if name in self.options]
        return "?".join([self.shown, *inside])

    def flag(self, name: str) -> bool:
        """Whether an option that is `yes` or `no` is yes; raises `ConfigError` if it is neither."""
        value = self.options.get(name, "no")
        if value not in ("yes", "no"):
            raise ConfigError(f"{self.shown}: {name} is yes or no")
        return value == "yes"


def parse_url(url: str, options: Collection[str] | None = None) -> StoreUrl:
    """Read a URL; `options` are those that it may have (None: any).

    Raises `ConfigError`, whose text shows neither the login nor the options.
    """
    scheme, _, rest = url.partition("://")
    authority = re.match(r"[^/?#]*", rest)
    assert authority is not None
    login, at, hosts = authority[0].rpartition("@")
    behind = rest[authority.end() :]
    path, _, query = behind.partition("?")
    shown = f"{scheme}://{hosts}{path}"
    if "@" in login or "@" in behind or "#" in behind or _BAD_ESCAPE.search(login):
        raise ConfigError(
            f"can't read the {scheme}:// URL: in a user name, a password or an option"
            " write @ as %40, / as %2F, ? as %3F, # as %23 and % as %25"
        )
    user, colon, password = login.partition(":")
    return StoreUrl(
        shown,
        unquote(user) if at and user else None,
        unquote(password) if colon else None,
        tuple(_host(scheme, host) for host in hosts.split(",")) if hosts else (),
        path,
        _options(shown, query, options),
    )


def _host(scheme: str, text: str) -> tuple[str, int | None]:
    match = _HOST.fullmatch(text)
    if match is None or (match[2] is not None and not 0 < int(match[2]) <= MAX_PORT):
        # Not shown: without an @ it may be a password.
        raise ConfigError(
            f"can't read the {scheme}:// URL: write host or host:port (1 to {MAX_PORT}), an IPv6 address in brackets,"
            " and user:password@ before it"
        )
    return match[1].strip("[]"), None if match[2] is None else int(match[2])


def _options(shown: str, query: str, known: Collection[str] | None) -> dict[str, str]:
    pairs = [pair.partition("=")[::2] for pair in query.split("&")] if query else []
    options = {unquote(name): unquote(value) for name, value in pairs}
    if len(options) < len(pairs) or not all(options.values()):
        raise ConfigError(f"{shown}: each option stands once behind the ?, and has a value")
    if known is not None and (unknown := set(options).difference(known)):
        raise ConfigError(
            f"{shown}: there is no option {', '.join(sorted(unknown))}; there are {', '.join(sorted(known))}"
        )
    return options
