"""Real daemons, shared by the tests of a module: starting one costs seconds."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.integration.daemon import Daemon, model_flags, running
from vibe_sgl_lite import Client

MODELS = model_flags()


@pytest.fixture(scope="module", params=MODELS, ids=str)
def model(request: pytest.FixtureRequest) -> list[str]:
    """Flags that choose the model; tests that use it run on each one at hand."""
    name: str = request.param
    return MODELS[name]


@pytest.fixture(scope="module")
def daemon(model: list[str]) -> Iterator[Daemon]:
    """A daemon with default settings, shared by a module's tests, which must leave it idle."""
    with running(*model) as daemon:
        yield daemon


@pytest.fixture
def client(daemon: Daemon) -> Iterator[Client]:
    with daemon.client() as client:
        yield client
