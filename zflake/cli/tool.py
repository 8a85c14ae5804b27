"""`zflake`: a cluster on this machine, IDs from one, and what IDs mean."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Final

import click

from zflake.cli.conduct import FAILED, run
from zflake.cli.ids import as_object, formatter, read_id, show_id, show_parts, spell_out
from zflake.cli.options import DURATION, EPOCH, LAYOUT, choose_layout
from zflake.client.balancer import ROUTES
from zflake.client.sync import Client
from zflake.core.layout import DEFAULT, PRESETS, Layout, iso
from zflake.errors import ConfigError
from zflake.keys import open_keys
from zflake.version import __version__
from zflake.wire.callers import Role
from zflake.wire.endpoint import DEFAULT_DELEGATOR, parse_endpoint

MAX_IDS: Final = 100_000_000
IDS_AT_ONCE: Final = 50_000
PROGRESS_FROM: Final = 200_000
"""From how many IDs on a terminal is shown how far it is."""

_ids = click.argument("ids", nargs=-1, required=True, metavar="ID...")
_json = click.option("--json", "as_json", is_flag=True, help="One JSON object on a line.")
_to = partial(
    click.option,
    "--to",
    envvar="ZFLAKE_TO",
    default=DEFAULT_DELEGATOR,
    show_default=True,
    metavar="ENDPOINT",
)
_keys = click.option(
    "--keys",
    envvar="ZFLAKE_KEYS",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="DIR",
    help="Your folder of keys, in a cluster that has them.  [environment: ZFLAKE_KEYS]",
)
_timeout = click.option(
    "--timeout", type=DURATION, default="5s", show_default=True, help="The whole budget of a request."
)


@click.group("zflake", context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, message="%(prog)s %(version)s")
def command() -> None:
    """Unique, time-ordered 64-bit IDs from a cluster of daemons over ZeroMQ."""


def main() -> None:
    """Run the command."""
    run(command)


@command.command()
@click.option("--workers", type=click.IntRange(1, 64), default=3, show_default=True, help="How many workers.")
@click.option(
    "--data",
    type=click.Path(file_okay=False, path_type=Path),
    help="A folder for the store, kept for the next time.  [default: a temporary folder]",
)
@click.option("--store", metavar="URL", help="A store elsewhere, such as etcd://host1,host2,host3/zflake.")
@click.option(
    "--delegators", type=click.IntRange(1, 16), default=1, show_default=True, help="How many, on --store."
)
@click.option(
    "--new", is_flag=True, allow_from_autoenv=False, help="The store at --store is new and replaces none."
)
@click.option("--once", is_flag=True, help="Take free ports, start, print 10 IDs, stop.")
@click.option(
    "--keys",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="DIR",
    help="A folder of keys as zflake keygen makes it, made if it is missing: the cluster takes who has one of them.",
)
def up(
    *,
    workers: int,
    data: Path | None,
    store: str | None,
    delegators: int,
    new: bool,
    once: bool,
    keys: Path | None,
) -> None:
    """Run a whole cluster on this machine, for as long as this command runs."""
    from zflake.cli.up import Cluster  # noqa: PLC0415  (it loads what only it needs)

    if data is not None and store is not None:
        raise ConfigError("--data is a folder for an SQLite store, --store another one: take one")
    if new and store is None:
        raise ConfigError("--new is for --store: of a folder, zflake up sees whether it is new")
    with Cluster(
        workers, data, ephemeral=once, store=store, delegators=delegators, new=new, keys=keys
    ) as cluster:
        if once:
            cluster.wait_until_ready()
            for id_ in cluster.take(10):
                print(show_id(cluster.layout.decompose(id_)))
        else:
            cluster.run()


@command.command("next")
@click.option(
    "-n", "--count", type=click.IntRange(1, MAX_IDS), default=1, show_default=True, help="How many IDs."
)
@_to(multiple=True, default=[DEFAULT_DELEGATOR], help="A delegator or a worker; may be given several times.")
@click.option("--route", type=click.Choice(ROUTES), default="auto", show_default=True)
@click.option(
    "--format",
    "format_",
    type=click.Choice(["int", "hex", "base32", "json"]),
    default="int",
    show_default=True,
    help="Each sorts as the IDs do, but int of different lengths.",
)
@_keys
@_timeout
def next_(
    *, count: int, to: tuple[str, ...], route: str, format_: str, keys: Path | None, timeout: int
) -> None:
    """Print IDs, one on a line."""
    with Client(to, timeout=timeout / 1000, route=route, keys=keys) as client:
        show = formatter(format_, client.layout() if format_ == "json" else DEFAULT)
        try:
            for ids in with_progress(chunks(client, count), count):
                sys.stdout.write("\n".join(map(show, ids)) + "\n")
            sys.stdout.flush()
        except KeyboardInterrupt:
            raise click.Abort from None


@command.command(context_settings={"ignore_unknown_options": True})
@_ids
@click.option(
    "--layout", type=LAYOUT, help="A preset or one spelt out.  [default: snowcloud]", metavar="NAME"
)
@click.option("--epoch", type=EPOCH, help="Another epoch: an ISO 8601 time or milliseconds since 1970.")
@_json
def decode(*, ids: tuple[str, ...], layout: Layout | None, epoch: int | None, as_json: bool) -> None:
    """Take IDs apart.  An ID is a decimal number, 0x and hexadecimal, or 13 digits of Crockford's base 32."""
    assumed = choose_layout(layout, epoch, DEFAULT)
    decomposed = [assumed.decompose(read_id(text)) for text in ids]
    if as_json:
        for fields in decomposed:
            print(json.dumps(as_object(fields) | {"layout": assumed.name, "epoch": iso(assumed.epoch)}))
        return
    for fields in decomposed:
        print(fields.id)
        print(
            f"  layout    {assumed.name}: {spell_out(assumed)}{'' if layout else ' (assumed; see --layout)'}"
        )
        print(f"  time      {iso(fields.time)}")
        print(f"  machine   {fields.machine}{show_parts(fields.parts.items())}")
        print(f"  sequence  {fields.sequence}")


@command.command()
@_json
def layouts(*, as_json: bool) -> None:
    """Show the layouts that have a name."""
    if as_json:
        for layout in PRESETS.values():
            facts = {
                "ids_per_tick": layout.ids_per_tick,
                "machines": layout.machines,
                "overflows": iso(layout.overflows),
                "signed_until": iso(layout.signed_until),
            }
            print(json.dumps(layout.to_map() | facts))
        return
    shown = [_columns(layout) for layout in PRESETS.values()]
    rows = [list(shown[0]), *(list(columns.values()) for columns in shown)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _columns(layout: Layout) -> dict[str, str]:
    ends, signed_until = f"{layout.overflows:%Y-%m-%d}", f"{layout.signed_until:%Y-%m-%d}"
    return {
        "name": layout.name,
        "fields, high to low": " ".join(f"{name} {bits}" for name, bits in layout.fields),
        "epoch": iso(layout.epoch),
        "tick": f"{layout.tick_ms} ms",
        "machines": str(layout.machines),
        "IDs/s each": f"{layout.ids_per_tick * 1000 // layout.tick_ms:,}",
        "ends": ends,
        "fits bigint until": "its end" if signed_until == ends else signed_until,
    }


@command.command()
@_to(help="Whom to ask.")
@click.option("--watch", is_flag=True, help="A live view, until Ctrl-C.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object, as PROTOCOL.md describes it.")
@_keys
@_timeout
def status(*, to: str, watch: bool, as_json: bool, keys: Path | None, timeout: int) -> None:
    """Show a delegator and its workers, or one worker."""
    from zflake.cli import status as status_  # noqa: PLC0415  (it loads what only it needs)

    if watch:
        if as_json:
            raise ConfigError("--watch is for people, --json for programs: take one")
        try:
            status_.watch(parse_endpoint(to).text, timeout / 1000, open_keys(keys))
        except KeyboardInterrupt:
            return
    facts = status_.ask_status(parse_endpoint(to).text, timeout / 1000, open_keys(keys))
    _show(facts, status_.show_status, as_json=as_json)


@command.command(context_settings={"ignore_unknown_options": True})
@_ids
@_to()
@_json
@_keys
@_timeout
def trace(*, ids: tuple[str, ...], to: str, as_json: bool, keys: Path | None, timeout: int) -> None:
    """Say who minted IDs; if the record does not know (any more), the exit code is 1."""
    from zflake.cli.trace import show_trace, trace_ids  # noqa: PLC0415  (it loads what only it needs)

    numbers = [read_id(text) for text in ids]
    traced = trace_ids(numbers, parse_endpoint(to).text, timeout / 1000, open_keys(keys))
    for facts in traced:
        _show(facts, show_trace, as_json=as_json)
    if not all(facts["minted_by"] for facts in traced):
        sys.exit(FAILED)


@command.command()
@click.argument("folder", metavar="DIR", type=click.Path(file_okay=False, path_type=Path))
@click.option("--role", type=click.Choice([str(role) for role in Role]), help="One more key, of this role.")
@click.option("--name", help="That key's name, which is also its folder's.")
def keygen(*, folder: Path, role: str | None, name: str | None) -> None:
    """Make a cluster's keys: DIR/delegator, DIR/worker, DIR/generator, DIR/client and DIR/admin, each a folder for --keys.

    With --role and --name: one more, DIR/NAME, which DIR/delegator/authorized lets in.  To revoke a key, remove its file
    there: it is refused within 2 s.
    """
    from zflake.cli import keygen as keygen_  # noqa: PLC0415  (it loads what only it needs)

    if (role is None) != (name is None):
        raise ConfigError("one more key needs both, --role and --name")
    if role is None or name is None:
        made = keygen_.make_cluster(folder)
    else:
        made = [keygen_.add_party(folder, Role(role), name)]
    for path in made:
        print(path)


@command.group()
def store() -> None:
    """Look at a store, and mend it while no delegator uses it."""


@store.command()
@click.argument("urls", nargs=-1, required=True, metavar="URL...")
@_json
def info(*, urls: tuple[str, ...], as_json: bool) -> None:
    """Show what a store says; a delegator may be using it."""
    from zflake.cli import store as store_  # noqa: PLC0415  (it loads what only it needs)

    for url in urls:
        _show(store_.facts_of(url), store_.show_facts, as_json=as_json)


@store.command()
@click.argument("backup", metavar="BACKUP-URL")
@click.argument("url", metavar="URL")
def restore(*, backup: str, url: str) -> None:
    """Fill the new store URL from a backup.

    A delegator that starts on it grants nothing until all that the backup does not know of has ended.
    """
    from zflake.delegator import moves  # noqa: PLC0415  (it loads what only it needs)

    print(moves.restore(backup, url))


@store.command()
@click.argument("url", metavar="URL")
@click.argument("to", metavar="TO-URL")
def copy(*, url: str, to: str) -> None:
    """Move a cluster to a new store, of the same or another engine.

    Stop all delegators first, and start them on the new store: the old one refuses them from then on.
    Workers may go on meanwhile, to the end of their windows.
    """
    from zflake.delegator import moves  # noqa: PLC0415  (it loads what only it needs)

    print(moves.copy(url, to))


@store.command()
@click.argument("url", metavar="URL")
@click.option(
    "--floor",
    is_flag=True,
    help="Bring the floor down as well: you know that no lease runs which reaches further ahead.",
)
def rewind(*, url: str, floor: bool) -> None:
    """Set a store's time back to this machine's clock, after a clock far ahead was believed once.

    Everything that was granted stays granted: what IDs there are already can't come again.
    """
    from zflake.delegator import moves  # noqa: PLC0415  (it loads what only it needs)

    print(moves.rewind_url(url, floor=floor))


@command.command()
def bench() -> None:
    """Measure zflake on this machine, as ratios to the least that the same work costs."""
    from zflake.cli.bench import headline, run_bench  # noqa: PLC0415  (it loads what only it needs)

    print(headline())
    run_bench(lambda line: print(line, flush=True))


def _show(facts: dict[str, Any], show: Callable[[dict[str, Any]], None], *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(facts))
    else:
        show(facts)


# --- taking many ---


def chunks(client: Client, count: int) -> Iterator[list[int]]:
    """`count` IDs in lists of `IDS_AT_ONCE`."""
    while count > 0:
        ids = client.next_ids(min(count, IDS_AT_ONCE))
        count -= len(ids)
        yield ids


def with_progress(lists: Iterator[list[int]], count: int) -> Iterator[list[int]]:
    """The same lists; on a terminal, stderr shows how far a long job is."""
    if count < PROGRESS_FROM or not sys.stderr.isatty():
        yield from lists
        return
    from rich.console import Console  # noqa: PLC0415  (slow to load, and rarely needed)
    from rich.progress import Progress  # noqa: PLC0415

    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("IDs", total=count)
        for ids in lists:
            yield ids
            progress.advance(task, len(ids))
