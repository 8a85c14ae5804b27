"""The worker: the daemon that holds a machine ID and serves ID requests.

handler.py   answers requests; knows no socket
server.py    the process: sockets, poll loop, drain
"""
