"""A client of etcd's HTTP API: several endpoints, a password, and errors that say what to do."""

from __future__ import annotations

import contextlib
import json
from typing import Any, Final, TypeAlias

from zflake.errors import ConfigError, StoreError
from zflake.stores.url import StoreUrl

try:
    import requests
    from etcd3gw import exceptions
    from etcd3gw.client import Etcd3Client
except ImportError as error:
    raise ConfigError("etcd:// needs the etcd3gw package: pip install 'zflake[etcd]'") from error

TIMEOUT_S: Final = 2.0
"""Seconds to wait for an answer; half as long if there are other endpoints to ask."""
PORT: Final = 2379

Op: TypeAlias = dict[str, Any]


class EtcdHttp:
    """The endpoints of one cluster.  One is asked until it fails."""

    def __init__(self, where: StoreUrl) -> None:
        self._shown = where.shown
        self._login = None if where.user is None else (where.user, where.password or "")
        self._turn = 0
        self.failures = 0
        """How often an endpoint failed."""
        self._clients = [
            Etcd3Client(
                host=host,
                port=port or PORT,
                protocol="https" if where.flag("tls") else "http",
                timeout=TIMEOUT_S / min(2, len(where.hosts)),
                session=_session(where.options.get("ca")),
                api_path="/v3/",
            )
            for host, port in where.hosts
        ]

    def ask(self, path: str, request: Op, *, write: bool = False) -> Op:
        """The answer of one of the endpoints.  A write that fails is not repeated: it may have happened."""
        for attempt in range(1, len(self._clients) + 1):
            try:
                return self.ask_once(path, request)
            except StoreError:
                self.failures += 1
                self._turn = (self._turn + 1) % len(self._clients)
                if write or attempt == len(self._clients):
                    raise
        raise AssertionError("there is an endpoint")

    def ask_node(self, path: str, request: Op) -> Op:
        """A node's answer about itself; empty if it tells that to root only."""
        try:
            return self.ask(path, request)
        except StoreError as error:
            if "permission denied" in str(error):
                return {}
            raise

    def ask_once(self, path: str, request: Op) -> Op:
        """The answer of the endpoint whose turn it is."""
        client = self._clients[self._turn]
        try:
            if self._login is not None and "Authorization" not in client.session.headers:
                self._authenticate(client)
            try:
                answer: Op = client.post(client.get_url(path), json=request)
            except exceptions.Etcd3Exception as error:
                if self._login is None or "auth" not in _reason(error):
                    raise
                self._authenticate(client)  # the token has run out, and nothing was done
                answer = client.post(client.get_url(path), json=request)
        except (exceptions.ConnectionFailedError, exceptions.ConnectionTimeoutError) as error:
            raise StoreError(f"can't reach {self._shown}: {_where(client)}: {_plain(error)}") from error
        except exceptions.Etcd3Exception as error:
            reason = _reason(error)
            if self._login is None and "user name is empty" in reason:
                reason = "it wants a user and a password: etcd://user:password@..."
            raise StoreError(f"{self._shown}: {_where(client)}: {reason}") from error
        except (requests.RequestException, ValueError, KeyError) as error:
            raise StoreError(f"{self._shown}: {_where(client)} does not speak as etcd does") from error
        return answer

    def close(self) -> None:
        """Close all connections."""
        for client in self._clients:
            client.session.close()

    def _authenticate(self, client: Etcd3Client) -> None:
        assert self._login is not None
        name, password = self._login
        client.session.headers.pop("Authorization", None)
        try:
            answer = client.post(
                client.get_url("/auth/authenticate"), json={"name": name, "password": password}
            )
        except exceptions.Etcd3Exception as error:
            if "password" not in _reason(error):
                raise
            raise StoreError(f"{self._shown} refuses the password of {name}") from error
        client.session.headers["Authorization"] = answer["token"]


def _session(ca: str | None) -> requests.Session:
    session = requests.Session()
    session.trust_env = False  # no proxy stands before a store
    if ca is not None:
        session.verify = ca
    return session


def _reason(error: exceptions.Etcd3Exception) -> str:
    """The reason that etcd gives, in one line."""
    detail = getattr(error, "detail_text", None) or str(error)
    with contextlib.suppress(ValueError, TypeError, KeyError):
        detail = json.loads(detail)["error"]
    return " ".join(str(detail).split())[:300]


def _plain(error: BaseException) -> str:
    """Why there is no connection, without the layers in which the libraries wrap it."""
    while (inner := error.__cause__ or error.__context__) is not None:
        error = inner
    return (error.strerror if isinstance(error, OSError) else None) or "it does not answer"


def _where(client: Etcd3Client) -> str:
    return f"[{client.host}]:{client.port}" if ":" in client.host else f"{client.host}:{client.port}"
