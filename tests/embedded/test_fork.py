"""Memory that a fork wipes, with Python's fork and with one that Python never hears of."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

import pytest

from tests.embedded.conftest import libc_fork
from zflake.embedded import fork
from zflake.embedded.fork import MINE, UNTIL, Page, PidPage, new_page


@pytest.mark.parametrize("fork", [os.fork, libc_fork], ids=["os.fork", "libc"])
@pytest.mark.parametrize("make", [new_page, PidPage])
def test_a_child_finds_zeros_and_the_parent_what_it_wrote(
    make: Callable[[], Page], fork: Callable[[], int]
) -> None:
    page = make()
    page[UNTIL] = 1 << 62
    page[MINE] = 1
    pid = fork()
    if pid == 0:  # pragma: no cover
        os._exit(0 if (page[UNTIL], page[MINE]) == (0, 0) else 1)
    assert os.waitpid(pid, 0)[1] == 0
    assert (page[UNTIL], page[MINE]) == (1 << 62, 1)


def test_a_new_page_is_mine_and_its_time_is_up() -> None:
    page = new_page()
    assert (page[UNTIL], page[MINE]) == (0, 1)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux wipes")
def test_on_linux_the_kernel_wipes() -> None:
    assert isinstance(new_page(), memoryview)


def test_where_the_kernel_does_not_wipe_the_pid_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fork, "_WIPE_ON_FORK", 12345)
    assert isinstance(new_page(), PidPage)
    assert new_page()[MINE] == 1
