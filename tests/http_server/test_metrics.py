"""`/metrics` as Prometheus reads it: vLLM's names, and counts that equal what was asked for."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.http_server.server import Server
from vibe_sgl_lite.http_server.metrics import Histogram, Metrics, SharedMetrics

DASHBOARD = Path(__file__).resolve().parents[2] / "docs" / "grafana.json"
NAMES = [
    "num_requests_running",
    "num_requests_waiting",
    "kv_cache_usage_perc",
    "cache_config_info",
    "prefix_cache_queries",
    "prefix_cache_hits",
    "prompt_tokens",
    "generation_tokens",
    "num_preemptions",
    "request_success",
    "time_to_first_token_seconds",
    "inter_token_latency_seconds",
    "e2e_request_latency_seconds",
    "request_queue_time_seconds",
    "iteration_tokens_total",
    "request_prompt_tokens",
    "request_generation_tokens",
]


def samples(server: Server) -> dict[str, float]:
    """Every value of the page, under its name and its labels other than the model's."""
    found = {}
    for family in text_string_to_metric_families(server.get("/metrics").data.decode()):
        for sample in family.samples:
            labels = ",".join(f"{k}={v}" for k, v in sorted(sample.labels.items()) if k != "model_name")
            found[f"{sample.name}[{labels}]"] = sample.value
    return found


def test_the_names_are_those_of_vllm(server: Server) -> None:
    names = {family.name for family in text_string_to_metric_families(server.get("/metrics").data.decode())}
    assert {f"vllm:{name}" for name in NAMES} <= names
    ours = {"steps", "step_seconds", "retractions", "rank_restarts", "requests_resumed", "radix_nodes"}
    assert {f"vibe:{name}" for name in ours} <= names


def test_counts_equal_what_was_asked_for(server: Server) -> None:
    server.wait_idle()
    before = samples(server)
    usages = [
        server.post("/v1/completions", {"prompt": f"{i} " * 20, "max_tokens": 10, "ignore_eos": True}).json["usage"]
        for i in range(3)
    ]
    server.wait_idle()
    after = samples(server)

    def grew(name: str) -> float:
        return after[name] - before.get(name, 0)

    prompt = sum(usage["prompt_tokens"] for usage in usages)
    assert grew("vllm:prompt_tokens_total[]") == prompt == grew("vllm:request_prompt_tokens_sum[]")
    assert grew("vllm:generation_tokens_total[]") == 30 == grew("vllm:request_generation_tokens_sum[]")
    assert grew("vllm:request_success_total[finished_reason=length]") == 3
    assert grew("vllm:time_to_first_token_seconds_count[]") == 3
    assert grew("vllm:e2e_request_latency_seconds_count[]") == 3
    assert grew("vllm:inter_token_latency_seconds_count[]") == 27
    assert grew("vllm:request_queue_time_seconds_count[]") == 3
    assert grew("vllm:request_queue_time_seconds_bucket[le=+Inf]") == 3
    computed = prompt - grew("vllm:prefix_cache_hits_total[]")
    assert grew("vllm:iteration_tokens_total_sum[]") == computed + 27  # a sample's last token is not computed with
    assert grew("vllm:iteration_tokens_total_count[]") == grew("vibe:steps_total[]")
    assert grew("vibe:step_seconds_total[]") > 0
    assert grew("vibe:http_responses_total[status=200]") >= 3
    assert 0 < grew("vllm:time_to_first_token_seconds_sum[]") < grew("vllm:e2e_request_latency_seconds_sum[]")
    assert after["vllm:num_requests_running[]"] == 0


def test_a_histogram_counts_as_prometheus_does() -> None:
    histogram = Histogram((1, 2, 5))
    for value in (0.5, 1, 1.5, 5, 7):
        histogram.observe(value)
    histogram.observe(2, 3)
    assert list(histogram.cumulative()) == [("1.0", 2), ("2.0", 6), ("5.0", 7), ("+Inf", 8)]
    assert histogram.total == 0.5 + 1 + 1.5 + 5 + 7 + 6


def test_workers_counts_add_up(tmp_path: Path) -> None:
    workers = [SharedMetrics(Metrics(), tmp_path, worker, 3) for worker in range(3)]
    for place, shared in enumerate(workers):
        shared.own.first_token.observe(0.1, place + 1)
        shared.own.finished["stop"] = 10**place
        shared.publish()
    workers[0].own.disconnects += 1  # not published yet
    total = workers[0].total()
    assert sum(total.first_token.counts) == 6
    assert total.finished == {"stop": 111}
    assert total.disconnects == 1


def test_workers_that_write_at_the_same_time_do_not_meet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    workers = [SharedMetrics(Metrics(disconnects=10**number), tmp_path, number, 3) for number in range(3)]
    replace, others = Path.replace, workers[1:]

    def replace_late(new: Path, target: Path) -> Path:
        while others:
            others.pop().publish()
        return replace(new, target)

    monkeypatch.setattr(Path, "replace", replace_late)
    workers[0].publish()
    assert [worker.total().disconnects for worker in workers] == [111] * 3


def test_counts_that_cannot_be_written_are_no_error(tmp_path: Path) -> None:
    """A full disk, or a run directory that is gone."""
    worker = SharedMetrics(Metrics(disconnects=1), tmp_path / "gone", 0, 2)
    worker.publish()
    assert worker.total().disconnects == 1


def test_the_dashboard_asks_for_what_there_is(server: Server) -> None:
    page = server.get("/metrics").data.decode()
    board = json.loads(DASHBOARD.read_text())
    asked = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    assert len(asked) >= 8
    for expression in asked:
        for name in re.findall(r"\b(?:vllm|vibe):\w+", expression):
            assert re.search(rf"^{name}[{{ ]", page, re.M), name
