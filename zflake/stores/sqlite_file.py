"""The file of an SQLite store: used by one process, and no older than it was.

The *lock file* beside the database is held for as long as the process lives, so that a second delegator on
the same file is refused and not merely serialised.  It is never removed: a process that had opened it before
would lock a file that no other one finds.

The *marker* beside it says how far the database has come: its incarnation, how many commits it has had, and
how many of them the main file alone holds, without its log.  It is written after each commit and not forced
to the disk, so it never says more than the database does; after a crash it may say less.  A database that is
behind its marker, of another incarnation, or without one was restored, replaced or moved here: it may have
forgotten windows that it granted.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import sqlite3
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

from zflake.errors import StoreError
from zflake.files import close_to_others


class Progress(NamedTuple):
    """How far a database has come."""

    incarnation: str
    commits: int
    checkpointed: int
    """How many commits the main file holds without its log."""


class DatabaseFile:
    """Lock, marker and identity of the file `path`, which `url` names to people."""

    def __init__(self, path: Path, url: str) -> None:
        # Links resolved, so that one file has one lock; absolute, so that no name means more to SQLite.
        self.path = Path(os.path.realpath(path))
        self.marker_path = Path(f"{self.path}.marker")
        self._url = url
        name = str(self.path).replace("%", "%25").replace("?", "%3f").replace("#", "%23")
        self.uri = f"file:{name}"
        self._marker: int | None = None
        self._status: os.stat_result | None = None
        self._checkpointed = 0
        self._incarnation = ""  # of the main file
        self._overwritten = False

    def lock(self, held: ExitStack) -> None:
        """Take the lock until `held` is closed; `StoreError` if another process has it."""
        path = Path(f"{self.path}.lock")
        try:
            lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            held.callback(os.close, lock)
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(lock, 0)
            os.write(lock, str(os.getpid()).encode())
        except FileNotFoundError as error:
            raise StoreError(
                f"{self._url}: there is no folder {path.parent}; make it first"
                " (an absolute path takes four slashes: sqlite:////path)"
            ) from error
        except BlockingIOError as error:
            pid = os.read(lock, 20).decode("ascii", "replace").strip() or "unknown"
            raise StoreError(
                f"{self._url} is in use by another delegator (pid {pid}); stop that one or name another file"
            ) from error
        except OSError as error:
            raise StoreError(f"{self._url}: can't write and lock {path}: {error.strerror}") from error

    def create(self) -> None:
        """Make the file if there is none: one that others can't read, which goes for its log as well."""
        if not self.path.exists():
            self.path.touch(0o600)

    def close_to_others(self) -> None:
        """Have the file and what lies beside it be this user's alone."""
        beside = (Path(f"{self.path}{end}") for end in ("-wal", "-shm", ".lock"))
        close_to_others(self.path, self.marker_path, *beside)

    # --- is it still the file that was opened? ---

    def main_file(self) -> tuple[int, str]:
        """How many commits the main file holds, its log aside, and of which incarnation.

        -1 if it is empty; no incarnation if it has no meta yet.
        """
        db = sqlite3.connect(f"{self.uri}?mode=ro&immutable=1", uri=True)
        try:
            if db.execute("SELECT 1 FROM sqlite_master WHERE name = 'life'").fetchone() is None:
                return -1, ""
            (commits,) = db.execute("SELECT commits FROM life").fetchone()
            (incarnation,) = db.execute("SELECT incarnation FROM meta").fetchone() or ("",)
            return int(commits), str(incarnation)
        finally:
            db.close()

    def opened(self) -> None:
        """Note which file was opened, and what its main file holds."""
        self._status = self.path.stat()
        self._checkpointed, self._incarnation = self.main_file()

    def check(self, incarnation: str) -> None:
        """Raise `StoreError` unless the path still names the open file, with what this process put into it.

        The next process that opens the path must find what is written now, in this incarnation.
        """
        try:
            status = self.path.stat()
        except OSError:
            status = None
        before = self._status
        assert before is not None
        if status is None or not os.path.samestat(status, before):
            raise StoreError(
                f"{self._url} was moved or replaced while in use; put it back, or stop this process first"
            )
        if (status.st_mtime_ns, status.st_size) != (before.st_mtime_ns, before.st_size):
            # A checkpoint, be it ours or a backup program's, only ever adds commits to the main file.
            try:
                checkpointed, of = self.main_file()
            except sqlite3.Error as error:
                raise StoreError(f"{self._url} was written to by another program: {error}") from error
            if checkpointed < self._checkpointed or of not in (self._incarnation, incarnation):
                self._overwritten = True
            else:
                self._status, self._checkpointed, self._incarnation = status, checkpointed, of
        if self._overwritten:
            raise self.renounced()

    def renounced(self) -> StoreError:
        """Take nothing any more, and have the next process that opens the database know; gives what to raise."""
        self._overwritten = True
        with contextlib.suppress(OSError):
            self._close_marker()
            self.marker_path.touch(0o600)
            self.marker_path.write_text("overwritten\n", "ascii")
        return StoreError(
            f"{self._url} was overwritten with an older one, or another, while in use: stop this process; the"
            " next one will wait until all that may be forgotten has ended"
        )

    # --- the marker ---

    def check_kind(self) -> None:
        """Raise `StoreError` if database or marker are there and no files: to open a pipe waits for ever."""
        if self.path.is_dir():
            raise StoreError(f"{self._url} is a folder; name a file in it")
        for path in (self.path, self.marker_path):
            if path.exists() and not path.is_file():
                raise StoreError(f"{self._url}: {path} is no file; move it away, or name another store")

    def read_marker(self) -> Progress | None:
        """The progress that the marker tells; None if there is no marker.

        If it can't be read, or the main file is behind it, no incarnation is like the one that this gives.
        """
        try:
            text = self.marker_path.read_text("ascii", "replace")
        except FileNotFoundError:
            return None
        except OSError as error:
            raise StoreError(f"{self._url}: can't read {self.marker_path}: {error.strerror}") from error
        try:
            incarnation, *numbers = text.split()
            commits, checkpointed = map(int, numbers)
            if self.path.exists() and self.main_file()[0] >= checkpointed:
                return Progress(incarnation, commits, checkpointed)
        except (ValueError, sqlite3.Error):
            pass
        return Progress("", 1, 0)

    def begin_marker(self, held: ExitStack, incarnation: str, commits: int) -> None:
        """Make the marker say that the database is of this incarnation, durably, and keep it open."""
        try:
            marker = os.open(self.marker_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            if self._marker is None:
                held.callback(self._close_marker)
            else:
                os.close(self._marker)
            self._marker = marker
            os.ftruncate(marker, 0)
            self.write_marker(incarnation, commits)
            os.fsync(marker)
            folder = os.open(self.path.parent, os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
        except OSError as error:
            raise StoreError(f"{self._url}: can't write {self.marker_path}: {error.strerror}") from error

    def write_marker(self, incarnation: str, commits: int) -> None:
        """Say how far the database has come; nothing before `begin_marker`."""
        if self._marker is not None:
            # In one place and of one length: a reader after a crash finds the old line or the new one.
            line = f"{incarnation:<32} {commits:020} {self._checkpointed:020}\n"
            os.pwrite(self._marker, line.encode("ascii"), 0)

    def _close_marker(self) -> None:
        if self._marker is not None:
            os.close(self._marker)
            self._marker = None
