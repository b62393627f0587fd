"""What an operator may count: requests by route, transfers, watchers, jobs by state. No member, person or job is named.

Prometheus' text format at ``/metrics``, on a listener of its own that only the operator's network should reach.
"""

from __future__ import annotations

from collections import Counter as Tally
from collections.abc import Callable
from typing import Final

from aiohttp import web
from casemate_schemas.job_state import TRANSITIONS, JobState
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest

METRICS_PATH: Final = "/metrics"
_SECONDS: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 60.0, 600.0)
METHODS: Final = frozenset({"GET", "HEAD", "POST", "PATCH", "DELETE", "OPTIONS"})


class Metrics:
    """One gateway's counts. Label values come from fixed sets, so nobody outside can make the set of series grow."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.address: str | None = None
        """Where they are shown, if anywhere."""
        self._requests = Counter(
            "casemate_gateway_requests",
            "Requests answered, by route pattern, method and status.",
            ("route", "method", "status"),
            registry=self.registry,
        )
        self._seconds = Histogram(
            "casemate_gateway_request_seconds",
            "From a request's head to the end of its answer, by route pattern. Event streams last as long as they are watched.",
            ("route",),
            buckets=_SECONDS,
            registry=self.registry,
        )
        self._jobs = Gauge("casemate_jobs", "Jobs by state, as last reconciled.", ("state",), registry=self.registry)
        self._oldest = Gauge(
            "casemate_oldest_queued_seconds", "How long the oldest queued job waits.", registry=self.registry
        )

    def request(self, route: str, method: str, status: int, seconds: float) -> None:
        """One request was answered."""
        self._requests.labels(route, method if method in METHODS else "?", str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def jobs(self, states: Tally[JobState], oldest_queued_s: float) -> None:
        """How many jobs are in each state, all of them."""
        for state in TRANSITIONS:
            self._jobs.labels(state).set(states[state])
        self._oldest.set(oldest_queued_s)

    def gauge(self, name: str, text: str, value: Callable[[], float]) -> None:
        """A value that is asked for whenever somebody looks."""
        Gauge(name, text, registry=self.registry).set_function(value)


def make_metrics_app(metrics: Metrics) -> web.Application:
    """An application that shows ``metrics`` and nothing else."""

    async def show(_: web.Request) -> web.Response:
        return web.Response(body=generate_latest(metrics.registry), headers={"Content-Type": CONTENT_TYPE_LATEST})

    app = web.Application()
    app.router.add_get(METRICS_PATH, show)
    return app
