"""The long proofs: `scripts/soak main-job --ids 10000000`."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

from tests.system import main_job


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/soak", description="Long proofs, with real processes.")
    commands = parser.add_subparsers(dest="command", required=True)
    job = commands.add_parser("main-job", help="many IDs through a cluster while its parts fail")
    job.add_argument("--ids", type=int, default=10_000_000, help="how many IDs (default: %(default)s)")
    job.add_argument("--seed", type=int, default=1, help="of the clients' sizes of calls")
    job.add_argument("--keep", type=Path, metavar="DIR", help="an empty folder for IDs and logs, kept")
    arguments = parser.parse_args()
    if arguments.ids < 100_000:
        parser.error("a job of fewer than 100,000 IDs is over before anything can fail")
    if arguments.keep is None:
        with tempfile.TemporaryDirectory(prefix="zflake-soak-") as folder:
            return _main_job(Path(folder), arguments.ids, arguments.seed)
    arguments.keep.mkdir(parents=True, exist_ok=True)
    if any(arguments.keep.iterdir()):
        parser.error(f"{arguments.keep} is not empty")
    return _main_job(arguments.keep.absolute(), arguments.ids, arguments.seed)


def _main_job(folder: Path, ids: int, seed: int) -> int:
    began = time.monotonic()

    def report(line: str) -> None:
        print(  # noqa: T201
            f"[{time.monotonic() - began:6.1f} s] {line}", file=sys.stderr, flush=True
        )

    try:
        result = main_job.run(folder, ids, seed=seed, report=report)
    except KeyboardInterrupt:
        return 130
    print(result)  # noqa: T201
    return 1 if result.violations else 0


if __name__ == "__main__":
    sys.exit(main())
