"""Processes of a test's own, as tests/system has them."""

from tests.system.conftest import daemons

__all__ = ["daemons"]
