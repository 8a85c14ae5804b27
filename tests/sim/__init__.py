"""The protocol put to the test in virtual time: whole clusters, every order of events, and missing guards.

histories   a seed draws a cluster and its faults; one thread, virtual clocks, a virtual network
    fault_plan.py   what a seed draws
    world.py        time, hosts' clocks, processes, the network
    disk.py         the durable store, and what goes wrong on the way to it
    delegator.py    worker.py, client.py: the real rules, in a thin mirror of the real loops
    cluster.py      one history: faults first (safety), then none (liveness)
    checker.py      what must hold, in books of its own
    soak.py         histories by the thousand; figures.py: what they came to

explore.py          every order of events in a small scope
mutants.py          guards taken out, and what notices: MUTANTS.md

    scripts/soak sim --histories 1000000 --state DIR    begins in DIR, or goes on there
    scripts/soak sim --seed N --trace                   one history again, with all that happens
    scripts/soak mutants                                writes MUTANTS.md anew
"""
