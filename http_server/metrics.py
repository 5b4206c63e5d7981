"""What is counted of HTTP requests, and `/metrics`: these and the engine's own counters, under vLLM's names.

Every worker counts what it serves; with several, each writes its counts to the run directory once a second, and the one
that is asked adds them up. Counts of the engine come from its `stats`, and hold for clients of every kind.
"""

from __future__ import annotations

import contextlib
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import msgspec
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector

FIRST_TOKEN_S = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160)
INTER_TOKEN_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 10)
END_TO_END_S = (0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960)
TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)

# stats key -> (vLLM's name, what it is); counters end in _total on the page, as the client library writes them
GAUGES = {
    "num_running": ("num_requests_running", "Samples that generate."),
    "num_waiting": ("num_requests_waiting", "Samples that wait for a slot or for pages."),
}
COUNTERS = {
    "prompt_tokens_total": ("prompt_tokens", "Prompt tokens of admitted requests."),
    "completion_tokens_total": ("generation_tokens", "Generated tokens."),
    "num_retractions": ("num_preemptions", "Requests taken back to the queue for want of pages."),
    "cached_tokens_total": ("prefix_cache_hits", "Prompt tokens that came from the cache."),
    "drafts_total": ("spec_decode_num_drafts", "Rows that guessed tokens ahead."),
    "draft_tokens_total": ("spec_decode_num_draft_tokens", "Tokens that were guessed."),
    "accepted_tokens_total": ("spec_decode_num_accepted_tokens", "Tokens that were guessed right."),
}
OWN_PREFIX = "vibe:"
OWN_COUNTERS = {
    "steps_total": ("steps", "Steps planned."),
    "step_seconds_total": ("step_seconds", "Time that steps took on rank 0."),
    "rank_restarts_total": ("rank_restarts", "Groups of ranks that were lost and started again."),
    "requests_resumed_total": ("requests_resumed", "Samples that went on after such a loss, or that of a process."),
    "num_retractions": ("retractions", "Requests taken back to the queue for want of pages."),
    "evicted_pages_total": ("evicted_pages", "Pages that the cache gave up."),
    "host_restored_tokens_total": ("host_cache_restored_tokens", "Tokens whose KV came back from --hicache-size."),
    "disk_loaded_tokens_total": ("disk_cache_loaded_tokens", "Tokens whose KV was loaded from --cache-dir."),
    "disk_stored_tokens_total": ("disk_cache_stored_tokens", "Tokens whose KV was stored there."),
    "disk_evicted_tokens_total": ("disk_cache_evicted_tokens", "Tokens whose KV was removed there, for want of room."),
    "disk_failed_tokens_total": ("disk_cache_failed_tokens", "Tokens whose KV could not be loaded or stored."),
    "requests_total": ("requests", "Requests that reached the scheduler."),
    "requests_refused_total": ("requests_refused", "Requests that were refused."),
    "sessions_lost_total": ("sessions_lost", "Clients that went away without a word."),
}


# stats keys: of the sum and of the counts by powers of two (scheduler/histogram.py) -> (name, seconds or tokens that 1
# stands for, what it is)
HISTOGRAMS = {
    "queue_ms": ("request_queue_time_seconds", 0.001, "From a sample's arrival at the scheduler to its first slot."),
    "step_tokens": ("iteration_tokens_total", 1, "Tokens of a step, of prompts and generated."),
}
OWN_GAUGES = {
    "kv_pages_free": "Pages nobody uses.",
    "kv_pages_cached": "Pages in the radix tree.",
    "host_pages": "Pages in host memory beside a GPU's.",
    "disk_pages": "Pages in --cache-dir that are whole.",
    "disk_bytes": "What the files there take.",
    "radix_nodes": "Nodes of the radix tree.",
}


class Histogram(msgspec.Struct):
    """counts: one more than bounds; the last is above all of them."""

    bounds: Sequence[float]
    counts: list[int] = []
    total: float = 0.0

    def __post_init__(self) -> None:
        self.counts = self.counts or [0] * (len(self.bounds) + 1)

    def observe(self, value: float, times: int = 1) -> None:
        self.counts[bisect_left(self.bounds, value)] += times
        self.total += value * times

    def add(self, other: Histogram) -> None:
        self.counts = [mine + its for mine, its in zip(self.counts, other.counts, strict=True)]
        self.total += other.total

    def cumulative(self) -> Iterator[tuple[str, float]]:
        """As Prometheus wants it: (upper bound, how many are at most that)."""
        seen = 0
        for bound, count in zip((*self.bounds, float("inf")), self.counts, strict=True):
            seen += count
            yield ("+Inf" if bound == float("inf") else repr(float(bound))), float(seen)


def _histogram(bounds: Sequence[float]) -> Histogram:
    return msgspec.field(default_factory=lambda: Histogram(bounds))


class Metrics(msgspec.Struct):
    """One worker's counts since its start. finished: samples by reason. unknown_fields: by name, of request bodies.
    responses: by status."""

    first_token: Histogram = _histogram(FIRST_TOKEN_S)
    inter_token: Histogram = _histogram(INTER_TOKEN_S)
    end_to_end: Histogram = _histogram(END_TO_END_S)
    prompt_tokens: Histogram = _histogram(TOKENS)
    generation_tokens: Histogram = _histogram(TOKENS)
    finished: dict[str, int] = msgspec.field(default_factory=dict)
    unknown_fields: dict[str, int] = msgspec.field(default_factory=dict)
    responses: dict[int, int] = msgspec.field(default_factory=dict)
    disconnects: int = 0

    def add(self, other: Metrics) -> None:
        for name in self.__struct_fields__:
            mine, its = getattr(self, name), getattr(other, name)
            if isinstance(mine, Histogram):
                mine.add(its)
            elif isinstance(mine, dict):
                for key, count in its.items():
                    mine[key] = mine.get(key, 0) + count
            else:
                setattr(self, name, mine + its)


class SharedMetrics:
    """The counts of all workers, one file each in the run directory."""

    def __init__(self, own: Metrics, folder: Path, worker: int, workers: int) -> None:
        self.own = own
        self._folder, self._worker, self._workers = folder, worker, workers

    def publish(self) -> None:
        if self._workers > 1:
            path = self._path(self._worker)
            new = path.with_name(path.name + ".new")
            with contextlib.suppress(OSError):  # a full disk: the counts of a second before do, until there is room
                new.write_bytes(msgspec.msgpack.encode(self.own))
                new.replace(path)

    def total(self) -> Metrics:
        total = Metrics()
        total.add(self.own)
        for worker in set(range(self._workers)) - {self._worker}:
            path = self._path(worker)
            if path.exists():
                total.add(msgspec.msgpack.decode(path.read_bytes(), type=Metrics))
        return total

    def _path(self, worker: int) -> Path:
        return self._folder / f"http_metrics.{worker}"


class _Page(Collector):
    """One answer of `/metrics`."""

    def __init__(
        self, prefix: str, model: str, metrics: Metrics, stats: Mapping[str, object], cache: Mapping[str, str]
    ):
        self._prefix, self._model, self._metrics, self._stats, self._cache = prefix, model, metrics, stats, cache

    def collect(self) -> Iterable[CounterMetricFamily | GaugeMetricFamily | HistogramMetricFamily]:
        yield from self._of_engine()
        yield from self._of_requests()

    def _of_engine(self) -> Iterable[CounterMetricFamily | GaugeMetricFamily | HistogramMetricFamily]:
        for key, (name, text) in GAUGES.items():
            yield self._gauge(self._prefix + name, text, self._stat(key))
        pages, free = self._stat("kv_pages_total"), self._stat("kv_pages_free")
        evictable = self._stat("kv_pages_evictable")
        usage = (pages - free - evictable) / pages if pages else 0.0
        yield self._gauge(self._prefix + "kv_cache_usage_perc", "Part of the pages that requests hold, 0 to 1.", usage)
        info = GaugeMetricFamily(
            self._prefix + "cache_config_info", "The KV cache's settings.", labels=tuple(self._cache)
        )
        info.add_metric(tuple(self._cache.values()), 1)
        yield info
        for key, (name, text) in COUNTERS.items():
            yield self._counter(self._prefix + name, text, self._stat(key))
        queries = self._stat("prompt_tokens_total")
        yield self._counter(self._prefix + "prefix_cache_queries", "Prompt tokens looked up in the cache.", queries)
        for key, (name, text) in OWN_COUNTERS.items():
            if key in self._stats:
                yield self._counter(OWN_PREFIX + name, text, self._stat(key))
        for name, text in OWN_GAUGES.items():
            yield self._gauge(OWN_PREFIX + name, text, self._stat(name))
        for key, (name, unit, text) in HISTOGRAMS.items():
            counts = [int(count) for count in str(self._stats[f"{key}_counts"]).split(",")]
            bounds = [unit * 2**power for power in range(len(counts) - 1)]
            yield self._histogram(name, text, Histogram(bounds, counts, unit * self._stat(f"{key}_total")))

    def _of_requests(self) -> Iterable[CounterMetricFamily | HistogramMetricFamily]:
        metrics = self._metrics
        finished = CounterMetricFamily(
            self._prefix + "request_success", "Samples ended, by reason.", labels=("model_name", "finished_reason")
        )
        for reason, count in sorted(metrics.finished.items()):
            finished.add_metric((self._model, reason), count)
        yield finished
        for histogram, name, text in (
            (metrics.first_token, "time_to_first_token_seconds", "From the request to its first token."),
            (metrics.inter_token, "inter_token_latency_seconds", "Between two tokens of a sample."),
            (metrics.end_to_end, "e2e_request_latency_seconds", "From the request to a sample's end."),
            (metrics.prompt_tokens, "request_prompt_tokens", "Prompt tokens of a sample."),
            (metrics.generation_tokens, "request_generation_tokens", "Generated tokens of a sample."),
        ):
            yield self._histogram(name, text, histogram)
        responses = CounterMetricFamily(OWN_PREFIX + "http_responses", "HTTP answers by status.", labels=("status",))
        for status, count in sorted(metrics.responses.items()):
            responses.add_metric((str(status),), count)
        yield responses
        unknown = CounterMetricFamily(
            OWN_PREFIX + "http_unknown_fields", "Unknown fields of bodies.", labels=("field",)
        )
        for field, count in sorted(metrics.unknown_fields.items()):
            unknown.add_metric((field,), count)
        yield unknown
        yield CounterMetricFamily(OWN_PREFIX + "http_disconnects", "Clients that left early.", metrics.disconnects)

    def _stat(self, key: str) -> float:
        value = self._stats.get(key, 0)
        return float(value) if isinstance(value, int | float) else 0.0

    def _gauge(self, name: str, text: str, value: float) -> GaugeMetricFamily:
        family = GaugeMetricFamily(name, text, labels=("model_name",))
        family.add_metric((self._model,), value)
        return family

    def _histogram(self, name: str, text: str, histogram: Histogram) -> HistogramMetricFamily:
        family = HistogramMetricFamily(self._prefix + name, text, labels=("model_name",))
        family.add_metric((self._model,), list(histogram.cumulative()), histogram.total)
        return family

    def _counter(self, name: str, text: str, value: float) -> CounterMetricFamily:
        family = CounterMetricFamily(name, text, labels=("model_name",))
        family.add_metric((self._model,), value)
        return family


def render(prefix: str, model: str, metrics: Metrics, stats: Mapping[str, object], cache: Mapping[str, str]) -> bytes:
    """The page in Prometheus' text form. cache: labels of `cache_config_info`."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Page(prefix, model, metrics, stats, cache))
    return generate_latest(registry)
