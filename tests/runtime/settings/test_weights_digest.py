"""A digest of weights changes with every byte of them, and is not worked out twice."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from vibe_sgl_lite.runtime.settings.weights_digest import weights_digest


def save(path: Path, values: bytes) -> None:
    header = json.dumps({"w": {"dtype": "U8", "shape": [len(values)], "data_offsets": [0, len(values)]}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + values)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    save(folder / "model.safetensors", bytes(1000))
    return folder


@pytest.fixture
def memo(tmp_path: Path) -> Path:
    folder = tmp_path / "memo"
    folder.mkdir()
    return folder


def age(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if it had been changed long ago."""
    monkeypatch.setattr("time.time_ns", lambda: path.stat().st_ctime_ns + 10**11)


def test_every_byte_counts(model: Path) -> None:
    file = model / "model.safetensors"
    whole = file.read_bytes()
    digests = {weights_digest(model)}
    for at in range(len(whole) - 1000, len(whole), 37):
        file.write_bytes(whole[:at] + b"\1" + whole[at + 1 :])
        digests.add(weights_digest(model))
    assert len(digests) == 1 + len(range(0, 1000, 37))
    file.write_bytes(whole)
    assert weights_digest(model) in digests


def test_it_is_remembered_until_a_file_changes(model: Path, memo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = model / "model.safetensors"
    age(file, monkeypatch)
    first = weights_digest(model, memo)
    assert len([*memo.iterdir()]) == 1
    next(memo.iterdir()).write_text("7" * 64)
    assert weights_digest(model, memo) == "7" * 64, "it was worked out again"

    before = file.stat()
    with file.open("r+b") as opened:  # the same size, and the old time set back
        opened.seek(-5, os.SEEK_END)
        opened.write(b"\1")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    age(file, monkeypatch)
    assert weights_digest(model, memo) not in (first, "7" * 64)


def test_what_was_changed_just_now_is_not_remembered(model: Path, memo: Path) -> None:
    assert weights_digest(model, memo) == weights_digest(model)
    assert [*memo.iterdir()] == []


def test_a_damaged_memory_is_no_digest(model: Path, memo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    age(model / "model.safetensors", monkeypatch)
    digest = weights_digest(model, memo)
    next(memo.iterdir()).write_text("half")
    assert weights_digest(model, memo) == digest
