"""What Prometheus is told of a pool, and that the dashboard asks for nothing else."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
from prometheus_client import CollectorRegistry

from vdibuild.pool.leases import Leases
from vdibuild.pool.metrics import PoolCollector
from vdibuild.pool.service import Service

TEMPLATES = Path(__file__).parents[2] / "templates"


@pytest.fixture
def leases(tmp_path: Path) -> Iterator[Leases]:
    there = Leases(f"sqlite:///{tmp_path / 'leases.db'}")
    yield there
    there.close()


def samples(leases: Leases) -> dict[tuple[str, str], float]:
    """What is exported, by name and, where there is one, the machines' state."""
    service = SimpleNamespace(
        pool="desktop", broker=SimpleNamespace(waiting=3), pace=SimpleNamespace(limit=2), refusals=7
    )
    registry = CollectorRegistry()
    registry.register(PoolCollector(cast(Service, service), leases))
    found = {}
    for family in registry.collect():
        for sample in family.samples:
            assert sample.labels["pool"] == "desktop"
            found[sample.name, sample.labels.get("state", "")] = sample.value
    return found


def test_figures(leases: Leases) -> None:
    for _ in range(3):
        machine = leases.start("desktop", "debian-13", "20260101.1", 8)
        assert machine
        leases.clean(machine.lease)
    (offered,) = leases.offer("desktop", ["reception"])
    leases.link(offered.lease, "10.20.0.100")
    found = samples(leases)
    assert found["vdibuild_pool_machines", "clean"] == 2
    assert found["vdibuild_pool_machines", "in_use"] == 1
    assert found["vdibuild_pool_started_total", ""] == 3
    assert found["vdibuild_pool_linked_total", ""] == 1
    assert found["vdibuild_pool_waiting_stations", ""] == 3
    assert found["vdibuild_pool_refused_links_total", ""] == 7


def test_the_dashboard_shows_what_there_is(leases: Leases) -> None:
    dashboard = json.loads((TEMPLATES / "grafana-dashboard.json").read_text())
    asked = " ".join(
        [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
        + [variable["query"]["query"] for variable in dashboard["templating"]["list"][1:]]
    )
    exported = {name for name, _ in samples(leases)}
    assert set(re.findall(r"vdibuild_\w+", asked)) == exported
