"""The simulation and the exploration can fail: each guard that is taken out is missed by one of them."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.sim import mutants
from tests.sim.mutants import BY_NAME, EXPLORED, Catch, Change, Mutant


def source_of(module: str) -> str:
    spec = importlib.util.find_spec(module)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).read_text()


@pytest.mark.parametrize("mutant", mutants.MUTANTS, ids=lambda mutant: mutant.name)
def test_what_a_mutant_changes_is_there_once(mutant: Mutant) -> None:
    for module in {change.module for change in mutant.changes}:
        mutants.changed(source_of(module), [c for c in mutant.changes if c.module == module])


def test_a_mutant_of_text_that_is_gone_fails_loudly() -> None:
    with pytest.raises(LookupError, match="0 times, not once"):
        mutants.changed("some text", [Change("a.module", "no such text", "")])
    with pytest.raises(LookupError, match="2 times, not once"):
        mutants.changed("text, text", [Change("a.module", "text", "")])


def test_the_table_lists_the_mutants_that_there_are() -> None:
    table = mutants.read()
    assert list(table) == list(BY_NAME), "scripts/soak mutants writes the table"
    assert [row[0] for row in table.values()] == [mutant.section for mutant in mutants.MUTANTS]


@pytest.mark.long
@pytest.mark.timeout(300)
def test_each_mutant_is_caught_by_what_the_table_says(tell: Callable[[str], None]) -> None:
    table = mutants.read()

    def again(mutant: Mutant) -> Catch | None:
        _, by, *_ = table[mutant.name]
        if by.startswith(EXPLORED):
            return mutants.run(mutant, scope=by.removeprefix(EXPLORED))
        return mutants.run(mutant, int(by.removeprefix("seed ")), 1)

    found = mutants.catch_all(2, again)
    survivors = [name for name, caught in found.items() if caught is None]
    tell(f"{len(found)} mutants, {len(found) - len(survivors)} caught")
    assert survivors == [], "scripts/soak mutants searches anew what catches them"
