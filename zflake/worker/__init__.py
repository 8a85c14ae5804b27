"""The worker: the daemon that holds a machine ID and serves ID requests.

handler.py   answers requests; knows no socket
link.py      the link to a delegator: presence, and brokered requests
server.py    the process: sockets, poll loop, drain
"""
