"""The delegator: the daemon that leases machine IDs and knows the workers.

desk.py        settles lease requests against the store, in a thread of its own
directory.py   who holds a lease, and where they serve
server.py      the process: one ROUTER, poll loop, drain
setup.py       opens the store and settles what it says about layout, ttl and machines
"""
