"""The promises that a cluster keeps when its parts are stopped for longer than a window, or restarted again and again."""

from __future__ import annotations

import signal
import time
from typing import Final

import numpy as np

from tests.jobs.checker import check_runs, read_runs, runs_of
from tests.jobs.load import Load, moments
from tests.jobs.takers import Orders, Taker
from tests.system.conftest import start_cluster
from tests.system.daemons import Daemons, names_of, status_of, until

RESTARTS: Final = 16


def test_a_worker_stopped_past_its_window_finds_its_machine_id_taken_and_takes_another_lease(
    daemons: Daemons,
) -> None:
    cluster = start_cluster(daemons, "--machines", "0-0", workers=1, ttl="1s")
    (stopped,) = cluster.workers
    with Load([stopped]) as load:
        load.go_on()
        stopped.signal(signal.SIGSTOP)
        heir = daemons.worker(to=cluster.delegator)
        until(lambda: names_of(cluster.delegator) == [heir.name], "the other to take the machine ID over")
        load.follow(heir).go_on()
        stopped.signal(signal.SIGCONT)
        until(lambda: stopped.said("lost machine 0"), "it to find its lease lost")
        load.go_on("though the other is back", only=[heir])
        assert heir.terminate() == 0
        load.go_on("by a fresh lease", only=[stopped])
    verdict = load.check([cluster.delegator])
    assert verdict.violations == []
    assert list(verdict.by_machine) == [0]
    assert load.lost() == [stopped.name]


def test_a_delegator_and_a_client_stopped_past_a_window_change_nothing_but_the_wait(daemons: Daemons) -> None:
    cluster = start_cluster(daemons, workers=2, ttl="1s")
    out = daemons.folder / "client.runs"
    orders = Orders([cluster.delegator.address], "auto", 1, str(out))
    client = Taker.start(daemons, "client", orders).process
    until(lambda: out.exists() and out.stat().st_size, "the client's first run")
    with Load(cluster.workers) as load:
        load.go_on()
        client.signal(signal.SIGSTOP)
        cluster.delegator.signal(signal.SIGSTOP)
        time.sleep(2.5)
        cluster.delegator.signal(signal.SIGCONT)
        back = time.monotonic()
        load.go_on("after the delegator was stopped")
        assert time.monotonic() - back < 2.0
        before = out.stat().st_size
        client.signal(signal.SIGCONT)
        until(lambda: out.stat().st_size > before + 160, "runs of the client's after it was stopped")
        load.go_on()
    client.kill()
    assert load.takers[cluster.workers[0].name].refused["LeaseExpired"], "the windows ran out meanwhile"
    runs = [runs_of(load.runs), read_runs([out])]
    verdict = check_runs([cluster.delegator.log_path], np.concatenate(runs))
    assert verdict.violations == []
    assert load.check([cluster.delegator]).violations == []
    assert load.lost() == []


def test_restarts_in_a_row_do_not_carry_the_timeline_ahead(daemons: Daemons) -> None:
    ttl_s = 20
    cluster = start_cluster(daemons, workers=1, ttl=f"{ttl_s}s")
    delegator = cluster.delegator
    delegators = [delegator]
    with Load(cluster.workers) as load:
        load.go_on()
        for k in range(RESTARTS):
            delegator.signal(signal.SIGKILL if k % 2 else signal.SIGTERM)
            delegator.wait()
            delegator = daemons.delegator(
                name=f"again-{k}", bind=delegators[0].address, new=False, ttl=f"{ttl_s}s"
            )
            delegators.append(delegator)
            until(delegator.find_address, "it to serve again")
        # The workers, and a new one, follow the last one's timeline.
        fresh = daemons.worker(to=delegator)
        until(lambda: fresh.name in names_of(delegator), "a new worker to hold a machine ID")
        load.follow(fresh)
        load.go_on("after all restarts")
        ahead_s = max(moments(load)) - time.time()
        assert abs(ahead_s) < 0.5
        assert abs(status_of(delegator.address)["lead_ms"]) < 500
    assert load.check(delegators).violations == []
    assert load.lost() == []
