"""The worker: the daemon that holds a machine ID and serves ID requests.

handler.py  answers requests; knows no socket
link.py     the talk with one delegator: presence, and brokered requests; knows no socket
channel.py  the sockets that it answers at
server.py   the process: poll loop, drain
metrics.py  its figures, for Prometheus
"""
