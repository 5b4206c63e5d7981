"""A manager without processes, for tests that move it by hand, and one in its process, beside a detokenizer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.tokenizer_manager.harness import TextSide, make_spec, text_side
from tests.tokenizer_manager.world import World
from vibe_sgl_lite.runtime.launcher.child import PipelineSpec
from vibe_sgl_lite.runtime.messages import Goodbye


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> PipelineSpec:
    return make_spec(Path(tmp_path_factory.mktemp("spec")))


@pytest.fixture
def world(spec: PipelineSpec) -> World:
    world = World(spec)
    world.hello(b"a")
    return world


@pytest.fixture(scope="package")
def shared() -> Iterator[TextSide]:
    with text_side() as side:
        yield side


@pytest.fixture
def side(shared: TextSide) -> Iterator[TextSide]:
    """Nothing is left over for the next test: the processes are one test's as long as it runs."""
    yield shared
    scheduler = shared.scheduler
    scheduler.hold = scheduler.mute = False
    scheduler.reject = scheduler.flush_error = None
    scheduler.repeat, scheduler.pause_s = 1, 0.0
    for client in shared._clients:
        if not client.socket.closed:
            client.send(Goodbye())
            client.socket.close(linger=500)
    shared._clients.clear()
    scheduler.heard.clear()
