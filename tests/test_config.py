"""The example files in config/ load, and say nothing that the commands do not know."""

from __future__ import annotations

import tomllib
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from zflake.cli.delegator import command as delegator
from zflake.cli.options import NOT_IN_FILES
from zflake.cli.worker import command as worker
from zflake.errors import ConfigError

CONFIG = Path(__file__).parents[1] / "config"
COMMANDS = [(delegator, CONFIG / "delegator.toml"), (worker, CONFIG / "worker.toml")]


def check(command: click.Command, path: Path, *arguments: str) -> str:
    outcome = CliRunner().invoke(
        command, ["--config", str(path), "--check", *arguments], catch_exceptions=False
    )
    assert outcome.exit_code == 0, outcome.output
    return outcome.output


@pytest.mark.parametrize("path", sorted(CONFIG.glob("*.toml")), ids=lambda path: path.stem)
def test_the_example_is_sound(path: Path) -> None:
    assert "sound" in check(worker if path.stem == "worker" else delegator, path)


@pytest.mark.parametrize(("command", "path"), COMMANDS, ids=["delegator", "worker"])
def test_the_example_names_every_option_that_a_file_may_set(command: click.Command, path: Path) -> None:
    text = path.read_text()
    options = {param.name or "" for param in command.params} - NOT_IN_FILES - {"follow_stdin"}
    assert {name for name in options if f"{name.replace('_', '-')} =" not in text} == set()


@pytest.mark.parametrize(("command", "path"), COMMANDS, ids=["delegator", "worker"])
def test_what_is_commented_out_is_sound_too(command: click.Command, path: Path, tmp_path: Path) -> None:
    options = {(param.name or "").replace("_", "-") for param in command.params}
    lines = []
    for line in path.read_text().splitlines():
        bare = line.removeprefix("# ")
        key = bare.partition(" = ")[0]
        lines.append(bare if key in options and key not in {"machine", "delegator", "keys"} else line)
    every = tmp_path / "every.toml"
    every.write_text("\n".join(lines))
    assert set(tomllib.loads(every.read_text())) > set(tomllib.loads(path.read_text()))
    check(command, every)


@pytest.mark.parametrize("key", ["new", "port", "Bind", "config"])
def test_an_unknown_key_is_refused(key: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.toml"
    path.write_text(f"{key} = true\n")
    with pytest.raises(ConfigError, match=f"unknown keys: {key};"):
        check(delegator, path)
