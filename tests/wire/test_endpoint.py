"""Endpoints: a wrong one is refused when it is read, and no bind exposes or displaces anybody unasked."""

from __future__ import annotations

import errno
import os
import re
import socket
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import zmq
from hypothesis import given
from hypothesis import strategies as st

from zflake.errors import ConfigError
from zflake.wire.endpoint import DEFAULT_DELEGATOR, check_bind, parse_endpoint


@pytest.fixture
def folder() -> Iterator[Path]:
    # Not tmp_path: the path of a socket has some hundred bytes at most.
    with tempfile.TemporaryDirectory(prefix="zf") as name:
        yield Path(name)


# --- parsing ---


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        (DEFAULT_DELEGATOR, "127.0.0.1", 7410),
        ("tcp://127.0.0.1:1", "127.0.0.1", 1),
        ("tcp://localhost:65535", "localhost", 65_535),
        ("tcp://worker-1.ids_a.example.org:7411", "worker-1.ids_a.example.org", 7411),
        ("tcp://[::1]:7411", "[::1]", 7411),
        ("tcp://[2001:DB8::7]:7411", "[2001:DB8::7]", 7411),
        ("ipc:///run/zflake/delegator.sock", "", None),
        ("ipc://relative.sock", "", None),
        ("ipc://@abstract", "", None),
    ],
)
def test_an_endpoint_to_connect_to_is_taken_as_it_is(text: str, host: str, port: int | None) -> None:
    for to_bind in (False, True):
        endpoint = parse_endpoint(text, to_bind=to_bind)
        assert (str(endpoint), endpoint.host, endpoint.port) == (text, host, port)


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("tcp://*:7410", "*", 7410),
        ("tcp://127.0.0.1:*", "127.0.0.1", None),
        ("tcp://127.0.0.1:0", "127.0.0.1", None),
        ("tcp://*:*", "*", None),
        ("tcp://[::]:*", "[::]", None),
    ],
)
def test_only_an_endpoint_to_bind_may_leave_host_or_port_open(text: str, host: str, port: int | None) -> None:
    endpoint = parse_endpoint(text, to_bind=True)
    assert (endpoint.host, endpoint.port) == (host, port)
    with pytest.raises(ConfigError, match=re.escape(text)):
        parse_endpoint(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "tcp://",
        "tcp://127.0.0.1",
        "tcp://127.0.0.1:",
        "tcp://:7410",
        "127.0.0.1:7410",
        "tcp:127.0.0.1:7410",
        "TCP://127.0.0.1:7410",
        "udp://127.0.0.1:7410",
        "http://127.0.0.1:7410",
        "inproc://delegator",
        "tcp://127.0.0.1:65536",
        "tcp://127.0.0.1:99999",
        "tcp://127.0.0.1:123456",
        "tcp://127.0.0.1:-1",
        "tcp://127.0.0.1:+1",
        "tcp://127.0.0.1:http",
        "tcp://127.0.0.1:\N{FULLWIDTH DIGIT SEVEN}410",
        "tcp://127.0.0.1:\N{ARABIC-INDIC DIGIT SEVEN}410",
        "tcp://127.0.0.1:7410 ",
        " tcp://127.0.0.1:7410",
        "tcp://127.0.0.1:7410\n",
        "tcp://127.0.0.1:7410/",
        "tcp://127.0.0.1:7410,tcp://127.0.0.1:7411",
        "tcp://eth0;127.0.0.1:7410",
        "tcp://user@127.0.0.1:7410",
        "tcp://ex ample:7410",
        "tcp://::1:7410",
        "tcp://[::1:7410",
        "tcp://[]:7410",
        "tcp://[host]:7410",
        "tcp://**:7410",
        "ipc://",
        "ipc://*",
        "ipc:///run/a b",
        "ipc:///run/a\n",
        "ipc:///run/a\0b",
        "ipc:///run/\x1b[2J",
        "ipc:///run/\N{RIGHT-TO-LEFT OVERRIDE}a",
    ],
    ids=repr,
)
def test_anything_else_is_refused(text: str) -> None:
    for to_bind in (False, True):
        with pytest.raises(ConfigError):
            parse_endpoint(text, to_bind=to_bind)


@given(st.text() | st.from_regex(r"(tcp|ipc)://.*", fullmatch=True))
def test_any_text_is_an_endpoint_or_a_config_error(text: str) -> None:
    with suppress(ConfigError):
        assert str(parse_endpoint(text, to_bind=True)) == text


@pytest.mark.parametrize("text", [DEFAULT_DELEGATOR, "tcp://[::1]:7411"])
def test_only_an_address_in_brackets_is_ipv6(text: str) -> None:
    assert parse_endpoint(text).is_ipv6 == ("[" in text)


@pytest.mark.parametrize(
    ("host", "wildcard"),
    [
        ("*", True),
        ("0.0.0.0", True),
        ("[::]", True),
        ("[0:0::0]", True),
        ("127.0.0.1", False),
        ("[::1]", False),
        ("host", False),
        ("10.0.0.1", False),
    ],
)
def test_a_wildcard_is_every_way_to_write_every_interface(host: str, wildcard: bool) -> None:
    assert parse_endpoint(f"tcp://{host}:1", to_bind=True).is_wildcard is wildcard


# --- who could connect ---


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.9.10", "localhost", "[::1]"])
def test_a_loopback_address_may_be_bound(host: str) -> None:
    check_bind(parse_endpoint(f"tcp://{host}:*", to_bind=True), insecure=False)


@pytest.mark.parametrize(
    "host",
    [
        "*",
        "0.0.0.0",
        "[::]",
        "10.0.0.7",
        "192.168.1.1",
        "[2001:db8::1]",
        "[::ffff:10.0.0.7]",
        "eth0",
        "ids.example",
        "localhost.example.org",
        "127.0.0.1.example.org",
        "128.0.0.1",
        "127.1",
    ],
)
def test_an_address_that_others_reach_is_bound_only_where_that_is_meant(host: str) -> None:
    endpoint = parse_endpoint(f"tcp://{host}:7410", to_bind=True)
    with pytest.raises(ConfigError, match="--insecure"):
        check_bind(endpoint, insecure=False)
    check_bind(endpoint, insecure=True)


# --- ipc paths ---


@pytest.mark.parametrize("insecure", [False, True])
def test_an_ipc_path_at_which_zeromq_serves_is_refused(folder: Path, insecure: bool) -> None:
    endpoint = parse_endpoint(f"ipc://{folder}/s", to_bind=True)
    check_bind(endpoint, insecure=insecure)
    with zmq.Context() as context, context.socket(zmq.ROUTER) as router:
        router.bind(str(endpoint))
        with pytest.raises(ConfigError, match="in use"):
            check_bind(endpoint, insecure=insecure)
        assert (folder / "s").is_socket()


def test_an_ipc_path_whose_server_is_too_busy_to_accept_is_refused(folder: Path) -> None:
    path = str(folder / "s")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path)
        server.listen(0)
        waiting = []
        try:
            while True:  # fill the queue of connections
                waiting.append(socket.socket(socket.AF_UNIX))
                waiting[-1].setblocking(False)
                if waiting[-1].connect_ex(path) == errno.EAGAIN:
                    break
            with pytest.raises(ConfigError, match="in use"):
                check_bind(parse_endpoint(f"ipc://{path}", to_bind=True), insecure=False)
        finally:
            for client in waiting:
                client.close()


def test_an_ipc_path_with_a_socket_of_another_kind_is_refused(folder: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other:
        other.bind(str(folder / "s"))
        with pytest.raises(ConfigError, match="in use"):
            check_bind(parse_endpoint(f"ipc://{folder}/s", to_bind=True), insecure=False)


def test_an_ipc_path_that_a_dead_process_left_is_taken(folder: Path) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(folder / "s"))
        dead.listen()
    assert (folder / "s").is_socket()
    check_bind(parse_endpoint(f"ipc://{folder}/s", to_bind=True), insecure=False)


@pytest.mark.parametrize("kind", ["file", "folder", "pipe"])
def test_an_ipc_path_with_anything_but_a_socket_is_refused(folder: Path, kind: str) -> None:
    path = folder / "s"
    match kind:
        case "file":
            path.touch()
        case "folder":
            path.mkdir()
        case _:
            os.mkfifo(path)
    with pytest.raises(ConfigError, match="no socket"):
        check_bind(parse_endpoint(f"ipc://{path}", to_bind=True), insecure=False)
    assert path.exists()


def test_an_ipc_path_that_is_too_long_is_left_to_the_bind(folder: Path) -> None:
    check_bind(parse_endpoint(f"ipc://{folder}/{'s' * 5000}", to_bind=True), insecure=False)
