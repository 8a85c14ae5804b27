"""What travels: messages, their bytes, and the frames and endpoints that carry them.

PROTOCOL.md   the protocol in full, enough to write a client in another language
codec.py      one MessagePack-RPC message <-> bytes
messages.py   methods, error codes, and the parameters and results of each
frames.py     the envelope around a message
endpoint.py   where sockets bind and connect
"""
