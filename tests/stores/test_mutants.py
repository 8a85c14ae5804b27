"""The contract tests can fail: each guard of a store that is taken out is missed, on each engine that has it."""

from __future__ import annotations

import inspect
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import brief
from tests.servers import Servers
from tests.stores.made import made
from tests.stores.mutants import MUTANTS, Mutant, remove
from tests.stores.test_contract import Opened, new_url
from zflake.errors import StoreError
from zflake.stores import open_store

CASES = [(mutant, engine) for mutant in MUTANTS for engine in mutant.engines]
QUICK = [(m, engine) for m, engine in CASES if engine in ("memory", "redis", "sqlite") or len(m.engines) == 1]


def attempt(mutant: Mutant, engine: str, folder: Path, servers: Servers) -> None:
    """Run the contract test on an empty store of the engine."""
    url = new_url(engine, folder, servers)
    wanted = inspect.signature(mutant.caught_by).parameters
    with closing(open_store(url)) as store, closing(Opened(url, store).beside()) as beside:
        if "empty" not in wanted:
            made(store)
        have: dict[str, Any] = dict.fromkeys(("store", "empty", "etcd"), store)
        have |= {"opened": Opened(url, store), "beside": beside, "path": folder / "another.db"}
        have |= mutant.arguments
        mutant.caught_by(**{name: have[name] for name in wanted})


@pytest.mark.parametrize(
    ("mutant", "engine"), brief(CASES, QUICK), ids=[f"{m.guard}-{m.caught_by.__name__}-{e}" for m, e in CASES]
)
def test_a_guard_that_is_taken_out_is_missed(
    mutant: Mutant, engine: str, tmp_path: Path, servers: Servers
) -> None:
    (tmp_path / "as-it-is").mkdir()
    attempt(mutant, engine, tmp_path / "as-it-is", servers)
    with pytest.MonkeyPatch.context() as patch:
        remove(patch, mutant)
        with pytest.raises((AssertionError, StoreError, pytest.fail.Exception)):
            attempt(mutant, engine, tmp_path, servers)
