"""The rules, and nothing but rules: time, randomness and I/O are handed in as arguments.

layout.py    bit fields of an ID: compose, decompose, presets
lease.py     the words of the lease protocol: requests, records, answers
lessor.py    how a delegator decides on a request, given a record
lessee.py    how a holder takes, renews, loses and gives back a lease
mint.py      how IDs come out of a lease's windows
ticks.py     the same without a lock, a tick at a time
loss.py      what shows that a store may have forgotten, and how long it rests then
timeline.py  the cluster's clock: how delegators carry it and holders follow it

The same code runs in the daemons and under test, with a clock and a network made of variables.
"""
