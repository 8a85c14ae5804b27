"""Where sockets bind and connect: `tcp://host:port` and `ipc://path`."""

from __future__ import annotations

import errno
import ipaddress
import re
import socket
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from zflake.errors import ConfigError

DEFAULT_DELEGATOR: Final = "tcp://127.0.0.1:7410"

_TCP: Final = re.compile(r"tcp://(?P<host>\[[0-9a-fA-F:.]+\]|[A-Za-z0-9._-]+|\*):(?P<port>[0-9]{1,5}|\*)")
_IPC: Final = re.compile(r"ipc://(?P<path>[^\s*]+)")
_MAX_PORT: Final = 65_535


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A parsed endpoint; `str` gives it back as ZeroMQ takes it."""

    text: str
    host: str
    """The host of a tcp endpoint (`*`: every interface); empty for ipc."""
    port: int | None
    """None for a free port of the system's choice, and for ipc."""

    def __str__(self) -> str:
        return self.text

    @property
    def is_local(self) -> bool:
        """Whether only this machine can reach it."""
        address = self._address()
        return not self.host or self.host == "localhost" or (address is not None and address.is_loopback)

    @property
    def is_name(self) -> bool:
        """Whether its host must be looked up."""
        return self.host not in ("", "localhost", "*") and self._address() is None

    @property
    def is_wildcard(self) -> bool:
        """Whether it names every interface, and so is no address to give to others."""
        address = self._address()
        return self.host == "*" or (address is not None and address.is_unspecified)

    @property
    def is_ipv6(self) -> bool:
        """Whether its host is an IPv6 address."""
        return self.host.startswith("[")

    def _address(self) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
        try:
            return ipaddress.ip_address(self.host.strip("[]"))
        except ValueError:
            return None


def parse_endpoint(text: str, *, to_bind: bool = False) -> Endpoint:
    """Parse an endpoint; only one `to_bind` may have `*` for its host or port.

    Raises `ConfigError` for anything but `tcp://host:port` and `ipc://path`.
    """
    if _IPC.fullmatch(text) and text.isprintable():
        return Endpoint(text, "", None)
    match = _TCP.fullmatch(text)
    if match is None:
        raise ConfigError(
            f"no endpoint {text!r}: write tcp://host:port, such as {DEFAULT_DELEGATOR}, or ipc://path"
        )
    host, port = match["host"], match["port"]
    if not to_bind and "*" in (host, port):
        raise ConfigError(f"endpoint {text!r} can be bound but not connected to: name a host and a port")
    if port != "*" and not (0 if to_bind else 1) <= int(port) <= _MAX_PORT:
        raise ConfigError(f"endpoint {text!r} has port {port}: ports go from 1 to {_MAX_PORT}")
    return Endpoint(text, host, None if port in ("*", "0") else int(port))


def check_exposed(endpoint: Endpoint, *, insecure: bool) -> None:
    """Refuse to serve at an address that strangers could reach, unless `insecure` says that this is meant.

    Raises `ConfigError`.
    """
    if not endpoint.is_local and not insecure:
        raise ConfigError(
            f"refused to bind {endpoint}: other machines could reach it, and nothing checks who they are. "
            "Give it --keys (see zflake keygen), bind a loopback address, or say --insecure if the network keeps "
            "strangers out"
        )


def check_bind(endpoint: Endpoint, *, insecure: bool) -> None:
    """Refuse what `check_exposed` refuses, and an ipc path at which another process serves.

    ZeroMQ would silently take that path over.  Raises `ConfigError`.
    """
    check_exposed(endpoint, insecure=insecure)
    if endpoint.text.startswith("ipc://") and _is_served(Path(endpoint.text.removeprefix("ipc://"))):
        raise ConfigError(f"{endpoint} is in use: another process serves at that path")


def _is_served(path: Path) -> bool:
    try:
        if not stat.S_ISSOCK(path.stat().st_mode):
            raise ConfigError(f"ipc://{path} is no socket but a file; name another path")
        with socket.socket(socket.AF_UNIX) as probe:
            probe.setblocking(False)  # noqa: FBT003
            # Refused: left behind by a process that ended.  All else, a full queue or another kind of
            # socket included, has a process behind it.
            return probe.connect_ex(str(path)) not in (errno.ECONNREFUSED, errno.ENOENT)
    except OSError:
        return False
