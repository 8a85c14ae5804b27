"""What no delegator begins on: one line says why and what to do, no password is in it, and nothing is written."""

from __future__ import annotations

import contextlib
import itertools
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

import pytest
import requests

from tests.conftest import brief
from tests.places import PLACES, SERVED, EtcdPlace, Place, PostgresqlPlace, RedisPlace, etcd_host
from tests.servers import Etcd, Postgres, Redis, Servers, find_etcd, not_tested, up
from tests.stores.made import META, leased, made, token, write
from tests.system.daemons import tool
from zflake.core.lease import OLDEST, SCHEMA, Mark, Meta, Record, Swap
from zflake.delegator.moves import meta_of
from zflake.errors import ConfigError, StoreError, ZflakeError
from zflake.stores import open_store
from zflake.stores.contract import Contents
from zflake.stores.etcd import LOSES_COMMITS

SECRET: Final = "hush4711"
HARD: Final = f"{SECRET}@:/?#%41 é"
"""A password that means something in a URL."""
QUOTED: Final = quote(HARD, safe="")
LATE: Final = 1 << 40
HASTY: Final = "import zflake.delegator.clock as clock; clock.LISTEN_S = 0.3"
"""Has a delegator not wait for others to show themselves for as long as it would."""


def refused(url: str, *words: str, flags: Sequence[str] = (), code: int = 1, prelude: str = "") -> str:
    """What a delegator says that ends at once on that store: one line, with these words.

    The prelude is Python that goes before it.
    """
    program = f"{prelude}\nfrom zflake.cli.delegator import main\nmain()"
    command = [sys.executable, "-c", program, "--store", url, "--bind", "tcp://127.0.0.1:*", *flags]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=40)
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("zflake-delegator: ")
    for word in words:
        assert word in line
    assert SECRET not in line
    assert done.returncode == code, line
    return line


def says(url: str, *words: str, kind: type[ZflakeError] = ZflakeError) -> str:
    """The same without a process: what is raised when the store is opened, and its meta read."""
    with pytest.raises(kind) as caught, closing(open_store(url)) as store:
        store.meta()
    text = str(caught.value)
    assert len(text.splitlines()) == 1
    for word in words:
        assert word in text
    assert SECRET not in text
    return text


def works(url: str) -> None:
    """A store at that URL takes a meta and a commit, and gives them back to the next one that opens it."""
    with closing(made(open_store(url))) as store:
        assert write(store, leased(1, LATE)) == [True]
    with closing(open_store(url)) as again:
        assert again.by_token(token(1)) == leased(1, LATE)
        assert SECRET not in again.url


def can_be_looked_at(url: str) -> bool:
    with closing(open_store(url, read_only=True)) as store:
        return store.meta() is not None


def fill(place: Place, meta: Meta = META) -> None:
    """Make a store there, with two leases and a mark."""
    marks = [Mark("127.0.0.1:7410", time.time_ns() // 1000)]
    contents = Contents([leased(1, LATE), leased(2, LATE)], marks=marks)
    made(open_store(place.url), meta, contents).close()


@pytest.fixture(params=brief(PLACES, ["sqlite", "redis"]))
def place(request: pytest.FixtureRequest, tmp_path: Path, servers: Servers) -> Place:
    return PLACES[request.param](tmp_path, servers)


@pytest.fixture(scope="module")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Postgres]:
    """A PostgreSQL that asks the role `guarded` for a password."""
    server = Postgres(tmp_path_factory.mktemp("guarded"))
    access = server.data / "pg_hba.conf"
    access.write_text(f"host all guarded 127.0.0.1/32 scram-sha-256\n{access.read_text()}")
    with up(server):
        place = PostgresqlPlace(server.url)
        place.execute(f"CREATE ROLE guarded LOGIN PASSWORD '{HARD}'")
        place.execute("CREATE DATABASE guarded OWNER guarded")
        yield server


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
    with up(Redis(tmp_path / "guarded")) as server:
        RedisPlace(server.url, "").client.config_set("requirepass", HARD)
        yield server


@pytest.fixture
def guarded_etcd(tmp_path: Path) -> Iterator[Etcd]:
    """An etcd that wants the password `HARD` of root."""
    with up(Etcd(tmp_path / "guarded")) as server:
        place = EtcdPlace(server.url, "")
        place.ask("/auth/user/add", name="root", password=HARD)
        place.ask("/auth/role/add", name="root")
        place.ask("/auth/user/grant", user="root", role="root")
        place.ask("/auth/enable")
        yield server


WRONG: Final = f"wrong-{SECRET}"


def test_redis_takes_its_password_and_no_other(guarded_redis: Redis) -> None:
    where = f"127.0.0.1:{guarded_redis.port}/0"
    refused(f"redis://:{WRONG}@{where}", f"redis://{where} refuses the password")
    refused(f"redis://{where}", f"redis://{where}", "password")
    says(f"redis://nobody:{QUOTED}@{where}", "refuses the password", kind=StoreError)
    works(f"redis://:{QUOTED}@{where}")
    works(f"redis://default:{QUOTED}@{where}?prefix=named:")


def test_etcd_takes_its_password_and_no_other(guarded_etcd: Etcd) -> None:
    where = f"127.0.0.1:{guarded_etcd.port}/zflake"
    refused(f"etcd://root:{WRONG}@{where}", f"etcd://{where} refuses the password of root")
    refused(f"etcd://{where}?unchecked=yes", f"etcd://{where}", "password")
    says(f"etcd://nobody:{QUOTED}@{where}", "refuses the password", kind=StoreError)
    works(f"etcd://root:{QUOTED}@{where}?unchecked=yes")


def test_etcd_is_shown_the_password_again_when_it_forgets_who_is_there(guarded_etcd: Etcd) -> None:
    where = f"127.0.0.1:{guarded_etcd.port}/zflake?unchecked=yes"
    with closing(made(open_store(f"etcd://root:{QUOTED}@{where}"))) as store:
        guarded_etcd.kill()
        guarded_etcd.start()  # its tokens are gone
        assert store.meta() is not None


def test_postgresql_takes_its_password_and_no_other(postgres: Postgres) -> None:
    where = f"127.0.0.1:{postgres.port}/guarded"
    refused(
        f"postgresql://guarded:{WRONG}@{where}", f"postgresql://{where}", "password authentication failed"
    )
    refused(f"postgresql://guarded@{where}", f"postgresql://{where}", "password")
    works(f"postgresql://guarded:{QUOTED}@{where}")


def test_a_postgresql_that_lets_nobody_make_tables_says_so(postgres: Postgres) -> None:
    PostgresqlPlace(postgres.url).execute("CREATE DATABASE closed")
    url = f"postgresql://guarded:{QUOTED}@127.0.0.1:{postgres.port}/closed"
    says(url, "permission denied", kind=StoreError)


def test_a_postgresql_without_that_database_says_so(servers: Servers) -> None:
    where = f"zflake@127.0.0.1:{servers.postgres.port}"
    refused(f"postgresql://{where}/none", 'database "none" does not exist')
    # Without a name it would be the user's; nobody means that.
    says(f"postgresql://{where}/", "/database", kind=ConfigError)
    says(f"postgresql://{where}", "/database", kind=ConfigError)


def test_no_password_is_told_by_the_tool(guarded_redis: Redis, tmp_path: Path) -> None:
    url = f"redis://:{QUOTED}@127.0.0.1:{guarded_redis.port}/0"
    file = f"sqlite:///{tmp_path}/store.db"
    for argv in (["info", url], ["rewind", url], ["copy", url, file], ["restore", url, file]):
        done = tool("store", *argv)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
        assert "holds no cluster" in done.stderr
        assert SECRET not in done.stderr
    works(url)
    for argv in (["info", url], ["restore", url, file]):
        done = tool("store", *argv)
        assert done.returncode == 0
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
    says(place.url, place.shown, kind=StoreError)
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


def in_etcd(key: str, value: str | bytes) -> Callable[[Any], object]:
    return lambda place: place.put(f"{place.prefix}/{key}", value)


def in_redis(command: str, key: str, *values: Any) -> Callable[[Any], object]:
    return lambda place: place.client.execute_command(command, place.prefix + key, *values)


def in_postgresql(columns: str, *tables: str) -> Callable[[Any], object]:
    creation = [f"CREATE TABLE zflake.{table} ({columns})" for table in tables]
    return lambda place: place.execute(";".join(["CREATE SCHEMA zflake", *creation]))


TABLES: Final = ("meta", "machine", "span", "mark")
FOREIGN: Final[dict[tuple[str, str], Callable[[Any], object]]] = {
    ("etcd", "bytes"): in_etcd("meta", b"\xff\xfe"),
    ("etcd", "bytes-for-a-key"): in_etcd("machine/\ud800x", "x"),
    ("etcd", "machines-without-meta"): in_etcd(f"machine/{1:020}", "x"),
    ("etcd", "an-empty-value"): in_etcd("meta", ""),
    ("etcd", "no-zflake"): in_etcd("meta", '{"version": 1}'),
    ("redis", "meta-of-another-type"): in_redis("RPUSH", "meta", "x"),
    ("redis", "a-hash-without-the-text"): in_redis("HSET", "meta", "version", "1"),
    ("redis", "bytes"): in_redis("HSET", "meta", "text", b"\xff\xfe"),
    ("redis", "machines-without-meta"): in_redis("HSET", "machines", "1", "x"),
    ("redis", "tokens-of-another-type"): in_redis("SET", "tokens", "x"),
    ("redis", "marks-of-another-type"): in_redis("SET", "marks", "x"),
    ("postgresql", "other-tables"): in_postgresql("number int", "orders"),
    ("postgresql", "tables-of-the-same-names"): in_postgresql("number int", *TABLES),
    ("postgresql", "almost-the-same-columns"): in_postgresql("store_id text", *TABLES),
    ("postgresql", "some-of-the-tables"): in_postgresql("store_id text", "meta"),
}


@pytest.mark.parametrize(("engine", "kind"), FOREIGN)
def test_what_is_not_a_whole_store_is_left_as_it_was(
    engine: str, kind: str, servers: Servers, tmp_path: Path
) -> None:
    place = PLACES[engine](tmp_path, servers)
    FOREIGN[engine, kind](place)
    before = place.everything()
    says(place.url, "not zflake's", "nothing was changed", "name another", kind=StoreError)
    assert place.everything() == before


def test_a_store_has_room_beside_a_foreign_schema_in_postgresql(servers: Servers, tmp_path: Path) -> None:
    place = PLACES["postgresql"](tmp_path, servers)
    place.put_foreign()
    says(place.url, "name another ?schema=")
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
        made(store, replace(META, store_id=f"store-{number}"), Contents([leased(number)]))
    for number, store in enumerate(stores):
        assert meta_of(store).store_id == f"store-{number}"
        assert store.held(0) == [leased(number)]
        later = Swap(leased(number), Record(number, LATE, 2, token(99)), 1)
        assert store.swap([later], Mark(f"d{number}", 1)) == [True]
        assert [mark.delegator for mark in store.marks()] == [f"d{number}"]
        store.close()
    for number, url in enumerate(urls):
        with closing(open_store(url)) as again:
            assert [record.fence for record in again.contents().records] == [LATE]
            assert again.by_token(token(number)) is None


@pytest.mark.parametrize("engine", SERVED)
def test_one_store_has_several_names(engine: str, servers: Servers) -> None:
    if engine == "etcd":
        names = [f"{etcd_host(servers)}/slash{end}?unchecked=yes" for end in ("", "/")]
    elif engine == "redis":
        names = [servers.redis.url.replace("/0", "/7") + option for option in ("", "?prefix=zflake:")]
    else:
        database = servers.postgres.url_of_new_database()
        names = [database, f"{database}?schema=zflake"]
    made(open_store(names[0])).close()
    assert can_be_looked_at(names[1])


# --- servers that would lose what they promised ---


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
    with up(Redis(tmp_path / "redis", f"--{name}", value)) as server:
        place = RedisPlace(server.url, "zflake:")
        untouched(place, "can lose what it has promised", words, "?unchecked=yes")
        assert place.everything() == {}
        works(f"{place.url}&unchecked=yes")
        untouched(place, words)
        place.client.config_set(name, words.rsplit(maxsplit=1)[-1])
        open_store(place.url).close()


def test_a_redis_that_does_not_tell_its_settings_is_refused(tmp_path: Path) -> None:
    with up(Redis(tmp_path / "redis", "--rename-command", "CONFIG", "")) as server:
        place = RedisPlace(server.url, "zflake:")
        untouched(place, "does not tell its settings", "appendfsync always", "?unchecked=yes")
        works(f"{place.url}&unchecked=yes")


@pytest.mark.parametrize("unchecked", ["", "&unchecked=yes"])
def test_a_replica_of_redis_is_refused(tmp_path: Path, unchecked: str) -> None:
    master, replica = Redis(tmp_path / "master"), Redis(tmp_path / "replica")
    with up(master), up(replica):
        place = RedisPlace(replica.url, "zflake:")
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
            server = Redis(tmp_path / "redis", "--maxmemory-policy", "allkeys-lru")
            url = stack.enter_context(up(server)).url
        works(f"{url}?unchecked=yes")
        assert can_be_looked_at(url)


def test_an_etcd_that_loses_commits_is_refused(tmp_path: Path) -> None:
    with up(Etcd(tmp_path / "etcd", program=find_etcd(*LOSES_COMMITS))) as server:
        place = EtcdPlace(server.url, "")
        untouched(place, "loses commits", "take another version", "?unchecked=yes")
        works(f"{place.url}?unchecked=yes")
        untouched(place, "loses commits")
        assert can_be_looked_at(place.url)


@pytest.mark.parametrize("unchecked", brief(["", "?unchecked=yes"], ["?unchecked=yes"]))
def test_an_etcd_that_is_full_is_refused(tmp_path: Path, unchecked: str) -> None:
    flags = ("--quota-backend-bytes", str(1 << 20))
    if not unchecked:
        Etcd.need_durable()
    with up(Etcd(tmp_path / "etcd", flags=flags)) as server:
        place = EtcdPlace(server.url, "", unchecked)
        with contextlib.suppress(requests.HTTPError):
            for number in range(64):
                place.put(f"/other/{number}", "x" * 100_000)
        untouched(place, "NOSPACE", "disarm")
