"""News: nobody misses them, nobody waits longer than he wants."""

from __future__ import annotations

import threading
import time

from tests.conftest import WAIT_S, until
from zflake.embedded.waiting import News


def test_news_that_came_since_the_last_look_are_not_waited_for() -> None:
    news = News()
    seen = news.count
    news.spread()
    start = time.monotonic()
    news.wait(seen, WAIT_S)
    assert time.monotonic() - start < 1


def test_a_wait_ends_when_its_time_is_over() -> None:
    news = News()
    start = time.monotonic()
    news.wait(news.count, 0.02)
    news.wait(news.count, 0)
    news.wait(news.count, -1)
    assert 0.015 < time.monotonic() - start < 1
    assert news.wanted
    news.spread()
    assert not news.wanted


def test_all_who_wait_hear_of_it_those_who_gave_up_in_between_are_no_hindrance() -> None:
    news = News()
    news.wait(news.count, 0.001)
    threads = [threading.Thread(target=news.wait, args=(news.count, WAIT_S)) for _ in range(8)]
    for thread in threads:
        thread.start()
    until(lambda: len(news._waiting) == 9)
    news.spread()
    start = time.monotonic()
    for thread in threads:
        thread.join(WAIT_S)
    assert time.monotonic() - start < 1
