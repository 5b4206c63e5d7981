"""The simulator: conservation, determinism, what policies are for, calibration, the command."""

from __future__ import annotations

import json
import random
from pathlib import Path
from xml.etree import ElementTree

import msgspec
import pytest

from vibe_sgl_lite.scheduler.config import SchedulerConfig
from vibe_sgl_lite.scheduler.tools.simulate import main
from vibe_sgl_lite.scheduler.tools.simulator import Histogram, Report, Simulation, StepCost
from vibe_sgl_lite.scheduler.tools.workloads import WORKLOADS, fewshot

COST = StepCost(base_s=0.005, token_s=50e-6, context_s=1e-8)


def simulate(policy: str, workload: str = "shared", pages: int = 2048, count: int = 150, rate: float = 20.0) -> Report:
    config = SchedulerConfig(
        num_pages=pages, policy=policy, max_running_requests=16, max_queued_requests=10**6, chunked_prefill_size=512
    )
    return Simulation(config, COST).run(WORKLOADS[workload](count, rate, 0))


@pytest.mark.parametrize("workload", WORKLOADS)
def test_every_request_is_served(workload: str) -> None:
    arrivals = list(WORKLOADS[workload](150, 20.0, 0))
    assert [a.time for a in arrivals] == sorted(a.time for a in arrivals)
    assert [a.message.uid for a in arrivals] == list(range(150))
    report = simulate("fcfs", workload)
    assert report.requests == 150
    tokens = sum(a.output_tokens for a in arrivals)
    assert report.output_tokens_per_second * report.seconds == pytest.approx(tokens)
    assert 0 < report.ttft_p50_s <= report.ttft_p99_s <= report.longest_wait_s
    assert 0 < report.fairness <= 1
    if workload in ("shared", "fewshot"):
        assert report.hit_rate > 0.5


def test_a_simulation_is_repeatable() -> None:
    assert simulate("lpm") == simulate("lpm")


@pytest.mark.parametrize(("acceptance", "tokens_a_row"), [(0.0, 1.0), (1.0, 4.0)])
def test_drafts_that_hold_save_steps(acceptance: float, tokens_a_row: float) -> None:
    """One request of 400 tokens with 3 drafts a row: all are rejected, or none."""
    config = SchedulerConfig(num_pages=2048, draft_tokens=3)
    arrival = msgspec.structs.replace(next(WORKLOADS["poisson"](1, 1.0, 0)), output_tokens=400)
    report = Simulation(config, COST, acceptance).run([arrival])
    assert report.output_tokens_per_second * report.seconds == pytest.approx(400)
    prefill_steps = -(-len(arrival.message.token_ids) // 4 // 512)
    assert report.steps == pytest.approx(prefill_steps + 399 / tokens_a_row, abs=30)  # and some to learn what they take


@pytest.mark.parametrize("workload", WORKLOADS)
def test_drafts_change_no_output(workload: str) -> None:
    config = SchedulerConfig(num_pages=400, max_running_requests=16, max_queued_requests=10**6, draft_tokens=4)
    arrivals = list(WORKLOADS[workload](100, 20.0, 0))
    report = Simulation(config, COST, 0.6).run(arrivals)
    assert report.output_tokens_per_second * report.seconds == pytest.approx(sum(a.output_tokens for a in arrivals))


def test_policies_that_know_the_cache_win_when_it_is_small() -> None:
    """8 groups of 16 behind 1,000 common tokens each, interleaved; pages for about 3 groups."""
    rates = {}
    for policy in ("fcfs", "lpm", "dfs-weight"):
        config = SchedulerConfig(num_pages=300, policy=policy, max_running_requests=8, chunked_prefill_size=512)
        rates[policy] = Simulation(config, COST).run(fewshot(128, 1000.0, 0)).hit_rate
    assert rates["lpm"] > 0.8
    assert rates["dfs-weight"] > 0.8
    assert rates["fcfs"] < 0.4


def test_the_histogram_knows_percentiles() -> None:
    rng = random.Random(0)
    values = [rng.expovariate(3.0) for _ in range(20_000)]
    histogram = Histogram()
    for value in values:
        histogram.add(value)
    values.sort()
    for share in (0.1, 0.5, 0.99):
        assert histogram.percentile(share) == pytest.approx(values[int(share * len(values))], rel=0.08)


def test_the_command_writes_table_json_and_plot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figures = tmp_path / "bench.json"
    figures.write_text('noise\n{"prefill_tokens_per_second": 1000, "decode_tokens_per_second": 200}\n')
    plot = tmp_path / "plot.svg"
    arguments = ["--requests", "40", "--policies", "fcfs,lpm", "--calibrate", str(figures), "--plot", str(plot)]
    assert main(arguments) == 0
    *table, line = capsys.readouterr().out.splitlines()
    assert [row.split()[0] for row in table] == ["policy", "fcfs", "lpm"]
    assert [report["policy"] for report in json.loads(line)["reports"]] == ["fcfs", "lpm"]
    assert len(ElementTree.fromstring(plot.read_text())) > 10


def test_bad_input_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figures = tmp_path / "bench.json"
    figures.write_text('{"prefill_tokens_per_second": 1000}\n')
    assert main(["--requests", "4", "--calibrate", str(figures)]) == 1
    assert "decode_tokens_per_second" in capsys.readouterr().err
    assert main(["--requests", "4", "--policies", "nope"]) == 1
    assert "nope" in capsys.readouterr().err
    assert main(["--trace", str(tmp_path / "missing")]) == 1


def test_the_documented_example_tells_policies_apart(capsys: pytest.CaptureFixture[str]) -> None:
    page = (Path(__file__).resolve().parents[3] / "docs" / "scheduling.md").read_text()
    command = next(line for line in page.splitlines() if "simulate --workload" in line).split("simulate ")[1].split()
    command[command.index("--requests") + 1] = "150"  # of 500
    assert main(command) == 0
    reports = json.loads(capsys.readouterr().out.splitlines()[-1])["reports"]
    rates = {report["policy"]: report["hit_rate"] for report in reports}
    assert rates["fcfs"] < rates["lpm"] < rates["dfs-weight"]
