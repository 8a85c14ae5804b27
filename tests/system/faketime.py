"""Wall clocks that are wrong: a preloaded library shows processes another time, and steps it while they run.

The wall clock alone is faked.  The clocks that daemons run on (CLOCK_BOOTTIME, CLOCK_MONOTONIC) stay true,
as they do when an operator sets the clock of a real machine.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import time
from functools import cache
from pathlib import Path
from typing import Final

from tests.servers import not_tested
from tests.system.daemons import environment

HOUR_S: Final = 3600
YEAR_S: Final = 366 * 24 * HOUR_S

PROBE: Final = """
import sys, time
def look():
    return time.time(), time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)), time.monotonic()
before = look()
open(sys.argv[1], "w").write("-7200")
time.sleep(0.05)
print(*(f"{b - a:.3f}" for a, b in zip(before, look())), f"{before[0]:.3f}")
"""


class WrongClock:
    """A wall clock that is off by a number of seconds; `env` is for the processes that are to see it."""

    def __init__(self, path: Path, off_s: int = 0) -> None:
        library = _library()
        assert library is not None
        self._path = path
        self.set(off_s)
        self.env: Final = {
            "LD_PRELOAD": str(library),
            "FAKETIME_TIMESTAMP_FILE": str(path),
            "FAKETIME_NO_CACHE": "1",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        }

    def set(self, off_s: int) -> None:
        """Step the clock, to be off by so much from now on."""
        self.off_s = off_s
        fresh = self._path.with_suffix(".new")
        fresh.write_text(f"{off_s:+d}")
        fresh.replace(self._path)

    def time(self) -> float:
        return time.time() + self.off_s


def clean_up_after(pid: int) -> None:
    """Remove what the library leaves behind of a process that was killed."""
    for name in (f"faketime_shm_{pid}", f"sem.faketime_sem_{pid}"):
        Path("/dev/shm", name).unlink(missing_ok=True)


def why_not(folder: Path) -> str:
    """Why clocks can't be faked here; empty where they can."""
    if _library() is None:
        return "the package libfaketime is not installed"
    clock = WrongClock(folder / "probe", HOUR_S)
    probe = subprocess.run(
        [sys.executable, "-c", PROBE, str(folder / "probe")],
        check=False,
        capture_output=True,
        text=True,
        env=environment(clock.env),
        timeout=10,
    )
    try:
        wall, boot, monotonic, shown = map(float, probe.stdout.split())
    except ValueError:
        return f"the probe printed {probe.stdout!r}, {probe.stderr!r}"
    if abs(shown - time.time() - HOUR_S) > 5 or abs(wall + 3 * HOUR_S) > 5:
        return f"the wall clock was not faked: {probe.stdout}{probe.stderr}"
    if not 0.04 < boot < 5 or not 0.04 < monotonic < 5:
        return f"a clock that must not be was faked: {probe.stdout}"
    return ""


def need_faketime(folder: Path) -> None:
    """Skip the test if clocks can't be faked; on CI that is a failure."""
    if reason := why_not(folder):
        not_tested(f"wrong clocks are NOT TESTED: {reason}")


@cache
def _library() -> Path | None:
    # Not imported: what its package brings along is of no use here.
    spec = importlib.util.find_spec("libfaketime")
    folders = (spec.submodule_search_locations if spec is not None else None) or ()
    found = [
        path for folder in folders for path in Path(folder).glob("vendor/libfaketime/src/libfaketime.so.1")
    ]
    return found[0] if found else None
