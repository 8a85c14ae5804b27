"""Generators in processes of their own, under gunicorn too, against a delegator that is killed."""

from __future__ import annotations

import http.client
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Final

from tests.system.daemons import Daemon, Daemons, Process, status_of, try_next, until
from zflake import LeasedGenerator, LeaseExpired, layouts

SNOWCLOUD: Final = layouts["snowcloud"]
WORKERS: Final = 4
IDS: Final = 24_000


def held(delegator: Daemon) -> dict[int, int]:
    """Machine ID and pid of those who hold a lease now."""
    return {lease["machine"]: lease["pid"] for lease in status_of(delegator.address).get("leases", ())}


def test_a_killed_delegator_is_survived_to_the_end_of_the_window_and_its_return_is_noticed_soon(
    daemons: Daemons,
) -> None:
    delegator = daemons.delegator(ttl="3s")
    address = delegator.address
    got: list[int] = []
    errors: list[tuple[float, LeaseExpired]] = []
    times: list[float] = []
    stop = threading.Event()

    def take(ids: LeasedGenerator) -> None:
        while not stop.is_set():
            try:
                got.append(ids.next_id())
                times.append(time.monotonic())
            except LeaseExpired as error:
                errors.append((time.monotonic(), error))

    with LeasedGenerator(address, timeout=0.2) as ids:
        got.append(until(lambda: try_next(ids), "the first ID"))
        machine = ids.machine
        taker = threading.Thread(target=take, args=(ids,))
        taker.start()
        try:
            time.sleep(2)  # some renewals
            delegator.kill()
            killed = time.monotonic()
            until(lambda: errors, "the window's end")
            served_for = max(t for t in times if t < errors[0][0]) - killed
            assert 1.5 < served_for < 3.5, "two thirds of the ttl at least, all of it at most"
            assert all(error.retry_after is not None and error.retry_after <= 1 for _, error in errors)
            time.sleep(1)
            again = daemons.delegator(bind=address, ttl="3s", new=False, name="again")
            until(again.find_address, "the delegator's return")
            back = time.monotonic()
            until(lambda: times[-1] > back, "IDs again")
            assert next(t for t in times if t > back) - back < 2
        finally:
            stop.set()
            taker.join()
        assert ids.machine == machine
    assert got == sorted(set(got))


# --- Flask under gunicorn ---


class Askers:
    """Threads that ask an HTTP server for IDs over connections that they keep; it may be reloaded meanwhile."""

    def __init__(self, port: int, threads: int = 12) -> None:
        self.ids: list[int] = []
        self.refused: list[int] = []
        self._port = port
        self._enough: Callable[[], bool] = lambda: False
        self._threads = [threading.Thread(target=self._ask) for _ in range(threads)]
        for thread in self._threads:
            thread.start()

    def machines(self, since: int = 0) -> set[int]:
        return {SNOWCLOUD.decompose(id_).machine for id_ in self.ids[since:]}

    def stop(self) -> None:
        self._enough = lambda: True
        for thread in self._threads:
            thread.join()

    def _ask(self) -> None:
        while not self._enough():
            connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=20)
            try:
                for _ in range(200):  # then another connection, perhaps to another process
                    connection.request("GET", "/")
                    answer = connection.getresponse()
                    body = answer.read()
                    if answer.status == 200:
                        self.ids.append(int(body))
                    else:
                        self.refused.append(answer.status)
                    if self._enough():
                        break
            except (http.client.HTTPException, OSError):
                pass  # the process behind it was replaced
            finally:
                connection.close()


def gunicorn(daemons: Daemons, address: str) -> tuple[Process, int]:
    command = [sys.executable, "-m", "gunicorn", "--preload", "--workers", str(WORKERS)]
    command += ["--bind", "127.0.0.1:0"]
    process = daemons.process([*command, "zflake.web:create_app()"], env={"ZFLAKE_ENDPOINTS": address})

    return process, port_of(process, "Listening at:")


def port_of(server: Process, words: str) -> int:
    """The port at which it says that it serves."""

    def said() -> str:
        assert server.alive, server.log()
        return server.log().partition(f"{words} http://127.0.0.1:")[2]

    return int(until(said, "its address").split()[0])


def test_gunicorns_preloaded_workers_give_distinct_ids_and_a_reload_gives_their_leases_back(
    daemons: Daemons,
) -> None:
    delegator = daemons.delegator(ttl="120s")
    server, port = gunicorn(daemons, delegator.address)
    assert held(delegator) == {}, "the app was loaded, and no request has come"
    askers = Askers(port)
    try:
        until(
            lambda: len(askers.ids) > IDS // 2 and len(askers.machines()) == WORKERS,
            "IDs of each",
            within_s=90,
        )
        before = held(delegator)
        assert set(before) == askers.machines()
        server.signal(signal.SIGHUP)
        asked = len(askers.ids)

        def reloaded() -> bool:
            now = held(delegator)
            return len(now) == WORKERS and set(now.values()).isdisjoint(before.values())

        until(reloaded, "the new processes to have leases, and the old ones none", within_s=60)
        until(lambda: len(askers.ids) > asked + IDS // 2, "as many IDs after it", within_s=90)
    finally:
        askers.stop()
    assert askers.refused == []
    assert len(set(askers.ids)) == len(askers.ids) >= IDS
    assert server.terminate() == 0
    until(lambda: held(delegator) == {}, "all leases to be given back", within_s=10)


def test_the_example_server_serves_and_gives_its_lease_back(daemons: Daemons) -> None:
    delegator = daemons.delegator(ttl="120s")
    command = [sys.executable, "-m", "zflake.web", "--to", delegator.address, "--bind", "127.0.0.1:0"]
    server = daemons.process(command)

    askers = Askers(port_of(server, "serves at"), threads=3)
    until(lambda: len(askers.ids) > 300, "IDs")
    askers.stop()
    assert len(set(askers.ids)) == len(askers.ids)
    assert set(held(delegator)) == askers.machines()
    assert server.terminate() == 0
    assert held(delegator) == {}
