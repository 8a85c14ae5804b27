"""Values of options: from the command line, else the environment, else a TOML file, else the default."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeVar

import click

from zflake.core.layout import Layout, parse, parse_epoch
from zflake.errors import ConfigError
from zflake.wire.endpoint import Endpoint, parse_endpoint

_Command = TypeVar("_Command", bound=Callable[..., Any])

NOT_IN_FILES: Final = frozenset({"config", "check", "new", "accept_clock", "help", "version"})
"""Options that a TOML file must not set: `new` and `accept_clock` hold once, and a restart would say them again."""

_UNITS_MS: Final = {"ms": 1, "s": 1000, "m": 60_000, "h": 3_600_000}


class _Value(click.ParamType[Any]):
    """A parameter type made of a function that raises `ValueError` for what it can't read."""

    def __init__(self, name: str, read: Callable[[str], Any]) -> None:
        self.name = name
        self._read = read

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not isinstance(value, str | int | float) or isinstance(value, bool):
            self.fail(f"{value!r} is no {self.name}", param, ctx)
        try:
            return self._read(str(value))
        except ValueError as error:
            self.fail(str(error), param, ctx)


def read_duration_ms(text: str) -> int:
    """Milliseconds of `500ms`, `30s`, `2m` or `1h`."""
    match = re.fullmatch(r"(\d{1,9})(ms|s|m|h)", text.strip())
    if match is None:
        raise ConfigError(f"no duration {text!r}: write a number and a unit, such as 500ms, 30s, 2m or 1h")
    return int(match[1]) * _UNITS_MS[match[2]]


def read_machines(text: str) -> tuple[int, int]:
    """First and last machine ID of `A-B`."""
    match = re.fullmatch(r"(\d{1,9})-(\d{1,9})", text.strip())
    if match is None or int(match[1]) > int(match[2]):
        raise ConfigError(f"no range of machines {text!r}: write the first and the last, such as 0-1023")
    return int(match[1]), int(match[2])


def read_http(text: str) -> Endpoint:
    """The endpoint of `tcp://host:port` or `http://host:port`."""
    endpoint = parse_endpoint(text.replace("http://", "tcp://", 1), to_bind=True)
    if not endpoint.host:
        raise ConfigError(
            f"no address for HTTP in {text!r}: write tcp://host:port, such as tcp://127.0.0.1:9410"
        )
    return endpoint


ENDPOINT: Final = _Value("endpoint", parse_endpoint)
BIND: Final = _Value("endpoint", partial(parse_endpoint, to_bind=True))
LAYOUT: Final = _Value("layout", parse)
EPOCH: Final = _Value("epoch", parse_epoch)
DURATION: Final = _Value("duration", read_duration_ms)
HTTP: Final = _Value("address", read_http)
MACHINES: Final = _Value("range", read_machines)


def choose_layout(layout: Layout | None, epoch_ms: int | None, default: Layout) -> Layout:
    """The layout that `--layout` and `--epoch` name together."""
    chosen = layout or default
    return chosen if epoch_ms is None else chosen.with_epoch(epoch_ms)


def daemon_options(command: _Command) -> _Command:
    """Add the options that both daemons have."""
    for option in reversed(
        [
            click.option(
                "--config",
                type=click.Path(dir_okay=False, path_type=Path),
                is_eager=True,
                expose_value=False,
                callback=_load,
                help="A TOML file of options; unknown keys are refused.",
            ),
            click.option(
                "--check", is_flag=True, allow_from_autoenv=False, help="Check the options and exit."
            ),
            click.option(
                "--keys",
                type=click.Path(file_okay=False, path_type=Path),
                metavar="DIR",
                help="The folder of its keys, as zflake keygen makes it: who comes must then have a key, too.",
            ),
            click.option(
                "--insecure",
                is_flag=True,
                help="Allow binding an address that other machines reach, without keys.",
            ),
            click.option(
                "--http", type=HTTP, metavar="ENDPOINT", help="Where to serve /livez, /readyz and /metrics."
            ),
            click.option(
                "--follow-stdin",
                is_flag=True,
                help="Stop when standard input ends, for a supervisor that holds the other end.",
            ),
            click.option(
                "--log-format", type=click.Choice(["text", "json"]), default="text", show_default=True
            ),
            click.option(
                "--log-level",
                type=click.Choice(["debug", "info", "warning", "error"]),
                default="info",
                show_default=True,
            ),
        ]
    ):
        command = option(command)
    return command


def _load(ctx: click.Context, _param: click.Parameter, path: Path | None) -> None:
    if path is None:
        return
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"can't read {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is no TOML file: {error}") from error
    values = {key.replace("-", "_"): value for key, value in values.items()}
    known = {param.name for param in ctx.command.params if param.name} - NOT_IN_FILES
    if unknown := sorted(values.keys() - known):
        raise ConfigError(
            f"{path} has unknown keys: {', '.join(unknown)}; known are {', '.join(sorted(k for k in known if k))}"
        )
    ctx.default_map = {**(ctx.default_map or {}), **values}
