"""The conduct of all commands: one line on stderr for an error, an exit code that says which kind, logs."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import logging
import resource
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, NoReturn, Protocol, TypedDict, Unpack

import click

from zflake.core.layout import iso
from zflake.daemon import Liveness, Waker
from zflake.errors import ConfigError, ZflakeError
from zflake.wire.codec import printable
from zflake.wire.endpoint import Endpoint, check_exposed
from zflake.wire.sockets import check_descriptors

FAILED: Final = 1
"""The exit code when something could not be done."""
MISUSED: Final = 2
"""The exit code when the command line, a file of options or the environment is wrong."""
INTERRUPTED: Final = 130


def run(command: click.Command) -> NoReturn:
    """Run a command as a program; environment variables for its options begin with its name."""
    name = command.name or "zflake"
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a name that the terminal's encoding lacks is spelt out
            stream.reconfigure(errors="backslashreplace")
    prefix = name.upper().replace("-", "_")
    try:
        code = command.main(prog_name=name, standalone_mode=False, auto_envvar_prefix=prefix)
    except click.exceptions.NoArgsIsHelpError as error:
        print(error.format_message(), file=sys.stderr)
        sys.exit(MISUSED)
    except click.ClickException as error:
        # click would print the usage as well; what is wrong should not drown in it.
        path = error.ctx.command_path if isinstance(error, click.UsageError) and error.ctx else None
        _say(name, error.format_message(), see=path)
        sys.exit(MISUSED)
    except click.Abort:
        sys.exit(INTERRUPTED)
    except ZflakeError as error:
        _say(name, str(error))
        sys.exit(MISUSED if isinstance(error, ConfigError) else FAILED)
    except BrokenPipeError:
        # The reader of the output has enough.  Nothing may be written any more, by the interpreter's exit either.
        sys.stdout = None
        sys.exit(FAILED)
    except OSError as error:  # such as a full disk behind the output
        _say(name, f"can't go on: {error.strerror or error}")
        sys.exit(FAILED)
    sys.exit(code if isinstance(code, int) else 0)


def _say(name: str, message: str, *, see: str | None = None) -> None:
    line = printable(" ".join(message.split()))
    print(f"{name}: {line}{f' (see {see} --help)' if see else ''}", file=sys.stderr)


class _Text(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        message = printable(record.getMessage())
        line = f"{_time(record)} {record.levelname:<7} {record.name.removeprefix('zflake.')}: {message}"
        return line if record.exc_info is None else f"{line}\n{self.formatException(record.exc_info)}"


class _Json(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": _time(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        for key in ("address", "lease"):
            if (value := getattr(record, key, None)) is not None:
                line[key] = value
        if record.exc_info is not None:
            line["trace"] = self.formatException(record.exc_info)
        return json.dumps(line)


class Daemon(Protocol):
    """A daemon, as `serve` runs it."""

    liveness: Liveness

    def run(self) -> None:
        """Serve until told to stop."""


class DaemonOptions(TypedDict):
    """The options that mean the same to both daemons, as `daemon_options` reads them."""

    check: bool
    keys: Path | None
    insecure: bool
    http: Endpoint | None
    follow_stdin: bool
    log_format: str
    log_level: str


def serve(make: Callable[[Waker], Daemon], metrics: str, **options: Unpack[DaemonOptions]) -> None:
    """Make a daemon and run it, with probes and the metrics of the module `metrics` if there is a place for them.

    With `check` the caller has checked the configuration, and nothing is made.
    """
    http = options["http"]
    if http is not None:
        check_exposed(http, insecure=options["insecure"] or options["keys"] is not None)
    if options["check"]:
        print(f"{click.get_current_context().info_name}: the configuration is sound")
        return
    set_up_logs(options["log_format"], options["log_level"])
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):  # some systems do not allow what they promise
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # a file descriptor for each peer
    check_descriptors()
    with Waker(follow_stdin=options["follow_stdin"]) as waker, contextlib.ExitStack() as stack:
        daemon = make(waker)
        if http is not None:
            from zflake.daemon.health import HealthServer  # noqa: PLC0415  (slow to load, and optional)

            measure = importlib.import_module(metrics).measure
            address = "" if http.host == "*" else http.host.strip("[]"), http.port or 0
            stack.enter_context(HealthServer(address, daemon.liveness, lambda: measure(daemon)))
        daemon.run()


def set_up_logs(kind: str, level: str) -> None:
    """Log to stderr, as `text` or as `json` lines."""
    handler = logging.StreamHandler()
    handler.setFormatter(_Json() if kind == "json" else _Text())
    logger = logging.getLogger("zflake")
    logger.handlers[:] = [handler]
    logger.propagate = False
    logger.setLevel(level.upper())


def _time(record: logging.LogRecord) -> str:
    return iso(datetime.fromtimestamp(record.created, UTC))
