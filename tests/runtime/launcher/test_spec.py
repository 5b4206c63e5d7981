"""Settings made concrete: what "auto" becomes on this machine and for this model."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from tests.runtime.settings.files import write_zeros
from vibe_sgl_lite.runtime.errors import ConfigError
from vibe_sgl_lite.runtime.launcher.spec import make_spec, threads_per_rank
from vibe_sgl_lite.runtime.settings.machine import Limit
from vibe_sgl_lite.runtime.settings.server_args import ServerArgs
from vibe_sgl_lite.runtime.transport.endpoints import Endpoints

ENDPOINTS = Endpoints(directory="/tmp/x", api="ipc:///tmp/x/api.sock")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    config: dict[str, Any] = {
        "architectures": ["Qwen3ForCausalLM"], "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64,
        "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
        "max_position_embeddings": 256, "torch_dtype": "bfloat16",
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    write_zeros(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("gpu", "torch_cuda", "device", "chunk"),
    [(False, False, "cpu", 512), (True, False, "cpu", 512), (False, True, "cpu", 512), (True, True, "cuda", 8192)],
)
def test_auto(
    model: Path, monkeypatch: pytest.MonkeyPatch, gpu: bool, torch_cuda: bool, device: str, chunk: int
) -> None:
    monkeypatch.setattr("vibe_sgl_lite.runtime.launcher.spec.has_gpu", lambda: gpu)
    monkeypatch.setattr("vibe_sgl_lite.runtime.launcher.spec._torch_has_cuda", lambda: torch_cuda)
    spec = make_spec(ServerArgs(model_path=str(model)), ENDPOINTS)
    assert (spec.device, spec.chunked_prefill_size) == (device, chunk)
    assert (spec.dtype, spec.context_length) == ("bfloat16", 256)
    assert spec.model_folder == spec.tokenizer_folder == str(model)
    assert spec.endpoints == ENDPOINTS


@pytest.mark.parametrize(
    ("gpu", "torch_cuda", "why"), [(False, True, "no NVIDIA GPU"), (True, False, "without CUDA"), (False, False, "GPU")]
)
def test_cuda_that_is_not_there(
    model: Path, monkeypatch: pytest.MonkeyPatch, gpu: bool, torch_cuda: bool, why: str
) -> None:
    monkeypatch.setattr("vibe_sgl_lite.runtime.launcher.spec.has_gpu", lambda: gpu)
    monkeypatch.setattr("vibe_sgl_lite.runtime.launcher.spec._torch_has_cuda", lambda: torch_cuda)
    with pytest.raises(ConfigError, match=f"--device cuda: .*{why}.*--device cpu") as error:
        make_spec(ServerArgs(model_path=str(model), device="cuda"), ENDPOINTS)
    assert error.value.field == "device"


def test_what_is_asked_for_wins(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vibe_sgl_lite.runtime.launcher.spec.has_gpu", lambda: True)
    monkeypatch.setattr("vibe_sgl_lite.runtime.launcher.spec._torch_has_cuda", lambda: True)
    (tmp_path / "tok").mkdir()
    args = ServerArgs(
        model_path=str(model), tokenizer_path=str(tmp_path / "tok"), device="cuda", dtype="float32",
        context_length=100, chunked_prefill_size=7,
    )  # fmt: skip
    spec = make_spec(args, ENDPOINTS)
    assert (spec.device, spec.dtype, spec.context_length, spec.chunked_prefill_size) == ("cuda", "float32", 100, 7)
    assert spec.tokenizer_folder == str(tmp_path / "tok")


def test_every_start_has_its_own_epoch(model: Path) -> None:
    args = ServerArgs(model_path=str(model))
    assert make_spec(args, ENDPOINTS).epoch != make_spec(args, ENDPOINTS).epoch


def test_refusals(model: Path) -> None:
    with pytest.raises(ConfigError, match=r"--context-length 257 .*256"):
        make_spec(ServerArgs(model_path=str(model), context_length=257), ENDPOINTS)
    with pytest.raises(ConfigError, match="--tokenizer-path /nowhere does not exist"):
        make_spec(ServerArgs(model_path=str(model), tokenizer_path="/nowhere"), ENDPOINTS)


def test_kv_cache_in_fp8_is_for_gpus_and_int8_for_whole_head_dims(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    args = ServerArgs(model_path=str(model), kv_cache_dtype="int8")
    assert make_spec(args, ENDPOINTS).args.kv_cache_dtype == "int8"
    fp8 = ServerArgs(model_path=str(model), kv_cache_dtype="fp8")
    with pytest.raises(ConfigError, match=r"--kv-cache-dtype fp8 runs on a GPU only, .* cpu: .* int8 or auto") as error:
        make_spec(fp8, ENDPOINTS)
    assert error.value.field == "kv_cache_dtype"
    monkeypatch.setattr("vibe_sgl_lite.runtime.launcher.spec._device", lambda asked: "cuda")
    make_spec(args, ENDPOINTS)
    make_spec(fp8, ENDPOINTS)
    monkeypatch.undo()
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"head_dim": 20}))
    write_zeros(model)
    with pytest.raises(ConfigError, match=r"--kv-cache-dtype int8 needs .* multiple of 8, and this model's is 20"):
        make_spec(args, ENDPOINTS)
    make_spec(ServerArgs(model_path=str(model)), ENDPOINTS)


def test_weights_beyond_the_memory(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit = Limit(20_000, "control group /x, limit 1 MiB")
    monkeypatch.setattr("vibe_sgl_lite.runtime.launcher.spec.available_memory", lambda: limit)
    with pytest.raises(ConfigError, match=r"its weights take .* limit 1 MiB.*--quantization") as error:
        make_spec(ServerArgs(model_path=str(model)), ENDPOINTS)
    assert error.value.field == "model_path"
    monkeypatch.setattr("vibe_sgl_lite.runtime.launcher.spec.available_memory", lambda: Limit(10**6, ""))
    make_spec(ServerArgs(model_path=str(model)), ENDPOINTS)


def test_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    assert [threads_per_rank(ServerArgs(tp=tp)) for tp in (1, 2, 3, 16)] == [8, 4, 2, 1]
    assert threads_per_rank(ServerArgs(tp=4, num_threads=5)) == 5
    assert threads_per_rank(ServerArgs(tp=4, nnodes=2, dist_init_addr="10.0.0.1:1")) == 4
    assert threads_per_rank(ServerArgs(num_threads=32)) == 32
    with pytest.raises(ConfigError, match="--num-threads 33 is far more than the 8 cores") as error:
        threads_per_rank(ServerArgs(num_threads=33))
    assert error.value.field == "num_threads"
