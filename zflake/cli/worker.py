"""`zflake-worker`: holds a machine ID and serves IDs."""

from __future__ import annotations

from functools import partial
from typing import Unpack

import click

from zflake.cli.conduct import DaemonOptions, run, serve
from zflake.cli.options import BIND, ENDPOINT, EPOCH, LAYOUT, choose_layout, daemon_options
from zflake.core.layout import DEFAULT, Layout
from zflake.errors import ConfigError
from zflake.keys import Keys
from zflake.version import __version__
from zflake.wire.endpoint import DEFAULT_DELEGATOR, Endpoint, parse_endpoint
from zflake.wire.fields import check_name
from zflake.worker.server import Worker, WorkerConfig, check_config


@click.command("zflake-worker", context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, message="%(prog)s %(version)s")
@click.option(
    "--delegator",
    type=ENDPOINT,
    multiple=True,
    help=f"Where to lease a machine ID; may be given several times.  [default: {DEFAULT_DELEGATOR}]",
)
@click.option("--bind", type=BIND, default="tcp://127.0.0.1:*", show_default=True, help="Where to serve.")
@click.option("--advertise", type=BIND, help="Where clients reach this worker; a port of * is the bound one.")
@click.option("--name", default="", help="A name for people.  [default: host and pid]")
@click.option(
    "--machine", type=click.IntRange(min=0), help="Static: mint with this machine ID, without a lease."
)
@click.option("--layout", type=LAYOUT, help="Static: the layout (default snowcloud).  Leased: insist on it.")
@click.option("--epoch", type=EPOCH, help="The layout's epoch: an ISO 8601 time or milliseconds since 1970.")
@daemon_options
def command(
    *,
    delegator: tuple[Endpoint, ...],
    bind: Endpoint,
    advertise: Endpoint | None,
    name: str,
    machine: int | None,
    layout: Layout | None,
    epoch: int | None,
    **options: Unpack[DaemonOptions],
) -> None:
    """Hold a machine ID and serve IDs.

    Options come from the command line, else from ZFLAKE_WORKER_... variables, else from --config.
    """
    if machine is not None:
        if delegator:
            raise ConfigError("a worker has a --delegator or a --machine, not both")
        layout = choose_layout(layout, epoch, DEFAULT)
        layout.check_machine(machine)
    elif layout is not None or epoch is not None:
        if layout is None:
            raise ConfigError("--epoch goes with --layout; without both the worker takes the delegator's")
        layout = choose_layout(layout, epoch, layout)
    config = WorkerConfig(
        delegators=delegator or (parse_endpoint(DEFAULT_DELEGATOR),),
        bind=bind,
        advertise=advertise,
        name=name,
        machine=machine,
        layout=layout,
        insecure=options["insecure"],
        keys=None if options["keys"] is None else Keys(options["keys"]),
    )
    if options["check"]:
        check_config(config)
        check_name(name)
    serve(partial(Worker, config), "zflake.worker.metrics", **options)


def main() -> None:
    """Run the command."""
    run(command)


if __name__ == "__main__":
    main()
