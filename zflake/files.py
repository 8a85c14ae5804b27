"""A store's files belong to one user alone: another who can read its tokens can give its leases back."""

from __future__ import annotations

import logging
import stat
from pathlib import Path
from typing import Final

OTHERS: Final = 0o077

_log = logging.getLogger("zflake.files")


def close_to_others(*paths: Path) -> None:
    """Take from other users what access they have to these files and folders, and log it; one may be missing."""
    for path in paths:
        try:
            mode = stat.S_IMODE(path.stat().st_mode)
            if not mode & OTHERS:
                continue
            path.chmod(mode & ~OTHERS)
        except FileNotFoundError:
            continue
        except OSError as error:
            _log.warning("other users can read %s: take that from them (%s)", path, error.strerror)
        else:
            _log.warning(
                "other users could read %s (mode %04o); its mode is %04o now", path, mode, mode & ~OTHERS
            )
