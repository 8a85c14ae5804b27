"""What no delegator begins on: one line says why and what to do, no password is in it, and nothing is written."""

from __future__ import annotations

import contextlib
import itertools
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

import psycopg
import pytest
import redis
import requests

from tests.conftest import brief
from tests.places import PLACES, EtcdPlace, Place, PostgresqlPlace, RedisPlace, etcd_host
from tests.servers import Etcd, Postgres, Redis, Servers, find_etcd, not_tested
from zflake.core.layout import PRESETS
from zflake.core.lease import OLDEST, SCHEMA, Holder, Mark, Meta, Record, Swap
from zflake.errors import ConfigError, StoreError, ZflakeError
from zflake.stores import open_store
from zflake.stores.contract import Contents

SECRET: Final = "hush4711"
HARD: Final = f"{SECRET}@:/?#%41 é"
"""A password that means something in a URL."""
META: Final = Meta("store-1", PRESETS["snowcloud"], ttl=30_000, first_machine=0, last_machine=1023)
LATE: Final = 1 << 40
HASTY: Final = "import zflake.delegator.clock as clock; clock.LISTEN_S = 0.3"
"""Has a delegator not wait for others to show themselves for as long as it would."""
SERVED: Final = ("redis", "etcd", "postgresql")
LOSING: Final = ("3.5.0", "3.5.1", "3.5.2")


def run(*argv: str, prelude: str = "", module: str = "zflake.cli.delegator") -> tuple[int, str]:
    """A command's exit code and what it said on stderr; the prelude is Python that goes before it."""
    program = f"{prelude}\nfrom {module} import main\nmain()"
    done = subprocess.run(
        [sys.executable, "-c", program, *argv], check=False, capture_output=True, text=True, timeout=40
    )
    assert done.stdout == ""
    return done.returncode, done.stderr


def refused(url: str, *words: str, flags: Sequence[str] = (), code: int = 1, prelude: str = "") -> str:
    """What a delegator says that ends at once on that store: one line, with these words."""
    returned, said = run("--store", url, "--bind", "tcp://127.0.0.1:*", *flags, prelude=prelude)
    (line,) = said.splitlines()
    assert line.startswith("zflake-delegator: ")
    for word in words:
        assert word in line
    assert SECRET not in line
    assert returned == code, line
    return line


def says(url: str, *words: str, kind: type[ZflakeError] = ZflakeError) -> str:
    """The same without a process: what is raised for a URL."""
    with pytest.raises(kind) as caught:
        open_store(url).close()
    text = str(caught.value)
    assert len(text.splitlines()) == 1
    for word in words:
        assert word in text
    assert SECRET not in text
    return text


def works(url: str) -> None:
    """A store at that URL takes a meta and a commit, and gives them back to the next one that opens it."""
    store = open_store(url)
    store.initialise(replace(META, incarnation=store.incarnation()))
    record = Record(1, fence=LATE, gen=1, token=b"t" * 16, holder=Holder("w"))
    assert store.swap([Swap(Record(1), record, 1)]) == [True]
    store.close()
    again = open_store(url)
    assert again.by_token(b"t" * 16) == record
    assert SECRET not in again.url
    again.close()


def meta_at(url: str) -> Meta | None:
    store = open_store(url)
    try:
        return store.meta()
    finally:
        store.close()


def fill(place: Place, meta: Meta = META) -> None:
    """Make a store there, with two leases and a mark."""
    store = open_store(place.url)
    records = [
        Record(n, fence=LATE, gen=1, token=bytes([n]) * 16, holder=Holder(f"w{n}", "h", n)) for n in (1, 2)
    ]
    contents = Contents(records, marks=[Mark("127.0.0.1:7410", time.time_ns() // 1000)])
    store.initialise(replace(meta, incarnation=store.incarnation()), contents)
    store.close()


@pytest.fixture(params=brief(PLACES, ["sqlite", "redis"]))
def place(request: pytest.FixtureRequest, tmp_path: Path, servers: Servers) -> Place:
    return PLACES[request.param](tmp_path, servers)


@pytest.fixture(scope="module")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Postgres]:
    """A PostgreSQL that asks the role `guarded` for a password."""
    server = Postgres(tmp_path_factory.mktemp("guarded"))
    access = server.data / "pg_hba.conf"
    access.write_text(f"host all guarded 127.0.0.1/32 scram-sha-256\n{access.read_text()}")
    server.start()
    with psycopg.connect(server.url, autocommit=True) as db:
        db.execute("CREATE ROLE guarded LOGIN PASSWORD '" + HARD + "'")
        db.execute("CREATE DATABASE guarded OWNER guarded")
    yield server
    server.kill()


# --- URLs that can't be read ---

UNREADABLE: Final[dict[str, tuple[str, ...]]] = {
    "no-host": ("redis://", "etcd://", "etcd:///p", "postgresql://", "etcd://,/p", "etcd://h,,h/p"),
    "one-slash": ("redis:/h/0", "etcd:/h/p", "postgresql:/h/d", "redis:h", "redis"),
    "bad-port": tuple(
        f"{scheme}://u:{SECRET}@127.0.0.1:{port}/1" for scheme in SERVED for port in ("1x", "99999", "-1")
    ),
    "open-bracket": ("redis://[::1/0", "etcd://[::1/p", "postgresql://[::1/d"),
    "unknown-option": tuple(f"{scheme}://u:{SECRET}@127.0.0.1:1/1?nonsense=1" for scheme in SERVED),
    "neither-yes-nor-no": tuple(f"{scheme}://u:{SECRET}@127.0.0.1:1/1?unchecked=maybe" for scheme in SERVED),
    "tls-by-another-word": (f"etcd://u:{SECRET}@127.0.0.1:1/p?tls=true",),
    "no-such-ca": (f"etcd://u:{SECRET}@127.0.0.1:1/p?tls=yes&ca=/none/such",),
    "no-prefix": ("etcd://127.0.0.1:1", "etcd://127.0.0.1:1/", "etcd://127.0.0.1:1//"),
    "empty-option": (
        "redis://127.0.0.1:1/0?prefix=",
        "postgresql://127.0.0.1:1/d?schema=",
        "redis://127.0.0.1:1/0?unchecked=",
    ),
    "no-such-database": ("redis://127.0.0.1:1/abc", "redis://127.0.0.1:1/-1", "redis://127.0.0.1:1/0/1"),
    "another-scheme": tuple(
        f"{scheme}://u:{SECRET}@h/d" for scheme in ("postgres", "mysql", "REDIS", "Etcd", "sqlite")
    ),
    "unescaped-password": tuple(
        f"{scheme}://u:{SECRET}{sign}x@127.0.0.1:1/1" for scheme in SERVED for sign in ("/", "?", "#")
    ),
    "no-host-but-a-login": tuple(f"{scheme}://u:{SECRET}/1" for scheme in SERVED),
    "bad-escape": (f"postgresql://u:{SECRET}%zz@127.0.0.1:1/d",),
}
URLS: Final = [pytest.param(url, id=f"{kind}-{url}") for kind, urls in UNREADABLE.items() for url in urls]


@pytest.mark.parametrize("url", URLS)
def test_a_url_that_can_not_be_read_is_told_so_without_its_password(url: str) -> None:
    says(url, kind=ConfigError)


@pytest.mark.parametrize(
    ("url", "words"),
    [
        (f"redis://:{SECRET}@127.0.0.1:1x/0", "can't read the redis:// URL: write host or host:port"),
        (f"etcd://u:{SECRET}@127.0.0.1:1x/p", "can't read the etcd:// URL: write host or host:port"),
        (
            f"postgresql://u:{SECRET}@127.0.0.1:1x/d",
            "can't read the postgresql:// URL: write host or host:port",
        ),
        ("etcd://127.0.0.1:2379", "host2,host3/prefix"),
        (f"postgres://u:{SECRET}@h/d", "postgresql://user@host/database"),
        ("sqlite://store.db", "sqlite:///relative/path"),
    ],
    ids=["redis", "etcd", "postgresql", "no-prefix", "postgres", "sqlite"],
)
def test_the_command_line_is_told_so_too(url: str, words: str) -> None:
    refused(url, words, code=2)


@pytest.mark.parametrize(
    ("url", "package", "extra"),
    [
        ("redis://127.0.0.1:1/0", "redis", "redis"),
        ("rediss://127.0.0.1:1/0", "redis", "redis"),
        ("etcd://127.0.0.1:1/p", "etcd3gw", "etcd"),
        ("etcd://127.0.0.1:1/p", "requests", "etcd"),
        ("postgresql://127.0.0.1:1/d", "psycopg", "postgresql"),
    ],
)
def test_a_package_that_is_not_installed_is_named_with_its_command(
    url: str, package: str, extra: str
) -> None:
    refused(
        url, f"pip install 'zflake[{extra}]'", code=2, prelude=f"import sys; sys.modules[{package!r}] = None"
    )


# --- servers that are not there, or are not what they should be ---


@pytest.fixture
def closed_port() -> Iterator[int]:
    """A port at which nobody listens, nor can."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield int(taken.getsockname()[1])


@pytest.mark.parametrize("scheme", SERVED)
def test_a_server_that_is_not_there_is_named(scheme: str, closed_port: int) -> None:
    where = f"127.0.0.1:{closed_port}/1"
    refused(f"{scheme}://u:{SECRET}@{where}", f"can't reach {scheme}://{where}", "refused")


@pytest.mark.parametrize("scheme", SERVED)
def test_so_is_a_host_that_nobody_knows(scheme: str) -> None:
    url = f"{scheme}://u:{SECRET}@nobody.invalid/1"
    refused(url, f"can't reach {scheme}://nobody.invalid/1")


@pytest.mark.parametrize("scheme", SERVED)
def test_so_is_one_that_takes_connections_and_never_answers(scheme: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        says(f"{scheme}://u:{SECRET}@127.0.0.1:{port}/1", f"127.0.0.1:{port}", kind=StoreError)


@pytest.mark.parametrize(("scheme", "other"), list(itertools.permutations(SERVED, 2)))
def test_a_server_of_another_kind_is_refused(scheme: str, other: str, servers: Servers) -> None:
    server = {"redis": servers.redis, "etcd": servers.etcd, "postgresql": servers.postgres}[other]
    assert isinstance(server, Redis | Etcd | Postgres)
    says(f"{scheme}://u:{SECRET}@127.0.0.1:{server.port}/1", f"127.0.0.1:{server.port}", kind=StoreError)
    assert server.is_up()


@pytest.mark.parametrize("scheme", SERVED)
def test_an_address_of_ip_version_6_is_understood(scheme: str) -> None:
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6) as server:
            port = server.getsockname()[1]
    except OSError:
        not_tested("no IPv6 on this machine: addresses of it are NOT TESTED")
    says(f"{scheme}://u:{SECRET}@[::1]:{port}/1", f"[::1]:{port}", "refused", kind=StoreError)


# --- passwords ---


@pytest.fixture
def guarded_redis(tmp_path: Path) -> Iterator[Redis]:
    """A Redis that wants the password `HARD`."""
    server = Redis(tmp_path / "guarded")
    server.start()
    with redis.Redis(port=server.port) as client:
        client.config_set("requirepass", HARD)
    yield server
    server.kill()


@pytest.fixture
def guarded_etcd(tmp_path: Path) -> Iterator[Etcd]:
    """An etcd that wants the password `HARD` of root."""
    server = Etcd(tmp_path / "guarded")
    server.start()
    for path, request in (
        ("user/add", {"name": "root", "password": HARD}),
        ("role/add", {"name": "root"}),
        ("user/grant", {"user": "root", "role": "root"}),
        ("enable", {}),
    ):
        answer = requests.post(f"http://127.0.0.1:{server.port}/v3/auth/{path}", json=request, timeout=5)
        answer.raise_for_status()
    yield server
    server.kill()


WRONG: Final = f"wrong-{SECRET}"


def test_redis_takes_its_password_and_no_other(guarded_redis: Redis) -> None:
    where = f"127.0.0.1:{guarded_redis.port}/0"
    refused(f"redis://:{WRONG}@{where}", f"redis://{where} refuses the password")
    refused(f"redis://{where}", f"redis://{where}", "password")
    says(f"redis://nobody:{quote(HARD, safe='')}@{where}", "refuses the password", kind=StoreError)
    works(f"redis://:{quote(HARD, safe='')}@{where}")
    works(f"redis://default:{quote(HARD, safe='')}@{where}?prefix=named:")


def test_etcd_takes_its_password_and_no_other(guarded_etcd: Etcd) -> None:
    where = f"127.0.0.1:{guarded_etcd.port}/zflake"
    refused(f"etcd://root:{WRONG}@{where}", f"etcd://{where} refuses the password of root")
    refused(f"etcd://{where}?unchecked=yes", f"etcd://{where}", "password")
    says(f"etcd://nobody:{quote(HARD, safe='')}@{where}", "refuses the password", kind=StoreError)
    works(f"etcd://root:{quote(HARD, safe='')}@{where}?unchecked=yes")


def test_etcd_is_shown_the_password_again_when_it_forgets_who_is_there(guarded_etcd: Etcd) -> None:
    where = f"127.0.0.1:{guarded_etcd.port}/zflake?unchecked=yes"
    store = open_store(f"etcd://root:{quote(HARD, safe='')}@{where}")
    store.initialise(replace(META, incarnation=store.incarnation()))
    guarded_etcd.kill()
    guarded_etcd.start()  # its tokens are gone
    assert store.meta() is not None
    store.close()


def test_postgresql_takes_its_password_and_no_other(postgres: Postgres) -> None:
    where = f"127.0.0.1:{postgres.port}/guarded"
    refused(
        f"postgresql://guarded:{WRONG}@{where}", f"postgresql://{where}", "password authentication failed"
    )
    refused(f"postgresql://guarded@{where}", f"postgresql://{where}", "password")
    works(f"postgresql://guarded:{quote(HARD, safe='')}@{where}")


def test_a_postgresql_that_lets_nobody_make_tables_says_so(postgres: Postgres) -> None:
    with psycopg.connect(postgres.url, autocommit=True) as db:
        db.execute("CREATE DATABASE closed")
    url = f"postgresql://guarded:{quote(HARD, safe='')}@127.0.0.1:{postgres.port}/closed"
    says(url, "permission denied", kind=StoreError)


def test_a_postgresql_without_that_database_says_so(servers: Servers) -> None:
    where = f"zflake@127.0.0.1:{servers.postgres.port}"
    refused(f"postgresql://{where}/none", 'database "none" does not exist')
    # Without a name it would be the user's; nobody means that.
    says(f"postgresql://{where}/", "/database", kind=ConfigError)
    says(f"postgresql://{where}", "/database", kind=ConfigError)


def test_no_password_is_told_by_the_tool(guarded_redis: Redis, tmp_path: Path) -> None:
    url = f"redis://:{quote(HARD, safe='')}@127.0.0.1:{guarded_redis.port}/0"
    file = f"sqlite:///{tmp_path}/store.db"
    for argv in (["info", url], ["rewind", url], ["copy", url, file], ["restore", url, file]):
        code, said = run("store", *argv, module="zflake.cli.tool")
        assert code == 1
        assert said.count("\n") == 1
        assert "holds no cluster" in said
        assert SECRET not in said
    works(url)
    done = subprocess.run(
        [sys.executable, "-m", "zflake", "store", "info", url], check=True, capture_output=True, text=True
    )
    assert SECRET not in done.stdout + done.stderr
    done = subprocess.run(
        [sys.executable, "-m", "zflake", "store", "restore", url, file],
        check=True,
        capture_output=True,
        text=True,
    )
    assert SECRET not in done.stdout + done.stderr


# --- what is there is not a store, or not this one ---


def untouched(place: Place, *words: str, flags: Sequence[str] = (), code: int = 1) -> None:
    before = place.everything()
    refused(place.url, *words, flags=flags, code=code, prelude=HASTY)
    assert place.everything() == before


def test_a_store_keeps_its_layout(place: Place) -> None:
    fill(place)
    words = ("has layout snowcloud", "not clawflake", "Leave --layout and --epoch out")
    untouched(place, *words, flags=["--layout", "clawflake"], code=2)


@pytest.mark.parametrize("schema", [SCHEMA + 1, OLDEST - 1])
def test_a_store_of_another_schema_is_left_as_it_was(place: Place, schema: int) -> None:
    fill(place)
    place.set_schema(schema)
    untouched(
        place, f"schema {schema}", "upgrade zflake" if schema > SCHEMA else "older than the first release"
    )


def test_a_store_that_was_moved_names_where_to(place: Place) -> None:
    fill(place, replace(META, moved="etcd://elsewhere/zflake"))
    untouched(place, "was moved to etcd://elsewhere/zflake", code=2)


@pytest.mark.parametrize(
    "text", ["", "junk", "[]", "5", "{}", '{"zflake": 2}', '{"zflake": "x"}', '"\\ud800"']
)
def test_junk_in_meta_is_left_as_it_was(place: Place, text: str) -> None:
    fill(place)
    place.damage_meta(text)
    before = place.everything()
    with pytest.raises(StoreError) as caught:
        meta_at(place.url)
    assert len(str(caught.value).splitlines()) == 1
    assert place.shown in str(caught.value)
    assert place.everything() == before


def test_junk_in_meta_is_one_line_at_the_command_line(place: Place) -> None:
    fill(place)
    place.damage_meta("junk")
    untouched(place, place.shown)


def test_junk_in_a_record_is_one_line_at_the_command_line(place: Place) -> None:
    fill(place)
    place.damage_record(1)
    refused(place.url, place.shown, prelude=HASTY)


def test_what_another_program_put_there_is_left_as_it_was(place: Place) -> None:
    place.put_foreign()
    untouched(place, "nothing was changed", "name another")


def put_bytes(place: EtcdPlace) -> None:
    place.put(f"{place.prefix}/meta", b"\xff\xfe")


FOREIGN_ETCD: Final[dict[str, Callable[[EtcdPlace], None]]] = {
    "bytes": put_bytes,
    "bytes-for-a-key": lambda place: place.put(f"{place.prefix}/machine/\ud800x", "x"),
    "machines-without-meta": lambda place: place.put(f"{place.prefix}/machine/{1:020}", "x"),
    "an-empty-value": lambda place: place.put(f"{place.prefix}/meta", ""),
    "no-zflake": lambda place: place.put(f"{place.prefix}/meta", '{"version": 1}'),
}


@pytest.mark.parametrize("kind", FOREIGN_ETCD)
def test_foreign_keys_in_etcd_are_left_as_they_were(kind: str, servers: Servers, tmp_path: Path) -> None:
    place = PLACES["etcd"](tmp_path, servers)
    assert isinstance(place, EtcdPlace)
    FOREIGN_ETCD[kind](place)
    before = place.everything()
    says(place.url, "not zflake's", "nothing was changed", kind=StoreError)
    assert place.everything() == before


FOREIGN_REDIS: Final[dict[str, Callable[[Any, str], object]]] = {
    "meta-of-another-type": lambda client, prefix: client.rpush(f"{prefix}meta", "x"),
    "a-hash-without-the-text": lambda client, prefix: client.hset(f"{prefix}meta", "version", "1"),
    "bytes": lambda client, prefix: client.hset(f"{prefix}meta", "text", b"\xff\xfe"),
    "machines-without-meta": lambda client, prefix: client.hset(f"{prefix}machines", "1", "x"),
    "tokens-of-another-type": lambda client, prefix: client.set(f"{prefix}tokens", "x"),
    "marks-of-another-type": lambda client, prefix: client.set(f"{prefix}marks", "x"),
}


@pytest.mark.parametrize("kind", FOREIGN_REDIS)
def test_foreign_keys_in_redis_are_left_as_they_were(kind: str, servers: Servers, tmp_path: Path) -> None:
    place = PLACES["redis"](tmp_path, servers)
    assert isinstance(place, RedisPlace)
    FOREIGN_REDIS[kind](place.client, place.prefix)
    before = place.everything()
    says(place.url, "not zflake's", "name another", kind=StoreError)
    assert place.everything() == before


FOREIGN_POSTGRESQL: Final[dict[str, tuple[str, ...]]] = {
    "other-tables": ("CREATE TABLE zflake.orders (number int)",),
    "tables-of-the-same-names": tuple(
        f"CREATE TABLE zflake.{table} (number int)" for table in ("meta", "machine", "span", "mark")
    ),
    "almost-the-same-columns": tuple(
        f"CREATE TABLE zflake.{table} (store_id text)" for table in ("meta", "machine", "span", "mark")
    ),
    "some-of-the-tables": ("CREATE TABLE zflake.meta (store_id text)",),
}


@pytest.mark.parametrize("kind", FOREIGN_POSTGRESQL)
def test_a_foreign_schema_in_postgresql_is_left_as_it_was(
    kind: str, servers: Servers, tmp_path: Path
) -> None:
    place = PLACES["postgresql"](tmp_path, servers)
    assert isinstance(place, PostgresqlPlace)
    place.execute("CREATE SCHEMA zflake")
    for statement in FOREIGN_POSTGRESQL[kind]:
        place.execute(statement)
    untouched(place, "not zflake's", "name another ?schema=")
    works(f"{place.url}?schema=Another%20one")


def test_an_empty_schema_in_postgresql_is_made_use_of(servers: Servers, tmp_path: Path) -> None:
    place = PLACES["postgresql"](tmp_path, servers)
    assert isinstance(place, PostgresqlPlace)
    place.execute("CREATE SCHEMA zflake")
    works(place.url)


# --- stores side by side ---


def test_stores_whose_names_begin_alike_do_not_see_each_other(servers: Servers) -> None:
    host = etcd_host(servers)
    urls = [f"{host}/{name}?unchecked=yes" for name in ("zf", "zf2", "zf/x", "z")]
    urls += [f"{servers.redis.url}?prefix={prefix}" for prefix in ("zf:", "zf:x:", "zf", "z")]
    database = servers.postgres.url_of_new_database()
    urls += [f"{database}?schema={schema}" for schema in ("zf", "zf_x", "ZF", "z")]
    stores = [open_store(url) for url in urls]
    for number, store in enumerate(stores):
        assert store.meta() is None, store.url
        meta = replace(META, store_id=f"store-{number}", incarnation=store.incarnation())
        store.initialise(meta, Contents([Record(number, fence=LATE, gen=1, token=bytes([number]) * 16)]))
    for number, store in enumerate(stores):
        meta_now = store.meta()
        assert meta_now is not None
        assert meta_now.store_id == f"store-{number}"
        assert [record.machine for record in store.held(0)] == [number]
        later = Swap(store.by_machine(number), Record(number, LATE + 1, 2, b"u" * 16), 1)
        assert store.swap([later], Mark(f"d{number}", 1)) == [True]
        assert [mark.delegator for mark in store.marks()] == [f"d{number}"]
        store.close()
    for url, number in zip(urls, range(len(urls)), strict=True):
        again = open_store(url)
        assert [record.fence for record in again.contents().records] == [LATE + 1]
        assert again.by_token(bytes([number]) * 16) is None
        again.close()


@pytest.mark.parametrize(
    ("one", "other"),
    [
        pytest.param("/slash", "/slash/", id="etcd"),
        pytest.param("?unchecked=yes", "?prefix=zflake:&unchecked=yes", id="redis"),
        pytest.param("", "?schema=zflake", id="postgresql"),
    ],
)
def test_one_store_has_several_names(
    one: str, other: str, servers: Servers, request: pytest.FixtureRequest
) -> None:
    scheme = request.node.callspec.id
    base = {
        "etcd": lambda: etcd_host(servers),
        "redis": lambda: servers.redis.url.replace("/0", "/7"),
        "postgresql": servers.postgres.url_of_new_database,
    }[scheme]()
    suffix = "?unchecked=yes" if scheme == "etcd" else ""
    store = open_store(base + one + suffix)
    store.initialise(replace(META, incarnation=store.incarnation()))
    store.close()
    again = open_store(base + other + suffix)
    assert again.meta() is not None
    again.close()


# --- servers that would lose what they promised ---


@contextlib.contextmanager
def up(server: Redis | Etcd) -> Iterator[str]:
    server.start()
    try:
        yield server.url
    finally:
        server.kill()


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("maxmemory-policy", "allkeys-lru", "set maxmemory-policy noeviction"),
        ("maxmemory-policy", "volatile-ttl", "set maxmemory-policy noeviction"),
        ("appendonly", "no", "set appendonly yes"),
        ("appendfsync", "everysec", "set appendfsync always"),
        ("appendfsync", "no", "set appendfsync always"),
    ],
)
def test_a_redis_that_may_forget_is_refused_with_the_setting_to_change(
    name: str, value: str, words: str, tmp_path: Path
) -> None:
    with up(Redis(tmp_path / "redis", f"--{name}", value)) as url:
        place = RedisPlace(url, "zflake:")
        untouched(place, "can lose what it has promised", words, "?unchecked=yes")
        assert place.everything() == {}
        works(f"{place.url}&unchecked=yes")
        untouched(place, words)
        place.client.config_set(name, words.rsplit(maxsplit=1)[-1])
        open_store(place.url).close()


def test_a_redis_that_does_not_tell_its_settings_is_refused(tmp_path: Path) -> None:
    with up(Redis(tmp_path / "redis", "--rename-command", "CONFIG", "")) as url:
        place = RedisPlace(url, "zflake:")
        untouched(place, "does not tell its settings", "appendfsync always", "?unchecked=yes")
        works(f"{place.url}&unchecked=yes")


@pytest.mark.parametrize("unchecked", ["", "&unchecked=yes"])
def test_a_replica_of_redis_is_refused(tmp_path: Path, unchecked: str) -> None:
    master, replica = Redis(tmp_path / "master"), Redis(tmp_path / "replica")
    with up(master), up(replica) as url:
        place = RedisPlace(url, "zflake:")
        place.client.replicaof("127.0.0.1", str(master.port))
        before = place.everything()
        says(place.url, "is a slave", "name the master", kind=StoreError)
        refused(f"{place.url}{unchecked}", f"127.0.0.1:{replica.port}", flags=["--new"], prelude=HASTY)
        assert place.everything() == before
        place.client.replicaof("NO", "ONE")
        works(place.url)


@pytest.mark.parametrize("setting", ["fsync", "full_page_writes"])
def test_a_postgresql_that_may_forget_is_refused_with_the_setting_to_change(
    setting: str, postgres: Postgres
) -> None:
    place = PostgresqlPlace(postgres.url_of_new_database())
    try:
        place.execute(f"ALTER SYSTEM SET {setting} = off")
        place.execute("SELECT pg_reload_conf()")
        untouched(place, "can lose what it has promised", f"turn {setting} on", "?unchecked=yes")
        works(f"{place.url}?unchecked=yes")
        untouched(place, f"turn {setting} on")
    finally:
        place.execute(f"ALTER SYSTEM RESET {setting}")
        place.execute("SELECT pg_reload_conf()")


def test_a_postgresql_that_commits_early_by_default_does_not_for_a_store(servers: Servers) -> None:
    place = PostgresqlPlace(servers.postgres.url_of_new_database())
    database = place.url.rpartition("/")[2]
    place.execute(f"ALTER DATABASE {database} SET synchronous_commit = off")
    works(place.url)
    # Only the URL itself could take that back, and may not.
    says(f"{place.url}?options=-csynchronous_commit%3Doff", "options", kind=ConfigError)


@pytest.mark.parametrize("setting", ["fsync", "maxmemory-policy"])
def test_a_store_that_may_forget_can_be_looked_at(setting: str, tmp_path: Path, postgres: Postgres) -> None:
    with contextlib.ExitStack() as stack:
        if setting == "fsync":
            url = postgres.url_of_new_database()
        else:
            url = stack.enter_context(up(Redis(tmp_path / "redis", "--maxmemory-policy", "allkeys-lru")))
        works(f"{url}?unchecked=yes")
        store = open_store(url, read_only=True)
        assert store.meta() is not None
        store.close()


def test_an_etcd_that_loses_commits_is_refused(tmp_path: Path) -> None:
    with up(Etcd(tmp_path / "etcd", program=find_etcd(*LOSING))) as url:
        place = EtcdPlace(url.removesuffix("/zflake"), "/zflake")
        untouched(place, "loses commits", "take another version", "?unchecked=yes")
        works(f"{url}?unchecked=yes")
        untouched(place, "loses commits")
        store = open_store(url, read_only=True)
        assert store.meta() is not None
        store.close()


@pytest.mark.parametrize("unchecked", brief(["", "?unchecked=yes"], ["?unchecked=yes"]))
def test_an_etcd_that_is_full_is_refused(tmp_path: Path, unchecked: str) -> None:
    flags = ("--quota-backend-bytes", str(1 << 20))
    if not unchecked:
        Etcd.need_durable()
    with up(Etcd(tmp_path / "etcd", flags=flags)) as url:
        place = EtcdPlace(url.removesuffix("/zflake"), "/zflake", unchecked)
        for number in range(64):
            try:
                place.put(f"/other/{number}", "x" * 100_000)
            except requests.HTTPError:
                break
        untouched(place, "NOSPACE", "disarm")
