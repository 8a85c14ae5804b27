"""A small crowd, beside many leases."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.jobs import crowd


@pytest.mark.long
def test_a_crowd_costs_no_lease_and_little_memory(tmp_path: Path) -> None:
    result = crowd.run(tmp_path, 10.0, peers=200, idle=1_000)
    assert not result.violations, str(result)
    assert all(phase.client_s for phase in result.phases), "clients were served"
