"""Jobs: many IDs through a cluster of real processes, while its parts are killed, frozen and replaced.

job.py         a job: starts the parts, keeps the clients taking, notes the faults, waits
takers.py      its clients, each a process that writes down every run of IDs and every error
checker.py     whether all IDs are distinct, and inside the windows that delegators logged
cluster.py     one delegator and its SQLite file: the main job, and the cluster job in parts of any number
delegators.py  three delegators on one store; engines.py: the servers of that store, and what happens to them
outages.py     the times without a window, and what they excuse
kills.py       a delegator killed at one point after another; load.py: takers in threads
soak.py        `scripts/soak`
"""
