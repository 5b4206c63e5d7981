"""A fake engine, and a client of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.runtime.client.fake_engine import FakeEngine, fake_engine
from vibe_sgl_lite import Client


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[FakeEngine]:
    with fake_engine(tmp_path) as fake:
        yield fake


@pytest.fixture
def client(engine: FakeEngine) -> Iterator[Client]:
    with Client(engine.address) as c:
        yield c
