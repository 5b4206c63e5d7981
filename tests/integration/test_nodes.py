"""Engines over several nodes: two launchers on one machine, and two network namespaces with a cable to cut."""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path

import psutil
import pytest

from tests.chaos.asks import make_asks, undisturbed
from tests.chaos.holdings import assert_idle
from tests.chaos.traffic import Traffic
from tests.integration.daemon import ROOT, Daemon, running, wait_until
from tests.integration.streams import Streams, assert_dead_within
from vibe_sgl_lite import EngineDeadError, SamplingParams

PROMPTS = ["Once upon a time there was a small cat", "One day, Tom went to the river. " * 30, "12 + 30 ="]
GREEDY = SamplingParams(max_new_tokens=24, temperature=0, ignore_eos=True)
MOE = str(ROOT / "examples" / "tiny_model" / "moe")
STEP_TIMEOUT_S = 2


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def node_flags(count: int, node: int, meeting: str) -> list[str]:
    return ["--nnodes", str(count), "--node-rank", str(node), "--dist-init-addr", meeting]


def single_rank_tokens(*flags: str) -> list[list[int]]:
    with running("--dtype", "float32", *flags) as daemon, daemon.client() as client:
        return [output.token_ids for output in client.generate(PROMPTS, GREEDY)]


def listening(daemon: Daemon) -> list[IPv4Address | IPv6Address]:
    """Addresses of every TCP socket that its processes listen on."""
    sockets = [socket for process in daemon.descendants() for socket in process.net_connections("tcp")]
    return [ip_address(socket.laddr.ip) for socket in sockets if socket.status == psutil.CONN_LISTEN]


def test_a_port_that_is_taken_is_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        meeting = f"127.0.0.1:{taken.getsockname()[1]}"
        with Daemon("--tp", "2", *node_flags(2, 0, meeting)) as daemon:
            assert daemon.wait_exit(60) == 2
            says = f"error: model_worker.0: --dist-init-addr {meeting}: node 0 cannot listen there (Address already in"
            assert daemon.log().splitlines()[-1].startswith(says)


def test_two_nodes_on_one_machine() -> None:
    model = ["--model-path", MOE]
    expected = single_rank_tokens(*model)
    flags = [*model, "--dtype", "float32", "--tp", "2", "--ep", "2", "--debug-rank-digest"]
    meeting = f"127.0.0.1:{free_port()}"
    with Daemon(*flags, *node_flags(2, 1, meeting)) as second, Daemon(*flags, *node_flags(2, 0, meeting)) as first:
        assert first.wait_ready()["tp"] == "2"
        facts = second.wait_ready()
        assert (facts["node"], facts["ranks"]) == ("1", "1-1")
        assert set(second.children()) == {"model_worker.1"}
        assert set(first.children()) == {"model_worker.0", "tokenizer_manager", "scheduler", "detokenizer"}
        assert all(address.is_loopback for daemon in (first, second) for address in listening(daemon))
        with first.client() as client:
            time.sleep(1.5)  # idle for a few empty frames
            assert [output.token_ids for output in client.generate(PROMPTS, GREEDY)] == expected
        assert first.stop() == 0
        assert second.wait_exit(5) == 0  # it follows
        assert first.survivors() == second.survivors() == []
        assert "Traceback" not in first.log() + second.log()


def test_nodes_that_disagree_are_refused_on_both() -> None:
    meeting = f"127.0.0.1:{free_port()}"
    flags = ["--tp", "2", "--dtype", "float32"]
    with (
        Daemon(*flags, "--page-size", "8", *node_flags(2, 1, meeting)) as second,
        Daemon(*flags, *node_flags(2, 0, meeting)) as first,
    ):
        for node, daemon in enumerate((first, second)):
            assert daemon.wait_exit(60) == 2
            says = (
                f"error: model_worker.{node}: --page-size is not the same on all nodes: 8 where rank 1 is, 16 on node 0"
            )
            assert daemon.log().splitlines()[-1].startswith(says)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_lost_rank_changes_no_token(victim: int) -> None:
    """Of node 0 or of the other one: all ranks meet again."""
    meeting = f"127.0.0.1:{free_port()}"
    flags = ["--tp", "2", "--dtype", "float32", "--max-restarts", "20", "--no-standby"]
    with (
        Daemon(*flags, *node_flags(2, 1, meeting)) as second,
        Daemon(*flags, *node_flags(2, 0, meeting)) as first,
    ):
        nodes = (first, second)
        for node in nodes:
            node.wait_ready()
        with first.client() as client:
            asks = make_asks(5, 120)
            traffic = Traffic([client] * len(asks), asks, undisturbed(client, asks), endless=False)
            wait_until(lambda: all(stream.arrivals for stream in traffic.streams), 60, "streams under way")
            nodes[victim].children()[f"model_worker.{victim}"].kill()
            traffic.join(120)
            assert not traffic.wrong, traffic.wrong
            assert_idle(client)
        assert first.stop() == 0
        assert second.wait_exit(10) == 0


@pytest.mark.slow
def test_a_node_that_does_not_come_back_ends_the_engine() -> None:
    meeting = f"127.0.0.1:{free_port()}"
    flags = ["--tp", "2", "--dtype", "float32", "--rejoin-timeout", "5", "--no-standby"]
    with (
        Daemon(*flags, *node_flags(2, 1, meeting)) as second,
        Daemon(*flags, *node_flags(2, 0, meeting)) as first,
    ):
        first.wait_ready()
        second.wait_ready()
        with first.client() as client:
            streams = Streams([client], each=2)
            streams.wait_running()
            second.process.kill()
            assert first.wait_exit(60) == 1
            streams.wait_ended(10)
            assert all(isinstance(end, EngineDeadError) for _, end in streams.ends)
        assert "did not meet again in 5 s" in first.log().splitlines()[-1]
        assert first.survivors(0.5) == []


def test_a_killed_rank_of_another_node_ends_both_nodes() -> None:
    meeting = f"127.0.0.1:{free_port()}"
    with (
        Daemon("--tp", "2", "--restart", "never", *node_flags(2, 1, meeting)) as second,
        Daemon("--tp", "2", "--restart", "never", *node_flags(2, 0, meeting)) as first,
    ):
        first.wait_ready()
        second.wait_ready()
        with first.client() as client:
            streams = Streams([client], each=4)
            streams.wait_running()
            start = time.monotonic()
            second.children()["model_worker.1"].kill()
            assert_dead_within(streams, start, 2.0)
        assert second.wait_exit(5) == 1
        assert second.log().splitlines()[-1] == "error: model_worker.1 was killed by SIGKILL"
        assert first.wait_exit(5) == 1
        assert first.log().splitlines()[-1].startswith("error: model_worker.0: ")
        assert first.survivors(20) == second.survivors(20) == []


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


class Cable:
    """Two network namespaces with a veth pair between them: 10.77.0.1 and 10.77.0.2, and nothing else."""

    def __init__(self, tag: str) -> None:
        self.spaces = [f"vsl-{tag}-0", f"vsl-{tag}-1"]
        self.ends = [f"v{tag}0", f"v{tag}1"]

    def plug(self) -> None:
        for space in self.spaces:
            ip("netns", "add", space)
        ip(
            "link",
            "add",
            self.ends[0],
            "netns",
            self.spaces[0],
            "type",
            "veth",
            "peer",
            self.ends[1],
            "netns",
            self.spaces[1],
        )
        for number, (space, end) in enumerate(zip(self.spaces, self.ends, strict=True), start=1):
            ip("-n", space, "address", "add", f"10.77.0.{number}/24", "dev", end)
            ip("-n", space, "link", "set", end, "up")
            ip("-n", space, "link", "set", "lo", "up")

    def cut(self) -> None:
        ip("-n", self.spaces[1], "link", "set", self.ends[1], "down")

    def mend(self) -> None:
        ip("-n", self.spaces[1], "link", "set", self.ends[1], "up")

    def remove(self) -> None:
        for space in self.spaces:
            subprocess.run(["ip", "netns", "delete", space], check=False, capture_output=True)


@contextmanager
def cable() -> Iterator[Cable]:
    """Skips, by name, where namespaces cannot be made."""
    if shutil.which("ip") is None or os.geteuid() != 0 or not Path("/proc/self/ns/net").exists():
        pytest.skip("network namespaces need Linux, root and iproute2")
    made = Cable(secrets.token_hex(3))
    with ExitStack() as cleanup:
        cleanup.callback(made.remove)
        try:
            made.plug()
        except subprocess.CalledProcessError as error:
            pytest.skip(f"network namespaces cannot be made here: {error.stderr.strip()}")
        yield made


@pytest.mark.slow
def test_cutting_the_link_ends_every_request() -> None:
    expected = single_rank_tokens()
    flags = ["--tp", "4", "--dtype", "float32", "--step-timeout", str(STEP_TIMEOUT_S), "--restart", "never"]
    with cable() as link, ExitStack() as stack:
        nodes = [
            stack.enter_context(
                Daemon(
                    *flags,
                    *node_flags(2, node, "10.77.0.1:29411"),
                    under=("ip", "netns", "exec", link.spaces[node]),
                )
            )
            for node in (0, 1)
        ]
        assert nodes[0].wait_ready()["tp"] == "4"
        assert nodes[1].wait_ready()["ranks"] == "2-3"
        with nodes[0].client() as one, nodes[0].client() as two:
            assert [output.token_ids for output in one.generate(PROMPTS, GREEDY)] == expected
            streams = Streams([one, two], each=4)
            streams.wait_running()
            start = time.monotonic()
            link.cut()
            assert_dead_within(streams, start, STEP_TIMEOUT_S + 2.0)
        assert nodes[0].wait_exit(5) == 1
        assert nodes[0].survivors(20) == []
        assert nodes[1].wait_exit(40) == 1  # it hears nothing any more
        assert nodes[1].survivors(20) == []
