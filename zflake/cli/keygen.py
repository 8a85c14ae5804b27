"""`zflake keygen`: the folders of keys of a whole cluster, and one more for whoever joins it."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Final

from zflake.errors import ConfigError
from zflake.keys import AUTHORIZED, OWN, TRUSTED, make_key_pair, public_key, write_public
from zflake.wire.callers import PARTIES, Role

_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def make_cluster(folder: Path) -> list[Path]:
    """Make a folder of keys for each role; gives these folders.

    Raises `ConfigError` if there are keys already, or if the folder can't be written.
    """
    made = [add_party(folder, Role.DELEGATOR, Role.DELEGATOR)]
    return made + [add_party(folder, role, role) for role in PARTIES]


def add_party(folder: Path, role: Role, name: str) -> Path:
    """Make one more folder of keys and introduce it to those that are there; gives that folder.

    A delegator is trusted by all parties and authorizes whom the first delegator authorizes; any other party is
    authorized by all delegators.

    Raises `ConfigError` if the name is taken or is no file's name, if there are no keys yet that it could join, or if the
    folder can't be written.
    """
    if not _NAME.fullmatch(name) or name in (OWN, TRUSTED, AUTHORIZED):
        raise ConfigError(f"the name {name!r} can't be a file's: use letters, digits, and . _ - between them")
    mine = folder / name
    delegators = [path.parent for path in sorted(folder.glob(f"*/{AUTHORIZED}"))]
    if not delegators and name != Role.DELEGATOR:
        raise ConfigError(
            f"{folder} holds no delegator's keys: make the cluster's first, with zflake keygen {folder}"
        )
    if mine.exists():
        raise ConfigError(f"{mine} is there already: take another name, or remove it first")
    try:
        public = make_key_pair(mine, name=name, role=role)
        if role is Role.DELEGATOR:
            if delegators:
                shutil.copytree(delegators[0] / AUTHORIZED, mine / AUTHORIZED)
            else:
                (mine / AUTHORIZED).mkdir(0o700)
            for trusted in folder.glob(f"*/{TRUSTED}"):
                write_public(trusted, public, name=name, role=role)
            return mine
        for delegator in delegators:
            write_public(delegator / AUTHORIZED, public, name=name, role=role)
            theirs = public_key(delegator / f"{OWN}.key")
            write_public(mine / TRUSTED, theirs, name=delegator.name, role=Role.DELEGATOR)
    except OSError as error:
        raise ConfigError(f"can't write {error.filename}: {error.strerror}") from error
    return mine
