"""The delegator: the daemon that leases machine IDs and knows the workers.

broker.py      takes ID requests to workers and the answers back; knows no socket
desk.py        settles lease requests against the store, in a thread of its own
directory.py   who holds a lease, and which of them are there to serve
report.py      what it says of itself: hello, the directory, status
server.py      the process: one ROUTER, poll loop, drain
setup.py       a start: what the store says against what the command line says
timepiece.py   the timeline with this machine's clocks
"""
