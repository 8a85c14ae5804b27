"""Real daemons, started by the public commands: as processes, on loopback, on ports that the system chose."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Self

from zflake import Client, LeasedGenerator
from zflake.cli.ask import ask
from zflake.cli.status import ask_status
from zflake.errors import ZflakeError
from zflake.wire.methods import Method

WAIT_S: Final = 30.0
"""How long anything may take that should be there soon; generous, for a machine with other work."""
POLL_S: Final = 0.01

ROOT: Final = Path(__file__).parents[2]


class TookTooLong(AssertionError):  # noqa: N818  (a failed expectation, to pytest as well)
    """Something did not come true in time."""


def until(condition: Callable[[], Any], what: str, *, within_s: float = WAIT_S) -> Any:
    """Poll `condition` until it gives something true, which is returned."""
    deadline = time.monotonic() + within_s
    while not (result := condition()):
        if time.monotonic() > deadline:
            raise TookTooLong(f"{what}: not within {within_s:g} s")
        time.sleep(POLL_S)
    return result


def environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """This process's environment without zflake's own variables, with zflake itself importable.

    Nor with the size of a terminal, which pytest-xdist sets for its workers.
    """
    foreign = ("ZFLAKE_", "COLUMNS", "LINES")
    own = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
    own["PYTHONPATH"] = os.pathsep.join(filter(None, [own.get("PYTHONPATH", ""), str(ROOT)]))
    return own | dict(extra or {})


def tool(
    *argv: str | Path,
    module: str = "zflake",
    folder: Path | None = None,
    env: Mapping[str, str] | None = None,
    within_s: float = WAIT_S,
) -> subprocess.CompletedProcess[str]:
    """Run `zflake`, or another command, to its end."""
    return subprocess.run(
        [sys.executable, "-m", module, *map(str, argv)],
        check=False,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        cwd=folder,
        env=environment(env),
        timeout=within_s,
    )


def printed(*argv: str | Path, env: Mapping[str, str] | None = None) -> str:
    """What `zflake` prints, which must end well and complain of nothing."""
    done = tool(*argv, env=env)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def complaint(*argv: str | Path, codes: Collection[int] = (1,), **how: Any) -> str:
    """The one line that a command says, which must fail with one of these codes and print nothing."""
    done = tool(*argv, **how)
    assert done.returncode in codes, done.stdout
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    return line


class Process:
    """A command under way; what it prints goes to files in `folder`."""

    def __init__(
        self, name: str, argv: Sequence[str], folder: Path, *, env: Mapping[str, str] | None = None
    ) -> None:
        self.name = name
        self.out_path = folder / f"{name}.out"
        self.log_path = folder / f"{name}.log"
        with self.out_path.open("ab") as out, self.log_path.open("ab") as log:
            self.popen = subprocess.Popen(
                argv, stdin=subprocess.DEVNULL, stdout=out, stderr=log, cwd=folder, env=environment(env)
            )

    @property
    def pid(self) -> int:
        return self.popen.pid

    @property
    def alive(self) -> bool:
        return self.popen.poll() is None

    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    def out(self) -> str:
        return self.out_path.read_text(errors="replace")

    def signal(self, number: signal.Signals) -> None:
        self.popen.send_signal(number)

    def wait(self, within_s: float = WAIT_S) -> int:
        """The exit code."""
        try:
            return self.popen.wait(within_s)
        except subprocess.TimeoutExpired:
            raise TookTooLong(
                f"{self.name} did not end within {within_s:g} s:\n{self.log()[-2000:]}"
            ) from None

    def terminate(self) -> int:
        """Ask it to drain, and wait for its end; the exit code."""
        self.signal(signal.SIGTERM)
        return self.wait()

    def kill(self) -> None:
        """End it, whatever it does, stopped or not."""
        if self.alive:
            self.popen.kill()
        self.popen.wait()


class Daemon(Process):
    """A daemon that logs JSON."""

    _address: str | None = None

    def events(self) -> list[dict[str, Any]]:
        """Its log so far; a last line that is cut off is left out."""
        return list(read_events(self.log_path))

    @property
    def address(self) -> str:
        """Where it serves, once it does."""
        if self._address is None:
            self._address = until(self.find_address, f"{self.name} serves")
        assert self._address is not None
        return self._address

    def said(self, words: str) -> int:
        """How many lines of its log have these words."""
        return sum(words in str(event.get("message")) for event in self.events())

    def leases(self, verb: str) -> list[list[Any]]:
        """The leases that a delegator has logged: `[verb, machine, gen, start, end]`."""
        return [event["lease"] for event in self.events() if event.get("lease", [""])[0] == verb]

    def find_address(self) -> str | None:
        """The address that it logged, None before; `AssertionError` if it has ended instead."""
        for event in self.events():
            if "address" in event:
                return str(event["address"])
        if not self.alive:
            raise AssertionError(f"{self.name} ended with {self.popen.returncode}:\n{self.log()[-2000:]}")
        return None


def read_events(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a JSON log; what is not JSON comes as a line of level `stray`."""
    with path.open("rb") as lines:
        for line in lines:
            try:
                yield json.loads(line)
            except ValueError:
                if line.endswith(b"\n"):
                    yield {"level": "stray", "message": line.decode(errors="replace").strip()}


class Daemons:
    """Starts daemons and other processes in a folder; ends them all, each by its pid, on leaving."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._started: list[Process] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def end(self) -> list[Process]:
        """End all that still run; gives all that were started."""
        for process in reversed(self._started):
            process.kill()
        return self._started

    def delegator(
        self,
        *flags: str,
        name: str = "",
        bind: str = "tcp://127.0.0.1:*",
        new: bool = True,
        ttl: str = "2s",
        env: Mapping[str, str] | None = None,
        via: Sequence[str] = (),
    ) -> Daemon:
        """A delegator on `store.db` of the folder; the flags come last, so they win."""
        argv = ["--bind", bind, "--store", f"sqlite:///{self.folder}/store.db", "--log-format", "json"]
        argv += ["--ttl", ttl, *(["--new"] if new else []), *flags]
        return self.daemon("delegator", argv, name, env=env, via=via)

    def worker(
        self,
        *flags: str,
        name: str = "",
        to: Daemon | str | None = None,
        env: Mapping[str, str] | None = None,
        via: Sequence[str] = (),
    ) -> Daemon:
        """A worker of that delegator's."""
        argv = ["--log-format", "json"]
        if to is not None:
            argv += ["--delegator", to if isinstance(to, str) else to.address]
        return self.daemon("worker", [*argv, *flags], name, env=env, via=via)

    def daemon(
        self,
        module: str,
        argv: Sequence[str],
        name: str = "",
        *,
        env: Mapping[str, str] | None = None,
        via: Sequence[str] = (),
    ) -> Daemon:
        """A daemon; `via` is a module that runs it, with what that is told, instead of the interpreter."""
        name = name or f"{module}-{len(self._started)}"
        if "--name" not in argv and module == "worker":
            argv = [*argv, "--name", name]
        command = [sys.executable, "-m", *via, f"zflake.cli.{module}", *argv]
        daemon = Daemon(name, command, self.folder, env=env)
        self._started.append(daemon)
        return daemon

    def up(self, *flags: str, port: int | None = None, env: Mapping[str, str] | None = None) -> Process:
        """`zflake up`; `port` stands in for its default port, which may be in use on this machine."""
        at_port = f"""
import zflake.wire.endpoint as endpoint
endpoint.DEFAULT_DELEGATOR = "tcp://127.0.0.1:{port}"
from zflake.cli.tool import main
main()
"""
        argv = ["-m", "zflake"] if port is None else ["-c", at_port]
        return self.process([sys.executable, *argv, "up", *flags], env=env)

    def process(
        self, argv: Sequence[str], name: str = "", *, env: Mapping[str, str] | None = None
    ) -> Process:
        """Any other command."""
        process = Process(name or f"process-{len(self._started)}", argv, self.folder, env=env)
        self._started.append(process)
        return process


def try_next(ids: Client | LeasedGenerator) -> int | None:
    """An ID; None if there is none to be had now."""
    try:
        return ids.next_id()
    except ZflakeError:
        return None


def children_of(pid: int) -> list[int]:
    children: list[int] = []
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            children += map(int, (task / "children").read_text().split())
    return children


def is_running(pid: int) -> bool:
    """Whether a process of that pid runs, zombies aside."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except OSError:
        return False


def resident_mb(pid: int) -> float:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def ready_at(delegator: Daemon) -> set[str]:
    """The names of the workers that get requests from the delegator now."""
    return {lease["name"] for lease in status_of(delegator.address).get("leases", ()) if lease["worker"]}


def status_of(endpoint: str) -> dict[str, Any]:
    """A daemon's account of itself; empty if it does not answer now."""
    try:
        return ask_status(endpoint, 1.0)
    except ZflakeError:
        return {}


def counts_of(endpoint: str) -> dict[str, Any]:
    """The same once it counts all that has happened: a delegator builds its account once a second."""
    began_us = ask(endpoint, Method.PING, (), WAIT_S)["now_us"]
    facts: dict[str, Any] = until(
        lambda: (facts := status_of(endpoint)) and facts["now_us"] >= began_us and facts,
        "an account of now",
    )
    return facts


def names_of(delegator: Daemon) -> list[str]:
    """The names of those who hold a lease now."""
    return [lease["name"] for lease in status_of(delegator.address).get("leases", ())]
