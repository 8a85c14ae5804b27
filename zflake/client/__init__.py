"""The client library: what applications call.

conversation.py   which endpoint to ask, for what, and what to do about the answer; no sockets
balancer.py       which endpoints there are, how they fare, and who reads the directory
transport.py      sockets: a pool of REQs to each endpoint, for threads and across forks
sync.py           `Client`, the blocking driver
"""
