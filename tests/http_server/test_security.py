"""Who is let in: keys, hosts, origins, content types, and what beyond loopback needs."""

from __future__ import annotations

import http.client
import json
import socket
import ssl
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import psutil
import pytest

from tests.http_server.server import Reply, Server, serving
from tests.integration.daemon import Daemon, wait_until
from vibe_sgl_lite import LLM, ConfigError
from vibe_sgl_lite.http_server.process import _uvicorn_config
from vibe_sgl_lite.runtime.settings.server_args import ServerArgs

KEY = "s3cret"
CHAT = "/v1/chat/completions"
BODY = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1}


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """With a key, TLS, a page's origin that may call, a log line for each request, two processes, and little room."""
    folder = tmp_path_factory.mktemp("tls")
    cert, key = folder / "cert.pem", folder / "key.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=localhost",
         "-addext", "subjectAltName=DNS:localhost", "-keyout", str(key), "-out", str(cert)],
        check=True, capture_output=True,
    )  # fmt: skip
    flags = ["--api-key", KEY, "--cors-origin", "https://chat.example", "--log-requests", "json", "--http-workers", "2"]
    flags += ["--restart", "on-failure", "--max-running-requests", "4"]
    with serving(*flags, "--ssl-certfile", str(cert), "--ssl-keyfile", str(key)) as server:
        server.tls = ssl.create_default_context(cafile=str(cert))
        yield server


def test_a_key_is_asked_for_everywhere_but_at_the_health_check(locked: Server) -> None:
    for headers in (
        {},
        {"authorization": "Bearer wrong"},
        {"authorization": f"Basic {KEY}"},
        {"authorization": f"Bearer {KEY}x"},
        {"x-api-key": ""},
    ):
        for method, path in (("POST", CHAT), ("GET", "/v1/models"), ("GET", "/metrics"), ("GET", "/server_info")):
            reply = locked.request(method, path, BODY if method == "POST" else None, headers)
            assert (reply.status, reply.json["error"]["code"]) == (401, "invalid_api_key"), (path, headers)
            assert reply.headers["www-authenticate"] == "Bearer"
    for headers in ({"authorization": f"Bearer {KEY}"}, {"x-api-key": KEY}, {"authorization": f"bearer  {KEY}"}):
        assert locked.post(CHAT, BODY, headers).status == 200
    assert locked.get("/health").status == 200
    assert KEY not in locked.get("/server_info", {"x-api-key": KEY}).data.decode()


def test_no_web_page_drives_a_loopback_server(server: Server) -> None:
    own = f"http://127.0.0.1:{server.address[1]}"
    assert server.post(CHAT, BODY, {"origin": own}).status == 200
    for headers, status in (
        ({"origin": "https://evil.example"}, 403),
        ({"origin": "null"}, 403),
        ({"origin": "http://["}, 403),
        ({"host": "evil.example"}, 403),
        ({"host": f"evil.example:{server.address[1]}", "origin": f"http://evil.example:{server.address[1]}"}, 403),
        ({"content-type": "text/plain"}, 415),
        ({"content-type": "application/x-www-form-urlencoded"}, 415),
    ):
        reply = server.post(CHAT, BODY, headers)
        assert reply.status == status, headers
        assert "access-control-allow-origin" not in reply.headers
    for host in ("localhost", "localhost:30000", "[::1]:1", "127.0.0.1"):
        assert server.get("/health", {"host": host}).status == 200
    assert server.request("OPTIONS", CHAT, headers={"origin": "https://evil.example"}).status == 403
    assert server.get("/metrics", {"host": "evil.example"}).status == 403


def test_the_allowed_origin_may_call(locked: Server) -> None:
    asked = {"origin": "https://chat.example", "access-control-request-method": "POST"}
    reply = locked.request("OPTIONS", CHAT, headers=asked)
    assert reply.status == 204
    assert reply.headers["access-control-allow-origin"] == "https://chat.example"
    assert "authorization" in reply.headers["access-control-allow-headers"]
    reply = locked.post(CHAT, BODY, {"origin": "https://chat.example", "x-api-key": KEY})
    assert (reply.status, reply.headers["access-control-allow-origin"]) == (200, "https://chat.example")


def test_every_request_leaves_a_line_and_workers_share_counts(locked: Server) -> None:
    for _ in range(20):  # over both processes
        assert locked.post(CHAT, BODY, {"x-api-key": KEY}).status == 200
    lines = [json.loads(line) for line in locked.daemon.log().splitlines() if line.startswith("{")]
    line = next(line for line in lines if line.get("completion_tokens") == 1)
    assert line["path"] == CHAT
    assert {"rid", "prompt_tokens", "cached_tokens", "ttft", "seconds", "finish"} <= set(line)
    assert KEY not in locked.daemon.log()
    name = "vllm:e2e_request_latency_seconds_count"

    def counts() -> set[str]:
        pages = [locked.get("/metrics", {"x-api-key": KEY}).data.decode() for _ in range(4)]
        return {next(row for row in page.splitlines() if row.startswith(name)).split()[1] for page in pages}

    # Each worker knows of the other what was so a second ago; which one answers is the kernel's choice.
    wait_until(lambda: all(float(count) >= 20 for count in counts()), 60, "both workers count all requests")


def _finish(answer: Reply) -> str:
    return str(answer.json["meta_info"]["finish_reason"]["type"])


def test_an_abort_reaches_requests_of_every_worker(locked: Server) -> None:
    headers = {"x-api-key": KEY}
    body = {"text": "Once", "sampling_params": {"max_new_tokens": 20_000, "ignore_eos": True}}
    with ThreadPoolExecutor(4) as pool:
        calls = [pool.submit(locked.post, "/generate", body | {"rid": f"r{i}"}, headers) for i in range(4)]
        wait_until(lambda: locked.stats()["num_running"] == 4, 30, "all of them run")
        for i in range(2):
            assert locked.post("/abort_request", {"rid": f"r{i}"}, headers).status == 200
        assert [_finish(call.result(30)) for call in calls[:2]] == ["abort"] * 2
        assert not any(call.done() for call in calls[2:])
        assert locked.post("/abort_request", {"abort_all": True}, headers).status == 200
        assert [_finish(call.result(30)) for call in calls[2:]] == ["abort"] * 2


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has all of 127.0.0.0/8 on its loopback interface")
def test_clients_take_turns_however_much_each_asks_for(locked: Server) -> None:
    """They share the HTTP server's session, and are told apart by address and key."""
    headers = {"x-api-key": KEY, "content-type": "application/json"}
    lengths = [{"max_new_tokens": 50 * (i + 1), "ignore_eos": True} for i in range(100)]  # minutes of work
    many = {"text": ["Once upon a time"] * 100, "sampling_params": lengths}
    modest = http.client.HTTPSConnection(
        "localhost", locked.address[1], timeout=60, context=locked.tls, source_address=("127.0.0.2", 0)
    )
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(locked.post, "/generate", many, headers)
        wait_until(lambda: locked.stats()["num_running"] == 4, 30, "the greedy one's requests run")
        modest.request("POST", "/v1/completions", json.dumps({"prompt": "And", "max_tokens": 1}), headers)
        assert modest.getresponse().status == 200
        modest.close()
        assert not call.done()
        assert locked.post("/abort_request", {"abort_all": True}, headers).status == 200
        ends = {answer["meta_info"]["finish_reason"]["type"] for answer in call.result(60).json}
        assert "abort" in ends <= {"abort", "length"}  # those that were short had ended


def test_beyond_loopback_needs_a_key_or_a_word() -> None:
    for host in ("0.0.0.0", "::", "192.0.2.1", "example.org"):
        with pytest.raises(ConfigError, match="--host") as caught:
            ServerArgs(host=host)
        assert caught.value.field == "host"
        ServerArgs(host=host, api_key="k")
        ServerArgs(host=host, insecure=True)
        ServerArgs(host=host, no_http=True)
    ServerArgs(host="localhost")
    with pytest.raises(ConfigError, match="--ssl-certfile"):
        ServerArgs(ssl_keyfile="x.pem")


@pytest.mark.parametrize("what", ["missing", "no certificate", "no key", "a password"])
def test_a_certificate_that_cannot_be_used_is_named(tmp_path: Path, what: str) -> None:
    """Before it is served, and without a question on the terminal."""
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    if what != "missing":
        cert.write_text("hello")
    if what in ("no key", "a password"):
        subprocess.run(
            ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-passout", "pass:secret", "-days", "1",
             "-subj", "/CN=x", "-keyout", str(key), "-out", str(cert)],
            check=True, capture_output=True,
        )  # fmt: skip
    args = ServerArgs(ssl_certfile=str(cert), ssl_keyfile=str(key) if what == "a password" else None)
    with pytest.raises(ConfigError, match=f"^--ssl-certfile {cert}") as caught:
        _uvicorn_config(cast("Any", None), args)
    assert "\n" not in str(caught.value)


def test_a_port_in_use_is_named() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with Daemon("--port", str(port)) as daemon:
            assert daemon.wait_exit() != 0
            assert f"--port {port}" in daemon.log()


def test_llm_serves_no_http(monkeypatch: pytest.MonkeyPatch) -> None:
    class NoPipeline:
        def __init__(self, args: ServerArgs) -> None:
            raise NotImplementedError(str(args.no_http))

    monkeypatch.setattr("vibe_sgl_lite.runtime.client.llm.Pipeline", NoPipeline)
    with pytest.raises(NotImplementedError, match="True"):
        LLM()


def test_tls_is_served_with_the_certificate(locked: Server) -> None:
    assert locked.url.startswith("https://127.0.0.1:")
    with pytest.raises(http.client.RemoteDisconnected):  # what speaks plain HTTP gets nothing
        Server(locked.daemon, locked.url).get("/health")


def test_a_worker_that_dies_comes_back_on_the_same_port(locked: Server) -> None:
    """With another one alive, and then all at once, as nobody is left who has the socket."""
    headers = {"x-api-key": KEY}

    def workers() -> list[psutil.Process]:
        return [child for child in locked.daemon.descendants() if "http_server" in " ".join(child.cmdline())]

    def serves() -> bool:
        try:
            return locked.post(CHAT, BODY, headers).status == 200
        except OSError:
            return False

    assert len(workers()) == 2
    for count in (1, 2):
        wait_until(lambda: len(workers()) == 2, 30, "both are there")
        dying = workers()[:count]
        for process in dying:
            process.kill()
        psutil.wait_procs(dying, timeout=10)
        wait_until(serves, 30, "serving again")
