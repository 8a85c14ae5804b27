"""The Flask extension: apps and their config, requests in threads and forks, errors as HTTP."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, TypeAlias

import pytest
from flask import Flask

from tests.conftest import serving, until
from tests.embedded.conftest import ANY, delegator, in_child
from zflake import Client, Closed, ConfigError, LeasedGenerator, layouts
from zflake.errors import NoFreeMachine, Timeout
from zflake.web import ENVIRONMENT, ZFlake, create_app, refuse
from zflake.wire.endpoint import parse_endpoint
from zflake.worker.server import Worker, WorkerConfig

SNOWCLOUD: Final = layouts["snowcloud"]
Apps: TypeAlias = Callable[..., Flask]
NOBODY: Final = "tcp://127.0.0.1:1"


@pytest.fixture(scope="module")
def shared() -> Iterator[str]:
    with delegator() as serves:
        yield serves.address


@pytest.fixture
def served() -> Iterator[Apps]:
    """Takes an app that a test makes, and gives its lease back at the end; without one, makes one of a config."""
    apps: list[Flask] = []

    def take(app: Flask | None = None, **config: Any) -> Flask:
        apps.append(app or Flask("app"))
        apps[-1].config.update(config)
        return apps[-1]

    yield take
    for app in apps:
        if "zflake" in app.extensions:
            app.extensions["zflake"].close()


def test_an_app_gives_ids_in_and_outside_of_requests(shared: str, served: Apps) -> None:
    app = served(ZFLAKE_ENDPOINTS=shared)
    ids = ZFlake(app)

    @app.get("/")
    def one() -> str:
        return str(ids.next_id())

    got = [ids.next_id(), *ids.next_ids(100)]
    got += [int(app.test_client().get("/").text) for _ in range(100)]
    assert got == sorted(set(got))
    assert len({SNOWCLOUD.decompose(id_).machine for id_ in got}) == 1


def test_one_extension_serves_several_apps_each_from_its_own_lease(shared: str, served: Apps) -> None:
    ids = ZFlake()
    got = []
    for app in (served(ZFLAKE_ENDPOINTS=[shared]) for _ in range(3)):
        ids.init_app(app)
        with app.app_context():
            got += ids.next_ids(10)
            assert isinstance(ids.source, LeasedGenerator)
    assert len(set(got)) == 30
    assert len({SNOWCLOUD.decompose(id_).machine for id_ in got}) == 3


def test_the_threads_of_an_app_share_one_lease(shared: str, served: Apps) -> None:
    client = served(create_app(shared)).test_client
    with ThreadPoolExecutor(8) as pool:
        got = [int(text) for text in pool.map(lambda _: client().get("/").text, range(400))]
    assert len(set(got)) == 400
    assert len({SNOWCLOUD.decompose(id_).machine for id_ in got}) == 1


def test_a_forked_server_process_takes_a_lease_of_its_own(shared: str, served: Apps) -> None:
    client = served(create_app(shared)).test_client()
    got = [int(client.get("/").text)]
    for _ in range(3):
        got += in_child(os.fork, lambda: [int(client.get("/").text) for _ in range(10)])
    assert len(set(got)) == 31
    assert len({SNOWCLOUD.decompose(id_).machine for id_ in got}) == 4


def test_the_mode_client_has_workers_mint(shared: str, served: Apps) -> None:
    with serving(lambda waker: Worker(WorkerConfig([parse_endpoint(shared)], ANY), waker)) as worker:
        until(lambda: worker.machine is not None)
        config = {"ZFLAKE_MODE": "client", "ZFLAKE_TIMEOUT": "9", "ZFLAKE_ROUTE": "direct"}
        app = served(ZFLAKE_ENDPOINTS=shared, **config)
        ids = ZFlake(app)
        assert isinstance(ids.source, Client)
        assert SNOWCLOUD.decompose(ids.next_id()).machine == worker.machine


@pytest.mark.parametrize("endpoints", ["{0},{1}", "{0} {1}", " {0} ,\n {1} "])
def test_endpoints_may_come_in_one_text(shared: str, served: Apps, endpoints: str) -> None:
    app = served(ZFLAKE_ENDPOINTS=endpoints.format(NOBODY, shared), ZFLAKE_TIMEOUT=20)
    assert ZFlake(app).next_id() > 0


@pytest.mark.parametrize(
    "config",
    [
        {"ZFLAKE_ENDPOINTS": "localhost"},
        {"ZFLAKE_ENDPOINTS": " , "},
        {"ZFLAKE_ENDPOINTS": []},
        {"ZFLAKE_MODE": "both"},
        {"ZFLAKE_TIMEOUT": "soon"},
        {"ZFLAKE_TIMEOUT": 0},
        {"ZFLAKE_IDLE": None},
        {"ZFLAKE_MODE": "client", "ZFLAKE_ROUTE": "north"},
    ],
    ids=str,
)
def test_a_wrong_config_is_refused_at_the_start(served: Apps, config: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        ZFlake(served(**config))


def test_an_app_has_one_source(shared: str, served: Apps) -> None:
    app = served(ZFLAKE_ENDPOINTS=shared)
    ZFlake(app)
    with pytest.raises(ConfigError, match="once"):
        ZFlake(app)


def test_without_an_app_it_says_what_to_do(served: Apps) -> None:
    with pytest.raises(RuntimeError, match="app_context"):
        ZFlake().next_id()
    with served().app_context(), pytest.raises(RuntimeError, match="init_app"):
        ZFlake().next_id()


# --- the example server ---


def test_the_example_gives_an_id_as_text_that_nobody_may_cache(shared: str, served: Apps) -> None:
    app = served(create_app([shared]))
    answer = app.test_client().get("/")
    assert (answer.status_code, answer.mimetype) == (200, "text/plain")
    assert answer.headers["Cache-Control"] == "no-store"
    assert SNOWCLOUD.decompose(int(answer.text)).machine == app.extensions["zflake"].machine


def test_the_example_takes_its_settings_from_the_environment(
    shared: str, served: Apps, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("ZFLAKE_ENDPOINTS", shared)
    monkeypatch.setenv("ZFLAKE_PORT", "tcp://10.0.0.1:80")  # what Kubernetes sets for a service
    monkeypatch.setenv("ZFLAKE_IDLE", "9")
    app = served(create_app())
    assert app.config["ZFLAKE_IDLE"] == "9"
    assert "ZFLAKE_PORT" not in app.config
    assert app.test_client().get("/").status_code == 200


def test_without_an_id_it_answers_503_and_when_to_come_back(
    served: Apps, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ZFLAKE_TIMEOUT", "0.1")
    answer = served(create_app(NOBODY)).test_client().get("/")
    assert (answer.status_code, answer.mimetype) == (503, "text/plain")
    assert int(answer.headers["Retry-After"]) >= 1
    assert NOBODY in answer.text


@pytest.mark.parametrize(
    ("error", "seconds"),
    [
        (Timeout("x"), "1"),
        (NoFreeMachine("x", retry_after=20.2), "21"),
        (Timeout("x", retry_after=0.05), "1"),
        (Closed("x"), "1"),
    ],
)
def test_retry_after_is_in_whole_seconds(error: Any, seconds: str) -> None:
    assert refuse(error).headers["Retry-After"] == seconds


def test_without_flask_it_says_how_to_install_it() -> None:
    code = "import sys; sys.modules['flask'] = None; import zflake.web"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "pip install 'zflake[flask]'" in done.stderr


@pytest.mark.parametrize(
    "argv", [["--bind", "nowhere"], ["--bind", "127.0.0.1:99999"], ["--to", "localhost"]], ids=str
)
def test_the_server_refuses_what_it_can_not_do(argv: list[str]) -> None:
    command = [sys.executable, "-m", "zflake.web", *argv]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    assert done.returncode in (1, 2)
    assert "Traceback" not in done.stderr
