"""Keys: a party's folder of certificates, and who may come to a daemon.

    own.key_secret     this party's key pair; no other user may read it
    delegators/*.key   the public keys of the delegators that it trusts
    authorized/*.key   who may come, with a role and limits: for a delegator, or a static worker

The files are those of ZeroMQ (ZPL), as `zmq.auth` writes and reads them.  A file's name is the party's name for people.
Files may come and go while a daemon runs.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

import zmq
from zmq.utils import z85

from zflake.errors import ConfigError
from zflake.files import OTHERS
from zflake.wire.callers import PARTIES, Caller, Limits, Role
from zflake.wire.sockets import Curve, no_keys

OWN: Final = "own"
TRUSTED: Final = "delegators"
AUTHORIZED: Final = "authorized"
KEY_CHARACTERS: Final = 40
"""Characters of a key in Z85, ZeroMQ's way to write 32 bytes as text."""

_log = logging.getLogger("zflake.keys")


class Keys:
    """A party's folder.

    Raises `ConfigError` if there is no key pair in it, or if other users can read the secret.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        path = folder / f"{OWN}.key_secret"
        values = _read(path)
        self.public = values.get("public-key", "")
        self.secret = values.get("secret-key", "")
        if not _is_key(self.public) or not _is_key(self.secret):
            raise ConfigError(f"{path} holds no key pair: make one with zflake keygen")
        if (mode := stat.S_IMODE(path.stat().st_mode)) & OTHERS:
            raise ConfigError(
                f"other users can read {path} (mode {mode:04o}): chmod 600 it, or make a new key"
            )
        self._known: list[str] = []

    def as_server(self) -> Curve:
        """The keys of a socket that binds."""
        return Curve(self.public, self.secret)

    def to(self, server: str = "") -> list[Curve]:
        """The keys of a socket that connects to the server of that key, or to any delegator that is trusted, in turn.

        Raises `ConfigError` if no delegator's key was there so far.
        """
        servers = [server] if server else self._trusted()
        return [Curve(self.public, self.secret, key) for key in servers]

    def _trusted(self) -> list[str]:
        """The keys of the delegators that are trusted now."""
        try:
            self._known = _public_keys(self.folder / TRUSTED)
        except ConfigError as error:
            if not self._known:
                raise
            _log.error("%s; going by the keys that were there before", error)
        return self._known


def open_keys(folder: str | os.PathLike[str] | None) -> Keys | None:
    """The keys in a folder; for None those in the folder that ZFLAKE_KEYS names, if it names one; for "" none.

    Raises `ConfigError` if there is no key pair, or no delegator's key, in it.
    """
    folder = os.environ.get("ZFLAKE_KEYS") if folder is None else folder
    if not folder:
        return None
    keys = Keys(Path(folder))
    keys.to()  # now, not at the first call
    return keys


def curves_of(keys: Keys | None, server: str = "") -> Callable[[], Sequence[Curve | None]]:
    """Gives what a `Dialer` tries, by the folder as it is at the time of the call."""
    return no_keys if keys is None else lambda: keys.to(server)


class Callers:
    """Who may come to a daemon: the callers in a folder, by key.  `look` follows the folder's changes.

    Raises `ConfigError` if there is no such folder, or if a file in it can't be read.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._seen: object = None
        self.version = secrets.randbits(48)
        """One more with each change; begins anywhere, so that nobody takes it for that of another process."""
        self.by_key: Mapping[str, Caller] = {}
        if not folder.is_dir():
            raise ConfigError(
                f"there is no folder {folder}: it says who may come, by a file NAME.key for each"
            )
        self.look(strict=True)

    def look(self, *, strict: bool = False) -> bool:
        """Take in what has changed; True if anything has.

        A file that can't be read, or says no role, lets nobody in: `strict` raises a `ConfigError` for it, otherwise it
        is logged, and the others count.
        """
        seen = self._state()
        if seen == self._seen:
            return False
        callers: dict[str, Caller] = {}
        for path in _certificates(self._folder):
            try:
                caller = _caller(path)
            except ConfigError as error:
                if strict:
                    raise
                _log.error("%s; it lets nobody in", error)
                continue
            callers[caller.key] = caller
        self._report(callers)
        self._seen, self.by_key = seen, callers
        self.version += 1
        return True

    def _state(self) -> object:
        """What differs once a file was added, removed or changed."""
        state = []
        with contextlib.suppress(OSError):
            for entry in os.scandir(self._folder):
                with contextlib.suppress(OSError):
                    facts = entry.stat()
                    state.append((entry.name, facts.st_mtime_ns, facts.st_size, facts.st_ino))
        return sorted(state)

    def _report(self, callers: Mapping[str, Caller]) -> None:
        if self._seen is None:
            return
        before = set(self.by_key.values())
        for caller in callers.values():
            if caller not in before:
                _log.info("%s may come, as %s", caller.name, caller.role)
        for caller in self.by_key.values():
            if caller.key not in callers:
                _log.warning("%s may not come any more", caller.name)


# --- making them ---


def make_key_pair(folder: Path, *, name: str, role: Role) -> str:
    """Write a new key pair into a folder, which is made; gives the public key.

    Raises `ConfigError` if there is one already: who uses it would be locked out.
    """
    public, secret = (key.decode("ascii") for key in zmq.curve_keypair())
    folder.mkdir(0o700, parents=True, exist_ok=True)
    facts = {"name": name, "role": str(role)}
    _write(folder / f"{OWN}.key_secret", facts, {"public-key": public, "secret-key": secret}, mode=0o600)
    _write(folder / f"{OWN}.key", facts, {"public-key": public})
    return public


def write_public(folder: Path, public: str, *, name: str, role: Role) -> None:
    """Write a public key into a folder, which is made, as the certificate of this name."""
    folder.mkdir(0o700, parents=True, exist_ok=True)
    _write(folder / f"{name}.key", {"name": name, "role": str(role)}, {"public-key": public})


# --- files ---


def _certificates(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.key"))


def _public_keys(folder: Path) -> list[str]:
    keys = [public_key(path) for path in _certificates(folder)]
    if not keys:
        raise ConfigError(f"{folder} holds no key: put the delegators' there, each as a file NAME.key")
    return keys


def _caller(path: Path) -> Caller:
    values = _read(path)
    key = public_key(path, values)
    role = values.get("role", "")
    if role not in PARTIES:
        roles = ", ".join(PARTIES)
        raise ConfigError(
            f"{path} says no role that there is: write `role = ROLE` under `metadata`, one of {roles}"
        )
    return Caller(path.stem, Role(role), key, _limits(path, values))


def _limits(path: Path, values: Mapping[str, str]) -> Limits:
    limits = {}
    for name in Limits._fields:
        if (text := values.get(name.replace("_", "-"))) is not None:
            if not text.isdecimal():
                raise ConfigError(f"{path}: {name.replace('_', '-')} is {text!r}: write a whole number")
            limits[name] = int(text)
    return Limits(**limits)


def public_key(path: Path, values: Mapping[str, str] | None = None) -> str:
    """The public key in a certificate; raises `ConfigError` if there is none."""
    key = (_read(path) if values is None else values).get("public-key", "")
    if not _is_key(key):
        raise ConfigError(f"{path} holds no public key of {KEY_CHARACTERS} characters (Z85)")
    return key


def _is_key(text: str) -> bool:
    try:
        return len(text) == KEY_CHARACTERS and len(z85.decode(text)) == 32  # noqa: PLR2004
    except (KeyError, ValueError, UnicodeEncodeError):
        return False


def _read(path: Path) -> dict[str, str]:
    """The values in a ZPL file, whatever sections they are in."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is no text"
        raise ConfigError(f"can't read {path}: {why}") from error
    return dict(_values(lines))


def _values(lines: list[str]) -> Iterator[tuple[str, str]]:
    for line in lines:
        name, is_value, value = line.strip().partition("=")
        if is_value and not name.startswith("#"):
            yield name.strip(), value.strip(" \t\"'")


def _write(path: Path, metadata: Mapping[str, str], curve: Mapping[str, str], *, mode: int = 0o644) -> None:
    lines = ["metadata", *(f"    {name} = {value}" for name, value in metadata.items())]
    lines += ["curve", *(f'    {name} = "{value}"' for name, value in curve.items())]
    try:
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        with os.fdopen(file, "w", encoding="utf-8") as out:
            out.write("\n".join(lines) + "\n")
    except FileExistsError:
        raise ConfigError(
            f"{path} is there already: give another folder or name, or remove it first"
        ) from None
    except OSError as error:
        raise ConfigError(f"can't write {path}: {error.strerror}") from error
