"""What every holder of a machine ID shares: its clock, the keeping of its lease, and minting without a worker.

clock.py      the timeline as this process sees it
keeper.py     a leased machine ID: the tenant's conversation with the delegators
static.py     a machine ID that somebody assigned: no delegator, the wall clock

generator.py  IDs minted in this very process, for threads, signal handlers and forks
ticks.py      the ticks that these share, each begun once
session.py    one lease of a generator's, kept by a thread in the background
fork.py       how a generator knows that it is still in its own process
waiting.py    waiting for another thread's news
"""
