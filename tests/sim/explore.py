"""Every order of events in a small cluster: breadth first over the real lessor, lessee and mint.

Two machines, three holders (the third begins as a clone of the first, or never), two delegators whose
clocks differ, a store that compares and swaps, a few ticks of time.  A message may be delivered, delivered
twice, late, in any order, or never; a delegator may be overtaken between its decision and its swap; the
store may once lose everything, noticed or not; whoever holds may release.

A state is a tuple of small numbers: what the real objects hold is interned, and what they did in a situation
is remembered, so that each situation runs the real code once.  Windows and IDs are bits of an integer: the
bit of a tick on a machine is `machine * TICKS + tick`.  The invariants are asserted on each step:

unique       no ID comes twice
inside       every ID lies in a window granted to its holder
ordered      (tick, sequence) of a holder increases
disjoint     windows do not overlap, as truncated by releases
released     a release gives back nothing minted in, nothing that has passed, and nobody else's
superseded   a tenancy that another one followed is granted nothing any more
rotated      each write has a token of its own
lost         nobody is told `lost` whose lease stands
leak         no window reaches further than a ttl past the clocks
floor        nothing is granted below the floor, and a witness lifts it

A clone's shared windows may repeat IDs, and those that the store has forgotten and does not know of.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, Final, NamedTuple, TypeAlias

from tests.sim.checker import Violation
from zflake.core import lessor, loss
from zflake.core.layout import Field, Layout
from zflake.core.lease import (
    Acquire,
    Answer,
    Grant,
    Holder,
    Meta,
    Record,
    Refusal,
    Refused,
    Release,
    Released,
    Renew,
    Request,
    Swap,
    Token,
)
from zflake.core.lessee import Lessee
from zflake.core.lessee import State as Standing
from zflake.core.mint import Mint
from zflake.errors import ProtocolError

TICKS: Final = 24
"""More ticks than any window here reaches."""
BITS: Final = 2 * TICKS
"""A bit for each tick of each machine.  IDs have as many for the first sequence, and as many for the second."""
FIRST: Final = 4
"""The tick at which time begins."""
LAST: Final = 11
TTL: Final = 3
OFFSETS: Final = (0, 2)
"""The delegators' clocks, against the true tick."""
MOST_MESSAGES: Final = 3
MOST_DRAWS: Final = 4
LAYOUT: Final = Layout("tiny", (Field("time", 8), Field("machine", 1), Field("sequence", 1)), 0, 60_000)
META: Final = Meta("tiny", LAYOUT, TTL, 0, 1)


Step: TypeAlias = tuple[tuple[Any, ...], "World"]
"""What happens, in words and things, and what comes of it."""


class Snapshot(NamedTuple):
    """What a holder knows."""

    number: int
    draws: int
    standing: Standing
    machine: int
    windows: tuple[tuple[int, int], ...]
    end: int
    tick: int
    sequence: int
    token: Token
    gen: int
    next: Token | None


class World(NamedTuple):
    """A state.  Holders, records and messages are numbers of interned objects."""

    t: int
    records: tuple[int, int]
    floor: int
    version: int
    holders: tuple[int, int, int]  # -1: not there
    messages: tuple[int, ...]
    pending: tuple[int, int, int]  # request, swap, delegator; -1: none
    ids: int
    by_pair: int  # the ticks in which the clone or its original minted
    owned: tuple[int, int, int]
    shared: int  # by clones
    shared_draws: int  # how many tokens the first holder had drawn when it was cloned; -1: it was not
    forgotten: int  # what the store lost, where it did not notice
    lost: int  # how the store was lost: 0 not, 1 noticed, 2 not noticed
    races: int
    late: int

    @property
    def sole(self) -> int:
        """What some holder owns by itself, and the store knows of."""
        return (self.owned[0] | self.owned[1] | self.owned[2]) & ~self.shared & ~self.forgotten


class Interned:
    """Objects by number, and numbers by object."""

    def __init__(self) -> None:
        self.things: list[Any] = []
        self._numbers: dict[Any, int] = {}

    def number(self, thing: Any) -> int:
        number = self._numbers.get(thing)
        if number is None:
            number = self._numbers[thing] = len(self.things)
            self.things.append(thing)
        return number


class Result(NamedTuple):
    """What an exploration came to."""

    states: int
    depth: int
    violation: str = ""
    """What broke, and how it came to that."""


class Message(NamedTuple):
    """A holder's request on its way to a delegator, or the answer on its way back."""

    holder: int
    request: Request
    answer: Answer | None = None


class Scope(NamedTuple):
    """What may go wrong; the fewer things, the deeper an exploration comes."""

    name: str
    clone: bool = False
    loss: bool = False
    races: int = 0
    """How often a swap may be overtaken."""
    late: int = 0
    """How often a request may be late, or be sent twice."""
    delegators: tuple[int, ...] = (0, 1)


SCOPES: Final = (
    Scope("one delegator", delegators=(0,)),
    Scope("two delegators"),
    Scope("late requests", late=2),
    Scope("races", races=1, late=1),
    Scope("a clone", clone=True, delegators=(0,)),
    Scope("a loss", loss=True, delegators=(0,)),
    Scope("everything", clone=True, loss=True, races=1, late=1),
)


class Explorer:
    """Knows what follows a state."""

    def __init__(self, scope: Scope) -> None:
        self.scope = scope
        self._holders, self._records = Interned(), Interned()
        self._messages, self._swaps = Interned(), Interned()
        self._memory: dict[Any, Any] = {}
        self._template = vars(Lessee(Holder(), draw_token=bytes, jitter=lambda: 0.0))
        zero = (self._records.number(Record(0)), self._records.number(Record(1)))
        one, two = (
            self._holders.number(Snapshot(n, 0, Standing.ACQUIRING, -1, (), 0, -1, 0, b"", 0, None))
            for n in range(2)
        )
        self.first = World(
            FIRST, zero, 0, 1, (one, two, -1), (), (-1, -1, -1), 0, 0, (0, 0, 0), 0, -1, 0, 0,
            scope.races, scope.late,
        )  # fmt: skip
        """Where it all begins."""

    # --- steps ---

    def steps(self, w: World) -> Iterator[Step]:
        """What may happen next, and what comes of it."""
        if w.t < LAST:
            yield ("tick",), w._replace(t=w.t + 1)
        for h, number in enumerate(w.holders):
            if number >= 0:
                yield from self._holder_steps(w, h, self._holders.things[number])
        for message in w.messages:
            thing = self._messages.things[message]
            rest = w._replace(messages=tuple(m for m in w.messages if m != message))
            if thing.answer is None:
                yield from self._ask_any(rest, thing, "late")
            else:
                yield ("late answer to", thing.holder, thing.answer), self._deliver(rest, thing)
        if w.pending[0] >= 0:
            yield ("the swap that was overtaken",), self._resume(w)
        if self.scope.loss and not w.lost and w.records != self.first.records:
            yield ("the store is emptied, and that is noticed",), self._lose(w, noticed=True)
            yield ("the store is emptied",), self._lose(w, noticed=False)
        if self.scope.clone and w.shared_draws < 0:
            yield ("clone",), self._clone(w)

    def _holder_steps(self, w: World, h: int, holder: Snapshot) -> Iterator[Step]:
        if holder.standing is Standing.RELEASED:
            return
        for offset in OFFSETS[: len(self.scope.delegators)]:
            after = self._take(w, h, w.t + offset)
            if after is not None:
                yield (h, "mints at", w.t + offset), after
        if holder.draws < MOST_DRAWS or holder.next is not None:
            number, request = self._remember(self._poll, w.holders[h])
            polled = w._replace(holders=_put(w.holders, h, number))
            asked = Message(h, request)
            yield from self._ask_any(polled, asked, "asks")
            if w.late:
                posted = self._post(polled._replace(late=w.late - 1), asked)
                yield (h, "asks, late:", request), posted
                yield from self._ask_any(posted, asked, "asks twice")
        if holder.machine >= 0:
            number, request = self._remember(self._close, w.holders[h])
            closed = w._replace(holders=_put(w.holders, h, number))
            asked = Message(h, request)
            yield (h, "closes, late:", request), self._post(closed, asked)
            yield from self._ask_any(closed, asked, "closes")

    def _ask_any(self, w: World, asked: Message, what: str) -> Iterator[Step]:
        for d in self.scope.delegators:
            for how, after in self._ask(w, asked, d):
                yield (asked.holder, what, "delegator", d, asked.request, *how), after

    def _ask(self, w: World, asked: Message, d: int) -> Iterator[Step]:
        """A delegator has a request: it decides, swaps (or is overtaken before that), and answers."""
        now = w.t + OFFSETS[d]
        w = self._witness(w, asked.request, now)
        decision = self._decide(w, asked.request, now)
        if isinstance(decision, Swap) and w.pending[0] < 0 and w.races:
            pending = (self._messages.number(asked), self._swaps.number((decision, now)), d)
            yield ("but is overtaken",), w._replace(pending=pending, races=w.races - 1)
        w, sent = self._answer(w, asked, decision, now)
        yield (), self._deliver(w, sent)
        if isinstance(sent.answer, Grant):
            yield ("but the answer is late",), self._post(w, sent)

    def _resume(self, w: World) -> World:
        """The swap that was decided on earlier is tried; where it lost its race, the decision is made anew."""
        asked = self._messages.things[w.pending[0]]
        swap, decided_at = self._swaps.things[w.pending[1]]
        now = w.t + OFFSETS[w.pending[2]]
        w = w._replace(pending=(-1, -1, -1))
        old = self._records.things[w.records[swap.new.machine]]
        decision: Answer | Swap = swap
        if (old.gen, w.version) != (swap.new.gen - 1, swap.version):
            w = self._witness(w, asked.request, now)
            decision, decided_at = self._decide(w, asked.request, now), now
        return self._deliver(*self._answer(w, asked, decision, decided_at))

    def _post(self, w: World, message: Message) -> World:
        number = self._messages.number(message)
        if number in w.messages or len(w.messages) == MOST_MESSAGES:
            return w  # there it is already; or it is lost
        return w._replace(messages=tuple(sorted((*w.messages, number))))

    # --- the store ---

    def _meta(self, w: World) -> Meta:
        return replace(META, floor=w.floor, version=w.version)

    def _decide(self, w: World, request: Request, now: int) -> Answer | Swap:
        key = (w.records, w.floor, w.version, request, now)
        decision: Answer | Swap | None = self._memory.get(key)
        if decision is None:
            records = [self._records.things[number] for number in w.records]
            meta = self._meta(w)
            match request:
                case Acquire(next=token):
                    decision = lessor.acquire(
                        meta,
                        now,
                        request,
                        repeat=next((r for r in records if r.token == token), None),
                        lowest=sorted(records, key=lambda r: (r.fence, r.machine)),
                        pick=lambda n: 0,  # noqa: ARG005
                    )
                case Renew():
                    decision = lessor.renew(meta, now, request, record=records[request.machine])
                case Release():
                    decision = lessor.release(meta, now, request, record=records[request.machine])
            self._memory[key] = decision
        return decision

    def _witness(self, w: World, request: Request, now: int) -> World:
        if w.lost != 2 or not isinstance(request, Renew):
            return w
        record = self._records.things[w.records[request.machine]]
        request = replace(request, store_id=META.store_id)  # what every holder here was granted by
        meta = loss.witnessed(self._meta(w), now, w.t + max(OFFSETS), request, record=record)
        if meta is None:
            return w
        return w._replace(floor=meta.floor, version=w.version + 1)

    def _answer(self, w: World, asked: Message, decision: Answer | Swap, now: int) -> tuple[World, Message]:
        """What was decided happens; gives the answer, after a swap off the record."""
        if not isinstance(decision, Swap):
            return w, asked._replace(answer=decision)
        new = decision.new
        old = self._records.things[w.records[new.machine]]
        w = (
            self._released(w, asked.holder, old, new, now)
            if new.token is None
            else self._granted(w, old, new)
        )
        w = w._replace(records=_put(w.records, new.machine, self._records.number(new)))
        if new.token is None:
            return w, asked._replace(answer=Released(new.machine, new.fence))
        answer = self._decide(w, asked.request, now)
        if not isinstance(answer, Grant):
            raise Violation(f"durable: what was just granted is not repeated, but {answer}")
        return w, asked._replace(answer=answer)

    def _owners(self, w: World, token: Token) -> tuple[int, ...]:
        holder, draw = token[0] - 1, token[1]
        return (0, 2) if holder == 0 and draw < w.shared_draws else (holder,)

    def _granted(self, w: World, old: Record, new: Record) -> World:
        assert new.token is not None
        if new.start >= new.fence:
            raise Violation(f"disjoint: an empty window {new}")
        if new.start < w.floor:
            raise Violation(f"floor: {new} begins below {w.floor}")
        if new.fence > w.t + max(OFFSETS) + TTL:
            raise Violation(f"leak: {new} ends more than a ttl from now")
        if new.token == old.token:
            raise Violation(f"rotated: {new} has the token of {old}")
        owners = self._owners(w, new.token)
        if new.start != new.tenancy_start and (
            old.token is None or not set(owners) & set(self._owners(w, old.token))
        ):
            raise Violation(f"superseded: {new} is renewed after {old}")
        bits = _bits(new.machine, new.start, new.fence)
        if bits & w.sole:
            raise Violation(f"disjoint: {new} overlaps a window that stands")
        owned = w.owned
        for owner in owners:
            owned = _put(owned, owner, owned[owner] | bits)
        return w._replace(owned=owned, shared=w.shared | (bits if len(owners) > 1 else 0))

    def _released(self, w: World, h: int, old: Record, new: Record, now: int) -> World:
        if old.token is None or new.fence > old.fence:
            raise Violation(f"released: {old} became {new}")
        if new.fence < min(old.fence, now):
            raise Violation(f"released: {new} gives back what has passed at {now}")
        cut = _bits(new.machine, new.fence, old.fence)
        if _ticks_of(w.ids) & w.owned[h] & cut & ~w.shared & ~w.forgotten:
            raise Violation(f"released: {new} gives back ticks that were minted in")
        w = w._replace(owned=_put(w.owned, h, w.owned[h] & ~cut))
        if w.sole & cut & ~_bits(new.machine, 0, w.floor):
            raise Violation(f"released: {new} gives back another holder's window")
        return w

    def _lose(self, w: World, *, noticed: bool) -> World:
        empty = self.first.records
        if noticed:
            meta = loss.after_loss(self._meta(w), "", w.t + max(OFFSETS), ttl=TTL, floor=0, version=0)
            return w._replace(records=empty, floor=meta.floor, version=w.version + 1, lost=1)
        everything = w.owned[0] | w.owned[1] | w.owned[2]
        return w._replace(records=empty, lost=2, forgotten=everything)

    # --- holders ---

    def _clone(self, w: World) -> World:
        holder = self._holders.things[w.holders[0]]
        clone = self._holders.number(holder._replace(number=2))
        owned = (w.owned[0], w.owned[1], w.owned[0])
        return w._replace(
            holders=_put(w.holders, 2, clone),
            owned=owned,
            shared=w.shared | w.owned[0],
            shared_draws=holder.draws,
            by_pair=w.by_pair | (_ticks_of(w.ids) & w.owned[0]),
        )

    def _deliver(self, w: World, sent: Message) -> World:
        """A holder hears an answer."""
        h = sent.holder
        number, settled = self._remember(self._receive, w.holders[h], sent.request, sent.answer, w.t)
        if isinstance(settled, str) and w.lost != 2:
            raise Violation(f"disjoint: {h} refused its grant: {settled}")
        if settled and isinstance(sent.answer, Refusal):
            holder = self._holders.things[w.holders[h]]
            record = self._records.things[w.records[holder.machine]]
            alone = h == 1 or w.shared_draws < 0
            if alone and not w.lost and record.token in (holder.token, holder.next):
                raise Violation(f"lost: {h} was told so, and {record} is its own")
            if w.forgotten and holder.end > w.floor and holder.gen > record.gen:
                raise Violation(f"floor: {h} showed that the store forgot its window, and none rose")
        return w._replace(holders=_put(w.holders, h, number))

    def _take(self, w: World, h: int, now: int) -> World | None:
        number, run = self._remember(self._mint, w.holders[h], now)
        if run is None:
            return None
        holder = self._holders.things[w.holders[h]]
        tick, machine, sequence = run[0] >> 2, run[0] >> 1 & 1, run[0] & 1
        if (tick, sequence) < (holder.tick, holder.sequence) or run[2] != 1:
            raise Violation(
                f"ordered: {h} minted ({tick}, {sequence}) after {holder.tick}, {holder.sequence}"
            )
        bit = 1 << machine * TICKS + tick
        if not bit & w.owned[h]:
            raise Violation(
                f"inside: {h} minted at tick {tick} of machine {machine}, not in a window of its own"
            )
        pair = h != 1 and w.shared_draws >= 0
        id_bit = bit << sequence * BITS
        if w.ids & id_bit and not w.forgotten & bit and not (w.shared & bit and (pair or w.by_pair & bit)):
            raise Violation(f"unique: {h} minted ({tick}, {machine}, {sequence}) again")
        return w._replace(
            holders=_put(w.holders, h, number),
            ids=w.ids | id_bit,
            by_pair=w.by_pair | (bit if pair else 0),
        )

    def _remember(self, do: Callable[..., Any], number: int, *arguments: Any) -> Any:
        key = (do.__name__, number, *arguments)
        found = self._memory.get(key)
        if found is None:
            found = self._memory[key] = do(number, *arguments)
        return found

    def _wake(self, number: int) -> Lessee:
        """A lessee in the state of a snapshot."""
        holder: Snapshot = self._holders.things[number]
        lessee = Lessee.__new__(Lessee)
        vars(lessee).update(self._template)
        lessee.state = holder.standing
        lessee.token, lessee._gen, lessee._next = holder.token, holder.gen, holder.next
        lessee.send_at_us = 0
        lessee._draw_token = lambda: bytes([holder.number + 1, holder.draws]) + bytes(14)
        if holder.machine >= 0:
            mint = lessee.mint = Mint(LAYOUT, holder.machine)
            mint._windows = deque(holder.windows)
            mint.end, mint._tick, mint._sequence = holder.end, holder.tick, holder.sequence
        return lessee

    def _sleep(self, lessee: Lessee, before: int) -> int:
        """The snapshot of a lessee."""
        holder: Snapshot = self._holders.things[before]
        mint = lessee.mint
        drawn = lessee._next is not None and lessee._next != holder.next
        snapshot = Snapshot(
            holder.number,
            holder.draws + drawn,
            lessee.state,
            -1 if mint is None else mint.machine,
            () if mint is None else tuple(mint._windows),
            0 if mint is None else mint.end,
            -1 if mint is None else mint._tick,
            0 if mint is None else mint._sequence,
            lessee.token,
            lessee._gen,
            lessee._next,
        )
        return self._holders.number(snapshot)

    def _poll(self, number: int) -> tuple[int, Request]:
        lessee = self._wake(number)
        request = lessee.poll(0)
        assert request is not None
        return self._sleep(lessee, number), request

    def _receive(self, number: int, request: Request, answer: Answer, now: int) -> tuple[int, bool | str]:
        """Whether the answer settled the request; or why no sound delegator gives it."""
        lessee = self._wake(number)
        if isinstance(answer, Released):
            return number, False
        # A refusal must be the answer to the newest request: the owner sees to that.
        if isinstance(answer, Refusal) and (answer.reason is not Refused.LOST or lessee.poll(0) != request):
            return number, False
        try:
            settled = lessee.receive(answer, 0, now)
        except ProtocolError as error:
            return self._sleep(lessee, number), str(error)
        return self._sleep(lessee, number), settled

    def _mint(self, number: int, now: int) -> tuple[int, tuple[int, int, int] | None]:
        lessee = self._wake(number)
        run = None if lessee.mint is None else lessee.mint.take(now, 1)
        return (self._sleep(lessee, number), run) if run else (number, None)

    def _close(self, number: int) -> tuple[int, Release]:
        lessee = self._wake(number)
        release = lessee.close()
        assert release is not None
        return self._sleep(lessee, number), release


def _put(those: tuple[Any, ...], index: int, value: Any) -> Any:
    return (*those[:index], value, *those[index + 1 :])


def _bits(machine: int, start: int, end: int) -> int:
    return ((1 << end) - (1 << start)) << machine * TICKS if end > start else 0


def _ticks_of(ids: int) -> int:
    """The ticks in which there are IDs."""
    return (ids | ids >> BITS) & (1 << BITS) - 1


def explore(scope: Scope, states: int, *, going_on: Callable[[], bool] = lambda: True) -> Result:
    """Visit so many states, nearest first, while `going_on`; stops at the first that must not be."""
    explorer = Explorer(scope)
    first = explorer.first
    # How each state came about: from which, by what.  Hashes of 64 bits: that two of a million states share one is
    # less likely than a fault of the memory.
    seen: dict[int, tuple[int, tuple[Any, ...]]] = {hash(first): (0, ())}
    queue = deque([first])
    depth = 0
    left = 1  # at this depth
    while queue and len(seen) < states and going_on():
        world = queue.popleft()
        from_ = hash(world)
        try:
            for what, after in explorer.steps(world):
                key = hash(after)
                if key not in seen:
                    seen[key] = from_, what
                    queue.append(after)
        except Violation as violation:
            path: list[str] = []
            while from_ != hash(first):
                from_, what = seen[from_]
                path.insert(0, " ".join(map(str, what)))
            return Result(len(seen), depth, "\n".join([f"{violation}, after", *path]))
        left -= 1
        if not left:
            depth, left = depth + 1, len(queue)
    return Result(len(seen), depth)
