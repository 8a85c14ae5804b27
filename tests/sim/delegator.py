"""A simulated delegator: the real desk, timeline, directory and broker, and a thin mirror of its loop."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

from tests.sim.disk import Connection, Crashed
from tests.sim.world import Process
from zflake.core.lease import Acquire, Answer, Mark, Refusal, Refused, Request
from zflake.core.timeline import Marks, tick_of
from zflake.delegator import setup
from zflake.delegator.broker import Broker
from zflake.delegator.desk import BATCH, STALE_US, LeaseDesk
from zflake.delegator.directory import Directory
from zflake.delegator.setup import Wishes
from zflake.errors import ConfigError, StoreError
from zflake.wire.codec import decode_request, decode_response, encode_error, encode_result
from zflake.wire.messages import PROTOCOL_VERSION, Code, Method, check_next

if TYPE_CHECKING:
    from tests.sim.cluster import Cluster
    from tests.sim.worker import Worker

MARK_US: Final = 1_000_000
SWEEP_US: Final = 200_000


class Delegator(Process):
    """One life of a delegator's process.

    Raises `StoreError` or `ConfigError` where it can't start.
    """

    def __init__(self, cluster: Cluster, number: int, wishes: Wishes, *, accept_clock: bool) -> None:
        super().__init__(cluster.world, cluster.hosts[number], f"d{number}")
        self.cluster = cluster
        cluster.started.append(self)
        self.number = number
        self.address = f"tcp://10.0.0.{number + 1}:7410"
        self.store = Connection(cluster.world, self, cluster.disk, self.now_us)
        host, checker = self.host, cluster.checker
        self.marks = Marks(self.name)
        running_us = setup.listen(self.store, self.name, self._sleep)
        marks = self.store.marks()
        wall_us = host.wall_us()
        if running_us is None:
            checker.cold_start(wall_us)
        self.timeline = setup.start_timeline(
            marks,
            accept_clock=accept_clock,
            wall_us=wall_us,
            local_us=host.local_us(),
            running_us=running_us,
        )
        checker.started(self.now_us(), accepted=accept_clock)
        meta = setup.settle_meta(self.store, wishes, self.now_us())
        if accept_clock:
            setup.rewind(self.store, meta, wall_us)
        self.layout = meta.layout
        self.store_id = meta.store_id
        self.desk = LeaseDesk(
            self.store,
            meta,
            now=self.now,
            latest=lambda: tick_of(self.layout, max(self.now_us(), self.host.wall_us())),
            local_us=host.local_us,
            ring=lambda: None,
            mark=self._mark,
            follow=self._follow,
            pick=cluster.world.rng.randrange,
        )
        self.directory = Directory(self.store.held(self.now()))
        self.broker = Broker(lambda: cluster.world.rng.randbytes(16))
        self._waiting: list[tuple[Request, int, Worker, tuple[int, int]]] = []
        self._settling = False
        self.world.after(int(self.world.rng.random() * MARK_US), self, self._every_second)
        if cluster.weather.clients:
            self.world.after(SWEEP_US, self, self._sweep)
        self.note(f"starts at {self.now()}")

    def now_us(self) -> int:
        return self.timeline.now_us(self.host.local_us())

    def now(self) -> int:
        return tick_of(self.layout, self.now_us())

    # --- leases ---

    def hear(self, worker: Worker, ticket: tuple[int, int], request: Request | Method) -> None:
        """Take in what a keeper sent; `ticket` comes back with the answer."""
        if isinstance(request, Method):
            if self.world.rng.random() < 0.05:
                self.cluster.checker.timeline(self.now_us())
            self._say(worker, ticket, self.store_id if request is Method.HELLO else None)
            return
        self._waiting.append((request, self.host.local_us(), worker, ticket))
        if not self._settling:
            self._settling = True
            self.world.after(100 + int(self.world.rng.random() * 2_000), self, self._settle)

    def _say(self, worker: Worker, ticket: tuple[int, int], answer: Answer | str | None) -> None:
        self.world.send(self, worker, worker.hear, ticket, answer, self.now_us())

    def _settle(self) -> None:
        # Renewals and releases come first, and what sat for too long is dropped, as in the desk's thread.
        self._waiting.sort(key=lambda waiting: isinstance(waiting[0], Acquire))
        batch, self._waiting = self._waiting[:BATCH], self._waiting[BATCH:]
        local_us = self.host.local_us()
        fresh = [waiting for waiting in batch if local_us - waiting[1] <= STALE_US]
        try:
            settled = self.desk.settle([waiting[0] for waiting in fresh])
        except Crashed:
            return
        for (request, _, worker, ticket), (answer, record) in zip(fresh, settled, strict=True):
            if self.world.tracing:
                self.note(f"{worker.name} {_show(request)} -> {_show(answer)}")
            if record is not None:
                self.directory.learn(record)
            assert isinstance(answer, Answer)
            self._say(worker, ticket, answer)
        self._settling = bool(self._waiting)
        if self._settling:
            self.world.after(100, self, self._settle)

    def _mark(self) -> Mark:
        return Mark(self.name, self.now_us())

    def _follow(self, marks: Sequence[Mark]) -> None:
        moved_us = self.marks.read(marks)
        if moved_us is not None:
            self.timeline.raise_to(moved_us, self.host.local_us())

    def _sleep(self, seconds: float) -> None:
        self.world.elapse(int(seconds * 1e6))
        if self.dead:
            raise Crashed

    def _every_second(self) -> None:
        self.world.after(MARK_US, self, self._every_second)
        if not self._settling:  # the desk has one thread
            self._settling = True
            try:
                self.desk._keep_house()
                if (held := self.desk.collect_held()) is not None:
                    self.directory.replace(held)
            except Crashed:
                return
            self._settling = False
            if self._waiting:
                self._settling = True
                self.world.after(0, self, self._settle)
        self.timeline.compare(self.host.wall_us(), self.host.local_us())
        self.cluster.checker.timeline(self.now_us())

    # --- brokering ---

    def introduced(self, worker: Worker, machine: int, token: bytes) -> None:
        """A worker says that it is ready, and shows its lease's token."""
        local_us = self.host.local_us()
        known = self.directory.arrive(worker.identity, machine, token, self.now(), local_us)
        if known:
            self.broker.join(worker.identity, local_us)
            self._flush()
        self.world.send(self, worker, worker.beaten, self, known, self.now_us())

    def beat(self, worker: Worker, load: dict[str, int]) -> None:
        known = self.directory.hear(worker.identity, load, self.host.local_us())
        known = known and self.broker.is_open(worker.identity)
        self.world.send(self, worker, worker.beaten, self, known, self.now_us())

    def left(self, worker: Worker) -> None:
        self.directory.leave(worker.identity)
        self.broker.leave(worker.identity)

    def answered(self, identity: bytes, envelope: list[bytes], body: bytes) -> None:
        """A worker, or somebody who claims to be one, answers a brokered request."""
        self.broker.answer(identity, envelope, body, self.host.local_us())
        self.directory.see(identity, self.host.local_us())
        self._flush()

    def asked(self, client: Process, prefix: bytes, body: bytes) -> None:
        """A client asks something."""
        msgid, method, params = decode_request(body)
        if method == Method.IDS_NEXT:
            count, timeout_ms, store_id = check_next(params)
            local_us = self.host.local_us()
            if store_id not in (None, self.store_id):
                answer = encode_error(msgid, Code.OTHER_CLUSTER, "another cluster")
                self._reply(client, answer)
                return
            self.cluster.routes["brokered"] += 1
            self.cluster.checker.asked(id(self), prefix, msgid)
            self.broker.submit([prefix, b""], msgid, count, local_us + timeout_ms * 1000, local_us)
            self._flush()
            return
        result: dict[str, Any]
        if method == Method.HELLO:
            result = {
                "service": "delegator",
                "protocol": PROTOCOL_VERSION,
                "layout": self.layout.to_map(),
                "store_id": self.store_id,
            }
        else:
            workers = self.directory.workers(self.now(), self.host.local_us())
            result = {"workers": [{"address": record.holder.address} for record, _ in workers]}
        self._reply(client, encode_result(msgid, result))

    def _reply(self, client: Process, body: bytes) -> None:
        self.world.send(self, client, self.cluster.client_hears, client, body)

    def _sweep(self) -> None:
        self.world.after(SWEEP_US, self, self._sweep)
        local_us = self.host.local_us()
        for identity in self.directory.sweep(self.now(), local_us):
            self.broker.lose(identity, local_us)
        self.broker.sweep(local_us)
        self._flush()

    def _flush(self) -> None:
        broker = self.broker
        while broker.outbox:
            outbox, broker.outbox = broker.outbox, []
            for prefix, body, identity in outbox:
                if identity is None:
                    client = self.cluster.clients_by_prefix.get(prefix[0])
                    msgid = decode_response(body).msgid or 0
                    self.cluster.checker.answered(id(self), prefix[0], msgid)
                    if client is not None:
                        self._reply(client, body)
                    continue
                worker = self.cluster.workers_by_identity.get(identity)
                if worker is None or worker.dead:
                    self.directory.leave(identity)
                    broker.lose(identity, self.host.local_us())
                else:
                    self.world.send(self, worker, worker.brokered, self, prefix[1:], body)
                    self.cluster.stranger_sees(self, prefix[1], body)


def start(cluster: Cluster, number: int, wishes: Wishes, *, accept_clock: bool = False) -> Delegator | None:
    """Start a delegator; None where it refuses to, or can't."""
    try:
        return Delegator(cluster, number, wishes, accept_clock=accept_clock)
    except (StoreError, ConfigError) as error:
        cluster.world.note(f"d{number}", f"does not start: {error}")
    except Crashed:
        pass
    return None


def _show(what: Any) -> str:
    if isinstance(what, Refusal):
        wait = "" if what.retry_after_ms is None else f", {what.retry_after_ms} ms"
        return f"{what.reason}{wait}" if what.reason is not Refused.UNAVAILABLE else "unavailable"
    fields = []
    for name in what.__slots__:
        value = getattr(what, name)
        if name in ("layout", "holder", "ttl", "store_id"):
            continue
        fields.append(f"{name}={value.hex()[:6] if isinstance(value, bytes) else value}")
    return f"{type(what).__name__}({', '.join(fields)})"
