"""Real daemons, shared by the tests of a module: starting one costs seconds."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.integration.daemon import Daemon, model_flags, running
from vibe_sgl_lite import Client

MODELS = model_flags()


SLOW = [pytest.param(name, marks=[] if name == "embedded" else pytest.mark.slow, id=name) for name in MODELS]


@pytest.fixture(scope="module", params=SLOW)
def model(request: pytest.FixtureRequest) -> list[str]:
    """Flags that choose the model. Large ones, where there are such, are for the slow tests; test_lifecycle.py and
    test_equality.py start them in the others too."""
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


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For an engine in the test's own process: threads that wait for each other on a busy machine take many times as
    long."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
