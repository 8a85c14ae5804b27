"""Fixtures that the tests of this folder share: processes, as tests/system has them, and the sites of several delegators."""

from tests.engines.several import site
from tests.system.conftest import daemons

__all__ = ["daemons", "site"]
