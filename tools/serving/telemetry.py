"""What `/metrics` tells, in a registry of the server's own."""

import functools
from typing import Any

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    GCCollector,
    Histogram,
    PlatformCollector,
    ProcessCollector,
)

SECONDS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)
SIZES = (1, 2, 4, 8, 16, 32, 64, 128)


class Telemetry:
    """Counters of one server; Prometheus names them bigbatch_*."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        for collector in (ProcessCollector, PlatformCollector, GCCollector):
            collector(registry=registry)
        self.requests = Counter(
            "bigbatch_requests", "Requests by path and status", ["path", "status"], registry=registry
        )
        self.seconds = Histogram(
            "bigbatch_request_seconds", "Time to answer", ["path"], buckets=SECONDS, registry=registry
        )
        self.running = Gauge("bigbatch_requests_running", "Requests at work or waiting", registry=registry)
        self.batches = Histogram(
            "bigbatch_batch_size", "Rows in one pass of the model", buckets=SIZES, registry=registry
        )
        self.model_seconds = Counter("bigbatch_model_seconds", "Time in the model", registry=registry)
        self.of_request = functools.cache(self._of_request)
        self.tokens = Counter("bigbatch_tokens", "Tokens by kind: prompt, written", ["kind"], registry=registry)

    def _of_request(self, path: str, status: int) -> tuple[Any, Any]:
        return self.requests.labels(path, status), self.seconds.labels(path)
