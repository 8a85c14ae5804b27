"""The long proofs: `scripts/soak main-job --ids 10000000`, `scripts/soak flood --seconds 30`,
`scripts/soak kills`, `scripts/soak cluster --ids 1000000000 --state DIR`, `scripts/soak engines --engine etcd`;
and those in virtual time:
`scripts/soak sim --histories 1000000 --state DIR`, `scripts/soak sim --seed N --trace`, `scripts/soak mutants`."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

import pytest

from tests.jobs import cluster, delegators, engines, kills
from tests.sim import mutants
from tests.sim import soak as simulation
from tests.system import flood

Result: TypeAlias = flood.Result | kills.Result | cluster.Result | delegators.Result
Proof: TypeAlias = Callable[[Path, Callable[[str], None]], Result]


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/soak", description="Long proofs, with real processes.")
    commands = parser.add_subparsers(dest="command", required=True)
    job = commands.add_parser("main-job", help="many IDs through a cluster while its parts fail")
    job.add_argument("--ids", type=int, default=10_000_000, help="how many IDs (default: %(default)s)")
    job.add_argument("--seed", type=int, default=1, help="of the clients' calls and the faults' choices")
    job.add_argument(
        "--route",
        choices=(cluster.HALF, "auto", "direct", "broker"),
        default=cluster.HALF,
        help="how clients ask: half of them auto and half broker, or all alike (default: %(default)s)",
    )
    flooding = commands.add_parser("flood", help="far more requests than a delegator can pass on")
    flooding.add_argument("--seconds", type=float, default=30.0, help="how long (default: %(default)g)")
    killing = commands.add_parser("kills", help="a delegator killed at every point around commit and reply")
    killing.add_argument("--rounds", type=int, default=3, help="how often at each (default: %(default)s)")
    killing.add_argument("--seed", type=int, default=1, help="of the points' order")
    parts = commands.add_parser("cluster", help="as many IDs as there can be, while everything fails")
    parts.add_argument("--ids", type=int, default=1_000_000_000, help="how many IDs (default: %(default)s)")
    parts.add_argument(
        "--part", type=int, default=cluster.PART, help="how many at a time (default: %(default)s)"
    )
    parts.add_argument("--parts", type=int, help="after how many parts to stop, to be continued later")
    parts.add_argument("--seed", type=int, default=1, help="of the faults' order")
    parts.add_argument("--state", type=Path, metavar="DIR", help="a folder to begin in, or to go on in")
    storing = commands.add_parser("engines", help="several delegators on a real store that is killed")
    storing.add_argument("--engine", choices=tuple(engines.ENGINES), required=True, help="which store")
    storing.add_argument(
        "--ids", type=int, default=20_000_000, help="how many IDs at least (default: %(default)s)"
    )
    storing.add_argument("--seed", type=int, default=1, help="of the faults' order")
    storing.add_argument(
        "--rate",
        type=int,
        default=12_500,
        help="what each client may take in a second (default: %(default)s)",
    )
    for command in (job, flooding, killing, storing):
        command.add_argument("--keep", type=Path, metavar="DIR", help="an empty folder for all files, kept")
    simulating = commands.add_parser("sim", help="whole clusters in virtual time, one for each seed")
    simulating.add_argument(
        "--histories", type=int, default=1_000_000, help="how many (default: %(default)s)"
    )
    simulating.add_argument(
        "--from", type=int, default=0, dest="first", metavar="SEED", help="the first seed"
    )
    simulating.add_argument("--jobs", type=int, help="how many processes (default: one for each core)")
    simulating.add_argument("--state", type=Path, metavar="DIR", help="a folder to begin in, or to go on in")
    simulating.add_argument("--seed", type=int, help="live through this history alone")
    simulating.add_argument("--trace", action="store_true", help="tell what happens in it")
    mutating = commands.add_parser("mutants", help="see that each missing guard is noticed; writes the table")
    mutating.add_argument("--jobs", type=int, default=2, help="how many processes (default: %(default)s)")
    arguments = parser.parse_args()
    if arguments.command == "mutants":
        return mutants.main(arguments.jobs)
    if arguments.command == "sim":
        if arguments.seed is not None:
            return simulation.replay(arguments.seed, trace=arguments.trace)
        return simulation.main(
            histories=arguments.histories,
            first=arguments.first,
            jobs=arguments.jobs,
            state=arguments.state,
        )
    if arguments.command == "main-job":
        if arguments.ids < 100_000:
            parser.error("a job of fewer than 100,000 IDs is over before anything can fail")
        return _prove(parser, arguments.keep, _main_job(arguments.ids, arguments.route, arguments.seed))
    if arguments.command == "kills":
        return _prove(parser, arguments.keep, _kills(arguments.rounds, arguments.seed))
    if arguments.command == "engines":
        return _prove(parser, arguments.keep, _engines(arguments))
    if arguments.command == "cluster":
        if arguments.ids < 1 or arguments.part < 1:
            parser.error("a job has 1 ID at least, and so has a part of it")
        if arguments.state is None:
            return _prove(parser, None, _cluster(arguments))
        arguments.state.mkdir(parents=True, exist_ok=True)
        return _run(arguments.state.absolute(), _cluster(arguments))
    if not 1 <= arguments.seconds < float("inf"):
        parser.error("a flood lasts for 1 second at least")
    return _prove(parser, arguments.keep, _flood(arguments.seconds))


def _main_job(ids: int, route: str, seed: int) -> Proof:
    return lambda folder, report: cluster.run_main(folder, ids, route=route, seed=seed, report=report)


def _flood(seconds: float) -> Proof:
    return lambda folder, report: flood.run(folder, seconds, report=report)


def _kills(rounds: int, seed: int) -> Proof:
    return lambda folder, report: kills.run(folder, kills.every_point(rounds, seed), report=report)


def _cluster(arguments: argparse.Namespace) -> Proof:
    ids, part, parts, seed = arguments.ids, arguments.part, arguments.parts, arguments.seed
    return lambda folder, report: cluster.run(folder, ids, part=part, parts=parts, seed=seed, report=report)


def _engines(arguments: argparse.Namespace) -> Proof:
    engine, ids, seed, rate = arguments.engine, arguments.ids, arguments.seed, arguments.rate
    return lambda folder, report: engines.run(
        folder, engine, ids, seed=seed, rate=rate, report=report
    ).check()


def _prove(parser: argparse.ArgumentParser, keep: Path | None, proof: Proof) -> int:
    if keep is None:
        with tempfile.TemporaryDirectory(prefix="zflake-soak-") as folder:
            return _run(Path(folder), proof)
    keep.mkdir(parents=True, exist_ok=True)
    if any(keep.iterdir()):
        parser.error(f"{keep} is not empty")
    return _run(keep.absolute(), proof)


def _run(folder: Path, proof: Proof) -> int:
    began = time.monotonic()

    def report(line: str) -> None:
        print(  # noqa: T201
            f"[{time.monotonic() - began:6.1f} s] {line}", file=sys.stderr, flush=True
        )

    try:
        result = proof(folder, report)
    except KeyboardInterrupt:
        return 130
    except pytest.skip.Exception as missing:
        print(missing, file=sys.stderr)  # noqa: T201
        return 1
    print(result)  # noqa: T201
    return 1 if result.violations else 0


if __name__ == "__main__":
    sys.exit(main())
