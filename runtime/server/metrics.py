"""What a server counts, in Prometheus's text format; `docs/server.md` has the table.

Labels take few values: routes as they are written in the tables of routes, models as they are served. No text of
anybody's is among them.
"""

from collections.abc import Callable, Iterator, Sequence

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.registry import Collector

from griffin_gguf.runtime.server.answers import Reply
from griffin_gguf.runtime.server.models import Loaded

__all__ = ["CONTENT_TYPE_LATEST", "Metrics"]

#: Bounds of the histograms, in seconds: from a token of a small model to a long prompt on a slow machine.
_FIRST = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
_EACH = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)

#: Gauge -> its help and the attribute of `Loaded` that it shows.
_GAUGES = {
    "griffin_running": ("Answers that have a slot.", "running"),
    "griffin_waiting": ("Requests that wait for a slot.", "waiting"),
    "griffin_cache_bytes": ("Snapshots of states in memory.", "cache_nbytes"),
    "griffin_cache_snapshots": ("How many those are.", "cache_snapshots"),
}


class Metrics:
    """The counters of one server, in a registry of their own; `loaded` tells of the models that are loaded now."""

    def __init__(self, loaded: Callable[[], Sequence[Loaded]]) -> None:
        self._registry = CollectorRegistry()
        registry = self._registry
        self._requests = Counter("griffin_requests", "Requests answered.", ("route", "status"), registry=registry)
        self._prompt = Counter("griffin_prompt_tokens", "Tokens of prompts.", ("model",), registry=registry)
        self._cached = Counter(
            "griffin_cached_tokens", "Those of them that were not processed again.", ("model",), registry=registry
        )
        self._answer = Counter("griffin_answer_tokens", "Tokens of answers.", ("model",), registry=registry)
        self._first = Histogram(
            "griffin_first_token_seconds",
            "From a request to its first token.",
            ("model",),
            buckets=_FIRST,
            registry=registry,
        )
        self._each = Histogram(
            "griffin_token_seconds",
            "Per token of an answer after the first.",
            ("model",),
            buckets=_EACH,
            registry=registry,
        )
        self._registry.register(_Now(loaded))

    def requested(self, route: str, status: int) -> None:
        """Count a request, by its route as the table of routes has it."""
        self._requests.labels(route, str(status)).inc()

    def answered(self, model: str, reply: Reply) -> None:
        """Count an answer that has ended."""
        self._prompt.labels(model).inc(reply.prompt_tokens)
        self._cached.labels(model).inc(reply.cached_tokens)
        self._answer.labels(model).inc(reply.answer_tokens)
        if reply.answer_tokens:
            self._first.labels(model).observe((reply.total_ns - reply.answer_ns) / 1e9)
        if reply.answer_tokens > 1:
            self._each.labels(model).observe(reply.answer_ns / 1e9 / (reply.answer_tokens - 1))

    def text(self) -> bytes:
        """All of them as Prometheus reads them."""
        return generate_latest(self._registry)


class _Now(Collector):
    """The gauges, read when somebody asks."""

    def __init__(self, loaded: Callable[[], Sequence[Loaded]]) -> None:
        self._loaded = loaded

    def collect(self) -> Iterator[Metric]:
        """One gauge after the other, each for all models that are loaded."""
        loaded = self._loaded()
        count = GaugeMetricFamily("griffin_models_loaded", "Models that are loaded.")
        count.add_metric((), len(loaded))
        yield count
        for name, (what, attribute) in _GAUGES.items():
            gauge = GaugeMetricFamily(name, what, labels=("model",))
            for one in loaded:
                gauge.add_metric((one.entry.name,), getattr(one, attribute))
            yield gauge
