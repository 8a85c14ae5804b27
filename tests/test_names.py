"""One name for one thing: constants and classes of the package."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import zflake

PACKAGE: Final = Path(zflake.__file__).parent
ENGINES_OWN: Final = {"FORM", "OPTIONS", "PORT", "TIMEOUT_S"}
"""Constants that each store engine has its own of."""


def names(package: Path) -> Iterator[tuple[str, str, str]]:
    """Name, value and module of each constant, and of each class, whose value is its module."""
    for module in sorted(package.rglob("*.py")):
        where = str(module.relative_to(package))
        for node in ast.parse(module.read_text()).body:
            if isinstance(node, ast.ClassDef):
                yield node.name, where, where
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value:
                yield node.target.id, ast.unparse(node.value), where


def ambiguous(found: Iterator[tuple[str, str, str]]) -> dict[str, list[str]]:
    """The modules of each name that has two meanings."""
    meanings: dict[str, dict[str, str]] = defaultdict(dict)
    for name, value, where in found:
        meanings[name][value] = where
    return {name: sorted(values.values()) for name, values in meanings.items() if len(values) > 1}


def test_a_constant_has_one_value_and_a_class_one_meaning() -> None:
    public = (each for each in names(PACKAGE) if not each[0].startswith("_") and each[0] not in ENGINES_OWN)
    assert ambiguous(public) == {}


def test_the_check_sees_two_values_of_one_name() -> None:
    assert ambiguous(iter([("A_US", "1", "a.py"), ("A_US", "2", "b.py"), ("B", "1", "a.py")])) == {
        "A_US": ["a.py", "b.py"]
    }
