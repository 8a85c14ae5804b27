"""What must hold whatever happens, kept in books of its own; no rule of the lessor's is used here.

The checker is told what became durable (`stored`), what holders drew, were told and took, and what every
mint gave, whether or not anybody ever saw it.  From that it holds:

unique       no ID comes twice
inside       every ID lies in a rectangle (machine x window) granted to the very holder that minted it
ordered      (tick, sequence) of one mint strictly increases
disjoint     rectangles on one machine do not overlap, as truncated by releases
released     no release truncates what was minted in
superseded   a tenancy that another one followed is granted nothing any more
durable      a grant that reaches a holder speaks of a record that is stored
rotated      each window has a token of its own
lost         nobody is told `lost` whose lease stands
timeline     the timeline is never ahead of every wall clock that a delegator started by, plus drift
marks        a timeline does not begin before what was used of it
leak         no window ends later than a ttl after the timeline's now; a release frees the rest
floor        nothing is granted below the floor; no floor is further away than the rules of 3.4 say
traced       the store knows who minted each ID, and claims no more
served       a client's call returns each ID once, and only what was minted

Two limits are honest and excused, and nothing more.  A *clone* shares the windows that it held and the
request that was pending when it was made: in those, IDs may repeat.  A store that was *rolled back and does
not notice* may grant again what it forgot, until a witness lifts the floor.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final

from zflake.core.layout import Layout
from zflake.core.lease import Grant, Meta, Record, Release, Released, Span, Token, Traced
from zflake.core.mint import Mint, Run

STALE_US: Final = 5_000_000
"""For how long a delegator may go by a meta that was replaced."""
SAMPLE: Final = 30
"""Of how many ticks is asked who minted in them."""
MOST_PPM: Final = 500
"""The clocks of the simulation drift by less."""
REST_MS: Final = 60_000
MARGIN_MS: Final = 10_000


class Violation(AssertionError):  # noqa: N818  (a finding, not a fault of this program)
    """Something happened that must never happen."""


@dataclass(slots=True, eq=False)
class Rectangle:
    """A window that was granted, and who asked for it."""

    record: Record
    """What the store wrote down for it."""
    holders: tuple[int, ...]
    """Several where one is a clone of another, made while the window was held or pending."""
    life: int
    """In which life of the store it was granted."""
    end: int
    """The window's, as truncated by releases."""
    unknown: bool = False
    """Whether the store lost it: a floor guards it from now on."""
    forgotten: bool = False
    """Whether the store lost it and does not know yet: nothing guards it."""
    blind: bool = False
    """Whether it was granted over one that the store had lost and did not know of."""
    last: int = -1
    """The last tick minted in."""

    def covers(self, tick: int) -> bool:
        """Whether it held a tick when it was granted."""
        return self.record.start <= tick < self.record.fence

    def overlap(self, new: Record) -> bool:
        """Whether it holds any of a newer window."""
        return max(self.record.start, new.start) < min(self.end, new.fence)


@dataclass(slots=True, eq=False)
class Books:
    """What is known of one mint."""

    holder: int
    machine: int
    last: tuple[int, int] = (-1, -1)
    over: bool = False
    """Whether its holder was told `lost`."""
    rectangle: Rectangle | None = None


class WatchedMint(Mint):
    """A mint that shows the checker what it gives."""

    __slots__ = ("books", "checker")

    watching: Checker  # of the history that runs

    def __init__(self, layout: Layout, machine: int) -> None:
        super().__init__(layout, machine)
        self.checker = WatchedMint.watching
        self.books = Books(self.checker.acting, machine)

    def take(self, now: int, count: int) -> Run | None:
        run = super().take(now, count)
        if run is not None:
            self.checker.minted(self.books, self.layout, run, count)
        return run


class Checker:
    """The books of one history."""

    def __init__(self, now_us: Callable[[], int]) -> None:
        self.ids = 0
        self.counts: Counter[str] = Counter()
        self.acting = -1
        """The holder whose code runs now."""
        self.meta: Meta | None = None
        self.most_ttl = 0
        self._now_us = now_us
        self._rectangles: dict[int, list[Rectangle]] = {}
        self._by_token: dict[Token, list[Rectangle]] = {}
        self._drawn: dict[Token, tuple[int, ...]] = {}
        self._used: dict[tuple[int, int], list[tuple[int, int, Books]]] = {}
        self._records: dict[int, list[Record]] = {}
        self._cloned: set[int] = set()
        # By machine: whose the latest write was (nobody's: a release), and of which tenancy.
        self._latest: dict[int, tuple[tuple[int, ...], int]] = {}
        self._gens: dict[int, int] = {}  # of the records as they are now
        self._taken_out: dict[int, int] = {}  # until when machines were not leased
        self.life = 0
        """How often the store has been lost: what was said in an earlier life was right then."""
        self._ceiling_us = -(1 << 62)  # what the timeline may show at true time 0, at most
        self.wall_us: Callable[[], int] = lambda: -(1 << 62)
        """What the latest of all wall clocks shows."""
        self._walls_us = self._ceiling_us  # what any wall clock may have shown then
        self._used_us = -(1 << 62)  # of the timeline, by what is durable
        self._returned: Counter[int] = Counter()
        self._open: Counter[tuple[int, bytes, int]] = Counter()
        self._latest_end = 0

    # --- holders ---

    def drew(self, token: Token) -> None:
        """The acting holder drew a token."""
        if token in self._drawn:
            raise Violation(f"rotated: token {token.hex()} was drawn twice")
        self._drawn[token] = (self.acting,)

    def cloned(self, original: int, clone: int) -> None:
        """A holder was copied with everything that it knows."""
        for token, holders in self._drawn.items():
            if original in holders:
                self._drawn[token] = (*holders, clone)
        for rectangles in self._rectangles.values():
            for rectangle in rectangles:
                if original in rectangle.holders:
                    rectangle.holders = (*rectangle.holders, clone)
        for machine, (holders, tenancy) in self._latest.items():
            if original in holders:
                self._latest[machine] = (*holders, clone), tenancy
        self._cloned |= {original, clone}

    def told(self, grant: Grant) -> None:
        """A grant has reached a holder."""
        told = grant.gen, grant.start, grant.end, grant.token
        records = self._records.get(grant.machine, ())
        if not any((r.gen, r.start, r.fence, r.token) == told for r in records):
            raise Violation(f"durable: {grant} was answered, and no such record was ever stored")

    def lost(self, books: Books, token: Token, life: int) -> None:
        """A holder was told `lost`, in this life of the store; `token` is that of its newest window."""
        self.counts["lost"] += 1
        books.over = True
        holder, machine = books.holder, books.machine
        newest = self._newest(machine, token)
        if newest.forgotten and life == self.life and newest.record.gen >= self._gens.get(machine, 0):
            raise Violation(f"floor: holder {holder} showed that the store forgot its window, and none rose")
        if self._may_be_gone(newest):
            return
        if self._taken_out.get(machine, -STALE_US) > self._now_us() - STALE_US:
            return  # the operator took the machine out of the leased range
        if self._latest.get(machine) == ((holder,), newest.record.tenancy_start):
            raise Violation(f"lost: holder {holder} was told so of machine {machine}, which is its own")

    def _newest(self, machine: int, token: Token) -> Rectangle:
        """The window of a token; after a loss it may have been granted another time."""
        return next(r for r in reversed(self._by_token[token]) if r.record.machine == machine)

    def _may_be_gone(self, newest: Rectangle) -> bool:
        """Whether a tenancy may be over for one of the honest limits: a clone, or a loss since its newest window.

        Or a late copy of its acquire took the machine once more after it: for nobody.
        """
        granted = (r.record for r in self._by_token[newest.record.token or b""])
        tenancies = {r.tenancy_start for r in granted if r.machine == newest.record.machine}
        return len(newest.holders) > 1 or newest.life != self.life or len(tenancies) > 1

    def minted(self, books: Books, layout: Layout, run: Run, asked: int) -> None:
        """A mint gave a run of IDs."""
        first, step, count = run
        self.ids += count
        tick, machine = first >> layout.time_shift, (first >> layout.machine_shift) & (layout.machines - 1)
        low = (first >> layout.sequence_shift) & (layout.ids_per_tick - 1)
        high = low + count
        if not 1 <= count <= asked or high > layout.ids_per_tick or step != 1 << layout.sequence_shift:
            raise Violation(f"unique: a run leaves its tick: {run}")
        if books.over:
            raise Violation(f"lost: holder {books.holder} minted on machine {machine} after it was told so")
        if machine != books.machine:
            raise Violation(f"inside: holder {books.holder} minted on machine {machine}")
        if (tick, low) <= books.last:
            raise Violation(f"ordered: holder {books.holder} minted ({tick}, {low}) after {books.last}")
        books.last = (tick, high - 1)
        rectangle = books.rectangle
        if rectangle is None or not rectangle.record.start <= tick < rectangle.end:
            rectangle = books.rectangle = self._rectangle_of(books, tick)
        rectangle.last = max(rectangle.last, tick)
        self._use(books, tick, low, high)

    def _rectangle_of(self, books: Books, tick: int) -> Rectangle:
        granted = self._rectangles.get(books.machine, ())
        own = [r for r in granted if books.holder in r.holders and r.covers(tick)]
        for rectangle in own:
            if tick < rectangle.end:
                return rectangle
        for rectangle in own:
            if len(rectangle.holders) > 1:  # a clone gave it back
                return rectangle
        raise Violation(
            f"inside: holder {books.holder} minted at tick {tick} of machine {books.machine}, "
            "which lies in no window granted to it"
        )

    def _use(self, books: Books, tick: int, low: int, high: int) -> None:
        machine = books.machine
        used = self._used.get((machine, tick))
        if used is None:
            self._used[machine, tick] = [(low, high, books)]
            return
        last_low, last_high, last_books = used[-1]
        if last_books is books and last_high == low and len(used) == 1:
            used[-1] = (last_low, high, books)
            return
        for other_low, other_high, other in used:
            if low < other_high and other_low < high:
                self._excuse(books, other, tick)
        used.append((low, high, books))

    def _excuse(self, books: Books, other: Books, tick: int) -> None:
        machine = books.machine
        granted = [r for r in self._rectangles[machine] if r.covers(tick)]
        if any(len(r.holders) > 1 and {books.holder, other.holder} & set(r.holders) for r in granted):
            self.counts["repeats_of_clones"] += 1
        elif any(r.forgotten or r.blind for r in granted):
            self.counts["repeats_after_rollback"] += 1
        else:
            raise Violation(
                f"unique: tick {tick} of machine {machine} repeats IDs: "
                f"holder {books.holder} after holder {other.holder}"
            )

    # --- the store ---

    def stored(self, old: Record, new: Record) -> None:
        """A record became durable in place of another."""
        self._records.setdefault(new.machine, []).append(new)
        self._gens[new.machine] = new.gen
        if new.token is None:
            self._released(old, new)
        elif new.token == old.token:
            raise Violation(f"rotated: machine {new.machine} was written again with the token it had")
        else:
            self._granted(new)

    def _granted(self, new: Record) -> None:
        meta = self.meta
        self.counts["grants"] += 1
        assert new.token is not None
        if meta is None:
            raise Violation("floor: a grant in a store without a meta")
        if new.start >= new.fence:
            raise Violation(f"disjoint: machine {new.machine} has an empty window {new.start}..{new.fence}")
        if new.start < meta.floor:
            raise Violation(f"floor: machine {new.machine} was granted {new.start}, below {meta.floor}")
        if not meta.first_machine <= new.machine <= meta.last_machine:
            raise Violation(f"floor: machine {new.machine} is not leased")
        if new.fence > meta.layout.end_tick:
            raise Violation(f"inside: the window until {new.fence} leaves the layout")
        holders = self._drawn.get(new.token)
        if holders is None:
            raise Violation(f"superseded: machine {new.machine} went to a token that nobody drew")
        for other in self._by_token.get(new.token, ()):
            tenancy = other.record.machine, other.record.tenancy_start, other.life
            if other.end <= other.record.start:
                continue  # given back unused: another tenancy may begin at the same tick
            if tenancy == (new.machine, new.tenancy_start, self.life) and len(holders) == 1:
                raise Violation(f"rotated: a second window on machine {new.machine} for one token")
        top = self._ceiling_tick(meta)
        if new.fence > top + self.most_ttl + 1:
            raise Violation(
                f"leak: machine {new.machine} was granted until {new.fence}, {new.fence - top} ticks past "
                "the latest time that any clock shows"
            )
        rectangle = Rectangle(new, holders, self.life, new.fence)
        rectangles = self._rectangles.setdefault(new.machine, [])
        for other in rectangles:
            if other.overlap(new):
                if not other.forgotten:
                    raise Violation(
                        f"disjoint: machine {new.machine} was granted [{new.start}, {new.fence}) to {holders} "
                        f"and [{other.record.start}, {other.end}) to {other.holders}"
                    )
                rectangle.blind = True
        latest = self._latest.get(new.machine)
        if latest is not None and new.start != new.tenancy_start and not set(holders) & set(latest[0]):
            raise Violation(
                f"superseded: machine {new.machine} was renewed by {holders} after {latest[0]} had taken it"
            )
        self._latest[new.machine] = holders, new.tenancy_start
        rectangles.append(rectangle)
        self._by_token.setdefault(new.token, []).append(rectangle)
        self._latest_end = max(self._latest_end, new.fence)

    def _released(self, old: Record, new: Record) -> None:
        self.counts["releases"] += 1
        if old.token is None:
            raise Violation(f"released: machine {new.machine}, which nobody held")
        self._latest[new.machine] = (), 0
        if new.fence > old.fence:
            raise Violation(f"released: the fence of machine {new.machine} rose")
        releasing = self._drawn.get(old.token, ())
        for rectangle in self._rectangles.get(new.machine, ()):
            if rectangle.end <= max(new.fence, rectangle.record.start) or rectangle.unknown:
                continue
            if not set(rectangle.holders) & set(releasing):
                raise Violation(
                    f"released: machine {new.machine}: {releasing} cut the window of {rectangle.holders}"
                )
            if rectangle.last >= new.fence and len(rectangle.holders) == 1:
                raise Violation(
                    f"released: machine {new.machine} was cut at {new.fence}; tick {rectangle.last} was minted in"
                )
            rectangle.end = max(rectangle.record.start, new.fence)

    def settled(self, meta: Meta) -> None:
        """A meta became durable."""
        before = self.meta
        self.meta = meta
        for machine in range(meta.layout.machines if meta.layout.machines < 100 else 10):
            if not meta.first_machine <= machine <= meta.last_machine:
                self._taken_out[machine] = 1 << 62
            elif self._taken_out.get(machine) == 1 << 62:
                self._taken_out[machine] = self._now_us()
        self.most_ttl = max(self.most_ttl, meta.ttl)
        if before is not None and before.store_id == meta.store_id:
            if meta.floor < before.floor:
                raise Violation(f"floor: it fell from {before.floor} to {meta.floor}")
            if not before.layout.same_ids(meta.layout):
                raise Violation("floor: the store's layout changed")
        if before is not None and meta.floor > before.floor:
            for rectangles in self._rectangles.values():
                for rectangle in rectangles:
                    if rectangle.record.fence <= meta.floor:
                        rectangle.forgotten = False
        top_us = max(self._walls_us + self._drift_us(), self.wall_us())
        top = max(self._ceiling_tick(meta), (top_us - meta.layout.epoch_us) // meta.layout.tick_us + 1)
        rest = max(-(-REST_MS // meta.layout.tick_ms), self.most_ttl) + -(-MARGIN_MS // meta.layout.tick_ms)
        most = max(top, self._latest_end) + rest + 2
        if meta.floor > most:
            raise Violation(f"floor: {meta.floor} is {meta.floor - most} ticks further than any loss demands")

    def store_lost(self, records: dict[int, Record], meta: Meta | None, *, noticed: bool) -> None:
        """The store is what it was when it held these records, and does not know it unless `noticed`."""
        self.life += 1
        self.meta = meta
        self._latest.clear()
        self._gens = {machine: record.gen for machine, record in records.items()}
        self._used_us = -(1 << 62)
        for machine, rectangles in self._rectangles.items():
            record = records.get(machine, Record(machine))
            for rectangle in rectangles:
                if rectangle.end > record.fence:
                    rectangle.unknown, rectangle.forgotten = True, rectangle.forgotten or not noticed

    # --- delegators ---

    def wall(self, wall_us: int) -> None:
        """A wall clock shows this."""
        self._walls_us = max(self._walls_us, wall_us - self._drift_us())

    def cold_start(self, wall_us: int) -> None:
        """A delegator that starts reads its wall clock."""
        self.wall(wall_us)
        self._ceiling_us = max(self._ceiling_us, wall_us - self._drift_us())

    def started(self, now_us: int, *, accepted: bool) -> None:
        """A delegator has begun a timeline at `now_us`."""
        if accepted:
            self._used_us = -(1 << 62)
        if now_us < self._used_us:
            raise Violation(f"marks: a timeline began {self._used_us - now_us} us before what was used of it")
        self.timeline(now_us)

    def used(self, now_us: int) -> None:
        """A mark or a commit became durable at this timeline's now."""
        self._used_us = max(self._used_us, now_us)

    def timeline(self, now_us: int) -> None:
        """A delegator's timeline shows this now."""
        if now_us > self._ceiling_us + self._drift_us() + 1000:
            raise Violation(
                f"timeline: it is {now_us - self._ceiling_us - self._drift_us()} us ahead of every wall clock"
            )

    def _drift_us(self) -> int:
        now_us = self._now_us()
        return now_us + now_us * MOST_PPM // 1_000_000

    def _ceiling_tick(self, meta: Meta) -> int:
        top_us = self._ceiling_us + self._drift_us() + 1000
        return (top_us - meta.layout.epoch_us) // meta.layout.tick_us + 1

    # --- answers ---

    def was_released(self, release: Release, answer: Released) -> None:
        """A holder was told that its release stands."""
        meta = self.meta
        if meta is None:  # the store was emptied meanwhile
            return
        top = self._ceiling_tick(meta)
        records = self._records.get(answer.machine, ())
        if not any(r.token is None and r.fence == answer.fence for r in records):
            raise Violation(f"durable: no record says that machine {answer.machine} was released")
        if release.machine != answer.machine or answer.fence > top + 1:
            raise Violation(f"leak: machine {answer.machine} was given back and rests until {answer.fence}")

    def traced(self, spans: Iterable[Span], trace: Callable[[int, int], Traced]) -> None:
        """The store says who was granted what; nothing was lost in this history."""
        for span in spans:
            if span.holder.pid in self._cloned:
                continue
            covered = span.start
            for rectangle in sorted(self._rectangles.get(span.machine, ()), key=lambda r: r.record.start):
                if rectangle.record.start == covered and span.holder.pid in rectangle.holders:
                    covered = rectangle.end
            if covered < span.end:
                raise Violation(f"traced: {span} says more than was granted, which ends at {covered}")
        for machine, tick in list(self._used)[:: max(1, len(self._used) // SAMPLE)]:
            holders = {books.holder for _, _, books in self._used[machine, tick]}
            found = trace(machine, tick).span
            if not holders & self._cloned and (found is None or {found.holder.pid} != holders):
                raise Violation(f"traced: {holders} minted at tick {tick} of machine {machine}, not {found}")

    def was_not_released(self, holder: int, release: Release) -> None:
        """A holder's release was refused: there is nothing to give back."""
        newest = self._newest(release.machine, release.token)
        if self._may_be_gone(newest):
            return
        if self._latest.get(release.machine) == ((holder,), newest.record.tenancy_start):
            raise Violation(f"leak: machine {release.machine} was not taken back from holder {holder}")

    def asked(self, delegator: int, client: bytes, msgid: int) -> None:
        """A client's request for IDs has reached a delegator."""
        self._open[delegator, client, msgid] += 1

    def answered(self, delegator: int, client: bytes, msgid: int) -> None:
        """A delegator passes an answer on to a client."""
        self._open[delegator, client, msgid] -= 1
        if self._open[delegator, client, msgid] < 0:
            raise Violation(f"served: a request of {client!r} was answered twice")

    def served(self, layout: Layout, runs: list[Run], count: int) -> None:
        """A client's call returned these runs for `count` IDs."""
        self.counts["taken by clients"] += count
        if sum(run[2] for run in runs) != count:
            raise Violation(f"served: {runs} for {count} IDs")
        for first, step, length in runs:
            for each in range(length):
                id_ = first + step * each
                it = layout.decompose(id_)
                used = self._used.get((it.machine, it.tick), ())
                minted = sum(low <= it.sequence < high for low, high, _ in used)
                if not minted:
                    raise Violation(f"served: nobody minted ID {id_}")
                self._returned[id_] += 1
                if self._returned[id_] > minted:  # a repeat may have been excused when it was minted
                    raise Violation(f"served: ID {id_} was returned {self._returned[id_]} times")
