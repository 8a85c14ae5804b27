"""IDs minted in an application's own process, for threads, signal handlers and forks.

generator.py  `LeasedGenerator` and `StaticGenerator`
session.py    one lease of a generator's, kept by a thread in the background
fork.py       how a generator knows that it is still in its own process
waiting.py    waiting for another thread's news
"""
