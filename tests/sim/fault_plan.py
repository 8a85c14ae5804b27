"""What one seed draws: a cluster, and which faults befall it.

Swarm testing: a history has a random subset of the faults, each as strong as drawn.  All of them together
would hide from each other; a history in which only releases are lost says more about releases.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from random import Random
from typing import Final

from zflake.core.layout import EPOCH_2020_MS, PRESETS, Field, Layout


def _layout(name: str, time: int, machine: int, sequence: int, tick_ms: int) -> Layout:
    fields = (Field("time", time), Field("machine", machine), Field("sequence", sequence))
    return Layout(name, fields, EPOCH_2020_MS, tick_ms)


SMALL: Final = _layout("small", 41, 3, 3, 1)
TENTHS: Final = _layout("tenths", 37, 3, 2, 10)
SHORT: Final = _layout("short", 24, 3, 4, 1)
SHORT_TENTHS: Final = _layout("short tenths", 24, 2, 2, 10)
TODAY_US: Final = 1_760_000_000_000_000

# What the demon may do, how often of ten histories it is on, and how likely against the others.
ACTS: Final = {
    "crash worker": (4, 3),
    "release": (5, 4),
    "pause worker": (3, 3),
    "clone": (2, 2),
    "fork": (2, 2),
    "new worker": (3, 2),
    "crash delegator": (4, 3),
    "pause delegator": (2, 2),
    "step wall": (3, 3),
    "partition": (3, 2),
    "outage": (2, 1),
    "new ttl": (1, 1),
    "new range": (1, 1),
}
LOSSES: Final = ("rollback noticed", "rollback unnoticed", "emptied")


@dataclass(frozen=True, slots=True)
class Weather:
    """How likely the network and the store do what they should not, and for how long."""

    drop: float = 0.0
    duplicate: float = 0.0
    delay: float = 0.0
    delay_us: int = 0
    slow: float = 0.0
    slow_us: int = 0
    unknown: float = 0.0
    crash: float = 0.0


FINE: Final = Weather()


@dataclass(slots=True)
class FaultPlan:
    """One history's cluster and its faults."""

    layout: Layout
    ttl_ms: int
    machines: tuple[int, int]
    workers: int
    delegators: int
    clients: int
    wall_us: int
    fault_us: int
    """How long the faults last."""
    ping_us: int
    thirst: float
    """How likely a worker mints whenever something happens to it."""
    edges: float
    """How likely it mints in its window's last tick and the one after it."""
    acts: dict[str, int] = field(default_factory=dict)
    """What the demon may do, with weights."""
    act_us: int = 500_000
    """How often, on average."""
    loss: str | None = None
    accept: bool = False
    weather: Weather = FINE
    step_us: int = 0
    drift: int = 0
    skew_us: int = 0
    stale_grants: bool = False
    stale_clock: float = 0.0
    """How often a mint is given a time that has passed."""
    marked: bool = False
    """Whether something beside a store that is emptied shows that it was there."""
    stranger: float = 0.0

    def __str__(self) -> str:
        on = [
            f"{name}={value:.3g}" if isinstance(value, float) else f"{name}={value}"
            for part in (self, self.weather)
            for name in part.__slots__
            if (value := getattr(part, name)) and name not in ("layout", "acts", "weather")
        ]
        return f"layout {self.layout.name}, {', '.join(on)}; {', '.join(self.acts) or 'no acts'}"


def draw(rng: Random) -> FaultPlan:
    """A history's plan."""

    def strength(chance: float, most: float) -> float:
        return rng.random() ** 2 * most if rng.random() < chance else 0.0

    layout = rng.choice((SMALL, SMALL, TENTHS, PRESETS["snowcloud"], PRESETS["sonyflake"]))
    fault_us = rng.randrange(2_500_000, 7_000_000)
    wall_us = TODAY_US + rng.randrange(1_000_000)
    if rng.random() < 0.05:  # the layout ends in the middle of it, or soon after
        layout = rng.choice((SHORT, SHORT_TENTHS))
        wall_us = layout.epoch_us + layout.end_tick * layout.tick_us - rng.randrange(1_000_000, 12_000_000)
    first = rng.randrange(2)
    machines = rng.choice((2, 2, 3, 4))
    clients = rng.choice((0, 0, 0, 0, 0, 0, 1, 2, 3))
    plan = FaultPlan(
        layout=layout,
        ttl_ms=rng.choice((1_000, 1_000, 1_500, 2_000, 3_000)),
        machines=(first, min(first + machines - 1, layout.machines - 1)),
        workers=rng.choice((2, 2, 3, 3, 4, 5)),
        delegators=rng.choice((1, 1, 2, 2, 3)),
        clients=clients,
        wall_us=wall_us,
        fault_us=fault_us,
        ping_us=rng.choice((250_000, 500_000)),
        thirst=rng.choice((0.1, 0.3, 0.6)),
        edges=rng.choice((0.0, 0.2, 0.5)),
    )
    plan.acts = {act: weight for act, (tenths, weight) in ACTS.items() if rng.random() * 10 < tenths}
    plan.act_us = rng.choice((200_000, 400_000, 800_000))
    plan.weather = Weather(
        drop=strength(0.35, 0.4),
        duplicate=strength(0.25, 0.4),
        delay=strength(0.35, 0.5),
        delay_us=rng.choice((20_000, 200_000, 1_500_000, 4_000_000)),
        slow=strength(0.35, 0.3),
        slow_us=rng.choice((50_000, 500_000, 2_500_000)),
        unknown=strength(0.25, 0.3),
        crash=strength(0.15, 0.1),
    )
    plan.step_us = rng.choice((100_000, 2_000_000, 8_000_000))
    plan.drift = rng.choice((0, 50, 400))
    plan.skew_us = rng.choice((0, 0, 50_000, 1_500_000))
    plan.stale_grants = rng.random() < 0.2
    plan.stale_clock = strength(0.3, 0.3)
    if clients:
        plan.stranger = strength(0.4, 0.5)
    if rng.random() < 0.04:
        plan.loss = rng.choice(LOSSES)
        plan.marked = rng.random() < 0.5
        plan.ping_us = 1_000_000  # most of it is waiting
    elif rng.random() < 0.03:
        plan.accept = True
    return plan
