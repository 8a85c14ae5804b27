"""`scripts/soak`: the long proofs, with real processes and in virtual time."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import pytest

from tests.fuzz import fuzz
from tests.fuzz import mutants as fuzz_mutants
from tests.jobs import cluster, crowd, delegators, engines, kills
from tests.jobs.job import Report
from tests.sim import mutants
from tests.sim import soak as simulation
from tests.system import flood

Result: TypeAlias = (
    crowd.Result | flood.Result | fuzz.Result | kills.Result | cluster.Result | delegators.Result
)
N = TypeVar("N", int, float)
Proof: TypeAlias = Callable[..., Result]
"""Takes a folder, and a verb's options and a `Report` by their names."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/soak", description="Long proofs.")
    verbs = parser.add_subparsers(dest="verb", required=True)

    def verb(name: str, text: str, proof: Proof | None = None) -> Callable[..., Any]:
        """A verb; gives what adds its options.  A proof may keep its files."""
        added = verbs.add_parser(name, help=text, description=text)
        added.set_defaults(proof=proof)
        if proof is not None and name != "cluster":
            added.add_argument("--keep", type=Path, metavar="DIR", help="an empty folder for all files, kept")
        return added.add_argument

    option = verb("main-job", "many IDs through a cluster while its parts fail", cluster.run_main)
    option("--ids", type=_at_least(100_000), default=10_000_000, help="how many IDs (default: %(default)s)")
    option("--seed", type=int, default=1, help="of the clients' calls and the faults' choices")
    option(
        "--route",
        choices=(cluster.HALF, "auto", "direct", "broker"),
        default=cluster.HALF,
        help="how clients ask: half of them auto and half broker, or all alike (default: %(default)s)",
    )
    option = verb("flood", "far more requests than a delegator can pass on", flood.run)
    option("--seconds", type=_at_least(1.0), default=30.0, help="how long (default: %(default)g)")
    option = verb("fuzz", "hostile peers and servers, without end", _fuzz)
    option("--messages", type=_at_least(1), default=1_000_000, help="how many (default: %(default)s)")
    option("--seed", type=int, default=1, help="of all that is sent")
    option("--episode", type=int, help="this one alone, of those that the seed makes")
    verb("fuzz-mutants", "see that the fuzzer notices each missing guard")
    option = verb("crowd", "peers that ask and read nothing, and idle ones, beside many leases", crowd.run)
    option("--seconds", type=_at_least(1.0), default=40.0, help="how long (default: %(default)g)")
    option("--peers", type=_at_least(1), default=1_000, help="those that read nothing (default: %(default)s)")
    option("--idle", type=_at_least(1), default=8_000, help="those that say nothing (default: %(default)s)")
    option = verb("kills", "a delegator killed at every point around commit and reply", _kills)
    option("--rounds", type=int, default=3, help="how often at each (default: %(default)s)")
    option("--seed", type=int, default=1, help="of the points' order")
    option = verb("cluster", "as many IDs as there can be, while everything fails", cluster.run)
    option("--ids", type=_at_least(1), default=1_000_000_000, help="how many IDs (default: %(default)s)")
    option(
        "--part", type=_at_least(1), default=cluster.PART, help="how many at a time (default: %(default)s)"
    )
    option("--parts", type=int, help="after how many parts to stop, to be continued later")
    option("--seed", type=int, default=1, help="of the faults' order")
    option("--state", type=Path, metavar="DIR", help="a folder to begin in, or to go on in")
    option = verb("engines", "several delegators on a real store that is killed", _engines)
    option("--engine", choices=tuple(engines.ENGINES), required=True, help="which store")
    option("--ids", type=int, default=20_000_000, help="how many IDs at least (default: %(default)s)")
    option("--seed", type=int, default=1, help="of the faults' order")
    option("--rate", type=int, default=12_500, help="IDs a second of each client (default: %(default)s)")
    option = verb("sim", "whole clusters in virtual time, one for each seed")
    option("--histories", type=int, default=1_000_000, help="how many (default: %(default)s)")
    option("--from", type=int, default=0, dest="first", metavar="SEED", help="the first seed")
    option("--jobs", type=int, help="how many processes (default: one for each core)")
    option("--state", type=Path, metavar="DIR", help="a folder to begin in, or to go on in")
    option("--seed", type=int, help="live through this history alone")
    option("--trace", action="store_true", help="tell what happens in it")
    option = verb("mutants", "see that each missing guard is noticed; writes the table")
    option("--jobs", type=int, default=2, help="how many processes (default: %(default)s)")
    given = parser.parse_args()
    if given.verb == "mutants":
        return mutants.main(given.jobs)
    if given.verb == "fuzz-mutants":
        return fuzz_mutants.main()
    if given.verb == "sim":
        if given.seed is not None:
            return simulation.replay(given.seed, trace=given.trace)
        return simulation.main(
            histories=given.histories, first=given.first, jobs=given.jobs, state=given.state
        )
    folder: Path | None = given.state if given.verb == "cluster" else given.keep
    if folder is None:
        with tempfile.TemporaryDirectory(prefix="zflake-soak-") as temporary:
            return _prove(Path(temporary), given)
    folder.mkdir(parents=True, exist_ok=True)
    if given.verb != "cluster" and any(folder.iterdir()):
        parser.error(f"{folder} is not empty")
    return _prove(folder.absolute(), given)


def _at_least(least: N) -> Callable[[str], N]:
    def number(text: str) -> N:
        if (value := type(least)(text)) < least:
            raise argparse.ArgumentTypeError(f"{text} is too few to prove anything: say {least} or more")
        return value

    return number


def _kills(folder: Path, *, rounds: int, seed: int, report: Report) -> Result:
    return kills.run(folder, kills.every_point(rounds, seed), report=report)


def _fuzz(folder: Path, *, messages: int, report: Report, **options: Any) -> Result:
    return fuzz.run(folder, messages, report=report, **options)


def _engines(folder: Path, *, report: Report, **options: Any) -> Result:
    return engines.run(folder, report=report, **options).check()


def _prove(folder: Path, given: argparse.Namespace) -> int:
    began = time.monotonic()
    options = {k: v for k, v in vars(given).items() if k not in ("verb", "proof", "keep", "state")}

    def report(line: str) -> None:
        shown = f"[{time.monotonic() - began:6.1f} s] {line}"
        print(shown, file=sys.stderr, flush=True)  # noqa: T201

    try:
        result: Result = given.proof(folder, report=report, **options)
    except KeyboardInterrupt:
        return 130
    except pytest.skip.Exception as missing:
        print(missing, file=sys.stderr)  # noqa: T201
        return 1
    print(result)  # noqa: T201
    return 1 if result.violations else 0


if __name__ == "__main__":
    sys.exit(main())
