"""Which peers are asked for, what is said when one is not there, and that engines take turns."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import offline
from benchmarks.machine import physical_cores
from benchmarks.peers import Peer, PeerError, names


def test_several_peers_are_named_with_commas() -> None:
    assert names("transformers") == ["transformers"]
    assert names("vllm, llama.cpp") == ["vllm", "llama.cpp"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--against ollama", "must be one or more of transformers, vllm, llama.cpp"),
        ("--against vllm,vllm", "names a peer twice"),
        ("--against vllm", "--vllm-python PATH, or in VLLM_PYTHON"),
        ("--against vllm --vllm-python /nowhere/python", "no such program"),
        (f"--against vllm --vllm-python {sys.executable}", "it lacks vllm"),
        ("--against llama.cpp", "--llama-bin DIR, or in LLAMA_BIN"),
        ("--against llama.cpp --llama-bin /nowhere", "no llama-bench in it"),
        ("--against transformers,llama.cpp --device cuda --llama-bin {here}", "--gguf FILE"),
        ("--against llama.cpp --llama-bin {here} --gguf /nowhere.gguf", "no such file"),
        ("--against llama.cpp --llama-bin {here} --gguf {here}/llama-bench --device cuda", "--device cpu only"),
        ("--rounds 0", "must be at least 1"),
    ],
)
def test_a_peer_that_is_not_there_is_one_clear_error(
    arguments: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("VLLM_PYTHON", "LLAMA_BIN"):
        monkeypatch.delenv(name, raising=False)
    for program in ("llama-bench", "llama-batched-bench"):
        (tmp_path / program).write_text("#!/bin/sh\n")
        (tmp_path / program).chmod(0o755)
    with pytest.raises(SystemExit) as stopped:
        offline.parse(arguments.replace("{here}", str(tmp_path)).split())
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_what_is_not_an_option_of_the_benchmark_goes_to_the_engine() -> None:
    options, settings = offline.parse(
        ["--workload", "b1", "--quantization", "int8", "--page-size", "32", "--rounds", "3"]
    )
    assert settings == {"quantization": "int8", "page_size": 32}
    assert (options.rounds, options.peers) == (3, [])


def test_a_peer_that_fails_says_how() -> None:
    peer = Peer(name="broken", command=[sys.executable, "-c", "raise SystemExit('no such model')"])
    with pytest.raises(PeerError, match=r"broken ended with exit code 1(.|\n)*no such model"):
        peer.run({})


def test_a_peer_reads_its_job_and_writes_its_result_last() -> None:
    code = "import json, sys; job = json.load(sys.stdin); print('noise'); print(json.dumps(job))"
    peer = Peer(name="echo", command=[sys.executable, "-c", code], job={"more": 2})
    assert peer.run({"workload": 1}) == {"workload": 1, "more": 2}


def test_physical_cores_are_some_of_this_machine() -> None:
    cores = physical_cores()
    assert cores == sorted(set(cores))
    assert cores


def test_engines_take_turns(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    turns: list[str] = []

    def result(name: str) -> dict[str, Any]:
        turns.append(name)
        percentiles = {"p50": 1.0, "p90": 1.0, "p99": 1.0}
        keys = ("output", "decode", "prefill")
        return {f"{key}_tokens_per_second": float(len(turns)) for key in keys} | {
            "ttft_ms": percentiles, "itl_ms": percentiles, "startup_s": 1.0, "peak_rss_mb": 1, "version": "1",
        }  # fmt: skip

    def run(peer: Peer, job: dict[str, Any]) -> dict[str, Any]:
        assert job["workload"]["name"] == "b1"
        return result(peer.name)

    monkeypatch.setattr(offline, "find", lambda name, **given: Peer(name=name, command=[]))
    monkeypatch.setattr(Peer, "run", run)
    monkeypatch.setattr(offline, "run_engine", lambda *given: result("ours"))
    monkeypatch.setattr(offline, "measure_in_subprocess", lambda: {"read_gb_s": float(len(turns))})
    monkeypatch.setattr(
        sys, "argv", ["offline.py", "--workload", "b1", "--against", "vllm,transformers", "--rounds", "2", "--ceilings"]
    )
    offline.main()
    assert turns == ["ours", "vllm", "transformers"] * 2
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert line["output_tokens_per_second"] == 2.5
    assert line["spread"]["output_tokens_per_second"] == [1, 4]
    assert line["peers"]["vllm"]["output_tokens_per_second"] == 3.5
    assert line["ratios"]["vllm"]["output tok/s"] == pytest.approx(2.5 / 3.5, abs=1e-3)
    assert line["machine"] == {"before": {"read_gb_s": 0}, "after": {"read_gb_s": 6}}
    assert "against" not in line


def test_a_single_peer_is_under_against_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(offline, "run_engine", lambda *given: {"output_tokens_per_second": 4.0})
    monkeypatch.setattr(Peer, "run", lambda peer, job: {"output_tokens_per_second": 2.0, "version": "1"})
    monkeypatch.setattr(sys, "argv", ["offline.py", "--workload", "b1", "--against", "transformers"])
    offline.main()
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert line["against_name"] == "transformers"
    assert line["against"] == line["peers"]["transformers"]
