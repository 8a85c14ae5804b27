"""The long proofs: `scripts/soak main-job --ids 10000000`, `scripts/soak flood --seconds 30`."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

from tests.system import flood, main_job

Proof: TypeAlias = Callable[[Path, Callable[[str], None]], main_job.Result | flood.Result]


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/soak", description="Long proofs, with real processes.")
    commands = parser.add_subparsers(dest="command", required=True)
    job = commands.add_parser("main-job", help="many IDs through a cluster while its parts fail")
    job.add_argument("--ids", type=int, default=10_000_000, help="how many IDs (default: %(default)s)")
    job.add_argument("--seed", type=int, default=1, help="of the clients' sizes of calls")
    job.add_argument(
        "--route",
        choices=(main_job.HALF, "auto", "direct", "broker"),
        default=main_job.HALF,
        help="how clients ask: half of them auto and half broker, or all alike (default: %(default)s)",
    )
    flooding = commands.add_parser("flood", help="far more requests than a delegator can pass on")
    flooding.add_argument("--seconds", type=float, default=30.0, help="how long (default: %(default)g)")
    for command in (job, flooding):
        command.add_argument("--keep", type=Path, metavar="DIR", help="an empty folder for all files, kept")
    arguments = parser.parse_args()
    if arguments.command == "main-job":
        if arguments.ids < 100_000:
            parser.error("a job of fewer than 100,000 IDs is over before anything can fail")
        return _prove(parser, arguments.keep, _main_job(arguments.ids, arguments.route, arguments.seed))
    if not 1 <= arguments.seconds < float("inf"):
        parser.error("a flood lasts for 1 second at least")
    return _prove(parser, arguments.keep, _flood(arguments.seconds))


def _main_job(ids: int, route: str, seed: int) -> Proof:
    return lambda folder, report: main_job.run(folder, ids, route=route, seed=seed, report=report)


def _flood(seconds: float) -> Proof:
    return lambda folder, report: flood.run(folder, seconds, report=report)


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
    print(result)  # noqa: T201
    return 1 if result.violations else 0


if __name__ == "__main__":
    sys.exit(main())
