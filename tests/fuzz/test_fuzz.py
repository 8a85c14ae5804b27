"""Hostile peers and servers do no harm; and the fuzzer would see it if they did."""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.fuzz import fuzz, mutants, victims
from tests.fuzz.mutants import MUTANTS
from tests.fuzz.strangers import owed
from tests.fuzz.values import Values
from tests.sim.mutants import changed

MESSAGES = 50_000
SEED = 3


@pytest.mark.timeout(180)
def test_hostile_peers_and_servers_do_no_harm(tmp_path: Path, tell: Callable[[str], None]) -> None:
    result = fuzz.run(tmp_path, MESSAGES, seed=SEED)
    tell(f"fuzz: {result.messages:,} messages, {result.messages / result.seconds:,.0f}/s")
    assert not result.violations, str(result)
    assert set(result.by_target) == {*fuzz.TARGETS, *fuzz.LIED_TO_KINDS}
    # It got past the first check of everything.
    assert result.answers["results"] > MESSAGES / 50
    assert any("nothing" in how for how in result.raised)


def test_an_episode_is_the_same_again() -> None:
    def bodies(number: int) -> list[bytes]:
        _, _, draw = next(itertools.islice(fuzz.episodes(7), number, None))
        values = Values(draw)
        return [b"".join(values.frames(values.body())) for _ in range(200)]

    assert bodies(3) == bodies(3) != bodies(4)


def test_requests_that_are_owed_an_answer_are_told_from_those_that_are_not() -> None:
    sound = b"\x94\x00\x07\xa4ping\x90"
    assert owed([b"", sound], "worker") == ((b"",), 7)
    assert owed([b"a", b"", sound], "delegator") == ((b"a", b""), 7)
    assert owed([b"", sound[:-1]], "worker") == ((b"",), None)
    assert owed([b"", b"\x94\x01\x07\xc0\xc0"], "worker") is None
    assert owed([sound], "worker") is None


@pytest.mark.parametrize(
    ("code", "out", "err"),
    [
        (1, "", "Traceback (most recent call last):\n  File\nKeyError: 'x'\n"),
        (1, "half\n", "zflake: it can't be read\n"),
        (1, "", ""),
        (1, "", "zflake: \x1b[2J\n"),
        (0, "\x1b[2J\n", ""),
        (-11, "", ""),
        (None, "", ""),
    ],
)
def test_a_command_that_ends_otherwise_than_it_should_is_noticed(
    code: int | None, out: str, err: str
) -> None:
    assert victims.complaint(code, out, err)
    assert victims.complaint(1, "", "zflake: it can't be read\n") is None
    assert victims.complaint(0, "912\n", "") is None


@pytest.mark.parametrize("name", MUTANTS)
def test_what_a_mutant_changes_is_there_once(name: str) -> None:
    for change in MUTANTS[name].changes:
        spec = importlib.util.find_spec(change.module)
        assert spec is not None
        assert spec.origin is not None
        changed(Path(spec.origin).read_text(), [change])


# --- each guard that is taken out is missed ---


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "name",
    [
        "fields: a text of any kind",
        pytest.param("broker: an answer without the worker's token", marks=pytest.mark.long),
        pytest.param("codec: an error of any form", marks=pytest.mark.long),
    ],
)
def test_a_missing_guard_is_noticed(name: str, tmp_path: Path) -> None:
    # The other ones: ./scripts/soak fuzz-mutants
    result = mutants.catch(name, tmp_path)
    assert mutants.noticed(name, result), str(result)
    assert f"seed {result.seed}" in str(result)


@pytest.mark.long
@pytest.mark.timeout(120)
def test_the_episode_that_found_something_finds_it_again_by_itself(tmp_path: Path) -> None:
    folders = tmp_path / "first", tmp_path / "again"
    for folder in folders:
        folder.mkdir()
    found = mutants.catch("frames: any number of envelopes", folders[0])
    assert f"--episode {found.episode}" in str(found)
    again = mutants.catch("frames: any number of envelopes", folders[1], episode=found.episode)
    assert again.violations
