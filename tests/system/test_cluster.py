"""A run over three real brokers: eight emulated boards, two producers, three storages and a monitor, with kills.

bench/cluster_soak.py is the long form.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from kill_cluster import KINDS, cluster

pytestmark = [pytest.mark.cluster, pytest.mark.faults]


@pytest.mark.timeout(240)
def test_a_run_over_brokers_is_complete_after_kills_of_each_kind(tmp_path: Path) -> None:
    with cluster(tmp_path, 20, rate=8_000, down=0.3) as made:
        made.begin()
        made.kill_for(0.0, every=0.1)
        result = made.end()
    assert result.failures == [], made.notes
    assert (result.lost, result.doubled) == (0, 0)
    assert set(result.kills) == set(KINDS)
    assert result.stored > 0
