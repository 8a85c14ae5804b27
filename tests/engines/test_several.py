"""Several delegators on one store: one timeline, each machine ID held once, and any of them may fail or be cut off."""

from __future__ import annotations

import contextlib
import json
import secrets
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any, Final

import pytest

import zflake
from tests.engines.acquirer import Acquirer, Granted
from tests.engines.several import SOON_S, Pair, Site, Watch, complaints, several
from tests.places import EtcdPlace, PostgresqlPlace, RedisPlace, b64
from tests.proxy import Mode
from tests.servers import Redis, up
from tests.system.daemons import Daemon, counts_of, status_of, until
from tests.system.faketime import HOUR_S, WrongClock, clean_up_after, need_faketime
from zflake.cli.ask import ask
from zflake.cli.trace import trace_ids
from zflake.client.conversation import Ask
from zflake.client.transport import Transport
from zflake.core.layout import DEFAULT
from zflake.errors import ZflakeError
from zflake.stores import open_store
from zflake.wire.codec import Response
from zflake.wire.methods import Method, exception_of

pytestmark = pytest.mark.timeout(400)

BUDGET_S: Final = 5.0
OUTAGE_S: Final = 6.0
DRAIN_S: Final = 10.0
"""Seconds that a delegator may take to end, generously: it gives its store 2 s."""
FEW: Final = 8
"""As many lines an outage may cost in a log, not one for each failure."""
CROWD: Final = 16
EACH: Final = 64


def _now_us(endpoint: str) -> int:
    return int(ask(endpoint, Method.PING, (), BUDGET_S)["now_us"])


def _requests(delegator: Daemon, method: str) -> int:
    return int(counts_of(delegator.address)["requests"].get(method, 0))


def _held(delegator: Daemon, *names: str) -> dict[int, int]:
    """The generation of each lease that a delegator knows of, or of those of these holders alone."""
    leases = status_of(delegator.address).get("leases", ())
    return {lease["machine"]: lease["gen"] for lease in leases if not names or lease["name"] in names}


def _names(pair: Pair) -> list[str]:
    return [worker.name for worker in pair.workers]


def _asked(endpoint: str, method: Method, params: tuple[Any, ...]) -> Any:
    """The result of a lease request, which is none that people are shown."""
    with contextlib.closing(Transport()) as transport:
        outcome = until(lambda: transport.ask(Ask(endpoint, method, params, BUDGET_S)), "an answer")
    assert isinstance(outcome, Response)
    if outcome.error is not None:
        raise exception_of(outcome.error)
    return outcome.result


def _acquire(delegator: Daemon, name: str = "x", token: bytes = b"") -> Any:
    """A window that no holder will use; it is left to run out."""
    params = (token or secrets.token_bytes(16), name, "host", 1, "")
    return _asked(delegator.address, Method.LEASE_ACQUIRE, params)


def _generator(*addresses: str, timeout: float = BUDGET_S, name: str = "") -> zflake.LeasedGenerator:
    return zflake.LeasedGenerator(addresses, timeout=timeout, name=name)


# --- as it should be ---


@several()
def test_each_delegator_shows_both_and_holds_each_machine_once(site: Site) -> None:
    pair = site.healthy()
    statuses = [status_of(address) for address in pair.addresses]
    for status in statuses:
        # Those that have gone are shown for a minute.
        assert {mark["address"] for mark in status["delegators"]} >= set(pair.addresses)
        assert len({mark["name"] for mark in status["delegators"]}) == len(status["delegators"])
        assert all(abs(mark["lead_ms"]) < 1_000 for mark in status["delegators"])
    assert len({status["store_id"] for status in statuses}) == 1
    held = [_held(delegator, *_names(pair)).keys() for delegator in pair.delegators]
    assert held[0] == held[1]
    assert len(held[0]) == len(pair.workers)
    skews = [_now_us(address) - _now_us(pair.addresses[0]) for address in pair.addresses]
    assert all(abs(skew) < SOON_S * 1e6 for skew in skews)


@several()
def test_requests_are_brokered_through_either_delegator_to_all_workers(site: Site) -> None:
    pair = site.healthy()
    ids: list[int] = []
    for delegator in pair.delegators:
        before = counts_of(delegator.address)["broker"]["brokered"]
        with zflake.Client(delegator.address, route="broker") as client:
            ids += [client.next_id() for _ in range(100)]
        assert counts_of(delegator.address)["broker"]["brokered"] >= before + 100
        assert {DEFAULT.decompose(id_).machine for id_ in ids[-100:]} == _held(
            delegator, *_names(pair)
        ).keys()
    assert len(set(ids)) == 200


@several()
def test_a_lease_from_one_is_known_renewed_traced_and_given_back_at_the_other(site: Site) -> None:
    first, second = site.healthy().delegators
    token, next_, more = (secrets.token_bytes(16) for _ in range(3))
    name = f"mover-{token.hex()}"
    grant, again = (_acquire(delegator, name, token) for delegator in (first, second))
    machine, store_id = grant["machine"], grant["store_id"]
    assert {**again, "now_us": 0} == {**grant, "now_us": 0}, "a repeat gets what is stored"
    until(lambda: _held(second, name) == {machine: grant["gen"]}, "the other to know it", within_s=BUDGET_S)

    def renew(at: Daemon, shown: bytes, gen: int, new: bytes) -> Any:
        return _asked(at.address, Method.LEASE_RENEW, (machine, shown, gen, new, None, store_id))

    time.sleep(0.5)  # the other may be that much behind, and the next window would be empty
    renewed = renew(second, token, grant["gen"], next_)
    assert renewed["start"] == grant["end"]
    with pytest.raises(zflake.LeaseLost):
        renew(first, token, grant["gen"], more)
    assert renew(first, token, grant["gen"], next_)["end"] == renewed["end"], "a repeat, elsewhere"
    id_ = DEFAULT.compose(tick=grant["start"], machine=machine, sequence=0)
    traced = [trace_ids([id_], delegator.address, BUDGET_S)[0] for delegator in (first, second)]
    assert [facts["minted_by"]["name"] for facts in traced] == [name] * 2
    _asked(first.address, Method.LEASE_RELEASE, (machine, next_, None, None))
    until(lambda: not _held(second, name), "the other to know that it is free", within_s=BUDGET_S)
    with pytest.raises(zflake.LeaseLost):
        renew(second, next_, renewed["gen"], more)


@several("redis")
def test_requests_for_ids_spread_over_the_delegators(site: Site) -> None:
    pair = site.healthy()
    before = [_requests(delegator, "ids.next") for delegator in pair.delegators]
    for _ in range(24):
        with zflake.Client(pair.addresses, route="broker") as client:
            client.next_id()
    assert all(_requests(d, "ids.next") > n for d, n in zip(pair.delegators, before, strict=True))


@several("redis")
def test_holders_spread_over_the_delegators(site: Site) -> None:
    pair = site.healthy()
    before = [_requests(delegator, "lease.acquire") for delegator in pair.delegators]
    with contextlib.ExitStack() as stack:
        for _ in range(16):
            stack.enter_context(_generator(*pair.addresses)).next_id()
    assert all(_requests(d, "lease.acquire") > n for d, n in zip(pair.delegators, before, strict=True))


# --- a delegator that is killed ---


@several()
def test_either_delegator_may_be_killed_and_no_call_fails(site: Site) -> None:
    pair = site.healthy()
    survivors = [*_names(pair), "embedded"]
    with contextlib.ExitStack() as stack:
        generator = stack.enter_context(_generator(*pair.addresses, name="embedded"))
        clients = {
            route: stack.enter_context(zflake.Client(pair.addresses, route=route, timeout=BUDGET_S))
            for route in ("auto", "broker")
        }
        calls: dict[str, Callable[[], object]] = {route: c.next_id for route, c in clients.items()}
        watch = stack.enter_context(Watch(calls | {"generator": generator.next_id}))
        watch.go_on()
        until(lambda: len(_held(pair.delegators[0], *survivors)) == 3, "all leases to be known")
        machines = _held(pair.delegators[0], *survivors).keys()
        for k in (0, 1):
            pair.delegators[k].kill()
            other = pair.delegators[1 - k]
            before = _held(other, *survivors)
            watch.go_on()
            until(partial(_all_renewed, other, survivors, before), "all to renew with the other")
            pair.restart(k)
            pair.await_workers()
            watch.go_on()
            assert _held(other, *survivors).keys() == machines
    assert watch.errors == []
    assert max(watch.slowest.values()) < BUDGET_S
    pair.check()


def _all_renewed(delegator: Daemon, names: list[str], before: dict[int, int]) -> bool:
    after = _held(delegator, *names)
    return all(after.get(machine, 0) > gen for machine, gen in before.items())


# --- a store that does not answer ---


@dataclass
class Outage:
    """Observations while a store did not answer."""

    errors: list[str] = field(default_factory=list)
    slowest: dict[str, float] = field(default_factory=dict)
    made: dict[str, int] = field(default_factory=dict)
    acquire: BaseException | None = None
    """The outcomes of acquires."""
    exit_code: int = -1
    """The exit of a delegator that was told to end meanwhile."""
    back_s: float = 0.0
    """How long it took until a lease was granted afterwards."""
    complaints: list[list[dict[str, Any]]] = field(default_factory=list)
    """Lines in each delegator's log."""
    stray: str = ""
    """Lines of a log that are none."""


def _answer(transport: Transport, question: Ask) -> None:
    deadline_s = time.monotonic() + BUDGET_S
    # A connection that takes a while to make is given up, and begun anew.
    while (response := transport.ask(question)) is None:
        assert time.monotonic() < deadline_s, "no answer"
    assert isinstance(response, Response), response
    assert response.error is None, response.error


def _observe(site: Site, outage: contextlib.AbstractContextManager[object]) -> Outage:
    """Use the shared pair while its store is away."""
    pair = site.healthy()
    seen = Outage()
    third = pair.add_delegator()
    lines = [len(delegator.events()) for delegator in pair.delegators]

    def acquire() -> None:
        with _generator(pair.addresses[0], timeout=BUDGET_S) as generator:
            try:
                generator.next_id()
            except ZflakeError as error:
                seen.acquire = error

    with contextlib.ExitStack() as stack:
        calls: dict[str, Callable[[], object]] = {}
        for k, address in enumerate(pair.addresses[:2]):
            client = stack.enter_context(zflake.Client(address, route="broker"))
            calls[f"brokered by {k}"] = client.next_id
            transport = Transport()
            stack.callback(transport.close)
            for method in (Method.PING, Method.CLUSTER_STATUS):
                calls[f"{method} of {k}"] = partial(_answer, transport, Ask(address, method, (), BUDGET_S))
        for k, worker in enumerate(pair.workers):
            client = stack.enter_context(zflake.Client(worker.address, route="direct"))
            calls[f"direct from {k}"] = client.next_id
        calls["auto"] = stack.enter_context(zflake.Client(pair.addresses[:2])).next_id
        for call in calls.values():
            call()  # connections are there before
        try:
            with outage, Watch(calls) as watch:
                began = time.monotonic()
                waiting = threading.Thread(target=acquire)
                waiting.start()
                third.signal(signal.SIGTERM)
                seen.exit_code = third.wait(DRAIN_S)
                time.sleep(max(0.0, began + OUTAGE_S - time.monotonic()))
            seen.errors, seen.slowest, seen.made = watch.errors, watch.slowest, watch.made
            began = time.monotonic()
            for address in pair.addresses[:2]:
                with _generator(address, timeout=20.0) as generator:
                    generator.next_id()
            seen.back_s = time.monotonic() - began
            waiting.join()
        finally:
            pair.drop_delegator()
    pair.await_workers()

    def recovered() -> bool:
        seen.complaints = [complaints(d, n) for d, n in zip(pair.delegators, lines[:2], strict=True)]
        return any("can be used again" in line["message"] for said in seen.complaints for line in said)

    # One that was kept waiting to the end had no time to call it an outage.
    until(recovered, "a delegator to say that its store can be used again", within_s=BUDGET_S)
    logs = [*pair.delegators, third, *pair.workers]
    seen.stray = "".join(e["message"] for d in logs for e in d.events() if e.get("level") == "stray")
    pair.check()
    return seen


@contextlib.contextmanager
def _slow_for_one_and_silent_for_the_other(site: Site) -> Any:
    slow, silent, third = site.shared.proxies
    slow.become(Mode.PASS, delay_s=2.2)
    silent.become(Mode.BLACK_HOLE)
    third.become(Mode.STALL)
    yield
    for proxy in (slow, silent, third):
        proxy.become(Mode.PASS)


@cache
def _outage(site: Site, kind: str) -> Outage:
    """Observations of such an outage, which is made once."""
    site.healthy()
    return _observe(site, site.frozen() if kind == "frozen" else _slow_for_one_and_silent_for_the_other(site))


KINDS: Final = pytest.mark.parametrize("kind", ["silent", "frozen"])


@several()
@KINDS
def test_a_store_that_does_not_answer_delays_no_id(site: Site, kind: str) -> None:
    seen = _outage(site, kind)
    assert seen.errors == [], seen.slowest
    assert min(seen.made.values()) > 20, f"too few calls to tell: {seen.made}"
    assert max(seen.slowest.values()) < SOON_S, f"{seen.slowest}"
    assert seen.exit_code == 0
    assert seen.stray == ""
    assert [len(lines) for lines in seen.complaints if len(lines) > FEW] == []


@several()
@KINDS
def test_a_store_that_answers_again_is_used_again(site: Site, kind: str) -> None:
    seen = _outage(site, kind)
    assert seen.back_s < BUDGET_S
    assert all(seen.complaints)


@several()
@KINDS
def test_an_acquire_while_the_store_does_not_answer_is_told_so(site: Site, kind: str) -> None:
    seen = _outage(site, kind)
    assert isinstance(seen.acquire, zflake.Unavailable), repr(seen.acquire)
    assert "the store" in str(seen.acquire)


@several()
def test_connections_that_are_refused_over_and_over_are_no_flood_of_lines(site: Site) -> None:
    pair = site.healthy()
    first, second = pair.delegators
    lines = len(first.events())
    pair.proxies[0].become(Mode.REFUSE)
    with Watch({"acquire": lambda: _refused_or_granted(first)}, pause_s=0.1) as watch:
        until(lambda: watch.made["acquire"] > 15 and complaints(first, lines), "acquires")
        time.sleep(2)
    pair.heal()
    assert watch.errors == []
    assert len(complaints(first, lines)) <= FEW
    assert not complaints(second, len(second.events()))
    assert pair.lost() == 0


def _refused_or_granted(delegator: Daemon) -> None:
    """One acquire that is answered, whatever the answer is."""
    with contextlib.suppress(zflake.Unavailable):
        _acquire(delegator)


# --- unknown outcomes ---


@several()
def test_answers_that_are_lost_leak_no_machine_id_and_lose_no_lease(site: Site) -> None:
    with site.pair(ttl_ms=9_000) as pair, contextlib.ExitStack() as stack:
        pair.add_workers(1)
        generators = [stack.enter_context(_generator(*pair.addresses)) for _ in range(8)]
        for generator in generators:
            generator.next_id()
        machines = [generator.machine for generator in generators]
        taken = _acquire_while_answers_are_lost(pair)
        for generator in generators:
            generator.next_id()
        assert [generator.machine for generator in generators] == machines, "each renewed what it had"
        holders = [*machines, *(granted.machine for granted in taken)]
        assert len(set(holders)) == len(holders)
        with contextlib.closing(open_store(pair.url)) as store:
            used = [record.machine for record in store.contents().records if record.gen]
        assert len(used) == len(holders) + len(pair.workers), "each used machine ID has a holder"
        renewals = sum(len(delegator.leases("renewed")) for delegator in pair.delegators)
        assert renewals > len(generators)
        pair.check()


def _acquire_while_answers_are_lost(pair: Pair) -> list[Granted]:
    """Take machine IDs through both while answers, and for a while requests, do not arrive; gives what was granted."""
    done = threading.Event()

    def take(number: int) -> list[Granted]:
        taken: list[Granted] = []
        addresses = pair.addresses[:: 1 if number else -1]
        with contextlib.closing(Acquirer(addresses, f"acquirer-{number}")) as acquirer:
            while not done.wait(0.03):
                taken += acquirer.take(1)
        return taken

    # A request that stalls for so long is given up and said again; it arrives all the same, and late.
    plan = [(Mode.NO_ANSWERS, 0.4)] * 4 + [(Mode.STALL, 3.0), (Mode.NO_ANSWERS, 2.5)]
    with ThreadPoolExecutor(2) as pool:
        takers = pool.map(take, range(2))
        for k, (mode, seconds) in enumerate(plan):
            proxy = pair.proxies[k % 2]
            proxy.become(mode)
            time.sleep(seconds)
            proxy.become(Mode.PASS)
            time.sleep(0.2)
        done.set()
        taken = [granted for each in takers for granted in each]
    assert all(proxy.lost for proxy in pair.proxies), "answers were lost"
    assert len(taken) > 8
    return taken


# --- one delegator alone is cut off ---


@several("postgresql")
def test_holders_of_a_delegator_that_is_cut_off_go_to_the_other(site: Site) -> None:
    with site.pair(ttl_ms=5_000) as pair:
        _cut_off(pair)


def _cut_off(pair: Pair) -> None:
    pair.add_workers(2)
    first, second = pair.delegators
    with contextlib.ExitStack() as stack:
        generators = [stack.enter_context(_generator(*pair.addresses)) for _ in range(4)]
        calls: dict[str, Callable[[], object]] = {
            f"generator {k}": generator.next_id for k, generator in enumerate(generators)
        }
        for name, addresses in (("both", pair.addresses), ("the one cut off", [first.address])):
            for route in ("auto", "broker"):
                client = stack.enter_context(zflake.Client(addresses, route=route, timeout=BUDGET_S))
                calls[f"{route} by {name}"] = client.next_id
        watch = stack.enter_context(Watch(calls))
        watch.go_on()
        machines = {generator.machine for generator in generators}
        until(lambda: len(_held(second)) == 6, "all leases to be known")
        before = _held(second)
        pair.proxies[0].become(Mode.BLACK_HOLE)
        # Longer than a ttl: who is not renewed by the other is out.
        time.sleep(8.0)
        watch.go_on()
        assert complaints(first), "it says so"
        after = _held(second)
        assert after.keys() == before.keys()
        assert all(after[number] > gen for number, gen in before.items())
        pair.proxies[0].become(Mode.PASS)
        pair.await_workers()
        # And it is of use again.
        with _generator(first.address) as generator:
            generator.next_id()
        watch.go_on()
        assert {generator.machine for generator in generators} == machines
    assert watch.errors == []
    assert max(watch.slowest.values()) < BUDGET_S
    pair.check()


@several("etcd", "redis")
def test_a_delegator_that_stood_still_for_longer_than_a_ttl_grants_nothing_that_others_granted(
    site: Site,
) -> None:
    with site.pair(ttl_ms=3_000) as pair:
        pair.add_workers(2)
        first, second = pair.delegators
        acquirer = Acquirer([second.address])
        with Watch({"auto": zflake.Client(pair.addresses, timeout=BUDGET_S).next_id}) as watch:
            _use(first)  # so that it remembers records
            first.signal(signal.SIGSTOP)
            time.sleep(5.0)
            taken = acquirer.take(20)
            first.signal(signal.SIGCONT)
            late = Acquirer([first.address])
            taken += late.take(20)
            pair.await_workers()
            skew_us = _now_us(first.address) - _now_us(second.address)
        assert watch.errors == []
        assert len(taken) == 40
        assert abs(skew_us) < SOON_S * 1e6
        marks = status_of(first.address)["delegators"]
        assert len(marks) == 2
        assert all(mark["marked_ms_ago"] < 10_000 for mark in marks)
        pair.check()
        for each in (acquirer, late):
            each.close()


def _use(delegator: Daemon) -> None:
    with contextlib.closing(Acquirer([delegator.address])) as acquirer:
        assert len(acquirer.take(10)) == 10


# --- very many at once ---


@several()
def test_1024_acquires_from_16_processes_through_two_delegators_get_all_machine_ids(site: Site) -> None:
    with site.pair(ttl_ms=120_000) as pair:
        begin_s = time.monotonic() + 4.0
        argv = [sys.executable, "-m", "tests.engines.acquirer"]
        processes = [
            site.daemons.process(
                [*argv, ",".join(pair.addresses[:: 1 if k % 2 else -1]), str(EACH), f"{begin_s}"]
            )
            for k in range(CROWD)
        ]
        assert [process.wait(60.0) for process in processes] == [0] * CROWD
        reports = [json.loads(process.out()) for process in processes]
        took_s = max(r["ended_s"] for r in reports) - min(r["began_s"] for r in reports)
        sys.stdout.write(f"{site.engine}: {CROWD * EACH} acquires in {took_s:.2f} s\n")
        machines = [granted[0] for report in reports for granted in report["granted"]]
        assert len(machines) == CROWD * EACH, [report["refusals"] for report in reports]
        assert sorted(machines) == list(range(CROWD * EACH))
        granted = [len(delegator.leases("acquired")) for delegator in pair.delegators]
        assert min(granted) > CROWD * EACH // 8, f"both were busy: {granted}"
        assert took_s < 60.0
        pair.check_logs()


# --- wall clocks ---


def _leads_are(pair: Pair, *hours: int) -> bool:
    """Whether every delegator shows these leads of all delegators."""
    shown = [status_of(address)["delegators"] for address in pair.addresses]
    leads = [sorted(round(mark["lead_ms"] / 1000 / HOUR_S) for mark in marks) for marks in shown]
    return leads == [list(hours)] * len(hours)


@several("redis")
def test_a_joiner_with_a_wrong_wall_clock_moves_nobody(site: Site) -> None:
    need_faketime(site.folder)
    with site.pair(ttl_ms=4_000) as pair:
        pair.add_workers(1)
        began_us = [_now_us(address) - time.time_ns() // 1000 for address in pair.addresses]
        for k, off_s in enumerate((HOUR_S, -HOUR_S)):
            clock = WrongClock(site.folder / f"joiner-{k}", off_s)
            pair.add_delegator(env=clock.env)
        until(partial(_leads_are, pair, -1, 0, 0, 1), "all to see each other")
        ahead_us = [_now_us(address) - time.time_ns() // 1000 for address in pair.addresses]
        assert all(abs(ahead - began_us[0]) < SOON_S * 1e6 for ahead in ahead_us), ahead_us
        assert pair.lost() == 0
        for process in pair.delegators[2:]:
            process.kill()
            clean_up_after(process.pid)


@several("postgresql")
def test_delegators_started_together_go_on_from_their_marks_whatever_one_wall_clock_shows(
    site: Site,
) -> None:
    need_faketime(site.folder)
    with site.pair(ttl_ms=2_000) as pair:
        pair.add_workers(1)
        clock = WrongClock(site.folder / "clock")
        pids = []

        def start_again(*off_s: int) -> None:
            """Stop both, start as many as there are clocks, the last of them wrong."""
            for delegator in pair.delegators:
                if delegator.alive:
                    delegator.terminate()
            clock.set(off_s[-1])
            for k in range(len(off_s)):
                wrong = k == len(off_s) - 1
                pids.append(pair.restart(k, env=clock.env if wrong else None).pid)

        def ahead_s(delegator: Daemon) -> float:
            return _now_us(delegator.address) / 1e6 - time.time()

        # A clock half an hour back: the time goes on from the marks.
        start_again(-HOUR_S // 2)
        assert abs(ahead_s(pair.delegators[0])) < 60, "less what it took to start"
        # Two hours back: refused, and the marks are not touched.
        start_again(-2 * HOUR_S)
        assert pair.delegators[0].wait() != 0
        assert "--accept-clock" in pair.delegators[0].log()
        # Both at once, one of them half an hour ahead: that is the latest of all clocks, and both follow it.
        start_again(0, HOUR_S // 2)
        until(lambda: all(abs(ahead_s(d) - HOUR_S / 2) < 2 * SOON_S for d in pair.delegators), "one timeline")
        pair.await_workers()
        with zflake.Client(pair.addresses, route="broker") as client:
            tick = DEFAULT.decompose(client.next_id()).tick
        assert abs((DEFAULT.epoch_ms + tick) / 1000 - time.time() - HOUR_S / 2) < 2 * SOON_S
        assert not any(worker.said("lost machine") for worker in pair.workers)
        pair.check_logs()
        for process in [*pair.retired, *pair.delegators]:
            process.kill()
            clean_up_after(process.pid)


# --- stores that are not what they were ---


def _empty(pair: Pair) -> None:
    """Do to the store what an operator should not."""
    if pair.site.engine == "redis":
        url, _, prefix = pair.url.partition("?prefix=")
        client = RedisPlace(url, prefix).client
        client.delete(*client.scan_iter(f"{prefix}*"))
    elif pair.site.engine == "etcd":
        place = EtcdPlace(pair.url, "")
        place.ask("/kv/deleterange", key=b64(f"{place.prefix}/"), range_end=b64(f"{place.prefix}0"))
    else:
        PostgresqlPlace(pair.url).execute("DROP SCHEMA zflake CASCADE")


@dataclass
class Emptied:
    """The outcome of a store that was emptied under two delegators."""

    granted: int
    """How many grants there were after it was noticed."""
    said: list[str]
    """The delegators' log lines about it."""
    again: str
    """How the next start of a delegator ended; empty if it serves."""
    rests: bool = False


@cache
def _emptying(site: Site) -> Emptied:
    """Empty a store in use, which is done once."""
    with site.pair(ttl_ms=30_000) as pair:
        return _empty_in_use(pair)


def _empty_in_use(pair: Pair) -> Emptied:
    pair.add_workers(1)
    _empty(pair)
    for delegator in pair.delegators:
        with pytest.raises(zflake.Unavailable, match="store"):
            _acquire(delegator)
        until(partial(complaints, delegator), "a line about it")
    granted = _grants(pair)
    time.sleep(2.5)  # what is written now must not spoil what comes next
    with zflake.Client(pair.addresses) as client:
        client.next_id()  # windows that are held run on
    for delegator in pair.delegators:
        with pytest.raises(zflake.Unavailable, match="store"):
            _acquire(delegator)
    for delegator in pair.delegators:
        assert delegator.terminate() == 0
    said = [line["message"] for d in pair.delegators for line in complaints(d) if line["level"] == "error"]
    again = pair.restart(0)
    try:
        until(again.find_address, "the new one to serve")
    except AssertionError as error:
        return Emptied(_grants(pair) - granted, said, str(error))
    with pytest.raises(zflake.NoFreeMachine, match="may have lost leases"):
        _acquire(again)
    return Emptied(_grants(pair) - granted, said, "", rests=_rests(again))


def _grants(pair: Pair) -> int:
    daemons = [*pair.retired, *pair.delegators]
    return sum(len(daemon.leases("acquired") + daemon.leases("renewed")) for daemon in daemons)


@several()
def test_a_store_that_was_emptied_in_use_grants_nothing_more(site: Site) -> None:
    assert _emptying(site).granted == 0


@several()
def test_delegators_whose_store_was_emptied_say_what_to_do(site: Site) -> None:
    said = _emptying(site).said
    assert len(said) >= 2
    assert all("emptied" in text and "without --new" in text for text in said), said


@several()
def test_a_store_that_was_emptied_rests_after_a_restart(site: Site) -> None:
    emptied = _emptying(site)
    assert emptied.again == ""
    assert emptied.rests


def _rests(delegator: Daemon) -> bool:
    return int(status_of(delegator.address).get("granting_in_ms", 0)) > 60_000


@several("redis")
def test_an_older_copy_of_the_store_rests_at_both_delegators_and_both_say_so(site: Site) -> None:
    with site.pair(ttl_ms=30_000) as pair:
        pair.add_workers(1)
        copy = Redis(site.folder / "copy")
        shutil.copytree(site.server.folder, copy.folder, dirs_exist_ok=True)
        with contextlib.closing(Acquirer(pair.addresses)) as acquirer:
            assert len(acquirer.take(4)) == 4  # the copy lacks these
        with up(copy):
            lines = [len(delegator.events()) for delegator in pair.delegators]
            granted = _grants(pair)
            for proxy in pair.proxies:
                proxy.point(copy.port)
            for delegator in pair.delegators:
                until(partial(_rests, delegator), "a rest")
                with pytest.raises(zflake.NoFreeMachine, match="may have lost leases"):
                    _acquire(delegator)
            assert _grants(pair) == granted
            for delegator, n in zip(pair.delegators, lines, strict=True):
                assert any("othing is granted" in line["message"] for line in complaints(delegator, n))


# --- settings ---


@several("redis")
def test_settings_that_a_joiner_brings_hold_for_all_or_are_refused(site: Site) -> None:
    with site.pair(ttl_ms=8_000) as pair:
        pair.add_workers(1)
        with pytest.raises(AssertionError, match="a store keeps its layout for good"):
            pair.add_delegator("--layout", "wide")
        assert pair.delegators.pop().wait() == 2
        pair.add_delegator("--ttl", "6s")
        until(lambda: {status_of(a).get("ttl_ms") for a in pair.addresses} == {6_000}, "all to know the ttl")
        until(
            lambda: all(lease["ends_in_ms"] < 6_500 for lease in status_of(pair.addresses[0])["leases"]),
            "a renewal by the new ttl",
        )
        pair.check()
