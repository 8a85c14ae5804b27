"""The wire: messages, their bytes, and the frames and endpoints that carry them.

PROTOCOL.md   the protocol in full, enough to write a client in another language
codec.py      one MessagePack-RPC message <-> bytes
methods.py    the names of methods and errors
dispatch.py   the table of methods, and how both daemons read a request
ids.py        ids.next
leases.py     lease.* and cluster.trace
cluster.py    hello, worker.* and the directory
fields.py     single values in them
frames.py     the envelope around a message
endpoint.py   where sockets bind and connect
sockets.py    sockets with the options that the protocol needs
"""
