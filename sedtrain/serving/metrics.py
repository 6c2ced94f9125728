"""Counters of a server, for Prometheus."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100)
WINDOWS = (1, 2, 4, 8, 16, 32, 64)


class Metrics:
    """Counters of one server; num_active: gives the number of requests being answered."""

    def __init__(self, num_active: Callable[[], float]) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "sedtrain_requests", "Requests for a text, by status of the answer", ["status"], registry=self.registry
        )
        self.seconds = Histogram(
            "sedtrain_request_seconds",
            "From a request for a text to its answer",
            buckets=SECONDS,
            registry=self.registry,
        )
        self.audio = Counter("sedtrain_audio_seconds", "Audio that became text", registry=self.registry)
        self.windows = Histogram(
            "sedtrain_batch_windows", "Windows decoded together", buckets=WINDOWS, registry=self.registry
        )
        active = Gauge("sedtrain_requests_active", "Requests that are being answered", registry=self.registry)
        active.set_function(num_active)

    def text(self) -> bytes:
        return generate_latest(self.registry)
