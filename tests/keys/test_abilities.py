"""Who can do what in a cluster with keys: real daemons, and peers that try what their key is not for."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Final

import pytest

from tests.conftest import Peer, serving, until
from tests.daemon.tools import ANY, delegating, failure, result
from tests.keys.conftest import Secure
from zflake.cli.keygen import add_party
from zflake.client.sync import Client
from zflake.core.layout import PRESETS
from zflake.delegator.limits import BURST_S
from zflake.embedded.generator import LeasedGenerator
from zflake.errors import AuthError
from zflake.keys import Keys
from zflake.wire.callers import PARTIES, Limits, Role
from zflake.wire.codec import encode_result
from zflake.wire.dispatch import METHODS
from zflake.wire.endpoint import parse_endpoint
from zflake.worker.server import Worker, WorkerConfig

WHO: Final = ["name", "host", 1, ""]
HEARD_S: Final = 2.0
"""Seconds in which a change of who is authorized holds everywhere."""


def token(n: int) -> bytes:
    return n.to_bytes(16, "big")


PARAMS: Final[dict[str, list[Any]]] = {
    "hello": [],
    "ping": [],
    "ids.next": [1, 1000],
    "lease.acquire": [token(1), *WHO],
    "lease.renew": [3, token(1), 1, token(2), None, None],
    "lease.release": [3, token(1), None, None],
    "worker.ready": [3, token(1)],
    "worker.beat": [{"requests": 0, "ids": 0, "parked": 0, "dropped": 0, "errors": 0}, token(1)],
    "worker.leave": [token(1)],
    "worker.callers": [],
    "cluster.workers": [],
    "cluster.status": [],
    "cluster.trace": [3, 1],
}
"""Params of each method that pass its check."""

ALLOWED: Final = {
    "client": {"hello", "ping", "ids.next", "cluster.workers"},
    "generator": {
        *("hello", "ping", "ids.next", "cluster.workers"),
        *("lease.acquire", "lease.renew", "lease.release"),
    },
    "worker": {
        *("hello", "ping", "lease.acquire", "lease.renew", "lease.release"),
        *("worker.ready", "worker.beat", "worker.leave", "worker.callers"),
    },
    "admin": {"hello", "ping", "ids.next", "cluster.workers", "cluster.status", "cluster.trace"},
}
"""What a key may call, by its role."""


# --- roles ---


@pytest.mark.parametrize("role", PARTIES)
def test_a_key_may_call_the_methods_of_its_role_and_no_other(secure: Secure, role: str) -> None:
    peer = secure.peer(role)
    answers = {method: peer.ask(method, *PARAMS[method]) for method in METHODS}
    denied = {
        method
        for method, answer in answers.items()
        if answer.error is not None and answer.error.code == "denied"
    }
    assert set(METHODS) - denied == ALLOWED[role]


@pytest.mark.parametrize("role", [role for role in PARTIES if role != Role.WORKER])
def test_a_worker_gives_ids_to_those_who_may_take_them_and_shows_itself_to_an_admin(
    secure: Secure, role: str
) -> None:
    peer = secure.peer(role, at="worker")
    until(lambda: peer.ask("ids.next", 1, 1000).error is None)
    status = peer.ask("cluster.status")
    assert (status.error is None) == (role == Role.ADMIN)
    assert ("pid" in result(peer.ask("hello"))) == (role == Role.ADMIN)
    assert ("address" in result(secure.peer(role).ask("hello"))) == (role == Role.ADMIN)


def test_the_directory_tells_the_workers_keys_and_the_status_their_names(secure: Secure) -> None:
    (listed,) = result(secure.peer("client").ask("cluster.workers"))["workers"]
    assert listed["key"] == Keys(secure.folder / "worker").public
    (lease,) = result(secure.peer("admin").ask("cluster.status"))["leases"]
    assert lease["key"] == "worker"
    with Client(secure.delegator.address, keys=secure.folder / "client") as ids:
        fields = PRESETS["snowcloud"].decompose(ids.next_id())
    traced = result(secure.peer("admin").ask("cluster.trace", fields.machine, fields.tick))["span"]
    assert traced["key"] == "worker"


@pytest.mark.parametrize("route", ["direct", "broker", "auto"])
def test_a_client_takes_ids_by_every_route(secure: Secure, route: str) -> None:
    with Client(secure.delegator.address, keys=secure.folder / "client", route=route) as ids:
        assert len(set(ids.next_ids(10_000))) == 10_000


def test_a_generator_leases_by_its_key(secure: Secure) -> None:
    with LeasedGenerator(secure.delegator.address, keys=secure.folder / "generator") as ids:
        assert len(set(ids.next_ids(10_000))) == 10_000


# --- who has no key for this cluster ---


@contextmanager
def soon() -> Iterator[None]:
    """An answer comes, and not only once the whole timeout is spent."""
    began = time.monotonic()
    with pytest.raises(AuthError):
        yield
    assert time.monotonic() - began < 10, "a timeout, not an answer"


@pytest.mark.parametrize("wrong", ["no key", "unknown", "another cluster's", "revoked before"])
def test_who_has_no_key_here_is_told_so(
    secure: Secure, wrong: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ZFLAKE_KEYS", raising=False)
    keys: Path | str = secure.folder / "generator"
    if wrong == "no key":
        keys = ""
    elif wrong == "another cluster's":
        add_party(tmp_path / "other", Role.DELEGATOR, "delegator")
        keys = add_party(tmp_path / "other", Role.GENERATOR, "generator")
    else:
        keys = add_party(secure.folder, Role.GENERATOR, "stranger")
        if wrong == "revoked before":
            until(lambda: secure.knows("stranger"))
        (secure.authorized / "stranger.key").unlink()
        until(lambda: not secure.knows("stranger"))
    for address in (secure.delegator.address, secure.worker.address):
        with Client(address, keys=keys, timeout=30) as ids, soon():
            ids.next_id()
    with LeasedGenerator(secure.delegator.address, keys=keys, timeout=30) as generator, soon():
        generator.next_id()


def test_a_key_is_of_no_use_where_there_are_none(folder: Path) -> None:
    with delegating() as delegator:
        with Client(delegator.address, keys=folder / "client", timeout=30) as ids, soon():
            ids.next_id()
        with LeasedGenerator(delegator.address, keys=folder / "generator", timeout=30) as generator, soon():
            generator.next_id()


def test_a_client_key_leases_nothing(secure: Secure) -> None:
    with (
        LeasedGenerator(secure.delegator.address, keys=secure.folder / "client", timeout=30) as generator,
        soon(),
    ):
        generator.next_id()


# --- revocation ---


@pytest.mark.parametrize("at", ["delegator", "worker"])
def test_a_revoked_key_is_refused_on_the_connection_that_it_has(secure: Secure, at: str) -> None:
    peer, other = secure.peer("client", at=at), secure.peer("admin", at=at)
    until(lambda: peer.ask("ids.next", 1, 1000).error is None)
    (secure.authorized / "client.key").unlink()
    removed = time.monotonic()
    until(lambda: peer.ask("ids.next", 1, 1000).error is not None)
    assert time.monotonic() - removed < HEARD_S + 3, "even on a busy machine"
    assert failure(peer.ask("ids.next", 1, 1000)).code == "denied"
    assert other.ask("ids.next", 1, 1000).error is None


def test_a_client_whose_key_is_revoked_while_it_takes_ids_gets_an_auth_error_and_others_go_on(
    secure: Secure,
) -> None:
    failed: list[Exception] = []

    def take() -> None:
        with Client(secure.delegator.address, keys=secure.folder / "client", timeout=30) as ids:
            try:
                while True:
                    ids.next_id()
            except Exception as error:  # noqa: BLE001
                failed.append(error)

    taking = threading.Thread(target=take)
    taking.start()
    with Client(secure.delegator.address, keys=secure.folder / "admin") as others:
        others.next_id()
        (secure.authorized / "client.key").unlink()
        taking.join(15)
        assert not taking.is_alive()
        assert isinstance(failed[0], AuthError), failed
        others.next_ids(1000)


def test_a_key_that_is_added_may_come_at_once(secure: Secure) -> None:
    with Client(secure.delegator.address, keys=add_party(secure.folder, Role.CLIENT, "shop")) as ids:
        until(lambda: gives(ids), "the new key to be let in")


def gives(ids: Client) -> bool:
    try:
        return ids.next_id() > 0
    except AuthError:
        return False


def test_a_worker_whose_key_is_revoked_is_out_and_its_lease_runs_out(secure: Secure) -> None:
    admin = secure.peer("admin")
    assert result(admin.ask("cluster.workers"))["workers"]
    (secure.authorized / "worker.key").unlink()
    until(lambda: not result(admin.ask("cluster.workers"))["workers"], "the worker to be out")
    assert result(admin.ask("cluster.status"))["denied"][""] > 0, "of a key that nobody knows any more"


# --- another worker's key ---


@pytest.fixture
def thief(secure: Secure) -> str:
    """A party with a worker's key of its own."""
    add_party(secure.folder, Role.WORKER, "thief")
    until(lambda: secure.knows("thief"))
    return "thief"


def stolen(secure: Secure) -> tuple[int, bytes, int]:
    """Machine ID, token and gen of the worker's lease, as one who reads the store has them."""
    (record,) = secure.delegator.service.directory.held(0)
    assert record.token is not None
    return record.machine, record.token, record.gen


def test_a_stolen_token_neither_renews_nor_gives_back_nor_gets_a_window(secure: Secure, thief: str) -> None:
    machine, shown, gen = stolen(secure)
    peer = secure.peer(thief)
    for method, params in {
        "lease.renew": [machine, shown, gen, token(9), None, None],
        "lease.release": [machine, shown, None, None],
        "lease.acquire": [shown, *WHO],
    }.items():
        assert failure(peer.ask(method, *params)).code == "lost", method
    (record,) = secure.delegator.service.directory.held(0)
    assert record.machine == machine


def test_a_stolen_token_is_no_presence_and_its_answers_count_for_nothing(secure: Secure, thief: str) -> None:
    machine, shown, _ = stolen(secure)
    peer = secure.peer(thief)
    assert failure(peer.ask("worker.ready", machine, shown)).code == "not_ready"
    load = PARAMS["worker.beat"][0]
    assert failure(peer.ask("worker.beat", load, shown)).code == "not_ready"
    peer.ask("worker.leave", shown)
    assert len(result(secure.peer("admin").ask("cluster.workers"))["workers"]) == 1
    before = secure.delegator.service.broker.counts.strays
    peer.send(shown + token(5), b"", encode_result(1, [1, 1, 1]))
    until(lambda: secure.delegator.service.broker.counts.strays > before)


def test_a_worker_that_takes_anothers_identity_gets_none_of_its_requests(secure: Secure, thief: str) -> None:
    (identity,) = [worker.identity for worker in secure.delegator.service.directory._workers.values()]
    _, shown, _ = stolen(secure)
    peer = secure.peer(thief, identity=identity + b"x")
    assert failure(peer.ask("worker.beat", PARAMS["worker.beat"][0], shown)).code == "not_ready"
    secure.stop_worker()
    peer = secure.peer(thief, identity=identity)
    assert failure(peer.ask("worker.beat", PARAMS["worker.beat"][0], shown)).code == "not_ready"


@pytest.mark.parametrize("name", ["client", "generator", "admin"])
def test_only_a_workers_key_answers_for_a_worker(secure: Secure, name: str) -> None:
    peer = secure.peer(name)
    peer.send(token(1) + token(2), b"", encode_result(1, [1, 1, 1]))
    until(lambda: secure.delegator.service.requests.denied[name])


def test_a_witness_by_another_key_rests_nobody(secure: Secure, thief: str) -> None:
    machine, shown, gen = stolen(secure)
    peer = secure.peer(thief)
    store_id = result(peer.ask("hello"))["store_id"]
    far = 2**40
    answer = peer.ask("lease.renew", machine, token(8), gen + 5, token(9), far, store_id)
    assert failure(answer).code == "lost"
    assert result(secure.peer("admin").ask("cluster.status"))["granting_in_ms"] == 0
    assert shown


# --- limits ---


def limit(secure: Secure, name: str, line: str) -> None:
    path = secure.authorized / f"{name}.key"
    path.write_text(path.read_text().replace("metadata\n", f"metadata\n    {line}\n"))
    until(lambda: secure.limits(name) != Limits(), "the limit to be known")


def limited(peer: Peer, method: str, *params: Any) -> str:
    error = failure(peer.ask(method, *params))
    assert (error.code, bool(error.retry_after_ms)) == ("overloaded", True)
    return error.message


def test_a_key_holds_no_more_machine_ids_than_its_limit_and_a_repeat_is_no_further_one(
    secure: Secure,
) -> None:
    limit(secure, "generator", "leases = 2")
    peer = secure.peer("generator")
    first, second = (result(peer.ask("lease.acquire", token(n), *WHO)) for n in (1, 2))
    assert "leases" in limited(peer, "lease.acquire", token(3), *WHO)
    again = result(peer.ask("lease.acquire", token(2), *WHO))
    assert again["machine"] == second["machine"]
    result(peer.ask("lease.renew", first["machine"], token(1), first["gen"], token(4)))
    result(peer.ask("lease.release", second["machine"], token(2), None, None))
    result(peer.ask("lease.acquire", token(3), *WHO))
    assert result(secure.peer("admin").ask("cluster.status"))["limited"] == {"generator": 1}


def test_a_key_acquires_no_faster_than_its_limit_and_others_go_on(secure: Secure) -> None:
    limit(secure, "generator", "acquires-per-s = 1")
    peer = secure.peer("generator")
    for n in range(BURST_S):
        result(peer.ask("lease.acquire", token(n), *WHO))
    assert "acquires-per-s" in limited(peer, "lease.acquire", token(9), *WHO)
    result(secure.peer("worker").ask("lease.acquire", token(10), *WHO))
    until(lambda: peer.ask("lease.acquire", token(9), *WHO).error is None)


def test_a_key_has_no_more_requests_under_way_than_its_limit_and_others_go_on(secure: Secure) -> None:
    limit(secure, "client", "requests = 3")
    secure.stop_worker()
    worker = secure.peer("worker")
    held = result(worker.ask("lease.acquire", token(1), *WHO))
    result(worker.ask("worker.ready", held["machine"], token(1)))  # and never answers
    peer, other = secure.peer("client"), secure.peer("admin")
    for _ in range(3):
        peer.request("ids.next", 1, 600)
    assert "requests" in limited(peer, "ids.next", 1, 600)
    other.request("ids.next", 1, 300)
    assert failure(other.receive()).code == "timeout"
    assert [failure(peer.receive()).code for _ in range(3)] == ["timeout"] * 3
    peer.request("ids.next", 1, 100)
    assert failure(peer.receive()).code == "timeout", "what is over is not under way"


# --- rotation ---


def test_a_delegator_with_a_new_key_costs_no_call(folder: Path, tmp_path: Path) -> None:
    store = f"sqlite:///{tmp_path}/zflake.db"
    add_party(folder, Role.DELEGATOR, "second")
    with delegating(store, keys=Keys(folder / "delegator")) as delegator:
        address = delegator.address
        config = WorkerConfig([parse_endpoint(address)], ANY, name="w1", keys=Keys(folder / "worker"))
        with ExitStack() as staying:
            worker = staying.enter_context(serving(lambda waker: Worker(config, waker)))
            until(lambda: delegator.service.broker.open)
            ids = staying.enter_context(Client(address, keys=folder / "client"))
            taken = ids.next_ids(100)
            stay = staying.pop_all()
    with stay, delegating(store, bind=parse_endpoint(address), keys=Keys(folder / "second")) as again:
        machine = worker.machine
        for _ in range(20):
            taken += ids.next_ids(100)
            time.sleep(0.05)
        until(lambda: again.service.broker.open, "the worker to be back")
        with Client(address, keys=folder / "client", route="broker") as brokered:
            taken += brokered.next_ids(100)
        assert worker.machine == machine is not None
    assert len(set(taken)) == len(taken)


# --- static workers ---


def test_a_static_worker_has_its_own_list(folder: Path) -> None:
    config = WorkerConfig((), ANY, machine=5, layout=PRESETS["snowcloud"], keys=Keys(folder / "delegator"))
    with (
        serving(lambda waker: Worker(config, waker)) as worker,
        Client(worker.address, keys=folder / "client") as ids,
    ):
        assert ids.next_id() >> 12 & 1023 == 5
        (folder / "delegator" / "authorized" / "client.key").unlink()
        with soon():
            while True:
                ids.next_id()
