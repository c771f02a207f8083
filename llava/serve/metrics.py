"""What the server counts, in Prometheus' form. Imports no torch."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_SIZES = (1, 2, 4, 8, 16, 32, 64)


class Metrics:
    """The counters of one server."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        self.requests = Counter(
            "forgery_requests", "Requests by path and status", ["path", "status"], registry=self._registry
        )
        self.seconds = Histogram(
            "forgery_request_seconds", "Time of a request", ["path"], buckets=_SECONDS, registry=self._registry
        )
        self.images = Counter("forgery_images", "Images by verdict", ["verdict"], registry=self._registry)
        self.places = Gauge("forgery_images_in_work", "Images accepted and not yet answered", registry=self._registry)
        self.batches = Histogram("forgery_batch_images", "Images of a batch", buckets=_SIZES, registry=self._registry)

    def text(self) -> bytes:
        """Returns all of them as Prometheus reads them."""
        return generate_latest(self._registry)
