"""What a folder's keys begin with: everything that the values of a page depend on."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.runtime.settings.test_model_config import DENSE, read
from vibe_sgl_lite.runtime.launcher.child import PipelineSpec
from vibe_sgl_lite.runtime.messages import RankReady
from vibe_sgl_lite.runtime.page_folder import FolderClaim
from vibe_sgl_lite.runtime.settings.server_args import ServerArgs
from vibe_sgl_lite.runtime.transport.endpoints import Endpoints
from vibe_sgl_lite.scheduler.tiers.folder import CacheFolder, cache_root

READY = RankReady(10, "cpu", "float32", 0, 4000, "kernels: float32 (4,)")


def spec(folder: Path, page_size: int = 16, dtype: str = "float32", **args: Any) -> PipelineSpec:
    model = read(folder, DENSE)
    settings = ServerArgs(cache_dir=str(folder), **args)
    return PipelineSpec(
        args=settings, endpoints=Endpoints(directory="", api=""), model=model, model_name="m", model_folder=str(folder),
        tokenizer_folder="", context_length=64, chunked_prefill_size=64, page_size=page_size, device="cpu",
        dtype=dtype, epoch="",
    )  # fmt: skip


def test_the_root_stands_for_all_that_values_depend_on(tmp_path: Path) -> None:
    plain = spec(tmp_path)
    other_model = msgspec.structs.replace(plain, model=msgspec.structs.replace(plain.model, rope_theta=5e5))
    others = [
        spec(tmp_path, page_size=8), spec(tmp_path, dtype="bfloat16"), spec(tmp_path, quantization="int8"),
        spec(tmp_path, kv_cache_dtype="int8"), spec(tmp_path, tp=2), spec(tmp_path, tp=2, ep=2),
        spec(tmp_path, deterministic=True), other_model,
    ]  # fmt: skip
    roots = [cache_root(one, "format", "digest") for one in (plain, *others)]
    roots += [cache_root(plain, "other format", "digest"), cache_root(plain, "format", "other digest")]
    assert len({*roots}) == len(roots)
    other_end = msgspec.structs.replace(plain.model, eos_token_ids=(1,))
    same = [
        spec(tmp_path, max_running_requests=7, cache_dir_size=1, port=1),
        msgspec.structs.replace(plain, model=other_end, context_length=32),
    ]
    assert {cache_root(one, "format", "digest") for one in same} == {roots[0]}


def test_every_fact_about_the_ranks_was_thought_of() -> None:
    """Whoever tells more of them: a page that depends on it must have it in its key (scheduler/tiers/folder.py)."""
    assert RankReady.__struct_fields__ == (
        "kv_pages",
        "device",
        "dtype",
        "epoch",
        "page_bytes",
        "kv_format",
        "host_slots",
        "weights",
    )
    assert PipelineSpec.__struct_fields__ == (
        "args", "endpoints", "model", "model_name", "model_folder", "tokenizer_folder", "context_length",
        "chunked_prefill_size", "page_size", "device", "dtype", "epoch", "new_weights",
    )  # fmt: skip


def test_a_folder_is_read_for_these_ranks(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with FolderClaim(str(tmp_path)):
        folder = CacheFolder(spec(tmp_path, load_format="dummy", cache_dir_size=0.001), lambda: None)
        contents = folder.contents(READY)
        assert contents is not None
        assert (contents.ranks, contents.rank_bytes, contents.page_bytes) == (1, 4000, 4096)
        assert (contents.limit, contents.pages) == (1_000_000, [])
        folder.cannot_store("No space left on device")
        folder.cannot_store("No space left on device")
    lines = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert lines == [f"--cache-dir {tmp_path} gets no more pages: No space left on device"]


def test_weights_that_cannot_be_read_leave_the_folder_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with FolderClaim(str(tmp_path)):
        assert CacheFolder(spec(tmp_path), lambda: None).contents(READY) is None
    assert "is not used: " in caplog.text
