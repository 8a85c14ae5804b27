"""What histories came to: how much was checked, under which faults, and what broke."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass
class Figures:
    """Of one history, or of many."""

    histories: int = 0
    ids: int = 0
    """How many IDs were minted, and checked."""
    virtual_us: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    """By kind."""
    counts: Counter[str] = field(default_factory=Counter)
    """Grants, releases, requests, and repeats that the honest limits excuse."""
    failures: list[tuple[int, str]] = field(default_factory=list)
    """The seed of each history that broke a promise, and which."""

    def add(self, other: Figures) -> None:
        self.histories += other.histories
        self.ids += other.ids
        self.virtual_us += other.virtual_us
        self.faults += other.faults
        self.counts += other.counts
        self.failures += other.failures

    def __str__(self) -> str:
        each_s = self.virtual_us / 1e6 / max(1, self.histories)
        figures = f"{self.ids:,} IDs checked, {self.faults.total():,} faults, {len(self.failures)} violations"
        lines = [
            f"{self.histories:,} histories of {each_s:.1f} s: {figures}",
            ", ".join(f"{name} {count:,}" for name, count in sorted(self.counts.items())),
            "faults: " + ", ".join(f"{name} {count:,}" for name, count in sorted(self.faults.items())),
        ]
        lines += [f"seed {seed}: {why}" for seed, why in self.failures]
        if self.failures:
            lines.append(f"replay: scripts/soak sim --seed {self.failures[0][0]} --trace")
        return "\n".join(lines)
