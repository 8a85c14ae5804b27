"""Imports point down only, and a program loads no more than it uses."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import zflake

PACKAGE = Path(zflake.__file__).parent

# What each part may import of zflake, beside itself.
BELOW = {
    "errors": set[str](),
    "version": set[str](),
    "clock": set[str](),
    "files": set[str](),
    "core": {"errors"},
    "stores": {"errors", "files", "core"},
    "wire": {"errors", "core"},
    "keys": {"errors", "files", "wire"},
    "daemon": {"errors", "keys", "wire"},
    "holder": {"errors", "clock", "core", "wire"},
    "embedded": {"errors", "clock", "keys", "core", "wire", "holder"},
    "worker": {"errors", "version", "clock", "keys", "core", "wire", "holder", "daemon"},
    "delegator": {"errors", "version", "clock", "keys", "core", "wire", "stores", "daemon"},
    "client": {"errors", "keys", "core", "wire"},
    "cli": {
        "errors",
        "version",
        "clock",
        "files",
        "keys",
        "core",
        "stores",
        "wire",
        "embedded",
        "client",
        "worker",
        "delegator",
        "daemon",
    },
    "web": {"errors", "wire", "client", "embedded"},
    "__init__": {"errors", "version", "core", "client", "embedded"},
    "__main__": {"cli"},
}
IMPURE = {"time", "random", "secrets", "os", "socket", "threading", "asyncio", "zmq", "logging"}
# Parts of other folders that must stay free of sockets, like the core.
SANS_IO = [
    *("client/conversation.py", "holder/lease.py", "worker/handler.py", "worker/link.py"),
    *(f"delegator/{name}.py" for name in ("service", "broker", "directory", "committer")),
    *(
        f"wire/{name}.py"
        for name in ("codec", "frames", "methods", "fields", "dispatch", "ids", "leases", "cluster")
    ),
]


def part_of(module: Path) -> str:
    return module.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(module: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(module.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative import"
            if node.module == PACKAGE.name:
                yield from (f"{PACKAGE.name}.{alias.name}" for alias in node.names)
            else:
                yield node.module or ""


def wrong_imports(package: Path, part: str, names: Iterator[str]) -> list[str]:
    wrong = []
    for name in names:
        first, _, rest = name.partition(".")
        target = rest.partition(".")[0]
        if first == package.name and target not in BELOW[part] | {part}:
            wrong.append(name)
        if part == "core" and first in IMPURE:
            wrong.append(name)
    return wrong


@pytest.mark.parametrize("module", sorted(PACKAGE.rglob("*.py")), ids=lambda m: str(m.relative_to(PACKAGE)))
def test_imports_point_down(module: Path) -> None:
    assert wrong_imports(PACKAGE, part_of(module), imports(module)) == []


def test_the_check_sees_an_import_that_points_up() -> None:
    assert wrong_imports(PACKAGE, "core", iter(["zflake.wire.codec", "time", "zflake.errors"])) == [
        "zflake.wire.codec",
        "time",
    ]


@pytest.mark.parametrize("name", SANS_IO)
def test_protocol_cores_know_no_socket(name: str) -> None:
    assert {"zmq", "socket", "time", "random", "os"}.isdisjoint(imports(PACKAGE / name))


@pytest.mark.parametrize(
    ("module", "unwanted"),
    [
        ("zflake", {"click", "rich", "sqlite3", "flask", "zflake.web", "zflake.delegator", "zflake.worker"}),
        ("zflake.cli.worker", {"sqlite3", "rich", "zflake.delegator"}),
        ("zflake.cli.delegator", {"rich", "zflake.worker"}),
        ("zflake.cli.tool", {"rich", "sqlite3", "zflake.delegator", "zflake.worker"}),
    ],
)
def test_a_program_loads_only_what_it_uses(module: str, unwanted: set[str]) -> None:
    code = f"import sys, {module}; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert unwanted.isdisjoint(loaded.stdout.split())
