"""PROTOCOL.md: its bytes, its tables and its example program are what the daemons really do."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any, Final, NamedTuple

import msgpack
import pytest
import zmq

import zflake.wire
from tests.conftest import Peer, serving
from zflake.core import lessor
from zflake.core.layout import PRESETS, Field, Layout
from zflake.core.lease import TOKEN_BYTES, Acquire, Grant, Meta, Record, Release, Renew, Swap
from zflake.core.mint import Mint
from zflake.core.timeline import tick_of
from zflake.delegator.broker import CREDIT, MAX_QUEUE, TAG_BYTES, Broker, Outgoing
from zflake.delegator.directory import MISSED_US
from zflake.delegator.server import Delegator, DelegatorConfig
from zflake.delegator.start import Wishes
from zflake.wire import codec, endpoint, fields, frames, ids, sockets
from zflake.wire.cluster import LOAD, PAGE, check_heartbeat, check_leave, check_ready
from zflake.wire.codec import (
    REQUEST_HEAD,
    RESPONSE_HEAD,
    Response,
    decode_request,
    decode_response,
    encode_error,
    encode_request,
    encode_result,
)
from zflake.wire.dispatch import METHODS
from zflake.wire.endpoint import parse_endpoint
from zflake.wire.fields import timeline_us
from zflake.wire.ids import check_next, check_run
from zflake.wire.leases import lease_answer
from zflake.wire.methods import Code, Method
from zflake.wire.sockets import address_of
from zflake.worker.link import HEARTBEAT_US
from zflake.worker.server import Worker, WorkerConfig

TEXT: Final = (Path(zflake.wire.__file__).parent / "PROTOCOL.md").read_text(encoding="utf-8")
DAEMONS: Final = ("delegator", "worker")

# Four IDs a tick: whoever wants ten has to top up.
SMALL: Final = Layout("small", (Field("time", 45), Field("machine", 4), Field("sequence", 2)))


# --- reading the document ---


def section(title: str) -> str:
    """What stands under a heading, up to the next one of its rank or above."""
    match = re.search(rf"^(#+) {re.escape(title)}\n(.*?)(?=^#{{1,3}} |\Z)", TEXT, re.DOTALL | re.MULTILINE)
    assert match is not None, f"PROTOCOL.md has no section {title}"
    return match[2]


def table(title: str, *, at: int = 0) -> list[dict[str, str]]:
    """The rows of a section's table, by the names of its columns."""
    tables = re.findall(r"(?:^\|.*\n)+", section(title), re.MULTILINE)
    header, _, *rows = (
        [cell.strip() for cell in line.strip("|").split(" | ")] for line in tables[at].splitlines()
    )
    header = [cell.strip(" |") for cell in header]
    return [dict(zip(header, (cell.strip("| `") for cell in row), strict=True)) for row in rows]


def keys(title: str, *, of: str | None = None) -> set[str]:
    """The keys that a section's table gives to a result, or to the result of one daemon."""
    return {row["key"] for row in table(title) if of is None or row[of] == "yes"}


class Dump(NamedTuple):
    body: bytes
    value: Any


def _from_json(pairs: dict[str, Any]) -> Any:
    return bytes.fromhex(pairs["h'"]) if set(pairs) == {"h'"} else pairs


def read_dump(text: str) -> Dump:
    *lines, value = text.splitlines()
    assert value.startswith("value ")
    # The hexadecimal column ends where three spaces follow it.
    column = [re.split(r" {3}", line.strip(), maxsplit=1)[0] for line in lines]
    notation = re.sub(r"h'([0-9a-f]*)'", r"""{"h'": "\1"}""", value.removeprefix("value "))
    return Dump(bytes.fromhex("".join(column)), json.loads(notation, object_hook=_from_json))


DUMPS: Final = {match[1]: read_dump(match[2]) for match in re.finditer(r"```hex (.*)\n((?:.*\n)*?)```", TEXT)}
REQUESTS: Final = [name for name in DUMPS if name.endswith(" request")]
# Messages with their frames, one a line: [tag, empty frame, body].
FRAMES: Final = {
    match[1]: [bytes.fromhex(re.split(r" {3}", line, maxsplit=1)[0]) for line in match[2].splitlines()]
    for match in re.finditer(r"```frames (.*)\n((?:.*\n)*?)```", TEXT)
}
RESULTS: Final = [name for name in DUMPS if name.endswith(" response") and name != "error response"]


def request_of(method: str) -> list[Any]:
    _, name, params = decode_request(DUMPS[f"{method} request"].body)
    assert name == method
    return params


def result_of(method: str) -> Any:
    return decode_response(DUMPS[f"{method} response"].body).result


# --- a real delegator and a real worker ---


@contextmanager
def running(make: type[Worker | Delegator], config: Any) -> Iterator[Peer]:
    with serving(lambda waker: make(config, waker)) as daemon, zmq.Context() as context:
        peer = Peer(context, daemon.address)
        with peer.socket:
            yield peer


def ask_raw(peer: Peer, body: bytes) -> Response:
    peer.send(b"", body)
    assert peer.socket.poll(10_000)
    empty, answer = peer.socket.recv_multipart()
    assert empty == b""
    return decode_response(answer)


LOOPBACK: Final = parse_endpoint("tcp://127.0.0.1:*", to_bind=True)


@pytest.fixture(scope="module")
def worker() -> Iterator[Peer]:
    with running(Worker, WorkerConfig((), LOOPBACK, name="w", machine=5, layout=SMALL)) as peer:
        yield peer


@pytest.fixture
def delegator() -> Iterator[Peer]:
    wishes = Wishes(machines=(3, 3), new=True)
    with running(Delegator, DelegatorConfig(LOOPBACK, "memory:", wishes)) as peer:
        yield peer


@pytest.fixture(params=DAEMONS)
def daemon(request: pytest.FixtureRequest) -> Iterator[tuple[str, Peer]]:
    yield request.param, request.getfixturevalue(request.param)  # noqa: PT022


# --- bytes ---


def test_every_method_has_a_dump_of_its_request_and_of_its_response_and_an_error_has_one() -> None:
    assert set(DUMPS) == {f"{m} {w}" for m in Method for w in ("request", "response")} | {"error response"}


@pytest.mark.parametrize("name", REQUESTS)
def test_a_dumped_request_is_what_the_codec_makes_and_reads(name: str) -> None:
    body, value = DUMPS[name]
    kind, msgid, method, params = value
    assert kind == 0
    assert encode_request(msgid, method, params) == body
    assert decode_request(body) == (msgid, method, params)


@pytest.mark.parametrize("name", RESULTS)
def test_a_dumped_result_is_what_the_codec_makes_and_reads(name: str) -> None:
    body, value = DUMPS[name]
    kind, msgid, error, result = value
    assert (kind, error) == (1, None)
    assert encode_result(msgid, result) == body
    assert decode_response(body) == (msgid, None, result)
    assert msgid == decode_request(DUMPS[name.replace("response", "request")].body)[0]


def test_the_dumped_error_is_what_the_codec_makes_and_reads() -> None:
    body, (kind, msgid, error, result) = DUMPS["error response"]
    assert (kind, result) == (1, None)
    assert encode_error(msgid, *error) == body
    assert decode_response(body).error == codec.WireError(Code(error[0]), *error[1:])


def test_the_dumped_params_pass_the_daemons_checks() -> None:
    for method in Method:
        METHODS[method].check(request_of(method))


def test_the_dumped_worker_shows_the_machine_and_the_token_of_the_dumped_grant() -> None:
    grant = result_of("lease.acquire")
    assert check_ready(request_of("worker.ready")) == (grant["machine"], grant["token"])
    assert check_heartbeat(request_of("worker.beat")).token == grant["token"]
    assert check_leave(request_of("worker.leave")) == grant["token"]


def test_the_brokered_frames_are_what_the_broker_sends_and_takes() -> None:
    tag, empty, request = FRAMES["brokered request"]
    assert (len(tag), empty) == (TAG_BYTES, b"")
    client = [b"client", b""]
    msgid, _, params = decode_request(DUMPS["ids.next request"].body)
    count, timeout_ms, _ = check_next(params)
    _, _, (_, left_ms) = decode_request(request)
    broker = Broker(lambda _size: tag)
    token = request_of("worker.ready")[1]
    broker.join(b"worker", token, 0)
    broker.submit(client, msgid, count, timeout_ms * 1000, (timeout_ms - left_ms) * 1000)
    assert broker.outbox == [Outgoing([b"worker", tag, b""], request, b"worker")]
    *envelope, response = FRAMES["brokered response"]
    assert envelope == [token + tag, b""]
    assert response == DUMPS["ids.next response"].body
    assert (request[:2], response[:2]) == (REQUEST_HEAD, RESPONSE_HEAD)
    broker.outbox.clear()
    broker.answer(b"worker", envelope, response, 0)
    assert broker.outbox == [Outgoing(client, response, None)]


def test_the_explanations_beside_the_bytes_agree_with_them() -> None:
    # Each line of a dump that explains a value in words must stand for that very value.
    for match in re.finditer(r"```hex (.*)\n((?:.*\n)*?)```", TEXT):
        for line in match[2].splitlines()[:-1]:
            column, words = re.split(r" {3,}", line.strip(), maxsplit=1)
            head = column.split()[-1]
            said = words.rpartition(": ")[2] if len(column.split()) == 2 else words
            said = {
                "request": "0",
                "response": "1",
                "no error": "null",
                "no result": "null",
                "nil": "null",
            }.get(said, said.removeprefix("msgid "))
            if shape := re.fullmatch(r"(array|map) of (\d+)", said):
                start = {"array": 0x90, "map": 0x80}[shape[1]]
                count = int(shape[2])
                wide = {"array": "dc", "map": "de"}[shape[1]] + f"{count:04x}"
                assert head == (f"{start + count:02x}" if count < 16 else wide)
            else:
                body, value = read_dump(f"{head}\nvalue {said}")
                assert msgpack.packb(value) == body, line


def test_the_lease_in_the_dumps_is_what_the_lessor_grants() -> None:
    layout = PRESETS["snowcloud"]
    meta = Meta(result_of("cluster.status")["store_id"], layout, 30_000, 0, layout.machines - 1)

    def now(method: str) -> int:
        now_us = timeline_us(result_of(method))
        assert now_us is not None
        return tick_of(layout, now_us)

    acquire, renew, release = (METHODS[m].check(request_of(m)) for m in Method if m.startswith("lease."))
    assert isinstance(acquire, Acquire)
    assert isinstance(renew, Renew)
    assert isinstance(release, Release)

    tick = now("lease.acquire")
    swap = lessor.acquire(meta, tick, acquire, repeat=None, lowest=[Record(5)], pick=lambda _: 0)
    assert isinstance(swap, Swap)
    granted = lessor.acquire(meta, tick, acquire, repeat=swap.new, lowest=[], pick=lambda _: 0)
    assert granted == lease_answer(Method.LEASE_ACQUIRE, None, result_of("lease.acquire"))

    tick = now("lease.renew")
    swap = lessor.renew(meta, tick, renew, record=swap.new)
    assert isinstance(swap, Swap)
    renewed = lessor.renew(meta, tick, renew, record=swap.new)
    assert renewed == lease_answer(Method.LEASE_RENEW, None, result_of("lease.renew"))

    swap = lessor.release(meta, now("lease.release"), release, record=swap.new)
    assert isinstance(swap, Swap)
    released = result_of("lease.release")
    assert (swap.new.machine, swap.new.fence) == (released["machine"], released["fence"])


def test_the_run_in_the_dumps_is_what_a_mint_with_that_lease_mints() -> None:
    grant = lease_answer(Method.LEASE_ACQUIRE, None, result_of("lease.acquire"))
    assert isinstance(grant, Grant)
    count, _, _ = check_next(request_of("ids.next"))
    run = check_run(result_of("ids.next"), count)
    mint = Mint(grant.layout, grant.machine)
    mint.grant(grant.start, grant.end)
    assert mint.take(grant.layout.decompose(run[0]).tick, count) == run


# --- tables ---


def test_every_method_is_in_the_table_and_has_a_section_and_no_other_is() -> None:
    assert [row["method"] for row in table("Methods")] == list(Method)
    titles = re.findall(r"^### `(.*)`$", TEXT, re.MULTILINE)
    assert titles == list(Method)


def test_every_code_is_in_the_table_and_no_other_is() -> None:
    assert [row["code"] for row in table("Errors")] == list(Code)


def test_a_daemon_has_the_methods_that_the_table_gives_it(daemon: tuple[str, Peer]) -> None:
    name, peer = daemon
    for row in table("Methods"):
        error = peer.ask(row["method"], *[None] * 9).error  # too many params for any
        assert error is not None
        known = error.code == Code.BAD_REQUEST
        assert known or error.code == Code.UNKNOWN_METHOD
        assert row[name] == ("yes" if known else "no"), row
        if known and row["params"] != "[]":
            assert row["params"] in error.message
    error = peer.ask("cluster.unknown").error
    assert error is not None
    assert error.code == Code.UNKNOWN_METHOD


@pytest.mark.parametrize("method", ["hello", "cluster.status"])
def test_a_daemon_says_of_itself_what_the_table_lists(method: str, daemon: tuple[str, Peer]) -> None:
    name, peer = daemon
    listed = keys("`hello`", of=name)
    if method == "cluster.status":
        listed |= keys("`cluster.status`", of=name)
    result = peer.ask(method).result
    assert set(result) == listed
    assert result["service"] == name
    if name == "worker":
        assert set(result_of(method)) == listed


def test_the_version_in_hello_is_the_document_s(daemon: tuple[str, Peer]) -> None:
    _, peer = daemon
    assert TEXT.startswith(f"# The zflake protocol, version {peer.ask('hello').result['protocol']}\n")


def test_ping_gives_the_time_and_nothing_else(daemon: tuple[str, Peer]) -> None:
    _, peer = daemon
    assert set(peer.ask("ping").result) == {"now_us"} == set(result_of("ping"))


def test_a_lease_s_answers_and_the_directory_have_the_keys_that_the_tables_list(delegator: Peer) -> None:
    a, b = b"a" * TOKEN_BYTES, b"b" * TOKEN_BYTES
    _, name, host, pid, address = request_of("lease.acquire")
    granted = delegator.ask("lease.acquire", a, name, host, pid, address).result
    listed = {row["key"] for row in table("`lease.acquire`", at=1)}
    assert set(granted) == listed == set(result_of("lease.acquire")) == set(result_of("lease.renew"))
    assert [row["param"] for row in table("`lease.acquire`")] == ["next", "name", "host", "pid", "address"]
    assert set(granted["layout"]) == keys("Values and units")

    assert delegator.ask("cluster.workers").result["workers"] == []
    (lease,) = delegator.ask("cluster.status").result["leases"]
    assert lease["worker"] is None
    refused(delegator.ask("worker.beat", dict.fromkeys(LOAD, 0), a), Code.NOT_READY)
    refused(delegator.ask("worker.ready", 3, b), Code.NOT_READY)
    load, _ = request_of("worker.beat")
    assert set(load) == set(LOAD) == keys("`worker.beat`")
    for method, *params in [("worker.ready", 3, a), ("worker.beat", load, a)]:
        said = delegator.ask(str(method), *params).result
        assert set(said) == {"now_us"} == set(result_of(str(method)))

    directory = delegator.ask("cluster.workers").result
    assert set(directory) == {"workers", "now_us"} == set(result_of("cluster.workers"))
    (worker,) = directory["workers"]
    assert set(worker) == keys("`cluster.workers`") == set(result_of("cluster.workers")["workers"][0])
    status = delegator.ask("cluster.status").result
    (lease,) = status["leases"]
    assert set(lease) == {*worker, "worker"}
    in_flight = {row["key"] for row in table("`cluster.status`", at=2)}
    assert set(lease["worker"]) == set(LOAD) | in_flight
    assert load.items() <= lease["worker"].items()
    assert set(status["broker"]) == {row["key"] for row in table("`cluster.status`", at=1)}
    assert status["broker"]["workers"] == 1
    refused(delegator.ask("worker.beat", load, b), Code.NOT_READY)
    assert set(delegator.ask("worker.leave", a).result) == {"now_us"} == set(result_of("worker.leave"))
    assert delegator.ask("cluster.workers").result["workers"] == []
    assert delegator.ask("worker.ready", 3, a).error is None

    # A repeat is given the same; whoever else asks finds the one machine ID of this delegator taken.
    repeat = delegator.ask("lease.acquire", a, name, host, pid, address).result
    assert repeat | {"now_us": 0} == granted | {"now_us": 0}
    refused(delegator.ask("lease.acquire", b, name, host, pid, address), Code.NO_FREE_MACHINE)
    refused(delegator.ask("lease.renew", 3, b, 1, b), Code.LOST)
    released = delegator.ask("lease.release", 3, a, None, None).result
    assert set(released) == {"machine", "fence", "now_us"} == set(result_of("lease.release"))
    refused(delegator.ask("lease.release", 3, a, None, None), Code.LOST)
    assert delegator.ask("cluster.workers").result["workers"] == []


def refused(response: Response, code: Code) -> None:
    """It was, by that code, and with a hint where the table says that there is one."""
    assert response.error is not None
    assert response.error.code == code
    (row,) = (row for row in table("Errors") if row["code"] == code)
    assert row["retry"] == ("no" if response.error.retry_after_ms is None else "yes")


def test_errors_that_a_broker_answers_carry_the_hint_that_the_table_says(delegator: Peer) -> None:
    refused(delegator.ask("ids.next", 1, 0), Code.TIMEOUT)
    refused(delegator.ask("ids.next", 1, 1000), Code.UNAVAILABLE)
    refused(delegator.ask("ids.next", 0, 1000), Code.BAD_REQUEST)


def test_errors_that_a_worker_answers_carry_the_hint_that_the_table_says(worker: Peer) -> None:
    refused(worker.ask("ids.next", 1, 0), Code.TIMEOUT)
    refused(worker.ask("ids.next", 0, 1), Code.BAD_REQUEST)
    refused(worker.ask("lease.acquire"), Code.UNKNOWN_METHOD)


def test_garbage_is_answered_as_the_document_says(daemon: tuple[str, Peer]) -> None:
    _, peer = daemon
    for body, msgid in [
        (b"", None),
        (b"\xc1", None),
        (b"\x91" * 10_000, None),
        (b"\x94\x00\x05\xa4ping", None),  # cut
        (encode_request(5, "ping", []) + b"\0", None),
        (b"\x92\x00\x05", 5),
        (b"\x94\x00\x05\xc0\x90", 5),
    ]:
        response = ask_raw(peer, body)
        refused(response, Code.BAD_REQUEST)
        assert response.msgid == msgid
    for levels in (900, 1000, 1015, 1100):
        nested = b"\x91" * levels + b"\xc0"
        for head in (b"\xa4ping\x91", b"\xa8ids.next\x92\x01", b"\xadlease.acquire\x91"):
            error = ask_raw(peer, b"\x94\x00\x05" + head + nested).error
            assert error is not None
            assert error.code in (Code.BAD_REQUEST, Code.UNKNOWN_METHOD)


def test_the_numbers_in_the_document_are_the_code_s() -> None:
    for number in (
        frames.MAX_REQUEST_BYTES,
        frames.MAX_RESPONSE_BYTES,
        codec.MAX_MSGID,
        codec.MAX_RESPONSE_ITEMS,
        ids.MAX_COUNT,
        ids.MAX_TIMEOUT_MS,
    ):
        assert f"{number:,}" in TEXT
    assert f"a queue of at most {MAX_QUEUE:,}" in TEXT
    assert f"at most {frames.MAX_HOP_BYTES} bytes each" in TEXT
    assert f"Of more than {PAGE} workers, {PAGE} are listed" in TEXT
    assert f"a page of the leases, with at most {PAGE} of them" in TEXT
    # Of its marks libzmq vouches for one half.
    assert (
        f"at least {sockets.UNTAKEN // 2} answers for a peer, those of {sockets.LARGE_BYTES:,} bytes" in TEXT
    )
    assert f"as long as they have {sockets.UNTAKEN_BYTES:,} bytes together" in TEXT
    assert f"takes no bytes for {sockets.STUCK_MS // 1000} s" in TEXT
    assert f"at most {CREDIT} requests under way" in TEXT
    assert f"not been heard of for {MISSED_US // 1000:,} ms" in TEXT
    assert f"`worker.beat` every {HEARTBEAT_US // 1000} ms" in TEXT
    assert f"begins with the bytes `{REQUEST_HEAD.hex(' ')}`" in TEXT
    assert f"begin with `{RESPONSE_HEAD.hex(' ')}`" in TEXT
    assert f"the envelope has at most {frames.MAX_ENVELOPE} frames" in TEXT
    assert f"at most {codec.MAX_REQUEST_ITEMS} elements" in TEXT
    assert f"at most {fields.MAX_TEXT} printable characters" in TEXT
    assert f"{TOKEN_BYTES} random bytes" in TEXT
    assert endpoint.DEFAULT_DELEGATOR in TEXT


def test_the_document_s_links_lead_somewhere() -> None:
    headings = re.findall(r"^#+ (.*)$", TEXT, re.MULTILINE)
    anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
    assert set(re.findall(r"\]\(#(.*?)\)", TEXT)) <= anchors


# --- the example program ---

PROGRAM: Final = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


def test_the_example_is_one_program_of_ten_lines_that_needs_pyzmq_and_msgpack_alone() -> None:
    (program,) = PROGRAM
    assert sum(bool(line) for line in program.splitlines()) == 10
    imported = {
        alias.name
        for node in ast.walk(ast.parse(program))
        if isinstance(node, ast.Import)
        for alias in node.names
    }
    assert imported == {"msgpack", "sys", "zmq"}


def test_the_example_prints_ten_ids_of_the_worker_and_tops_up(worker: Peer) -> None:
    done = run_example(worker)
    assert (done.returncode, done.stderr) == (0, "")
    ids = [int(line) for line in done.stdout.splitlines()]
    assert len(ids) == 10
    assert all(first < second for first, second in pairwise(ids))
    assert {SMALL.decompose(id_).machine for id_ in ids} == {5}
    assert len({SMALL.decompose(id_).tick for id_ in ids}) > 1


def test_the_example_says_what_went_wrong(delegator: Peer) -> None:
    done = run_example(delegator)
    assert done.returncode == 1
    assert done.stdout == ""
    assert "no worker is ready" in done.stderr


def run_example(peer: Peer) -> subprocess.CompletedProcess[str]:
    # The user's own interpreter in an empty environment: nothing of the tests' reaches the program.
    (program,) = PROGRAM
    command = [sys.executable, "-I", "-c", program, address_of(peer.socket)]
    return subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
