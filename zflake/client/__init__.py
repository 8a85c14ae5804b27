"""The client library: what applications call.

conversation.py   whom to ask, for what, and what to do about the answer; knows no socket
transport.py      sockets: one DEALER to each endpoint and thread, a pool, forks
sync.py           `Client`
"""
