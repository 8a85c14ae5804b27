"""The delegator: the daemon that leases machine IDs and knows the workers.

service.py    answers requests; knows no socket
broker.py     takes ID requests to workers and the answers back; knows no socket
directory.py  who holds a lease, and which holders are registered to serve
report.py     what a delegator says of itself: hello, the directory, status
executor.py   has lease requests settled, in a thread of its own
committer.py  settles them against the store
clock.py      the timeline with this machine's clocks: how it begins, how it is followed
start.py      a start: the store's settings against the command line's
moves.py      a store is copied, restored or set back in time, while no delegator uses it
server.py     the process: one ROUTER, poll loop, drain
metrics.py    its figures, for Prometheus
"""
