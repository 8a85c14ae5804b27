"""One history: a cluster under faults, then without them, and what must hold in both.

The safety phase lets the demon do what the plan allows.  Then the faults stop, and within a bound every
worker must serve and every call succeed (liveness); at last all workers leave, and give everything back.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from random import Random
from typing import Any, Final

from tests.sim import delegator as delegators
from tests.sim.checker import Checker, Violation, WatchedMint
from tests.sim.client import Client
from tests.sim.delegator import Delegator
from tests.sim.disk import Disk
from tests.sim.fault_plan import FINE, FaultPlan, draw
from tests.sim.figures import Figures
from tests.sim.worker import WatchedLessee, Worker
from tests.sim.world import Host, Process, World
from zflake.core import lessee as lessee_module
from zflake.delegator.start import Wishes
from zflake.holder import lease as lease_module
from zflake.wire.codec import decode_request, decode_response, encode_result

SETTLE_US: Final = 10_000_000
"""How long a healthy cluster may take beyond what windows and floors demand: retries, and their jitter."""
LOOK_US: Final = 250_000
MOST_LEAD_US: Final = 20_000_000
"""How far the wall clocks step away from the true time, at most."""
CALLS: Final = 2
CALLS_US: Final = 20_000_000


class Cluster:
    """Hosts, a disk, delegators, workers, clients, and the demon."""

    def __init__(
        self, seed: int, trace: Callable[[str], None] | None = None, plan: FaultPlan | None = None
    ) -> None:
        rng = Random(seed)
        self.world = World(rng, trace)
        self.plan = plan = plan or draw(rng)
        self.checker = Checker(lambda: self.world.true_us)
        WatchedMint.watching = self.checker
        self.disk = Disk(self.checker)
        self.world.note("", f"seed {seed}: {plan}")
        self._end_us = plan.layout.epoch_us + plan.layout.end_tick * plan.layout.tick_us
        self._steps_us = [0] * plan.delegators
        self.hosts = [self._host() for _ in range(max(plan.delegators, plan.workers))]
        self.workers: list[Worker] = []
        self.peers: dict[bytes, Worker | Client] = {}
        """The workers and clients that there were, by the identities of their connections."""
        self.endpoints = [f"tcp://10.0.0.{n + 1}:7410" for n in range(plan.delegators)]
        self.delegators: list[Delegator | None] = [None] * plan.delegators
        self.started: list[Delegator] = []
        """Every delegator's process that there was."""
        self._numbers = 0
        self._calm = False
        self._emptied = False
        self._accepting = False
        self._snapshot = self._empty = self.disk.snapshot()
        self._seen: Any = None  # what a worker has answered
        self._founding = Wishes(layout=plan.layout, ttl_ms=plan.ttl_ms, machines=plan.machines, new=True)
        self._wishes = self._founding
        self.checker.wall_us = lambda: max(host.wall_us() for host in self.hosts)
        for number in range(plan.delegators):
            self._start_delegator(number)
        # Before that nobody was running, and to listen for others took only time.
        self.disk.shared = plan.delegators > 1
        for _ in range(plan.workers):
            self._start_worker()
        self.clients = [Client(self, n) for n in range(plan.clients)]

    def _host(self) -> Host:
        plan, rng = self.plan, self.world.rng
        drift = rng.randint(-plan.drift, plan.drift)
        skew_us = rng.randint(-plan.skew_us, plan.skew_us)
        return Host(self.world, plan.wall_us + skew_us, rng.randrange(10**12), drift)

    # --- who is where ---

    def at(self, address: str) -> Delegator | Worker | None:
        """Who serves at an address."""
        if address in self.endpoints:
            return self.delegators[self.endpoints.index(address)]
        worker = self.peers[b"w" + address.rpartition(":")[2].encode()]  # a worker's port is its number
        assert isinstance(worker, Worker)
        if worker.dead:
            # A clone advertises the address that it was born with.
            return next((w for w in self._staying() if w.lease.lessee._holder.address == address), worker)
        return worker

    @property
    def serving(self) -> list[Delegator]:
        return [d for d in self.delegators if d is not None and not d.dead]

    # --- a history ---

    def run(self) -> None:
        """Live through it; raises `Violation` where something happened that must not."""
        world, plan = self.world, self.plan
        world.weather = plan.weather
        self._plan_act()
        if plan.loss or plan.accept:
            world.after(plan.fault_us * 2 // 3, None, self._lose if plan.loss else self._accept)
            world.after(world.rng.randrange(plan.fault_us * 2 // 3), None, self._take_snapshot)
        world.run(plan.fault_us)
        self._calm_down()
        self._live()
        self._leave()

    def figures(self) -> Figures:
        """What was done and checked."""
        return Figures(1, self.checker.ids, self.world.true_us, self.world.faults, self.checker.counts)

    # --- the demon ---

    def _plan_act(self) -> None:
        if self.plan.acts:
            wait_us = int(self.world.rng.expovariate(1.0) * self.plan.act_us) + 1_000
            self.world.after(wait_us, None, self._act)

    def _act(self) -> None:
        if self._calm:
            return
        rng, acts = self.world.rng, self.plan.acts
        (act,) = rng.choices(list(acts), list(acts.values()))
        alive = [worker for worker in self.workers if not worker.dead]
        serving = self.serving
        match act:
            case "crash worker" if alive:
                worker = rng.choice(alive)
                self.world.fault(act, worker.name)
                worker.die()
                self.world.after(rng.randrange(1_500_000), None, self._replace_worker)
            case "release" if alive:
                worker = rng.choice(alive)
                self.world.fault(act, worker.name)
                worker.leave()
                self.world.after(rng.randrange(500_000), None, self._replace_worker)
            case "pause worker" if alive:
                self._pause(act, rng.choice(alive), 4_000_000)
            case "clone" if alive and len(self.workers) < 12:
                worker = rng.choice(alive)
                if worker.releasing is None:
                    number = self._next_number()
                    self.world.fault(act, worker.name, f"as w{number}")
                    self.workers.append(worker.double(number, worker.host.copy()))
            case "fork" if alive:
                worker = rng.choice(alive)
                self.world.fault(act, worker.name)
                child = worker.fork(self._next_number())
                self.workers.append(child)
                self.world.after(rng.randrange(5_000), child, child.take, 3)
                self.world.after(rng.randrange(2_000_000), child, self._end, child)
            case "new worker" if len(alive) < 6:
                self.world.fault(act)
                self._start_worker()
            case "crash delegator" if serving:
                delegator = rng.choice(serving)
                self.world.fault(act, delegator.name)
                delegator.die()
                self.world.after(rng.randrange(2_000_000), None, self._start_delegator, delegator.number)
            case "pause delegator" if serving:
                self._pause(act, rng.choice(serving), 3_000_000)
            case "step wall":
                self._step_wall(rng.randrange(self.plan.delegators))
            case "partition":
                self._partition()
            case "outage":
                self.world.fault(act, "disk")
                self.disk.out = True
                self.world.after(rng.randrange(1_500_000), None, self._heal_disk)
            case "new ttl" if serving and not self._accepting:
                self._wish(act, Wishes(ttl_ms=rng.choice((1_000, 2_000, 4_000))))
            case "new range" if serving and not self._accepting:
                first = rng.randrange(2)
                last = min(first + rng.randrange(1, 4), self.plan.layout.machines - 1)
                self._wish(act, Wishes(machines=(first, last)))
            case _:
                pass
        self._plan_act()

    def _end(self, child: Worker) -> None:
        if not self._calm:
            child.leave()

    def _pause(self, act: str, process: Process, most_us: int) -> None:
        pause_us = int(self.world.rng.random() ** 2 * most_us)
        self.world.fault(act, process.name, f"for {pause_us / 1e6:.3f} s")
        process.paused_until_us = self.world.true_us + pause_us

    def _step_wall(self, number: int) -> None:
        by_us = self.world.rng.randint(-self.plan.step_us, self.plan.step_us)
        if abs(self._steps_us[number] + by_us) > MOST_LEAD_US:
            by_us = -self._steps_us[number]
        self._steps_us[number] += by_us
        self.world.fault("step wall", f"d{number}", f"by {by_us / 1e6:+.3f} s")
        self.hosts[number].step_wall(by_us)
        self.checker.wall(self.hosts[number].wall_us())

    def _partition(self) -> None:
        rng = self.world.rng
        if self.world.cut:
            self.world.cut = set()
            return
        ends = [*self.serving, *(worker for worker in self.workers if not worker.dead)]
        if not ends:
            return
        one, two = rng.choice(ends), rng.choice(ends)
        both = rng.random() < 0.6
        self.world.fault("partition", one.name, f"{'from' if both else 'to'} {two.name}")
        self.world.cut = {(one.name, two.name)}
        if both:
            self.world.cut.add((two.name, one.name))

    def _heal_disk(self) -> None:
        self.disk.out = False

    def _wish(self, act: str, wishes: Wishes) -> None:
        """An operator restarts a delegator with another setting."""
        number = self.world.rng.randrange(self.plan.delegators)
        if self.disk.contents().records == []:
            return  # a store that was emptied is made anew as the first one was
        self.world.fault(act, f"d{number}", str(wishes.ttl_ms or wishes.machines))
        if (running := self.delegators[number]) is not None:
            running.die()
        self.delegators[number] = delegators.begin(self, number, wishes)

    # --- losses ---

    def _take_snapshot(self) -> None:
        self._snapshot = self.disk.snapshot()

    def _lose(self) -> None:
        """The store becomes what it was, or nothing; delegators that notice are those that start."""
        loss = self.plan.loss
        assert loss is not None
        self.world.fault(loss, "disk")
        unnoticed = loss == "rollback unnoticed"
        # Of a store that was emptied a delegator that runs takes no notice but to grant nothing any more.
        if loss == "emptied" or self.world.rng.random() < 0.5:
            self._stop_delegators()
        if loss == "emptied":
            self.disk.restore(self._empty)
            self.disk.life = "life 1"
            self._emptied = True
            self._wishes = replace(self._founding, new=self.plan.marked)  # which is no use then
            self.disk.had_data = self.plan.marked
        else:
            self.disk.restore(self._snapshot)
            if unnoticed:
                self.disk.losses += 1
            else:
                self.disk.life = "life 1"
        records = {record.machine: record for record in self.disk.contents().records}
        self.checker.store_lost(records, self.disk.meta(), noticed=not unnoticed)
        # A keeper learns a new store's ID where a request went unanswered: it says hello again.
        down_us = 2_500_000 if loss == "emptied" else 0
        for number in range(self.plan.delegators):
            self.world.after(down_us, None, self._start_delegator, number)

    def _stop_delegators(self) -> None:
        for process in self.started:  # those that have not got as far as serving, too
            process.die()

    def _accept(self) -> None:
        """An operator stops all delegators, and starts them with the word that the clock is right."""
        number = self.world.rng.randrange(self.plan.delegators)
        self.world.fault("accept clock", f"d{number}")
        self._stop_delegators()
        self.disk.out = False
        self._accepting = True  # nobody else is started until this one runs
        self.delegators[number] = delegators.begin(self, number, Wishes(), accept_clock=True)
        self._accepting = False
        for other in range(self.plan.delegators):
            self._start_delegator(other)

    # --- strangers ---

    def stranger_sees(self, delegator: Delegator, tag: bytes, body: bytes) -> None:
        """Somebody is given a brokered request in a worker's place, and answers what was heard before."""
        rng = self.world.rng
        if self._calm or self._seen is None or rng.random() >= self.plan.stranger:
            return
        msgid, *_ = decode_request(body)
        forged = encode_result(msgid, self._seen)
        self.world.fault("forged answer")
        stranger = b"w%d/link0" % rng.randrange(1 + self._numbers)
        self.world.after(1, delegator, delegator.receive, [stranger, tag, b"", forged])

    def stranger_hears(self, delegator: Delegator, frames: list[bytes]) -> None:
        """A worker's answer is seen by a stranger, who may send it again."""
        if not self.plan.stranger:
            return
        rng = self.world.rng
        if not self._calm and rng.random() < self.plan.stranger:
            self.world.fault("repeated answer")
            self.world.after(rng.randrange(100_000), delegator, delegator.receive, frames)
        answer = decode_response(frames[-1])
        if answer.error is None:
            self._seen = answer.result

    # --- starting ---

    def _next_number(self) -> int:
        self._numbers += 1
        return self._numbers

    def _replace_worker(self) -> None:
        if not self._calm:
            self._start_worker()

    def _start_worker(self) -> None:
        hosts = self.hosts
        self.workers.append(Worker(self, self._next_number(), hosts[self._numbers % len(hosts)]))

    def _start_delegator(self, number: int) -> None:
        running = self.delegators[number]
        if running is not None and not running.dead:
            return
        if self._accepting:
            self.world.after(300_000, None, self._start_delegator, number)
            return
        self.delegators[number] = delegators.begin(self, number, self._wishes)
        if self.delegators[number] is None:
            # Where the store was emptied, nobody founds a cluster whose layout has ended.
            if self.disk.meta() is not None or self.hosts[number].wall_us() < self._end_us:
                self.world.after(300_000, None, self._start_delegator, number)
        elif self._wishes.new or self._wishes.layout is not None:
            self._wishes = Wishes()  # from now on the store knows

    # --- after the faults ---

    def _calm_down(self) -> None:
        world, rng = self.world, self.world.rng
        world.note("", "--- the faults stop ---")
        self._calm = True
        world.weather = FINE
        world.cut = set()
        self.disk.out = False
        # A process that is stopped goes on when its pause is over: what it was to do stands in the queue for then.
        world.run(max(world.true_us, *(p.paused_until_us for p in (*self.serving, *self.workers))))
        for number, delegator in enumerate(self.delegators):
            if delegator is None or delegator.dead:
                self._start_delegator(number)
        alive = self._staying()
        # There may be no more workers than machines.  Where the store was emptied, clients are restarted: it is
        # another cluster for them.
        meta = self.disk.meta()
        if meta is None:  # it was emptied, and the layout has ended since
            return
        room = meta.last_machine - meta.first_machine + 1
        rng.shuffle(alive)
        for worker in alive[room:]:
            if rng.random() < 0.5:
                worker.die()
            else:
                worker.leave()
        for _ in range(room - len(alive)):
            self._start_worker()
        if self._emptied:
            for client in self.clients:
                client.forget()

    def _staying(self) -> list[Worker]:
        return [worker for worker in self.workers if not worker.dead and worker.releasing is None]

    def _bound_us(self) -> int:
        """How long after the faults a worker may have to wait for a window."""
        meta = self.disk.meta()
        assert meta is not None
        fences = [record.fence for record in self.disk.contents().records]
        behind = min(d.clock.tick() for d in self.serving)
        wait = max(0, max([meta.floor, *fences]) - behind) + self.checker.most_ttl
        return wait * meta.layout.tick_us + SETTLE_US

    def _ends(self) -> bool:
        """Whether the layout ends: then nobody can be served any more."""
        return any(d is None or d.clock.timeline_us() > self._end_us - 5_000_000 for d in self.delegators)

    def _live(self) -> None:
        world = self.world
        if self.disk.meta() is None:
            return
        if not all(self.delegators):
            world.run(world.true_us + 1_000_000)
        if not all(self.delegators):
            raise Violation("liveness: a delegator does not start though nothing is wrong any more")
        if self._await(self._not_holding, self._bound_us):
            for client in self.clients:
                client.in_a_row = 0
            # A client reads the directory anew every 10 s; before that it may insist on a delegator that knows
            # of no worker.
            self._await(self._not_served, lambda: CALLS_US + (self._bound_us() if self._resting() else 0))

    def _await(self, waiting: Callable[[], list[str]], bound_us: Callable[[], int]) -> bool:
        """Wait until nobody is `waiting`, within a bound; False if the layout ends before."""
        world = self.world
        floor, until_us = -1, 0
        while True:
            world.run(world.true_us + LOOK_US)
            if self._ends():
                return False
            meta = self.disk.meta()
            assert meta is not None
            if meta.floor != floor:  # at first, and where a witness shows a loss
                floor, until_us = meta.floor, world.true_us + bound_us()
            if not (those := waiting()):
                return True
            if world.true_us > until_us:
                raise Violation(f"liveness: not served though nothing is wrong any more: {', '.join(those)}")

    def _not_holding(self) -> list[str]:
        lessees = [(worker.name, worker.lease.state) for worker in self._staying()]
        # A worker that holds a window from before a loss is served, but not for long.
        rest = ["the store rests"] if self._resting() else []
        return [f"{name} {state}" for name, state in lessees if state != "HELD"] or rest

    def _not_served(self) -> list[str]:
        return [f"{client.name}: {client.failed}" for client in self.clients if client.in_a_row < CALLS]

    def _resting(self) -> bool:
        """Whether a floor still lies ahead, after a loss."""
        meta = self.disk.meta()
        return meta is not None and any(d.clock.tick() < meta.floor for d in self.serving)

    def _leave(self) -> None:
        world = self.world
        world.note("", "--- all workers leave ---")
        leaving = self._staying()
        for client in self.clients:
            client.die()
        for worker in leaving:
            worker.leave()
        world.run(world.true_us + 6_000_000)  # a delegator may still be listening for others
        if not self.plan.loss and self.disk.meta() is not None:
            self.checker.traced(self.disk.contents().spans, self.disk.trace)
        kept = [w.name for w in leaving if w.releasing is not None and w.released_at_us is None]
        if kept and not (self._emptied and self._ends()):  # else their store is gone, and none came instead
            raise Violation(f"leak: {', '.join(kept)} could not give their machines back")


@contextlib.contextmanager
def watched() -> Iterator[None]:
    """Have every mint and lessee that is made show its checker what it gives, and is given."""
    real = vars(lessee_module)["Mint"], vars(lease_module)["Lessee"]
    vars(lessee_module)["Mint"], vars(lease_module)["Lessee"] = WatchedMint, WatchedLessee
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)
        vars(lessee_module)["Mint"], vars(lease_module)["Lessee"] = real


def run(seed: int, trace: Callable[[str], None] | None = None) -> Figures:
    """Live through one history, inside `watched`; raises `Violation` where what must not happen did."""
    cluster = Cluster(seed, trace)
    cluster.run()
    return cluster.figures()
