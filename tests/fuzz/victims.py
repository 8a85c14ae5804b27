"""Victims: a process of clients that are lied to, and say how each call ended.

    python -m tests.fuzz.victims KIND CONTROL

The clients of `client` and `generator` are threads, each at its own endpoint; `tool` forks a process for each call,
which runs `zflake` to its end as a shell would.  Each asks the fuzzer at CONTROL for orders, and answers with an
outcome: what was raised, and what is wrong with that, if anything.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
from typing import Any, Final

import zmq

import zflake

SLOTS: Final = {"client": 8, "generator": 16, "tool": 1}
"""Clients of each kind in one process."""
HANGS_S: Final = 15.0
"""Seconds beyond its own timeout after which a call hangs."""
TOOL_CODES: Final = (0, 1, 2)


def client(order: dict[str, Any]) -> Any:
    with zflake.Client(order["endpoint"], timeout=order["timeout"], route=order["route"]) as ids:
        for count in order["counts"]:
            if count == 0:
                ids.layout()
            elif count == 1:
                _check([ids.next_id()], 1)
            else:
                _check(ids.next_ids(count), count)


def generator(order: dict[str, Any]) -> Any:
    ids = zflake.LeasedGenerator(order["endpoint"], timeout=order["timeout"])
    try:
        for count in order["counts"]:
            _check(ids.next_ids(max(1, count)), max(1, count))
        assert ids.layout is not None
    finally:
        ids.close()


def _check(ids: list[int], count: int) -> None:
    if len(ids) != count or not all(type(each) is int and 0 <= each < 1 << 64 for each in ids):
        raise AssertionError(f"asked for {count} IDs, got {len(ids)}: {ids[:3]}")


def outcome(order: dict[str, Any]) -> dict[str, Any]:
    """Do what is ordered."""
    began, wrong = time.monotonic(), None
    try:
        {"client": client, "generator": generator}[order["kind"]](order)
        raised = "nothing"
    except BaseException as error:  # noqa: BLE001  (whatever it is)
        raised = type(error).__name__
        # A generator's own thread may have failed: its error is the cause of the one that the caller sees.
        cause = error.__cause__ if order["kind"] == "generator" else None
        if not isinstance(error, zflake.ZflakeError) or not isinstance(cause, zflake.ZflakeError | None):
            wrong = f"raised {error!r}, from {cause!r}: {''.join(traceback.format_exception(error))}"
        elif not str(error).isprintable():
            wrong = f"its message can't be printed: {error!r}"
    took_s = time.monotonic() - began
    if took_s > len(order["counts"]) * order["timeout"] + HANGS_S:
        wrong = f"took {took_s:.1f} s, with a timeout of {order['timeout']} s"
    return {"raised": raised, "wrong": wrong}


def ask_for_orders(kind: str, control: str) -> None:
    """Ask, do, say, for ever."""
    socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
    socket.connect(control)
    socket.send_json({"kind": kind})
    while True:
        socket.send_json(outcome(json.loads(socket.recv())))


def tool(control: str) -> list[str]:
    """The same for `zflake`; in each forked process it returns the command line to run."""
    context = zmq.Context[zmq.Socket[bytes]]()
    socket = context.socket(zmq.DEALER)
    socket.connect(control)
    socket.send_json({"kind": "tool"})
    while True:
        order = json.loads(socket.recv())
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            pid = os.fork()
            if pid == 0:
                os.dup2(out.fileno(), 1)
                os.dup2(err.fileno(), 2)
                return list(order["argv"])
            code = _wait(pid, order["timeout"] + HANGS_S)
            texts = []
            for file in (out, err):
                file.seek(0)
                texts.append(file.read().decode())
        socket.send_json({"raised": f"code {code}", "wrong": complaint(code, *texts)})


def _wait(pid: int, within_s: float) -> int | None:
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        ended, state = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(state)
        time.sleep(0.002)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return None


def complaint(code: int | None, out: str, err: str) -> str | None:
    """What is wrong with how a command ended."""
    lines = err.split("\n")[:-1]
    if code not in TOOL_CODES:
        return f"ended with {code}: {err[-1_000:]}"
    if not all(line.isprintable() for line in (*out.split("\n"), *lines)):
        return f"printed what can't be printed: {out!r} {err!r}"
    if len(lines) > 1 or not all(line.startswith("zflake: ") for line in lines):
        return f"said more than one line: {err[-2_000:]}"
    if (code == 0 and lines) or (code and not lines and not out):
        return f"ended with {code}, saying {err!r}"
    if lines and out:
        return f"printed half of an answer, then {err!r}: {out[:500]!r}"
    return None


def main() -> None:
    kind, control = sys.argv[1:]
    if kind == "tool":
        # Loaded before the forks.
        from zflake.cli import status, tool as zflake_, trace  # noqa: F401, PLC0415, I001

        sys.argv = ["zflake", *tool(control)]
        zflake_.main()
        return
    threads = [threading.Thread(target=ask_for_orders, args=(kind, control)) for _ in range(SLOTS[kind])]
    for thread in threads:
        thread.start()


if __name__ == "__main__":
    main()
