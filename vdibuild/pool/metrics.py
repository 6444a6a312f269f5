"""What Prometheus is told of a pool, at http://127.0.0.1:PORT/metrics."""

from __future__ import annotations

import contextlib
import socket
from collections import Counter
from collections.abc import AsyncIterator, Iterable

from aiohttp import web
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from vdibuild.pool.leases import Leases, State
from vdibuild.pool.service import Service


class PoolCollector(Collector):
    """Reads a pool's figures when Prometheus asks, from the database: they survive a restart."""

    def __init__(self, service: Service, leases: Leases) -> None:
        self._service = service
        self._leases = leases

    def collect(self) -> Iterable[Metric]:
        """See prometheus_client."""
        pool = self._service.pool
        states = Counter(machine.state for machine in self._leases.living(pool))
        machines = GaugeMetricFamily(
            "vdibuild_pool_machines", "Machines that are not gone.", labels=["pool", "state"]
        )
        for state in State:
            if state != State.GONE:
                machines.add_metric([pool, state.replace(" ", "_")], states[state])
        yield machines
        waiting = GaugeMetricFamily("vdibuild_pool_waiting_stations", "Stations in line.", labels=["pool"])
        waiting.add_metric([pool], self._service.broker.waiting)
        yield waiting
        pace = GaugeMetricFamily("vdibuild_pool_parallel_starts", "Starts at a time.", labels=["pool"])
        pace.add_metric([pool], self._service.pace.limit)
        yield pace
        totals = self._leases.totals(pool)
        for name, help_text, value in (
            ("started", "Machines that were started.", totals.started),
            ("failed", "Machines that did not become clean.", totals.failed),
            ("offered", "Machines that were offered.", totals.offered),
            ("linked", "Sessions.", totals.linked),
        ):
            counter = CounterMetricFamily(f"vdibuild_pool_{name}", help_text, labels=["pool"])
            counter.add_metric([pool], value)
            yield counter
        refused = CounterMetricFamily("vdibuild_pool_refused_links", "Links refused.", labels=["pool"])
        refused.add_metric([pool], self._service.refusals)
        yield refused


@contextlib.asynccontextmanager
async def serving(listening: socket.socket, service: Service, leases: Leases) -> AsyncIterator[None]:
    """Answer Prometheus at a listening socket for as long as the block runs."""
    registry = CollectorRegistry()
    registry.register(PoolCollector(service, leases))

    async def metrics(_request: web.Request) -> web.Response:
        return web.Response(body=generate_latest(registry), content_type="text/plain", charset="utf-8")

    application = web.Application()
    application.router.add_get("/metrics", metrics)
    runner = web.AppRunner(application, access_log=None)
    await runner.setup()
    try:
        await web.SockSite(runner, listening).start()
        yield
    finally:
        await runner.cleanup()
