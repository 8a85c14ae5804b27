"""`zflake-delegator`: leases machine IDs."""

from __future__ import annotations

from functools import partial
from typing import Unpack

import click

from zflake.cli.conduct import DaemonOptions, run, serve
from zflake.cli.options import BIND, DURATION, EPOCH, LAYOUT, MACHINES, daemon_options
from zflake.core.layout import Layout
from zflake.delegator.server import Delegator, DelegatorConfig, check_config
from zflake.delegator.start import Wishes
from zflake.keys import Keys
from zflake.version import __version__
from zflake.wire.endpoint import DEFAULT_DELEGATOR, Endpoint


@click.command("zflake-delegator", context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, message="%(prog)s %(version)s")
@click.option("--bind", type=BIND, default=DEFAULT_DELEGATOR, show_default=True, help="Where to serve.")
@click.option(
    "--store",
    default="sqlite:///zflake.db",
    show_default=True,
    help="Where leases are durable: sqlite:///relative/path, sqlite:////absolute/path, postgresql://, etcd://, "
    "redis:// or memory:.",
)
@click.option("--layout", type=LAYOUT, help="The layout of a new store; checked against an old one's.")
@click.option("--epoch", type=EPOCH, help="The layout's epoch: an ISO 8601 time or milliseconds since 1970.")
@click.option(
    "--ttl", type=DURATION, help="How far ahead a window ends, such as 30s (the default of a new store)."
)
@click.option("--machines", type=MACHINES, help="The machine IDs to lease, such as 0-1023 (default: all).")
@click.option(
    "--new",
    is_flag=True,
    allow_from_autoenv=False,
    help="This cluster is new: no lost store of it can have granted leases that still run.",
)
@click.option(
    "--accept-clock",
    is_flag=True,
    allow_from_autoenv=False,
    help="The wall clock is right, though far from the last time that the store knows of.",
)
@daemon_options
def command(
    *,
    bind: Endpoint,
    store: str,
    layout: Layout | None,
    epoch: int | None,
    ttl: int | None,
    machines: tuple[int, int] | None,
    new: bool,
    accept_clock: bool,
    **options: Unpack[DaemonOptions],
) -> None:
    """Lease machine IDs to workers, tell clients where these are, and pass requests on to them.

    Options come from the command line, else from ZFLAKE_DELEGATOR_... variables, else from --config.
    """
    wishes = Wishes(layout=layout, epoch_ms=epoch, ttl_ms=ttl, machines=machines, new=new)
    config = DelegatorConfig(
        bind=bind,
        store=store,
        wishes=wishes,
        accept_clock=accept_clock,
        insecure=options["insecure"],
        keys=None if options["keys"] is None else Keys(options["keys"]),
    )
    if options["check"]:
        check_config(config)
    serve(partial(Delegator, config), "zflake.delegator.metrics", **options)


def main() -> None:
    """Run the command."""
    run(command)


if __name__ == "__main__":
    main()
