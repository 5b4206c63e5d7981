"""A process that is lost costs no request: streams pause and go on with the tokens that would have come."""

from __future__ import annotations

import signal

import pytest

from tests.chaos.disturbed import Run, assert_nothing_leaked, assert_same, make_jobs
from tests.integration.daemon import running, wait_until

FLAGS = ("--dtype", "float32", "--restart", "on-failure", "--max-restarts", "100")
TOKENS = 120


@pytest.mark.parametrize(
    ("flags", "victim", "sent"),
    [
        ((), "model_worker.0", signal.SIGKILL),
        (("--step-timeout", "1.5"), "model_worker.0", signal.SIGSTOP),
        (("--tp", "2"), "model_worker.1", signal.SIGSEGV),
        ((), "scheduler", signal.SIGKILL),
        ((), "detokenizer", signal.SIGKILL),
        ((), "tokenizer_manager", signal.SIGKILL),
    ],
    ids=["rank-killed", "rank-hung", "rank-of-two", "scheduler", "detokenizer", "tokenizer-manager"],
)
def test_a_lost_process_changes_no_token(flags: tuple[str, ...], victim: str, sent: signal.Signals) -> None:
    with running(*FLAGS, *flags) as daemon, daemon.client() as client:
        undisturbed = Run(client, make_jobs(8, TOKENS))
        undisturbed.wait(60)
        pages = client.stats()["kv_pages_total"]
        run = Run(client, make_jobs(8, TOKENS))
        wait_until(lambda: run.num_tokens > 100, 30, "streams under way")
        daemon.children()[victim].send_signal(sent)
        run.wait(60)
        assert_same(run, undisturbed)
        assert_nothing_leaked(daemon, client)
        assert client.stats()["kv_pages_total"] == pages
        assert "serving again" in daemon.log()
        assert daemon.stop() == 0


def test_the_engine_gives_up_when_ranks_keep_dying() -> None:
    with running(*FLAGS[:-1], "1") as daemon, daemon.client() as client:
        run = Run(client, make_jobs(4, 4000))
        wait_until(lambda: run.num_tokens > 20, 30, "streams under way")
        for _ in range(2):
            wait_until(lambda: "model_worker.0" in daemon.children(), 60, "a rank")
            daemon.children()["model_worker.0"].kill()
            wait_until(lambda: "restarting model_worker.0" in daemon.log(), 60, "a restart")
        assert daemon.wait_exit(20) == 1
        run.wait(10)
        assert all(len(job.ends) == 1 and job.ends[0].startswith("EngineDeadError") for job in run.jobs)
        assert "given up after 1 restarts in 60 s" in daemon.log().splitlines()[-1]
