"""What every holder of a machine ID shares: its clock, and the keeping of its lease.

clock.py    the timeline as this process sees it
keeper.py   a leased machine ID: the tenant's conversation with the delegators
static.py   a machine ID that somebody assigned: no delegator, the wall clock
"""
