"""Guards against hostile input, each taken out of the processes under fire, to see that the fuzzer misses it.

    python -m tests.fuzz.mutants NAME MODULE [the module's options]

runs a module without that guard.
"""

from __future__ import annotations

import runpy
import sys
import tempfile
from pathlib import Path
from typing import Final, NamedTuple

from tests.fuzz import fuzz
from tests.fuzz.fuzz import Result
from tests.sim.mutants import Change, apply
from tests.sim.mutants import Mutant as Changes


class Mutant(NamedTuple):
    """A guard that is missing, and the targets at which the fuzzer looks for it."""

    targets: tuple[str, ...]
    changes: tuple[Change, ...]
    words: str
    """What the violation says."""


DELEGATORS: Final = ("sqlite", "memory")
MESSAGES: Final = 30_000
"""Messages in which each must be caught."""


def _mutant(module: str, old: str, new: str, targets: tuple[str, ...], words: str) -> Mutant:
    return Mutant(targets, (Change(f"zflake.{module}", old, new),), words)


MUTANTS: Final = {
    "fields: a number of any type": _mutant(
        "wire.fields",
        "if type(value) is not int or not 0 <= value <= _MAX_NUMBER:",
        "if False:",
        DELEGATORS,
        "ended with",
    ),
    "fields: a text of any kind": _mutant(
        "wire.fields",
        "if type(value) is not str or len(value) > MAX_TEXT or not value.isprintable():",
        "if False:",
        DELEGATORS,
        "",
    ),
    "ids: a count of any kind": _mutant(
        "wire.ids",
        "if type(count) is not int or not 1 <= count <= MAX_COUNT:",
        "if False:",
        ("static",),
        "ended with",
    ),
    "dispatch: errors are not answered": _mutant(
        "wire.dispatch",
        "        except ProtocolError as error:\n            return self.refuse(msgid, Code.BAD_REQUEST, str(error))",
        "        except ZeroDivisionError:\n            return None",
        ("static",),
        "ended with",
    ),
    "dispatch: what can't be read is dropped": _mutant(
        "wire.dispatch", "if error.answerable:", "if False:", ("static",), "not answered"
    ),
    "codec: a request of any number of items": _mutant(
        "wire.codec", "max_array_len=MAX_REQUEST_ITEMS, max_map_len=MAX_REQUEST_ITEMS", "", ("static",), ""
    ),
    "codec: no bytes are too wrong to unpack": _mutant(
        "wire.codec",
        "_UNPACKABLE: Final = (ValueError, TypeError,",
        "_UNPACKABLE: Final = (UnicodeError,",
        ("static",),
        "ended with",
    ),
    "codec: a response of any form": _mutant(
        "wire.codec",
        "if type(message) is not list or len(message) != 4 or not _is_kind(message[0], RESPONSE):",
        "if False:",
        ("client", "link"),
        "",
    ),
    "codec: an error of any form": _mutant(
        "wire.codec",
        "case [str(code), str(message), retry_after_ms] if retry_after_ms is None or _is_number(\n            retry_after_ms\n        ):",
        "case [code, message, retry_after_ms]:",
        ("client", "link"),
        "",
    ),
    "codec: texts of servers as they are": _mutant(
        "wire.codec",
        "if text.isprintable():\n        return text",
        "if True:\n        return text",
        ("client", "tool"),
        "can't be printed",
    ),
    "sockets: what has too many frames is not skipped": _mutant(
        "wire.sockets",
        "                self._skipping = True\n                self._skip()\n",
        "",
        ("static",),
        "",
    ),
    "frames: any number of envelopes": _mutant(
        "wire.frames", "0 <= at <= MAX_ENVELOPE", "0 <= at", ("static",), "nobody is owed"
    ),
    "broker: an answer without the worker's token": Mutant(
        DELEGATORS,
        (
            Change(
                "zflake.delegator.broker",
                "job = peer.jobs.get(envelope[0]) if",
                "proof = next((k for k in peer.jobs if k[-16:] == envelope[0][-16:]), b'') if peer and envelope else b''\n"
                "        job = peer.jobs.get(proof) if",
            ),
            Change("zflake.delegator.broker", "del peer.jobs[envelope[0]]", "del peer.jobs[proof]"),
        ),
        "outside every granted window",
    ),
    "broker: an answer to another msgid": _mutant(
        "delegator.broker", " or response.msgid != job.msgid", "", DELEGATORS, "nobody is owed"
    ),
    "broker: an answer counts twice": _mutant(
        "delegator.broker", "        del peer.jobs[envelope[0]]\n", "", DELEGATORS, ""
    ),
    "service: a bundle that is none": _mutant(
        "delegator.service",
        "            except ProtocolError:\n                self.requests.dropped += 1\n                return",
        "            except ZeroDivisionError:\n                return",
        DELEGATORS,
        "ended with",
    ),
    "link: an answer that is none": _mutant(
        "worker.link",
        "with contextlib.suppress(ProtocolError):",
        "with contextlib.suppress():",
        ("link",),
        "ended with",
    ),
    "holder: an answer that is none": _mutant(
        "holder.lease",
        "except ProtocolError as error:\n            self.complain",
        "except ZeroDivisionError as error:\n            self.complain",
        ("link", "generator"),
        "",
    ),
    "clients: a run of any form": _mutant("wire.ids", "            and first >= 0\n", "", ("client",), ""),
    "clients: a hello of any form": _mutant(
        "wire.cluster",
        'result.get("service") if error is None and type(result) is dict else None',
        'result.get("service") if error is None else None',
        ("client",),
        "raised",
    ),
    "layouts: a map of any form": _mutant(
        "core.layout",
        'except (KeyError, TypeError, ValueError) as error:\n            raise LayoutError("not the map',
        'except ZeroDivisionError as error:\n            raise LayoutError("not the map',
        ("client", "generator"),
        "raised",
    ),
    "tool: an answer of any form": _mutant(
        "cli.ask",
        "except _UNREADABLE as error:",
        "except ZeroDivisionError as error:",
        ("tool",),
        "more than one line",
    ),
}


def catch(name: str, folder: Path, *, episode: int | None = None) -> Result:
    """Fuzz what is left without that guard."""
    via = ("tests.fuzz.mutants", name)
    return fuzz.run(folder, MESSAGES, seed=1, episode=episode, via=via, targets=MUTANTS[name].targets)


def noticed(name: str, result: Result) -> bool:
    """Whether the fuzzer saw that this guard is missing, and not something else."""
    return any(MUTANTS[name].words in violation for violation in result.violations)


def main() -> int:
    """Look for each guard without it; gives an exit code."""
    survivors = []
    for name in MUTANTS:
        with tempfile.TemporaryDirectory(prefix="zflake-fuzz-") as folder:
            result = catch(name, Path(folder))
        print(f"{name}: {result.messages:,} messages, {result.violations[:1]}"[:160], flush=True)  # noqa: T201
        if not noticed(name, result):
            survivors.append(name)
    print(f"{len(MUTANTS)} mutants, {len(survivors)} survive: {', '.join(survivors)}")  # noqa: T201
    return 1 if survivors else 0


if __name__ == "__main__":
    mutant, module = sys.argv[1:3]
    # What this module itself has loaded is loaded anew, with the change.
    for loaded in [each for each in sys.modules if each.partition(".")[0] in ("zflake", "tests")]:
        del sys.modules[loaded]
    apply(Changes(mutant, "", list(MUTANTS[mutant].changes)))
    del sys.argv[:2]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
