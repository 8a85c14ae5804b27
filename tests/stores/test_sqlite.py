"""What the SQLite store promises beyond the contract: durability, one process a file, and clear refusals."""

from __future__ import annotations

import contextlib
import os
import random
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.stores.made import META, leased, token, write
from zflake.core.lease import Record, Swap
from zflake.delegator.moves import meta_of
from zflake.errors import ConfigError, StoreError
from zflake.stores import Store, open_store
from zflake.stores.memory import MemoryStore
from zflake.stores.sqlite import APPLICATION_ID, SqliteStore, path_of

NOBODY: Final = 65534


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "store.db"


@pytest.fixture
def store(path: Path) -> Iterator[SqliteStore]:
    with closing(SqliteStore(path)) as store:
        store.initialise(META)
        yield store


def refusal(path: Path) -> str:
    """The one line with which opening `path` is refused."""
    with pytest.raises(StoreError) as caught:
        SqliteStore(path).close()
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(f"sqlite:///{path}")
    return message


def goes_on(store: Store) -> None:
    """Fail unless the store still takes a write."""
    record = store.by_machine(1000)
    assert write(store, replace(record, fence=record.fence + 1, gen=record.gen + 1)) == [True]


def filled(path: Path, machines: int = 400) -> bytes:
    """Make a store at `path`, close it, and give the bytes of its file."""
    with closing(SqliteStore(path)) as store:
        store.initialise(META)
        assert all(write(store, *(leased(machine, 10_000 + machine) for machine in range(machines))))
    assert not path.with_name("store.db-wal").exists()
    return path.read_bytes()


@contextlib.contextmanager
def child(code: str, *args: object) -> Iterator[subprocess.Popen[str]]:
    """A process that runs `code` and, unless it has ended by then, is killed at the end."""
    source = (
        "import os, signal, sys\nfrom pathlib import Path\nfrom tests.stores.made import META, leased, write\n"
        "from zflake.core.lease import Record\nfrom zflake.stores.sqlite import SqliteStore\n"
    ) + code
    command = [sys.executable, "-c", source, *map(str, args)]
    with subprocess.Popen(command, text=True, stdout=subprocess.PIPE) as process:
        try:
            yield process
        finally:
            process.kill()


def lines(process: subprocess.Popen[str], count: int = -1) -> list[str]:
    """The next `count` lines that the process prints, or all until it ends."""
    assert process.stdout is not None
    if count < 0:
        return process.stdout.read().splitlines()
    return [process.stdout.readline().rstrip("\n") for _ in range(count)]


# --- durability ---


def pragma(store: SqliteStore, name: str) -> Any:
    return store._db.execute(f"PRAGMA {name}").fetchone()[0]


def test_every_commit_is_synced_to_a_write_ahead_log(store: SqliteStore, path: Path) -> None:
    for _ in range(2):  # as made, and as found
        assert pragma(store, "journal_mode") == "wal"
        assert pragma(store, "synchronous") == 2  # FULL
        assert pragma(store, "fullfsync") == 1
        assert pragma(store, "locking_mode") == "normal"
        log = path.with_name("store.db-wal")
        before = log.stat().st_size if log.exists() else 0
        goes_on(store)
        assert log.stat().st_size > before
        store.close()
        store.__init__(path)  # type: ignore[misc]


SWAPPER: Final = """
store = SqliteStore(Path(sys.argv[1]))
if store.meta() is None:
    store.initialise(META)
while True:
    for machine in range(7):
        gen = store.by_machine(machine).gen + 1
        new = Record(machine, fence=gen * 10 + machine, gen=gen, token=os.urandom(16))
        if write(store, new) == [True]:
            print(machine, gen, new.fence, new.token.hex(), flush=True)
"""


def test_what_was_answered_is_in_the_file_after_every_kill(path: Path) -> None:
    answered: dict[int, Record] = {}
    for count in (1, 40, 173):
        with child(SWAPPER, path) as process:
            answers = lines(process, count)
            process.kill()
            answers += lines(process)
        assert process.returncode == -signal.SIGKILL
        for answer in answers:
            machine, gen, fence, drawn = answer.split()
            answered[int(machine)] = Record(int(machine), int(fence), int(gen), bytes.fromhex(drawn))
    assert answered
    with closing(SqliteStore(path)) as store:
        # The last swap of all may have been made and not printed.
        ahead = [r for r in answered.values() if store.by_machine(r.machine) != r]
        assert len(ahead) <= 1
        assert all(store.by_machine(record.machine).gen == record.gen + 1 for record in ahead)


def test_a_forked_child_takes_nothing_from_its_parent(path: Path) -> None:
    forks = """
def main():
    store = SqliteStore(Path(sys.argv[1]))
    store.initialise(META)
    child = os.fork()
    if child == 0:
        store.close()
        sys.exit(0)
    os.waitpid(child, 0)
    print(write(store, leased(1)), flush=True)
    os.kill(os.getpid(), 9)
main()
"""
    with child(forks, path) as process:
        assert lines(process) == ["[True]"]
    with closing(SqliteStore(path)) as store:
        assert store.by_machine(1) == leased(1)


# --- one process a file ---

OPENER: Final = """
try:
    store = SqliteStore(Path(sys.argv[1]))
    if "used" in sys.argv:
        store.initialise(META)
        assert write(store, leased(1)) == [True]
except Exception as error:
    print(type(error).__name__, error, flush=True)
else:
    print("open", flush=True)
    signal.pause()
"""


def test_a_second_process_is_refused_by_name_and_the_first_goes_on(store: SqliteStore, path: Path) -> None:
    goes_on(store)
    with child(OPENER, path) as process:
        (line,) = lines(process, 1)
    assert line.startswith(f"StoreError sqlite:///{path} is in use by another delegator (pid {os.getpid()})")
    goes_on(store)
    assert refusal(path).endswith(f"(pid {os.getpid()}); stop that one or name another file")
    goes_on(store)
    store.close()
    SqliteStore(path).close()


def test_the_lock_goes_with_its_holder_however_that_ends(path: Path) -> None:
    with child(OPENER, path) as process:
        assert lines(process, 1) == ["open"]
        assert f"(pid {process.pid})" in refusal(path)
        process.kill()
        process.wait()
        SqliteStore(path).close()


def test_the_same_file_by_another_path_is_refused(store: SqliteStore, path: Path, tmp_path: Path) -> None:
    (tmp_path / "link.db").symlink_to(path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "way").symlink_to(tmp_path)
    for other in (tmp_path / "link.db", tmp_path / "way" / "store.db", tmp_path / "folder/../store.db"):
        assert "in use by another delegator" in refusal(other)
        goes_on(store)


@pytest.mark.parametrize("state", ["new", "used"])
def test_a_hard_link_or_a_removed_lock_file_opens_no_second_way(path: Path, state: str) -> None:
    """SQLite's locks are the process's own, so this takes two."""
    with child(OPENER, path, state) as process:
        assert lines(process, 1) == ["open"]
        twin = path.with_name("twin.db")
        twin.hardlink_to(path)
        assert "close the other program that has it open" in refusal(twin)
        path.with_name("store.db.lock").unlink()
        assert "close the other program that has it open" in refusal(path)


def test_a_lock_file_that_is_a_symbolic_link_is_not_followed(path: Path, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    path.with_name("store.db.lock").symlink_to(victim)
    assert "can't write and lock" in refusal(path)
    assert victim.read_text() == "precious"
    assert not path.exists()


def test_a_change_of_folder_does_not_lead_the_store_astray(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    with closing(open_store("sqlite:///store.db")) as store:
        store.initialise(META)
        monkeypatch.chdir(tmp_path / "elsewhere")
        goes_on(store)
    assert (tmp_path / "store.db").exists()
    assert not list((tmp_path / "elsewhere").iterdir())


def test_closing_twice_closes_nothing_of_anybody_else(store: SqliteStore) -> None:
    store.close()
    descriptors = os.pipe()  # the numbers that the store had, most likely
    store.close()
    for descriptor in descriptors:
        os.fstat(descriptor)
        os.close(descriptor)
    with pytest.raises(StoreError):
        store.meta()
    with pytest.raises(StoreError):
        write(store, leased(1))


# --- files that are refused, and stay as they were ---


def other_program(path: Path, *statements: str) -> None:
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        for statement in statements:
            db.execute(statement)


def damage_random(sound: bytes) -> bytes:
    return random.Random(1).randbytes(len(sound))


def damage_index(sound: bytes) -> bytes:
    """One number differs between a table and its index: each page for itself is sound."""
    fence = (10_399).to_bytes(2, "big")
    page = sound.index(fence, sound.rindex(fence) // 4096 * 4096)
    return sound[:page] + (10_398).to_bytes(2, "big") + sound[page + 2 :]


DAMAGE: Final[dict[str, tuple[Callable[[bytes], bytes], str]]] = {
    "random bytes": (damage_random, "file is not a database"),
    "a line of text": (lambda _: b"hello\n", "file is not a database"),
    "cut inside the header": (lambda sound: sound[:50], "malformed"),
    "cut after the first page": (lambda sound: sound[:4096], "malformed"),
    "cut in the middle": (lambda sound: sound[: len(sound) // 2], "malformed"),
    "cut before the last page": (lambda sound: sound[:-4096], "malformed"),
    "an index astray": (damage_index, "corrupt"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_file_is_refused_and_left_as_it_was(path: Path, kind: str) -> None:
    sound = filled(path)
    damage, reason = DAMAGE[kind]
    damaged = damage(sound)
    assert damaged != sound
    path.write_bytes(damaged)
    message = refusal(path)
    assert reason in message
    assert message.endswith("nothing was changed; restore a copy, or name a new file")
    assert path.read_bytes() == damaged
    path.write_bytes(sound)  # the refusal holds on to nothing
    with closing(SqliteStore(path)) as store:
        assert store.by_machine(399) == leased(399, 10_399)


def test_a_page_that_was_flipped_is_noticed_whichever_it_is(path: Path) -> None:
    sound = filled(path)
    pages = len(sound) // 4096
    assert pages >= 8
    for page in range(pages):
        flipped = bytearray(sound)
        for at in range(page * 4096, page * 4096 + 4096):
            flipped[at] ^= 0xFF
        path.write_bytes(flipped)
        assert "nothing was changed; restore a copy" in refusal(path), page
        assert path.read_bytes() == flipped


@pytest.mark.parametrize("mode", ["delete", "wal"])
@pytest.mark.parametrize("application", [0, 1, APPLICATION_ID - 1])
def test_the_file_of_another_program_is_refused_and_left_as_it_was(
    path: Path, mode: str, application: int
) -> None:
    mark = f"PRAGMA application_id = {application}"
    other_program(path, f"PRAGMA journal_mode = {mode}", mark, "CREATE TABLE machine (machine, fence)")
    before = path.read_bytes()
    message = refusal(path)
    assert "is an SQLite file of another program" in message
    assert message.endswith("nothing was changed; name another file")
    assert path.read_bytes() == before


@pytest.mark.parametrize("missing", ["TABLE meta", "TABLE machine", "INDEX machine_by_fence"])
def test_a_file_that_lacks_a_table_is_refused_and_left_as_it_was(path: Path, missing: str) -> None:
    filled(path, machines=3)
    other_program(path, f"DROP {missing}")
    before = path.read_bytes()
    assert "is corrupt (tables are missing); nothing was changed; restore a copy" in refusal(path)
    assert path.read_bytes() == before


def test_a_creation_that_was_cut_short_leaves_a_file_that_can_be_used(path: Path) -> None:
    cut = """
import sqlite3
class Cut(sqlite3.Connection):
    def execute(self, sql, *args):
        if sql == "COMMIT":
            print("ready", flush=True)
            os.kill(os.getpid(), 9)
        return super().execute(sql, *args)
connect = sqlite3.connect
sqlite3.connect = lambda *args, **options: connect(*args, factory=Cut, **options)
SqliteStore(Path(sys.argv[1]))
"""
    with child(cut, path) as process:
        assert lines(process) == ["ready"]
    assert path.exists()
    with closing(SqliteStore(path)) as store:
        assert store.meta() is None
        store.initialise(META)
        goes_on(store)


def test_an_empty_file_becomes_a_store_that_was_never_initialised(path: Path) -> None:
    path.touch()
    with closing(SqliteStore(path)) as store:
        assert store.meta() is None


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (
            "missing/store.db",
            "/missing; make it first (an absolute path takes four slashes: sqlite:////path)",
        ),
        ("folder", "is a folder; name a file in it"),
        (".", "is a folder; name a file in it"),
        ("..", "is a folder; name a file in it"),
        ("/", "is a folder; name a file in it"),
        ("file/store.db", "Not a directory"),
        ("x" * 300, "too long"),
        (f"{'x' * 300}/store.db", "too long"),
    ],
    ids=lambda text: text[:20],
)
def test_a_path_that_can_be_no_file_is_refused_and_nothing_is_made(
    name: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "inner" / "folder").mkdir(parents=True)
    (tmp_path / "inner" / "file").touch()
    monkeypatch.chdir(tmp_path / "inner")
    before = set(tmp_path.rglob("*"))
    assert words in refusal(Path(name))
    assert set(tmp_path.rglob("*")) == before


@contextlib.contextmanager
def without_privilege(folder: Path) -> Iterator[None]:
    """File modes do not bind root; the folder goes to nobody, and so do we."""
    if os.geteuid() != 0:
        yield
        return
    os.chown(folder, NOBODY, -1)
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that everybody may reach; pytest's own may be root's alone."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


@pytest.mark.parametrize(("mode", "may"), [(0o444, "write"), (0, "read and write")])
def test_a_file_that_may_not_be_used_is_refused_at_the_opening_and_left_as_it_was(
    open_folder: Path, mode: int, may: str
) -> None:
    path = open_folder / "store.db"
    before = filled(path, machines=3)
    (open_folder / "store.db.lock").unlink()
    path.chmod(mode)
    with without_privilege(open_folder):
        assert refusal(path).endswith(f"; let this user {may} the file and its folder")
    path.chmod(0o600)
    assert path.read_bytes() == before


def test_a_read_only_folder_is_refused(open_folder: Path) -> None:
    with without_privilege(open_folder):
        open_folder.chmod(0o555)
        try:
            assert "can't write and lock" in refusal(open_folder / "store.db")
        finally:
            open_folder.chmod(0o755)
    assert not list(open_folder.iterdir())


@pytest.fixture
def open_umask() -> Iterator[None]:
    """Files are made for all users, unless their maker says otherwise."""
    before = os.umask(0)
    yield
    os.umask(before)


def used(store: Store) -> None:
    store.initialise(replace(META, incarnation=store.incarnation()))
    write(store, leased(1))


def modes(path: Path) -> dict[str, int]:
    return {each.name: each.stat().st_mode & 0o777 for each in path.parent.iterdir()}


ALL_FILES: Final = ("store.db", "store.db-wal", "store.db-shm", "store.db.lock", "store.db.marker")


@pytest.mark.usefixtures("open_umask")
def test_a_store_is_made_for_its_user_alone(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Others could read tokens there, which give leases back that are in use."""
    with closing(SqliteStore(path)) as store:
        used(store)
        assert modes(path) == dict.fromkeys(ALL_FILES, 0o600)
    assert not caplog.messages


@pytest.mark.usefixtures("open_umask")
def test_a_store_that_others_can_read_is_closed_to_them_at_the_start(
    path: Path, tmp_path_factory: pytest.TempPathFactory, caplog: pytest.LogCaptureFixture
) -> None:
    killed = tmp_path_factory.mktemp("killed")  # what a process that was killed leaves behind
    with closing(SqliteStore(path)) as store:
        used(store)
        for name in ALL_FILES:
            shutil.copyfile(path.parent / name, killed / name)
            (killed / name).chmod(0o664)
    with closing(SqliteStore(killed / path.name)) as again:
        assert again.by_machine(1).gen == 1
        assert modes(killed / path.name) == dict.fromkeys(ALL_FILES, 0o600)
    told = {message.split(" (mode ")[0] for message in caplog.messages}
    assert told == {f"other users could read {killed / name}" for name in ALL_FILES}


# --- URLs ---


@pytest.mark.parametrize(
    ("url", "path"),
    [
        ("sqlite:///store.db", "store.db"),
        ("sqlite:///a/../b.db", "a/../b.db"),
        ("sqlite:////var/lib/zflake/store.db", "/var/lib/zflake/store.db"),
        ("sqlite:///with space%20and?mark#.db", "with space%20and?mark#.db"),
    ],
)
def test_a_url_names_its_file_to_the_letter(url: str, path: str) -> None:
    assert path_of(url) == Path(path)


@pytest.mark.parametrize(
    "url",
    [
        "sqlite:", "sqlite:/", "sqlite://", "sqlite:///", "sqlite:////", "sqlite:///folder/", "sqlite://store.db",
        "sqlite:store.db", "sqlite:/var/store.db", "sqlite://host/store.db", "sqlite:///:memory:",
        "sqlite:///a\0b", "SQLITE:///a", "sqlite3:///a", "store.db", "", "mysql://host",
    ],
)  # fmt: skip
def test_a_url_of_no_file_is_refused_with_the_forms_that_would_do(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        ConfigError, match=r"sqlite:///relative/path.*sqlite:////absolute/path.*memory:"
    ) as caught:
        open_store(url)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["file::memory:", "file:x?mode=memory", "a b%20?c#d'e\"", "ü\udcff.db"])
def test_no_name_means_anything_but_its_file(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        with closing(open_store(f"sqlite:///{name}")) as store:
            if store.meta() is None:
                store.initialise(META)
            goes_on(store)
    assert store.url == f"sqlite:///{name}"
    assert {found.name for found in tmp_path.iterdir()} == {name, f"{name}.lock"}
    with closing(SqliteStore(tmp_path / name)) as store:
        assert store.by_machine(1000).gen == 2


# --- failures in use ---


def stands_untouched(store: SqliteStore) -> None:
    """Fail if the failed write of machines 1 to 3 left anything, an open transaction included."""
    assert not store._db.in_transaction
    assert [store.by_machine(machine) for machine in (1, 2, 3)] == [Record(1), Record(2), Record(3)]
    goes_on(store)


@pytest.mark.parametrize("bad", [leased(2, 1 << 63), replace(leased(2), machine=1 << 64)])
def test_a_record_that_does_not_fit_is_a_store_error_and_nothing_is_written(
    store: SqliteStore, bad: Record
) -> None:
    with pytest.raises(StoreError):
        write(store, leased(1), bad, leased(3))
    stands_untouched(store)


def test_a_number_that_does_not_fit_is_a_store_error(store: SqliteStore) -> None:
    calls: list[Callable[[], object]] = [
        lambda: store.by_machine(1 << 63),
        lambda: store.held(1 << 63),
        lambda: store.lowest(0, 1 << 63, 1),
        lambda: store.swap_meta(META, replace(META, version=2, floor=1 << 63)),
    ]
    for call in calls:
        with pytest.raises(StoreError):
            call()
    assert store.meta() == META
    stands_untouched(store)


def test_a_commit_that_is_interrupted_halfway_writes_nothing(store: SqliteStore) -> None:
    class Interrupted(list[Swap]):
        def __iter__(self) -> Iterator[Swap]:
            yield Swap(Record(1), leased(1), 1)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.swap(Interrupted([Swap(Record(1), leased(1), 1)]))
    stands_untouched(store)


def test_a_full_database_is_a_store_error_and_work_goes_on_when_there_is_room(store: SqliteStore) -> None:
    goes_on(store)
    room = pragma(store, "max_page_count")
    store._db.execute(f"PRAGMA max_page_count = {pragma(store, 'page_count')}")
    with pytest.raises(StoreError, match="full; make room on the disk"):
        write(store, *(leased(machine) for machine in range(1, 500)))
    store._db.execute(f"PRAGMA max_page_count = {room}")
    stands_untouched(store)


@contextlib.contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """No file grows beyond `size` bytes: what a full disk does, without one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_log_that_can_not_grow_is_a_store_error_and_work_goes_on_when_it_can(
    store: SqliteStore, path: Path
) -> None:
    goes_on(store)
    with file_size_limit(path.with_name("store.db-wal").stat().st_size), pytest.raises(StoreError) as caught:
        write(store, leased(1), leased(2), leased(3))
    assert "look at the disk" in str(caught.value)
    stands_untouched(store)
    store.close()
    store.__init__(path)  # type: ignore[misc]
    stands_untouched(store)


@pytest.mark.parametrize("size", [0, 100, 5000])
def test_a_disk_full_at_the_opening_is_a_store_error_and_holds_on_to_nothing(path: Path, size: int) -> None:
    with file_size_limit(size):
        refusal(path)
    with closing(SqliteStore(path)) as store:
        assert store.meta() is None


# --- speed and sameness ---


@pytest.mark.parametrize("used", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("shift", [0, 3])
def test_lowest_takes_no_more_steps_with_more_machines(tmp_path: Path, used: float, shift: int) -> None:
    def steps(machines: int) -> int:
        store = SqliteStore(tmp_path / f"{machines}.db")
        store.initialise(META)
        fences = [*range(int(machines * used))]
        random.Random(2).shuffle(fences)
        write(store, *(leased(machine, fence) for machine, fence in enumerate(fences)))
        store.lowest(shift, machines - 1, 64)  # the first one after the opening may look for its way
        count = 0

        def tick() -> int:
            nonlocal count
            count += 1
            return 0

        store._db.set_progress_handler(tick, 10)
        assert len(store.lowest(shift, machines - 1, 64)) == 64
        store._db.set_progress_handler(None, 10)
        store.close()
        return count

    assert 0 < steps(16_384) <= 1.5 * steps(256)


NUMBERS: Final = st.integers(0, 8)
TOKENS: Final = st.none() | st.integers(0, 5).map(token)
WRITES: Final = st.tuples(
    NUMBERS,
    st.integers(1, 9),
    st.sampled_from([1, 1, 1, 1, 0, 2]),
    TOKENS,
    st.sampled_from([0, 0, 0, 0, 1, -1]),
)
OPERATIONS: Final = st.one_of(
    st.tuples(st.just("swap"), st.lists(WRITES, max_size=5)),
    st.tuples(st.just("swap"), st.lists(WRITES, max_size=5)),
    st.tuples(st.just("meta"), st.integers(-1, 2), st.sampled_from(["store-1", "store-1", "store-2"])),
    st.tuples(st.just("lowest"), NUMBERS, NUMBERS, st.integers(0, 10)),
    st.tuples(st.just("held"), st.integers(0, 10)),
    st.tuples(st.just("reopen")),
)


@settings(max_examples=60, deadline=None)
@given(operations=st.lists(OPERATIONS, max_size=40))
def test_the_file_answers_as_the_reference_does(operations: list[tuple[Any, ...]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "store.db"
        reference, store = MemoryStore(), SqliteStore(path)
        reference.initialise(META)
        store.initialise(META)
        store._db.execute("PRAGMA synchronous = OFF")
        for name, *args in operations:
            meta = meta_of(reference)
            match name:
                case "swap":
                    swaps, outcomes = [], []
                    gens = {machine: reference.by_machine(machine).gen for machine, *_ in args[0]}
                    for machine, fence, step, drawn, other in args[0]:
                        new = Record(machine, fence, gens[machine] + step, drawn)
                        read = replace(reference.by_machine(machine), gen=new.gen - 1)
                        swaps.append(Swap(read, new, meta.version + other))
                        outcomes += reference.swap(swaps[-1:])
                    assert store.swap(swaps) == outcomes
                case "meta":
                    old = replace(meta, version=meta.version + args[0] - 1, store_id=args[1])
                    next_meta = replace(meta, version=meta.version + 1, floor=meta.floor + 1)
                    assert store.swap_meta(old, next_meta) == reference.swap_meta(old, next_meta)
                case "reopen":
                    store.close()
                    store = SqliteStore(path)
                    store._db.execute("PRAGMA synchronous = OFF")
                case _:
                    assert list(getattr(store, name)(*args)) == list(getattr(reference, name)(*args))
            assert store.meta() == reference.meta()
        for number in range(9):
            assert store.by_machine(number) == reference.by_machine(number)
            assert store.by_token(token(number)) == reference.by_token(token(number))
        assert list(store.lowest(0, 8, 9)) == list(reference.lowest(0, 8, 9))
        store.close()
