"""`python -m zflake.web`: an HTTP server that gives one ID a request, to try things out.

For more than that, run `zflake.web:create_app()` under a WSGI server such as gunicorn.
"""

from __future__ import annotations

import logging
import re
import signal
import sys
from typing import Final

import click
from werkzeug.serving import make_server

from zflake.errors import ConfigError
from zflake.web import create_app

_BIND: Final = re.compile(r"(?P<host>\[[0-9a-fA-F:.]+\]|[A-Za-z0-9._-]+):(?P<port>[0-9]{1,5})")
_MAX_PORT: Final = 65_535


@click.command()
@click.option(
    "--to", "endpoints", multiple=True, metavar="ENDPOINT", help="A delegator; several times for several."
)
@click.option(
    "--bind",
    default="127.0.0.1:8000",
    show_default=True,
    metavar="HOST:PORT",
    help="Where to serve; port 0: a free one.",
)
def main(endpoints: tuple[str, ...], bind: str) -> None:
    """Serve one ID a request, as text, at /."""
    match = _BIND.fullmatch(bind)
    if match is None or int(match["port"]) > _MAX_PORT:
        raise click.UsageError(f"no address {bind!r}: write HOST:PORT, such as 127.0.0.1:8000")
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("werkzeug").setLevel(logging.WARNING)  # it logs each request
    try:
        app = create_app(endpoints or None)
    except ConfigError as error:
        raise click.UsageError(str(error)) from error
    try:
        server = make_server(match["host"].strip("[]"), int(match["port"]), app, threaded=True)
    except (OSError, OverflowError) as error:
        raise click.ClickException(f"can't bind {bind}: {error}") from error
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.stderr.write(f"serves at http://{match['host']}:{server.server_port}\n")
    sys.stderr.flush()
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        pass
    finally:
        server.server_close()
        app.extensions["zflake"].close()


if __name__ == "__main__":
    main()
