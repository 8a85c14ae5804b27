"""Every guard of the stores, with the text that it is and the contract test that misses it."""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Final, NamedTuple

import pytest

from tests.stores import test_contract as contract
from tests.stores import test_engines as engines
from tests.stores import test_sqlite_file as files
from zflake.stores import etcd, keyed, memory, postgresql, redis, rows, sqlite

Keyed, Etcd, Memory = keyed.KeyedStore, etcd.EtcdStore, memory.MemoryStore
Rows, Postgresql, Sqlite = rows.RowStore, postgresql.PostgresqlStore, sqlite.SqliteStore
KEYED: Final = ("memory", "redis", "etcd")
ROWS: Final = ("sqlite", "postgresql")


class Mutant(NamedTuple):
    """A guard that is missing on some engines: `new` stands in place of `old`, in `owner.name`."""

    guard: str
    engines: tuple[str, ...]
    owner: Any
    name: str
    old: str
    new: str
    caught_by: Callable[..., None]
    arguments: Mapping[str, Any] = MappingProxyType({})


def remove(patch: pytest.MonkeyPatch, mutant: Mutant) -> None:
    """Make the change, be it of a method or of a text; `LookupError` if the text is not there exactly once."""
    value = inspect.getattr_static(mutant.owner, mutant.name)
    if inspect.isfunction(value):
        changed = _replaced(textwrap.dedent(inspect.getsource(value)), mutant)
        namespace = dict(inspect.unwrap(value).__globals__)
        exec(compile(f"from __future__ import annotations\n{changed}", __file__, "exec"), namespace)
        patch.setattr(mutant.owner, mutant.name, namespace[mutant.name])
    elif isinstance(value, list):
        patch.setattr(mutant.owner, mutant.name, _replaced("|".join(value), mutant).split("|"))
    else:
        patch.setattr(mutant.owner, mutant.name, _replaced(value, mutant))


def _replaced(text: str, mutant: Mutant) -> str:
    if (found := text.count(mutant.old)) != 1:
        raise LookupError(f"{mutant.name} has this text {found} times, not once: {mutant.old!r}")
    return text.replace(mutant.old, mutant.new)


_GEN = contract.test_a_swap_from_another_generation_loses_and_writes_nothing
_VERSION = contract.test_a_swap_under_another_version_of_meta_loses_and_writes_nothing
_META = contract.test_meta_is_swapped_only_in_place_of_the_one_that_was_meant
_STORE = contract.test_meta_of_another_store_is_not_swapped_in
_TOKEN = contract.test_a_token_stands_on_one_machine_and_a_second_one_loses
_CUT = contract.test_a_release_cuts_every_span_of_its_machine_at_the_fence
_CUT_WHERE = contract.test_a_release_cuts_every_span_of_its_machine_where_it_says
_GIVEN_UP = contract.test_a_token_is_granted_once_and_after_it_was_given_up_again
_LIFE = contract.test_a_swap_under_a_meta_of_another_incarnation_loses
_LONGER = contract.test_a_renewal_takes_the_place_of_the_span_that_it_lengthens
_LATE_MARK = contract.test_a_mark_is_not_set_back_by_a_connection_that_knows_an_earlier_one
_EARLIER_MARK = contract.test_a_mark_goes_forward_only_whatever_order_writes_come_in
_WENT_BACK = contract.test_a_commit_into_data_that_have_gone_back_is_refused
_PRUNED = contract.test_a_span_that_is_renewed_while_it_is_pruned_stays
_SINCE = contract.test_what_is_known_to_be_incomplete_is_never_said_to_be_complete_again
_NO_META = contract.test_no_mark_is_written_where_there_is_no_meta
_TWICE = contract.test_initialising_twice_is_refused_and_the_first_stands

MUTANTS: Final = (
    Mutant("gen", KEYED, Keyed, "_step", '("machine", machine): old.gen or Found.NOTHING,', "", _GEN,
           {"gen": 4}),
    Mutant("gen", ROWS, rows, "_NEXT_RECORD", " AND gen = :old_gen", "", _GEN, {"gen": 4}),
    Mutant("first gen", KEYED, Keyed, "_step", "old.gen or Found.NOTHING", "old.gen or Found.ANYTHING",
           _GEN, {"gen": 1}),
    Mutant("first gen", ROWS, rows, "_FIRST_RECORD", "DO NOTHING",
           "(machine) DO UPDATE SET gen = excluded.gen, token = excluded.token", _GEN, {"gen": 1}),
    Mutant("meta's version", KEYED, Keyed, "_step", "META: swap.version,", "", _VERSION, {"version": 1}),
    Mutant("meta's version", ROWS, Rows, "swap", "swap.version == version and ", "", _VERSION,
           {"version": 1}),
    Mutant("another machine's token", KEYED, Keyed, "_step", '"token", new.token]', '"token", b""]',
           _TOKEN),
    Mutant("another machine's token", ROWS, rows, "_NEXT_RECORD", "NOT EXISTS", "true OR false AND EXISTS",
           _TOKEN),
    Mutant("its own machine's token", KEYED, Keyed, "_step", "new.token] = Found.NOTHING",
           "new.token] = Found.NOTHING if new.token != old.token else Found.ANYTHING", _GIVEN_UP),
    Mutant("its own machine's token", ROWS, rows, "_NEXT_RECORD", "WHERE token = :token",
           "WHERE token = :token AND machine <> :machine", _GIVEN_UP),
    Mutant("a token given up", KEYED, Keyed, "_step", "if old.gen else {}", "if False else {}", _GIVEN_UP),
    Mutant("version in a swap of meta", KEYED, Keyed, "swap_meta", "META: old.version, ", "", _META),
    Mutant("version in a swap of meta", ROWS, rows, "_NEXT_META", "version = :old_version AND ", "", _META),
    Mutant("store ID in a swap of meta", KEYED, Keyed, "swap_meta", ", STORE: old.store_id", "", _STORE),
    Mutant("store ID in a swap of meta", ROWS, rows, "_NEXT_META", " AND store_id = :old_store_id", "",
           _STORE),
    Mutant("a store is made once", KEYED, Keyed, "initialise", "{META: Found.NOTHING}", "{}", _TWICE),
    Mutant("a store is made once", ROWS, Rows, "initialise", "!= 1", "> 1", _TWICE),
    Mutant("one process fills a store", KEYED, Keyed, "initialise", "{**fresh, FILLING: filling}", "fresh",
           contract.test_of_two_who_fill_a_store_the_first_gives_up),
    Mutant("no mark without meta", KEYED, Keyed, "_first", "META: Found.ANYTHING, ", "", _NO_META),
    Mutant("no mark without meta", ROWS, rows, "_PUT_MARK", "EXISTS (SELECT 1 FROM meta)", "true",
           _NO_META),
    Mutant("a mark goes forward", KEYED, Keyed, "_first", "max(mark, own, key=", "max(mark, mark, key=",
           _EARLIER_MARK),
    Mutant("a mark goes forward", ROWS, rows, "_PUT_MARK", " WHERE excluded.now_us > mark.now_us", "",
           _EARLIER_MARK),
    Mutant("own mark unchanged", KEYED, Keyed, "_first",
           "key: Found.NOTHING if own is None else own.timeline_us", "", _LATE_MARK),
    Mutant("own mark unchanged", KEYED, Keyed, "_first",
           "key: Found.NOTHING if own is None else own.timeline_us", "", _WENT_BACK),
    Mutant("incarnation", ("redis",), redis, "SCRIPT", "(at == 1 or known) and ", "", _LIFE),
    Mutant("incarnation", ("postgresql",), Postgresql, "_current_version", "version if incarnation == ",
           "version if incarnation or ", _LIFE),
    Mutant("incarnation", ("etcd",), Etcd, "_commit", "if self._identity.is_suspect and steps:",
           "if False:", engines.test_a_revision_that_went_back_is_another_life),
    Mutant("incarnation", ("sqlite",), Sqlite, "_transaction", "self._check_commits()", "pass",
           files.test_a_restore_through_sqlite_itself_is_noticed_before_anything_is_written),
    Mutant("the file is the same", ("sqlite",), Sqlite, "_transaction", "self._file.check(incarnation)",
           "pass", files.test_a_file_that_was_emptied_in_use_takes_no_more),
    Mutant("meta stays while it is relied on", ("postgresql",), Postgresql, "_current_version",
           " FOR SHARE", "", contract.test_meta_is_not_swapped_while_a_commit_relies_on_it),
    Mutant("a lost swap of meta shuts nothing", ("sqlite",), Rows, "swap_meta", "if won:", "if True:",
           contract.test_a_swap_of_meta_that_loses_does_not_shut_the_file_to_this_zflake),
    Mutant("a longer span replaces", KEYED, Keyed, "_step",
           "if old.gen and old.span_start == new.span_start:", "if False:", _LONGER),
    Mutant("a longer span replaces", ROWS, rows, "_GRANT",
           "UPDATE SET stop = excluded.stop, holder = excluded.holder", "NOTHING", _LONGER),
    Mutant("a release cuts", KEYED, Keyed, "_cut", "if span.end > at:", "if False:", _CUT,
           {"fence": 501, "left": [(1, 100, 300), (1, 500, 501)]}),
    Mutant("a release cuts", ROWS, rows, "_RELEASE", "AND stop > :cut", "AND false", _CUT,
           {"fence": 501, "left": [(1, 100, 300), (1, 500, 501)]}),
    Mutant("a release cuts all spans", KEYED, Keyed, "_cut", "if at < old.span_start:", "if False:",
           _CUT, {"fence": 250, "left": [(1, 100, 250)]}),
    Mutant("a release cuts all spans", ROWS, rows, "_RELEASE", "AND start >= :cut", "AND false", _CUT,
           {"fence": 250, "left": [(1, 100, 250)]}),
    Mutant("a release cuts where it says", KEYED, Keyed, "_step", "new.fence if swap.cut is None else swap.cut",
           "new.fence", _CUT_WHERE, {"cut": 250, "left": [(1, 100, 250)]}),
    Mutant("a release cuts where it says", ROWS, Rows, "_swap", "new.fence if swap.cut is None else swap.cut",
           "new.fence", _CUT_WHERE, {"cut": 250, "left": [(1, 100, 250)]}),
    Mutant("since goes forward", KEYED, Keyed, "_forget", "max(since or 0, some[-1][1])", "some[-1][1]",
           _SINCE),
    Mutant("since goes forward", ROWS, rows, "_RAISE_SINCE", " WHERE since < :stop", "", _SINCE),
    Mutant("since unchanged", KEYED, Keyed, "_forget", "SINCE: Found.NOTHING if since is None else since", "",
           contract.test_of_two_who_prune_none_takes_back_what_the_other_says),
    Mutant("a renewed span stays", KEYED, Keyed, "_forget", "Step({key: Found.ANYTHING}", "Step({}", _PRUNED),
    Mutant("a renewed span stays", ROWS, rows, "_PRUNE", " AND stop = :stop", "", _PRUNED),
    # How each engine compares.
    Mutant("steps compare", ("memory",), Memory, "_try", "if holds:", "if holds := True:", _GEN, {"gen": 4}),
    Mutant("the first step compares", ("memory",), Memory, "_commit", "if self._try(first)",
           "if [self._try(first)]", _WENT_BACK),
    Mutant("steps compare", ("redis",), redis, "SCRIPT", "holds(step[1])", "true", _GEN, {"gen": 4}),
    Mutant("a missing key compares", ("redis",), redis, "SCRIPT", " or not wanted and value", "", _GEN,
           {"gen": 1}),
    Mutant("the first step compares", ("redis",), redis, "SCRIPT", "elseif at == 1 then",
           "elseif false then", _WENT_BACK),
    Mutant("steps compare", ("etcd",), Etcd, "_commit", "self._txn(step)", "self._txn(step) | {'compare': []}",
           _GEN, {"gen": 4}),
    Mutant("the first step compares", ("etcd",), Etcd, "_commit", "self._txn(first)",
           "self._txn(first) | {'compare': []}", _LATE_MARK),
    Mutant("a lower bound", ("etcd",), Etcd, "_compares", '("GREATER", "LESS"), _bounds(text)',
           '("LESS",), _bounds(text)[1:]', _GEN, {"gen": 5}),
    Mutant("an upper bound", ("etcd",), Etcd, "_compares", '("GREATER", "LESS"), _bounds(text)',
           '("GREATER",), _bounds(text)[:1]', _GEN, {"gen": 2}),
)  # fmt: skip
