"""The fuzzer: what a hostile peer may send, at real daemons, clients and tools, for as long as one likes.

values.py      values, messages and frames, drawn from the protocol and then spoilt
site.py        the processes under fire, the honest ones beside them, and the sockets to them
strangers.py   peers of daemons: requests, leases, forged answers, frames, bytes
liars.py       servers of workers and clients that lie
victims.py     the clients, generators and tools that are lied to, in processes of their own
fuzz.py        the run: an episode at a time, what must hold meanwhile and after it
mutants.py     guards that are taken out of the processes, to see that the fuzzer misses them
"""
