"""The promises of the commands: one clear line for each mistake, nothing changed by it; and what they print."""

from __future__ import annotations

import json
import logging
import os
import socket
import sqlite3
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any, Final

import pytest

import zflake
from tests.conftest import Scripts
from tests.servers import free_port
from tests.system.conftest import Cluster, start_cluster
from tests.system.daemons import WAIT_S, Daemons, complaint, environment, names_of, printed, tool, until
from zflake.cli.conduct import _Text
from zflake.cli.status import Rates, ask_status, live_view, plain_console
from zflake.core.layout import DEFAULT
from zflake.errors import ZflakeError
from zflake.wire.codec import encode_error, encode_result
from zflake.wire.methods import Method

TOOL: Final = "zflake"
DELEGATOR: Final = "zflake.cli.delegator"
WORKER: Final = "zflake.cli.worker"
KUBERNETES: Final = {
    "ZFLAKE_PORT": "tcp://10.0.0.1:7410",
    "ZFLAKE_PORT_7410_TCP_PORT": "7410",
    "ZFLAKE_SERVICE_HOST": "10.0.0.1",
    "ZFLAKE_SERVICE_PORT": "7410",
    "ZFLAKE_DELEGATOR_PORT": "tcp://10.0.0.2:7410",
    "ZFLAKE_DELEGATOR_SERVICE_HOST": "10.0.0.2",
    "ZFLAKE_WORKER_PORT": "tcp://10.0.0.3:7410",
    "ZFLAKE_WORKER_SERVICE_PORT": "7411",
    "ZFLAKE_NONSENSE": "1",
}
"""The variables that Kubernetes sets for Services of these names, and an unknown one."""


def contents(folder: Path) -> dict[str, bytes | None]:
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


def refusal(
    module: str, *argv: str, folder: Path, env: Mapping[str, str] | None = None, silently: bool = True
) -> str:
    """Run a command that must be refused; gives the one line that it says about it."""
    before = contents(folder)
    line = complaint(*argv, codes=(1, 2), module=module, folder=folder, env=env)
    if silently:
        assert contents(folder) == before
    return line


@pytest.fixture
def taken() -> Iterator[str]:
    """An endpoint at which another process serves."""
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        yield f"tcp://127.0.0.1:{server.getsockname()[1]}"


def _shown(value: object) -> str:
    return " ".join(value)[:30] if isinstance(value, list) else str(value).removeprefix("zflake.cli.")


# --- mistakes ---


@pytest.mark.parametrize(
    ("words", "argv"),
    [
        ("No such command", ["fly"]),
        ("--bogus", ["next", "--bogus"]),
        ("0", ["next", "-n", "0"]),
        ("-1", ["next", "-n", "-1"]),
        ("ten", ["next", "-n", "ten"]),
        ("1000000000", ["next", "-n", "1000000000"]),
        ("nonsense", ["next", "--to", "nonsense"]),
        ("99999", ["next", "--to", "tcp://127.0.0.1:99999"]),
        ("can be bound but not connected to", ["next", "--to", "tcp://*:7410"]),
        ("sideways", ["next", "--route", "sideways"]),
        ("roman", ["next", "--format", "roman"]),
        ("soon", ["next", "--timeout", "soon"]),
        ("positive", ["next", "--timeout", "0s"]),
        ("ID", ["decode"]),
        ("garbage", ["decode", "garbage"]),
        ("18446744073709551616", ["decode", "18446744073709551616"]),
        ("64 bits", ["decode", "9" * 5000]),
        ("-5", ["decode", "-5"]),
        ("-5", ["decode", "--", "-5"]),
        ("0x", ["decode", "0x"]),
        ("64 bits", ["decode", "0x1" + "0" * 16]),
        ("64 bits", ["decode", "Z" * 13]),
        ("٣", ["decode", "٣"]),
        ("nope", ["decode", "1", "--layout", "nope"]),
        ("someday", ["decode", "1", "--epoch", "someday"]),
        ("nonsense", ["status", "--to", "nonsense"]),
        ("0", ["up", "--workers", "0"]),
    ],
    ids=_shown,
)
def test_the_tool_refuses_a_mistake_in_one_line(words: str, argv: list[str], tmp_path: Path) -> None:
    line = refusal(TOOL, *argv, folder=tmp_path)
    assert line.startswith("zflake: ")
    assert words in line


@pytest.mark.parametrize(
    ("module", "words", "argv"),
    [
        (DELEGATOR, "--bogus", ["--bogus"]),
        (DELEGATOR, "nonsense", ["--bind", "nonsense"]),
        (DELEGATOR, "--insecure", ["--bind", "tcp://192.0.2.1:7410"]),
        (DELEGATOR, "no folder", ["--bind", "tcp://127.0.0.1:*", "--store", "sqlite:///missing/zflake.db"]),
        (DELEGATOR, "5", ["--ttl", "5"]),
        (DELEGATOR, "5-1", ["--machines", "5-1"]),
        (DELEGATOR, "nope", ["--layout", "nope"]),
        (DELEGATOR, "someday", ["--epoch", "someday"]),
        (DELEGATOR, "missing.toml", ["--config", "missing.toml"]),
        (DELEGATOR, "xml", ["--log-format", "xml"]),
        (WORKER, "--bogus", ["--bogus"]),
        (WORKER, "nonsense", ["--delegator", "nonsense"]),
        (WORKER, "can be bound but not connected to", ["--delegator", "tcp://127.0.0.1:*"]),
        (WORKER, "-1", ["--machine", "-1"]),
        (WORKER, "missing.toml", ["--config", "missing.toml"]),
    ],
    ids=_shown,
)
def test_a_daemon_refuses_a_mistake_in_one_line(
    module: str, words: str, argv: list[str], tmp_path: Path
) -> None:
    line = refusal(module, *argv, folder=tmp_path)
    assert line.startswith("zflake-")
    assert words in line


@pytest.mark.parametrize("check", [False, True], ids=["run", "check"])
@pytest.mark.parametrize(
    ("module", "words", "argv"),
    [
        (DELEGATOR, "--insecure", ["--bind", "tcp://0.0.0.0:0"]),
        (DELEGATOR, "mongodb", ["--store", "mongodb://localhost"]),
        (DELEGATOR, "at least", ["--ttl", "10ms"]),
        (DELEGATOR, "0-127", ["--layout", "clawflake", "--machines", "0-128"]),
        (DELEGATOR, "--insecure", ["--http", "http://0.0.0.0:9410"]),
        (WORKER, "--insecure", ["--bind", "tcp://*:*"]),
        (WORKER, "--insecure", ["--http", "tcp://[::]:9410"]),
        (WORKER, "--advertise", ["--bind", "tcp://0.0.0.0:0", "--insecure"]),
        (WORKER, "advertise one host", ["--advertise", "tcp://*:7411"]),
        (WORKER, "1024", ["--machine", "1024"]),
        (WORKER, "not both", ["--machine", "1", "--delegator", "tcp://127.0.0.1:7410"]),
        (WORKER, "--layout", ["--epoch", "0"]),
    ],
    ids=_shown,
)
def test_check_refuses_what_a_start_would_refuse(
    module: str, words: str, argv: list[str], check: bool, tmp_path: Path
) -> None:
    line = refusal(module, *argv, *(["--check"] if check else []), folder=tmp_path)
    assert words in line


@pytest.mark.parametrize(
    ("words", "argv"),
    [("0-1023", ["--machines", "0-1024"]), ("it is not that time now", ["--epoch", "2990-01-01"])],
    ids=_shown,
)
def test_a_mistake_that_only_the_store_can_tell_is_refused_in_one_line(
    words: str, argv: list[str], tmp_path: Path
) -> None:
    assert words in _delegator_refusal(tmp_path, *argv)
    with closing(sqlite3.connect(tmp_path / "zflake.db")) as db:
        assert db.execute("SELECT COUNT(*) FROM meta").fetchone() == (0,), "the store is as good as new"


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ("no TOML file", "bind = = 1"),
        ("no TOML file", "bind = '\ud800'"),
        ("unknown keys: new", "new = true"),
        ("unknown keys: section", "[section]\nbind = 1"),
        ("nonsense", 'bind = "nonsense"'),
        ("True", "bind = true"),
        ("no endpoint", 'bind = ["tcp://127.0.0.1:*"]'),
        ("--insecure", 'bind = "tcp://0.0.0.0:1"'),
        ("xml", 'log-format = "xml"'),
        ("perhaps", 'insecure = "perhaps"'),
    ],
)
def test_a_bad_file_of_options_is_refused_in_one_line(words: str, text: str, tmp_path: Path) -> None:
    (tmp_path / "options.toml").write_bytes(text.encode(errors="surrogatepass"))
    line = refusal(DELEGATOR, "--config", "options.toml", "--check", folder=tmp_path)
    assert words in line


@pytest.mark.parametrize("module", [DELEGATOR, WORKER])
def test_a_port_in_use_is_refused_in_one_line(module: str, taken: str, tmp_path: Path) -> None:
    line = refusal(module, "--bind", taken, folder=tmp_path)
    assert taken in line
    assert "in use" in line


@pytest.mark.parametrize("module", [DELEGATOR, WORKER])
def test_check_accepts_what_is_sound(module: str, tmp_path: Path) -> None:
    (tmp_path / "options.toml").write_text('bind = "tcp://127.0.0.1:*"\nlog-format = "json"\n')
    env = KUBERNETES | {"ZFLAKE_DELEGATOR_NEW": "an option that no variable sets"}
    for argv in ([], ["--config", "options.toml"]):
        done = tool(*argv, "--check", module=module, folder=tmp_path, env=env)
        assert (done.returncode, done.stderr) == (0, "")
        assert "sound" in done.stdout
    assert list(contents(tmp_path)) == ["options.toml"]


# --- stores that can't be used ---


def _delegator_refusal(folder: Path, *argv: str) -> str:
    return refusal(
        DELEGATOR,
        "--bind",
        "tcp://127.0.0.1:*",
        "--store",
        "sqlite:///zflake.db",
        *argv,
        folder=folder,
        silently=False,
    )


@pytest.mark.parametrize("spoil", ["text", "folder", "another program's", "cut off", "locked up"])
def test_a_store_that_is_not_zflakes_is_refused_and_left_as_it_was(spoil: str, tmp_path: Path) -> None:
    path = tmp_path / "zflake.db"
    match spoil:
        case "text":
            path.write_text("a letter to my aunt, " * 100)
        case "folder":
            path.mkdir()
        case "another program's":
            with closing(sqlite3.connect(path)) as db:
                db.execute("CREATE TABLE cake (flavour TEXT)")
        case "cut off":
            with closing(sqlite3.connect(path)) as db:
                db.execute("PRAGMA application_id = 2053532779")
                db.execute("PRAGMA user_version = 1")
                db.execute("CREATE TABLE meta (one INTEGER)")
        case "locked up":
            if os.geteuid() == 0:
                pytest.skip("root reads everything: a store that may not be read is NOT TESTED")
            path.write_bytes(b"")
            path.chmod(0)
    before = path.read_bytes() if path.is_file() and spoil != "locked up" else None
    line = _delegator_refusal(tmp_path)
    assert "sqlite:///" in line
    assert "zflake.db" in line
    if before is not None:
        assert path.read_bytes() == before


def test_a_store_of_another_layout_or_in_use_is_refused(daemons: Daemons, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/store.db"
    argv = ("--bind", "tcp://127.0.0.1:*", "--store", url)
    delegator = daemons.delegator()
    assert delegator.address
    assert f"pid {delegator.pid}" in refusal(DELEGATOR, *argv, folder=tmp_path, silently=False)
    assert delegator.terminate() == 0

    def meta() -> list[tuple[object, ...]]:
        with closing(sqlite3.connect(tmp_path / "store.db")) as db:
            return db.execute("SELECT * FROM meta").fetchall()

    before = meta()
    for other in (["--layout", "twitter"], ["--epoch", "2021-01-01"]):
        line = refusal(DELEGATOR, *argv, *other, folder=tmp_path, silently=False)
        assert "keeps its layout for good" in line
    assert meta() == before


# --- nothing there ---


@pytest.mark.parametrize("argv", [["next"], ["status"], ["next", "--format", "json"]], ids=" ".join)
def test_no_delegator_is_one_line(argv: list[str], tmp_path: Path) -> None:
    deserted = f"tcp://127.0.0.1:{free_port()}"
    line = refusal(TOOL, *argv, "--to", deserted, "--timeout", "300ms", folder=tmp_path)
    assert deserted in line
    assert "within 0.3 s" in line


def test_no_worker_is_one_line(daemons: Daemons, tmp_path: Path) -> None:
    to = ("--to", daemons.delegator().address)
    line = refusal(TOOL, "next", *to, "--timeout", "300ms", folder=tmp_path, silently=False)
    assert "no worker" in line
    assert printed("status", *to)


# --- where options come from ---


def test_flags_go_before_environment_before_file_before_default(daemons: Daemons, tmp_path: Path) -> None:
    (tmp_path / "options.toml").write_text(
        f'bind = "tcp://127.0.0.2:*"\nstore = "sqlite:///{tmp_path}/file.db"\nttl = "7s"\nmachines = "3-5"\n'
    )
    config = ["--config", str(tmp_path / "options.toml"), "--log-format", "json"]
    env = KUBERNETES | {"ZFLAKE_DELEGATOR_BIND": "tcp://127.0.0.3:*", "ZFLAKE_DELEGATOR_MACHINES": "4-5"}
    started = [
        daemons.daemon("delegator", config),
        daemons.daemon("delegator", [*config, "--store", "memory:"], env=env),
        daemons.daemon(
            "delegator",
            [*config, "--store", "memory:", "--bind", "tcp://127.0.0.4:*", "--ttl", "8s"],
            env=env,
        ),
    ]
    assert [daemon.address.rpartition(":")[0] for daemon in started] == [
        "tcp://127.0.0.2",
        "tcp://127.0.0.3",
        "tcp://127.0.0.4",
    ]
    expected = [
        ("7000 ms", "machines 3 to 5"),
        ("7000 ms", "machines 4 to 5"),
        ("8000 ms", "machines 4 to 5"),
    ]
    for daemon, words in zip(started, expected, strict=True):
        assert all(daemon.said(word) for word in words), daemon.log()
    assert (tmp_path / "file.db").exists()


def test_the_environment_configures_worker_and_tool(daemons: Daemons) -> None:
    delegator = daemons.delegator()
    env = KUBERNETES | {
        "ZFLAKE_WORKER_DELEGATOR": delegator.address,
        "ZFLAKE_WORKER_LOG_FORMAT": "json",
        "ZFLAKE_WORKER_BIND": "tcp://127.0.0.5:*",
    }
    worker = daemons.daemon("worker", [], "by-environment", env=env)
    assert worker.address.startswith("tcp://127.0.0.5:")
    until(lambda: names_of(delegator) == ["by-environment"], "the worker to hold a machine ID")
    id_ = printed("next", env=KUBERNETES | {"ZFLAKE_TO": delegator.address})
    assert DEFAULT.decompose(int(id_))


def test_an_advertised_port_of_star_is_the_bound_one(daemons: Daemons) -> None:
    cluster = start_cluster(daemons, workers=0)
    worker = daemons.worker(
        "--bind", "tcp://*:*", "--insecure", "--advertise", "tcp://localhost:*", to=cluster.delegator
    )
    assert worker.address.startswith("tcp://localhost:")
    until(lambda: names_of(cluster.delegator), "the worker to hold a machine ID")
    assert len(printed("next", "-n", "3", "--to", cluster.delegator.address).split()) == 3


# --- what the tool prints ---


def test_a_million_ids_are_a_million_distinct_lines(cluster: Cluster) -> None:
    lines = printed("next", "-n", "1000000", "--to", cluster.delegator.address).splitlines()
    assert len(lines) == len(set(lines)) == 1_000_000
    assert {DEFAULT.decompose(int(lines[k])).machine for k in range(0, 1_000_000, 1_000)} <= set(range(1024))


@pytest.mark.parametrize("format_", ["int", "hex", "base32", "json"])
def test_every_format_reads_back_as_the_same_id(format_: str, cluster: Cluster) -> None:
    argv = ("next", "-n", "20", "--format", format_, "--to", cluster.delegator.address)
    lines = printed(*argv).splitlines()
    assert len(set(lines)) == 20
    if format_ == "json":
        objects = [json.loads(line) for line in lines]
        lines = [fields["id"] for fields in objects]
        assert all(DEFAULT.decompose(int(f["id"])).machine == f["machine"] for f in objects)
    ids = [json.loads(line)["id"] for line in printed("decode", "--json", *lines).splitlines()]
    assert ids == sorted(ids, key=int)
    assert len(set(ids)) == 20
    match format_:
        case "hex":
            assert lines == [f"0x{int(id_):016x}" for id_ in ids] == sorted(lines)
        case "base32":
            assert all(len(line) == 13 for line in lines)
            assert lines == sorted(lines)
        case _:
            assert lines == ids


def test_a_reader_that_has_enough_ends_the_tool_quietly(cluster: Cluster, tmp_path: Path) -> None:
    argv = [sys.executable, "-m", "zflake", "next", "-n", "3000000", "--to", cluster.delegator.address]
    with (
        (tmp_path / "errors").open("wb") as errors,
        subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=errors, env=environment()) as tool,
    ):
        assert tool.stdout is not None
        assert int(tool.stdout.readline())
        tool.stdout.close()
        tool.wait(WAIT_S)
    assert (tmp_path / "errors").read_text() == ""


def test_status_shows_each_worker(cluster: Cluster) -> None:
    to = ("--to", cluster.delegator.address)
    facts = json.loads(printed("status", "--json", *to))
    assert {lease["name"] for lease in facts["leases"]} == {worker.name for worker in cluster.workers}
    shown = printed("status", *to)
    for worker in cluster.workers:
        assert worker.address in shown
        assert printed("status", "--to", worker.address)


# --- text of peers ---

HOSTILE: Final = "[/boom] [bold]:bee: \u5de5"
"""A name that a lease may have: markup, an emoji's code, a character that many encodings lack."""
ESCAPE: Final = "\x1b[2J\x9b2J\rgone\x7f\u202e"
"""A text that terminals obey."""


def test_a_name_is_shown_as_it_is_wherever_people_see_it(
    daemons: Daemons, capsys: pytest.CaptureFixture[str]
) -> None:
    delegator = daemons.delegator()
    with zflake.LeasedGenerator(delegator.address, name=HOSTILE) as ids:
        id_ = str(ids.next_id())
        for command in (["status"], ["trace", id_]):
            argv = (*command, "--to", delegator.address)
            assert HOSTILE in printed(*argv)
            spelt_out = HOSTILE.encode("ascii", "backslashreplace").decode()
            assert spelt_out in printed(*argv, env={"PYTHONIOENCODING": "ascii"})
        plain_console().print(live_view(ask_status(delegator.address, WAIT_S), Rates()))
        assert HOSTILE in capsys.readouterr().out


def _lie(method: str, _params: list[Any], msgid: int) -> bytes:
    """A daemon whose every text is hostile."""
    if method == Method.CLUSTER_STATUS:
        lies = {"service": "worker", "uptime_ms": 1, "layout": None, "machine": 1, "ids": 1, "requests": 1}
        texts = dict.fromkeys(("address", "version", "pid", "state", ESCAPE), ESCAPE)
        return encode_result(msgid, lies | texts | {"parked": 0, "errors": {ESCAPE: 1}})
    return encode_error(msgid, ESCAPE, f"{ESCAPE} {method}")


def test_no_terminal_obeys_a_server(script: Scripts) -> None:
    liar = script(_lie)
    for command, words in ((["status"], "gone"), (["next"], "not a zflake daemon"), (["trace", "1"], "gone")):
        said = tool(*command, "--to", liar.address, "--timeout", "2s")
        shown = said.stdout + said.stderr
        assert words in shown
        assert all(line.isprintable() for line in shown.split("\n")), shown
    with zflake.Client(liar.address, timeout=2) as client, pytest.raises(ZflakeError) as caught:
        client.next_id()
    assert str(caught.value).isprintable()


def test_a_log_in_text_has_a_line_for_each_message() -> None:
    record = logging.LogRecord("zflake.x", logging.INFO, "", 0, "from %s", ("a\nb\x1b[2J",), None)
    assert _Text().format(record).endswith(r"INFO    x: from a\nb\x1b[2J")
