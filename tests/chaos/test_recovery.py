"""A process that is lost costs no request: streams pause and go on with the tokens that would have come.

test_driver.py kills each process once; here is what needs an engine of its own.
"""

from __future__ import annotations

import contextlib
import signal

import pytest

from tests.chaos.asks import make_asks, undisturbed
from tests.chaos.holdings import assert_idle
from tests.chaos.traffic import Traffic
from tests.integration.daemon import running, wait_until
from tests.integration.streams import Streams
from vibe_sgl_lite import EngineDeadError

FLAGS = ("--dtype", "float32", "--restart", "on-failure", "--max-restarts", "100")
TOKENS = 120


@pytest.mark.parametrize(
    ("flags", "victim", "sent"),
    [
        (("--step-timeout", "4"), "model_worker.0", signal.SIGSTOP),
        pytest.param(("--tp", "2"), "model_worker.1", signal.SIGSEGV, marks=pytest.mark.slow),
    ],
    ids=["rank-hung", "rank-of-two"],
)
def test_a_lost_process_changes_no_token(flags: tuple[str, ...], victim: str, sent: signal.Signals) -> None:
    with running(*FLAGS, *flags) as daemon, daemon.client() as client:
        asks = make_asks(10, TOKENS)
        answers = undisturbed(client, asks)
        pages = client.stats()["kv_pages_total"]
        traffic = Traffic([client] * len(asks), asks, answers, endless=False)
        wait_until(lambda: all(stream.arrivals for stream in traffic.streams), 30, "streams under way")
        daemon.children()[victim].send_signal(sent)
        traffic.join(60)
        assert not traffic.wrong, traffic.wrong
        assert_idle(client)
        assert client.stats()["kv_pages_total"] == pages
        assert "serving again" in daemon.log()
        assert daemon.stop() == 0


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["tokenizer_manager", "scheduler", "detokenizer"])
def test_50_clients_survive_a_kill_with_the_same_text(victim: str) -> None:
    with running(*FLAGS) as daemon, contextlib.ExitStack() as stack:
        clients = [stack.enter_context(daemon.client()) for _ in range(50)]
        asks = make_asks(len(clients), TOKENS)
        answers = undisturbed(clients[0], asks)
        traffic = Traffic(clients, asks, answers, endless=False)
        wait_until(lambda: all(stream.arrivals for stream in traffic.streams), 60, "streams under way")
        daemon.children()[victim].kill()
        traffic.join(120)
        assert not traffic.wrong, traffic.wrong
        assert traffic.finished == len(clients)
        assert_idle(clients[0])


def test_the_detokenizer_forgets_what_a_dead_scheduler_has_opened() -> None:
    with running(*FLAGS, "--log-level", "info") as daemon, daemon.client() as other:
        with daemon.client() as client:
            streams = Streams([client], each=4)
            streams.wait_running()
            daemon.children()["scheduler"].kill()
            wait_until(lambda: "serving again" in daemon.log(), 30, "it is there again")
        streams.wait_ended(30)
        assert_idle(other)
        assert daemon.stop() == 0
        assert "detokenizer INFO leaving: 0 samples open" in daemon.log()


def test_the_engine_gives_up_when_ranks_keep_dying() -> None:
    with running(*FLAGS[:-1], "1") as daemon, daemon.client() as client:
        streams = Streams([client], each=4)
        streams.wait_running()
        for _ in range(2):
            wait_until(lambda: "model_worker.0" in daemon.children(), 30, "a rank")
            daemon.children()["model_worker.0"].kill()
            wait_until(lambda: "model_worker.0 was killed" in daemon.log(), 30, "its death is noticed")
        assert daemon.wait_exit(30) == 1
        streams.wait_ended(30)
        assert all(isinstance(end, EngineDeadError) for _, end in streams.ends)
        assert "given up after 1 restarts in 60 s" in daemon.log().splitlines()[-1]
