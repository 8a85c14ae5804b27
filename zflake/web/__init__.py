"""zflake for Flask: IDs in request handlers, without a thought for processes, threads and forks.

    from zflake.web import ZFlake

    app.config["ZFLAKE_ENDPOINTS"] = "tcp://127.0.0.1:7410"
    ids = ZFlake(app)               # or ids = ZFlake(), and ids.init_app(app) later

    @app.post("/orders")
    def order():
        return {"id": str(ids.next_id())}    # a string: JavaScript's numbers end at 2**53

Each process of the server leases one machine ID, at its first ID, for all its requests and threads; a forked
one, too, so that `gunicorn --preload` needs nothing special.  A process that ends in order gives the lease back.

`python -m zflake.web` is a server that gives one ID a request; `zflake.web:create_app()` is the same for a
server of your choice.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Mapping
from typing import Any, Final, TypeAlias

from zflake.client.sync import Client
from zflake.embedded.generator import LeasedGenerator
from zflake.errors import ConfigError, ZflakeError
from zflake.wire.endpoint import DEFAULT_DELEGATOR

try:
    from flask import Flask, Response, current_app
except ImportError as error:
    raise ImportError("zflake.web needs Flask: pip install 'zflake[flask]'") from error

Source: TypeAlias = LeasedGenerator | Client

KEY: Final = "zflake"
"""Key of an app's source of IDs in its `extensions`."""
MODES: Final = ("leased", "client")
ENVIRONMENT: Final = (
    *("ZFLAKE_ENDPOINTS", "ZFLAKE_KEYS", "ZFLAKE_MODE", "ZFLAKE_TIMEOUT", "ZFLAKE_IDLE", "ZFLAKE_ROUTE"),
)


class ZFlake:
    """IDs for the requests of Flask apps.

    What `init_app` finds in the app's config:

    - `ZFLAKE_ENDPOINTS`: one endpoint or several, in a list or in one text with commas or spaces between
      (tcp://127.0.0.1:7410)
    - `ZFLAKE_KEYS`: the app's folder of keys, in a cluster that has them
    - `ZFLAKE_MODE`: `leased`: each process leases a machine ID; or `client`: workers mint
      (`leased`)
    - `ZFLAKE_TIMEOUT`: how long a call may take, in seconds (5)
    - `ZFLAKE_IDLE`: after how many seconds without an ID a lease is given back (600)
    - `ZFLAKE_ROUTE`: a client's `auto`, `direct` or `broker` (`auto`)
    """

    def __init__(self, app: Flask | None = None) -> None:
        self._app = app
        if app is not None:
            self.init_app(app)

    def init_app(self, app: Flask) -> None:
        """Give the app a source of IDs.  Nothing is connected before the first ID.

        Raises `ConfigError` if the app's config is wrong, or it has a source already.
        """
        if KEY in app.extensions:
            raise ConfigError(f"the app {app.name} has its ZFlake already: call init_app once")
        app.extensions[KEY] = source_of(app.config)

    def next_id(self) -> int:
        """One ID for the current app; for the one that was given to `ZFlake` if none is current.

        Raises what `LeasedGenerator` or `Client` raise; `RuntimeError` if there is no app.
        """
        return self.source.next_id()

    def next_ids(self, count: int) -> list[int]:
        """Exactly `count` IDs (1 or more); otherwise as `next_id`."""
        return self.source.next_ids(count)

    @property
    def source(self) -> Source:
        """The `LeasedGenerator` or `Client` of the current app."""
        app: Flask | None = current_app or self._app
        if app is None:
            raise RuntimeError("no app is current: ask in a request, or `with app.app_context():`")
        source: Source | None = app.extensions.get(KEY)
        if source is None:
            raise RuntimeError(f"the app {app.name} has no ZFlake: call init_app(app) first")
        return source


def create_app(endpoints: str | Iterable[str] | None = None) -> Flask:
    """An app that gives one ID as text at `/`, for any WSGI server: `gunicorn 'zflake.web:create_app()'`.

    Settings that it is not given come from the environment, under the names of ZFlake's config.  If there is no
    ID to be had, it answers 503 with `Retry-After`.
    """
    app = Flask("zflake.web")
    app.config.update({name: os.environ[name] for name in ENVIRONMENT if os.environ.get(name)})
    if endpoints is not None:
        app.config["ZFLAKE_ENDPOINTS"] = endpoints
    ids = ZFlake(app)

    @app.get("/")
    def next_id() -> Response:
        return Response(f"{ids.next_id()}\n", mimetype="text/plain", headers={"Cache-Control": "no-store"})

    app.register_error_handler(ZflakeError, refuse)
    return app


def refuse(error: ZflakeError) -> Response:
    """A 503 that says when to come back; fit for `app.register_error_handler(ZflakeError, refuse)`."""
    seconds = max(1, math.ceil(error.retry_after or 1))
    return Response(f"{error}\n", 503, {"Retry-After": str(seconds)}, mimetype="text/plain")


def source_of(config: Mapping[str, Any]) -> Source:
    """The source of IDs that a config asks for; raises `ConfigError` if it is wrong."""
    endpoints = config.get("ZFLAKE_ENDPOINTS", DEFAULT_DELEGATOR)
    if isinstance(endpoints, str):
        endpoints = [text for text in re.split(r"[,\s]+", endpoints) if text]
    mode = config.get("ZFLAKE_MODE", MODES[0])
    if mode not in MODES:
        raise ConfigError(f"no ZFLAKE_MODE {mode!r}: take one of {', '.join(MODES)}")
    timeout, keys = _seconds(config, "ZFLAKE_TIMEOUT", 5.0), config.get("ZFLAKE_KEYS")
    if mode == "client":
        return Client(endpoints, timeout=timeout, route=config.get("ZFLAKE_ROUTE", "auto"), keys=keys)
    idle = _seconds(config, "ZFLAKE_IDLE", 600.0)
    return LeasedGenerator(endpoints, timeout=timeout, idle=idle, keys=keys)


def _seconds(config: Mapping[str, Any], key: str, default: float) -> float:
    value = config.get(key, default)
    try:
        return float(value)  # from the environment it comes as text
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{key} is a positive number of seconds, not {value!r}") from error
