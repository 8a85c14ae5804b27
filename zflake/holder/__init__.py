"""The common part of all holders of a machine ID: workers, and generators in an application's process.

hold.py          a machine ID as its users see it
clock.py         the timeline as this process sees it
lease.py         a leased machine ID: the conversation with the delegators, without a socket
lease_client.py  the socket under that
static.py        an assigned machine ID: no delegator, the wall clock
"""
