"""What anyone may ask for is built once for all, comes in pages, and a peer that takes none of it has little of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

import pytest
import zmq

from tests.conftest import Connect, Peer, serving, until
from tests.daemon.tools import ANY, NEW, failure, result
from zflake.cli.status import ask_status
from zflake.core.lease import Holder, Record
from zflake.delegator.directory import Directory
from zflake.delegator.report import Report
from zflake.delegator.server import Delegator, DelegatorConfig
from zflake.wire import sockets
from zflake.wire.cluster import PAGE, Ready
from zflake.wire.frames import MAX_RESPONSE_BYTES

LONGEST: Final = "\U0001f40d" * 255
"""The longest text that a holder may give: four bytes a character."""
MANY: Final = 16_384


@contextmanager
def holding(leases: int, *, workers: int = 0, text: str = "w") -> Iterator[Delegator]:
    """A delegator that knows of so many leases, with texts as given, the first of them of workers."""

    def make(waker: Any) -> Delegator:
        delegator = Delegator(DelegatorConfig(ANY, "memory:", NEW), waker)
        directory, clock = delegator.service.directory, delegator.clock
        holder = Holder(text, text, 2**63 - 1, text)
        for machine in range(leases):
            token = machine.to_bytes(16, "big")
            directory.learn(Record(machine, clock.tick() + 3_600_000, 1, token, 0, 0, holder))
        for machine in range(workers):
            token, identity = machine.to_bytes(16, "big"), machine.to_bytes(5, "big")
            # Heard of far in the future: they never miss a heartbeat.
            assert directory.register(identity, Ready(machine, token), clock.tick(), 2**62)
        return delegator

    with serving(make) as delegator:
        yield delegator


def told(peer: Peer, method: str, *params: int) -> Any:
    """The result, for one that asks again at once: libzmq's threads may not have said yet what was sent."""
    while (answer := peer.ask(method, *params)).error is not None:
        assert answer.error.code == "overloaded"
    return answer.result


def pages(peer: Peer) -> Iterator[dict[str, Any]]:
    page = told(peer, "cluster.status")
    while page["next"] is not None:
        yield page
        page = told(peer, "cluster.status", page["next"])
    yield page


def test_each_page_of_a_full_store_fits_an_answer_and_together_they_have_every_lease(
    connect: Connect,
) -> None:
    with holding(MANY, workers=PAGE, text=LONGEST) as delegator:
        peer = connect(delegator.address)
        peer.socket.setsockopt(zmq.MAXMSGSIZE, MAX_RESPONSE_BYTES // 2)
        machines = [lease["machine"] for page in pages(peer) for lease in page["leases"]]
        assert machines == list(range(MANY))
        facts = ask_status(delegator.address, 30.0)
        assert [lease["machine"] for lease in facts["leases"]] == machines
        assert facts["held"] == MANY


def test_any_cursor_gives_a_page_and_there_are_only_so_many_pages() -> None:
    directory = Directory(Record(machine, 100, 1, bytes(16)) for machine in range(0, 10 * PAGE, 2))
    starts = {directory.page_at(after) for after in range(-1, 20 * PAGE)}
    assert starts == set(range(0, 5 * PAGE + 1, PAGE))
    for after in range(-1, 10 * PAGE - 2):
        held = directory.held(50, directory.page_at(after))
        assert held[-1].machine > after, "a reader gets on"
        assert len(held) <= PAGE
    assert directory.held(50, directory.page_at(20 * PAGE)) == []
    assert directory.end_of(4 * PAGE) is None


def test_of_many_workers_each_has_its_turn_in_the_directory(connect: Connect) -> None:
    with holding(5 * PAGE, workers=5 * PAGE) as delegator:
        peer = connect(delegator.address)
        seen = Counter[int]()

        def all_seen() -> bool:
            listed = told(peer, "cluster.workers")["workers"]
            assert len(listed) == PAGE
            seen.update(worker["machine"] for worker in listed)
            return len(seen) == 5 * PAGE

        until(all_seen)


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each result was built."""
    counts = Counter[str]()

    def counting(name: str, build: Callable[..., Any]) -> Callable[..., Any]:
        def count(*given: Any) -> Any:
            counts[name] += 1
            return build(*given)

        return count

    for name in ("workers", "status"):
        monkeypatch.setattr(Report, name, counting(name, getattr(Report, name)))
    return counts


def test_a_result_is_built_once_for_all_who_ask_and_each_gets_an_answer_of_its_own(
    connect: Connect, built: Counter[str]
) -> None:
    with holding(PAGE, workers=3) as delegator:
        peers = [connect(delegator.address) for _ in range(20)]
        for method in ("cluster.status", "cluster.workers"):
            asked = [peer.request(method) for peer in peers for _ in range(3)]
            answers = [peer.receive() for peer in peers for _ in range(3)]
            assert [answer and answer.msgid for answer in answers] == asked
            assert len({str(result(answer)) for answer in answers}) <= 2, "a second may have gone by"
        assert built["status"] <= 2
        assert built["workers"] <= 2


def test_a_change_of_the_directory_shows_in_the_next_answer(connect: Connect) -> None:
    with holding(3, workers=2) as delegator:
        peer = connect(delegator.address)
        token = bytes(range(16))
        granted = result(peer.ask("lease.acquire", token, "w", "h", 1, "tcp://127.0.0.1:9"))
        for _ in range(20):
            for here in (True, False):
                method, params = ("ready", [granted["machine"], token]) if here else ("leave", [token])
                result(peer.ask(f"worker.{method}", *params))
                listed = {w["machine"] for w in told(peer, "cluster.workers")["workers"]}
                assert (granted["machine"] in listed) is here
                leases = {x["machine"]: x["worker"] for x in told(peer, "cluster.status")["leases"]}
                assert (leases[granted["machine"]] is not None) is here


def test_a_peer_that_takes_no_answers_has_few_large_ones_and_any_number_again_once_it_does(
    connect: Connect,
) -> None:
    with holding(PAGE, text=LONGEST) as delegator:
        peer = connect(delegator.address)
        # It reads none, and its own side takes no more than it must.
        idle = connect(delegator.address)
        idle.socket.close(linger=0)
        with zmq.Context() as context, context.socket(zmq.DEALER) as glutton:
            glutton.setsockopt(zmq.LINGER, 0)
            glutton.setsockopt(zmq.RCVHWM, 1)
            glutton.setsockopt(zmq.RCVBUF, 4096)
            glutton.connect(delegator.address)
            asking = Peer.__new__(Peer)
            asking.socket, asking._msgid = glutton, 0
            for _ in range(100):
                asking.request("cluster.status")
            until(lambda: delegator.service.requests.errors["overloaded"] > 50)
            held = [size for untaken in delegator._large._untaken.values() for _, size in untaken]
            assert sum(held) - held[-1] < sockets.UNTAKEN_BYTES
            assert len(result(peer.ask("cluster.status"))["leases"]) == PAGE, "others are served"
            codes = Counter(
                answer.error.code if answer.error else "page"
                for answer in (asking.receive() for _ in range(100))
                if answer
            )
            assert codes["page"]
            assert codes["page"] + codes["overloaded"] == 100
            until(lambda: asking.ask("cluster.status").error is None)
            refusal = failure(asking.ask("nonsense"))
            assert refusal.code == "unknown_method"


def test_what_is_known_of_large_answers_does_not_outlive_the_peers() -> None:
    with zmq.Context() as context, context.socket(zmq.ROUTER) as router:
        port = router.bind_to_random_port("tcp://127.0.0.1")
        answers = sockets.LargeAnswers(router)
        for _ in range(3 * sockets.SWEEP_AT):
            with context.socket(zmq.DEALER) as peer:
                peer.connect(f"tcp://127.0.0.1:{port}")
                peer.send(b"")
                identity, _ = router.recv_multipart()
                assert answers.send([identity], bytes(sockets.LARGE_BYTES))
                assert peer.recv() == bytes(sockets.LARGE_BYTES)
        assert len(answers._untaken) <= 2 * sockets.SWEEP_AT
