"""Where a model comes from, and what is refused when it is not there."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest

from vibe_sgl_lite.runtime.errors import ConfigError
from vibe_sgl_lite.runtime.settings.model_source import embedded_folder, find_model


def test_the_embedded_model_is_found() -> None:
    source = find_model("embedded", weights=True)
    assert source.folder == embedded_folder()
    assert source.folder.parts[-3:] == ("vibe_sgl_lite", "models", "tiny")
    assert source.name == "tiny"


def test_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "Qwen3-x").mkdir()
    assert find_model(str(tmp_path / "Qwen3-x"), weights=True).folder == tmp_path / "Qwen3-x"
    monkeypatch.chdir(tmp_path)
    source = find_model("Qwen3-x/", weights=True)
    assert (source.folder, source.name) == (tmp_path / "Qwen3-x", "Qwen3-x")


@pytest.mark.parametrize("path", ["/nowhere/model", "nowhere", "./a/b", "a/b/c", "~/no-such-model-here"])
def test_a_missing_folder(path: str) -> None:
    with pytest.raises(ConfigError, match=rf"--model-path {path} does not exist: give a folder, a hub id") as error:
        find_model(path, weights=True)
    assert error.value.field == "model_path"


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").touch()
    with pytest.raises(ConfigError, match="is a file, not a folder"):
        find_model(str(tmp_path / "model.gguf"), weights=True)


def test_a_hub_id_while_offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setitem(os.environ, "HF_HUB_OFFLINE", "1")
    start = time.monotonic()
    with pytest.raises(ConfigError, match=r"--tokenizer-path no-one/no-model: .*HF_HUB_OFFLINE is set") as error:
        find_model("no-one/no-model", weights=False, flag="--tokenizer-path")
    assert time.monotonic() - start < 8
    assert error.value.field == "tokenizer_path"
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("weights", [True, False])
def test_only_safe_files_are_downloaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, weights: bool) -> None:
    asked: dict[str, Any] = {}

    def download(hub_id: str, **options: Any) -> str:
        asked.update(options, id=hub_id)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    source = find_model("Qwen/Qwen3-0.6B", weights=weights)
    assert (source.folder, source.name) == (tmp_path, "Qwen/Qwen3-0.6B")
    assert asked["id"] == "Qwen/Qwen3-0.6B"
    assert ("*.safetensors" in asked["allow_patterns"]) == weights
    assert set(asked["allow_patterns"]) <= {"*.json", "*.jinja", "*.txt", "*.safetensors"}


def test_a_revision_is_asked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: dict[str, Any] = {}
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda hub_id, **o: asked.update(o) or str(tmp_path))
    find_model("Qwen/Qwen3-0.6B", weights=False, revision="v1.0")
    assert asked["revision"] == "v1.0"
    for path in ("embedded", str(tmp_path)):
        with pytest.raises(ConfigError, match=r"--revision v1\.0 is for a hub id") as error:
            find_model(path, weights=False, revision="v1.0")
        assert error.value.field == "revision"


@pytest.mark.parametrize("cache", ["relative/hub", "~/.cache/huggingface/hub"])
def test_the_hubs_cache_is_never_in_the_current_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture, cache: str
) -> None:
    asked: dict[str, Any] = {}
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda hub_id, **o: asked.update(o) or str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", cache)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    find_model("Qwen/Qwen3-0.6B", weights=False)
    assert asked["cache_dir"] == tmp_path / "vibe-sgl-lite" / "hub"
    assert str(tmp_path / "vibe-sgl-lite" / "hub") in caplog.text


@pytest.mark.parametrize(
    "name",
    [
        "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
        "model.safetensors", "vocab.json", "merges.txt", "additional_chat_templates/tool_use.jinja",
    ],
)  # fmt: skip
@pytest.mark.parametrize("flag", ["--model-path", "--tokenizer-path"])
def test_links_that_leave_the_folder(tmp_path: Path, name: str, flag: str) -> None:
    outside = tmp_path / "secret"
    outside.write_text("{}")
    folder = tmp_path / "model"
    (folder / name).parent.mkdir(parents=True)
    (folder / name).symlink_to(outside)
    with pytest.raises(ConfigError, match="leads out of the model folder") as error:
        find_model(str(folder), weights=True, flag=flag)
    assert name in str(error.value)
    (folder / name).unlink()
    (folder / "inside").write_text("{}")
    (folder / name).symlink_to(folder / "inside")
    assert find_model(str(folder), weights=True, flag=flag).folder == folder


def test_a_hub_caches_own_links_are_its_layout(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "models--x" / "blobs", tmp_path / "models--x" / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    (blobs / "1").write_text("{}")
    (snapshot / "config.json").symlink_to(Path("..") / ".." / "blobs" / "1")
    assert find_model(str(snapshot), weights=True).folder == snapshot


@pytest.mark.parametrize(
    ("path", "why"),
    [
        ("x" * 5000, "cannot be looked at"),
        ("~no-such-user-here/model", "cannot be looked at"),
        (b"/tmp/caf\xe9".decode(errors="surrogateescape"), "not UTF-8"),
    ],
)
def test_paths_that_cannot_be(path: str, why: str) -> None:
    with pytest.raises(ConfigError, match=why) as error:
        find_model(path, weights=True)
    assert "\n" not in str(error.value)
    str(error.value).encode()  # it can be printed
