"""`zflake bench`: how fast zflake is on this machine, against the least that the same work costs.

Times depend on the machine and on what else runs there, so every figure is a ratio, both sides measured in
turns in one run.  The other side is as bare as it gets: an echo over the same sockets, a commit on the same
file.
"""

from __future__ import annotations

import os
import resource
import secrets
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
import timeit
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Final

import zmq

from zflake import clock
from zflake.cli.keygen import make_cluster
from zflake.client.sync import Client
from zflake.core.layout import DEFAULT, parse
from zflake.core.lease import TOKEN_BYTES, Acquire, Grant, Meta, Renew, Request
from zflake.core.timeline import Timeline
from zflake.delegator.clock import DelegatorClock
from zflake.delegator.executor import BATCH, LeaseExecutor
from zflake.embedded.generator import LeasedGenerator
from zflake.stores.sqlite import SqliteStore
from zflake.wire.callers import Role
from zflake.wire.codec import encode_request

REPEATS: Final = 7
DEPTH: Final = 64
HOLDERS: Final = 1024

ECHO: Final = """
import sys, zmq
router = zmq.Context().socket(zmq.ROUTER)
print("serves at tcp://127.0.0.1:%d" % router.bind_to_random_port("tcp://127.0.0.1"), file=sys.stderr, flush=True)
while True:
    router.send_multipart(router.recv_multipart())
"""


def run_bench(show: Callable[[str], None]) -> None:
    """Measure, and show a line for each figure."""
    with ExitStack() as stack:
        echo, _ = stack.enter_context(_server("-c", ECHO))
        worker, worker_pid = stack.enter_context(_server("-m", "zflake.cli.worker", "--machine", "1"))
        client = stack.enter_context(Client(worker, timeout=30, route="direct"))
        show(_line("IDs/s of one worker in runs", "the layout's limit", _bulk(client), "≥ 0.99"))
        req = stack.enter_context(stack.enter_context(zmq.Context()).socket(zmq.REQ))
        req.connect(echo)
        one = _ratio_to_echo(client.next_id, req, 3000)
        show(_line("one ID, median time", "an echo's", one, "≤ 1.15"))
        with ExitStack() as secure:
            keys = Path(secure.enter_context(tempfile.TemporaryDirectory(prefix="zflake-bench-")))
            make_cluster(keys)
            static = ("-m", "zflake.cli.worker", "--machine", "2", "--keys", str(keys / Role.DELEGATOR))
            keyed = Client(secure.enter_context(_server(*static))[0], timeout=30, keys=keys / Role.CLIENT)
            secure.enter_context(keyed)
            one = _ratio(lambda: _median_us(keyed.next_id, 3000), lambda: _median_us(client.next_id, 3000))
        show(_line("one ID with keys, median time", "one without", one, "≤ 1.3"))
        with ExitStack() as cluster:
            flags = ("--bind", "tcp://127.0.0.1:*", "--store", "memory:", "--new")
            delegator, _ = cluster.enter_context(_server("-m", "zflake.cli.delegator", *flags))
            cluster.enter_context(_server("-m", "zflake.cli.worker", "--delegator", delegator))
            broker = cluster.enter_context(Client(delegator, timeout=30, route="broker"))
            broker.next_id()
            brokered = _ratio_to_echo(broker.next_id, req, 2000)
            generator = cluster.enter_context(LeasedGenerator(delegator))
            minted = _ratio_to_package(generator)
        show(_line("one ID, brokered, median time", "an echo's", brokered, "≤ 2.3"))
        if minted is not None:
            show(_line("LeasedGenerator.next_id(), ns", "snowflake-id's", minted, "≤ 0.8"))
        body = encode_request(1, "ids.next", [1, 10_000])
        load = _ratio(lambda: _pipelined(worker, body), lambda: _pipelined(echo, body))
        show(_line(f"one-ID requests/s at depth {DEPTH}", "an echo's", load, "≥ 0.85"))
        show(f"{'a worker, resident':<42} {_resident_mb(worker_pid):.0f} MB{'':<24} (≤ 45 MB)")
    with tempfile.TemporaryDirectory(prefix="zflake-bench-") as folder:
        path = Path(folder)
        leases = _ratio(lambda: _lease_rate(path), lambda: _commit_rate(path), rounds=3)
        show(_line(f"durable renewals/s, {HOLDERS} holders", "bare commits/s", leases, "≥ 5"))
        acquires = _ratio(lambda: _acquire_us(path, 65_536), lambda: _acquire_us(path, 64), rounds=3)
        show(_line("an acquire among 65,536 machines", "among 64", acquires, "≤ 1.5"))
    show(f"{'`zflake up` to the first ID':<42} {_first_id_s():.2f} s{'':<23} (≤ 1 s)")


@contextmanager
def _server(*arguments: str) -> Iterator[tuple[str, int]]:
    """Run Python; gives the address at which it says that it serves, and its pid."""
    process = subprocess.Popen([sys.executable, *arguments], stderr=subprocess.PIPE, text=True)  # noqa: S603
    assert process.stderr is not None
    try:
        line = ""
        while "serves at " not in line:
            line = process.stderr.readline()
        yield line.rpartition("serves at ")[2].split(": ")[0].strip(), process.pid
    finally:
        process.terminate()
        process.wait()


def _ratio_to_echo(call: Callable[[], object], req: zmq.Socket[bytes], times: int) -> tuple[float, str]:
    body = encode_request(1, "ids.next", [1, 1000])

    def echo() -> None:
        req.send(body)
        req.recv()

    return _ratio(lambda: _median_us(call, times), lambda: _median_us(echo, times))


def _median_us(call: Callable[[], object], times: int) -> float:
    now_ns = time.perf_counter_ns
    took = []
    for _ in range(times):
        begun = now_ns()
        call()
        took.append(now_ns() - begun)
    return statistics.median(took) / 1000


def _ratio_to_package(generator: LeasedGenerator) -> tuple[float, str] | None:
    """Against the package `snowflake-id`, which is not thread-safe; None if it is not installed."""
    try:
        from snowflake import SnowflakeGenerator  # noqa: PLC0415
    except ImportError:
        return None
    theirs = SnowflakeGenerator(1).__next__
    return _ratio(lambda: _call_ns(generator.next_id), lambda: _call_ns(theirs))


def _call_ns(call: Callable[[], object]) -> float:
    times = 200_000
    return timeit.timeit(call, number=times) / times * 1e9


def _bulk(client: Client) -> tuple[float, str]:
    limit = DEFAULT.ids_per_tick * 1000 / DEFAULT.tick_ms
    rates = []
    for _ in range(REPEATS):
        client.next_ids(100_000)
        # Ticks that the IDs span, not time that the call took: that includes making a list of them.
        ids = client.next_ids(2_000_000)
        ticks = (ids[-1] >> DEFAULT.time_shift) - (ids[0] >> DEFAULT.time_shift) + 1
        rates.append(len(ids) / (ticks / 1000))
    return statistics.median(rates) / limit, f"{statistics.median(rates):,.0f} IDs/s"


def _pipelined(address: str, body: bytes) -> float:
    """Requests a second with `DEPTH` of them under way."""
    total = 30_000
    with zmq.Context() as context, context.socket(zmq.DEALER) as dealer:
        dealer.connect(address)
        for _ in range(DEPTH):
            dealer.send_multipart([b"", body])
        begun = time.perf_counter()
        for _ in range(total - DEPTH):
            dealer.recv_multipart()
            dealer.send_multipart([b"", body])
        for _ in range(DEPTH):
            dealer.recv_multipart()
        return total / (time.perf_counter() - begun)


def _commit_rate(folder: Path) -> float:
    total = 2000
    with closing(sqlite3.connect(folder / "bare.db", isolation_level=None)) as db:
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = FULL")
        db.execute("CREATE TABLE IF NOT EXISTS bare (key INTEGER PRIMARY KEY, value INTEGER)")
        begun = time.perf_counter()
        for i in range(total):
            db.execute("BEGIN IMMEDIATE")
            db.execute("INSERT OR REPLACE INTO bare VALUES (?, ?)", (i % HOLDERS, i))
            db.execute("COMMIT")
        return total / (time.perf_counter() - begun)


@contextmanager
def _executor(folder: Path, machines: int) -> Iterator[LeaseExecutor]:
    path = folder / f"{secrets.token_hex(4)}.db"
    store = SqliteStore(path)
    layout = parse("time:42,machine:16,sequence:6")
    meta = Meta("bench", layout, 30_000, 0, machines - 1, incarnation=store.incarnation())
    store.initialise(meta)
    delegator_clock = DelegatorClock(Timeline(layout.epoch_us + 1_000_000, clock.local_us()), layout, "bench")
    yield LeaseExecutor(store, meta, delegator_clock, wake=lambda: None)
    store.close()


def _grants(executor: LeaseExecutor, requests: list[Request]) -> list[Grant]:
    grants = []
    for at in range(0, len(requests), BATCH):
        for answer, _ in executor.settle(requests[at : at + BATCH]):
            assert isinstance(answer, Grant), answer
            grants.append(answer)
    return grants


def _token() -> bytes:
    return secrets.token_bytes(TOKEN_BYTES)


def _lease_rate(folder: Path) -> float:
    with _executor(folder, 65_536) as executor:
        held = _grants(executor, [Acquire(_token()) for _ in range(HOLDERS)])
        begun, done = time.perf_counter(), 0
        for _ in range(4):
            time.sleep(0.002)  # or it would be too early for the next window
            held = _grants(executor, [Renew(g.machine, g.token, g.gen, _token()) for g in held])
            done += len(held)
        return done / (time.perf_counter() - begun)


def _acquire_us(folder: Path, machines: int) -> float:
    with _executor(folder, machines) as executor:
        # Half of them are held already.
        _grants(executor, [Acquire(_token()) for _ in range(machines // 2)])
        return _median_us(lambda: executor.settle([Acquire(_token())]), min(30, machines // 3))


def _first_id_s() -> float:
    times = []
    for _ in range(3):
        begun = time.perf_counter()
        command = [sys.executable, "-m", "zflake", "up", "--once"]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:  # noqa: S603
            assert process.stdout is not None
            process.stdout.readline()
            times.append(time.perf_counter() - begun)
    return min(times)


def _resident_mb(pid: int) -> float:
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1])
    except OSError:
        return float("nan")
    return pages * resource.getpagesize() / 1e6


def _ratio(
    ours: Callable[[], float], bare: Callable[[], float], *, rounds: int = REPEATS
) -> tuple[float, str]:
    """The median of the rounds' ratios, and the medians of both sides."""
    pairs = [(ours(), bare()) for _ in range(rounds)]
    ratio = statistics.median(a / b for a, b in pairs)
    a, b = (statistics.median(side) for side in zip(*pairs, strict=True))
    return ratio, f"{a:,.0f} / {b:,.0f}"


def _line(what: str, against: str, figure: tuple[float, str], bar: str) -> str:
    ratio, detail = figure
    return f"{what:<42} {ratio:5.2f} x {against:<20} {detail:<22} ({bar})"


def headline() -> str:
    """The machine and the versions that were measured."""
    return f"cpus {os.cpu_count()}, python {sys.version.split()[0]}, zmq {zmq.zmq_version()}"
