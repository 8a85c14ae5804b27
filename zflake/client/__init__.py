"""The client library: what applications call.

conversation.py   whom to ask, for what, and what to do about the answer; knows no socket
balancer.py       which endpoints there are, and how they fare
transport.py      sockets: a pool of REQs to each endpoint, threads, forks
sync.py           `Client`
"""
