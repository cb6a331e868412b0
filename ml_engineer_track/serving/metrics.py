"""What the server tells Prometheus, under vLLM's names without its prefix; times in seconds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from ml_engineer_track.serving.engine import Engine

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Meters:
    """One registry a server, so that two servers in one process (tests) do not count for each other."""

    def __init__(self, engines: Callable[[], Mapping[str, Engine]]) -> None:
        self.registry = CollectorRegistry()
        self._requests = Counter("http_requests", "Requests by path and status", ["path", "status"], registry=self.registry)
        self._first = Histogram(
            "time_to_first_token_seconds", "From request to first token", ["model"], buckets=SECONDS, registry=self.registry
        )
        self._whole = Histogram(
            "e2e_request_latency_seconds", "From request to last token", ["model"], buckets=SECONDS, registry=self.registry
        )
        self._tokens = Counter("generation_tokens", "Tokens generated", ["model"], registry=self.registry)
        self._tokens_of: dict[str, Counter] = {}  # finding a label takes as long as the rest of a chunk's bookkeeping
        self.registry.register(_Engines(engines))

    def request(self, path: str, status: int) -> None:
        self._requests.labels(path, str(status)).inc()

    def first_token(self, model: str, seconds: float) -> None:
        self._first.labels(model).observe(seconds)

    def finished(self, model: str, seconds: float) -> None:
        self._whole.labels(model).observe(seconds)

    def tokens(self, model: str, count: int) -> None:
        if model not in self._tokens_of:
            self._tokens_of[model] = self._tokens.labels(model)
        self._tokens_of[model].inc(count)

    def text(self) -> bytes:
        return generate_latest(self.registry)


class _Engines(Collector):
    """Read from the engines whenever somebody looks."""

    def __init__(self, engines: Callable[[], Mapping[str, Engine]]) -> None:
        self.engines = engines

    def collect(self) -> Iterable[Metric]:
        running = GaugeMetricFamily("num_requests_running", "Requests in the batch", labels=["model"])
        waiting = GaugeMetricFamily("num_requests_waiting", "Requests in the queue", labels=["model"])
        cache = GaugeMetricFamily("kv_cache_usage_perc", "Share of the key-value cache reserved, 0 to 1", labels=["model"])
        failures = CounterMetricFamily("engine_failures", "Batches that failed", labels=["model"])
        for name, engine in self.engines().items():
            stats = engine.stats()
            running.add_metric([name], stats.running)
            waiting.add_metric([name], stats.waiting)
            cache.add_metric([name], stats.reserved_tokens / max(stats.capacity_tokens, 1))
            failures.add_metric([name], stats.failures)
        return [running, waiting, cache, failures]
