"""The delegator: the daemon that leases machine IDs and knows the workers.

broker.py      takes ID requests to workers and the answers back; knows no socket
desk.py        settles lease requests against the store, in a thread of its own
directory.py   who holds a lease, and which of them are there to serve
server.py      the process: one ROUTER, poll loop, drain
setup.py       opens the store and settles what it says about layout, ttl and machines
"""
