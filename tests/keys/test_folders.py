"""The folders of keys: what keygen makes, what is refused, and how changes are followed."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from zflake.cli.keygen import add_party, make_cluster
from zflake.errors import ConfigError
from zflake.keys import Callers, Keys, open_keys
from zflake.wire.callers import PARTIES, Limits, Role


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_keygen_makes_a_folder_for_each_role_whose_secrets_are_their_owners_alone(folder: Path) -> None:
    assert {path.name for path in folder.iterdir()} == {"delegator", *PARTIES}
    assert {mode(path) for path in folder.glob("*/own.key_secret")} == {0o600}
    assert {mode(path) for path in folder.iterdir()} == {0o700}
    delegator = Keys(folder / "delegator")
    callers = Callers(folder / "delegator" / "authorized").by_key
    assert {(caller.name, caller.role) for caller in callers.values()} == {(role, role) for role in PARTIES}
    for role in PARTIES:
        keys = Keys(folder / role)
        assert callers[keys.public].role == role
        assert [curve.server for curve in keys.to()] == [delegator.public]


def test_keys_that_are_there_are_never_overwritten(folder: Path) -> None:
    secret = (folder / "delegator" / "own.key_secret").read_text()
    with pytest.raises(ConfigError, match="there already"):
        make_cluster(folder)
    with pytest.raises(ConfigError, match="there already"):
        add_party(folder, Role.CLIENT, "client")
    assert (folder / "delegator" / "own.key_secret").read_text() == secret


def test_one_more_party_is_authorized_by_all_delegators_and_trusts_them(folder: Path) -> None:
    add_party(folder, Role.DELEGATOR, "second")
    add_party(folder, Role.CLIENT, "shop")
    shop = Keys(folder / "shop")
    for delegator in ("delegator", "second"):
        assert Callers(folder / delegator / "authorized").by_key[shop.public].name == "shop"
    both = {Keys(folder / delegator).public for delegator in ("delegator", "second")}
    for party in ("shop", "worker"):
        assert {curve.server for curve in Keys(folder / party).to()} == both
    assert Keys(folder / "worker").public in Callers(folder / "second" / "authorized").by_key


@pytest.mark.parametrize("name", ["", "../x", "a/b", "own", "authorized", "-x", "x" * 65, "ä"])
def test_a_name_that_is_no_files_is_refused(folder: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="can't be a file's"):
        add_party(folder, Role.CLIENT, name)


def test_a_party_can_not_join_a_cluster_that_has_no_delegator(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="zflake keygen"):
        add_party(tmp_path, Role.CLIENT, "shop")


@pytest.mark.parametrize("others", [0o640, 0o604, 0o644])
def test_a_secret_that_others_can_read_is_refused(folder: Path, others: int) -> None:
    (folder / "client" / "own.key_secret").chmod(others)
    with pytest.raises(ConfigError, match="chmod 600"):
        Keys(folder / "client")


@pytest.mark.parametrize("text", ["", 'curve\n    public-key = "short"\n', "\0\xff"])
def test_a_secret_that_is_none_is_refused(folder: Path, text: str) -> None:
    (folder / "client" / "own.key_secret").write_text(text)
    with pytest.raises(ConfigError, match="own.key_secret"):
        Keys(folder / "client")


def test_a_client_without_a_delegators_key_is_told_at_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "client" / "delegators" / "delegator.key").unlink()
    with pytest.raises(ConfigError, match="delegators holds no key"):
        open_keys(folder / "client")
    monkeypatch.setenv("ZFLAKE_KEYS", str(folder / "worker"))
    keys = open_keys(None)
    assert keys is not None
    assert keys.public == Keys(folder / "worker").public
    assert open_keys("") is None


def test_a_delegators_keys_that_went_away_are_trusted_until_others_are_there(folder: Path) -> None:
    keys = Keys(folder / "client")
    before = keys.to()
    (folder / "client" / "delegators" / "delegator.key").write_text("nonsense")
    assert keys.to() == before


# --- who may come ---


def write(path: Path, key: str, *metadata: str) -> None:
    lines = ["metadata", *(f"    {line}" for line in metadata), "curve", f'    public-key = "{key}"']
    path.write_text("\n".join(lines) + "\n")


def test_a_file_that_comes_changes_or_goes_is_followed(folder: Path) -> None:
    authorized = folder / "delegator" / "authorized"
    callers = Callers(authorized)
    version, key = callers.version, Keys(folder / "client").public
    assert not callers.look()
    (authorized / "client.key").unlink()
    assert callers.look()
    assert key not in callers.by_key
    write(authorized / "again.key", key, "role = admin")
    assert callers.look()
    assert (callers.by_key[key].name, callers.by_key[key].role) == ("again", Role.ADMIN)
    write(authorized / "again.key", key, "role = client", "leases = 3")
    assert callers.look()
    assert (callers.by_key[key].role, callers.by_key[key].limits) == (Role.CLIENT, Limits(leases=3))
    assert callers.version == version + 3


@pytest.mark.parametrize(
    "metadata",
    [[], ["role = king"], ["role = client", "leases = many"], ["role = delegator "], None],
    ids=["no role", "no such role", "a limit that is no number", "the delegator's role", "no key"],
)
def test_a_file_that_is_wrong_lets_nobody_in_and_does_not_keep_the_others_out(
    folder: Path, metadata: list[str] | None, caplog: pytest.LogCaptureFixture
) -> None:
    authorized = folder / "delegator" / "authorized"
    callers = Callers(authorized)
    before, key = dict(callers.by_key), "x" * 40
    if metadata is None:
        (authorized / "wrong.key").write_text("metadata\n    role = client\n")
    else:
        write(authorized / "wrong.key", key, *metadata)
    callers.look()
    assert callers.by_key == before
    assert "lets nobody in" in caplog.text
    with pytest.raises(ConfigError, match="wrong.key"):
        Callers(authorized)


def test_a_folder_that_is_missing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="who may come"):
        Callers(tmp_path / "authorized")
